import pytest
import timm
import torch
from timm.utils import reparameterize_model
from torch import nn

from repopt_timm import Scales, make_grad_mults, save_pretrained
from repopt_timm.models.initial_values import initial_values
from repopt_timm.models.records import stated_arguments

from ..helpers import tiny_model

NUMBERS = {'depths': (1, 2, 1), 'widths': (8, 16, 16, 24), 'strides': (1, 2, 1, 2)}
IMAGES = torch.randn(2, 3, 32, 32)


def convs(model):
    found = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    return [(conv.weight.shape, conv.stride, conv.padding, conv.dilation, conv.groups) for conv in found]


@pytest.mark.parametrize('numbers', [{}, {**NUMBERS, 'output_stride': 2}, {'use_se': True}])
def test_both_kinds_are_the_same_network_once_their_branches_are_merged(numbers):
    plain, branches = tiny_model(**numbers), tiny_model('_branches', **numbers).double()
    assert len(convs(branches)) > len(convs(plain))
    merged = reparameterize_model(branches.eval())
    torch.testing.assert_close(merged(IMAGES.double()), branches(IMAGES.double()), rtol=0, atol=1e-12)
    # Where squeeze-and-excitation follows the ReLU, modules have another order.
    order = sorted if 'use_se' in numbers else list
    assert order(map(str, convs(merged))) == order(map(str, convs(plain)))
    assert plain.feature_info == branches.feature_info


def test_features_of_the_branches_have_the_chosen_strides():
    features = tiny_model('_branches', features_only=True, drop_path_rate=0.5, **NUMBERS)
    assert features.feature_info.reduction() == [1, 2, 4] == [32 // each.shape[-1] for each in features(IMAGES)]


@pytest.mark.parametrize(
    'numbers',
    [{'depths': (1, 1)}, {'widths': (8, 8)}, {'depths': (1, 0, 1, 1)}, {**NUMBERS, 'strides': (2, 2)}],
)
def test_numbers_that_do_not_go_together_are_refused(numbers):
    with pytest.raises(ValueError, match=r'depths=|strides='):
        tiny_model('_branches', **numbers)


def test_before_1_0_31_a_repository_states_what_timm_does_not(monkeypatch):
    monkeypatch.delattr('timm.models._hub.get_model_args', raising=False)
    model = tiny_model(in_chans=1, scales='initial', drop_rate=0.1, **NUMBERS)
    assert stated_arguments(model) == {'in_chans': 1, **NUMBERS}


@pytest.mark.parametrize('kind', ['', '_hs', '_branches'])
def test_scales_and_repositories_belong_to_the_chosen_numbers(tmp_path, kind):
    scales = Scales.initial(tiny_model(**NUMBERS))
    given = {} if kind == '_branches' else {'scales': scales}
    model = tiny_model(kind, in_chans=1, **NUMBERS, **given).eval()
    save_pretrained(model, tmp_path)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert torch.equal(loaded(IMAGES[:, :1]), model(IMAGES[:, :1]))
    if given:
        assert Scales.from_model(model) == Scales.from_model(loaded) == scales
        assert len(scales) == (len(make_grad_mults(model)) if kind == '' else 5)
        assert str(NUMBERS['widths']) in (tmp_path / 'README.md').read_text()
        with pytest.raises(ValueError, match='Make the model alike'):
            tiny_model(kind, scales=scales)


@pytest.mark.parametrize('strides', [(1, 1, 2, 2, 2), (2, 2, 2, 2, 1)])
def test_a_card_states_the_strides_of_a_mobileone(tmp_path, strides):
    model = timm.create_model('repopt_mobileone_s0', strides=strides, scales='initial')
    save_pretrained(model, tmp_path)
    assert f'strides={strides}' in (tmp_path / 'README.md').read_text()
    scales = Scales.from_model(model)
    assert initial_values(scales) == scales
    assert timm.create_model('repopt_mobileone_s0', strides=strides, scales=str(tmp_path)).num_classes == 1000
