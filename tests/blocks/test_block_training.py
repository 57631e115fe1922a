"""CSLA networks trained with SGD, and plain ones with RepOptSGD, are the same: for the blocks of each family."""

import copy

import pytest
import torch

from repopt_timm import RepOptSGD, Scales, csla, make_grad_mults, plain_twin, to_plain

from ..helpers import relative_difference, spread
from .block_examples import examples, images

EXAMPLES = examples()
SGD = {'lr': 0.01, 'momentum': 0.9, 'weight_decay': 5e-3}


@pytest.mark.parametrize('name', EXAMPLES)
def test_a_csla_block_under_sgd_is_the_plain_block_under_rep_opt_sgd(name):
    # Merged weights leave no parameter at zero, of which a relative difference would say nothing.
    plain = plain_twin(EXAMPLES[name].block, weights=True)
    twin = csla(plain, spread(Scales.initial(plain)))
    plain = to_plain(twin)
    start = copy.deepcopy(plain)
    optimizers = [torch.optim.SGD(twin.parameters(), **SGD)]
    optimizers.append(RepOptSGD(plain.parameters(), grad_mults=make_grad_mults(plain), **SGD))
    for _ in range(5):
        x = images(EXAMPLES[name].channels)
        for net, optimizer in zip((twin, plain), optimizers):
            optimizer.zero_grad()
            net(x).sin().mean().backward()
            optimizer.step()
    assert relative_difference(plain, to_plain(twin)) < 1e-10
    assert relative_difference(plain, start) > 1e-4
