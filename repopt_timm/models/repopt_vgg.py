"""RepOpt-VGG for timm (arXiv 2205.15242), built on its ByobNet: plain 3x3 convolutions, BatchNorm and ReLU.

Its `_hs` and `_csla` models are twins of this plain network, see `repopt_timm.reparam.twins`; `_branches` is the RepVGG
of the same depths, widths and strides.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import (
    build_model_with_cfg,
    checkpoint_seq,
    generate_default_cfgs,
    register_model,
    resolve_pretrained_cfg,
)
from timm.models.byobnet import LayerFn
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..architectures import ARCHITECTURES, Architecture
from ..blocks.plain_block import fold
from ..checkpoints.packing import unpack
from ..names import KINDS, ModelName
from ..reparam import ConvPrior, branches_of, carried_scales, repvgg_branches, stage_scale
from ..scales import Scales
from ..sources import IMPLIED, ScalesSource, load_scales
from ..weights_origin import forget_origin, note_merged
from .kinds import (
    ModelArgsWithoutScales,
    make_kind,
    name_features,
    refuse_scales,
    register_kinds,
    requested_scales,
    to_plain,
)
from .pretrained_weights import choose_weights, fetch, original_cfgs, tagged_cfgs
from .repvgg_weights import has_branches, merge_repvgg
from .strided_byobnet import RepVgg, feature_indices

__all__ = ['RepOptVgg', 'RepOptVggBlock']


class RepOptVggBlock(nn.Module):
    """Convolution, BatchNorm, ReLU and, if the network has it, squeeze-and-excitation after the ReLU.

    Args:
        in_chs: Number of input channels.
        out_chs: Number of output channels.
        stride: Stride of the convolution.
        dilation: Dilation of the stage's first and of its further blocks, as ByobNet passes it.
        layers: ByobNet's layer functions.
        drop_block: Layer that drops activations after the BatchNorm.
        device: Device of the parameters.
        dtype: Floating point type of the parameters.
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        stride: int = 1,
        dilation: tuple[int, int] = (1, 1),
        layers: LayerFn | None = None,
        drop_block: Any = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **_: Any,
    ):
        super().__init__()
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        layers = layers or LayerFn()
        self.conv = nn.Conv2d(
            in_chs, out_chs, 3, stride=stride, padding=dilation[0], dilation=dilation[0], bias=False, **dd
        )
        self.bn = layers.norm_act(out_chs, drop_layer=drop_block, **dd)
        self.attn = layers.attn(out_chs, **dd) if layers.attn is not None else nn.Identity()
        self.put_prior(0, stride)

    def put_prior(self, index: int, stride: int) -> None:
        """Lets the convolution carry its branches and what their scales start from.

        Args:
            index: Index of the block inside its stage.
            stride: Stride that the convolution was constructed with.
        """
        branches = repvgg_branches(self.conv)
        if stride != 1:
            branches.pop('identity', None)
        ConvPrior(branches, stage_scale(index), (stride, stride)).put_on(self.conv)

    def reparameterize(self) -> None:
        """Merges the branches and folds BatchNorm, for inference; `timm.utils.reparameterize_model` calls it."""
        fold(self)

    def activate(self, x: Tensor) -> Tensor:
        """Returns what follows the convolution's output `x`."""
        return self.attn(self.bn(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.activate(self.conv(x))


def _activate_and_convolve(x: Tensor, block: RepOptVggBlock, following: RepOptVggBlock) -> Tensor:
    return following.conv(block.activate(x))


def _checkpoint_contexts(norm: Any) -> tuple[AbstractContextManager, AbstractContextManager]:
    return nullcontext(), _without_counting(norm)


@contextmanager
def _without_counting(norm: Any) -> Iterator[None]:
    """Keeps a BatchNorm that runs on a batch a second time from counting it twice in its running statistics."""
    buffers = dict(norm._buffers)
    norm._buffers.update({name: None if buffer is None else buffer.clone() for name, buffer in buffers.items()})
    try:
        yield
    finally:
        norm._buffers.update(buffers)


class RepOptVgg(RepVgg):
    """RepOpt-VGG. All that ByobNet offers works; see `RepVgg` and `timm.create_model` for further arguments.

    Args:
        cfg: Depths and widths.
        architecture: Name of the plain model.
        drop_path_rate: Must be 0: a plain network has no residual branch to drop.

    Attributes:
        architecture: Name of the plain model.
        scales_provenance: Where the scales come from, if the model has any.
    """

    block_type = RepOptVggBlock

    __jit_unused_properties__ = ('scales',)

    _model_args = ModelArgsWithoutScales()

    pretrained_cfg: dict[str, Any]
    default_cfg: dict[str, Any]
    _traits: dict[str, Any]

    def __init__(self, cfg: Architecture, architecture: str, drop_path_rate: float = 0.0, **kwargs: Any):
        if drop_path_rate:
            raise ValueError(f'drop_path_rate={drop_path_rate}: a plain network has no residual branch to drop.')
        super().__init__(cfg, **kwargs)
        for stage, stride in zip(self.stages, self.strides[1:]):
            for index, block in enumerate(stage):
                # An `output_stride` may have turned the stride into dilation.
                block.put_prior(index, stride if index == 0 else 1)
        self.architecture = architecture
        self.scales_provenance: dict[str, Any] = {}

    @property
    def scales(self) -> Scales | None:
        """The scales of an `_hs` or `_csla` model, or what a plain one carries; None without any."""
        if carried_scales(self) or any(b.complete for m in self.modules() if (b := branches_of(m))):
            return Scales.from_model(self)
        return None

    def to_plain(self) -> nn.Module:
        """Returns the plain model with merged kernels and the same output; see `repopt_timm.to_plain`."""
        return to_plain(self)

    def forward_features(self, x: Tensor) -> Tensor:
        """Returns the last stage's output, shape (N, C, H, W); see `set_grad_checkpointing`."""
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = self._forward_checkpointed(x)
        else:
            x = self.stages(self.stem(x))
        return self.final_conv(x)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes BatchNorm and ReLU in the backward pass.

        Half of what a plain network keeps for the backward pass are outputs of its ReLUs, which cost little to make
        again. No convolution of a target is run twice, unlike with timm's checkpoints of whole stages, which stay in
        use under `torch.compile`.
        """
        super().set_grad_checkpointing(enable)

    @torch.jit.ignore
    def _forward_checkpointed(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return checkpoint_seq(self.stages, self.stem(x))
        blocks: list[Any] = [self.stem, *(block for stage in self.stages for block in stage)]
        x = blocks[0].conv(x)
        for block, following in pairwise(blocks):
            contexts = partial(_checkpoint_contexts, block.bn)
            x = checkpoint(_activate_and_convolve, x, block, following, use_reentrant=False, context_fn=contexts)
        return blocks[-1].activate(x)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the trainable scales, which are never decayed."""
        return {name for name, _ in self.named_parameters() if '.scales.' in name}


def _create_repopt_vgg(
    variant: str,
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    scales: ScalesSource | None = None,
    **kwargs: Any,
) -> nn.Module:
    name = ModelName.parse(variant)
    pretrained_cfg = choose_weights(variant, pretrained, pretrained_cfg, pretrained_cfg_overlay)
    config = resolve_pretrained_cfg(variant, pretrained_cfg, pretrained_cfg_overlay)
    of_timm = any(config.hf_hub_id == each['hf_hub_id'] for each in original_cfgs(name.kind).values())
    repository = fetch(config, kwargs.get('cache_dir')) if pretrained and of_timm else ''
    scales = requested_scales(
        variant, pretrained, pretrained_cfg, pretrained_cfg_overlay, scales, kwargs, beside=not of_timm
    )
    implied = pretrained and isinstance(scales, str) and scales == IMPLIED
    if name.kind == 'branches':
        refuse_scales(variant, scales)
    cfg = ARCHITECTURES[name.architecture]
    strides = kwargs.get('strides') or (2,) * (
        1 + len(cfg.with_numbers(kwargs.get('depths'), kwargs.get('widths')).depths)
    )
    build = partial(_build, name=name, scales=None if implied else scales, init=not pretrained)
    model: Any = build_model_with_cfg(
        build,
        variant,
        pretrained,
        pretrained_cfg=pretrained_cfg,
        pretrained_cfg_overlay=pretrained_cfg_overlay,
        pretrained_filter_fn=partial(_restore, implied=implied),
        model_cfg=cfg,
        feature_cfg={'flatten_sequential': True, 'out_indices': feature_indices(strides)},
        **kwargs,
    )
    if not pretrained:
        forget_origin(model)
    elif repository and name.kind == 'target':
        note_merged(model, repository)
    if kwargs.get('features_only') and name.kind != 'branches':
        # timm makes children of the stages of a network.
        stages = [child for child, _ in model.named_children() if child.startswith('stages_')]
        name_features(model, name.architecture, {child: child.replace('_', '.') for child in stages})
    return model


def _build(name: ModelName, scales: ScalesSource | None, init: bool, **kwargs: Any) -> nn.Module:
    if name.kind == 'branches':
        return RepVgg(**kwargs)
    return make_kind(RepOptVgg(architecture=name.architecture, **kwargs), name.kind, scales, init)


def _restore(state_dict: dict[str, Tensor], model: Any, implied: bool) -> dict[str, Tensor]:
    state_dict = unpack(state_dict)
    if isinstance(model, RepOptVgg) and has_branches(state_dict):
        return merge_repvgg(state_dict, model, implied)
    if implied:
        # Says what they need.
        load_scales(IMPLIED, model)
    return state_dict


_FIRST_CONV = {
    'target': 'stem.conv',
    'hs': None,
    'csla': None,
    'branches': ('stem.conv_1x1.conv', 'stem.conv_kxk.conv'),
}


def _cfg(kind: str, **kwargs: Any) -> dict[str, Any]:
    return {
        'num_classes': 1000,
        'input_size': (3, 224, 224),
        'pool_size': (7, 7),
        'crop_pct': 0.875,
        'interpolation': 'bilinear',
        'mean': IMAGENET_DEFAULT_MEAN,
        'std': IMAGENET_DEFAULT_STD,
        'first_conv': _FIRST_CONV[kind],
        'classifier': 'head.fc',
        'license': 'apache-2.0',
        'paper_name': 'Re-parameterizing Your Optimizers rather than Architectures',
        'paper_ids': 'arXiv:2205.15242',
        'origin_url': 'https://github.com/DingXiaoH/RepOptimizers',
        **kwargs,
    }


# timm makes the first tag with weights an architecture's default, also for an untrained model, which would then have
# the checkpoint's classes and input size. A trailing '*' marks the default: here the untagged, untrained one, which
# has to come after the tags.
default_cfgs = generate_default_cfgs(
    {
        **{name: _cfg('target', **cfg) for name, cfg in tagged_cfgs().items()},
        **{name: _cfg(kind, **cfg) for kind in ('target', 'branches') for name, cfg in original_cfgs(kind).items()},
        **{f'{name}{suffix}.*': _cfg(kind) for name in ARCHITECTURES for kind, suffix in KINDS.items()},
    }
)


@register_model
def repopt_vgg_a0(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """RepOpt-VGG-A0."""
    return _create_repopt_vgg('repopt_vgg_a0', pretrained, **kwargs)


@register_model
def repopt_vgg_a1(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """RepOpt-VGG-A1."""
    return _create_repopt_vgg('repopt_vgg_a1', pretrained, **kwargs)


@register_model
def repopt_vgg_a2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """RepOpt-VGG-A2."""
    return _create_repopt_vgg('repopt_vgg_a2', pretrained, **kwargs)


@register_model
def repopt_vgg_b0(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """RepOpt-VGG-B0."""
    return _create_repopt_vgg('repopt_vgg_b0', pretrained, **kwargs)


@register_model
def repopt_vgg_b1(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """RepOpt-VGG-B1."""
    return _create_repopt_vgg('repopt_vgg_b1', pretrained, **kwargs)


@register_model
def repopt_vgg_b2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """RepOpt-VGG-B2."""
    return _create_repopt_vgg('repopt_vgg_b2', pretrained, **kwargs)


@register_model
def repopt_vgg_b3(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """RepOpt-VGG-B3."""
    return _create_repopt_vgg('repopt_vgg_b3', pretrained, **kwargs)


@register_model
def repopt_vgg_l1(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """RepOpt-VGG-L1."""
    return _create_repopt_vgg('repopt_vgg_l1', pretrained, **kwargs)


@register_model
def repopt_vgg_l2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """RepOpt-VGG-L2."""
    return _create_repopt_vgg('repopt_vgg_l2', pretrained, **kwargs)


@register_model
def repopt_vgg_d2se(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """RepOpt-VGG-D2se: L2 with squeeze-and-excitation after each ReLU."""
    return _create_repopt_vgg('repopt_vgg_d2se', pretrained, **kwargs)


@register_model
def repopt_vgg(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """RepOpt-VGG of any `depths=`, `widths=` and `strides=`."""
    return _create_repopt_vgg('repopt_vgg', pretrained, **kwargs)


@register_model
def test_repopt_vgg(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A RepOpt-VGG of six narrow convolutions, for tests."""
    return _create_repopt_vgg('test_repopt_vgg', pretrained, **kwargs)


for _name in ARCHITECTURES:
    register_kinds(_name, _create_repopt_vgg, __name__, ('hs', 'csla', 'branches'))
