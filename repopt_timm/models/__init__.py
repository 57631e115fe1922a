"""Importing this package registers the RepOpt-VGG models with timm."""

from .kinds import ensure_registered, make_kind, register_twins, to_plain
from .repopt_vgg import RepOptVgg, RepOptVggBlock

__all__ = ['RepOptVgg', 'RepOptVggBlock', 'ensure_registered', 'make_kind', 'register_twins', 'to_plain']
