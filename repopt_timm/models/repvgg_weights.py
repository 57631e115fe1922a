"""Weights of RepVGG for RepOpt-VGG: read with their branches, and merged."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..architectures import Architecture
from ..blocks import implied_scales, plain_twin
from ..reparam import prepare
from .strided_byobnet import RepVgg

__all__ = ['has_branches', 'merge_repvgg', 'repvgg_with']

_STEM = 'stem.conv_kxk.conv.weight'


def has_branches(state_dict: Mapping[str, Tensor]) -> bool:
    """Returns whether tensors are those of a RepVGG with its branches."""
    return _STEM in state_dict


def repvgg_with(state_dict: Mapping[str, Tensor], model: RepVgg) -> RepVgg:
    """Makes the RepVGG of a network's numbers that has these weights.

    Args:
        state_dict: Tensors of a RepVGG; image channels and classes are theirs.
        model: Network of the same depths, widths and strides.

    Raises:
        ValueError: If the network has squeeze-and-excitation, which is after the ReLU there and before it in RepVGG.
        RuntimeError: If the tensors are those of other numbers.
    """
    if not isinstance(model.stem.attn, nn.Identity):
        raise ValueError(
            "RepVGG's squeeze-and-excitation comes before the ReLU, ours after it, so its weights do not fit. Use "
            'repopt_repvgg_d2se.'
        )
    cfg = Architecture(model.depths, model.widths)
    in_chans = state_dict[_STEM].shape[1]
    classes = len(state_dict['head.fc.weight']) if 'head.fc.weight' in state_dict else 0
    original = RepVgg(cfg, strides=model.strides, in_chans=in_chans, num_classes=classes, device='meta')
    original.load_state_dict(dict(state_dict), assign=True)
    return original.eval()


def merge_repvgg(state_dict: Mapping[str, Tensor], model: Any, implied: bool = False) -> dict[str, Tensor]:
    """Makes the state dict of a RepOpt-VGG from one of RepVGG.

    Args:
        state_dict: Tensors of a RepVGG.
        model: The RepOpt-VGG.
        implied: Let the model carry the scales that the branches imply.
    """
    original = repvgg_with(state_dict, model)
    if implied:
        scales = implied_scales(original).renamed(model.architecture)
        prepare(model, scales, init=False)
        model.scales_provenance = scales.provenance
    return plain_twin(original, weights=True).state_dict()
