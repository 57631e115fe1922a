#!/usr/bin/env python3
"""What the scales are worth: RepOpt-VGG-A0 with several scales, with plain SGD, and RepVGG-A0, on CIFAR-10.

    python compare.py split cifar10 split          # a folder of links: the training images, one in ten held out
    python compare.py tune split --output runs     # learning rates, on these            -> tuning.csv
    python compare.py train cifar10 --output runs  # two seeds with the best of them      -> runs/*.csv
    python compare.py report                       # ../README.md and comparison.png from the CSV files

Runs that were killed continue where they stopped. `--jobs 2` trains two at a time, with one thread each.
"""

import argparse
import csv
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from repopt_timm import Scales
from repopt_timm.files import write_text
from repopt_timm.plot import save_figure, subplots

HERE = Path(__file__).resolve().parent
README = HERE.parent / 'README.md'
RECIPE = HERE.parents[1] / 'configs' / 'cifar10_trial.yaml'
TUNING = HERE / 'tuning.csv'
RUNS = HERE / 'runs'
PICTURE = HERE / 'comparison.png'
ONES = 'ones.safetensors'
BEGIN, END = '<!-- compare.py: begin -->', '<!-- compare.py: end -->'

LEARNING_RATES = (0.025, 0.05, 0.1)
SEEDS = (0, 1)
EPOCHS, WARMUP_EPOCHS = 15, 2
TUNING_EPOCHS, TUNING_WARMUP_EPOCHS = 4, 1
ARCHITECTURE = 'repopt_vgg_a0'


@dataclass(frozen=True)
class Arm:
    """One way to train. `scales` is a source for `--scales`."""

    title: str
    model: str
    opt: str
    scales: str = ''


ARMS = {
    'searched': Arm('RepOpt-VGG, searched scales', ARCHITECTURE, 'repopt_sgd', str(HERE / 'searched.safetensors')),
    'initial': Arm('RepOpt-VGG, initial values, no search', ARCHITECTURE, 'repopt_sgd', 'initial'),
    'ones': Arm('RepOpt-VGG, all scales 1', ARCHITECTURE, 'repopt_sgd', ONES),
    'plain': Arm('the same plain network, SGD', ARCHITECTURE, 'sgd'),
    'repvgg': Arm('RepVGG', 'repvgg_a0', 'sgd'),
}


def split(source: Path, target: Path) -> None:
    """Links the training images of `source` into `target`, every tenth of a class for validation."""
    for folder in sorted((source / 'train').resolve().iterdir()):
        for index, image in enumerate(sorted(folder.iterdir())):
            link = target / ('validation' if index % 10 == 9 else 'train') / folder.name / image.name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(image)


def tune(data: Path, output: Path, jobs: int) -> None:
    """Tries the learning rates of all arms in short runs, and writes their accuracies to `tuning.csv`."""
    runs = {f'tune-{name}-{lr}': (ARMS[name], lr) for name in ARMS for lr in LEARNING_RATES}
    schedule = ['--epochs', TUNING_EPOCHS, '--warmup-epochs', TUNING_WARMUP_EPOCHS, '--val-interval', TUNING_EPOCHS]
    _train_all({name: _arguments(arm, lr, SEEDS[0]) + schedule for name, (arm, lr) in runs.items()}, data, output, jobs)
    rows = ['arm,lr,top1']
    for name in ARMS:
        for lr in LEARNING_RATES:
            rows.append(f'{name},{lr},{_history(output / f"tune-{name}-{lr}" / "summary.csv")[-1]["eval_top1"]:.2f}')
    write_text(TUNING, '\n'.join(rows) + '\n')


def train(data: Path, output: Path, jobs: int) -> None:
    """Trains every arm with every seed at its best learning rate, and copies the runs' summaries to `runs/`."""
    schedule = ['--epochs', EPOCHS, '--warmup-epochs', WARMUP_EPOCHS]
    rates = best_rates()
    runs = {f'{name}-{seed}': _arguments(ARMS[name], rates[name], seed) + schedule for seed in SEEDS for name in ARMS}
    _train_all(runs, data, output, jobs)
    RUNS.mkdir(exist_ok=True)
    for name in runs:
        shutil.copyfile(output / name / 'summary.csv', RUNS / f'{name}.csv')


def best_rates() -> dict[str, float]:
    """Reads each arm's learning rate from `tuning.csv`."""
    best: dict[str, tuple[float, float]] = {}
    with open(TUNING, encoding='utf-8', newline='') as file:
        for row in csv.DictReader(file):
            found = float(row['top1']), float(row['lr'])
            best[row['arm']] = max(found, best.get(row['arm'], found))
    return {name: lr for name, (_, lr) in best.items()}


def _arguments(arm: Arm, lr: float, seed: int) -> list[str | float]:
    scales = ['--scales', arm.scales] if arm.scales else []
    return ['--model', arm.model, '--opt', arm.opt, *scales, '--lr', lr, '--seed', seed]


def _train_all(runs: dict[str, list[str | float]], data: Path, output: Path, jobs: int) -> None:
    output.mkdir(parents=True, exist_ok=True)
    initial = Scales.initial(ARCHITECTURE)
    ones = {module: {name: torch.ones_like(v) for name, v in initial[module].items()} for module in initial}
    Scales(ARCHITECTURE, ones, provenance={'method': 'all ones, not searched'}).save(output / ONES)
    environment = {**os.environ, **({'OMP_NUM_THREADS': '1'} if jobs > 1 else {})}
    workers = ['--workers', 0] if jobs > 1 else []

    def run(name: str) -> None:
        arguments = ['-c', RECIPE, '--data-dir', data.resolve(), '--output', '.', '--experiment', name]
        command = [sys.executable, HERE.parents[1] / 'train.py', *arguments, *runs[name], *workers, '--resume']
        with open(output / f'{name}.log', 'a', encoding='utf-8') as log:
            subprocess.run(list(map(str, command)), cwd=output, env=environment, stdout=log, stderr=log, check=True)
        print(f'{name} is done.', flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run, runs))


def _history(path: Path) -> list[dict[str, float]]:
    with open(path, encoding='utf-8', newline='') as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def histories() -> dict[str, list[list[dict[str, float]]]]:
    """Reads the runs: arm to one history for each seed."""
    return {name: [_history(RUNS / f'{name}-{seed}.csv') for seed in SEEDS] for name in ARMS}


def table() -> str:
    """Writes accuracies and learning rates as Markdown."""
    rates = best_rates()
    head = ['trained as', 'learning rate', *(f'seed {seed}' for seed in SEEDS), 'mean', 'spread']
    lines = [f'| {" | ".join(head)} |', f'|---|{"---:|" * (len(head) - 1)}']
    for name, runs in histories().items():
        top1 = [run[-1]['eval_top1'] for run in runs]
        cells = [*(f'{value:.2f}' for value in top1), f'{statistics.mean(top1):.2f}', f'{max(top1) - min(top1):.2f}']
        lines.append(f'| {ARMS[name].title} | {rates[name]} | {" | ".join(cells)} |')
    return '\n'.join(lines)


def draw() -> None:
    """Draws accuracy against epochs, mean and range over the seeds, and the last epoch of every run."""
    figure, (left, right) = subplots(1, 2, figsize=(11, 4), width_ratios=(3, 2))
    for place, (name, runs) in enumerate(histories().items()):
        curves = [[row['eval_top1'] for row in run] for run in runs]
        epochs = range(1, len(curves[0]) + 1)
        line = left.plot(epochs, [statistics.mean(values) for values in zip(*curves)], label=ARMS[name].title)[0]
        left.fill_between(
            epochs, *[list(map(end, zip(*curves))) for end in (min, max)], color=line.get_color(), alpha=0.2
        )
        right.plot([curve[-1] for curve in curves], [-place] * len(curves), 'o', color=line.get_color(), alpha=0.7)
    left.set(xlabel='epoch', ylabel='top-1 accuracy on validation images (%)')
    left.legend(frameon=False)
    right.set(
        xlabel='top-1 accuracy after the last epoch (%), each seed', yticks=[-place for place in range(len(ARMS))]
    )
    right.set_yticklabels([arm.title for arm in ARMS.values()])
    right.grid(axis='x', alpha=0.3)
    figure.tight_layout()
    save_figure(figure, PICTURE)


def report() -> None:
    """Writes table and picture into `pretrained/README.md`, between the marks."""
    text = README.read_text(encoding='utf-8')
    before, rest = text.split(BEGIN)
    picture = f'![Accuracy against epochs]({PICTURE.relative_to(README.parent).as_posix()})'
    write_text(README, f'{before}{BEGIN}\n{table()}\n\n{picture}\n{END}{rest.split(END)[1]}')
    draw()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest='command')
    command = commands.add_parser('split')
    command.add_argument('source', type=Path)
    command.add_argument('target', type=Path)
    for name in ('tune', 'train'):
        command = commands.add_parser(name)
        command.add_argument('data', type=Path)
        command.add_argument('--output', type=Path, required=True)
        command.add_argument('--jobs', type=int, default=1)
    commands.add_parser('report')
    args = vars(parser.parse_args(argv))
    run = {'split': split, 'tune': tune, 'train': train, 'report': report}[args.pop('command')]
    run(**args)


if __name__ == '__main__':
    main()
