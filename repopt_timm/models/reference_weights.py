"""Weights of the reference repository as timm models."""

import os
from typing import Any

import timm

from ..architectures import infer_architecture
from ..checkpoints.read import read_checkpoint, select_state_dict
from ..checkpoints.reference_layout import target_state_dict
from .repopt_vgg import RepOptVgg

__all__ = ['model_from_reference']


def model_from_reference(path: str | os.PathLike) -> RepOptVgg:
    """Creates the timm model of a target checkpoint in the reference repository's layout.

    Args:
        path: Such as `RepOpt-VGG-B1-acc78.62.pth`; its tensors nested under `model`, or bare.

    Returns:
        The model in evaluation mode, with these weights and as many classes; tagged `in1k` if they are 1000.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no such checkpoint, or fits no known architecture.
    """
    source = os.fspath(path)
    try:
        state = target_state_dict(select_state_dict(read_checkpoint(path)))
    except ValueError as error:
        raise ValueError(f'{source}: {error}') from None
    channels = {
        key.removesuffix('.weight'): len(tensor) for key, tensor in state.items() if key.endswith('conv.weight')
    }
    architecture = infer_architecture(channels)
    if architecture is None or 'head.fc.weight' not in state:
        raise ValueError(
            f'{source}: its {len(channels)} convolutions{"" if channels else " (none)"} fit no known architecture, or '
            f'the classifier is missing.'
        )
    num_classes = len(state['head.fc.weight'])
    model: Any = timm.create_model(architecture, num_classes=num_classes)
    model.load_state_dict(state)
    model.pretrained_cfg = {**model.pretrained_cfg, 'num_classes': num_classes, 'license': 'mit'}
    if num_classes == 1000:
        model.pretrained_cfg['tag'] = 'in1k'
    return model.eval()
