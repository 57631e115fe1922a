"""Checkpoint files: safetensors and pickles, read without running code from them, and the one check of weights."""

import argparse
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from timm.models import clean_state_dict
from torch import Tensor

from ..errors import reason_of
from .packing import unpack

__all__ = ['check_weights', 'read_checkpoint', 'select_state_dict']

# In the order in which timm's own loader looks for them.
_STATE_DICT_KEYS = ('state_dict_ema', 'model_ema', 'state_dict', 'model')

# Inert: a bag of attributes in timm's checkpoints, and a dict in those of the reference repository.
_STAND_INS: list[Any] = [argparse.Namespace, (OrderedDict, 'yacs.config.CfgNode')]

# Buffers that count or index, such as EfficientFormer's attention_bias_idxs.
_INTEGER = re.compile(r'.*(num_batches_tracked|idx|index)[^.]*')


def read_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Reads a `.safetensors` file or a pickle to the CPU.

    Pickles are read with `weights_only=True`. Apart from what torch allows, only `argparse.Namespace` (in timm's
    checkpoints) and `yacs.config.CfgNode` (in the reference's, becomes a dict) are let in.

    Returns:
        The pickled dict, or name to tensor of a safetensors file with its header's metadata under `__metadata__`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not a checkpoint, is damaged, or would need code to run.
    """
    try:
        if Path(path).suffix == '.safetensors':
            with safe_open(path, framework='pt') as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return {**tensors, '__metadata__': file.metadata() or {}}
        with torch.serialization.safe_globals(_STAND_INS):
            checkpoint = torch.load(path, map_location='cpu', weights_only=True)
        if zipfile.is_zipfile(path):
            # torch writes checksums, and does not look at them.
            with zipfile.ZipFile(path) as archive:
                if part := archive.testzip():
                    raise ValueError(f'its part {part} does not match its checksum')
    except pickle.UnpicklingError as error:
        unsafe = re.search(r'Unsupported global: GLOBAL (\S+)', str(error))
        problem = f'it would run code to restore {unsafe[1]}' if unsafe else 'it is not a pickle of tensors'
        raise ValueError(f"'{path}' is refused: {problem}.") from None
    except FileNotFoundError:
        raise
    except Exception as error:
        # Damaged bytes provoke whatever they like in a reader.
        raise ValueError(f"'{path}' is not a readable checkpoint: {reason_of(error)}.") from None
    if not isinstance(checkpoint, dict):
        raise ValueError(f"'{path}' holds a {type(checkpoint).__name__}, expected a dict of tensors or of a run.")
    return checkpoint


def select_state_dict(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Selects the model's tensors of a checkpoint: averaged weights first, prefixes removed, 8-bit ones restored.

    Args:
        checkpoint: What `read_checkpoint` returned: with `state_dict_ema`, `state_dict` or `model` inside, or bare.
    """
    found = next((checkpoint[key] for key in _STATE_DICT_KEYS if isinstance(checkpoint.get(key), dict)), checkpoint)
    tensors = unpack({k: v for k, v in found.items() if isinstance(k, str) and isinstance(v, Tensor)})
    # Before 1.0.31 timm removes the prefix of one wrapper only.
    return clean_state_dict(clean_state_dict(tensors))


def check_weights(state_dict: Mapping[str, Tensor], source: str) -> None:
    """Checks that a network with these weights computes numbers.

    A tensor whose sum of squares exceeds float32 is refused as no network survives it: a norm above 1.8e19.

    Args:
        state_dict: Name to tensor, 8-bit ones restored.
        source: File that they come from, or model, for errors.

    Raises:
        ValueError: If a value is NaN, infinite or too large, a weight is complex or an integer, or a variance is
            negative; names the source and the tensor.
    """
    for name, tensor in state_dict.items():
        problem = ''
        if not tensor.is_floating_point():
            if tensor.is_complex() or not _INTEGER.fullmatch(name):
                problem = f'has the type {tensor.dtype}, expected floating point numbers'
        elif not tensor.float().square().sum().isfinite():
            largest = tensor.abs().max().item()
            problem = f'has the largest value {largest:g}, which no network survives'
        elif name.endswith('running_var') and (tensor < 0).any():
            problem = f'has a negative variance, {tensor.min().item():g}'
        if problem:
            raise ValueError(f"{source}: '{name}' {problem}. Take a checkpoint from before it diverged or was damaged.")
