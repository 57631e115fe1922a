"""Weights of the method's and of RepVGG's repository as timm models."""

import re
from collections.abc import Mapping
from typing import Any

import timm
from torch import Tensor

from ..architectures import infer_architecture
from ..checkpoints.read import check_weights, select_state_dict
from ..checkpoints.reference import refuse_fused, scale_names, timm_names
from ..errors import explaining
from ..names import PREFIX


def model_from_reference(checkpoint: Mapping[str, Any], source: str) -> Any:
    """Creates the timm model of a checkpoint in the layout of a repository of the authors.

    That is a target such as `RepOpt-VGG-B1-acc78.62.pth`, a RepOptGhostNet, or a RepVGG as it was trained, which keeps
    its branches. Weights of 1000 classes are tagged `in1k`.
    """
    found = select_state_dict(checkpoint)
    refuse_fused(found, source)
    if scale_names(found):
        raise ValueError(f'{source} is a hyper-search; take its scales: repopt-timm scales extract.')
    state = timm_names(found)
    check_weights(state, source)
    name = _ghost_net_of(state) if any('.ghost' in key for key in state) else _vgg_of(state)
    if name is None:
        raise ValueError(
            f'{source}: its {len(state)} tensors fit no known architecture, expected a RepOpt-VGG, RepOpt-GhostNet or '
            f'RepVGG of the authors. Name the network of any other file with --model.'
        )
    with explaining(f'{source} does not have the weights of {name}'):
        num_classes = len(state[f'{timm.get_pretrained_cfg_value(name, "classifier")}.weight'])
        model: Any = timm.create_model(name, num_classes=num_classes)
        model.load_state_dict(state)
    # timm's tag would name other weights.
    facts = {'num_classes': num_classes, 'license': 'mit', 'tag': 'in1k' if num_classes == 1000 else ''}
    model.pretrained_cfg = {**model.pretrained_cfg, **facts}
    return model.eval()


def _vgg_of(state: Mapping[str, Tensor]) -> str | None:
    kernel = re.compile(r'(stem|stages\.\d+\.\d+)(?:\.conv_kxk)?\.conv\.weight')
    widths = {f'{match[1]}.conv': len(state[key]) for key in state if (match := kernel.fullmatch(key))}
    name = infer_architecture(widths, 'repopt_vgg_d2se' if any('.attn.' in key for key in state) else None)
    second = state.get('stages.0.1.conv_kxk.conv.weight')
    if name and second is not None:
        # RepVGG-B1g4 has groups in every second block.
        groups = len(second) // second.shape[1]
        name = name.replace('repopt_vgg', 'repvgg') + (f'g{groups}' if groups > 1 else '')
    return name if name and timm.is_model(name) else None


def _ghost_net_of(state: Mapping[str, Tensor]) -> str | None:
    def shapes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        return {key: tensor.shape for key, tensor in tensors.items() if not key.startswith('classifier.')}

    prefix = '' if any('.fusion_bn.' in key for key in state) else PREFIX
    for name in timm.list_models('repghostnet_*'):
        if shapes(timm.create_model(prefix + name, device='meta').state_dict()) == shapes(state):
            return prefix + name
    return None
