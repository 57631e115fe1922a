"""What a benchmark measures, and on which machine."""

import os
import platform
import sys
from dataclasses import dataclass
from typing import Any

import timm
import torch

from .. import __version__
from ..reporting import cpu_name, package_versions
from ..train.validation import check_device_name

__all__ = ['PRECISIONS', 'Settings', 'choose_device', 'describe_environment', 'versions']

PRECISIONS = {'float32': None, 'bfloat16': torch.bfloat16, 'float16': torch.float16}
"""Name of a precision to the autocast dtype, if any."""


@dataclass(frozen=True)
class Settings:
    """Settings of a benchmark, which ignores the ones that it does not need.

    Attributes:
        model: Name of the target model.
        device: Where to measure.
        rounds: Number of rounds, see `take_turns`.
        batch_sizes: Numbers of images in a batch.
        img_sizes: Heights and widths of the images.
        precisions: Keys of `PRECISIONS`.
        widths: Factors for the channels of all stages.
        depths: Factors for the number of blocks of all stages.
        compiled: Measure compiled optimizers too.
        quick: Skip what takes long.
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

    def report_progress(self, doing: str) -> None:
        """Prints what is being measured to stderr, apart from the results."""
        print(f'measuring {doing} ...', file=sys.stderr, flush=True)


def choose_device(name: str | None) -> torch.device:
    """Returns the device of this name. Defaults to CUDA if available, else the CPU.

    Raises:
        ValueError: If the device is not available, or is neither a CPU nor a CUDA device.
    """
    name = name or ('cuda' if torch.cuda.is_available() else 'cpu')
    if name.split(':')[0] not in ('cpu', 'cuda'):
        raise ValueError(f"--device is '{name}', expected cpu, cuda or cuda:N, whose memory can be measured.")
    check_device_name(name)
    return torch.device(name)


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Describes machine, versions and threads."""
    described: dict[str, Any] = {
        'device': str(device),
        'cpu': cpu_name()[0],
        'cores': os.cpu_count(),
        'threads': torch.get_num_threads(),
        'system': platform.platform(terse=True),
        **versions(),
    }
    if hasattr(os, 'getloadavg'):
        # Shows whether the machine was quiet.
        described['load'] = round(os.getloadavg()[0], 2)
    if device.type == 'cuda':
        described['gpu'] = torch.cuda.get_device_name(device)
        described['cuda'] = torch.version.cuda
        described['cudnn'] = torch.backends.cudnn.version()
        described['tf32'] = torch.backends.cudnn.allow_tf32
    return described


def versions() -> dict[str, Any]:
    """Returns the versions that results depend on."""
    return {
        'python': platform.python_version(),
        **package_versions(torch, timm),
        'repopt_timm': __version__,
    }
