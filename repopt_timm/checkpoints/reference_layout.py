"""Names in the files of the method's reference repository, github.com/DingXiaoH/RepOptimizers.

RepOpt-VGG: stage 0 is the stem; stages 1 to 4 count their blocks from 0: `stage0.conv.weight`,
`stage1.0.bn.running_var`, `stage1.1.scale_identity.weight`, `linear.weight`.

RepOptGhostNet: the names of timm's RepGhostNet but for `<module>.final_bn`, the BatchNorm after the sum, and the two
scales of a search, `<module>.fusion_scale.weight` of the identity and `<module>.cheap_operation.1.weight`.
"""

import re
from collections.abc import Collection, Mapping

from torch import Tensor

__all__ = ['is_ghost_net', 'scale_names', 'target_state_dict']

_STAGE = re.compile(r'stage(\d+)(?:\.(\d+))?\.(.+)')
_SCALES = {
    'scale_conv.weight': 'kxk',
    'scale_1x1.weight': '1x1',
    'scale_identity.weight': 'identity',
    # The method's published sketch names them after the kernels.
    'scale3x3.weight': 'kxk',
    'scale1x1.weight': '1x1',
}
# Blocks of a sketch's network may have any name.
_SCALE = re.compile(r'(.+)\.(' + '|'.join(re.escape(key) for key in _SCALES) + ')')


_GHOST_CONV = 'cheap_operation.conv'
_GHOST_SCALES = {'fusion_scale.weight': 'identity', 'cheap_operation.1.weight': 'kxk'}
_GHOST_TARGET = {'cheap_operation.0': _GHOST_CONV, 'final_bn': 'cheap_operation.bn'}
_GHOST_MODULE = re.compile(r'(blocks\.\d+\.\d+\.ghost[12])\.(.+)')


def scale_names(keys: Collection[str]) -> dict[str, tuple[str, str]]:
    """Finds the scales among the keys of a state dict.

    Returns:
        Key of each scale to module and branch.
    """
    names = {}
    for key in keys:
        if match := _SCALE.fullmatch(key):
            block, _ = _block(key)
            names[key] = (f'{block or match[1]}.conv', _SCALES[match[2]])
            continue
        module, rest = _ghost_module(key)
        # Without the scale of an identity, what stands after the convolution is a BatchNorm.
        if rest in _GHOST_SCALES and f'{module}.fusion_scale.weight' in keys:
            names[key] = (f'{module}.{_GHOST_CONV}', _GHOST_SCALES[rest])
    return names


def is_ghost_net(keys: Collection[str]) -> bool:
    """Returns whether a state dict is one of a RepOptGhostNet."""
    return any(_ghost_module(key)[0] for key in keys)


def target_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translates the state dict of a target model.

    Raises:
        ValueError: If it is one of a Hyper-Search, or a key is not one of such a model.
    """
    if found := next(iter(scale_names(state_dict)), None):
        raise ValueError(
            f"'{found}' is not part of a target model in the reference layout. It is a hyper-search; take its scales: "
            f'repopt-timm scales extract.'
        )
    return (_ghost_net if is_ghost_net(state_dict) else _vgg)(state_dict)


def _vgg(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Plain blocks of convolution, BatchNorm and ReLU, and a linear layer."""
    translated = {}
    for key, tensor in state_dict.items():
        block, rest = _block(key)
        if block and re.fullmatch(r'conv\.weight|bn\.\w+', rest):
            translated[f'{block}.{rest}'] = tensor
        elif key in ('linear.weight', 'linear.bias'):
            translated[f'head.fc.{key.removeprefix("linear.")}'] = tensor
        else:
            raise ValueError(
                f"'{key}' is not part of a target model in the reference layout, expected "
                f'stage<N>[.<block>].conv.weight, stage<N>[.<block>].bn.* and linear.*.'
            )
    return translated


def _ghost_net(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    translated = {}
    for key, tensor in state_dict.items():
        module, rest = _ghost_module(key)
        if rest.startswith(('fusion_bn.', 'cheap_operation.1.')):
            raise ValueError(
                f"'{key}' is a branch's BatchNorm, which a target model does not have: this is a RepGhostNet with "
                f'branches. Merge it with plain_twin(model, weights=True).'
            )
        part, _, parameter = rest.rpartition('.')
        translated[f'{module}.{_GHOST_TARGET[part]}.{parameter}' if part in _GHOST_TARGET else key] = tensor
    return translated


def _ghost_module(key: str) -> tuple[str, str]:
    match = _GHOST_MODULE.fullmatch(key)
    return (match[1], match[2]) if match else ('', '')


def _block(key: str) -> tuple[str, str]:
    match = _STAGE.fullmatch(key)
    if match is None:
        return '', key
    stage, block, rest = match.groups()
    if block is None:
        return ('stem', rest) if stage == '0' else ('', key)
    return f'stages.{int(stage) - 1}.{block}', rest
