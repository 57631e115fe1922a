"""Importing this package registers the RepOpt-VGG models with timm."""

from .repopt_vgg import RepOptVgg, RepOptVggBlock

__all__ = ['RepOptVgg', 'RepOptVggBlock']
