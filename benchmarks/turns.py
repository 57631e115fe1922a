"""What the benchmarks share: contenders that take turns in one process, and a table of their times."""

import argparse
import os
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import timm
import torch
from torch.utils.benchmark import Timer

import repopt_timm
from repopt_timm.reporting import cpu_name, markdown_table, take_turns


def parse(description: str | None) -> argparse.Namespace:
    """Parses the command line of a benchmark, and makes torch work on its threads."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--model', nargs='+', default=['repopt_vgg_b1'], help='plain networks')
    parser.add_argument('--img-size', type=int, default=224)
    parser.add_argument('--batch-size', type=int, default=8, help='at least 3')
    parser.add_argument('--amp-dtype', choices=('bfloat16', 'float16'), help='lower precision of the forward pass')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--threads', type=int, default=torch.get_num_threads())
    parser.add_argument('--rounds', type=int, default=11, help='turns of each contender')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    load = f', load {os.getloadavg()[0]:.2f}' if hasattr(os, 'getloadavg') else ''
    place = torch.cuda.get_device_name(args.device) if args.device.startswith('cuda') else cpu_name()
    print(
        f'{place}, {args.threads} threads{load}; torch {torch.__version__}, timm {timm.__version__}, repopt-timm '
        f'{repopt_timm.__version__}; {args.rounds} rounds\n'
    )
    return args


def images_and_labels(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Makes a random batch."""
    images = torch.randn(args.batch_size, 3, args.img_size, args.img_size, device=args.device)
    return images.to(memory_format=memory_format(args)), torch.randint(1000, (args.batch_size,), device=args.device)


def memory_format(args: argparse.Namespace) -> torch.memory_format:
    """Returns the layout that is fastest on a device, and safe.

    On CPUs torch 2.14 corrupts memory in the backward pass of RepVGG's 1x1 stem in channels_last.
    """
    return torch.channels_last if args.device.startswith('cuda') else torch.contiguous_format


def dtype(args: argparse.Namespace) -> torch.dtype | None:
    """Returns the lower precision of forward passes, if any."""
    return getattr(torch, args.amp_dtype) if args.amp_dtype else None


def time_table(
    title: str,
    calls: Mapping[str, Callable[[], Any]],
    args: argparse.Namespace,
    before: Callable[[], Any] = lambda: None,
    columns: Mapping[str, Mapping[str, str]] | None = None,
) -> str:
    """Times calls by name, and compares them with the first, in a table of medians and quartiles.

    Contenders take turns in one process, in rounds whose order rotates, so that all of them meet the same machine. What
    is done `before` each call is not timed. Further `columns` have cells by name.
    """

    def timer(call: Callable[[], Any]) -> Callable[[], float]:
        around = {'call': call, 'before': before}
        made = Timer('call()', 'before()', globals=around, num_threads=args.threads)
        return lambda: made.timeit(1).median

    seconds = take_turns({name: timer(call) for name, call in calls.items()}, args.rounds, warmup=1)
    base = next(iter(seconds.values()))
    rows = []
    for name, own in seconds.items():
        ratios = [value / other for value, other in zip(own, base)]
        low, middle, high = statistics.quantiles(ratios, n=4, method='inclusive')
        ratio = '' if own is base else f'{middle:.2f} ({low:.2f} to {high:.2f})'
        further = [cells[name] for cells in (columns or {}).values()]
        rows.append([name, f'{1000 * statistics.median(own):.3g} ms', ratio, *further])
    return markdown_table([title, 'time', 'ratio (quartiles)', *(columns or {})], rows, align=True) + '\n'
