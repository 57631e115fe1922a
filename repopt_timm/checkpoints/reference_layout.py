"""Names in the files of the method's reference repository, github.com/DingXiaoH/RepOptimizers.

Its stage 0 is the stem; stages 1 to 4 count their blocks from 0: `stage0.conv.weight`, `stage1.0.bn.running_var`,
`stage1.1.scale_identity.weight`, `linear.weight`.
"""

import re
from collections.abc import Mapping

from torch import Tensor

__all__ = ['scale_name', 'target_state_dict']

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


def scale_name(key: str) -> tuple[str, str] | None:
    """Translates the key of a scale into module and branch; None for any other key."""
    match = _SCALE.fullmatch(key)
    if match is None:
        return None
    block, _ = _block(key)
    return (f'{block or match[1]}.conv', _SCALES[match[2]])


def target_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translates the state dict of a target model: plain blocks of convolution, BatchNorm and ReLU, and a linear layer.

    Raises:
        ValueError: If a key is not one of such a model.
    """
    translated = {}
    for key, tensor in state_dict.items():
        block, rest = _block(key)
        if block and re.fullmatch(r'conv\.weight|bn\.\w+', rest):
            translated[f'{block}.{rest}'] = tensor
        elif key in ('linear.weight', 'linear.bias'):
            translated[f'head.fc.{key.removeprefix("linear.")}'] = tensor
        else:
            what = 'It is a hyper-search; take its scales: repopt-timm scales extract.' if rest in _SCALES else ''
            raise ValueError(
                f"'{key}' is not part of a target model in the reference layout, expected "
                f'stage<N>[.<block>].conv.weight, stage<N>[.<block>].bn.* and linear.*. {what}'.rstrip()
            )
    return translated


def _block(key: str) -> tuple[str, str]:
    match = _STAGE.fullmatch(key)
    if match is None:
        return '', key
    stage, block, rest = match.groups()
    if block is None:
        return ('stem', rest) if stage == '0' else ('', key)
    return f'stages.{int(stage) - 1}.{block}', rest
