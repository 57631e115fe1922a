"""A CSLA network and its plain twin, trained side by side on the same batches."""

import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2

from repopt_timm import clip_grad_norm_, make_grad_mults

from ..helpers import random_scales, relative_difference, tiny_model

STEPS = 50


# Enough pixels everywhere for BatchNorm: normalizing a handful of values is chaotic and would amplify rounding.
STRIDES = (2, 1, 2, 2, 2)


def twins():
    csla = tiny_model('_csla', scales=random_scales(strides=STRIDES), strides=STRIDES).double()
    return csla, csla.to_plain()


def optimizers(csla, plain, rule, **kwargs):
    return create_optimizer_v2(csla, rule, **kwargs), create_optimizer_v2(plain, f'repopt_{rule}', **kwargs)


def train(csla, plain, csla_optimizer, plain_optimizer, steps=STEPS, accumulate=1, max_norm=None, scheduler=None):
    """Trains both, and returns the relative difference of the CSLA network, merged, and its twin."""
    mults = make_grad_mults(plain)
    schedulers = [scheduler(optimizer) for optimizer in (csla_optimizer, plain_optimizer)] if scheduler else []
    clipped = 0
    for _ in range(steps):
        csla_optimizer.zero_grad()
        plain_optimizer.zero_grad()
        for _ in range(accumulate):
            images, labels = torch.randn(8, 3, 32, 32, dtype=torch.float64), torch.randint(0, 5, (8,))
            for net in (csla, plain):
                F.cross_entropy(net(images), labels).backward()
        if max_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_(csla.parameters(), max_norm)
            torch.testing.assert_close(clip_grad_norm_(plain.parameters(), max_norm, mults), norm)
            clipped += bool(norm > max_norm)
        csla_optimizer.step()
        plain_optimizer.step()
        for each in schedulers:
            each.step()
    assert max_norm is None or clipped > 0
    return relative_difference(plain, csla.to_plain())
