"""What a GPU is asked to do, found without one."""

import pytest
import timm
import torch

from repopt_timm import RepOptAdamW, RepOptSGD, Scales, attach_scales, clip_grad_norm_, make_grad_mults

from .fake_cuda import Dispatched, check_alike, fake_cuda

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
def test_a_step_dispatches_few_operations(model, rule):
    with fake_cuda(model, make_grad_mults(model, update_rule=rule)) as (params, mults):
        lists = {'foreach': True} if rule == 'sgd' else {'foreach': True, 'capturable': True}
        reference = TORCHS[rule](params, **SETTINGS[rule], **lists)
        optimizer = OURS[rule](params, grad_mults=mults, **SETTINGS[rule])
        reference.step()
        optimizer.step()
        counted = dispatched(optimizer.step)
        assert counted.total <= 2 * dispatched(reference.step).total
        assert any(name.startswith('_fused') for name in counted.counts)
        # No operation for a group: a handful for a kernel, whatever its groups.
        assert counted.total - counted.counts['default'] < 16 * len(params)


def test_clipping_dispatches_at_most_twice_what_torch_does(model):
    with fake_cuda(model, make_grad_mults(model)) as (params, mults):
        torchs = dispatched(lambda: torch.nn.utils.clip_grad_norm_(params, 1.0, foreach=True)).total
        assert dispatched(lambda: clip_grad_norm_(params, 1.0, mults)).total <= 2 * torchs


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
        for param in params:
            for name, value in resumed.state[param].items():
                assert value is not first.state[param][name]
                assert value.device == param.device


@pytest.mark.parametrize('rule', OURS)
def test_a_grad_scaler_does_not_make_the_host_wait(rule):
    model = with_scales('repopt_vgg_b1')
    with fake_cuda(model, make_grad_mults(model, update_rule=rule)) as (params, mults):
        optimizer = OURS[rule](params, grad_mults=mults, fused=True, **SETTINGS[rule])
        assert optimizer._step_supports_amp_scaling
        optimizer.grad_scale = torch.ones((), device='cuda')
        optimizer.found_inf = torch.zeros((), device='cuda')
        dispatched(optimizer.step)


def test_masks_of_the_dense_path_lie_in_memory_like_the_kernels():
    model = with_scales('repopt_vgg_b1').to(memory_format=torch.channels_last)
    mults = make_grad_mults(model)
    kernels = list(mults)
    check_alike(kernels, [mults[kernel].filled(kernel).taps for kernel in kernels])
