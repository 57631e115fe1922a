import pytest
import torch
from torch import nn

from repopt_timm.bench.allocation import allocation, saved_bytes
from repopt_timm.bench.bench_models import batch, forward_pass

from ..helpers import tiny_model

CPU = torch.device('cpu')
MIB = 2**20


def test_what_a_call_keeps_and_what_it_needs_for_a_while_are_told_apart():
    def call():
        kept = torch.ones(MIB // 4)
        temporary = torch.ones(3 * MIB // 4)
        return kept.add_(temporary.sum())

    found = allocation(call, CPU)
    assert found.held == pytest.approx(MIB, rel=0.01)
    assert found.peak == pytest.approx(4 * MIB, rel=0.01)


def test_what_was_there_before_does_not_count():
    before = torch.ones(MIB)
    assert allocation(lambda: before.mul_(2), CPU).peak < 1000


def test_saved_memory_counts_once_and_without_parameters_and_inputs():
    model = nn.Sequential(nn.Linear(100, 100, bias=False), nn.ReLU(), nn.Linear(100, 1, bias=False))
    inputs = torch.randn(50, 100)
    # The second layer saves what the ReLU saves, and the first one saves its input.
    assert saved_bytes(model, lambda: model(inputs), [inputs]) == 50 * 100 * 4
    assert saved_bytes(model, lambda: model(inputs)) == 2 * 50 * 100 * 4


@pytest.mark.parametrize('checkpointing', [False, True])
@pytest.mark.parametrize('kind', ['', '_hs'])
def test_the_allocator_agrees_on_what_a_forward_pass_saves(kind, checkpointing):
    model = tiny_model(kind)
    model.set_grad_checkpointing(checkpointing)
    images, labels = batch(8, 64, CPU)
    labels %= 5
    forward = forward_pass(model, images, labels)
    saved = saved_bytes(model, forward, (images, labels))
    # The loss, and with checkpoints the states of the random number generator, are held without being saved.
    assert saved < allocation(forward, CPU).held < saved + 10 * torch.get_rng_state().nbytes
