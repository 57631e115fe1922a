"""RepOptimizers; importing this package registers them with timm."""

from .adamw import RepOptAdamW
from .clip import clip_grad_norm_
from .factory import register_optimizers
from .sgd import RepOptSGD, build_repopt_sgd

register_optimizers()
