"""`bench scaling`: how time and memory of a training step grow with width, depth, batch and resolution."""

from dataclasses import dataclass, replace
from functools import partial

from ..architectures import Architecture
from .allocation import allocation, static_bytes
from .bench_models import architecture_of, batch, repvgg, target, time_in_turns, training_step
from .rows import Row, memory_rows, ratio_rows
from .settings import Settings

__all__ = ['AXES', 'bench_scaling']

AXES = ('width', 'depth', 'batch', 'resolution')


@dataclass(frozen=True)
class _Point:
    """Factors for width and depth, number of images, image size."""

    width: float
    depth: float
    batch: float
    resolution: float


def bench_scaling(settings: Settings) -> list[Row]:
    """Measures training steps along four axes through one point: factors 1, the first batch and image size."""
    origin = _Point(1, 1, settings.batch_sizes[0], settings.img_sizes[0])
    values = {
        'width': settings.widths,
        'depth': settings.depths,
        'batch': settings.batch_sizes,
        'resolution': settings.img_sizes,
    }
    measured: dict[_Point, tuple[dict[str, list[float]], dict[str, int]]] = {}
    baseline = settings.model.replace('repopt_vgg', 'repvgg')
    rows: list[Row] = []
    for axis in AXES:
        points = {value: replace(origin, **{axis: value}) for value in sorted(values[axis])}
        for point in points.values():
            if point not in measured:
                settings.report_progress(_describe(point))
                measured[point] = _measure(point, baseline, settings)
        times, peaks = [], []
        for value, point in points.items():
            seconds, sizes = measured[point]
            times += ratio_rows(f'step time against {axis}', 's', seconds, baseline, at=value)
            peaks += memory_rows(f'peak memory against {axis}', sizes, baseline, at=value)
        rows += times + peaks
    return rows


def _describe(point: _Point) -> str:
    return f'width {point.width:g}, depth {point.depth:g}, batch {point.batch:g}, {point.resolution:g} px'


def _measure(point: _Point, baseline: str, settings: Settings) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Returns the seconds of each round and the peak memory of each model."""
    architecture = _scaled(architecture_of(settings.model), point.width, point.depth)
    images, labels = batch(int(point.batch), int(point.resolution), settings.device)
    models = {
        baseline: repvgg(architecture, settings.device),
        settings.model: target(architecture, settings.device),
    }
    steps, peaks = {}, {}
    for name, model in models.items():
        made = allocation(partial(training_step, model, images, labels), settings.device)
        steps[name] = made.result
        peaks[name] = static_bytes(model) + made.peak
    return time_in_turns(steps, settings.device, settings.rounds), peaks


def _scaled(architecture: Architecture, width: float, depth: float) -> Architecture:
    return replace(
        architecture,
        widths=tuple(max(8, round(channels * width / 8) * 8) for channels in architecture.widths),
        # The last stage has one block in every variant. A second one would weigh almost as much as the network.
        depths=tuple(max(1, round(blocks * depth)) if blocks > 1 else 1 for blocks in architecture.depths),
    )
