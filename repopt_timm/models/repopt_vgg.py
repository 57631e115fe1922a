"""RepOpt-VGG for timm (arXiv 2205.15242), built on its ByobNet: plain 3x3 convolutions, BatchNorm and ReLU.

Its `_hs` and `_csla` models are twins of this plain network, see `repopt_timm.reparam.twins`; `_branches` is the RepVGG
of the same depths, widths and strides.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from typing import Any

import torch
from timm.models import checkpoint_seq, generate_default_cfgs
from timm.models.byobnet import LayerFn
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..architectures import ARCHITECTURES, Architecture
from ..blocks import PlainBlock
from ..names import KINDS
from ..reparam import ConvPrior, repvgg_branches, stage_scale
from .byobnet import RepVgg
from .records import Twin
from .weights import original_cfgs, shipped_cfgs


class RepOptVggBlock(PlainBlock):
    """Convolution, BatchNorm, ReLU and, if the network has it, squeeze-and-excitation after the ReLU."""

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        layers: LayerFn,
        stride: int = 1,
        dilation: tuple[int, int] = (1, 1),
        drop_block: Any = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **_: Any,
    ):
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        conv = nn.Conv2d(in_chs, out_chs, 3, stride, padding=dilation[0], dilation=dilation[0], bias=False, **dd)
        bn = layers.norm_act(out_chs, drop_layer=drop_block, **dd)
        super().__init__(conv, bn, attn=layers.attn(out_chs, **dd) if layers.attn is not None else nn.Identity())


class RepOptVgg(Twin, RepVgg):
    """RepOpt-VGG. All that ByobNet offers works; see `RepVgg` and `timm.create_model` for further arguments."""

    block_type = RepOptVggBlock

    def __init__(self, cfg: Architecture, architecture: str, drop_path_rate: float = 0.0, **kwargs: Any):
        if drop_path_rate:
            raise ValueError(f'drop_path_rate={drop_path_rate}: a plain network has no residual branch to drop.')
        super().__init__(cfg, **kwargs)
        self.architecture = architecture
        stages: Any = [[self.stem], *self.stages]
        for stage, first_stride in zip(stages, self.strides):
            for index, block in enumerate(stage):
                branches = repvgg_branches(block.conv)
                # An `output_stride` may have turned the stride into dilation.
                stride = 1 if index else first_stride
                if stride != 1:
                    branches.pop('identity', None)
                ConvPrior(branches, stage_scale(index), (stride, stride)).put_on(block.conv)

    def forward_features(self, x: Tensor) -> Tensor:
        """Returns the last stage's output, shape (N, C, H, W)."""
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = self._forward_checkpointed(x)
        else:
            x = self.stages(self.stem(x))
        return self.final_conv(x)

    @torch.jit.ignore
    def _forward_checkpointed(self, x: Tensor) -> Tensor:
        """Recomputes BatchNorm and ReLU in the backward pass, and no convolution of a target.

        Half of what a plain network keeps are outputs of its ReLUs, which cost little to make again.
        """
        if torch.compiler.is_compiling():
            return checkpoint_seq(self.stages, self.stem(x))
        blocks: list[Any] = [self.stem, *(block for stage in self.stages for block in stage)]
        x = blocks[0].conv(x)
        for block, following in pairwise(blocks):
            x = _recomputing_activation(block, following, x)
        return blocks[-1].attn(blocks[-1].bn(x))


def _recomputing_activation(block: Any, following: Any, x: Tensor) -> Any:
    return checkpoint(
        lambda x: following.conv(block.attn(block.bn(x))),
        x,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), _without_counting(block.bn)),
    )


@contextmanager
def _without_counting(norm: Any) -> Iterator[None]:
    """Keeps a BatchNorm that runs on a batch a second time from counting it twice in its running statistics."""
    buffers = dict(norm._buffers)
    norm._buffers.update({name: buffer.clone() for name, buffer in buffers.items() if buffer is not None})
    try:
        yield
    finally:
        norm._buffers.update(buffers)


def _cfg(kind: str, **kwargs: Any) -> dict[str, Any]:
    return {
        'pool_size': (7, 7),
        'interpolation': 'bilinear',
        'first_conv': ('stem.conv_1x1.conv', 'stem.conv_kxk.conv') if kind == 'branches' else 'stem.conv',
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
        **{name: _cfg('target', **cfg) for name, cfg in shipped_cfgs().items()},
        **{name: _cfg(kind, **cfg) for kind in ('target', 'branches') for name, cfg in original_cfgs(kind).items()},
        **{f'{name}{suffix}.*': _cfg(kind) for name in ARCHITECTURES for kind, suffix in KINDS.items()},
    }
)
