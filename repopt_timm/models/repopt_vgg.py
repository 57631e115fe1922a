"""RepOpt-VGG target, Hyper-Search and CSLA models for timm (arXiv 2205.15242), built on its ByobNet.

The target is a plain stack of 3x3 convolutions, BatchNorm and ReLU. Its `_hs` counterpart trains the scales, its
`_csla` counterpart is the multi-branch network that training the target with a RepOptimizer is equivalent to.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields, replace
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
    register_notrace_module,
    resolve_pretrained_cfg,
)
from timm.models._hub import load_model_config_from_hf, load_model_config_from_path
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg, LayerFn, get_layer_fns
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils.checkpoint import checkpoint

from ..architectures import ARCHITECTURES, DEFAULT_STRIDES, Architecture, initial_scale
from ..checkpoints.packing import unpack
from ..reparam import CSLAConv2d, attach_scales, carried_scales, initialize
from ..scales import Scales
from ..sources import ScalesSource, load_scales, scales_beside_weights
from .weights import choose_weights, tagged_cfgs

__all__ = ['RepOptVgg', 'RepOptVggBlock']

register_notrace_module(CSLAConv2d)

_SUFFIXES = {'target': '', 'hs': '_hs', 'csla': '_csla'}


class RepOptVggBlock(nn.Module):
    """Convolution, BatchNorm, ReLU and, if the network has it, squeeze-and-excitation after the ReLU.

    Args:
        in_chs: Number of input channels.
        out_chs: Number of output channels.
        stride: Stride of the convolution.
        dilation: Dilation of the stage's first and of its further blocks, as ByobNet passes it.
        layers: ByobNet's layer functions.
        mode: `target` for a plain convolution, `hs` or `csla` for scaled branches.
        index: Index of the block inside its stage.
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
        mode: str = 'target',
        index: int = 0,
        drop_block: Any = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **_: Any,
    ):
        super().__init__()
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        layers = layers or LayerFn()
        geometry: dict[str, Any] = {
            'kernel_size': 3,
            'stride': stride,
            'padding': dilation[0],
            'dilation': dilation[0],
            'bias': False,
        }
        if mode == 'target':
            self.conv: nn.Module = nn.Conv2d(in_chs, out_chs, **geometry, **dd)
        else:
            template = nn.Conv2d(in_chs, out_chs, **geometry, device='meta')
            self.conv = CSLAConv2d(template, scale=initial_scale(index), trainable_scales=mode == 'hs', **dd)
        self.bn = layers.norm_act(out_chs, drop_layer=drop_block, **dd)
        self.attn = layers.attn(out_chs, **dd) if layers.attn is not None else nn.Identity()

    def init_weights(self, zero_init_last: bool = False) -> None:
        """Undoes ByobNet's initialization of branches: another one would change their strength against each other."""
        if isinstance(self.conv, CSLAConv2d):
            self.conv.reset_parameters()

    def reparameterize(self) -> None:
        """Merges the branches and folds BatchNorm, for inference; `timm.utils.reparameterize_model` calls it."""
        if isinstance(self.conv, CSLAConv2d):
            self.conv = self.conv.to_conv()
        if isinstance(self.bn, nn.BatchNorm2d):
            conv: Any = self.conv
            norm: Any = self.bn
            statistics = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
            conv.weight, conv.bias = fuse_conv_bn_weights(conv.weight, conv.bias, *statistics)
            self.bn = norm.act

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


class RepOptVgg(ByobNet):
    """RepOpt-VGG. All that ByobNet offers works; see `timm.create_model` for the arguments that are not listed.

    Args:
        cfg: Depths and widths.
        architecture: Name of the target model.
        mode: `target`, `hs` (trainable scales) or `csla` (constant scales).
        use_se: Squeeze-and-excitation after every ReLU; the architecture's own setting when left out.
        strides: Strides of the stem and of the four stages.
        in_chans: Number of image channels.
        output_stride: Stride of the last features; smaller ones dilate the last stages.
        drop_path_rate: Must be 0: a plain network has no residual branch to drop.
        device: Device of the parameters.
        dtype: Floating point type of the parameters.

    Attributes:
        architecture: Name of the target model.
        mode: See above.
        strides: See above.
        scales_provenance: Where the scales come from, if the model has any.
    """

    __jit_unused_properties__ = ('scales', '_model_args')

    pretrained_cfg: dict[str, Any]
    default_cfg: dict[str, Any]
    _traits: dict[str, Any]

    def __init__(
        self,
        cfg: Architecture,
        architecture: str,
        mode: str = 'target',
        use_se: bool | None = None,
        strides: Sequence[int] = DEFAULT_STRIDES,
        in_chans: int = 3,
        output_stride: int = 32,
        drop_path_rate: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ):
        strides = tuple(strides)
        cfg.convs(strides)  # checks the strides
        if drop_path_rate:
            raise ValueError(f'drop_path_rate={drop_path_rate}: a plain network has no residual branch to drop.')
        use_se = cfg.use_se if use_se is None else use_se
        overlay = {field.name: kwargs.pop(field.name) for field in fields(ByoModelCfg) if field.name in kwargs}
        byob_cfg = replace(_byob_cfg(cfg, mode, strides, use_se), **overlay)
        # ByobNet takes its stem's stride to be 2, and tells all further strides from it.
        byob_stride = output_stride * 2 // strides[0]
        super().__init__(
            byob_cfg,
            in_chans=in_chans,
            output_stride=byob_stride,
            device=device,
            dtype=dtype,
            zero_init_last=False,
            **kwargs,
        )
        for info in self.feature_info:
            info['reduction'] = info['reduction'] * strides[0] // 2
        layers = get_layer_fns(byob_cfg)
        self.stem = RepOptVggBlock(
            in_chans, cfg.widths[0], strides[0], layers=layers, mode=mode, device=device, dtype=dtype
        )
        self.stem.init_weights()
        self.architecture = architecture
        self.mode = mode
        self.strides = strides
        self.scales_provenance: Mapping[str, Any] = {}

    @property
    def scales(self) -> Scales | None:
        """The scales of an `_hs` or `_csla` model, or those that a target's convolutions carry; None without any."""
        if self.mode == 'target' and not carried_scales(self):
            return None
        return Scales.from_model(self)

    def set_scales(self, scales: Scales, init: bool = True) -> None:
        """Takes scales over: as constants (`csla`), as start of the search (`hs`), or for the RepOptimizer (target).

        Args:
            scales: Scales of this architecture, searched with the same strides.
            init: Initialize a target's convolutions by the Rule of Initialization; leave it out to keep its weights.

        Raises:
            ValueError: If the scales are another architecture's, or were searched with other strides.
        """
        scales.check_target(self.architecture, self.strides)
        if self.mode == 'target':
            if init:
                initialize(self, scales)
            attach_scales(self, scales, initialized=init)
        else:
            for name, module in self.named_modules():
                if isinstance(module, CSLAConv2d):
                    module.set_vectors(scales[name], name)
        self.scales_provenance = scales.provenance

    def to_plain(self) -> 'RepOptVgg':
        """Returns the target with merged kernels and the same output; same dtype, device and mode.

        The result carries this model's scales, so that both can be trained side by side from the same start.

        Raises:
            ValueError: If this is a target already.
        """
        if self.mode == 'target':
            raise ValueError(f'{self.architecture} is a target model already: its kernels are plain.')
        scales = Scales.from_model(self)
        plain = copy.deepcopy(self)
        for block in plain.modules():
            if isinstance(block, RepOptVggBlock) and isinstance(block.conv, CSLAConv2d):
                block.conv = block.conv.to_conv()
        plain.mode = 'target'
        plain.pretrained_cfg = plain.default_cfg = {
            **plain.pretrained_cfg,
            'architecture': self.architecture,
            'first_conv': _FIRST_CONV['target'],
        }
        if hasattr(plain, '_traits'):
            plain._traits = {**plain._traits, 'first_conv': _FIRST_CONV['target']}
        attach_scales(plain, scales, initialized=True)
        return plain

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
        return {name for name, _ in self.named_parameters() if name.endswith('.scale')}

    @property
    def _model_args(self) -> dict[str, Any]:
        # timm records the factory's arguments here and writes them to config.json. Scales are data, not a setting.
        return self._kept_model_args

    @_model_args.setter
    def _model_args(self, args: dict[str, Any]) -> None:
        self._kept_model_args = {key: value for key, value in args.items() if key != 'scales'}


def _byob_cfg(cfg: Architecture, mode: str, strides: Sequence[int], use_se: bool) -> ByoModelCfg:
    stages = []
    for depth, width, stride in zip(cfg.depths, cfg.widths[1:], strides[1:]):
        # ByobNet takes a partial for a block's class, whatever its annotation says.
        block_type: Any = partial(RepOptVggBlock)
        block = ByoBlockCfg(type=block_type, d=1, c=width, s=stride, gs=0)
        stages.append(tuple(replace(block, block_kwargs={'mode': mode, 'index': index}) for index in range(depth)))
    return ByoModelCfg(
        blocks=tuple(stages),
        stem_type='3x3',
        stem_pool=None,
        stem_chs=cfg.widths[0],
        attn_layer='se' if use_se else None,
        attn_kwargs={'rd_ratio': 1 / 16, 'rd_divisor': 1} if use_se else {},  # as in RepVGG-D2se
    )


def _create_repopt_vgg(
    variant: str,
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    scales: ScalesSource = None,
    **kwargs: Any,
) -> nn.Module:
    mode = next(mode for mode in ('hs', 'csla', 'target') if variant.endswith(_SUFFIXES[mode]))
    architecture = variant.removesuffix(_SUFFIXES[mode])
    strides = tuple(kwargs.get('strides') or DEFAULT_STRIDES)
    pretrained_cfg = choose_weights(variant, pretrained, pretrained_cfg, pretrained_cfg_overlay)
    weights = resolve_pretrained_cfg(variant, pretrained_cfg, pretrained_cfg_overlay).to_dict()
    if scales == _downloaded_scales(weights, kwargs):
        scales = None
    # Before the model is built, so that a mistake is told at once.
    if scales is not None:
        scales = load_scales(scales, architecture, strides)
    elif pretrained or weights.get('source') in ('hf-hub', 'local-dir'):
        scales = scales_beside_weights(weights)
    if scales is None and mode == 'csla':
        raise ValueError(
            f"{variant} needs scales=...: a file, 'hf-hub:user/repo' or 'initial'. Search some with {architecture}_hs."
        )
    build = partial(_build, scales=scales, init=not pretrained)
    return build_model_with_cfg(
        build,
        variant,
        pretrained,
        pretrained_cfg=pretrained_cfg,
        pretrained_cfg_overlay=pretrained_cfg_overlay,
        pretrained_filter_fn=_restore,
        model_cfg=ARCHITECTURES[architecture],
        feature_cfg={'flatten_sequential': True, 'out_indices': tuple(range(_num_features(strides)))},
        architecture=architecture,
        mode=mode,
        **kwargs,
    )


def _restore(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    return unpack(state_dict)


def _downloaded_scales(weights: dict[str, Any], kwargs: dict[str, Any]) -> Any:
    """Takes `scales` out of the model arguments of a downloaded config: it could name any file or repository."""
    args = kwargs.get('pretrained_model_args')
    if args is None and weights.get('source') == 'hf-hub':
        # Before 1.0.31 timm does not tell which arguments come from the config.
        args = load_model_config_from_hf(weights['hf_hub_id'])[2]
    elif args is None and weights.get('source') == 'local-dir':
        args = load_model_config_from_path(weights['file'])[2]
    return args.pop('scales', None) if args else None


def _build(scales: Scales | None, init: bool, **kwargs: Any) -> RepOptVgg:
    model = RepOptVgg(**kwargs)
    if scales is not None:
        model.set_scales(scales, init)
    return model


def _num_features(strides: Sequence[int]) -> int:
    return 1 + sum(stride != 1 for stride in strides[1:])


_FIRST_CONV = {
    'target': 'stem.conv',
    'hs': ('stem.conv.branches.1x1', 'stem.conv.branches.kxk'),
    'csla': ('stem.conv.branches.1x1', 'stem.conv.branches.kxk'),
}


def _cfg(mode: str, **kwargs: Any) -> dict[str, Any]:
    return {
        'num_classes': 1000,
        'input_size': (3, 224, 224),
        'pool_size': (7, 7),
        'crop_pct': 0.875,
        'interpolation': 'bilinear',
        'mean': IMAGENET_DEFAULT_MEAN,
        'std': IMAGENET_DEFAULT_STD,
        'first_conv': _FIRST_CONV[mode],
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
        **{f'{name}{suffix}.*': _cfg(mode) for name in ARCHITECTURES for mode, suffix in _SUFFIXES.items()},
    }
)


def _register(variant: str) -> None:
    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _create_repopt_vgg(variant, pretrained, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = variant
    entrypoint.__module__ = __name__
    entrypoint.__doc__ = f'{variant}: see `RepOptVgg`.'
    globals()[variant] = register_model(entrypoint)


for _name in ARCHITECTURES:
    for _suffix in _SUFFIXES.values():
        _register(_name + _suffix)
