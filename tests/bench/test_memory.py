import pytest
import torch

from repopt_timm.bench.allocation import allocation, saved_bytes, static_bytes
from repopt_timm.bench.bench_models import architecture_of, batch, forward_pass, repvgg, target
from repopt_timm.bench.memory import _simulate, estimate

from ..helpers import TINY

CPU, META = torch.device('cpu'), torch.device('meta')
ARCHITECTURE = architecture_of(TINY)
BUILDERS = {
    'repvgg': lambda device: repvgg(ARCHITECTURE, device),
    'target': lambda device: target(ARCHITECTURE, device, scales=False),
    'checkpointing': lambda device: target(ARCHITECTURE, device, grad_checkpointing=True, scales=False),
}


@pytest.mark.parametrize('precision', ['float32', 'bfloat16'])
@pytest.mark.parametrize('name', BUILDERS)
def test_the_estimate_agrees_with_what_a_real_step_allocates(name, precision):
    memory = estimate(lambda: BUILDERS[name](META), 64, precision)
    model = BUILDERS[name](CPU)
    images, labels = batch(16, 64, CPU)
    forward = forward_pass(model, images, labels, precision)
    assert memory.saved(16) == pytest.approx(saved_bytes(model, forward, (images, labels)), rel=0.002)
    model.zero_grad()
    step = allocation(lambda: forward().backward(), CPU)
    momentum = memory.parameters
    measured = step.peak + static_bytes(model) + momentum + images.nbytes
    # Inside of a convolution's backward pass, the CPU copies inputs and outputs to lay them out otherwise.
    largest = 16 * ARCHITECTURE.widths[0] * 32 * 32 * 4
    assert memory.peak(16) <= measured <= memory.peak(16) + 2 * largest


def test_two_runs_tell_all_batch_sizes():
    memory = estimate(lambda: BUILDERS['target'](META), 64)
    run = _simulate(BUILDERS['target'](META), 7, 64, 'float32')
    assert memory.peak(7) == 2 * memory.parameters + memory.buffers + max(run.live)
    assert memory.saved(7) == run.saved


def test_the_largest_batch_fits_and_one_more_does_not():
    memory = estimate(lambda: BUILDERS['target'](META), 64)
    for budget in (5e6, 1e7, 1e8):
        largest = memory.largest_batch(budget)
        assert memory.peak(largest) <= budget < memory.peak(largest + 1)
    assert memory.largest_batch(memory.parameters) == 0
