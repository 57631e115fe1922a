"""Arguments of `repopt-timm bench`, and what its subcommands have in common."""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..files import write_text
from .contenders import PRECISIONS
from .environment import choose_device, describe_environment, versions
from .memory import RESERVE, bench_memory, memory_table
from .optimizer import bench_optimizer
from .pictures import plot_memory, plot_ratios, plot_scaling, require_matplotlib
from .report import Row, as_json, ratio_table
from .scaling import bench_scaling
from .search import bench_search
from .settings import Settings
from .train import bench_train

__all__ = ['add_bench_commands']

_RATIO_NOTE = (
    'Times are medians. The contenders took turns in one process, in rounds whose order rotated; a ratio is the median '
    "of the rounds' ratios."
)
_MEMORY_NOTE = (
    'In GiB. weights: parameters, gradients and momentum; image: activations that are saved for each image; batch N: '
    'peak of a training step; fits N GB: the largest batch whose peak leaves '
    f"{RESERVE:.0%} of the memory (1 GB is 2^30 bytes) to what is not counted: workspaces of convolutions, CUDA's "
    "context, fragmentation, DistributedDataParallel's copy of the gradients. float16 takes as much as bfloat16."
)


@dataclass(frozen=True)
class _Bench:
    """A subcommand.

    Attributes:
        run: Makes the rows.
        summary: One line of help.
        on_cuda: What it would measure on a CUDA device.
        defaults: Settings on a CPU; each one is an argument.
        cuda_defaults: Settings that differ on a CUDA device.
        quick_defaults: Settings that differ with `--quick`.
        measures: Whether it runs something, on some device, instead of working it out.
        table: Writes the rows as text.
        note: Says how to read the table.
        plot: Draws the rows.
    """

    run: Callable[[Settings], list[Row]]
    summary: str
    on_cuda: str
    defaults: dict[str, Any]
    cuda_defaults: dict[str, Any]
    quick_defaults: dict[str, Any]
    measures: bool = True
    table: Callable[[Sequence[Row]], str] = ratio_table
    note: str = _RATIO_NOTE
    plot: Callable[[Sequence[Row], str, str], None] = plot_ratios


_ON_CUDA = 'in channels_last, waiting for the GPU at the end of each timing, and the memory of its allocator'
_BENCHES = {
    'optimizer': _Bench(
        bench_optimizer,
        'a step of the RepOptimizers against the fused plain optimizers, and the memory that it takes',
        f'the same optimizers, {_ON_CUDA}',
        {'rounds': 20},
        {'rounds': 50},
        {'rounds': 2},
    ),
    'train': _Bench(
        bench_train,
        "a training step and inference against those of timm's RepVGG",
        f'the same models with 64 images in a batch, {_ON_CUDA}',
        {'rounds': 5, 'batch_sizes': (4,), 'img_sizes': (64, 224), 'precisions': ('float32', 'bfloat16')},
        {'rounds': 20, 'batch_sizes': (64,)},
        {'rounds': 2, 'batch_sizes': (2,), 'img_sizes': (32,)},
    ),
    'search': _Bench(
        bench_search,
        'a step of a Hyper-Search against one of the plain target',
        f'the same models with 64 images in a batch, {_ON_CUDA}',
        {'rounds': 5, 'batch_sizes': (8,), 'img_sizes': (224,), 'precisions': ('float32',)},
        {'rounds': 20, 'batch_sizes': (64,)},
        {'rounds': 2, 'batch_sizes': (2,), 'img_sizes': (32,)},
    ),
    'scaling': _Bench(
        bench_scaling,
        'how time and memory of a training step grow with width, depth, batch and resolution; the first batch and '
        'image size are kept while something else varies',
        f'larger batches and images, {_ON_CUDA}',
        {
            'rounds': 3,
            'batch_sizes': (8, 2, 4, 16, 32),
            'img_sizes': (64, 32, 96, 128, 224),
            'widths': (0.25, 0.5, 1.0, 1.5),
            'depths': (0.5, 1.0, 1.5, 2.0),
        },
        {'rounds': 10, 'batch_sizes': (32, 8, 16, 64, 128), 'img_sizes': (224, 96, 128, 160, 288)},
        {'rounds': 2, 'batch_sizes': (2, 4), 'img_sizes': (32, 64), 'widths': (1.0, 2.0), 'depths': (1.0, 2.0)},
        plot=plot_scaling,
    ),
    'memory': _Bench(
        bench_memory,
        'the memory of a training step and the largest batch that fits GPUs, worked out without a GPU',
        '',
        {'batch_sizes': (32, 64, 128, 256), 'img_sizes': (224,), 'precisions': ('float32', 'bfloat16')},
        {},
        {},
        measures=False,
        table=memory_table,
        note=_MEMORY_NOTE,
        plot=plot_memory,
    ),
}
_QUICK_MODEL = 'test_repopt_vgg'
_MODEL = 'repopt_vgg_b1'


def add_bench_commands(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommands of `repopt-timm bench` to its parser."""
    commands = parser.add_subparsers(required=True, metavar='BENCHMARK')
    for name, bench in _BENCHES.items():
        text = bench.summary[0].upper() + bench.summary[1:] + '.'
        command = commands.add_parser(name, help=bench.summary, description=text)
        command.set_defaults(run=_run, bench=name)
        add = command.add_argument
        add('--model', metavar='NAME', help=f'RepOpt-VGG target (default: {_MODEL}; {_QUICK_MODEL} with --quick)')
        add('--quick', action='store_true', help='a tiny model and few rounds, to see that it works')
        add('--json', metavar='FILE', help='write settings, environment and results as JSON')
        add('--plot', metavar='PNG', help='draw the results')
        if bench.measures:
            add('--device', help='cuda or cpu (default: cuda where there is one)')
            add('--threads', type=_positive(int), metavar='N', help="threads on the CPU (default: torch's choice)")
        for setting in bench.defaults:
            flag, kind, text = _FLAGS[setting]
            several: dict[str, Any] = {} if setting == 'rounds' else {'nargs': '+'}
            allowed: dict[str, Any] = {'choices': tuple(PRECISIONS)} if setting == 'precisions' else {'metavar': 'N'}
            add(flag, dest=setting, type=kind, help=f'{text} ({_default(setting, bench)})', **several, **allowed)
        if name == 'optimizer':
            add('--no-compiled', action='store_false', dest='compiled', help='leave compiled optimizers out')


def _default(setting: str, bench: _Bench) -> str:
    def shown(value: Any) -> str:
        return ' '.join(map(str, value)) if isinstance(value, tuple) else str(value)

    text = f'default: {shown(bench.defaults[setting])}'
    return f'{text}; on CUDA {shown(bench.cuda_defaults[setting])}' if setting in bench.cuda_defaults else text


def _positive(kind: type) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        value = kind(text)
        if value <= 0:
            raise argparse.ArgumentTypeError(f'expected a number above 0, but got {text}')
        return value

    parse.__name__ = kind.__name__
    return parse


_FLAGS: dict[str, tuple[str, Callable[[str], Any], str]] = {
    'rounds': ('--repeats', _positive(int), 'rounds to time'),
    'batch_sizes': ('--batch-size', _positive(int), 'batch sizes'),
    'img_sizes': ('--img-size', _positive(int), 'image sizes'),
    'precisions': ('--precision', str, 'what autocast computes in'),
    'widths': ('--width', _positive(float), 'factors for the channels'),
    'depths': ('--depth', _positive(float), 'factors for the number of blocks'),
}


def _settings(args: argparse.Namespace, bench: _Bench) -> Settings:
    device = choose_device(args.device if bench.measures else 'cpu')
    values = {**bench.defaults, **(bench.cuda_defaults if device.type == 'cuda' else {})}
    if args.quick:
        values.update(bench.quick_defaults)
    given = {name: getattr(args, name) for name in values if getattr(args, name) is not None}
    values.update({name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})
    model = args.model or (_QUICK_MODEL if args.quick else _MODEL)
    return Settings(model, device, quick=args.quick, compiled=getattr(args, 'compiled', True), **values)


def _run(args: argparse.Namespace) -> None:
    bench = _BENCHES[args.bench]
    settings = _settings(args, bench)
    if args.plot:
        # Before minutes of measuring.
        require_matplotlib()
    if getattr(args, 'threads', None):
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    environment = describe_environment(settings.device) if bench.measures else versions()
    rows = bench.run(settings)
    _write(args, settings, environment, rows)


def _write(args: argparse.Namespace, settings: Settings, environment: dict[str, Any], rows: list[Row]) -> None:
    bench = _BENCHES[args.bench]
    print('\n'.join(f'{name:<13} {value}' for name, value in environment.items()))
    print(f'\n{bench.table(rows)}\n\n{bench.note}')
    if bench.measures and settings.device.type != 'cuda':
        print(f'\nOn a CUDA device it would measure {bench.on_cuda}.')
    if args.json:
        told = {
            'benchmark': args.bench,
            'settings': {**vars(settings), 'device': str(settings.device)},
            'environment': environment,
            'rows': [as_json(row) for row in rows],
        }
        write_text(args.json, json.dumps(told, indent=2) + '\n')
    if args.plot:
        title = f'{args.bench}: {settings.model}, torch {environment["torch"]}'
        if bench.measures:
            title += ', ' + (environment.get('gpu') or f'{environment["cpu"]}, {environment["threads"]} threads')
        bench.plot(rows, args.plot, title)
