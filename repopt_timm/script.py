"""Runs a script as `python SCRIPT` does, with the models and optimizers of this package known to timm."""

import runpy
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from .commands import PROGRAM
from .errors import explaining
from .models import resolve_model

__all__ = ['main']

_HELP = f"""usage: {PROGRAM} run SCRIPT [ARGUMENT ...]

Runs a script, such as timm's validate.py, benchmark.py, inference.py or onnx_export.py, that finds the models and
optimizers of this package. All arguments after its name are the script's own, --help included. A model that an argument
names, such as repopt_resnet18, is made known to timm first. In parallel:
torchrun --nproc_per_node N -m repopt_timm.cli run SCRIPT ..."""


def main(argv: Sequence[str]) -> None:
    """Runs a script.

    Args:
        argv: Path of the script, and its arguments.

    Raises:
        ValueError: If no script is named.
        FileNotFoundError: If there is no such script.
        SystemExit: As the script ends.
    """
    if argv[:1] in (['-h'], ['--help']):
        print(_HELP)
        return
    if not argv:
        raise ValueError(
            f'No script is named, expected one as in {PROGRAM} run validate.py DATA --model repopt_vgg_b1.'
        )
    path = Path(argv[0])
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no script '{path}'. Those of timm are in its repository, "
            f'https://github.com/huggingface/pytorch-image-models, not in its package.'
        )
    for word in argv[1:]:
        # Also as --model=NAME. What is wrong with it, and with words that are not models, the script says.
        with suppress(OSError, ValueError), explaining(word):
            resolve_model(word.rpartition('=')[2])
    sys.argv = [str(path), *argv[1:]]
    # A script imports what is beside it.
    sys.path[0] = str(path.resolve().parent)
    try:
        runpy.run_path(str(path), run_name='__main__')
    except Exception:
        # Of the script, whose author knows what to make of it; our own errors are one line.
        traceback.print_exc()
        raise SystemExit(1) from None
