"""Statistics of the BatchNorms that a plain twin adds, from images."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .conversion import PlainBlock


@torch.no_grad()
def recalibrate(twin: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """Measures on images the statistics of the BatchNorms that a merge added; the function stays the same.

    A merge can only estimate the variance of a sum of branches. In evaluation mode gamma undoes that; in training mode,
    where BatchNorm takes the variance of the batch, the output would change. Afterwards the twin computes in training
    mode what the branches did, up to the differences between batches.

    Args:
        twin: What `plain_twin(model, weights=True)` returned; changed in place. BatchNorms that the multi-branch
            network had itself stay as they are.
        batches: Images of shape (N, C, H, W), preprocessed as in training, or tuples that start with them. A few
            thousand images will do. Each batch counts alike.

    Returns:
        The twin.

    Raises:
        ValueError: If the model has no plain block, its BatchNorms are folded or frozen, or images are missing, NaN or
            infinite; the model is then unchanged.
    """
    blocks: dict[str, Any] = {name: each for name, each in twin.named_modules() if isinstance(each, PlainBlock)}
    if not blocks:
        raise ValueError(f'{type(twin).__name__} has no block to recalibrate: make it with plain_twin(model).')
    for name, block in blocks.items():
        if not isinstance(block.bn, nn.BatchNorm2d | nn.SyncBatchNorm):
            raise ValueError(
                f"Found {type(block.bn).__name__} at '{name}.bn' of {type(twin).__name__}, expected a BatchNorm: "
                f'recalibrate the twin before freeze_batch_norm_2d and reparameterize_model.'
            )
    device = next(twin.parameters()).device
    # As in `swa_utils.update_bn`, but beside the network, whose BatchNorms go on with the statistics that they have.
    settings: dict[str, Any] = {'momentum': None, 'affine': False, 'device': device, 'dtype': torch.float64}
    added = {block.bn: name for name, block in blocks.items() if block.adds_norm}
    measured: dict[Any, Any] = {bn: nn.BatchNorm2d(bn.num_features, **settings) for bn in added}

    def measure(bn: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        measured[bn](inputs[0].double())

    hooks = [bn.register_forward_pre_hook(measure) for bn in measured]
    modes = {module: module.training for module in twin.modules()}
    try:
        twin.eval()
        for batch in batches:
            images = batch[0] if isinstance(batch, list | tuple) else batch
            if not len(images):
                raise ValueError('A batch to recalibrate with is empty.')
            twin(images.to(device))
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
    for bn, found in measured.items():
        if not found.num_batches_tracked:
            raise ValueError('There are no images to recalibrate with.')
        if not (found.running_mean.isfinite().all() and found.running_var.isfinite().all()):
            raise ValueError(f"The BatchNorm of '{added[bn]}' gets NaN or infinite values: leave such batches out.")
    for bn, found in measured.items():
        # Gamma and beta move so that the BatchNorm computes the same with the other statistics.
        gain = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()
        bn.bias.copy_(bn.bias.double() + (found.running_mean - bn.running_mean.double()) * gain)
        bn.running_mean.copy_(found.running_mean)
        bn.running_var.copy_(found.running_var)
        bn.weight.copy_(gain * (bn.running_var.double() + bn.eps).sqrt())
    return twin
