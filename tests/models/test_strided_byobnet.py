import pytest
import timm
import torch
from timm.utils import reparameterize_model
from torch import nn

from repopt_timm import Scales, make_grad_mults, save_pretrained

from ..helpers import TINY, tiny_model

NUMBERS = {'depths': (1, 2, 1), 'widths': (8, 16, 16, 24), 'strides': (1, 2, 1, 2)}
IMAGES = torch.randn(2, 3, 32, 32)


def convs(model):
    found = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    return [(conv.weight.shape, conv.stride, conv.padding, conv.dilation, conv.groups) for conv in found]


@pytest.mark.parametrize('numbers', [{}, NUMBERS, {**NUMBERS, 'output_stride': 2}, {'use_se': True}])
def test_both_kinds_are_the_same_network_once_their_branches_are_merged(numbers):
    plain, branches = tiny_model(**numbers), tiny_model('_branches', **numbers)
    assert len(convs(branches)) > len(convs(plain))
    # Where squeeze-and-excitation follows the ReLU, modules have another order.
    order = sorted if 'use_se' in numbers else list
    assert order(map(str, convs(reparameterize_model(branches)))) == order(map(str, convs(plain)))
    shapes = [[feature.shape for feature in model.forward_intermediates(IMAGES)[1]] for model in (plain, branches)]
    assert shapes[0] == shapes[1]
    assert plain.feature_info == branches.feature_info


@pytest.mark.parametrize('numbers', [{}, NUMBERS])
def test_reparameterizing_the_branches_keeps_the_function(numbers):
    model = tiny_model('_branches', **numbers).double()
    model(IMAGES.double())
    merged = reparameterize_model(model.eval())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in merged.modules())
    torch.testing.assert_close(merged(IMAGES.double()), model(IMAGES.double()), rtol=0, atol=1e-12)


def test_the_branches_take_timms_arguments_and_train_with_an_ordinary_optimizer():
    model = tiny_model('_branches', in_chans=1, global_pool='max', drop_path_rate=0.5, drop_rate=0.1, **NUMBERS)
    optimizer = timm.optim.create_optimizer_v2(model, 'sgd', lr=0.1)
    before = [param.clone() for param in model.parameters()]
    model(torch.randn(2, 1, 32, 32)).sum().backward()
    optimizer.step()
    assert not any(torch.equal(old, new) for old, new in zip(before[:2], model.parameters()))
    features = tiny_model('_branches', features_only=True, **NUMBERS)
    assert features.feature_info.reduction() == [1, 2, 4]
    assert [32 // each.shape[-1] for each in features(IMAGES)] == [1, 2, 4]


def test_the_branches_refuse_scales():
    with pytest.raises(ValueError, match=f'{TINY}_branches does not take scales'):
        tiny_model('_branches', scales='initial')


@pytest.mark.parametrize('kind', ['', '_hs', '_csla'])
def test_scales_belong_to_the_chosen_numbers(kind):
    scales = Scales.initial(tiny_model(**NUMBERS))
    model = tiny_model(kind, scales=scales, **NUMBERS)
    assert Scales.from_model(model) == scales
    assert set(scales['stages.1.1.conv']) == {'kxk', '1x1', 'identity'}
    assert len(scales) == 5
    if not kind:
        assert len(make_grad_mults(model)) == 5
    with pytest.raises(ValueError, match='make the model alike'):
        tiny_model(kind, scales=scales)


@pytest.mark.parametrize(
    ('numbers', 'message'),
    [
        ({'depths': (1, 1)}, 'expected one width more than depths'),
        ({'widths': (8, 8)}, 'expected one width more than depths'),
        ({'depths': (1, 0, 1, 1)}, r'depths=\(1, 0, 1, 1\): expected positive integers'),
        ({'widths': 'abc'}, "widths='abc': expected positive integers"),
        ({**NUMBERS, 'strides': (2, 2)}, 'expected 4 values of 1 or 2, for the stem and 3 stages'),
    ],
)
@pytest.mark.parametrize('kind', ['', '_branches'])
def test_numbers_are_checked(kind, numbers, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(kind, **numbers)


@pytest.mark.parametrize('recorded', [True, False])
@pytest.mark.parametrize('kind', ['', '_hs', '_branches'])
def test_a_repository_states_the_numbers(tmp_path, kind, recorded):
    model = tiny_model(kind, in_chans=1, **NUMBERS, **({} if kind else {'scales': 'initial'})).eval()
    if not recorded:
        # As timm before 1.0.31 does.
        vars(model).pop('_model_args', None)
    save_pretrained(model, tmp_path)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert torch.equal(loaded(IMAGES[:, :1]), model(IMAGES[:, :1]))
    card = (tmp_path / 'README.md').read_text()
    numbers = ', '.join(f'{name}={value}' for name, value in NUMBERS.items())
    assert (numbers in card) == (kind != '_branches')
