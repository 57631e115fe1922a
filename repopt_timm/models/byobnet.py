"""timm's ByobNet with a stride for the stem and each stage, and RepVGG of chosen depths, widths and strides."""

from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any

from timm.models import build_model_with_cfg
from timm.models._manipulate import named_apply
from timm.models.byobnet import (
    ByoBlockCfg,
    ByobNet,
    ByoModelCfg,
    MobileOneBlock,
    RepVggBlock,
    _init_weights,
    expand_blocks_cfg,
    get_layer_fns,
    model_cfgs,
)
from torch import nn

from ..architectures import ARCHITECTURES, Architecture
from ..names import ModelName


class StridedByobNet(ByobNet):
    """ByobNet with chosen strides of the stem and of each stage's first block; the default is the strides of `cfg`."""

    def __init__(
        self,
        cfg: ByoModelCfg,
        strides: Sequence[int] | None = None,
        stem_block: Any = None,
        in_chans: int = 3,
        output_stride: int = 32,
        **kwargs: Any,
    ):
        cfg = replace(cfg, **{field.name: kwargs.pop(field.name) for field in fields(cfg) if field.name in kwargs})
        stages = [expand_blocks_cfg(stage) for stage in cfg.blocks]
        # ByobNet takes its stem's stride to be 2, and counts all further strides from there.
        own = (2, *(stage[0].s for stage in stages))
        chosen = own if strides is None else tuple(strides)
        if len(chosen) != len(own) or not set(chosen) <= {1, 2}:
            raise ValueError(
                f'strides={strides}: expected {len(own)} values of 1 or 2, for the stem and {len(stages)} stages.'
            )
        stem_stride = chosen[0]
        blocks: Any = tuple((replace(first, s=s), *rest) for (first, *rest), s in zip(stages, chosen[1:]))
        cfg = replace(cfg, blocks=blocks)
        super().__init__(cfg, in_chans=in_chans, output_stride=output_stride * 2 // stem_stride, **kwargs)
        for info in self.feature_info:
            info['reduction'] = info['reduction'] * stem_stride // 2
        if stem_block is not None or stem_stride != 2:
            one: Any = partial(MobileOneBlock, kernel_size=3)
            channels: Any = cfg.stem_chs
            self.stem = (stem_block or (one if cfg.stem_type == 'one' else RepVggBlock))(
                in_chans,
                round(channels * cfg.width_factor),
                stride=stem_stride,
                layers=get_layer_fns(cfg, allow_aa=False),
                **{key: kwargs[key] for key in ('device', 'dtype') if key in kwargs},
            )
            named_apply(_init_weights, self.stem)
        self.strides = chosen


class RepVgg(StridedByobNet):
    """RepVGG, timm's blocks, of any depths, widths and strides (arXiv 2101.03697).

    With `unit_norms` BatchNorm starts at weight 1 and bias 0, as the published RepVGG does. timm draws these weights
    from N(0.1, 0.1): one channel in six starts negative, and all start small.
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
        stages = [ByoBlockCfg(block, d=depth, c=width, s=2, gs=0) for depth, width in zip(cfg.depths, cfg.widths[1:])]
        byob_cfg = ByoModelCfg(tuple(stages), stem_type='rep', stem_pool=None, stem_chs=cfg.widths[0], **attention)
        super().__init__(byob_cfg, strides, self.block_type, **kwargs)
        for module in self.modules() if unit_norms else ():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)


def create_byobnet(variant: str, pretrained: bool = False, strides: Sequence[int] | None = None, **kwargs: Any) -> Any:
    """Creates a network of timm's byobnet, such as `mobileone_s0`, or a RepVGG of ours, with chosen strides."""
    repvgg = ARCHITECTURES.get(ModelName.parse(variant).architecture)
    stages = kwargs.get('depths') or (repvgg.depths if repvgg else model_cfgs[variant].blocks)
    strided = len(stages) if strides is None else sum(stride != 1 for stride in strides[1:])
    return build_model_with_cfg(
        RepVgg if repvgg else StridedByobNet,
        variant,
        pretrained,
        model_cfg=repvgg or model_cfgs[variant],
        feature_cfg={'flatten_sequential': True, 'out_indices': tuple(range(1 + strided))},
        strides=strides,
        **kwargs,
    )
