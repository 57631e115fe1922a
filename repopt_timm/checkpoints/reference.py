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

_SCALES = {
    'scale_conv.weight': 'kxk',
    'scale_1x1.weight': '1x1',
    'scale_identity.weight': 'identity',
    # The method's published sketch names them after the kernels. Its blocks may have any name.
    'scale3x3.weight': 'kxk',
    'scale1x1.weight': '1x1',
}
_GHOST_SCALES = {'fusion_scale.weight': 'identity', 'cheap_operation.1.weight': 'kxk'}

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
    """Finds the scales among the keys of a state dict: key to module and branch."""
    names = {}
    for key in keys:
        for end, branch in _SCALES.items():
            if key.endswith(f'.{end}'):
                names[key] = (f'{_stage(key).removesuffix(end)}conv', branch)
        for end, branch in _GHOST_SCALES.items():
            module = key.removesuffix(end)
            # Without the scale of an identity, what stands after the convolution is a BatchNorm.
            if key != module and f'{module}fusion_scale.weight' in keys:
                names[key] = (f'{module}cheap_operation.conv', branch)
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
    match = re.fullmatch(r'stage(?:0|(\d+)\.(\d+))\.(.+)', key)
    if match is None:
        return key
    stage, block, rest = match.groups()
    return f'stages.{int(stage) - 1}.{block}.{rest}' if stage else f'stem.{rest}'
