"""Optional loggers beside the CSV file."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

from ..files import write_text

# The id of the run there, for a resumed run to go on with.
_WANDB_FILE = 'wandb_id.txt'

Logger = Callable[[Mapping[str, float]], None]


def make_loggers(args: argparse.Namespace, folder: Path) -> list[Logger]:
    """Makes the loggers that the arguments ask for."""
    loggers = []
    if args.log_tensorboard:
        loggers.append(_tensorboard(folder))
    if args.log_wandb:
        loggers.append(_wandb(args, folder))
    return loggers


def _tensorboard(folder: Path) -> Logger:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder))

    def log(row: Mapping[str, float]) -> None:
        for name in row.keys() - {'epoch'}:
            writer.add_scalar(name, row[name], row['epoch'])
        writer.flush()

    return log


def _wandb(args: argparse.Namespace, folder: Path) -> Logger:
    import wandb

    # Of a search before this training, into which its numbers would go.
    wandb.finish()
    path = folder / _WANDB_FILE
    known = path.read_text(encoding='utf-8').strip() if path.is_file() else None
    run = wandb.init(
        project='repopt-timm', name=folder.name, dir=str(folder), config=vars(args), id=known, resume='allow'
    )
    write_text(path, f'{run.id}\n')
    return lambda row: run.log(dict(row), step=row['epoch'])
