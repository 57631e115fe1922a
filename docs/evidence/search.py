"""What is a search worth? Makes the scales that docs/evidence/search.sh trains with, and searches some.

    python docs/evidence/search.py PUBLISHED CIFAR10 OUTPUT [SEARCH ...]

The network has RepOpt-VGG-B1's depths and a quarter of its widths. PUBLISHED are the authors' searched scales of B1: a
file, or `repopt_vgg_b1.published`. CIFAR10 is an image folder. Writes OUTPUT/searches.md, a table of what each search
did; a finished search is not repeated.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping
from math import log, log2
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import repopt_timm
from repopt_timm.reporting import markdown_table
from repopt_timm.scales import read_scale_file
from repopt_timm.sources import load_scales
from repopt_timm.train.engine import DivergedError
from repopt_timm.train.parsing import parse_arguments
from repopt_timm.train.run import prepare_device, train
from repopt_timm.train.run_model import make_model

DEPTHS, WIDTHS = (4, 6, 16, 1), (16, 32, 64, 128, 512)
EPOCHS = 8

Make = Callable[[argparse.Namespace, Any, torch.device], tuple[nn.Module, dict[str, Any]]]


def faster_scales(factor: float) -> Make:
    """Makes search models whose scales have a learning rate of their own."""

    def make(args: argparse.Namespace, dataset: Any, device: torch.device) -> tuple[nn.Module, dict[str, Any]]:
        def groups(model: nn.Module) -> list[dict[str, Any]]:
            named = dict(model.named_parameters())
            scales = {name for name in named if '.scales.' in name}
            flat = {name for name, parameter in named.items() if parameter.ndim < 2 and name not in scales}
            return [
                {'params': [named[name] for name in named if name not in scales | flat]},
                {'params': [named[name] for name in sorted(flat)], 'weight_decay': 0.0},
                {'params': [named[name] for name in sorted(scales)], 'weight_decay': 0.0, 'lr_scale': factor},
            ]

        return make_model(args, None, dataset, device), {'param_group_fn': groups}

    return make


def layer_wise(args: argparse.Namespace, dataset: Any, device: torch.device) -> tuple[nn.Module, dict[str, Any]]:
    """Makes a search model with one scale for each branch: its channels share their gradients."""
    model = make_model(args, None, dataset, device)
    for name, parameter in model.named_parameters():
        if '.scales.' in name:
            parameter.register_hook(lambda grad: grad.sum().expand_as(grad))
    return model, {}


SEARCHES: dict[str, tuple[int, Make | None]] = {
    'short': (42, None),
    'fast': (42, faster_scales(10)),
    'layer_wise': (42, layer_wise),
    'layer_wise_1': (1, layer_wise),
    'layer_wise_2': (2, layer_wise),
}
"""Name of a search to its seed and how its model is made."""


def plain_network() -> nn.Module:
    """Makes the network that all of this is about."""
    return timm.create_model('repopt_vgg', depths=DEPTHS, widths=WIDTHS, num_classes=10)


def published(initial: repopt_timm.Scales, source: str) -> repopt_timm.Scales:
    """Returns the mean of each layer and branch of the published scales, for our width."""
    found = load_scales(source)
    return spread(initial, lambda module, branch: found[module][branch].mean().item(), 'layer means of B1')


def formula(initial: repopt_timm.Scales) -> repopt_timm.Scales:
    """Returns the closed form that was fitted to the layer means of the published B1, B2, L1 and L2."""

    def value(module: str, branch: str) -> float:
        words = module.split('.')
        index = max(1, int(words[2])) if words[0] == 'stages' else 1
        wide = log2(initial.geometry[module].out_channels / 256)
        if branch == 'identity':
            return 0.608 - 0.112 * wide
        if branch == '1x1':
            return 1.526 * index ** -(0.808 - 0.110 * wide)
        return 1.21 * index ** -(0.897 - 0.231 * wide)

    return spread(initial, value, 'closed form fitted to published scales')


def spread(initial: repopt_timm.Scales, value: Callable[[str, str], float], method: str) -> repopt_timm.Scales:
    """Returns scales that are constant over the channels of a layer."""
    modules = {
        module: {branch: torch.full_like(vector, value(module, branch)) for branch, vector in vectors.items()}
        for module, vectors in initial.items()
    }
    return repopt_timm.Scales(
        initial.architecture, modules, initial.geometry, initial.counts, {'method': method}, method
    )


def search(name: str, data: str, output: Path) -> Path:
    """Searches, and returns the file of scales."""
    seed, make = SEARCHES[name]
    path = output / name / 'scales.safetensors'
    if not path.exists():
        words = ['-c', 'cifar10_trial', '--model', 'repopt_vgg_hs', '--opt', 'sgd', '--data-dir', data]
        words += ['--model-kwargs', f'depths={DEPTHS}', f'widths={WIDTHS}', '--train-images', '20000']
        words += ['--epochs', str(EPOCHS), '--warmup-epochs', str(EPOCHS // 4), '--val-interval', '4', '--lr', '0.1']
        words += ['--weight-decay', '4e-5', '--clip-grad', '5', '--amp', '--amp-dtype', 'bfloat16', '--channels-last']
        words += ['--output', str(output), '--experiment', name, '--resume', '--checkpoint-hist', '1']
        words += ['--seed', str(seed), '--workers', '0']
        args = parse_arguments(words)
        prepare_device(args)
        train(args, make)
    return path


def layer_means(scales: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[tuple[str, str], float]:
    """Returns the mean of each branch, identities aside."""
    return {
        (module, branch): vector.double().mean().item()
        for module, vectors in scales.items()
        for branch, vector in vectors.items()
        if branch != 'identity'
    }


def correlation(first: list[float], second: list[float]) -> str:
    """Returns Pearson's correlation; `-` for values that do not vary."""
    if min(statistics.pstdev(values) for values in (first, second)) < 1e-9:
        return '-'
    return f'{statistics.correlation(first, second):.2f}'


def row(name: str, scales: repopt_timm.Scales, start: repopt_timm.Scales, goal: repopt_timm.Scales) -> list[str]:
    """Returns what became of scales: how far they moved, and whether towards the published ones."""
    found, initial, wanted = (layer_means(each) for each in (scales, start, goal))
    moved = [log(abs(found[key]) / initial[key]) for key in initial]
    hoped = [log(wanted[key] / initial[key]) for key in initial]
    identities = [vectors['identity'].mean().item() for vectors in scales.values() if 'identity' in vectors]
    return [
        name,
        f'{statistics.mean(abs(found[key] / initial[key] - 1) for key in initial):.1%}',
        f'{statistics.mean(identities):.2f}',
        correlation(list(found.values()), list(wanted.values())),
        correlation(moved, hoped),
    ]


def main() -> None:
    source, data, output = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    wanted = sys.argv[4:] or list(SEARCHES)
    output.mkdir(parents=True, exist_ok=True)
    initial = repopt_timm.Scales.initial(plain_network())
    goal = published(initial, source)
    made = {'unsearched': initial, 'published': goal, 'formula': formula(initial)}
    for name, scales in made.items():
        scales.save(output / f'{name}.safetensors')
    for name in wanted:
        try:
            made[name] = read_scale_file(search(name, data, output))
        except DivergedError as error:
            print(f'{name}: {error}', file=sys.stderr)
    head = ['scales', 'moved', 'identity', 'correlation of layer means', 'of their changes']
    table = markdown_table(head, [row(name, scales, initial, goal) for name, scales in made.items()], align=True)
    (output / 'searches.md').write_text(table + '\n', encoding='utf-8')
    print(table)


if __name__ == '__main__':
    main()
