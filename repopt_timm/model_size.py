"""Parameters and multiply-adds of a network."""

import copy
from typing import Any

import torch
from torch import nn

from .reparam.modules import pair


def count_parameters(model: nn.Module) -> int:
    """Returns the number of a network's parameters."""
    return sum(param.numel() for param in model.parameters())


def count_macs(model: nn.Module, input_size: tuple[int, int, int]) -> int | None:
    """Returns the multiply-adds of convolutions and matrix products for one image of channels, height and width.

    None stands for a network that does not run on the meta device, where nothing is computed.
    """
    # Not part of what timm imports, and `--help` waits for every import.
    from torch.utils.flop_counter import FlopCounterMode

    shapes = copy.deepcopy(model).to('meta').eval()
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            shapes(torch.empty(1, *input_size, device='meta'))
    except Exception:
        # Networks fail in their own ways, and a card can do without this number.
        return None
    return counter.get_total_flops() // 2


def size_of(model: Any) -> dict[str, Any]:
    """Returns a timm model's image size, number of parameters and multiply-adds, as a card states them."""
    given = getattr(model, '_model_args', {})
    channels, height, width = model.pretrained_cfg['input_size']
    if image := given.get('img_size'):
        height, width = pair(image)
    size = (given.get('in_chans') or channels, height, width)
    macs = count_macs(model, size)
    known: dict[str, Any] = {} if macs is None else {'multiply_adds': macs}
    return {'image_size': list(size), 'parameters': count_parameters(model), **known}
