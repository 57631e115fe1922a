import copy
import pickle

import pytest
import torch
from torch import nn

from repopt_timm import RepOptSGD, build_repopt_sgd, make_grad_mults

from ..helpers import random_scales, tiny_model
from .equivalence import OURS

both = pytest.mark.parametrize('rule', OURS)


def scaled_model(dtype=torch.float64):
    return tiny_model(scales=random_scales()).to(dtype)


def make(model, rule, **kwargs):
    kwargs = {**({'momentum': 0.9} if rule == 'sgd' else {}), 'lr': 0.01, **kwargs}
    return OURS[rule](model.parameters(), grad_mults=make_grad_mults(model, update_rule=rule), **kwargs)


def two(rule, dtype=torch.float64, **kwargs):
    """Two equal models with their optimizers; the second is torch's plainest implementation."""
    model = scaled_model(dtype)
    twin = copy.deepcopy(model)
    return (model, make(model, rule, **kwargs)), (twin, make(twin, rule, foreach=False))


def fill(model, seed=0):
    torch.manual_seed(seed)
    for param in model.parameters():
        param.grad = torch.randn_like(param)


def same(first, second, rtol=1e-9, atol=1e-12):
    for a, b in zip(first.parameters(), second.parameters()):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def follow(*pairs, first=0):
    """Makes steps of all models with the same gradients, and asserts that they stay equal."""
    for seed in range(first, first + 2):
        for model, optimizer in pairs:
            fill(model, seed)
            optimizer.step()
    for model, _ in pairs[1:]:
        same(pairs[0][0], model)


@both
def test_a_step_leaves_the_multiplied_gradient_and_runs_its_hooks_once(rule):
    (model, optimizer), _ = two(rule)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append('before'))
    optimizer.register_step_post_hook(lambda *_: calls.append('after'))
    fill(model)
    expected = [param.grad * optimizer.grad_mults.get(param, 1.0) for param in model.parameters()]
    optimizer.step()
    assert all(torch.equal(param.grad, grad) for param, grad in zip(model.parameters(), expected))
    assert calls == ['before', 'after']


@both
def test_a_closure_is_called_with_gradients_enabled_and_its_gradients_are_multiplied(rule):
    (model, optimizer), (twin, reference) = two(rule)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)

    def closure():
        loss = model(images).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).requires_grad
    twin(images).sum().backward()
    reference.step()
    same(model, twin)


@both
def test_a_parameter_may_get_its_first_gradient_later_than_others(rule):
    (model, optimizer), (twin, reference) = two(rule)
    for net, each in ((model, optimizer), (twin, reference)):
        fill(net)
        net.stem.conv.weight.grad = None
        each.step()
    follow((model, optimizer), (twin, reference))


@both
@pytest.mark.parametrize('of_gradient', [False, True])
def test_another_memory_format_does_not_permute_gradients_or_state(rule, of_gradient):
    (model, optimizer), (twin, reference) = two(rule)
    follow((model, optimizer), (twin, reference))
    model.to(memory_format=torch.channels_last)
    fill(twin)
    for param, other in zip(model.parameters(), twin.parameters()):
        param.grad = other.grad.clone() if of_gradient else torch.empty_like(param).copy_(other.grad)
    optimizer.step()
    reference.step()
    same(model, twin)


@both
@pytest.mark.parametrize('fused', [None, True])
def test_a_grad_scaler_leaves_unscaling_to_fused_kernels_that_were_asked_for(rule, fused):
    (model, optimizer), (twin, reference) = two(rule, torch.float32, fused=fused)
    # Lightning reads this to decide whether it can clip gradients.
    assert bool(getattr(optimizer, '_step_supports_amp_scaling', False)) is bool(fused)
    scaler = torch.amp.GradScaler('cpu', init_scale=4.0)
    scaler.scale(torch.ones(()))
    fill(model)
    fill(twin)
    for param in model.parameters():
        param.grad *= 4.0
    scaler.step(optimizer)
    reference.step()
    scaler.update()
    model.stem.conv.weight.grad[0, 0, 0, 0] = float('inf')
    scaler.step(optimizer)
    same(model, twin, rtol=1e-5, atol=1e-6)


@both
@pytest.mark.parametrize('fused', [None, True])
def test_bfloat16_kernels_are_trained(rule, fused):
    model = scaled_model(torch.bfloat16)
    exact = copy.deepcopy(model).float()
    fill(model)
    for param, other in zip(model.parameters(), exact.parameters()):
        other.grad = param.grad.float()
    for net in (model, exact):
        make(net, rule, lr=0.125, fused=fused).step()
    same(model.float(), exact, rtol=2**-6, atol=2**-6)


@both
def test_a_saved_copied_or_pickled_optimizer_goes_on_where_it_was(rule):
    first, _ = two(rule)
    follow(first)
    twin = copy.deepcopy(first[0])
    resumed = make(twin, rule, lr=1.0)
    resumed.load_state_dict(pickle.loads(pickle.dumps(first[1].state_dict())))
    follow(first, (twin, resumed), copy.deepcopy(first), pickle.loads(pickle.dumps(first)), first=2)


@both
def test_a_differentiable_step_is_refused(rule):
    with pytest.raises(ValueError, match='differentiable'):
        make(scaled_model(), rule, differentiable=True)


@both
def test_a_state_that_was_saved_with_other_scales_is_refused(rule):
    model = scaled_model()
    mine, stranger = make(model, rule), make(scaled_model(), rule)
    with pytest.raises(ValueError, match=stranger.grad_mults.fingerprint):
        mine.load_state_dict(stranger.state_dict())
    with pytest.raises(ValueError, match='None'):
        mine.load_state_dict(torch.optim.SGD(model.parameters()).state_dict())


@both
def test_tensors_that_replace_kernels_do_not_train_without_scales(rule):
    (model, optimizer), (twin, reference) = two(rule)
    # As Accelerate does when it shards the model of a finished optimizer.
    replaced = {}
    for module in model.modules():
        for name, param in module.named_parameters(recurse=False):
            replaced[param] = module._parameters[name] = nn.Parameter(param.detach().clone())
    group = optimizer.param_groups[0]
    group['params'] = [replaced[param] for param in group['params']]
    fill(model)
    with pytest.raises(ValueError, match=r'7 trainable kernels.*stem\.conv.*take_grad_mults'):
        optimizer.step()
    same(model, twin, rtol=0, atol=0)
    optimizer.take_grad_mults(make_grad_mults(model, update_rule=rule))
    follow((model, optimizer), (twin, reference))
    group['params'][0] = nn.Parameter(model.stem.conv.weight.detach().clone())
    with pytest.raises(ValueError, match=r'1 trainable kernels.*: stem\.conv\.'):
        optimizer.step()


@both
def test_a_head_can_be_trained_first_and_the_rest_be_added(rule):
    (model, _), second = two(rule)
    model.requires_grad_(False).head.requires_grad_(True)
    mults = make_grad_mults(model, update_rule=rule)
    settings = {'momentum': 0.9} if rule == 'sgd' else {}
    optimizer = OURS[rule](model.head.parameters(), lr=0.01, grad_mults=mults, **settings)
    rest = [param for param in model.parameters() if not param.requires_grad]
    model.requires_grad_(True)
    optimizer.add_param_group({'params': rest})
    follow((model, optimizer), second)


def test_kernels_without_grad_mults_in_a_new_group_or_of_a_frozen_copy_warn():
    model = scaled_model()
    with pytest.warns(UserWarning, match=r'1 kernels.*\(4, 3, 1, 1\)'):
        make(model, 'sgd').add_param_group({'params': nn.Conv2d(3, 4, 1).weight})
    frozen = copy.deepcopy(model).requires_grad_(False)
    with pytest.warns(UserWarning, match='7 kernels') as warned:
        RepOptSGD(model.parameters(), grad_mults=make_grad_mults(frozen))
    assert warned[0].filename == __file__


@both
@pytest.mark.parametrize(
    ('mults', 'left_out', 'thing'),
    [
        (lambda model, rule: None, 0, 'grad_mults'),
        (lambda model, rule: make_grad_mults(model, None, *(OURS.keys() - {rule})), 0, 'update rule'),
        (lambda model, rule: make_grad_mults(copy.deepcopy(model), None, rule), 0, 'trainable kernels'),
        (lambda model, rule: make_grad_mults(model, None, rule), 1, r'1 .*stem\.conv'),
    ],
    ids=['none', 'rule', 'copy', 'kernel in no group'],
)
def test_nothing_falls_back_to_training_without_scales(rule, mults, left_out, thing):
    model = scaled_model()
    with pytest.raises(ValueError, match=thing):
        OURS[rule](list(model.parameters())[left_out:], grad_mults=mults(model, rule))


def test_sparse_gradients_of_other_parameters_work_as_in_torchs_optimizers():
    model = nn.ModuleDict({'net': scaled_model(), 'words': nn.Embedding(5, 2, sparse=True)})
    words, kernel = model['words'].weight, model['net'].stem.conv.weight
    model['words'](torch.tensor([1])).sum().backward()
    before = words.detach().clone()
    make(model, 'sgd', lr=1.0, momentum=0.0).step()
    torch.testing.assert_close(before - words.detach(), torch.eye(5)[:, 1:2].expand(5, 2))
    before = kernel.detach().clone()
    kernel.grad = torch.zeros_like(kernel)
    with pytest.raises(RuntimeError, match='sparse'):
        make(model, 'adamw').step()
    torch.testing.assert_close(kernel.detach(), before)


@pytest.mark.parametrize('init', [True, False])
def test_the_shortcut_trains_any_model(init):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 16, 2))
    before = model[0].weight.detach().clone()
    model[1].bias.requires_grad_(False)
    scales = {'0': {'kxk': torch.ones(8), '1x1': torch.rand(8)}}
    optimizer = build_repopt_sgd(model, scales, lr=0.1, weight_decay=0.1, init=init)
    assert torch.equal(model[0].weight, before) is not init
    decays = {param: group['weight_decay'] for group in optimizer.param_groups for param in group['params']}
    assert decays[model[0].weight] == 0.1
    assert decays[model[3].weight] == 0.0
    assert model[1].bias not in decays
    assert optimizer.defaults['nesterov']
