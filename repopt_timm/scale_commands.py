"""`repopt-timm scales`: what scales there are, what is in them, and their ways into files and onto the Hub."""

import argparse
from pathlib import Path
from typing import Any

import timm
import torch

from .cards.repository import push_scales, save_scales_card
from .commands import COMMANDS
from .files import check_output, check_output_folder
from .models import ensure_registered
from .models.initial_values import initial_values
from .names import ModelName
from .plot import plot_scales
from .reporting import add_command, markdown_table, print_result
from .scales import Scales
from .scales.summary import movement, scales_table
from .sources import known_scales, load_scales

SOURCE = (
    "file, folder, model card, 'hf-hub:user/repo[@revision]', a name of `scales list`, 'published', 'initial' or "
    "'identity'"
)


def add_commands(commands: Any) -> None:
    """Adds `scales` and its commands to those of `repopt-timm`."""
    commands = commands.add_parser('scales', help=COMMANDS['scales'].summary)
    commands = commands.add_subparsers(required=True, metavar='COMMAND')
    add_command(commands, 'list', _list, 'list the scales that ship, are published, or are in the cache of the Hub')
    show = add_command(commands, 'show', _show, 'show scales, and how far they are from their initial values')
    extract = add_command(commands, 'extract', _extract, 'write scales, from the checkpoint of a search or any source')
    plot = add_command(commands, 'plot', _plot, 'draw scales against depth')
    push = add_command(commands, 'push', _push, 'publish scales on the Hub')
    for parser in (show, extract, plot, push):
        parser.add_argument('source', help=f'{SOURCE} with --architecture')
        parser.add_argument('--architecture', metavar='MODEL', help='plain model that the scales are for')
    extract.add_argument('out', help='.safetensors file, or folder for a model card')
    add_card_options(extract)
    plot.add_argument('out', help='picture to write')
    add_publishing(push)


def add_card_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a command that writes a card."""
    text = 'licence for a card that states none, such as mit [that of what it comes from, as far as known]'
    parser.add_argument('--license', metavar='ID', help=text)
    text = 'put the scales into scales.safetensors beside the card, as is done when the Hub refuses a large card'
    parser.add_argument('--scales-file', action='store_true', help=text)


def add_publishing(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of a command that commits a card to the Hub."""
    parser.add_argument('repo', help='repository on the Hub, user/repo')
    add_card_options(parser)
    parser.add_argument('--private', action='store_true', default=None, help='make a new repository private')
    parser.add_argument('--revision', help='branch to commit to')
    parser.add_argument('--create-pr', action='store_true', help='open a pull request instead of changing the branch')


def card_options(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the options that a command has for its card and the Hub, to pass on."""
    options = ('license', 'scales_file', 'private', 'revision', 'create_pr', 'precision')
    return {name: value for name, value in vars(args).items() if name in options}


def _load(args: argparse.Namespace) -> Scales:
    if args.architecture is None:
        return load_scales(args.source)
    ensure_registered(args.architecture)
    with torch.device('meta'):
        model = timm.create_model(ModelName.parse(args.architecture).of_kind('target'))
    return load_scales(args.source, model)


def _facts(scales: Scales) -> dict[str, Any]:
    return {'architecture': scales.architecture, 'modules': len(scales), 'fingerprint': scales.fingerprint}


def _print_written(args: argparse.Namespace, scales: Scales, **place: str) -> None:
    values = {**_facts(scales), 'provenance': scales.provenance, **place}
    print_result(args, values, f'{scales.title} -> {" ".join(place.values())}')


def _list(args: argparse.Namespace) -> None:
    rows = known_scales()
    cells = [[str(cell or '') for cell in row.values()] for row in rows]
    head = ('name', 'network', 'searched on', 'licence', 'where')
    print_result(args, {'scales': rows}, markdown_table(head, cells, align=True))


def _show(args: argparse.Namespace) -> None:
    scales = _load(args)
    facts, rows, initial = _facts(scales), scales_table(scales), initial_values(scales)
    if initial is not None:
        facts['movement'] = str(movement([scales], initial))
    lines = [f'{name:<13} {value}' for name, value in {**facts, **scales.provenance}.items()]
    cells = [[f'{value:.4f}' if isinstance(value, float) else value for value in row.values()] for row in rows]
    table = markdown_table([*rows[0]], cells, align=True)
    print_result(args, {**facts, 'provenance': scales.provenance, 'stages': rows}, '\n'.join([*lines, '', table]))


def _extract(args: argparse.Namespace) -> None:
    if Path(args.out).suffix == '.safetensors':
        if args.license or args.scales_file:
            raise ValueError(f"'{args.out}': --license and --scales-file are for a folder with a card. Name a folder.")
        check_output(args.out, args.source)
        scales = _load(args)
        scales.save(args.out)
    else:
        check_output_folder(args.out)
        scales = _load(args)
        save_scales_card(scales, args.out, **card_options(args))
    _print_written(args, scales, out=args.out)


def _plot(args: argparse.Namespace) -> None:
    check_output(args.out, args.source)
    scales = _load(args)
    plot_scales(scales, args.out, scales.title, initial_values(scales))
    _print_written(args, scales, out=args.out)


def _push(args: argparse.Namespace) -> None:
    scales = _load(args)
    _print_written(args, scales, url=push_scales(scales, args.repo, **card_options(args)))
