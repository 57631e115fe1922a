import copy

import pytest
import torch
from torch import nn

from repopt_timm.reparam import CSLAConv2d

CONV = nn.Conv2d(6, 6, 3, padding=1, bias=False)
VECTORS = {'kxk': torch.rand(6), '1x1': torch.rand(6), 'identity': torch.rand(6)}


def test_constant_scales_stay_float32_whatever_the_module_is_cast_to():
    module = CSLAConv2d(CONV)
    module.set_vectors(VECTORS)
    module.to(torch.bfloat16)
    assert module.branches['kxk'].weight.dtype == torch.bfloat16
    assert torch.equal(module.branches['kxk'].scale, VECTORS['kxk'])
    assert module(torch.randn(1, 6, 4, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_only_a_hyper_search_trains_its_scales():
    assert 'branches.kxk.scale' in dict(CSLAConv2d(CONV, trainable_scales=True).named_parameters())
    assert 'branches.kxk.scale' in dict(CSLAConv2d(CONV).named_buffers())
    assert 'branches.identity.scale' not in CSLAConv2d(CONV).state_dict()


def test_gradients_reach_operators_and_trainable_scales():
    module = CSLAConv2d(CONV, trainable_scales=True)
    module(torch.randn(2, 6, 5, 5)).square().sum().backward()
    assert all(param.grad.abs().sum() > 0 for param in module.parameters())


def test_no_kernel_is_kept_for_the_backward_pass():
    module, x = CSLAConv2d(CONV, trainable_scales=True), torch.randn(1, 6, 2, 2, requires_grad=True)
    known = {tensor.data_ptr() for tensor in (x, *module.parameters())}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        module(x)
    assert kept
    assert {tensor.data_ptr() for tensor in kept} <= known


def test_under_autocast_gradients_have_the_parameters_dtype():
    conv = nn.Conv2d(6, 6, 3, padding=1)
    module, x = CSLAConv2d(conv, trainable_scales=True), torch.randn(2, 6, 5, 5)
    with torch.autocast('cpu', torch.bfloat16):
        y = module(x)
        assert y.dtype == torch.bfloat16
        plain = torch.nn.functional.conv2d(x, module.kernel(), module.bias, padding=1)
    params = list(module.parameters())
    grads = torch.autograd.grad(y.float().square().sum(), params)
    expected = torch.autograd.grad(plain.float().square().sum(), params)
    assert all(grad.dtype == torch.float32 for grad in grads)
    torch.testing.assert_close(grads, expected, rtol=0.05, atol=0.5)


def test_the_identity_starts_at_its_searched_value():
    module = CSLAConv2d(CONV)
    module.set_vectors(VECTORS)
    assert torch.equal(module.branches['identity'].weight.flatten(), VECTORS['identity'])
    assert torch.equal(module.vectors()['identity'], VECTORS['identity'])


def test_a_missing_branch_is_named():
    with pytest.raises(ValueError, match=r"'layer' has scales for the branches \['kxk'\]"):
        CSLAConv2d(CONV).set_vectors({'kxk': torch.rand(6)}, 'layer')


def test_it_is_built_on_meta_and_materialized():
    module = CSLAConv2d(CONV, device='meta').to_empty(device='cpu')
    module.reset_parameters()
    assert module(torch.randn(1, 6, 4, 4)).isfinite().all()
    assert copy.deepcopy(module).branches['kxk'].scale.dtype == torch.float32
