"""`repopt-timm scales`: what scales there are, what is in them, and their ways into files and onto the Hub."""

import argparse
from pathlib import Path
from typing import Any

import timm
import torch

from .cards.hub import HUB_PREFIX
from .cards.publish import push_scales, save_scales_card
from .commands import COMMANDS
from .files import check_output, check_output_folder
from .models import ensure_registered
from .models.initial_values import initial_values
from .names import ModelName
from .plot import check_picture, plot_scales
from .reporting import add_command, markdown_table, print_result
from .scales import Scales
from .scales.table import scales_table
from .sources import known_scales, load_scales

__all__ = ['SOURCE', 'add_commands', 'add_license', 'add_publishing', 'add_scales_file']

# Folders of repositories may have a dot in their names too.
_FILE_SUFFIXES = {'.bin', '.json', '.md', '.pickle', '.pkl', '.png', '.pt', '.pth', '.tar'}

SOURCE = "file, folder, model card, 'hf-hub:user/repo[@revision]', a name of `scales list`, or 'published' or 'initial'"


def add_commands(commands: Any) -> None:
    """Adds `scales` and its commands to those of `repopt-timm`.

    Args:
        commands: What `ArgumentParser.add_subparsers` returned.
    """
    parser = commands.add_parser('scales', help=COMMANDS['scales'].summary)
    commands = parser.add_subparsers(required=True, metavar='COMMAND')
    add_command(commands, 'list', _list, 'list the scales that ship, are published, or are in the cache of the Hub')
    show = add_command(commands, 'show', _show, 'show scales')
    _add_source(show)
    extract = add_command(commands, 'extract', _write, 'take the scales out of the checkpoint of a hyper-search')
    _add_source(extract)
    extract.add_argument('out', help='.safetensors file, or folder for a model card')
    add_license(extract)
    convert = add_command(
        commands, 'convert', _write, 'write scales as a .safetensors file, or as a folder with a model card'
    )
    _add_source(convert)
    convert.add_argument('out', help='.safetensors file, or folder for a model card')
    add_license(convert)
    add_scales_file(convert)
    plot = add_command(commands, 'plot', _plot, 'draw scales against depth')
    _add_source(plot)
    plot.add_argument('out', help='picture to write')
    push = add_command(commands, 'push', _push_scales, 'publish scales on the Hub')
    _add_source(push)
    add_license(push)
    add_scales_file(push)
    push.add_argument('repo', help='repository on the Hub, user/repo')
    add_publishing(push)
    pull = add_command(commands, 'pull', _pull, 'get scales from the Hub')
    pull.add_argument('repo', help='repository on the Hub, user/repo[@revision]')
    pull.add_argument('out', help='.safetensors file, or folder for a model card')
    add_license(pull)


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('source', help=f'{SOURCE} with --architecture')
    parser.add_argument('--architecture', metavar='MODEL', help='plain model that the scales are for')


def add_license(parser: argparse.ArgumentParser) -> None:
    """Adds `--license` to a command that writes a card."""
    text = 'licence for a card that states none, such as mit [that of what it comes from, as far as known]'
    parser.add_argument('--license', metavar='ID', help=text)


def add_scales_file(parser: argparse.ArgumentParser) -> None:
    """Adds `--scales-file` to a command that writes a card."""
    text = 'put the scales into scales.safetensors beside the card, as is done when the Hub refuses a large card'
    parser.add_argument('--scales-file', action='store_true', help=text)


def add_publishing(parser: argparse.ArgumentParser) -> None:
    """Adds what a command needs that commits to the Hub."""
    parser.add_argument('--private', action='store_true', default=None, help='make a new repository private')
    parser.add_argument('--revision', help='branch to commit to')
    parser.add_argument('--create-pr', action='store_true', help='open a pull request instead of changing the branch')


def _load(args: argparse.Namespace) -> Scales:
    if args.architecture is None:
        return load_scales(args.source)
    ensure_registered(args.architecture)
    name = ModelName.parse(args.architecture)
    if not timm.is_model(name.variant):
        raise ValueError(f"timm does not know a model '{args.architecture}'; expected a name such as repopt_vgg_a0.")
    with torch.device('meta'):
        model = timm.create_model(name.of_kind('target'))
    return load_scales(args.source, model)


def _list(args: argparse.Namespace) -> None:
    rows = known_scales()
    head = ('name', 'network', 'searched on', 'licence', 'where')
    cells = [[str(row[key] or '') for key in ('name', 'network', 'dataset', 'license', 'where')] for row in rows]
    print_result(args, {'scales': rows}, markdown_table(head, cells, align=True))


def _summary(scales: Scales) -> dict[str, Any]:
    return {
        'architecture': scales.architecture or 'unknown',
        'modules': len(scales),
        'fingerprint': scales.fingerprint,
        'provenance': scales.provenance,
    }


def _show(args: argparse.Namespace) -> None:
    scales = _load(args)
    rows = scales_table(scales)
    lines = [f'{name:<13} {value}' for name, value in _summary(scales).items() if name != 'provenance']
    lines += [f'{name:<13} {value}' for name, value in scales.provenance.items()]
    lines += ['', f'{"stage":<10} {"branch":<10} {"mean":>9} {"min":>9} {"max":>9}']
    lines += [
        f'{row["stage"]:<10} {row["branch"]:<10} {row["mean"]:9.4f} {row["min"]:9.4f} {row["max"]:9.4f}' for row in rows
    ]
    print_result(args, {**_summary(scales), 'stages': rows}, '\n'.join(lines))


def _check_out(args: argparse.Namespace, source: str = '') -> None:
    if Path(args.out).suffix == '.safetensors':
        if args.license:
            raise ValueError(f"'{args.out}': --license goes into a model card, expected a folder. Leave it out.")
        check_output(args.out, source)
    elif Path(args.out).suffix in _FILE_SUFFIXES:
        raise ValueError(f"'{args.out}': scales are written as .safetensors or as a folder with a model card.")
    else:
        check_output_folder(args.out)


def _write_scales(scales: Scales, args: argparse.Namespace) -> None:
    if Path(args.out).suffix == '.safetensors':
        scales.save(args.out)
    else:
        save_scales_card(scales, args.out, scales_file=getattr(args, 'scales_file', False), license=args.license)
    print_result(args, {**_summary(scales), 'out': args.out}, f'{scales.title} -> {args.out}')


def _write(args: argparse.Namespace) -> None:
    _check_out(args, args.source)
    _write_scales(_load(args), args)


def _pull(args: argparse.Namespace) -> None:
    _check_out(args)
    _write_scales(load_scales(HUB_PREFIX + args.repo), args)


def _plot(args: argparse.Namespace) -> None:
    picture = check_picture(args.out, args.source)
    scales = _load(args)
    plot_scales(scales, picture, scales.title, initial_values(scales))
    print_result(args, {**_summary(scales), 'out': args.out}, f'{scales.title} -> {args.out}')


def _push_scales(args: argparse.Namespace) -> None:
    scales = _load(args)
    url = push_scales(
        scales,
        args.repo,
        args.private,
        args.revision,
        args.create_pr,
        scales_file=args.scales_file,
        license=args.license,
    )
    print_result(args, {**_summary(scales), 'url': url}, f'{scales.title} -> {url}')
