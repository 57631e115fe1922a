"""The command `repopt-timm qat`: its own arguments, and those of training."""

import argparse
import platform
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from typing import Any

from ..commands import PROGRAM
from ..console import CommandParser
from ..files import check_output
from ..reporting import amount, cpu_name, print_result
from ..train.command import continuation, set_up_logging
from ..train.interruption import InterruptedRunError
from ..train.parsing import make_parser, parse_arguments
from ..train.run import prepare_device
from ..train.schema import ARGUMENTS
from .deploy_commands import add_form, add_quantization, form_options
from .qat import WEIGHT_BITS, train_quantized

__all__ = ['main']

_OWN_SCHEDULE = ('cooldown_epochs', 'lr', 'lr_base_size', 'lr_base_scale', 'warmup_lr', 'min_lr')

# A fine-tuning: the weights are to move to nearby ones that rounding leaves alone. The config of the
# training before it does not change them.
_DEFAULTS = {
    **{name: ARGUMENTS[name].default for name in _OWN_SCHEDULE},
    **{'epochs': 3, 'warmup_epochs': 0, 'lr_base': 0.01, 'weight_decay': 4e-5},
}

_FOREIGN = (
    'data',
    'dataset',
    'model',
    'pretrained',
    'initial_checkpoint',
    'model_kwargs',
    'num_classes',
    'in_chans',
    'img_size',
    'gp',
    'drop',
    'grad_checkpointing',
    'sync_bn',
    'layer_decay',
    'torchcompile',
    'search_first',
    'search_kwargs',
)
"""Arguments of training that are about building a network, which here comes from a checkpoint."""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command.

    Args:
        argv: Command-line arguments. Defaults to those of the process.

    Raises:
        ValueError: If arguments do not go together, or the training diverges.
        FileNotFoundError: If a file that they name does not exist.
        ImportError: If they need a package that is not installed.
        OSError: If a checkpoint or the file cannot be written.
        SystemExit: With 128 plus the signal's number if Ctrl-C or SIGTERM ended the run.
    """
    set_up_logging()
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    # Not the parser's own method, which refuses what is for the training.
    own, words = argparse.ArgumentParser.parse_known_args(parser, argv)
    if argv[0] != own.checkpoint:
        raise ValueError(f"The first word is '{argv[0]}', expected the checkpoint: {parser.prog} CHECKPOINT --data ...")
    args = _training_arguments([*words, '--data-dir', own.data, '--seed', str(own.seed)], parser.prog)
    path = check_output(own.out, own.checkpoint)
    options = form_options(own)
    prepare_device(args)
    if args.distributed:
        raise ValueError('qat trains in one process: run it without torchrun.')
    try:
        # Lines of progress, where the result alone belongs on standard output.
        with redirect_stdout(sys.stderr):
            result = train_quantized(own.checkpoint, path, args, options, own.weight_bits)
    except InterruptedRunError as error:
        command = continuation([PROGRAM, 'qat'], argv, args, args.experiment)
        print(f'{error}: continue with  {command}', file=sys.stderr)
        raise SystemExit(128 + error.signum) from None
    result['out'] = own.out
    kept = ' kept in float32' if own.target == 'tensorrt' else ' kept in 8 bits' if own.weight_bits < 8 else ''
    lines = [
        f'{own.checkpoint} -> {own.out}: {result["bytes"] / 1e6:.1f} MB, {own.weight_bits}-bit weights{kept}, '
        f'{own.weights}',
        f'trained for {amount(result["epochs"], "epoch")}{", average of weights written" if args.model_ema else ""}',
        f'top-1 of {amount(result["images"], "image")}, in percent',
        f'float32                 {result["float32"]:.2f}',
        f'quantized, not trained  {result["untrained"]:.2f}',
        f'trained, PyTorch        {result["fake_quantized"]:.2f}',
        f'trained, ONNX Runtime   {result["top1"]:.2f}',
    ]
    if abs(result['top1'] - result['fake_quantized']) > 0.2:
        lines.append(_explain_difference(result, own.reduce_range))
    print_result(own, result, '\n'.join(lines))


def _explain_difference(result: Mapping[str, Any], reduce_range: bool) -> str:
    count = round(result['images'] * abs(result['top1'] - result['fake_quantized']) / 100)
    text = f'PyTorch and ONNX Runtime differ by {count} of {amount(result["images"], "image")}: '
    if platform.machine().lower() in ('x86_64', 'amd64') and not cpu_name()[1] and not reduce_range:
        return text + 'this CPU has no VNNI, so that 8-bit products overflow. Repeat it with --reduce-range.'
    return text + 'sums in another order round to other codes. `repopt-timm evaluate` the file on more images.'


def _parser() -> CommandParser:
    parser = CommandParser(
        prog=f'{PROGRAM} qat',
        description='Train a model in the form that it has in INT8, and write that as ONNX.',
        epilog='Everything else goes to the training, such as --epochs, --lr, --model-ema, --output, --experiment, '
        f'--resume: see {PROGRAM} train --help, whose defaults are the same except for {_shown_defaults()}. --seed is '
        f"the training's as well. Network and data come from CHECKPOINT and --data, so that qat refuses "
        f'{_shown_foreign()}.',
        allow_abbrev=False,
    )
    add = parser.add_argument
    add('checkpoint', help='checkpoint, folder in the format of timm, or name for timm.create_model')
    add('--data', metavar='DIR', required=True, help='folder of images, with a folder for each split')
    add('--out', metavar='FILE', required=True, help='file to write')
    add('--weight-bits', type=int, choices=WEIGHT_BITS, default=WEIGHT_BITS[0], help='bits per weight')
    add_form(parser)
    add_quantization(parser)
    add('--json', action='store_true', help='print JSON, for programs')
    return parser


def _shown_foreign() -> str:
    return ', '.join(ARGUMENTS[name].flag for name in _FOREIGN if name in ARGUMENTS)


def _shown_defaults() -> str:
    changed = {name: value for name, value in _DEFAULTS.items() if value != ARGUMENTS[name].default}
    return ', '.join(f'{ARGUMENTS[name].flag} {value:g}' for name, value in changed.items())


def _training_arguments(words: Sequence[str], program: str) -> argparse.Namespace:
    given = vars(make_parser(program).parse_args(words))
    foreign = sorted(ARGUMENTS[name].flag if name in ARGUMENTS else given[name] for name in given if name in _FOREIGN)
    if foreign:
        raise ValueError(f'qat takes network and data from CHECKPOINT and --data: remove {", ".join(foreign)}.')
    args = parse_arguments(words, program)
    for name in _FOREIGN:
        if name != 'data':
            # A config may be that of the run which trained the network.
            setattr(args, name, ARGUMENTS[name].default)
    for name, value in _DEFAULTS.items():
        if name not in given:
            setattr(args, name, value)
    return args
