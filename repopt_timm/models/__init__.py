"""Importing this package registers the RepOpt-VGG models with timm, and the twins of its multi-branch networks.

Read `byobnet`, `weights`, `twins`, `repopt_vgg`.
"""

from ..reparam import to_plain
from .repopt_vgg import RepOptVgg, RepOptVggBlock
from .twins import ensure_registered, make_kind, register_multi_branch, register_twins, resolve_model, take_name

__all__ = [
    'RepOptVgg',
    'RepOptVggBlock',
    'ensure_registered',
    'make_kind',
    'register_twins',
    'resolve_model',
    'take_name',
    'to_plain',
]

register_multi_branch()
