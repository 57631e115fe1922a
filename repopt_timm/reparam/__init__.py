"""Gradient re-parameterization (RepOptimizer, arXiv 2205.15242) in plain PyTorch.

Read `branches`, `convolution`, `prior`, `scales`, `twins`, `initialization`, `grad_mult`, in this order.
"""

from .branches import Branch, embed, make_branches, merge
from .convolution import Branches, branches_of, kind_of, merge_branches
from .grad_mult import GradMults, make_grad_mults
from .initialization import prepare
from .modules import is_sharded, network_name, uncompiled_name, unwrap
from .prior import (
    FOLDING_CLASSES,
    ConvPrior,
    keep_branches,
    multi_branch_blocks,
    refusal,
    refused_convs,
    repvgg_branches,
    repvgg_prior,
    resolve_prior,
    run_scale,
    stage_scale,
)
from .scales import Geometry, Scales, carried_scales, drop_scales, geometry_of, scales_for
from .twins import convert_, csla, hyper_search, to_plain
