"""The `repopt-timm doctor` command."""

import argparse
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from .. import __version__
from ..reporting import add_command, cpu_name, positive, print_result
from ..train.schema import ARGUMENTS
from ..train.validation import check_device_name
from .equivalence_check import check_equivalence
from .run_check import Finding, check_run

__all__ = ['add_commands']

_PACKAGES = ('torch', 'torchvision', 'timm', 'huggingface_hub', 'safetensors', 'onnx', 'onnxruntime', 'matplotlib')
_GIB = 2**30


def add_commands(commands: Any) -> None:
    """Adds `doctor` to the commands of `repopt-timm`.

    Args:
        commands: What `ArgumentParser.add_subparsers` returned.
    """
    parser = add_command(commands, 'doctor', _doctor)
    parser.add_argument('folder', nargs='?', metavar='RUN', help='folder of a run to look through')
    parser.add_argument('--model', default='repopt_vgg_a0', help='target to train on this machine')
    parser.add_argument('--model-kwargs', nargs='*', default=[], metavar='K=V', help='further model arguments')
    parser.add_argument(
        '--scales', metavar='SOURCE', help='scales to train it with [the shipped ones of the model, else initial]'
    )
    parser.add_argument('--steps', type=positive(int), default=20, metavar='N', help='steps to train')
    parser.add_argument('--img-size', type=positive(int), default=64, metavar='N', help='height and width')
    parser.add_argument('--device', help='device to train on [cuda if available, else cpu]')


def _doctor(args: argparse.Namespace) -> None:
    if args.folder is not None:
        _report_run(args)
        return
    check_device_name(args.device)
    device = args.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    kwargs = ARGUMENTS['model_kwargs'].parse(args.model_kwargs, '--model-kwargs')
    machine = _environment()
    found = check_equivalence(args.model, args.scales, args.steps, args.img_size, device, kwargs)
    lines = [f'{name:<16} {value}' for name, value in machine.items()]
    lines += ['', _verdict(found)]
    print_result(args, {'environment': machine, 'check': found}, '\n'.join(lines))
    if not found['right']:
        raise ValueError(
            f'{args.model} does not train right on this machine: {found["deviation"]:.1e} off, expected rounding '
            f'errors. Please report it with the lines above.'
        )


def _environment() -> dict[str, Any]:
    name, vnni = cpu_name()
    found: dict[str, Any] = {'repopt-timm': __version__, 'python': platform.python_version()}
    found |= {package: _version(package) for package in _PACKAGES}
    found |= {
        'system': platform.platform(terse=True),
        'cpu': f'{name}, {torch.get_num_threads()} threads{", VNNI" if vnni else ""}',
    }
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found[f'cuda:{index}'] = f'{properties.name}, {properties.total_memory / _GIB:.0f} GiB'
    if torch.backends.mps.is_available():
        found['mps'] = 'available'
    return found


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return 'not installed'


def _verdict(found: dict[str, Any]) -> str:
    where = f'after {found["steps"]} steps in float64 at {found["img_size"]} px on {found["device"]}'
    return (
        f'{found["model"]}, scales {found["scales"][:12]}: {where}, RepOptSGD on the plain network and SGD on its CSLA '
        f'network differ by {found["deviation"]:.1e} ({"right" if found["right"] else "WRONG"}).'
    )


def _report_run(args: argparse.Namespace) -> None:
    findings = check_run(args.folder)
    width = max(len(each.what) for each in findings)
    lines = [f'{each.status:<7} {each.what:<{width}}  {each.detail}' for each in findings]
    print_result(args, {'run': args.folder, 'findings': [each._asdict() for each in findings]}, '\n'.join(lines))
    _raise_if_failed(findings, args.folder)


def _raise_if_failed(findings: list[Finding], run: str) -> None:
    failed = [each.what for each in findings if each.status == 'failed']
    if failed:
        raise ValueError(f"'{run}' is not as a run should leave it: {', '.join(failed)}. See the lines above.")
