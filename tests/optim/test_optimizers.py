import copy
import pickle

import pytest
import torch
from torch import nn

from repopt_timm import RepOptSGD, Scales, build_repopt_sgd, make_grad_mults

from ..helpers import random_scales, tiny_model
from .equivalence import OURS

both = pytest.mark.parametrize('rule', OURS)


def scaled_model(dtype=torch.float64):
    return tiny_model(scales=random_scales()).to(dtype)


def gradients(model, seed=0):
    torch.manual_seed(seed)
    for param in model.parameters():
        param.grad = torch.randn_like(param)


def make(model, rule, **kwargs):
    kwargs = {**({'momentum': 0.9} if rule == 'sgd' else {}), 'lr': 0.01, **kwargs}
    return OURS[rule](model.parameters(), grad_mults=make_grad_mults(model, update_rule=rule), **kwargs)


def follow(pairs, steps=3, first=0):
    """Steps models with the same gradients, and asserts that they stay equal."""
    for step in range(first, first + steps):
        for model, optimizer in pairs:
            gradients(model, step)
            optimizer.step()
    (model, _), *others = pairs
    for other, _ in others:
        same(model, other)


def same(first, second, rtol=1e-9, atol=1e-12):
    for a, b in zip(first.parameters(), second.parameters()):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@both
def test_a_step_leaves_the_multiplied_gradient(rule):
    model = scaled_model()
    gradients(model)
    mults = make_grad_mults(model, update_rule=rule)
    expected = [param.grad * mults.get(param, 1.0) for param in model.parameters()]
    make(model, rule).step()
    assert all(torch.equal(param.grad, grad) for param, grad in zip(model.parameters(), expected))


@both
def test_hooks_of_a_step_run_once(rule):
    torch.optim.SGD([nn.Parameter(torch.ones(1))]), torch.optim.AdamW([nn.Parameter(torch.ones(1))])
    model, calls = scaled_model(), []
    optimizer = make(model, rule)
    optimizer.register_step_pre_hook(lambda *_: calls.append('before'))
    optimizer.register_step_post_hook(lambda *_: calls.append('after'))
    gradients(model)
    optimizer.step()
    assert calls == ['before', 'after']


@both
def test_a_closure_is_called_with_gradients_enabled_and_its_gradients_are_multiplied(rule):
    model = scaled_model(torch.float32)
    twin = copy.deepcopy(model)
    images = torch.randn(2, 3, 32, 32)

    def closure():
        loss = model(images).sum()
        loss.backward()
        return loss

    assert make(model, rule).step(closure).requires_grad
    twin(images).sum().backward()
    make(twin, rule).step()
    same(model, twin, rtol=1e-5, atol=1e-6)


@both
def test_a_parameter_may_get_its_first_gradient_later_than_others(rule):
    model = scaled_model()
    twin = copy.deepcopy(model)
    for net, optimizer in ((model, make(model, rule)), (twin, make(twin, rule, foreach=False))):
        for step in range(3):
            gradients(net, step)
            net.stem.conv.weight.grad = net.stem.conv.weight.grad if step else None
            optimizer.step()
    same(model, twin)


@both
@pytest.mark.parametrize('when', ['gradient', 'state'])
def test_another_memory_format_does_not_permute_gradients_or_state(rule, when):
    model = scaled_model()
    twin = copy.deepcopy(model)
    optimizer, reference = make(model, rule), make(twin, rule, foreach=False)
    for step in range(3):
        gradients(twin, step)
        for param, other in zip(model.parameters(), twin.parameters()):
            param.grad = other.grad.clone()
        if step == 1:
            model.to(memory_format=torch.channels_last)
            if when == 'gradient':
                for param, other in zip(model.parameters(), twin.parameters()):
                    param.grad = other.grad.clone(memory_format=torch.contiguous_format)
        optimizer.step()
        reference.step()
    same(model, twin)


@both
@pytest.mark.parametrize('fused', [None, True])
def test_a_grad_scaler_leaves_unscaling_to_fused_kernels_that_were_asked_for(rule, fused):
    model = scaled_model(torch.float32)
    twin = copy.deepcopy(model)
    optimizer, reference = make(model, rule, fused=fused), make(twin, rule)
    # By it Lightning decides whether gradients can be clipped.
    assert bool(getattr(optimizer, '_step_supports_amp_scaling', False)) is bool(fused)
    scaler = torch.amp.GradScaler('cpu', init_scale=4.0)
    scaler.scale(torch.ones(()))
    gradients(model)
    for param in model.parameters():
        param.grad *= 4.0
    scaler.step(optimizer)
    gradients(twin)
    reference.step()
    same(model, twin, rtol=1e-5, atol=1e-6)
    scaler.update()
    model.stem.conv.weight.grad[0, 0, 0, 0] = float('inf')
    scaler.step(optimizer)
    same(model, twin, rtol=1e-5, atol=1e-6)


@both
@pytest.mark.parametrize('fused', [None, True])
def test_bfloat16_kernels_are_trained(rule, fused):
    model = scaled_model(torch.bfloat16)
    exact = copy.deepcopy(model).float()
    gradients(model)
    for param, other in zip(model.parameters(), exact.parameters()):
        other.grad = param.grad.float()
    for net in (model, exact):
        make(net, rule, lr=0.125, fused=fused).step()
    for param, other in zip(model.parameters(), exact.parameters()):
        torch.testing.assert_close(param.float(), other, rtol=2**-6, atol=2**-6)


@both
def test_a_saved_state_goes_on_where_it_was(rule):
    model = scaled_model()
    optimizer = make(model, rule)
    follow([(model, optimizer)], steps=2)
    twin = copy.deepcopy(model)
    resumed = make(twin, rule, lr=1.0)
    resumed.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
    follow([(model, optimizer), (twin, resumed)], steps=2, first=2)


@both
def test_a_state_that_was_saved_with_other_scales_is_refused(rule):
    model, other = scaled_model(), scaled_model()
    mine, stranger = make(model, rule), make(other, rule)
    with pytest.raises(ValueError, match=stranger.grad_mults.fingerprint):
        mine.load_state_dict(stranger.state_dict())
    with pytest.raises(ValueError, match='None'):
        mine.load_state_dict(torch.optim.SGD(model.parameters()).state_dict())


@both
def test_a_copied_or_pickled_optimizer_still_multiplies(rule):
    model = scaled_model()
    pairs = [(model, make(model, rule))]
    follow(pairs, steps=1)
    follow([*pairs, copy.deepcopy(pairs[0]), pickle.loads(pickle.dumps(pairs[0]))], first=1)


def with_new_tensors(model, optimizer):
    """Replaces all parameters, in the model and in the groups, as sharding a finished optimizer's model does."""
    replaced = {}
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is not None:
                replaced[param] = module._parameters[name] = nn.Parameter(param.detach().clone())
    for group in optimizer.param_groups:
        group['params'] = [replaced[param] for param in group['params']]


@both
def test_tensors_that_replace_kernels_do_not_train_without_scales(rule):
    model = scaled_model()
    twin = copy.deepcopy(model)
    optimizer, reference = make(model, rule), make(twin, rule)
    with_new_tensors(model, optimizer)
    gradients(model)
    with pytest.raises(ValueError, match=r'7 trainable kernels.*stem\.conv.*take_grad_mults'):
        optimizer.step()
    same(model, twin, rtol=0, atol=0)
    optimizer.take_grad_mults(make_grad_mults(model, update_rule=rule))
    follow([(model, optimizer), (twin, reference)])
    optimizer.param_groups[0]['params'][0] = nn.Parameter(model.stem.conv.weight.detach().clone())
    with pytest.raises(ValueError, match=r'1 trainable kernels.*: stem\.conv\.'):
        optimizer.step()


@both
def test_a_head_can_be_trained_first_and_the_rest_be_added(rule):
    model = scaled_model().requires_grad_(False)
    model.head.requires_grad_(True)
    mults = make_grad_mults(model, update_rule=rule)
    optimizer = OURS[rule](model.head.parameters(), lr=0.01, grad_mults=mults)
    rest = [param for param in model.parameters() if not param.requires_grad]
    model.requires_grad_(True)
    optimizer.add_param_group({'params': rest})
    twin = copy.deepcopy(model)
    settings = {'momentum': 0.0} if rule == 'sgd' else {}
    follow([(model, optimizer), (twin, make(twin, rule, **settings))])


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
    ('mults', 'thing'),
    [
        (lambda model, rule: None, 'grad_mults'),
        (lambda model, rule: make_grad_mults(model, update_rule='adamw' if rule == 'sgd' else 'sgd'), 'update rule'),
        (lambda model, rule: make_grad_mults(copy.deepcopy(model), update_rule=rule), 'None of the'),
        (lambda model, rule: make_grad_mults(model.requires_grad_(True), update_rule=rule), r'1 .*stem\.conv'),
    ],
    ids=['none', 'rule', 'copy', 'kernel in no group'],
)
def test_nothing_falls_back_to_training_without_scales(rule, mults, thing):
    model = scaled_model()
    params = [param for name, param in model.named_parameters() if name != 'stem.conv.weight' or thing[0] != '1']
    with pytest.raises(ValueError, match=thing):
        OURS[rule](params, grad_mults=mults(model, rule))


def test_sparse_gradients_of_other_parameters_work_as_in_torchs_sgd():
    model = nn.ModuleDict({'net': scaled_model(torch.float32), 'words': nn.Embedding(5, 2, sparse=True)})
    model['words'](torch.tensor([1])).sum().backward()
    before = model['words'].weight.detach().clone()
    make(model, 'sgd', lr=1.0, momentum=0.0).step()
    torch.testing.assert_close(before - model['words'].weight.detach(), torch.eye(5)[:, 1:2].expand(5, 2))
    kernel = model['net'].stem.conv.weight.detach().clone()
    model['net'].stem.conv.weight.grad = torch.zeros_like(kernel)
    with pytest.raises(RuntimeError, match='sparse'):
        make(model, 'adamw').step()
    torch.testing.assert_close(model['net'].stem.conv.weight.detach(), kernel)


def test_a_share_of_the_parameters_is_trained_with_its_share_of_the_grad_mults():
    model = scaled_model()
    head = list(model.head.parameters())
    optimizer = RepOptSGD(head, lr=1.0, grad_mults=make_grad_mults(model).of(head))
    before = model.head.fc.bias.detach().clone()
    gradients(model)
    optimizer.step()
    torch.testing.assert_close(model.head.fc.bias.detach(), before - model.head.fc.bias.grad)


@pytest.mark.parametrize('init', [True, False])
def test_the_shortcut_trains_any_model(init):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 16, 2))
    before = model[0].weight.detach().clone()
    scales = {'0': {'kxk': torch.ones(8), '1x1': torch.rand(8)}}
    model[1].bias.requires_grad_(False)
    optimizer = build_repopt_sgd(model, scales, lr=0.1, weight_decay=0.1, init=init)
    assert torch.equal(model[0].weight, before) is not init
    decays = {param: group['weight_decay'] for group in optimizer.param_groups for param in group['params']}
    assert decays[model[0].weight] == 0.1
    assert decays[model[3].weight] == 0.0
    assert model[1].bias not in decays
    assert optimizer.defaults['nesterov']
    other = Scales('', {'0': {'kxk': torch.full((8,), 2.0)}})
    with pytest.raises(ValueError, match='saved with the scales'):
        build_repopt_sgd(model, other, lr=0.1).load_state_dict(optimizer.state_dict())
