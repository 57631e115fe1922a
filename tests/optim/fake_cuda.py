"""CUDA tensors without a GPU: shapes, devices and dispatched operations, but no values."""

from contextlib import contextmanager

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from repopt_timm.reparam import GradMults

_LIBRARY = torch.library.Library('aten', 'IMPL')
for _name in ('_fused_sgd_', '_fused_sgd_.tensor_lr', '_fused_adamw_.tensor_lr'):
    # The real ones ask for a driver.
    _LIBRARY.impl(_name, lambda params, grads, *args, **kwargs: check_alike(params, grads), 'Meta')


def check_alike(*lists):
    """Asserts what torch's fused and multi-tensor kernels ask of their lists to take the fast path."""
    for tensors in zip(*lists):
        assert len({(each.shape, each.stride(), each.dtype, each.device) for each in tensors}) == 1


class Dispatched(TorchDispatchMode):
    """Counts what is dispatched, and fails where the host waits for the device."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ('_local_scalar_dense', 'item', 'nonzero', 'is_nonzero'), f'{name} waits for the device'
        if name in ('_to_copy', 'copy_') and args[0].device.type == 'cuda':
            assert (kwargs or {}).get('device') != torch.device('cpu'), f'{name} waits for the device'
        self.total += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def fake_cuda(model, grad_mults):
    """Yields a model's parameters as fake CUDA tensors with gradients, and its Grad Mults, still on the CPU."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        fakes = {}
        for param in model.parameters():
            fakes[param] = nn.Parameter(torch.empty(param.shape, dtype=param.dtype, device='cuda'))
            fakes[param].grad = torch.empty_like(fakes[param])
        mults = {fakes[param]: mult for param, mult in grad_mults.items()}
        names = dict.fromkeys(mults, '')
        yield list(fakes.values()), GradMults(mults, grad_mults.update_rule, grad_mults.fingerprint, names, {})
