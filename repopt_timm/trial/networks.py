"""What the networks of a trial cost: parameters, saved activations, time of a step."""

import argparse
import json
import logging
import statistics
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from ..bench.allocation import saved_bytes
from ..bench.bench_models import forward_pass, time_in_turns, training_step
from ..errors import explaining
from ..files import write_text
from ..model_size import count_parameters
from ..train.validation import check_layout
from .arms import arm_of
from .trial_folder import has_trained
from .trial_runs import TrialRuns

__all__ = ['NETWORKS_FILE', 'measure_networks', 'plain_network', 'read_networks']

NETWORKS_FILE = 'networks.json'
_ROUNDS = 5

_logger = logging.getLogger(__name__)


def read_networks(folder: Path) -> dict[str, dict[str, float]]:
    """Reads what `measure_networks` wrote; nothing if it did not."""
    path = folder / NETWORKS_FILE
    return json.loads(path.read_text(encoding='utf-8')) if path.exists() else {}


def measure_networks(
    runs: TrialRuns, num_classes: int | None, device: torch.device, threads: int | None = None
) -> None:
    """Measures the network of each arm, and writes `networks.json`: arm to numbers.

    `parameters` in training, `convolutions`, `activations` (bytes that a forward pass saves for each image, in the
    precision of the trial), and `step_seconds` (median of a training step; the networks take turns, so that ratios hold
    on a busy machine).

    Args:
        runs: The trial.
        num_classes: Number of classes.
        device: Device of the runs.
        threads: Threads of a run.

    Raises:
        ValueError: If a network cannot be made, or does not take images of this size.
    """
    # Until something has trained they may be of other arguments.
    known = read_networks(runs.folder) if has_trained(runs.folder) else {}
    if set(runs.settings.arms) <= set(known):
        return
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        found = _measured(runs, num_classes, device)
    finally:
        torch.set_num_threads(before)
    if device.type == 'cuda':
        # The runs are other processes.
        torch.cuda.empty_cache()
    arms = {arm: found[arm_of(arm).network_key] for arm in runs.settings.arms}
    write_text(runs.folder / NETWORKS_FILE, json.dumps({**known, **arms}, indent=2) + '\n')


def _measured(runs: TrialRuns, num_classes: int | None, device: torch.device) -> dict[str, dict[str, float]]:
    """Returns key of a network to its numbers."""
    shared = runs.shared
    size = tuple(shared.input_size)
    precision = shared.amp_dtype if shared.amp else 'float32'
    layout = torch.channels_last if shared.channels_last else torch.contiguous_format
    images = torch.randn(shared.batch_size, *size, device=device).to(memory_format=layout)
    labels = torch.randint(0, shared.num_classes or num_classes or 1000, (shared.batch_size,), device=device)
    arms = {arm_of(arm).network_key: arm for arm in runs.settings.arms}
    _logger.info(f'Measures training steps on {device}, {shared.batch_size} images of {size} each.')
    found, steps = {}, {}
    for key, arm in arms.items():
        model = _network(runs, arm, num_classes).to(device).to(memory_format=layout)
        if shared.channels_last:
            check_layout(model, size, device)
        with explaining(f'The network of arm {arm} does not train on images of {size}'):
            found[key] = _size(model, images, labels, precision)
            steps[key] = training_step(model, images, labels, precision)
    for key, values in time_in_turns(steps, device, _ROUNDS).items():
        found[key]['step_seconds'] = statistics.median(values)
    return found


def plain_network(runs: TrialRuns, num_classes: int | None = 1000) -> nn.Module:
    """Makes the plain network of a trial."""
    return _make(runs.settings.model, runs.shared, num_classes, runs.shared.model_kwargs)


def _network(runs: TrialRuns, arm: str, num_classes: int | None) -> nn.Module:
    arguments = runs.training(arm, 0, 0.1).arguments
    return _make(arguments['model'], runs.shared, num_classes, arguments.get('model_kwargs', runs.shared.model_kwargs))


def _make(name: str, shared: argparse.Namespace, num_classes: int | None, kwargs: dict[str, Any]) -> nn.Module:
    with explaining(f'timm cannot make {name} with --model-kwargs {kwargs}'):
        model: nn.Module = timm.create_model(
            name,
            num_classes=shared.num_classes or num_classes,
            in_chans=shared.in_chans or shared.input_size[0],
            global_pool=shared.gp,
            **kwargs,
        )
    return model


def _size(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, precision: str) -> dict[str, float]:
    saved = []
    for count in (2, 3):
        inputs = images[:count], labels[:count]
        # What is saved for the kernels alone does not depend on the number of images.
        saved.append(saved_bytes(model.train(), forward_pass(model, *inputs, precision), inputs))
    return {
        'parameters': count_parameters(model),
        'convolutions': sum(isinstance(module, nn.Conv2d) for module in model.modules()),
        'activations': saved[1] - saved[0],
    }
