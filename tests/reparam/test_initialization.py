import copy
import pickle

import pytest
import timm
import torch
from torch import nn

from repopt_timm import Scales, attach_scales, csla, initialize, load_scales, make_grad_mults, prepare
from repopt_timm.reparam import ConvPrior, carried_scales

from ..helpers import random_scales, tiny_model


def net():
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))


def vectors(channels=4, branches=('1x1', 'identity', 'kxk')):
    return {branch: torch.rand(channels) + 0.5 for branch in branches}


def test_the_rule_of_initialization_adds_the_searched_identity():
    model, searched = net(), vectors()
    torch.manual_seed(1)
    initialize(model, {'0': searched})
    with_identity = model[0].weight.detach().clone()
    torch.manual_seed(1)
    initialize(model, {'0': {**searched, 'identity': searched['identity'] + 1}})
    difference = model[0].weight.detach() - with_identity
    expected = torch.zeros_like(difference)
    expected[torch.arange(4), torch.arange(4), 1, 1] = 1.0
    torch.testing.assert_close(difference, expected)


@pytest.mark.parametrize(('branch', 'fan_in', 'taps'), [('kxk', 9 * 32, slice(None)), ('1x1', 32, slice(1, 2))])
def test_operators_are_drawn_as_pytorch_draws_a_convolution(branch, fan_in, taps):
    model = nn.Sequential(nn.Conv2d(32, 64, 3, padding=1))
    initialize(model, {'0': {branch: torch.full((64,), 2.0)}})
    drawn = model[0].weight[:, :, taps, taps]
    bound = 2.0 / fan_in**0.5
    assert drawn.abs().max() <= bound
    assert drawn.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


def test_a_count_adds_independent_draws():
    model = nn.Sequential(nn.Conv2d(32, 64, 3, padding=1))
    initialize(model, Scales('', {'0': {'kxk': torch.ones(64)}}, counts={'0': {'kxk': 4}}))
    bound = 1 / (9 * 32) ** 0.5
    assert model[0].weight.std().item() == pytest.approx(2 * bound / 3**0.5, rel=0.05)
    assert model[0].weight.abs().max() > bound


def test_a_plain_mapping_takes_its_counts_from_the_prior():
    model, mapping = net(), {'0': vectors()}
    counts = {'1x1': 1, 'identity': 1, 'kxk': 4}
    ConvPrior(counts).put_on(model[0])
    assert load_scales(mapping, model).counts == {'0': counts}
    assert csla(model, mapping)[0].branch_counts == counts
    assert Scales.from_model(csla(model, Scales('', mapping))).counts['0']['kxk'] == 1
    corner = make_grad_mults(model, mapping)[model[0].weight].taps[:, 0, 0, 0]
    torch.testing.assert_close(corner, 4 * mapping['0']['kxk'] ** 2)
    attach_scales(model, mapping)
    assert carried_scales(model)['0'].counts == counts


def test_initialization_leaves_other_modules_alone():
    model = net()
    before = copy.deepcopy(model[2].state_dict())
    initialize(model, {'0': vectors()})
    assert all(torch.equal(before[name], tensor) for name, tensor in model[2].state_dict().items())


@pytest.mark.parametrize('name', ['1', '7'])
def test_scales_of_a_module_that_is_no_convolution_are_refused(name):
    with pytest.raises(ValueError, match=f"scales for a convolution '{name}'"):
        initialize(net(), {name: vectors()})


def test_a_sharded_model_is_not_initialized(shard):
    model = shard(tiny_model())
    with pytest.raises(ValueError, match=r"'stem\.conv' of .* is sharded already.* Prepare the model before"):
        prepare(model, random_scales())


def test_an_identity_vector_where_the_convolution_has_none_is_refused():
    with pytest.raises(ValueError, match="module '2': An identity branch needs"):
        attach_scales(net(), {'2': vectors(2, ('identity', 'kxk'))})


@pytest.mark.parametrize(
    'wrap',
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: model.to(torch.bfloat16),
        lambda model: nn.ModuleDict({'student': model}),
    ],
    ids=['copied', 'pickled', 'cast', 'wrapped'],
)
def test_carried_scales_survive_what_happens_to_models(wrap):
    scales = random_scales()
    carried = list(carried_scales(wrap(tiny_model(scales=scales))).values())
    assert {scale.fingerprint for scale in carried} == {scales.fingerprint}
    assert all(torch.equal(scale.vectors['kxk'], scales[name]['kxk']) for scale, name in zip(carried, scales))


def test_grad_mults_cost_next_to_nothing():
    with torch.device('meta'):
        model = timm.create_model('repopt_vgg_b1')
    attach_scales(model, Scales.initial(model))
    mults = make_grad_mults(model)
    size = sum(param.nbytes for param in mults)
    assert sum(mult.nbytes for mult in mults.values()) < 0.02 * size
