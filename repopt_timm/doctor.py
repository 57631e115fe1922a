"""`repopt-timm doctor`: trains a CSLA network with SGD and its plain twin with RepOptSGD, and compares them."""

import argparse
import platform
from collections.abc import Mapping
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch.nn.modules.batchnorm import _BatchNorm

from . import __version__
from .console import Pairs, number
from .models import ensure_registered
from .names import ModelName
from .reparam import to_plain
from .reporting import add_command, cpu_name, package_versions, print_result
from .sources import ScalesSource, default_scales, load_scales
from .train.validation import check_device_name

# Well above float64 rounding in a short training, well below the drift after two steps with a wrong Grad Mult.
_TOLERANCE = 1e-8


def add_commands(commands: Any) -> None:
    """Adds `doctor` to the commands of `repopt-timm`."""
    parser = add_command(commands, 'doctor', _doctor)
    parser.add_argument('--model', default='repopt_vgg_a0', help='target to train on this machine')
    add = parser.add_argument
    add('--model-kwargs', nargs='*', action=Pairs, default={}, metavar='K=V', help='further model arguments')
    scales = 'scales to train it with [the shipped ones of the model, else initial]'
    parser.add_argument('--scales', metavar='SOURCE', help=scales)
    parser.add_argument('--steps', type=number(int, low=1), default=20, metavar='N', help='steps to train')
    parser.add_argument('--img-size', type=number(int, low=1), default=64, metavar='N', help='height and width')
    parser.add_argument('--device', help='device to train on [cuda if available, else cpu]')


def _doctor(args: argparse.Namespace) -> None:
    check_device_name(args.device)
    device = args.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    machine = {
        'repopt-timm': __version__,
        'python': platform.python_version(),
        **package_versions(torch, timm),
        'system': platform.platform(terse=True),
        'cpu': f'{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads',
        'gpu': ', '.join(map(torch.cuda.get_device_name, range(torch.cuda.device_count()))) or 'none',
    }
    found = check_equivalence(args.model, args.scales, args.steps, args.img_size, device, args.model_kwargs)
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


def check_equivalence(
    model_name: str,
    scales: ScalesSource | None = None,
    steps: int = 20,
    img_size: int = 64,
    device: str = 'cpu',
    model_kwargs: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Trains both networks side by side from the same start, in float64, on the same random images.

    BatchNorm keeps the statistics of the first batch and dropout is off: both networks are then the same function.
    Returns `model`, `scales` (their fingerprint), `deviation` (largest relative difference of a tensor), and `right`.
    """
    ensure_registered(model_name)
    name = ModelName.parse(model_name)
    if not timm.is_model(name.of_kind('csla')):
        raise ValueError(f"There is no CSLA network of '{model_name}', expected a name such as repopt_resnet18.")
    kwargs = {'num_classes': 10, **(model_kwargs or {})}
    torch.manual_seed(0)
    if scales is None:
        try:
            scales = default_scales(model_name)
        except ValueError:
            scales = 'initial'
    found = load_scales(scales, timm.create_model(name.of_kind('target'), **kwargs))
    csla: Any = timm.create_model(name.of_kind('csla'), scales=found, **kwargs).to(device, torch.float64)
    channels = kwargs.get('in_chans') or csla.pretrained_cfg['input_size'][0]
    shape = (8, channels, img_size, img_size)
    for module in csla.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = 1.0
    with torch.no_grad():
        csla.train()(torch.randn(shape, dtype=torch.float64).to(device))
    plain = to_plain(csla.eval())
    pairs = [
        (net, create_optimizer_v2(net, rule, lr=0.01, momentum=0.9, weight_decay=1e-4))
        for net, rule in ((csla, 'sgd'), (plain, 'repopt_sgd'))
    ]
    for step in range(steps):
        images = torch.randn(shape, dtype=torch.float64).to(device)
        labels = torch.randint(kwargs['num_classes'], shape[:1]).to(device)
        for net, optimizer in pairs:
            optimizer.zero_grad()
            loss = F.cross_entropy(net(images), labels)
            loss.backward()
            optimizer.step()
        if not loss.isfinite():
            raise ValueError(f'{model_name} diverges in step {step + 1}, which shows nothing. Try a larger --img-size.')
    merged, other = to_plain(csla).state_dict(), plain.state_dict()
    tensors = [(a.double(), other[key].double()) for key, a in merged.items() if a.is_floating_point()]
    # Python's `max` would pass over a NaN; a tensor's does not.
    deviation = torch.stack([(a - b).norm() / b.norm().clamp_min(1e-300) for a, b in tensors]).max().item()
    return {'model': model_name, 'scales': found.fingerprint, 'deviation': deviation, 'right': deviation <= _TOLERANCE}
