"""The `repopt-timm bench` commands and their arguments."""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..commands import COMMANDS
from ..console import default_text
from ..files import check_output, write_text
from ..reporting import positive
from .settings import PRECISIONS, Settings, choose_device, describe_environment, versions

__all__ = ['add_commands']

_MODEL = 'repopt_vgg_b1'
_QUICK_MODEL = 'test_repopt_vgg'
_ON_CUDA = 'in channels_last, waiting for the GPU at the end of each timing, and the memory of its allocator'


@dataclass(frozen=True)
class _Bench:
    """A benchmark.

    Attributes:
        summary: One line of help.
        defaults: Settings on a CPU, each of which is an argument.
        cuda_defaults: Settings that differ on a CUDA device.
        quick_defaults: Settings that differ with `--quick`.
        on_cuda: What it measures on a CUDA device. Empty if it runs nothing.
    """

    summary: str
    defaults: dict[str, Any]
    cuda_defaults: dict[str, Any] = field(default_factory=dict)
    quick_defaults: dict[str, Any] = field(default_factory=dict)
    on_cuda: str = ''


_BENCHES = {
    'optimizer': _Bench(
        'a step of the RepOptimizers against the fused plain optimizers, and the memory that it takes',
        {'rounds': 20},
        {'rounds': 50},
        {'rounds': 2},
        f'the same optimizers, {_ON_CUDA}',
    ),
    'train': _Bench(
        "a training step and inference against those of timm's RepVGG, or a training step of another network with "
        'branches against that of its plain twin',
        {'rounds': 5, 'batch_sizes': (4,), 'img_sizes': (64, 224), 'precisions': ('float32', 'bfloat16')},
        {'rounds': 20, 'batch_sizes': (64,)},
        {'rounds': 2, 'batch_sizes': (2,), 'img_sizes': (32,)},
        f'the same models with 64 images in a batch, {_ON_CUDA}',
    ),
    'search': _Bench(
        'a step of a Hyper-Search against one of the plain target',
        {'rounds': 5, 'batch_sizes': (8,), 'img_sizes': (224,), 'precisions': ('float32',)},
        {'rounds': 20, 'batch_sizes': (64,)},
        {'rounds': 2, 'batch_sizes': (2,), 'img_sizes': (32,)},
        f'the same models with 64 images in a batch, {_ON_CUDA}',
    ),
    'scaling': _Bench(
        'how time and memory of a training step grow with width, depth, batch and resolution; the first batch and '
        'image size stay fixed while something else varies',
        {
            'rounds': 3,
            'batch_sizes': (8, 2, 4, 16, 32),
            'img_sizes': (64, 32, 96, 128, 224),
            'widths': (0.25, 0.5, 1.0, 1.5),
            'depths': (0.5, 1.0, 1.5, 2.0),
        },
        {'rounds': 10, 'batch_sizes': (32, 8, 16, 64, 128), 'img_sizes': (224, 96, 128, 160, 288)},
        {'rounds': 2, 'batch_sizes': (2, 4), 'img_sizes': (32, 64), 'widths': (1.0, 2.0), 'depths': (1.0, 2.0)},
        f'larger batches and images, {_ON_CUDA}',
    ),
    'memory': _Bench(
        'the memory of a training step and the largest batch that fits GPUs, computed without a GPU',
        {'batch_sizes': (32, 64, 128, 256), 'img_sizes': (224,), 'precisions': ('float32', 'bfloat16')},
    ),
}

_FLAGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    'rounds': ('--repeats', 'rounds to time', {'type': positive(int), 'metavar': 'N'}),
    'batch_sizes': ('--batch-size', 'batch sizes', {'type': positive(int), 'metavar': 'N', 'nargs': '+'}),
    'img_sizes': ('--img-size', 'image sizes', {'type': positive(int), 'metavar': 'N', 'nargs': '+'}),
    'precisions': ('--precision', 'dtype of autocast', {'choices': tuple(PRECISIONS), 'nargs': '+'}),
    'widths': ('--width', 'factors for the channels', {'type': positive(float), 'metavar': 'N', 'nargs': '+'}),
    'depths': ('--depth', 'factors for the number of blocks', {'type': positive(float), 'metavar': 'N', 'nargs': '+'}),
}


def add_commands(commands: Any) -> None:
    """Adds `bench` and its benchmarks to the commands of `repopt-timm`.

    Args:
        commands: What `ArgumentParser.add_subparsers` returned.
    """
    parser = commands.add_parser('bench', help=COMMANDS['bench'].summary)
    benchmarks = parser.add_subparsers(required=True, metavar='BENCHMARK')
    for name, bench in _BENCHES.items():
        text = bench.summary[0].upper() + bench.summary[1:] + '.'
        command = benchmarks.add_parser(name, help=bench.summary, description=text)
        command.set_defaults(run=_run, bench=name)
        add = command.add_argument
        text = f'[{_MODEL}; {_QUICK_MODEL} with --quick]'
        if name == 'train':
            text = f'RepOpt-VGG targets, or twins such as repopt_mobileone_s0 {text}'
            add('--model', dest='models', metavar='NAME', nargs='+', help=text)
        else:
            add('--model', dest='models', metavar='NAME', nargs=1, help=f'RepOpt-VGG target {text}')
        add('--quick', action='store_true', help='a tiny model and few rounds, to see that it works')
        add('--json', metavar='FILE', help='write settings, environment and results as JSON')
        add('--plot', metavar='PNG', help='draw the results')
        if bench.on_cuda:
            add('--device', help='device to measure on [cuda if available, else cpu]')
            add('--threads', type=positive(int), metavar='N', help="threads on the CPU [torch's choice]")
        for setting in bench.defaults:
            flag, text, options = _FLAGS[setting]
            add(flag, dest=setting, help=text + _default(setting, bench), **options)
        if name == 'optimizer':
            add('--no-compiled', action='store_false', dest='compiled', help='skip compiled optimizers')


def _default(setting: str, bench: _Bench) -> str:
    text = default_text(bench.defaults[setting])
    on_cuda = default_text(bench.cuda_defaults.get(setting))
    return f'{text[:-1]}; on CUDA {on_cuda[2:]}' if on_cuda else text


def _settings(args: argparse.Namespace, bench: _Bench) -> list[Settings]:
    """Returns the settings of each model."""
    device = choose_device(args.device if bench.on_cuda else 'cpu')
    values = {**bench.defaults, **(bench.cuda_defaults if device.type == 'cuda' else {})}
    if args.quick:
        values.update(bench.quick_defaults)
    given = {name: getattr(args, name) for name in values if getattr(args, name) is not None}
    values.update({name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})
    models = args.models or [_QUICK_MODEL if args.quick else _MODEL]
    compiled = getattr(args, 'compiled', True)
    return [Settings(model, device, quick=args.quick, compiled=compiled, **values) for model in models]


def _run(args: argparse.Namespace) -> None:
    # Imported when a benchmark runs, so that `--help` does not wait for them.
    from ..plot import check_picture
    from .memory import MEMORY_NOTE, bench_memory, memory_table
    from .optimizer_step import bench_optimizer
    from .pictures import plot_memory, plot_ratios, plot_scaling
    from .rows import RATIO_NOTE, Row, as_json, ratio_table
    from .scaling import bench_scaling
    from .training_step import bench_search, bench_train

    runs: dict[str, Callable[[Settings], list[Row]]] = {
        'optimizer': bench_optimizer,
        'train': bench_train,
        'search': bench_search,
        'scaling': bench_scaling,
        'memory': bench_memory,
    }
    plots: dict[str, Callable[[Sequence[Row], Path, str], None]] = {'scaling': plot_scaling, 'memory': plot_memory}
    bench = _BENCHES[args.bench]
    all_settings = _settings(args, bench)
    settings = all_settings[0]
    # Before minutes of measuring.
    json_file = args.json and check_output(args.json)
    picture = args.plot and check_picture(args.plot)
    if getattr(args, 'threads', None):
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    models = ', '.join(each.model for each in all_settings)
    environment = describe_environment(settings.device) if bench.on_cuda else versions()
    rows = [row for each in all_settings for row in runs[args.bench](each)]

    table, note = (memory_table, MEMORY_NOTE) if args.bench == 'memory' else (ratio_table, RATIO_NOTE)
    print('\n'.join(f'{name:<13} {value}' for name, value in environment.items()))
    print(f'\n{table(rows)}\n\n{note}')
    if bench.on_cuda and settings.device.type != 'cuda':
        print(f'\nOn a CUDA device it would measure {bench.on_cuda}.')
    if json_file:
        results = {
            'benchmark': args.bench,
            'settings': {**vars(settings), 'device': str(settings.device), 'model': models},
            'environment': environment,
            'rows': [as_json(row) for row in rows],
        }
        write_text(json_file, json.dumps(results, indent=2) + '\n')
    if picture:
        title = f'{args.bench}: {models}, torch {environment["torch"]}'
        if bench.on_cuda:
            title += ', ' + (environment.get('gpu') or f'{environment["cpu"]}, {environment["threads"]} threads')
        plots.get(args.bench, plot_ratios)(rows, picture, title)
