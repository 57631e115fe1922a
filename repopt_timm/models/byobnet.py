"""timm's ByobNet with a stride for the stem and each stage, and RepVGG of chosen depths, widths and strides."""

from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from timm.models import build_model_with_cfg
from timm.models._manipulate import named_apply
from timm.models.byobnet import (
    ByoBlockCfg,
    ByobNet,
    ByoModelCfg,
    MobileOneBlock,
    RepVggBlock,
    _init_weights,
    checkpoint_filter_fn,
    expand_blocks_cfg,
    get_layer_fns,
    model_cfgs,
)
from torch import nn

from ..architectures import ARCHITECTURES, Architecture
from ..names import ModelName

__all__ = ['RepVgg', 'StridedByobNet', 'create_byobnet', 'feature_indices']

_STEMS: dict[str, Any] = {'rep': RepVggBlock, 'one': partial(MobileOneBlock, kernel_size=3)}


class StridedByobNet(ByobNet):
    """ByobNet whose stem and stages have chosen strides. All that ByobNet offers works.

    Args:
        cfg: timm's configuration of the network.
        strides: Strides of the stem and of each stage's first block. Defaults to those of `cfg`.
        stem_block: Class of the stem. Defaults to what `cfg` names, which is `rep` or `one`.
        in_chans: Number of image channels.
        output_stride: Stride of the last features; a smaller one dilates the last stages.
        device: Device of the parameters.
        dtype: Floating point type of the parameters.

    Attributes:
        strides: See above.

    Raises:
        ValueError: If a stride is neither 1 nor 2, or there are too few or too many.
    """

    in_chans: int
    pretrained_cfg: dict[str, Any]

    def __init__(
        self,
        cfg: ByoModelCfg,
        strides: Sequence[int] | None = None,
        stem_block: Any = None,
        in_chans: int = 3,
        output_stride: int = 32,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ):
        overlay = {field.name: kwargs.pop(field.name) for field in fields(ByoModelCfg) if field.name in kwargs}
        cfg = replace(cfg, **overlay)
        stages = [expand_blocks_cfg(stage) for stage in cfg.blocks]
        # ByobNet takes its stem's stride to be 2, and counts all further strides from there.
        own = (2, *(stage[0].s for stage in stages))
        strides = own if strides is None else tuple(strides)
        if len(strides) != len(own) or not set(strides) <= {1, 2}:
            raise ValueError(
                f'strides={strides}: expected {len(own)} values of 1 or 2, for the stem and {len(stages)} stages.'
            )
        blocks: Any = tuple((replace(first, s=s), *rest) for (first, *rest), s in zip(stages, strides[1:]))
        super().__init__(
            replace(cfg, blocks=blocks),
            in_chans=in_chans,
            output_stride=output_stride * 2 // strides[0],
            device=device,
            dtype=dtype,
            **kwargs,
        )
        for info in self.feature_info:
            info['reduction'] = info['reduction'] * strides[0] // 2
        if stem_block is not None or strides[0] != 2:
            make = stem_block or _STEMS[cfg.stem_type]
            channels: Any = cfg.stem_chs
            layers = get_layer_fns(cfg, allow_aa=False)
            self.stem = make(
                in_chans,
                round(channels * cfg.width_factor),
                stride=strides[0],
                layers=layers,
                device=device,
                dtype=dtype,
            )
            named_apply(_init_weights, self.stem)
        self.in_chans = in_chans
        self.strides = strides


class RepVgg(StridedByobNet):
    """RepVGG, timm's blocks, of any depths, widths and strides (arXiv 2101.03697).

    Args:
        cfg: Depths and widths.
        depths: Number of blocks in each stage. Defaults to that of `cfg`.
        widths: Channels of the stem and of each stage. Defaults to those of `cfg`.
        use_se: Squeeze-and-excitation in every block. Defaults to the setting of `cfg`.
        strides: Strides of the stem and of each stage. Defaults to 2.
        unit_norms: Start BatchNorm at weight 1 and bias 0, as the published RepVGG does. timm draws the weights of a
            RepVGG from N(0.1, 0.1): one channel in six starts with the sign turned around, and all small.
        kwargs: See `StridedByobNet`.

    Attributes:
        depths: See above.
        widths: See above.

    Raises:
        ValueError: If the numbers do not go together.
    """

    block_type: Any = None
    """Class of a block in the place of RepVGG's own."""

    def __init__(
        self,
        cfg: Architecture,
        depths: Sequence[int] | None = None,
        widths: Sequence[int] | None = None,
        use_se: bool | None = None,
        strides: Sequence[int] | None = None,
        unit_norms: bool = False,
        **kwargs: Any,
    ):
        cfg = cfg.with_numbers(depths, widths)
        attention: dict[str, Any] = {}
        if cfg.use_se if use_se is None else use_se:
            # As in RepVGG-D2se.
            attention = {'attn_layer': 'se', 'attn_kwargs': {'rd_ratio': 1 / 16, 'rd_divisor': 1}}
        # ByobNet takes a partial for a block's class, whatever its annotation says.
        block: Any = 'rep' if self.block_type is None else partial(self.block_type)
        byob_cfg = ByoModelCfg(
            blocks=tuple(
                ByoBlockCfg(type=block, d=depth, c=width, s=2, gs=0) for depth, width in zip(cfg.depths, cfg.widths[1:])
            ),
            stem_type='rep',
            stem_pool=None,
            stem_chs=cfg.widths[0],
            **attention,
        )
        super().__init__(byob_cfg, strides, self.block_type, **kwargs)
        for module in self.modules() if unit_norms else ():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        self.depths = cfg.depths
        self.widths = cfg.widths


def create_byobnet(variant: str, pretrained: bool = False, strides: Sequence[int] | None = None, **kwargs: Any) -> Any:
    """Creates a network of timm's byobnet, such as `mobileone_s0`, or a RepVGG of ours, with chosen strides.

    Args:
        variant: timm's name.
        pretrained: Load its weights.
        strides: Strides of the stem and of each stage. Defaults to timm's.
        kwargs: timm's arguments.
    """
    repvgg = ARCHITECTURES.get(ModelName.parse(variant).architecture)
    return build_model_with_cfg(
        RepVgg if repvgg else StridedByobNet,
        variant,
        pretrained,
        model_cfg=repvgg or model_cfgs[variant],
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={'flatten_sequential': True, 'out_indices': feature_indices(variant, strides, **kwargs)},
        strides=strides,
        **kwargs,
    )


def feature_indices(
    variant: str, strides: Sequence[int] | None = None, depths: Sequence[int] | None = None, **_: Any
) -> tuple[int, ...]:
    """Returns the indices of all features of a network of `create_byobnet`."""
    repvgg = ARCHITECTURES.get(ModelName.parse(variant).architecture)
    stages = depths or (repvgg.depths if repvgg else model_cfgs[variant].blocks)
    return tuple(range(1 + sum(stride != 1 for stride in (strides or (2,) * (1 + len(stages)))[1:])))
