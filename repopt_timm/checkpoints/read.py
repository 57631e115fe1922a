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

BEST_CHECKPOINT = 'model_best.pth.tar'
LAST_CHECKPOINT = 'last.pth.tar'


def checkpoint_of(path: str | os.PathLike) -> Path:
    """Returns the best checkpoint in the folder of a run, or else its last one; any other path as it is."""
    path = Path(path)
    return next((file for file in (path / BEST_CHECKPOINT, path / LAST_CHECKPOINT) if file.is_file()), path)


def read_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Reads a pickle to the CPU, or a `.safetensors` file with its header's metadata under `__metadata__`.

    The folder of a run stands for its checkpoint.
    """
    path = checkpoint_of(path)
    try:
        if Path(path).suffix == '.safetensors':
            with safe_open(path, framework='pt') as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return {**tensors, '__metadata__': file.metadata() or {}}
        # Inert: a bag of attributes in timm's checkpoints, and a dict in those of the reference repository.
        with torch.serialization.safe_globals([argparse.Namespace, (OrderedDict, 'yacs.config.CfgNode')]):
            checkpoint = torch.load(path, map_location='cpu', weights_only=True)
        if zipfile.is_zipfile(path):
            # torch writes checksums, and does not look at them.
            with zipfile.ZipFile(path) as archive:
                if part := archive.testzip():
                    raise ValueError(f'its part {part} does not match its checksum')
    except FileNotFoundError:
        raise
    except pickle.UnpicklingError as error:
        unsafe = re.search(r'Unsupported global: GLOBAL (\S+)', str(error))
        problem = f'it would run code to restore {unsafe[1]}' if unsafe else 'it is not a pickle of tensors'
        raise ValueError(f"'{path}' is refused: {problem}.") from None
    except Exception as error:
        # On damaged bytes a reader may raise anything.
        raise ValueError(f"'{path}' is not a readable checkpoint: {reason_of(error)}.") from None
    if not isinstance(checkpoint, dict):
        raise ValueError(f"'{path}' holds a {type(checkpoint).__name__}, expected a dict of tensors or of a run.")
    return checkpoint


def select_state_dict(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Selects the model's tensors of a checkpoint: averaged weights first, prefixes removed, 8-bit ones restored."""
    # In the order in which timm's own loader looks for them.
    inside = [checkpoint.get(key) for key in ('state_dict_ema', 'model_ema', 'state_dict', 'model')]
    found = next((each for each in inside if isinstance(each, dict)), checkpoint)
    tensors = unpack({k: v for k, v in found.items() if isinstance(k, str) and isinstance(v, Tensor)})
    # Before 1.0.31 timm removes the prefix of one wrapper only.
    return clean_state_dict(clean_state_dict(tensors))


def check_weights(state_dict: Mapping[str, Tensor], source: str) -> None:
    """Raises a ValueError that names source and tensor if a weight is NaN, infinite, huge or not floating point.

    A weight is huge if its sum of squares exceeds float32, at a norm of 1.8e19: no network survives that. A negative
    variance is refused, too.
    """
    for name, tensor in state_dict.items():
        problem = ''
        if not tensor.is_floating_point():
            # Buffers count or index, such as EfficientFormer's attention_bias_idxs.
            counts = re.fullmatch(r'.*(num_batches_tracked|idx|index)[^.]*', name)
            if tensor.is_complex() or not counts:
                problem = f'has the type {tensor.dtype}, expected floating point numbers'
        elif not tensor.float().square().sum().isfinite():
            problem = 'has NaN, infinite or huge values'
        elif name.endswith('running_var') and (tensor < 0).any():
            problem = f'has a negative variance, {tensor.min():g}'
        if problem:
            raise ValueError(f"{source}: '{name}' {problem}. Take a checkpoint from before it diverged or was damaged.")
