"""RepOpt-VGG and RepOptimizers for timm: importing this package registers them with timm's factories."""

from .models import RepOptVgg
from .optim import RepOptAdamW, RepOptSGD, build_repopt_sgd, clip_grad_norm_
from .publish import push_to_hub, save_pretrained
from .reparam import CSLAConv2d, GradMults, attach_scales, initialize, make_grad_mults
from .scales import Scales

__version__ = '0.1.0'

__all__ = [
    'CSLAConv2d',
    'GradMults',
    'RepOptAdamW',
    'RepOptSGD',
    'RepOptVgg',
    'Scales',
    'attach_scales',
    'build_repopt_sgd',
    'clip_grad_norm_',
    'initialize',
    'make_grad_mults',
    'push_to_hub',
    'save_pretrained',
]
