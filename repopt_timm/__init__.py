"""Gradient re-parameterization for timm: importing this package registers its models and optimizers.

The method is in `repopt_timm.reparam`, in plain PyTorch.
"""

from .blocks import implied_scales, plain_twin, recalibrate, report_twin
from .cards.repository import push_scales
from .models import register_twins
from .optim import RepOptAdamW, RepOptSGD, build_repopt_sgd, clip_grad_norm_
from .publish import push_to_hub, save_pretrained
from .reparam import Scales, csla, hyper_search, make_grad_mults, prepare, refused_convs, repvgg_prior, to_plain
from .sources import load_scales

__version__ = '0.2.0'
