"""What changes while a run goes on."""

from dataclasses import dataclass, field
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn

__all__ = ['TrainState']


@dataclass
class TrainState:
    """What changes while a run goes on, and a checkpoint holds.

    Attributes:
        model: The model, wrapped for DDP or compiled if so.
        optimizer: Its optimizer.
        scheduler: timm scheduler of the learning rate; a function of epoch and history.
        ema: Moving average of the weights.
        scaler: Scaler of float16 gradients.
        history: A row for each finished epoch: `epoch`, `lr`, `train_loss`, `eval_loss`, `eval_top1`, `eval_top5`.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    ema: ModelEmaV3 | None = None
    scaler: torch.amp.GradScaler | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
