"""`bench train` and `bench search`: training steps and inference of models against each other."""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ..architectures import ARCHITECTURES
from ..model_size import count_parameters
from ..names import PREFIX
from .allocation import allocation, saved_bytes, static_bytes
from .bench_models import (
    architecture_of,
    batch,
    forward_pass,
    hyper_search,
    inference,
    plain_inference_models,
    repvgg,
    separate_branches,
    target,
    time_in_turns,
    training_step,
    twin_models,
)
from .rows import Goal, Row, Spread, memory_rows, ratio_rows
from .settings import Settings

__all__ = ['bench_search', 'bench_train']

_TIME = 'training step'
_ACTIVATIONS = 'saved activations'
_SAVED = 'saved in all'

# Times that differ by less count as equal on any machine.
_NOISE = 0.02
_TRAIN_GOALS = {_TIME: Goal(1, '< 1 x', strict=True), _ACTIVATIONS: Goal(0.6, '<= 0.60 x')}
_SEARCH_GOALS = {
    _TIME: Goal(1.15, '<= 1.15 x'),
    _ACTIVATIONS: Goal(1.05, '<= 1.05 x'),
    _SAVED: Goal(1.05, '<= 1.05 x'),
}


# What the branches of a network cost: its time over that of its plain twin.
_TWIN_GOALS = {'repopt_mobileone_s0': {_TIME: Goal(math.inf, '>= 4 x', least=4)}}


def bench_train(settings: Settings) -> list[Row]:
    """Compares training steps, and inference, for all image sizes, batch sizes and precisions."""
    if settings.model not in ARCHITECTURES:
        return _bench_twin(settings)
    architecture, device = architecture_of(settings.model), settings.device
    baseline = settings.model.replace('repopt_vgg', 'repvgg')
    checkpointing = f'{settings.model}, grad checkpointing'
    models = {
        baseline: repvgg(architecture, device),
        settings.model: target(architecture, device),
        checkpointing: target(architecture, device, grad_checkpointing=True),
    }
    rows = _step_rows(models, baseline, _TRAIN_GOALS, (settings.model, checkpointing), settings)
    del models
    merged, folded = plain_inference_models(architecture, device)
    return rows + _inference_rows(settings, f'{baseline}, reparameterized', merged, folded)


def _bench_twin(settings: Settings) -> list[Row]:
    """Compares a multi-branch network of timm with its plain twin."""
    plain, branches = twin_models(settings.model, settings.device)
    original = settings.model.removeprefix(PREFIX)
    models = {settings.model: plain, original: branches}
    millions = {name: [round(count_parameters(model) / 1e6, 2)] for name, model in models.items()}
    rows = _step_rows(models, settings.model, _TWIN_GOALS.get(settings.model, {}), (original,), settings)
    return rows + ratio_rows(f'parameters in training, {original}', 'M', millions, settings.model)


def bench_search(settings: Settings) -> list[Row]:
    """Compares a Hyper-Search with merged kernels, and with branches that run one by one, with the target."""
    architecture, device = architecture_of(settings.model), settings.device
    searched = f'{settings.model}_hs'
    model = hyper_search(architecture, device)
    models = {
        settings.model: target(architecture, device),
        searched: model,
        f'{searched}, three separate branches': separate_branches(model),
    }
    return _step_rows(models, settings.model, _SEARCH_GOALS, (searched,), settings)


def _step_rows(
    models: dict[str, nn.Module], baseline: str, goals: dict[str, Goal], candidates: Sequence[str], settings: Settings
) -> list[Row]:
    """Measures time and memory of training steps.

    Args:
        models: Name to model.
        baseline: Name of the model that the others are compared with.
        goals: What is measured to the goal for it.
        candidates: Names of the models that the goals are for.
        settings: What to measure.
    """

    def goals_for(what: str) -> dict[str, Goal]:
        return dict.fromkeys(candidates, goals[what]) if what in goals else {}

    rows: list[Row] = []
    for cell, images, labels, precision in _cells(settings):
        settings.report_progress(f'training step, {cell}')
        steps, peaks = {}, {}
        saved: dict[str, dict[str, int]] = {_ACTIVATIONS: {}, _SAVED: {}}
        for name, model in models.items():
            made = allocation(partial(training_step, model, images, labels, precision), settings.device)
            steps[name] = made.result
            peaks[name] = static_bytes(model) + made.peak
            saved[_ACTIVATIONS][name], saved[_SAVED][name] = _saved(model, images, labels, precision)
        seconds = time_in_turns(steps, settings.device, settings.rounds)
        rows += ratio_rows(f'{_TIME}, {cell}', 's', seconds, baseline, goals_for(_TIME))
        for what, sizes in saved.items():
            rows += memory_rows(f'{what}, {cell}', sizes, baseline, goals_for(what))
        rows += memory_rows(f'peak of a step, {cell}', peaks, baseline)
    return rows


def _saved(model: nn.Module, images: Tensor, labels: Tensor, precision: str) -> tuple[int, int]:
    """Returns the memory of the activations that a forward pass saves, and of all that it saves.

    Copies of kernels, merged or cast to another type, are saved as well. Activations are what one more image adds to.
    """
    more = torch.cat([images, images[:1]]), torch.cat([labels, labels[:1]])
    total, larger = (
        saved_bytes(model, forward_pass(model, *inputs, precision), inputs) for inputs in ((images, labels), more)
    )
    return len(images) * (larger - total), total


def _inference_rows(settings: Settings, baseline: str, merged: nn.Module, folded: nn.Module) -> list[Row]:
    rows: list[Row] = []
    own = f'{settings.model}, BatchNorm folded'
    # How far apart the same network measures against itself bounds what counts as equal.
    again = f'{baseline}, again'
    for cell, images, _, precision in _cells(settings):
        settings.report_progress(f'inference, {cell}')
        models = {baseline: merged, again: merged, own: folded}
        calls = {name: inference(model, images, precision) for name, model in models.items()}
        seconds = time_in_turns(calls, settings.device, 3 * settings.rounds, warmup=2)
        noise = Spread.of([second / first for first, second in zip(seconds[baseline], seconds[again])])
        apart = max(_NOISE, abs(noise.lower - 1), abs(noise.upper - 1))
        goal = Goal(1 + apart, f'1 ± {apart:.3f}', 1 - apart)
        rows += ratio_rows(f'inference, {cell}', 's', seconds, baseline, {own: goal})
    return rows


def _cells(settings: Settings) -> list[tuple[str, Tensor, Tensor, str]]:
    cells = []
    for img_size in settings.img_sizes:
        for size in settings.batch_sizes:
            images, labels = batch(size, img_size, settings.device)
            for precision in settings.precisions:
                cells.append((f'{img_size} px, batch {size}, {precision}', images, labels, precision))
    return cells
