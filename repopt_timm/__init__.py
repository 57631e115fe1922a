"""Gradient re-parameterization for timm: importing this package registers its models and optimizers.

The method is in `repopt_timm.reparam`, in plain PyTorch.
"""

from .blocks import implied_scales, plain_state_dict, plain_twin, recalibrate, report_twin
from .cards.writing import push_scales, save_scales_card
from .models import RepOptVgg, register_twins, to_plain
from .optim import RepOptAdamW, RepOptSGD, build_repopt_sgd, clip_grad_norm_
from .publish import push_to_hub, save_pretrained
from .reparam import (
    ConvPrior,
    GradMults,
    Scales,
    attach_scales,
    csla,
    hyper_search,
    initialize,
    keep_branches,
    make_grad_mults,
    prepare,
    refused_convs,
    repvgg_prior,
)
from .sources import load_scales

__version__ = '0.1.0'

__all__ = [
    'ConvPrior',
    'GradMults',
    'RepOptAdamW',
    'RepOptSGD',
    'RepOptVgg',
    'Scales',
    'attach_scales',
    'build_repopt_sgd',
    'clip_grad_norm_',
    'csla',
    'hyper_search',
    'implied_scales',
    'initialize',
    'keep_branches',
    'load_scales',
    'make_grad_mults',
    'plain_state_dict',
    'plain_twin',
    'prepare',
    'push_scales',
    'push_to_hub',
    'recalibrate',
    'refused_convs',
    'register_twins',
    'report_twin',
    'repvgg_prior',
    'save_pretrained',
    'save_scales_card',
    'to_plain',
]
