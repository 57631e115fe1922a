"""Plain twins of timm's structurally re-parameterized networks: one file for each family of blocks."""

from ..reparam import FOLDING_CLASSES
from .implied import implied_scales
from .plain_block import PlainBlock
from .plain_twin import BlockReport, plain_state_dict, plain_twin, report_twin
from .recalibration import recalibrate

__all__ = [
    'BlockReport',
    'PlainBlock',
    'implied_scales',
    'plain_state_dict',
    'plain_twin',
    'recalibrate',
    'report_twin',
]

# Classes of timm whose `fuse()` or `reparameterize()` folds normalization into one convolution, or calls that of its
# children.
FOLDING_CLASSES.update(
    {
        'Conv2dNorm',
        'ConvLayer1d',
        'ConvLayer2d',
        'ConvNorm',
        'IFormer',
        'LinearNorm',
        'NextConvBlock',
        'NextTransformerBlock',
        'NormLinear',
        'PlainBlock',
        'RepOptVggBlock',
        'RepVit',
        'RepVitClassifier',
        'SHViT',
    }
)
