"""Statistics of the BatchNorms that a plain twin adds, from images."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .plain_block import PlainBlock

__all__ = ['recalibrate']


class _Moments:
    """Running mean and variance of each channel over all batches, in float64."""

    def __init__(self, bn: Any):
        self.count = 0
        self.mean = torch.zeros_like(bn.running_mean, dtype=torch.float64)
        self.squares = torch.zeros_like(self.mean)

    def add(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        values = inputs[0].double().movedim(1, 0).flatten(1)
        count = values.shape[1]
        mean = values.mean(1)
        squares = (values - mean[:, None]).square().sum(1)
        total = self.count + count
        apart = mean - self.mean
        self.mean += apart * (count / total)
        self.squares += squares + apart.square() * (self.count * count / total)
        self.count = total


@torch.no_grad()
def recalibrate(twin: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """Makes the statistics of a merged twin's added BatchNorms those of images, and leaves its function as it is.

    A merge can only estimate the variance of a sum of branches. In evaluation mode gamma undoes that; in training mode,
    where BatchNorm takes the variance of the batch, the output would change. Afterwards the twin computes in training
    mode what the branches did, up to the differences between batches.

    Args:
        twin: What `plain_twin(model, weights=True)` returned; changed in place. BatchNorms that the multi-branch
            network had itself stay as they are.
        batches: Images of shape (N, C, H, W), preprocessed as in training, or tuples that start with them. A few
            thousand images will do.

    Returns:
        The twin.

    Raises:
        ValueError: If the model has no plain block, its BatchNorms are folded or frozen, or there are no images.
    """
    blocks: dict[str, Any] = {name: each for name, each in twin.named_modules() if isinstance(each, PlainBlock)}
    if not blocks:
        raise ValueError(f'{type(twin).__name__} has no block to recalibrate: make it with plain_twin(model).')
    for name, block in blocks.items():
        if not isinstance(block.bn, nn.BatchNorm2d | nn.SyncBatchNorm):
            raise ValueError(
                f"Found {type(block.bn).__name__} at '{f'{name}.bn'.lstrip('.')}' of {type(twin).__name__}, expected a "
                f'BatchNorm: recalibrate the twin before freeze_batch_norm_2d and reparameterize_model.'
            )
    moments = {block.bn: _Moments(block.bn) for block in blocks.values() if block.adds_norm}
    hooks = [bn.register_forward_pre_hook(each.add) for bn, each in moments.items()]
    modes = {module: module.training for module in twin.modules()}
    device = next(twin.parameters()).device
    try:
        twin.eval()
        for batch in batches:
            images = batch[0] if isinstance(batch, list | tuple) else batch
            twin(images.to(device))
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
    for bn, each in moments.items():
        if each.count < 2:
            raise ValueError('There are no images to recalibrate with: the batches are empty.')
        _restate(bn, each.mean, each.squares / (each.count - 1))
    return twin


def _restate(bn: Any, mean: Tensor, variance: Tensor) -> None:
    """Gives a BatchNorm other statistics, and moves gamma and beta so that it computes the same with them."""
    old = (bn.running_var.double() + bn.eps).sqrt()
    gamma = bn.weight.double()
    beta = bn.bias.double() + (mean - bn.running_mean.double()) * gamma / old
    bn.running_mean.copy_(mean)
    bn.running_var.copy_(variance)
    bn.weight.copy_(gamma * (bn.running_var.double() + bn.eps).sqrt() / old)
    bn.bias.copy_(beta)
