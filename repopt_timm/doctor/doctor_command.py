"""The `repopt-timm doctor` command."""

import argparse
import platform
from typing import Any

import timm
import torch

from .. import __version__
from ..reporting import add_command, cpu_name, package_versions, positive, print_result
from ..train.parsing import parse_arguments
from ..train.validation import check_device_name
from .equivalence_check import check_equivalence

__all__ = ['add_commands']


def add_commands(commands: Any) -> None:
    """Adds `doctor` to the commands of `repopt-timm`.

    Args:
        commands: What `ArgumentParser.add_subparsers` returned.
    """
    parser = add_command(commands, 'doctor', _doctor)
    parser.add_argument('--model', default='repopt_vgg_a0', help='target to train on this machine')
    parser.add_argument('--model-kwargs', nargs='*', default=[], metavar='K=V', help='further model arguments')
    parser.add_argument(
        '--scales', metavar='SOURCE', help='scales to train it with [the shipped ones of the model, else initial]'
    )
    parser.add_argument('--steps', type=positive(int), default=20, metavar='N', help='steps to train')
    parser.add_argument('--img-size', type=positive(int), default=64, metavar='N', help='height and width')
    parser.add_argument('--device', help='device to train on [cuda if available, else cpu]')


def _doctor(args: argparse.Namespace) -> None:
    check_device_name(args.device)
    device = args.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    kwargs = parse_arguments(['--model-kwargs', *args.model_kwargs]).model_kwargs
    machine = {
        'repopt-timm': __version__,
        'python': platform.python_version(),
        **package_versions(torch, timm),
        'system': platform.platform(terse=True),
        'cpu': f'{cpu_name()[0]}, {torch.get_num_threads()} threads',
        'gpu': ', '.join(map(torch.cuda.get_device_name, range(torch.cuda.device_count()))) or 'none',
    }
    found = check_equivalence(args.model, args.scales, args.steps, args.img_size, device, kwargs)
    text = '\n'.join(f'{name:<12} {value}' for name, value in machine.items())
    text += (
        f'\n\n{args.model}, scales {found["scales"][:12]}: after {args.steps} steps in float64 at {args.img_size} px '
        f'on {device}, RepOptSGD on the plain network and SGD on its CSLA network differ by {found["deviation"]:.1e} '
        f'({"right" if found["right"] else "WRONG"}).'
    )
    print_result(args, {'environment': machine, 'check': found}, text)
    if not found['right']:
        raise ValueError(
            f'{args.model} does not train right on this machine: {found["deviation"]:.1e} off, expected rounding '
            f'errors. Please report it with the lines above.'
        )
