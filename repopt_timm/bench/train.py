"""`bench train`: a training step and inference of a target against those of timm's RepVGG."""

from functools import partial

import torch
from torch import Tensor, nn

from .allocation import allocation, saved_bytes, static_bytes
from .contenders import (
    architecture_of,
    batch,
    forward_pass,
    inference,
    plain_inference_models,
    repvgg,
    target,
    training_step,
)
from .measure import paired, synchronized
from .report import Goal, Row, memory_rows, time_rows
from .settings import Settings

__all__ = ['ACTIVATIONS', 'SAVED', 'TIME', 'bench_train', 'step_rows']

TIME = 'training step'
ACTIVATIONS = 'saved activations'
SAVED = 'saved in all'

# Times that differ by less count as equal on any machine.
_NOISE = 0.02
_GOALS = {TIME: Goal(1, '< 1 x', strict=True), ACTIVATIONS: Goal(0.6, '<= 0.60 x')}


def bench_train(settings: Settings) -> list[Row]:
    """Compares training steps, and inference, for all image sizes, batch sizes and precisions."""
    architecture, device = architecture_of(settings.model), settings.device
    baseline = settings.model.replace('repopt_vgg', 'repvgg')
    checkpointing = f'{settings.model}, grad checkpointing'
    models = {
        baseline: repvgg(architecture, device),
        settings.model: target(architecture, device),
        checkpointing: target(architecture, device, grad_checkpointing=True),
    }
    goals = {what: dict.fromkeys((settings.model, checkpointing), goal) for what, goal in _GOALS.items()}
    rows = step_rows(models, baseline, goals, settings)
    del models
    merged, folded = plain_inference_models(architecture, device)
    return rows + _inference_rows(settings, f'{baseline}, reparameterized', merged, folded)


def step_rows(
    models: dict[str, nn.Module], baseline: str, goals: dict[str, dict[str, Goal]], settings: Settings
) -> list[Row]:
    """Measures time and memory of training steps, for all image sizes, batch sizes and precisions.

    Args:
        models: Name to model.
        baseline: Name of the model that the others are compared with.
        goals: What is measured to name of a model to its goal.
        settings: What to measure.
    """
    rows: list[Row] = []
    for cell, images, labels, precision in _cells(settings):
        settings.tell(f'training step, {cell}')
        steps, saved, peaks = {}, {}, {}
        for name, model in models.items():
            made = allocation(partial(training_step, model, images, labels, precision), settings.device)
            steps[name] = synchronized(made.result, settings.device)
            peaks[name] = static_bytes(model) + made.peak
            saved[name] = _saved(model, images, labels, precision)
        # Each step has been made twice above.
        timings = paired(steps, baseline, settings.rounds, warmup=0)
        rows += time_rows(f'{TIME}, {cell}', timings, baseline, goals.get(TIME))
        for index, what in enumerate((ACTIVATIONS, SAVED)):
            sizes = {name: sizes[index] for name, sizes in saved.items()}
            rows += memory_rows(f'{what}, {cell}', sizes, baseline, goals.get(what))
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
    # The same network once more tells how far apart equal ones are measured.
    again = f'{baseline}, again'
    for cell, images, _, precision in _cells(settings):
        settings.tell(f'inference, {cell}')
        calls = {
            name: synchronized(inference(model, images, precision), settings.device)
            for name, model in ((baseline, merged), (again, merged), (own, folded))
        }
        timings = paired(calls, baseline, 3 * settings.rounds)
        noise = timings[again].ratio
        apart = max(_NOISE, abs(noise.lower - 1), abs(noise.upper - 1))
        goal = Goal(1 + apart, f'1 ± {apart:.3f}', 1 - apart)
        rows += time_rows(f'inference, {cell}', timings, baseline, {own: goal})
    return rows


def _cells(settings: Settings) -> list[tuple[str, Tensor, Tensor, str]]:
    cells = []
    for img_size in settings.img_sizes:
        for size in settings.batch_sizes:
            images, labels = batch(size, img_size, settings.device)
            for precision in settings.precisions:
                cells.append((f'{img_size} px, batch {size}, {precision}', images, labels, precision))
    return cells
