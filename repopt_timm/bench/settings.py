"""What a benchmark is asked to measure."""

import sys
from dataclasses import dataclass

import torch

__all__ = ['Settings']


@dataclass(frozen=True)
class Settings:
    """Settings of a benchmark; each one looks at those that it needs.

    Attributes:
        model: Name of the target model.
        device: Where to measure.
        rounds: Number of rounds in which contenders are timed, see `paired`.
        batch_sizes: Numbers of images in a batch.
        img_sizes: Heights and widths of the images.
        precisions: `float32`, `bfloat16`, `float16`: what autocast computes in.
        widths: Factors for the channels of all stages.
        depths: Factors for the number of blocks of all stages.
        compiled: Measure compiled optimizers, too.
        quick: Leave out what takes long.
    """

    model: str
    device: torch.device
    rounds: int = 5
    batch_sizes: tuple[int, ...] = ()
    img_sizes: tuple[int, ...] = ()
    precisions: tuple[str, ...] = ()
    widths: tuple[float, ...] = ()
    depths: tuple[float, ...] = ()
    compiled: bool = True
    quick: bool = False

    def tell(self, doing: str) -> None:
        """Tells what is being measured, apart from the results."""
        print(f'measuring {doing} ...', file=sys.stderr, flush=True)
