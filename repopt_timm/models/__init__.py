"""Importing this package registers the RepOpt-VGG models with timm, and the twins of its multi-branch networks."""

from .kinds import make_kind, to_plain
from .repopt_vgg import RepOptVgg, RepOptVggBlock
from .timm_twins import ensure_registered, register_multi_branch, register_twins, resolve_model

__all__ = [
    'RepOptVgg',
    'RepOptVggBlock',
    'ensure_registered',
    'make_kind',
    'register_twins',
    'resolve_model',
    'to_plain',
]

register_multi_branch()
