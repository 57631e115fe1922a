import copy
import pickle

import pytest
import torch
from torch import nn

from repopt_timm import Scales, csla, load_scales, make_grad_mults, prepare
from repopt_timm.reparam import ConvPrior, carried_scales

from ..helpers import random_scales, tiny_model


def net():
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))


def vectors(channels=4, branches=('1x1', 'identity', 'kxk')):
    return {branch: torch.rand(channels) + 0.5 for branch in branches}


def test_a_plain_network_starts_as_its_csla_twin_also_with_negative_scales():
    model, negative = net(), {branch: -vector for branch, vector in vectors().items()}
    scales = Scales('', {'0': negative}, counts={'0': {'kxk': 2}})
    torch.manual_seed(1)
    twin = csla(model, scales)
    torch.manual_seed(1)
    torch.testing.assert_close(prepare(model, scales)[0].weight, twin[0].weight)


@pytest.mark.parametrize('count', [1, 4])
@pytest.mark.parametrize(('branch', 'fan_in', 'taps'), [('kxk', 9 * 32, slice(None)), ('1x1', 32, slice(1, 2))])
def test_a_kernel_is_the_scaled_sum_of_independent_draws(branch, fan_in, taps, count):
    model = nn.Sequential(nn.Conv2d(32, 64, 3, padding=1)).to(memory_format=torch.channels_last)
    scales = {'kxk': torch.full((64,), 1e-6), branch: torch.full((64,), -2.0)}
    prepare(model, Scales('', {'0': scales}, counts={'0': {branch: count}}))
    drawn = model[0].weight[:, :, taps, taps]
    assert drawn.std().item() == pytest.approx(2.0 * (count / (3 * fan_in)) ** 0.5, rel=0.05)
    assert drawn.abs().max() <= 2.0 * count / fan_in**0.5 + 1e-6


def test_a_convolution_with_an_identity_may_start_as_it():
    model, paper = net(), net()
    scales = Scales.initial(model, {'0': ['kxk', '1x1', 'identity'], '2': ['kxk']}, start='identity')
    for each, start in ((model, 'identity'), (paper, 'paper')):
        torch.manual_seed(1)
        prepare(each, scales.with_start(start))
    torch.testing.assert_close(model[0].weight.detach(), nn.init.dirac_(torch.empty(4, 4, 3, 3)))
    torch.testing.assert_close(model[2].weight, paper[2].weight)
    torch.manual_seed(1)
    twin = csla(model, scales)
    torch.testing.assert_close(twin[0].weight, model[0].weight)
    torch.testing.assert_close(twin[2].weight, model[2].weight)


def test_a_plain_mapping_takes_its_counts_from_the_prior():
    model, mapping = net(), {'0': vectors()}
    counts = {'1x1': 1, 'identity': 1, 'kxk': 4}
    ConvPrior(counts).put_on(model[0])
    assert load_scales(mapping, model).counts == {'0': counts}
    assert Scales.from_model(csla(model, Scales('', mapping))).counts['0']['kxk'] == 1
    corner = make_grad_mults(model, mapping)[model[0].weight][:, 0, 0, 0]
    torch.testing.assert_close(corner, 4 * mapping['0']['kxk'] ** 2)
    assert Scales.from_model(prepare(model, mapping)).counts == {'0': counts}


def test_initialization_and_fine_tuning_leave_what_they_should():
    model = net()
    before = copy.deepcopy(model.state_dict())
    prepare(model, {'0': vectors()}, init=False)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    prepare(model, {'0': vectors()})
    same = [torch.equal(before[name], tensor) for name, tensor in model.state_dict().items()]
    assert same == [name != '0.weight' for name in before]


@pytest.mark.parametrize(
    ('scales', 'thing'),
    [
        ({'1': {'kxk': torch.ones(4)}}, "'1'.*BatchNorm2d"),
        ({'7': {'kxk': torch.ones(4)}}, "'7'"),
        ({'0': vectors(), '2': {'identity': torch.ones(2), 'kxk': torch.ones(2)}}, "'2'.*identity"),
        ({'0': vectors(), '2': {'kxk': torch.ones(3)}}, "'2'.*kxk"),
    ],
)
def test_scales_that_do_not_fit_are_refused_and_nothing_is_changed(scales, thing):
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=thing):
        prepare(model, scales)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not carried_scales(model)


def test_a_sharded_model_and_a_twin_are_not_initialized(shard):
    for model in (shard(tiny_model()), tiny_model('_hs')):
        with pytest.raises(ValueError, match=r"'stem\.conv'"):
            prepare(model, random_scales())


@pytest.mark.parametrize(
    'wrap',
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: model.to(torch.bfloat16),
    ],
    ids=['copied', 'pickled', 'cast'],
)
def test_carried_scales_survive_what_happens_to_models(wrap):
    scales = random_scales()
    carried = carried_scales(wrap(tiny_model(scales=scales)))
    assert {each.scales for each in carried.values()} == {scales}
    assert [each.module for each in carried.values()] == list(scales)
