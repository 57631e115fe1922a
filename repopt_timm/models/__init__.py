"""Importing this package registers the RepOpt-VGG models with timm, and the twins of its multi-branch networks.

Read `byobnet`, `repopt_vgg`, `weights`, `records`, `twins`.
"""

from .records import take_name
from .repopt_vgg import RepOptVgg
from .twins import ensure_registered, register_models, register_twins, resolve_model

register_models()
