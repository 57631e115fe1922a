import copy
import pickle

import pytest
import timm
import torch
from torch import nn

from repopt_timm import (
    RepOptAdamW,
    RepOptSGD,
    Scales,
    build_repopt_sgd,
    clip_grad_norm_,
    make_grad_mults,
    prepare,
)
from repopt_timm.optim import chunks
from repopt_timm.optim.reference import ReferenceRepOptAdamW, ReferenceRepOptSGD

from ..helpers import random_scales, tiny_model

CLASSES = {'sgd': (RepOptSGD, ReferenceRepOptSGD), 'adamw': (RepOptAdamW, ReferenceRepOptAdamW)}


def scaled_model(dtype=torch.float64):
    return tiny_model(scales=random_scales()).to(dtype)


def gradients(model, seed=0):
    torch.manual_seed(seed)
    for param in model.parameters():
        param.grad = torch.randn_like(param)


def make(model, rule, **kwargs):
    return CLASSES[rule][0](model.parameters(), grad_mults=make_grad_mults(model, update_rule=rule), **kwargs)


def same(first, second, **kwargs):
    for a, b in zip(first.parameters(), second.parameters()):
        torch.testing.assert_close(a, b, **kwargs)


@pytest.mark.parametrize(
    'implementation', [{}, {'fused': True}, {'foreach': True}, {'foreach': False}, {'compiled': True}]
)
@pytest.mark.parametrize(
    ('rule', 'settings'),
    [
        ('sgd', {'lr': 0.1, 'momentum': 0.9, 'weight_decay': 0.01, 'nesterov': True}),
        ('sgd', {'lr': 0.1, 'momentum': 0.5, 'dampening': 0.2, 'maximize': True}),
        ('adamw', {'lr': 0.01, 'weight_decay': 0.1, 'eps': 1e-3}),
        ('adamw', {'lr': 0.01, 'amsgrad': True, 'maximize': True, 'weight_decay': 0.0}),
    ],
)
def test_the_fast_optimizer_follows_the_readable_one(rule, settings, implementation):
    model = scaled_model()
    twin = copy.deepcopy(model)
    optimizer = make(model, rule, **settings, **implementation)
    reference = CLASSES[rule][1](twin.parameters(), make_grad_mults(twin, update_rule=rule), **settings)
    for step in range(4):
        gradients(model, step)
        gradients(twin, step)
        optimizer.step()
        reference.step()
    same(model, twin, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('rule', CLASSES)
@pytest.mark.parametrize('size', [1, 3000, 20000])
@pytest.mark.parametrize('groups', [1, 4, 16])
@pytest.mark.parametrize('kwargs', [{}, {'dense': True}], ids=['tiles', 'dense'])
def test_each_chunk_of_a_kernel_gets_its_own_rows_of_the_grad_mult(rule, size, groups, kwargs, monkeypatch):
    monkeypatch.setitem(chunks.CHUNK_SIZES, 'cpu', size)
    model = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1, groups=groups)).double()
    scales = {'0': {'kxk': torch.randn(64), '1x1': torch.randn(64), 'identity': torch.ones(64)}}
    twin = copy.deepcopy(model)
    optimizers = [
        CLASSES[rule][0](model.parameters(), lr=0.1, grad_mults=make_grad_mults(model, scales, rule), **kwargs),
        CLASSES[rule][1](twin.parameters(), make_grad_mults(twin, scales, rule), lr=0.1),
    ]
    for step in range(2):
        for net, optimizer in zip((model, twin), optimizers):
            gradients(net, step)
            optimizer.step()
    same(model, twin, rtol=1e-9, atol=1e-12)
    gradients(model)
    mults = make_grad_mults(model, scales)
    expected = (mults[model[0].weight].dense() * model[0].weight.grad.square()).sum() + model[
        0
    ].bias.grad.square().sum()
    torch.testing.assert_close(clip_grad_norm_(model.parameters(), 1.0, mults), expected.sqrt())


@pytest.mark.parametrize('rule', CLASSES)
def test_a_step_can_be_compiled(rule):
    model = scaled_model()
    twin = copy.deepcopy(model)
    optimizer, reference = make(model, rule, lr=torch.tensor(0.01)), make(twin, rule, lr=0.01)
    step = torch.compile(optimizer.step)
    for seed in range(2):
        gradients(model, seed)
        gradients(twin, seed)
        step()
        reference.step()
    # torch.compile works out AdamW's bias correction of plain parameters in float32.
    same(model, twin, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('rule', CLASSES)
def test_a_loaded_state_shares_nothing_with_its_source(rule):
    model = scaled_model()
    optimizer = make(model, rule, lr=0.01, **({'momentum': 0.9} if rule == 'sgd' else {}))
    gradients(model)
    optimizer.step()
    resumed = make(model, rule)
    resumed.load_state_dict(optimizer.state_dict())
    for param, state in optimizer.state.items():
        for name, value in state.items():
            assert value.data_ptr() != resumed.state[param][name].data_ptr()


def test_a_trainable_kernel_that_is_in_no_group_is_named():
    model = scaled_model()
    params = list(model.parameters())
    with pytest.raises(ValueError, match=r'in no parameter group.*stem\.conv'):
        RepOptSGD(params[1:], grad_mults=make_grad_mults(model))
    params[0].requires_grad_(False)
    RepOptSGD(params[1:], grad_mults=make_grad_mults(model))


def with_new_tensors(model, optimizer):
    """Replaces all parameters, in the model and in the groups, as sharding a finished optimizer's model does."""
    replaced = {}
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is not None:
                replaced[param] = module._parameters[name] = nn.Parameter(param.detach().clone())
    for group in optimizer.param_groups:
        group['params'] = [replaced[param] for param in group['params']]


@pytest.mark.parametrize('rule', CLASSES)
@pytest.mark.parametrize('steps', [0, 1])
def test_tensors_that_replace_kernels_in_the_groups_are_not_trained_as_without_scales(rule, steps):
    model = scaled_model()
    optimizer = make(model, rule, lr=0.01)
    gradients(model)
    for _ in range(steps):
        optimizer.step()
    with_new_tensors(model, optimizer)
    before = copy.deepcopy(model)
    gradients(model)
    with pytest.raises(ValueError, match=r'7 trainable kernels .* stem\.conv, stages\.0.*take_grad_mults'):
        optimizer.step()
    same(model, before, rtol=0, atol=0)


def test_one_kernel_that_another_tensor_replaces_in_its_group_is_named():
    model = scaled_model()
    optimizer = make(model, 'sgd')
    gradients(model)
    optimizer.step()
    optimizer.param_groups[0]['params'][0] = nn.Parameter(model.stem.conv.weight.detach().clone())
    with pytest.raises(ValueError, match=r'1 trainable kernels .* any more: stem\.conv\.'):
        optimizer.step()


@pytest.mark.parametrize('rule', CLASSES)
@pytest.mark.parametrize('kwargs', [{}, {'dense': True}, {'compiled': True}])
def test_grad_mults_made_anew_go_with_the_tensors_that_replaced_kernels(rule, kwargs):
    model = scaled_model()
    twin = copy.deepcopy(model)
    optimizer, reference = make(model, rule, lr=0.01, **kwargs), make(twin, rule, lr=0.01)
    with_new_tensors(model, optimizer)
    optimizer.take_grad_mults(make_grad_mults(model, update_rule=rule))
    for step in range(2):
        for net, each in ((model, optimizer), (twin, reference)):
            gradients(net, step)
            each.step()
    same(model, twin, rtol=1e-9, atol=1e-12)


def test_grad_mults_of_other_scales_take_the_place_of_the_first():
    model = scaled_model()
    twin = copy.deepcopy(model)
    optimizer = make(model, 'sgd', lr=0.01)
    gradients(model)
    optimizer.step()
    scales = random_scales()
    optimizer.take_grad_mults(make_grad_mults(model, scales))
    assert {group['scales_fingerprint'] for group in optimizer.param_groups} == {scales.fingerprint}
    twin.load_state_dict(model.state_dict())
    reference = RepOptSGD(twin.parameters(), lr=0.01, grad_mults=make_grad_mults(twin, scales))
    for net, each in ((model, optimizer), (twin, reference)):
        gradients(net, 1)
        each.step()
    same(model, twin, rtol=0, atol=0)


def test_a_new_group_of_kernels_without_grad_mults_warns():
    optimizer = make(scaled_model(), 'sgd')
    with pytest.warns(UserWarning, match=r'1 kernels .* no Grad Mult.*\(4, 3, 1, 1\)'):
        optimizer.add_param_group({'params': nn.Conv2d(3, 4, 1).weight})


def test_adamw_refuses_sparse_gradients():
    model = nn.ModuleDict({'net': scaled_model(torch.float32), 'words': nn.Embedding(5, 2, sparse=True)})
    model['words'](torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match='does not support sparse gradients'):
        make(model, 'adamw').step()


@pytest.mark.parametrize('rule', CLASSES)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('fused', [None, True])
def test_a_grad_scaler_leaves_unscaling_to_fused_kernels_that_were_asked_for(rule, dtype, fused):
    model = scaled_model(dtype)
    twin = copy.deepcopy(model)
    optimizer, reference = make(model, rule, lr=0.1, fused=fused), make(twin, rule, lr=0.1)
    scaler = torch.amp.GradScaler('cpu', init_scale=4.0)
    scaler.scale(torch.ones(()))
    gradients(model)
    gradients(twin)
    for param in model.parameters():
        param.grad *= 4.0
    # By it Lightning decides whether gradients can be clipped.
    assert optimizer._step_supports_amp_scaling is bool(fused)
    scaler.step(optimizer)
    reference.step()
    same(model, twin, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize('rule', CLASSES)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_gradients_are_left_as_they_were(rule, dtype):
    model = scaled_model(dtype)
    gradients(model)
    before = [param.grad.clone() for param in model.parameters()]
    make(model, rule).step()
    assert all(torch.equal(param.grad, grad) for param, grad in zip(model.parameters(), before))


@pytest.mark.parametrize('fused', [None, True])
@pytest.mark.parametrize('rule', CLASSES)
def test_bfloat16_kernels_are_multiplied_in_float32(rule, fused):
    model = scaled_model(torch.bfloat16)
    exact = copy.deepcopy(model).float()
    gradients(model)
    for param, other in zip(model.parameters(), exact.parameters()):
        other.grad = param.grad.float()
    for net in (model, exact):
        make(net, rule, lr=0.125, fused=fused).step()
    for param, other in zip(model.parameters(), exact.parameters()):
        torch.testing.assert_close(param.float(), other, rtol=2**-6, atol=2**-6)


def test_compiled_and_differentiable_exclude_each_other():
    with pytest.raises(ValueError, match='leave one of them out'):
        make(scaled_model(), 'sgd', compiled=True, differentiable=True)


@pytest.mark.parametrize('rule', CLASSES)
def test_a_saved_state_goes_on_where_it_was(rule):
    model = scaled_model()
    settings = {'lr': 0.01, **({'momentum': 0.9} if rule == 'sgd' else {})}
    optimizer = make(model, rule, **settings)
    gradients(model)
    optimizer.step()
    twin = copy.deepcopy(model)
    resumed = make(twin, rule, lr=1.0)
    resumed.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
    for net, each in ((model, optimizer), (twin, resumed)):
        gradients(net, 1)
        each.step()
    same(model, twin, rtol=0, atol=0)


@pytest.mark.parametrize('rule', CLASSES)
@pytest.mark.parametrize('when', ['after loading', 'while training'])
def test_another_memory_format_does_not_permute_the_state(rule, when):
    model = scaled_model()
    twin = copy.deepcopy(model)
    settings = {'lr': 0.01, **({'momentum': 0.9} if rule == 'sgd' else {})}
    optimizer, reference = make(model, rule, **settings), make(twin, rule, **settings, fused=False, foreach=False)
    for step in range(3):
        if step == 1:
            model.to(memory_format=torch.channels_last)
            if when == 'after loading':
                state = optimizer.state_dict()
                optimizer = make(model, rule, **settings)
                optimizer.load_state_dict(state)
        gradients(twin, step)
        for param, other in zip(model.parameters(), twin.parameters()):
            param.grad = torch.empty_like(param).copy_(other.grad)
        optimizer.step()
        reference.step()
    same(model, twin, rtol=1e-9, atol=1e-12)


def test_sparse_gradients_of_other_parameters_work():
    model = nn.ModuleDict({'net': scaled_model(torch.float32), 'words': nn.Embedding(5, 2, sparse=True)})
    model['words'](torch.tensor([1])).sum().backward()
    before = model['words'].weight.detach().clone()
    make(model, 'sgd', lr=1.0).step()
    torch.testing.assert_close(before - model['words'].weight.detach(), torch.eye(5)[:, 1:2].expand(5, 2))


def test_plain_vectors_have_a_fingerprint_too():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1))
    first = build_repopt_sgd(model, {'0': {'kxk': torch.ones(8)}}, lr=0.1)
    with pytest.raises(ValueError, match='saved with the scales'):
        build_repopt_sgd(model, {'0': {'kxk': torch.full((8,), 2.0)}}, lr=0.1).load_state_dict(first.state_dict())


@pytest.mark.parametrize('name', ['', 'Sequential'])
def test_given_scales_have_the_fingerprint_of_carried_ones(name):
    model, vectors = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1)), {'0': {'kxk': torch.rand(8)}}
    for scales in (vectors, Scales(name, vectors)):
        given = make_grad_mults(model, scales).fingerprint
        assert given == make_grad_mults(prepare(model, scales)).fingerprint


def test_a_state_that_was_saved_with_other_scales_is_refused():
    first, second = scaled_model(), scaled_model()
    with pytest.raises(ValueError, match='saved with the scales'):
        make(second, 'sgd').load_state_dict(make(first, 'sgd').state_dict())
    with pytest.raises(ValueError, match='saved with the scales None'):
        make(second, 'sgd').load_state_dict(torch.optim.SGD(first.parameters()).state_dict())


@pytest.mark.parametrize('rule', CLASSES)
def test_a_copied_or_pickled_optimizer_still_multiplies(rule):
    model = scaled_model()
    optimizer = make(model, rule, lr=0.01)
    for twin, copied in (copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))):
        original = copy.deepcopy(model)
        reference = CLASSES[rule][1](original.parameters(), make_grad_mults(original, update_rule=rule), lr=0.01)
        for net, each in ((twin, copied), (original, reference)):
            gradients(net)
            each.step()
        same(twin, original, rtol=1e-6, atol=1e-8)


def test_a_closure_is_called_with_gradients_enabled():
    model = scaled_model(torch.float32)

    def closure():
        loss = model(torch.randn(2, 3, 32, 32)).sum()
        loss.backward()
        return loss

    assert make(model, 'sgd', lr=0.01).step(closure).requires_grad


@pytest.mark.parametrize('rule', CLASSES)
def test_the_readable_optimizers_multiply_the_gradients_of_a_closure(rule):
    model = scaled_model()
    models = model, copy.deepcopy(model)
    for model, each in zip(models, CLASSES[rule]):
        mults = make_grad_mults(model, update_rule=rule)
        optimizer = each(model.parameters(), grad_mults=mults, lr=0.01)
        optimizer.step(lambda model=model: gradients(model))
    same(*models, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize('rule', CLASSES)
def test_a_grad_scaler_skips_the_step_with_infinite_gradients(rule):
    model = scaled_model(torch.float32)
    before = copy.deepcopy(model)
    optimizer, scaler = make(model, rule, lr=0.1), torch.amp.GradScaler('cpu', init_scale=4.0)
    gradients(model)
    model.stem.conv.weight.grad[0, 0, 0, 0] = float('inf')
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    same(model, before, rtol=0, atol=0)
    scaler.update()
    gradients(model)
    scaler.step(optimizer)
    assert not torch.equal(model.stem.conv.weight, before.stem.conv.weight)


def test_a_step_can_be_differentiated():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1))
    lr = torch.tensor(0.1, requires_grad=True)
    weight = model[0].weight.detach().clone().requires_grad_().clone()
    mults = make_grad_mults(model, {'0': {'kxk': torch.full((4,), 2.0)}})
    moved = type(mults)({weight: mults[model[0].weight]}, 'sgd', '')
    optimizer = RepOptSGD([weight], lr=lr, grad_mults=moved, differentiable=True)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    weight.sum().backward()
    torch.testing.assert_close(lr.grad, torch.tensor(-4.0 * weight.numel()))


def test_parameters_added_later_are_multiplied_too():
    model = scaled_model()
    params = list(model.parameters())
    params[0].requires_grad_(False)
    optimizer = RepOptSGD(params[1:], lr=1.0, grad_mults=make_grad_mults(model))
    params[0].requires_grad_()
    optimizer.add_param_group({'params': params[:1]})
    gradients(model)
    expected = params[0].detach() - make_grad_mults(model)[params[0]].multiply(params[0].grad)
    optimizer.step()
    torch.testing.assert_close(params[0].detach(), expected)


@pytest.mark.parametrize('rule', CLASSES)
def test_a_head_can_be_trained_first_and_the_rest_be_added(rule):
    model = scaled_model().requires_grad_(False)
    model.head.requires_grad_(True)
    # Some versions of timm's factory take frozen parameters too.
    settings = {'lr': 0.01, 'weight_decay': 0.0, 'param_group_fn': lambda net: [{'params': [*net.head.parameters()]}]}
    optimizer = timm.optim.create_optimizer_v2(model, f'repopt_{rule}', **settings)
    rest = [param for param in model.parameters() if not param.requires_grad]
    model.requires_grad_(True)
    optimizer.add_param_group({'params': rest})
    twin = copy.deepcopy(model)
    reference = timm.optim.create_optimizer_v2(twin, f'repopt_{rule}', lr=0.01, weight_decay=0.0)
    for net, each in ((model, optimizer), (twin, reference)):
        gradients(net)
        each.step()
    same(model, twin, rtol=1e-9, atol=1e-12)


def test_a_share_without_kernels_is_trained():
    model = scaled_model()
    share = list(model.head.parameters())
    optimizer = RepOptSGD(share, lr=1.0, grad_mults=make_grad_mults(model).of(share))
    before = model.head.fc.bias.detach().clone()
    gradients(model)
    optimizer.step()
    torch.testing.assert_close(model.head.fc.bias.detach(), before - model.head.fc.bias.grad)


def test_the_grad_mults_of_a_frozen_copy_warn():
    model = scaled_model()
    copied = copy.deepcopy(model).requires_grad_(False)
    with pytest.warns(UserWarning, match=r'7 kernels of all groups have no Grad Mult') as warned:
        RepOptSGD(model.parameters(), grad_mults=make_grad_mults(copied))
    assert warned[0].filename == __file__


@pytest.mark.parametrize(
    ('mults', 'message'),
    [
        (lambda model: None, 'bare parameters'),
        (lambda model: make_grad_mults(model, update_rule='adamw'), "update rule 'adamw', expected 'sgd'"),
        (lambda model: make_grad_mults(copy.deepcopy(model)), 'None of the'),
    ],
)
def test_nothing_falls_back_to_plain_sgd(mults, message):
    model = scaled_model()
    with pytest.raises(ValueError, match=message):
        RepOptSGD(model.parameters(), grad_mults=mults(model))


@pytest.mark.parametrize(
    ('kind', 'scales', 'message'),
    [('', None, 'carries scales'), ('_hs', None, 'CSLA convolution'), ('_csla', 'initial', 'CSLA convolution')],
)
def test_models_without_plain_scaled_kernels_get_no_grad_mults(kind, scales, message):
    with pytest.raises(ValueError, match=message):
        make_grad_mults(tiny_model(kind, scales=scales))


def test_the_shortcut_trains_any_model():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 16, 2))
    before = model[0].weight.detach().clone()
    optimizer = build_repopt_sgd(model, {'0': {'kxk': torch.ones(8), '1x1': torch.rand(8)}}, lr=0.1, weight_decay=0.1)
    assert not torch.equal(model[0].weight, before)
    decays = {param: group['weight_decay'] for group in optimizer.param_groups for param in group['params']}
    assert decays[model[0].weight] == 0.1
    assert decays[model[3].weight] == 0.0


def test_without_initialization_the_weights_stay():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1))
    before = model[0].weight.detach().clone()
    build_repopt_sgd(model, {'0': {'kxk': torch.ones(8)}}, lr=0.1, init=False)
    assert torch.equal(model[0].weight, before)
