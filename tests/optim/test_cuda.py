"""What a GPU is asked to do, found without one."""

import pytest
import torch

from repopt_timm import make_grad_mults

from ..helpers import tiny_model
from .equivalence import OURS, SETTINGS, TORCHS
from .fake_cuda import Dispatched, fake_cuda

both = pytest.mark.parametrize('rule', OURS)


@pytest.fixture
def on_cuda(rule):
    model = tiny_model(scales='initial')
    with fake_cuda(model, make_grad_mults(model, update_rule=rule)) as fakes:
        yield fakes


def dispatched(function):
    with Dispatched() as counting:
        function()
    return counting.total


@both
def test_a_step_launches_a_handful_of_operations_more_than_torchs_fused_one(rule, on_cuda):
    params, mults = on_cuda
    torchs = TORCHS[rule](params, **SETTINGS[rule], fused=True)
    ours = OURS[rule](params, grad_mults=mults, **SETTINGS[rule])
    torchs.step(), ours.step()
    assert dispatched(ours.step) - dispatched(torchs.step) <= 3


@both
@pytest.mark.parametrize(('kwargs', 'on_device'), [({}, False), ({}, True), ({'foreach': True}, False)])
def test_a_resumed_step_stays_on_the_device(rule, kwargs, on_device, on_cuda):
    params, mults = on_cuda
    if rule == 'adamw' and kwargs:
        kwargs = {**kwargs, 'capturable': True}
    first, resumed = (OURS[rule](params, grad_mults=mults, **{**SETTINGS[rule], **kwargs}) for _ in range(2))
    for optimizer in (first, resumed):
        optimizer.param_groups[0]['lr'] = torch.empty((), device='cuda') if on_device else 0.1
    dispatched(first.step)
    resumed.load_state_dict(first.state_dict())
    dispatched(resumed.step)
    assert all(value.device == param.device for param in params for value in resumed.state[param].values())


@both
def test_a_grad_scaler_does_not_make_the_host_wait(rule, on_cuda):
    params, mults = on_cuda
    optimizer = OURS[rule](params, grad_mults=mults, fused=True, **SETTINGS[rule])
    assert optimizer._step_supports_amp_scaling
    optimizer.grad_scale = torch.ones((), device='cuda')
    optimizer.found_inf = torch.zeros((), device='cuda')
    dispatched(optimizer.step)
