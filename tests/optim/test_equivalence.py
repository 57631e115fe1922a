import copy

import pytest
import timm
from timm.layers import freeze_batch_norm_2d
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

from repopt_timm import Scales, csla, to_plain

from ..helpers import counted_scales, relative_difference
from .equivalence import optimizers, train, twins


@pytest.mark.parametrize('start', ['paper', 'identity'])
@pytest.mark.parametrize(
    ('settings', 'how'),
    [
        ({}, {}),
        ({'nesterov': False, 'dampening': 0.3}, {}),
        ({'momentum': 0.0, 'nesterov': False}, {}),
        ({'weight_decay': 0.0}, {}),
        ({'maximize': True, 'lr': 1e-4}, {}),
        ({'foreach': True}, {}),
        ({'foreach': False}, {}),
        ({}, {'accumulate': 2}),
        ({}, {'max_norm': 0.5}),
        ({}, {'scheduler': lambda optimizer: OneCycleLR(optimizer, 0.05, total_steps=20)}),
    ],
)
def test_sgd_on_the_csla_network_is_rep_opt_sgd_on_the_plain_one(settings, how, start):
    nets = twins(start)
    train(nets, optimizers(*nets, 'sgd', **settings), **how)
    assert relative_difference(nets[1], to_plain(nets[0])) < 1e-12


@pytest.mark.parametrize(
    ('settings', 'how'),
    [
        ({}, {}),
        ({'foreach': False}, {}),
        ({'foreach': True}, {'max_norm': 0.5}),
        ({'amsgrad': True}, {}),
        ({'maximize': True}, {}),
    ],
)
def test_adamw_is_equivalent_up_to_the_effect_of_eps(settings, how):
    nets = twins()
    train(nets, optimizers(*nets, 'adamw', **settings), **how)
    assert relative_difference(nets[1], to_plain(nets[0])) < 1e-9


@pytest.mark.parametrize('rule', ['sgd', 'adamw'])
def test_equal_branches_train_as_one_with_a_count_and_dead_channels_stay_dead(rule):
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).double()
    scales = counted_scales(net, {'0': {'kxk': 4, '1x1': 2}, '2': {'kxk': 3}})
    dead = dict(scales)
    for vector in dead['0'].values():
        vector[:2] = 0.0
    twin = csla(net, Scales('', dead, counts=scales.counts))
    nets = twin, to_plain(twin)
    train(nets, optimizers(*nets, rule))
    assert relative_difference(nets[1], to_plain(twin)) < 1e-9
    assert not nets[1][0].weight[:2].any()


def large_kernels(model):
    branches = ['kxk', '3x3', '1x1', 'identity']
    return {name: branches for name, module in model.named_modules() if name.endswith('conv_dw')}


NETWORKS = {
    'resnet18': ({}, None),
    'convnext_atto': ({'depths': (1, 1, 2, 1)}, large_kernels),
    'regnetx_002': ({}, None),
    'vgg11_bn': ({'mlp_ratio': 1 / 32}, None),
    'ghostnet_100': ({'drop_rate': 0.0}, None),
    'edgenext_xx_small': ({}, None),
    'mobilenetv3_small_100': ({'drop_rate': 0.0}, None),
}


@pytest.mark.slow
@pytest.mark.parametrize('rule', ['sgd', 'adamw'])
@pytest.mark.parametrize('name', NETWORKS)
def test_networks_of_timm_train_like_their_csla_twins(name, rule):
    kwargs, prior = NETWORKS[name]
    # BatchNorm on 1x1 maps is chaotic, and AdamW makes steps of the rounding errors in biases in front of one.
    model = freeze_batch_norm_2d(timm.create_model(name, num_classes=5, **kwargs).double())
    twin = csla(model, counted_scales(model, prior))
    nets = twin, to_plain(twin)
    before = copy.deepcopy(nets[1])
    # EdgeNeXt's attention among 1x1 maps has gradients of rounding errors alone.
    train(nets, optimizers(*nets, rule, lr=1e-3), steps=3, size=64 if name == 'edgenext_xx_small' else 32)
    assert relative_difference(nets[1], to_plain(twin), smallest=1e-9) < (1e-11 if rule == 'sgd' else 1e-8)
    assert relative_difference(nets[1], before, smallest=1e-9) > 1e-5
