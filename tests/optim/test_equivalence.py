import dataclasses

import pytest
import torch
from torch.optim.lr_scheduler import OneCycleLR

from repopt_timm import RepOptSGD, make_grad_mults
from repopt_timm.reparam import GradMults

from .equivalence import STEPS, optimizers, train, twins

BASE = {'lr': 0.01, 'momentum': 0.9, 'weight_decay': 5e-3}


@pytest.mark.parametrize(
    'settings',
    [
        {},
        {'nesterov': False},
        {'nesterov': False, 'dampening': 0.3},
        {'momentum': 0.0, 'nesterov': False},
        {'weight_decay': 0.0},
    ],
    ids=['nesterov', 'momentum', 'dampening', 'plain', 'no-decay'],
)
def test_sgd_on_the_csla_network_is_rep_opt_sgd_on_the_plain_one(settings):
    csla, plain = twins()
    assert train(csla, plain, *optimizers(csla, plain, 'sgd', **{**BASE, **settings})) < 1e-12


@pytest.mark.parametrize(
    'how',
    [
        {'accumulate': 2},
        {'max_norm': 0.5},
        {'scheduler': lambda optimizer: OneCycleLR(optimizer, 0.05, total_steps=STEPS)},
    ],
    ids=['accumulation', 'clipping', 'schedule'],
)
def test_the_equivalence_holds_however_one_trains(how):
    csla, plain = twins()
    assert train(csla, plain, *optimizers(csla, plain, 'sgd', **BASE), **how) < 1e-12


@pytest.mark.parametrize('how', [{}, {'max_norm': 0.5}], ids=['plain', 'clipping'])
@pytest.mark.parametrize('fused', [True, False])
def test_adamw_is_equivalent_up_to_what_eps_does(fused, how):
    csla, plain = twins()
    pair = optimizers(csla, plain, 'adamw', lr=1e-3, weight_decay=0.05, eps=1e-30, fused=fused)
    # Adam divides by tiny second moments, so that rounding is amplified more than in SGD.
    assert train(csla, plain, *pair, **how) < 1e-9


@pytest.mark.parametrize('mutation', ['power', 'diagonal', 'centre'])
def test_a_wrong_grad_mult_would_be_noticed(mutation):
    csla, plain = twins()
    right = make_grad_mults(plain)
    wrong = {}
    for kernel, mult in right.items():
        wrong[kernel] = {
            'power': dataclasses.replace(mult, taps=mult.taps.sqrt()),
            'diagonal': dataclasses.replace(mult, first_row=1),
            'centre': dataclasses.replace(mult, taps=mult.taps.roll(1, -1)),
        }[mutation]
    csla_optimizer = torch.optim.SGD(csla.parameters(), lr=0.01)
    optimizer = RepOptSGD(plain.parameters(), lr=0.01, grad_mults=GradMults(wrong, 'sgd', right.fingerprint))
    assert train(csla, plain, csla_optimizer, optimizer, steps=2) > 1e-6
