"""Names in the files of other repositories, as timm's and ours.

RepOpt-VGG, of github.com/DingXiaoH/RepOptimizers: stage 0 is the stem; stages 1 to 4 count their blocks from 0:
`stage0.conv.weight`, `stage1.0.bn.running_var`, `stage1.1.scale_identity.weight`, `linear.weight`.

RepOptGhostNet, of the same: the names of timm's RepGhostNet but for `<module>.final_bn`, the BatchNorm after the sum,
and the two scales of a search, `<module>.fusion_scale.weight` of the identity and `<module>.cheap_operation.1.weight`.

RepVGG, of github.com/DingXiaoH/RepVGG: stages as above; `rbr_dense`, `rbr_1x1` and `rbr_identity` in a block.
"""

import re
from collections.abc import Collection, Mapping

from torch import Tensor

__all__ = ['refuse_fused', 'scale_names', 'timm_names']

_STAGE = re.compile(r'stage(?:0|(\d+)\.(\d+))\.(.+)')
_SCALES = {
    'scale_conv.weight': 'kxk',
    'scale_1x1.weight': '1x1',
    'scale_identity.weight': 'identity',
    # The method's published sketch names them after the kernels. Its blocks may have any name.
    'scale3x3.weight': 'kxk',
    'scale1x1.weight': '1x1',
}
_SCALE = re.compile(r'(.+)\.(' + '|'.join(map(re.escape, _SCALES)) + ')')

_GHOST_SCALES = {'fusion_scale.weight': 'identity', 'cheap_operation.1.weight': 'kxk'}
_GHOST_SCALE = re.compile(r'(blocks\.\d+\.\d+\.ghost[12])\.(' + '|'.join(map(re.escape, _GHOST_SCALES)) + ')')

# Part of a name of theirs to timm's.
_RENAMED = {
    'linear.': 'head.fc.',
    '.rbr_dense.': '.conv_kxk.',
    '.rbr_1x1.': '.conv_1x1.',
    '.rbr_identity.': '.identity.',
    '.se.down.': '.attn.fc1.',
    '.se.up.': '.attn.fc2.',
    '.cheap_operation.0.': '.cheap_operation.conv.',
    '.final_bn.': '.cheap_operation.bn.',
}

_FUSED = {
    '.rbr_reparam.': "RepVGG's deploy layout, with rbr_reparam",
    '.reparam_conv.': 'a network that timm has fused, with reparam_conv',
}


def scale_names(keys: Collection[str]) -> dict[str, tuple[str, str]]:
    """Finds the scales among the keys of a state dict.

    Returns:
        Key of each scale to module and branch.
    """
    names = {}
    for key in keys:
        if match := _SCALE.fullmatch(key):
            names[key] = (f'{_stage(key).removesuffix(match[2])}conv', _SCALES[match[2]])
        # Without the scale of an identity, what stands after the convolution is a BatchNorm.
        elif (match := _GHOST_SCALE.fullmatch(key)) and f'{match[1]}.fusion_scale.weight' in keys:
            names[key] = (f'{match[1]}.cheap_operation.conv', _GHOST_SCALES[match[2]])
    return names


def timm_names(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translates the state dict of a target, or of a RepVGG with branches; names that are not theirs stay."""
    # timm's RepGhostNet with branches has other tensors under these names.
    renamed = {} if any('.fusion_bn.' in key for key in state_dict) else _RENAMED
    translated = {}
    for key, tensor in state_dict.items():
        name = _stage(key)
        for part, own in renamed.items():
            name = name.replace(part, own)
        translated[name] = tensor
    return translated


def refuse_fused(keys: Collection[str], source: str) -> None:
    """Raises a ValueError if the keys of a state dict are those of fused branches; names the layout."""
    for part, layout in _FUSED.items():
        if any(part in key for key in keys):
            raise ValueError(
                f'{source} is already fused: it is {layout}. There are no branches to merge or to read scales from. '
                f'Get the checkpoint of its training.'
            )


def _stage(key: str) -> str:
    match = _STAGE.fullmatch(key)
    if match is None:
        return key
    stage, block, rest = match.groups()
    return f'stages.{int(stage) - 1}.{block}.{rest}' if stage else f'stem.{rest}'
