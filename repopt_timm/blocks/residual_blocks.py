"""Blocks that timm can merge for inference, but that are residual connections: they stay in a plain twin.

A residual connection is not a branch of a CSLA block: its identity is not trained, and weight decay must not shrink it.
"""

__all__ = ['KEPT']

_RESIDUAL = 'a residual connection around a normalized convolution, not a sum that is normalized'

KEPT = {
    'efficientvim.EfficientViMBlock': _RESIDUAL,
    'efficientvim.PatchMerging': _RESIDUAL,
    'iformer.RepCPE': _RESIDUAL,
    'shvit.Residual': _RESIDUAL,
}
