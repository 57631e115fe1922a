import argparse

import pytest
import torch
from timm.optim import create_optimizer_v2, optimizer_kwargs
from torch import nn

from repopt_timm import RepOptAdamW, RepOptSGD, make_grad_mults
from repopt_timm.reparam import branches_of

from ..helpers import random_scales, tiny_model


def scaled_model(**kwargs):
    return tiny_model(scales=random_scales(), **kwargs)


def step_of(model, name, **kwargs):
    """Makes one step with gradients of one; returns by how much each parameter moved, and the optimizer."""
    before = {param: param.detach().clone() for param in model.parameters()}
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer = create_optimizer_v2(model, name, lr=0.5, momentum=0.0, nesterov=False, **kwargs)
    optimizer.step()
    return {param: (old - param.detach()) / 0.5 for param, old in before.items()}, optimizer


@pytest.mark.parametrize('name', ['repopt_sgd', 'repoptsgd', 'RepOpt_SGD', 'lookahead_repopt_sgd'])
def test_every_spelling_moves_the_weights_by_grad_mult_times_gradient(name):
    model = scaled_model()
    moved, _ = step_of(model, name)
    for kernel, mask in make_grad_mults(model).items():
        torch.testing.assert_close(moved[kernel], mask, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', ['repopt_adamw', 'repoptadamw', 'lookahead_repopt_adamw'])
def test_adamw_is_found_too(name):
    optimizer = create_optimizer_v2(scaled_model(), name, lr=0.1, betas=(0.5, 0.6), eps=1e-7)
    optimizer = getattr(optimizer, '_base_optimizer', optimizer)
    assert isinstance(optimizer, RepOptAdamW)
    assert optimizer.defaults['betas'] == (0.5, 0.6)
    assert optimizer.grad_mults.update_rule == 'adamw'


def test_ordinary_optimizers_are_what_they_were():
    assert type(create_optimizer_v2(tiny_model(), 'sgd', lr=0.1)) is torch.optim.SGD
    assert type(create_optimizer_v2(tiny_model().parameters(), 'lookahead_adamw', lr=0.1)).__name__ == 'Lookahead'


def test_nesterov_momentum_is_the_factorys_default_and_not_the_class_own():
    model = scaled_model()
    defaults = create_optimizer_v2(model, 'repopt_sgd', lr=0.1).defaults
    assert (defaults['nesterov'], defaults['momentum']) == (True, 0.9)
    defaults = RepOptSGD(model.parameters(), lr=0.1, grad_mults=make_grad_mults(model)).defaults
    assert (defaults['nesterov'], defaults['momentum']) == (False, 0)


def test_timms_script_arguments_reach_the_optimizer():
    args = argparse.Namespace(
        opt='repopt_sgd', lr=0.1, weight_decay=0.01, momentum=0.8, layer_decay=0.5, opt_args={'nesterov': False}
    )
    optimizer = create_optimizer_v2(scaled_model(), **optimizer_kwargs(args))
    assert isinstance(optimizer, RepOptSGD)
    assert optimizer.defaults['momentum'] == 0.8
    assert not optimizer.defaults['nesterov']
    assert len({group['lr_scale'] for group in optimizer.param_groups}) > 2


def decays_of(optimizer):
    return {param: group['weight_decay'] for group in optimizer.param_groups for param in group['params']}


def test_weight_decay_spares_what_timm_spares():
    model = scaled_model()
    decays = decays_of(create_optimizer_v2(model, 'repopt_sgd', lr=0.1, weight_decay=0.01))
    assert decays[model.stem.conv.weight] == 0.01
    assert decays[model.stem.bn.weight] == 0


def test_a_search_never_decays_its_scales():
    model = tiny_model('_hs')
    decays = decays_of(create_optimizer_v2(model, 'sgd', lr=0.1, weight_decay=0.01))
    branches = branches_of(model.stages[1][1].conv)
    assert decays[branches.operators['identity']] == 0.01
    assert decays[branches.scales.kxk] == 0


@pytest.mark.parametrize(
    'wrap',
    [
        lambda: nn.ModuleDict(
            {'student': scaled_model(), 'teacher': tiny_model('_csla', scales='initial').requires_grad_(False)}
        ),
        lambda: nn.ModuleDict({'backbone': scaled_model(num_classes=0), 'box': nn.Conv2d(128, 4, 1)}),
        lambda: scaled_model(features_only=True),
        lambda: torch.compile(scaled_model(), backend='eager'),
    ],
    ids=['distillation', 'detector', 'features', 'compiled'],
)
def test_scales_are_found_inside_of_wrappers(wrap):
    model = wrap()
    mults = make_grad_mults(model)
    moved, optimizer = step_of(model, 'repopt_sgd')
    assert len(optimizer.grad_mults) == 7
    for kernel, mask in mults.items():
        torch.testing.assert_close(moved[kernel], mask, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ('model', 'message'),
    [
        (lambda: tiny_model(), 'No convolution of RepOptVgg carries scales'),
        (lambda: tiny_model('_hs'), 'CSLA convolution'),
        (lambda: scaled_model().parameters(), 'bare parameters'),
    ],
)
def test_there_is_no_silent_plain_sgd(model, message):
    with pytest.raises(ValueError, match=message):
        create_optimizer_v2(model(), 'repopt_sgd', lr=0.1)


def test_an_ordinary_optimizer_on_an_initialized_target_warns():
    with pytest.warns(UserWarning, match=r"'sgd' has no Grad Mults.*repopt_sgd"):
        create_optimizer_v2(scaled_model(), 'sgd', lr=0.1)
