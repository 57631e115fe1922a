"""Gradient re-parameterization (RepOptimizer, arXiv 2205.15242) in plain PyTorch."""

from .branches import Branch, branch_names, embed, merge
from .csla import CSLAConv2d
from .grad_mult import GradMult, GradMults, make_grad_mults
from .initialization import attach_scales, carried_scales, initialize

__all__ = [
    'Branch',
    'CSLAConv2d',
    'GradMult',
    'GradMults',
    'attach_scales',
    'branch_names',
    'carried_scales',
    'embed',
    'initialize',
    'make_grad_mults',
    'merge',
]
