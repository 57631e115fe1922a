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

_HELP = f"""usage: {PROGRAM} run SCRIPT [ARGUMENT ...]

Runs a script, such as timm's validate.py, benchmark.py, inference.py or onnx_export.py, that finds the models and
optimizers of this package. All arguments after its name are the script's own, --help included. A model that an argument
names, such as repopt_resnet18, is made known to timm first. In parallel:
torchrun --nproc_per_node N -m repopt_timm.cli run SCRIPT ..."""


def main(argv: Sequence[str]) -> None:
    """Runs the script that the first argument names, with the others."""
    if argv[:1] in (['-h'], ['--help']):
        print(_HELP)
        return
    if not argv or not Path(argv[0]).is_file():
        raise FileNotFoundError(
            f"There is no script '{''.join(argv[:1])}', expected one as in {PROGRAM} run validate.py DATA --model X. "
            f"timm's scripts are in https://github.com/huggingface/pytorch-image-models, not in its package."
        )
    for word in argv[1:]:
        # Also as --model=NAME. What is wrong with it, and with words that are not models, the script says.
        with suppress(OSError, ValueError), explaining(word):
            resolve_model(word.rpartition('=')[2])
    sys.argv = list(argv)
    # A script imports what is beside it.
    sys.path[0] = str(Path(argv[0]).resolve().parent)
    try:
        runpy.run_path(argv[0], run_name='__main__')
    except Exception:
        # The script's own error: show its traceback.
        traceback.print_exc()
        raise SystemExit(1) from None
