import pytest
import timm
import torch
from timm.utils import reparameterize_model
from torch import nn

from repopt_timm import Scales, make_grad_mults, save_pretrained
from repopt_timm.models.initial_values import initial_values

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


@pytest.mark.parametrize(
    'numbers',
    [{'depths': (1, 1)}, {'widths': (8, 8)}, {'depths': (1, 0, 1, 1)}, {**NUMBERS, 'strides': (2, 2)}],
)
def test_numbers_that_do_not_go_together_are_refused(numbers):
    with pytest.raises(ValueError, match=r'depths=|strides='):
        tiny_model('_branches', **numbers)


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
        # The target of a search has no config.json.
        assert (str(NUMBERS['widths']) in (tmp_path / 'README.md').read_text()) == (kind == '_hs')
        with pytest.raises(ValueError, match='Make the model alike'):
            tiny_model(kind, scales=scales)


@pytest.mark.parametrize('strides', [(1, 1, 2, 2, 2), (2, 2, 2, 2, 1)])
def test_the_initial_values_of_a_mobileone_are_those_of_its_strides(strides):
    scales = Scales.initial(timm.create_model('repopt_mobileone_s0', strides=strides, device='meta'))
    assert initial_values(scales) == scales
