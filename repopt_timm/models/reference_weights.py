"""Weights of the reference repository as timm models."""

import os
from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import Tensor

from ..architectures import infer_architecture
from ..checkpoints.read import read_checkpoint, select_state_dict
from ..checkpoints.reference_layout import is_ghost_net, target_state_dict
from ..names import PREFIX

__all__ = ['model_from_reference']


def model_from_reference(path: str | os.PathLike) -> Any:
    """Creates the timm model of a target checkpoint in the reference repository's layout.

    Args:
        path: Such as `RepOpt-VGG-B1-acc78.62.pth`, or one of a RepOptGhostNet; its tensors nested under `model`, or
            bare.

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
    classifier = state.get('classifier.weight' if is_ghost_net(state) else 'head.fc.weight')
    name = _ghost_net_of(state) if is_ghost_net(state) else _vgg_of(state)
    if name is None:
        number = sum(tensor.ndim == 4 for tensor in state.values())
        raise ValueError(
            f'{source}: its {number} convolutions fit no known architecture, expected a RepOpt-VGG or RepOpt-GhostNet '
            f'of the reference repository. Name the file of such a target.'
        )
    if classifier is None:
        raise ValueError(f'{source}: the classifier of {name} is not in it, expected all weights. Get the file again.')
    num_classes = len(classifier)
    model: Any = timm.create_model(name, num_classes=num_classes)
    model.load_state_dict(state)
    model.pretrained_cfg = {**model.pretrained_cfg, 'num_classes': num_classes, 'license': 'mit'}
    if num_classes == 1000:
        model.pretrained_cfg['tag'] = 'in1k'
    return model.eval()


def _vgg_of(state: Mapping[str, Tensor]) -> str | None:
    channels = {
        key.removesuffix('.weight'): len(tensor) for key, tensor in state.items() if key.endswith('conv.weight')
    }
    return infer_architecture(channels)


def _ghost_net_of(state: Mapping[str, Tensor]) -> str | None:
    def shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
        return {key: tensor.shape for key, tensor in tensors.items() if not key.startswith('classifier.')}

    for name in timm.list_models('repghostnet_*'):
        target = timm.create_model(PREFIX + name, device='meta')
        if shapes(target.state_dict()) == shapes(state):
            return PREFIX + name
    return None
