"""The one reader of checkpoint files: safetensors and pickles, without ever running code from them."""

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
from safetensors import SafetensorError, safe_open
from timm.models import clean_state_dict
from torch import Tensor

from ..errors import reason_of
from .bounds import check_archive, check_content, check_header, check_pickle
from .packing import unpack

__all__ = ['check_weights', 'read_checkpoint', 'select_state_dict']

_INTEGER = re.compile(r'.*(num_batches_tracked|idx|index)[^.]*')

# In the order in which timm's own loader looks for them.
_STATE_DICT_KEYS = ('state_dict_ema', 'model_ema', 'state_dict', 'model')

# By which torch knows its present format.
_ARCHIVE_START = b'PK\x03\x04'

_AGAIN = 'Copy or download it again.'

# Inert: a bag of attributes in timm's checkpoints, and a dict in those of the reference repository.
_STAND_INS: list[Any] = [argparse.Namespace, (OrderedDict, 'yacs.config.CfgNode')]


def read_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Reads a `.safetensors` file or a pickle to the CPU.

    Pickles are read with `weights_only=True`. Apart from what torch allows, only `argparse.Namespace` (in timm's
    checkpoints) and `yacs.config.CfgNode` (in the reference's, becomes a dict) are let in.

    Args:
        path: A file.

    Returns:
        The pickled dict, or name to tensor of a safetensors file with its header's metadata under `__metadata__`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not a checkpoint, would need code to run, or claims more than any checkpoint holds.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no checkpoint '{path}', expected a file such as output/RUN/model_best.pth.tar. Check the path."
        )
    if path.suffix == '.safetensors':
        check_header(path)
        try:
            with safe_open(path, framework='pt') as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return {**tensors, '__metadata__': file.metadata() or {}}
        except (SafetensorError, AttributeError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"'{path}' is not a readable safetensors file: {error}. {_AGAIN}") from None
    _check_pickled(path)
    try:
        with torch.serialization.safe_globals(_STAND_INS):
            checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(f"'{path}' is refused: {_refusal(path)}") from None
    except OSError:
        raise
    except Exception as error:
        # Damaged bytes provoke whatever they like in an unpickler.
        raise ValueError(f"'{path}' is not a readable checkpoint: {reason_of(error)}.") from None
    if not isinstance(checkpoint, dict):
        raise ValueError(
            f"'{path}' holds a {type(checkpoint).__name__}, expected a dict of tensors or of a training run."
        )
    check_content(checkpoint, path)
    return checkpoint


def _check_pickled(path: Path) -> None:
    if zipfile.is_zipfile(path):
        check_archive(path)
    with open(path, 'rb') as file:
        if file.read(len(_ARCHIVE_START)) == _ARCHIVE_START:
            if not zipfile.is_zipfile(path):
                raise ValueError(
                    f"'{path}' is cut off: it has {path.stat().st_size} bytes, and the table of contents at its end is "
                    f'missing. {_AGAIN}'
                )
            return
        # Older formats of torch have no checksums; the reader finds out whether it is one.
        file.seek(0)
        try:
            check_pickle(file)
        except ValueError as error:
            raise ValueError(f"'{path}' is refused: {error}.") from None


def select_state_dict(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """Selects the model's tensors of a checkpoint: averaged weights first, prefixes removed, 8-bit ones restored.

    Args:
        checkpoint: What `read_checkpoint` returned: with `state_dict_ema`, `state_dict` or `model` inside, or bare.
    """
    for key in _STATE_DICT_KEYS:
        if isinstance(checkpoint.get(key), dict):
            return _clean(checkpoint[key])
    return _clean(checkpoint)


def _clean(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    state_dict = unpack({k: v for k, v in state_dict.items() if isinstance(k, str) and isinstance(v, Tensor)})
    # Before 1.0.31 timm removes the prefix of one wrapper only.
    return clean_state_dict(clean_state_dict(state_dict))


def _refusal(path: Path) -> str:
    try:
        with torch.serialization.safe_globals(_STAND_INS):
            names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (ValueError, RuntimeError, pickle.UnpicklingError):
        names = []
    if names:
        return f'it would run code to restore {", ".join(sorted(names))}. Save its tensors alone and load those.'
    return f'it is not a pickle of tensors. {_AGAIN}'


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
            problem = f'has values up to {largest:g}, which no network survives'
        elif name.endswith('running_var') and (tensor < 0).any():
            problem = f'has a negative variance, {tensor.min().item():g}'
        if problem:
            raise ValueError(f"{source}: '{name}' {problem}. Take a checkpoint from before it diverged or was damaged.")
