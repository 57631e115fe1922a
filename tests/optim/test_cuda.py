"""What a GPU is asked to do, found without one."""

import pytest
import timm
import torch

from repopt_timm import RepOptAdamW, RepOptSGD, Scales, make_grad_mults
from repopt_timm.reparam import attach_scales

from .fake_cuda import Dispatched, fake_cuda

SETTINGS = {'sgd': {'lr': 0.1, 'momentum': 0.9, 'nesterov': True, 'weight_decay': 1e-4}, 'adamw': {'lr': 1e-3}}
OURS = {'sgd': RepOptSGD, 'adamw': RepOptAdamW}
TORCHS = {'sgd': torch.optim.SGD, 'adamw': torch.optim.AdamW}


def with_scales(name):
    if name == 'repopt_vgg_b1':
        return timm.create_model(name, scales='initial')
    model = timm.create_model(name)
    attach_scales(model, Scales.initial(model))
    return model


@pytest.fixture(scope='module', params=['repopt_vgg_b1', 'regnetx_032'])
def model(request):
    return with_scales(request.param)


def dispatched(function):
    with Dispatched() as counting:
        function()
    return counting


@pytest.mark.parametrize('rule', OURS)
def test_a_step_launches_a_handful_of_operations_more_than_torchs_fused_one(model, rule):
    with fake_cuda(model, make_grad_mults(model, update_rule=rule)) as (params, mults):
        optimizers = (
            TORCHS[rule](params, **SETTINGS[rule], fused=True),
            OURS[rule](params, grad_mults=mults, **SETTINGS[rule]),
        )
        for optimizer in optimizers:
            optimizer.step()
        torchs, ours = (dispatched(optimizer.step) for optimizer in optimizers)
        assert ours.total - torchs.total <= 3


@pytest.mark.parametrize('rule', OURS)
@pytest.mark.parametrize('kwargs', [{}, {'lr': 'tensor'}, {'foreach': True}], ids=str)
def test_a_resumed_step_stays_on_the_device(rule, kwargs):
    kwargs = {**kwargs, 'capturable': True} if kwargs.get('foreach') and rule == 'adamw' else dict(kwargs)
    model = with_scales('repopt_vgg_b1')
    with fake_cuda(model, make_grad_mults(model, update_rule=rule)) as (params, mults):
        lr = kwargs.pop('lr', 0.1)
        first, resumed = (OURS[rule](params, grad_mults=mults, **{**SETTINGS[rule], **kwargs}) for _ in range(2))
        for optimizer in (first, resumed):
            optimizer.param_groups[0]['lr'] = torch.empty((), device='cuda') if lr == 'tensor' else lr
        dispatched(first.step)
        resumed.load_state_dict(first.state_dict())
        dispatched(resumed.step)
        assert all(value.device == param.device for param in params for value in resumed.state[param].values())


@pytest.mark.parametrize('rule', OURS)
def test_a_grad_scaler_does_not_make_the_host_wait(rule):
    model = with_scales('repopt_vgg_b1')
    with fake_cuda(model, make_grad_mults(model, update_rule=rule)) as (params, mults):
        optimizer = OURS[rule](params, grad_mults=mults, fused=True, **SETTINGS[rule])
        assert optimizer._step_supports_amp_scaling
        optimizer.grad_scale = torch.ones((), device='cuda')
        optimizer.found_inf = torch.zeros((), device='cuda')
        dispatched(optimizer.step)
