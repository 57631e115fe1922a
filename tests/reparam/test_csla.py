import copy

import pytest
import torch
from timm.layers import Conv2dSame, StdConv2d
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.prune import l1_unstructured

from repopt_timm.reparam import CSLAConv2d

CONV = nn.Conv2d(6, 6, 3, padding=1, bias=False)
BRANCHES = ('kxk', '1x1', 'identity')
VECTORS = {'kxk': torch.rand(6), '1x1': torch.rand(6), 'identity': torch.rand(6)}


def test_constant_scales_stay_float32_whatever_the_module_is_cast_to():
    module = CSLAConv2d(CONV, BRANCHES)
    module.set_vectors(VECTORS)
    module.to(torch.bfloat16)
    assert module.branches['kxk'].weight.dtype == torch.bfloat16
    assert torch.equal(module.branches['kxk'].scale, VECTORS['kxk'])
    assert module(torch.randn(1, 6, 4, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_only_a_hyper_search_trains_its_scales():
    assert 'branches.kxk.scale' in dict(CSLAConv2d(CONV, BRANCHES, trainable_scales=True).named_parameters())
    assert 'branches.kxk.scale' in dict(CSLAConv2d(CONV, BRANCHES).named_buffers())
    assert 'branches.identity.scale' not in CSLAConv2d(CONV, BRANCHES).state_dict()


def test_gradients_reach_operators_and_trainable_scales():
    module = CSLAConv2d(CONV, BRANCHES, trainable_scales=True)
    module(torch.randn(2, 6, 5, 5)).square().sum().backward()
    assert all(param.grad.abs().sum() > 0 for param in module.parameters())


def test_no_kernel_is_kept_for_the_backward_pass():
    module, x = CSLAConv2d(CONV, BRANCHES, trainable_scales=True), torch.randn(1, 6, 2, 2, requires_grad=True)
    known = {tensor.data_ptr() for tensor in (x, *module.parameters())}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        module(x)
    assert kept
    assert {tensor.data_ptr() for tensor in kept} <= known


def test_under_autocast_gradients_are_those_of_autocast_and_have_the_parameters_dtype():
    conv = nn.Conv2d(6, 6, 3, padding=1)
    module, x = CSLAConv2d(conv, BRANCHES, trainable_scales=True), torch.randn(2, 6, 5, 5)
    with torch.autocast('cpu', torch.bfloat16):
        y = module(x)
        assert y.dtype == torch.bfloat16
    # Apart, as torch before 2.14 keeps the casts of a forward pass without a graph for whoever comes next.
    with torch.autocast('cpu', torch.bfloat16):
        plain = torch.nn.functional.conv2d(x, module.kernel(), module.bias, padding=1)
    params = list(module.parameters())
    grads = torch.autograd.grad(y.float().square().sum(), params)
    expected = torch.autograd.grad(plain.float().square().sum(), params)
    assert all(grad.dtype == torch.float32 for grad in grads)
    for grad, each in zip(grads, expected):
        # bfloat16 has 8 bits.
        assert (grad - each).norm() < 0.01 * each.norm()


def test_the_identity_starts_at_its_searched_value():
    module = CSLAConv2d(CONV, BRANCHES)
    module.set_vectors(VECTORS)
    assert torch.equal(module.branches['identity'].weight.flatten(), VECTORS['identity'])
    assert torch.equal(module.vectors()['identity'], VECTORS['identity'])


def test_a_missing_branch_is_named():
    with pytest.raises(ValueError, match=r"'layer' has scales for the branches \['kxk'\]"):
        CSLAConv2d(CONV, BRANCHES).set_vectors({'kxk': torch.rand(6)}, 'layer')


def test_it_is_built_on_meta_and_materialized():
    with torch.device('meta'):
        conv = nn.Conv2d(6, 6, 3, padding=1, bias=False)
    module = CSLAConv2d(conv, BRANCHES).to_empty(device='cpu')
    module.reset_parameters()
    assert module(torch.randn(1, 6, 4, 4)).isfinite().all()
    assert copy.deepcopy(module).branches['kxk'].scale.dtype == torch.float32


def test_gradients_are_traced_on_meta():
    with torch.device('meta'):
        module = CSLAConv2d(nn.Conv2d(6, 6, 3, padding=1), BRANCHES, trainable_scales=True)
        module(torch.randn(2, 6, 5, 5)).sum().backward()
    assert all(param.grad.is_meta for param in module.parameters())


@pytest.mark.parametrize('trainable_scales', [False, True])
def test_second_derivatives_are_those_of_the_merged_kernel(trainable_scales):
    module = CSLAConv2d(CONV, BRANCHES, trainable_scales=trainable_scales).double()
    x = torch.randn(2, 6, 4, 4, dtype=torch.float64, requires_grad=True)
    inputs = [x, *module.parameters()]

    def penalty(y):
        grads = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in grads), inputs)

    expected = penalty(torch.nn.functional.conv2d(x, module.kernel(), padding=1))
    torch.testing.assert_close(penalty(module(x)), expected)


def test_it_works_under_torch_func_and_a_trace():
    module, x = CSLAConv2d(CONV, BRANCHES, trainable_scales=True), torch.randn(2, 6, 4, 4)
    params = dict(module.named_parameters())

    def loss(params, x):
        return torch.func.functional_call(module, params, (x,)).square().sum()

    expected = torch.autograd.grad(module(x).square().sum(), list(params.values()))
    torch.testing.assert_close(tuple(torch.func.grad(loss)(params, x).values()), expected)
    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, x[:, None])
    torch.testing.assert_close(tuple(each.sum(0) for each in per_sample.values()), expected)
    torch.testing.assert_close(torch.jit.trace(module, x)(x), module(x))


def test_without_scales_it_raises_until_a_checkpoint_brings_them():
    module = CSLAConv2d(CONV, BRANCHES, scale=None)
    for use in (lambda: module(torch.randn(1, 6, 4, 4)), module.kernel, module.vectors, module.to_conv):
        with pytest.raises(ValueError, match='has no scales yet'):
            use()
    module.load_state_dict(CSLAConv2d(CONV, BRANCHES, scale=0.5).state_dict())
    assert module.vectors()['kxk'].eq(0.5).all()


def test_a_count_trains_as_many_operators_that_share_a_scale():
    module = CSLAConv2d(CONV, {'kxk': 3, '1x1': 1})
    assert module.branches['kxk'].weight.shape == (3, 6, 6, 3, 3)
    single = CSLAConv2d(CONV, ['kxk', '1x1'])
    with torch.no_grad():
        single.branches['kxk'].weight.copy_(module.branches['kxk'].weight.sum(0))
        single.branches['1x1'].weight.copy_(module.branches['1x1'].weight)
    x = torch.randn(1, 6, 4, 4)
    torch.testing.assert_close(module(x), single(x))
    module(x).sum().backward()
    single(x).sum().backward()
    torch.testing.assert_close(module.branches['kxk'].weight.grad[2], single.branches['kxk'].weight.grad)


def replaced_forward(conv):
    conv.forward = lambda x: x
    return conv


def test_equal_branches_take_another_memory_format_and_stay_the_parameters_that_they_were():
    module = CSLAConv2d(CONV, {'kxk': 4, '1x1': 1}, trainable_scales=True)
    twin, x = copy.deepcopy(module), torch.randn(2, 6, 5, 5)
    params = list(module.parameters())
    module.to(memory_format=torch.channels_last)
    assert all(param is before for param, before in zip(module.parameters(), params))
    operator = module.branches['kxk'].weight
    assert torch.equal(operator, twin.branches['kxk'].weight)
    assert all(part.is_contiguous(memory_format=torch.channels_last) for part in operator)
    for each in (module, twin):
        each(x).square().sum().backward()
    for param, other in zip(params, twin.parameters()):
        torch.testing.assert_close(param.grad, other.grad, rtol=1e-4, atol=1e-4)
    module.double().to(memory_format=torch.contiguous_format)
    assert operator.is_contiguous()
    assert operator.dtype == operator.grad.dtype == torch.float64


@pytest.mark.parametrize(
    ('conv', 'reason'),
    [
        (StdConv2d(4, 4, 3, padding=1), 'not exactly nn.Conv2d'),
        (Conv2dSame(4, 4, 3), 'not exactly nn.Conv2d'),
        (nn.Conv2d(4, 4, 2), 'is even'),
        (nn.Conv2d(4, 4, 3), 'its padding is'),
        (nn.Conv2d(4, 4, 3, padding='valid'), 'its padding is'),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode='circular'), "padding_mode='circular'"),
        (weight_norm(nn.Conv2d(4, 4, 3, padding=1)), 'a parametrization computes its weight'),
        (replaced_forward(nn.Conv2d(4, 4, 3, padding=1)), 'its forward method was replaced'),
        (l1_unstructured(nn.Conv2d(4, 4, 3, padding=1), 'weight', 1), 'computed from other parameters'),
    ],
)
def test_what_does_not_compute_the_convolution_of_its_weight_is_refused(conv, reason):
    with pytest.raises(ValueError, match=reason):
        CSLAConv2d(conv, ['kxk'])


@pytest.mark.parametrize('value', [1, (1,)])
def test_one_number_is_height_and_width(value):
    conv = copy.deepcopy(CONV)
    conv.stride = conv.padding = conv.dilation = value
    module, x = CSLAConv2d(conv, BRANCHES), torch.randn(2, 6, 5, 5, requires_grad=True)
    expected = nn.functional.conv2d(x, module.kernel(), padding=1)
    torch.testing.assert_close(module(x), expected)
    module(x).sum().backward()
    torch.testing.assert_close(module.to_conv()(x), expected)
    conv.padding = 0
    with pytest.raises(ValueError, match=r'its padding is \(0, 0\), expected .* \(1, 1\)'):
        CSLAConv2d(conv, BRANCHES)


def test_images_of_another_dtype_are_an_error_as_in_a_plain_convolution():
    module = CSLAConv2d(CONV, BRANCHES, trainable_scales=True).to(torch.bfloat16)
    with pytest.raises(RuntimeError, match=r'expected scalar type|should be the same'):
        module(torch.randn(1, 6, 4, 4))
