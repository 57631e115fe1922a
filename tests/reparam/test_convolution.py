import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from repopt_timm import Scales, csla, hyper_search, to_plain
from repopt_timm.reparam import branches_of

from ..helpers import counted_scales

BRANCHES = {'kxk': 1, '1x1': 1, 'identity': 1}


def plain():
    return nn.Sequential(nn.Conv2d(6, 6, 3, padding=1))


def search(counts=BRANCHES):
    return hyper_search(plain(), counted_scales(plain(), {'0': counts}))


def constant(counts=BRANCHES):
    return csla(plain(), counted_scales(plain(), {'0': counts}))


def test_only_a_search_trains_its_scales():
    names = {'0.parametrizations.weight.0.scales.1x1', '0.parametrizations.weight.0.scales.kxk'}
    twin = search()
    assert names <= set(dict(twin.named_parameters()))
    assert names <= set(dict(constant().named_buffers()))
    assert set(twin.state_dict()) == set(constant().state_dict())
    twin(torch.randn(2, 6, 5, 5)).square().sum().backward()
    assert all(param.grad.any() for param in twin.parameters())


def test_constant_scales_stay_float32_whatever_the_network_is_cast_to():
    twin = constant()
    vectors = branches_of(twin[0]).vectors()
    twin.to(torch.bfloat16)
    assert torch.equal(branches_of(twin[0]).vectors()['kxk'], vectors['kxk'])
    assert twin(torch.randn(1, 6, 4, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_under_autocast_the_kernel_is_merged_in_float32():
    twin, x = search(), torch.randn(2, 6, 5, 5)
    with torch.autocast('cpu', torch.bfloat16):
        y = twin(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    expected = to_plain(twin)(x)
    assert (y - expected).norm() < 0.01 * expected.norm()
    assert all(param.grad.dtype == torch.float32 for param in twin.parameters())


def test_it_works_under_torch_func_compile_and_double_backward():
    twin, x = search(), torch.randn(2, 6, 4, 4, requires_grad=True)
    params = dict(twin.named_parameters())

    def loss(params, x):
        return torch.func.functional_call(twin, params, (x,)).square().sum()

    grads = torch.autograd.grad(twin(x).square().sum(), list(params.values()), create_graph=True)
    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, x[:, None])
    torch.testing.assert_close(tuple(each.sum(0) for each in per_sample.values()), grads)
    torch.testing.assert_close(torch.compile(twin, backend='aot_eager', fullgraph=True)(x), twin(x))
    assert all(grad.any() for grad in torch.autograd.grad(sum(g.square().sum() for g in grads), list(params.values())))


def test_without_scales_it_raises_until_a_state_dict_brings_them():
    twin = csla(plain(), {'0': BRANCHES})
    twin.load_state_dict({}, strict=False)
    x = torch.randn(1, 6, 4, 4)
    for use in (lambda: twin(x), twin.state_dict, lambda: to_plain(twin), lambda: Scales.from_model(twin)):
        with pytest.raises(ValueError, match='no scales yet'):
            use()
    other = constant()
    twin.load_state_dict(other.state_dict())
    assert torch.equal(twin(x), other(x))


def test_uninitialized_memory_does_not_pass_for_scales():
    with torch.device('meta'):
        model = plain()
    twin = csla(model, counted_scales(plain(), {'0': BRANCHES})).to_empty(device='cpu')
    with pytest.raises(ValueError, match='no scales yet'):
        twin(torch.randn(1, 6, 4, 4))
    twin.load_state_dict(constant().state_dict())
    assert twin(torch.randn(1, 6, 4, 4)).isfinite().all()


def test_copies_merge_and_train_apart():
    twin = search()
    copied = copy.deepcopy(twin)
    merged = to_plain(copied)
    x = torch.randn(1, 6, 4, 4)
    torch.testing.assert_close(merged(x), F.conv2d(x, twin[0].weight, twin[0].bias, padding=1))
    with torch.no_grad():
        copied[0].parametrizations.weight.original.zero_()
    assert not torch.equal(copied(x), twin(x))
