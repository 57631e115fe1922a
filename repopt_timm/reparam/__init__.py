"""Gradient re-parameterization (RepOptimizer, arXiv 2205.15242) in plain PyTorch."""

from .branches import Branch, embed, merge
from .convolutions import ConvPrior, Geometry, RefusedConv, keep_branches
from .csla import CSLAConv2d
from .grad_mult import GradMult, GradMults, make_grad_mults
from .initialization import attach_scales, carried_scales, geometry_of, initialize, kind_of, network_name, prepare
from .prior import initial_scales, refused_convs, repvgg_prior, resolve_prior, run_scale, stage_scale
from .twins import convert_, csla, hyper_search, to_plain, twin_vectors

__all__ = [
    'Branch',
    'CSLAConv2d',
    'ConvPrior',
    'Geometry',
    'GradMult',
    'GradMults',
    'RefusedConv',
    'attach_scales',
    'carried_scales',
    'convert_',
    'csla',
    'embed',
    'geometry_of',
    'hyper_search',
    'initial_scales',
    'initialize',
    'keep_branches',
    'kind_of',
    'make_grad_mults',
    'merge',
    'network_name',
    'prepare',
    'refused_convs',
    'repvgg_prior',
    'resolve_prior',
    'run_scale',
    'stage_scale',
    'to_plain',
    'twin_vectors',
]
