"""A CSLA network and its plain twin, trained side by side on the same batches."""

import torch
import torch.nn.functional as F

from repopt_timm import RepOptAdamW, RepOptSGD, clip_grad_norm_, make_grad_mults, to_plain

from ..helpers import random_scales, tiny_model

TORCHS = {'sgd': torch.optim.SGD, 'adamw': torch.optim.AdamW}
OURS = {'sgd': RepOptSGD, 'adamw': RepOptAdamW}
# Adam divides by tiny second moments, so that rounding is amplified more than in SGD, and eps counts.
SETTINGS = {
    'sgd': {'lr': 0.01, 'momentum': 0.9, 'weight_decay': 5e-3, 'nesterov': True},
    'adamw': {'lr': 1e-3, 'weight_decay': 0.05, 'eps': 1e-30},
}
# Enough pixels everywhere for BatchNorm: normalizing a handful of values is chaotic and would amplify rounding.
STRIDES = (2, 1, 2, 2, 2)


def twins(start='paper'):
    scales = random_scales(strides=STRIDES).with_start(start)
    csla = tiny_model('_csla', scales=scales, strides=STRIDES).double()
    return csla, to_plain(csla)


def optimizers(csla, plain, rule, **kwargs):
    kwargs = {**SETTINGS[rule], **kwargs}
    mults = make_grad_mults(plain, update_rule=rule)
    return TORCHS[rule](csla.parameters(), **kwargs), OURS[rule](plain.parameters(), grad_mults=mults, **kwargs)


def train(nets, optimizers, steps=20, accumulate=1, max_norm=None, scheduler=None, size=32):
    """Trains a CSLA network and its plain twin; both in float64."""
    csla, plain = nets
    schedulers = [scheduler(optimizer) for optimizer in optimizers] if scheduler else []
    clipped = 0
    for _ in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        for _ in range(accumulate):
            images, labels = torch.randn(8, 3, size, size, dtype=torch.float64), torch.randint(0, 5, (8,))
            for net in nets:
                F.cross_entropy(net(images), labels).backward()
        if max_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_(csla.parameters(), max_norm)
            torch.testing.assert_close(clip_grad_norm_(plain.parameters(), max_norm, make_grad_mults(plain)), norm)
            clipped += bool(norm > max_norm)
        for each in (*optimizers, *schedulers):
            each.step()
    assert max_norm is None or clipped > 0
