"""Where a measurement was made."""

import os
import platform
from pathlib import Path
from typing import Any

import timm
import torch

from .. import __version__

__all__ = ['choose_device', 'describe_environment', 'versions']


def choose_device(name: str | None) -> torch.device:
    """Returns the device of this name; CUDA where there is one, else the CPU, without a name.

    Raises:
        ValueError: If the device is not there, or is neither a CPU nor a CUDA device.
    """
    name = name or ('cuda' if torch.cuda.is_available() else 'cpu')
    if name.split(':')[0] not in ('cpu', 'cuda'):
        raise ValueError(f"--device {name}: expected 'cpu', 'cuda' or 'cuda:N', where memory can be measured.")
    device = torch.device(name)
    if device.type == 'cuda' and not torch.cuda.is_available():
        raise ValueError(f'--device {name}: torch {torch.__version__} finds no CUDA device here. Use --device cpu.')
    return device


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Describes machine, versions and threads."""
    described: dict[str, Any] = {
        'device': str(device),
        'cpu': _cpu_name(),
        'cores': os.cpu_count(),
        'threads': torch.get_num_threads(),
        'system': platform.platform(terse=True),
        **versions(),
    }
    if hasattr(os, 'getloadavg'):
        # Tells whether the machine was quiet.
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
        'torch': torch.__version__,
        'timm': timm.__version__,
        'repopt_timm': __version__,
    }


def _cpu_name() -> str:
    try:
        lines = Path('/proc/cpuinfo').read_text(encoding='utf-8').splitlines()
    except OSError:
        lines = []
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    return names[0] if names else platform.processor() or platform.machine()
