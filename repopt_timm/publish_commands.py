"""The commands of scales and of models with scales: `scales`, `save`, `push` and `convert-checkpoint`."""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch

from .cards.repository import push_scales, save_scales_card
from .checkpoints.packing import PRECISIONS
from .commands import COMMANDS
from .deploy import add_class_map, evaluate
from .deploy.runtime import quiet
from .errors import explaining
from .files import check_output, check_output_folder
from .merge_checkpoint import merge_trained
from .models import ensure_registered
from .models.initial_values import initial_values
from .names import ModelName
from .plot import plot_scales
from .publish import push_to_hub, save_pretrained
from .reporting import add_command, markdown_table, print_result
from .scales import Scales
from .scales.summary import movement, scales_table
from .sources import IMPLIED, known_scales, load_scales
from .weights_origin import merged_from

_SOURCE = (
    "file, folder, model card, 'hf-hub:user/repo[@revision]', a name of `scales list`, 'published', 'initial' or "
    "'identity'"
)


def add_commands(commands: Any) -> None:
    """Adds these commands to the ones of `repopt-timm`."""
    save, push = add_command(commands, 'save', _save), add_command(commands, 'push', _push)
    for parser in (save, push):
        parser.add_argument('checkpoint', help='checkpoint of a training run, or its folder')
        _add_trained_scales(parser)
        text = 'number format of stored kernels'
        parser.add_argument('--precision', choices=PRECISIONS, default='float32', help=text)
    save.add_argument('out', help='folder to write, which local-dir:OUT loads')
    text = 'image folder on whose validation split to measure what is written, for the card'
    save.add_argument('--data', metavar='DIR', help=text)
    add_class_map(save)

    convert = add_command(commands, 'convert-checkpoint', _convert_checkpoint)
    text = (
        'file of the authors, such as RepOpt-VGG-B1-acc78.62.pth or RepVGG-A0-train.pth; checkpoint of a multi-branch '
        'network; or what timm.create_model takes, such as mobileone_s0.apple_in1k'
    )
    convert.add_argument('checkpoint', help=text)
    text = 'timm name of the network, if the file does not state it'
    convert.add_argument('--model', default='', metavar='NAME', help=text)
    text = 'image folder to measure the BatchNorms of a merged network on [estimates from the branches]'
    convert.add_argument('--data', metavar='DIR', help=text)
    convert.add_argument('--out', metavar='DIR', required=True, help='folder to write, which local-dir:DIR loads')
    _add_trained_scales(convert, "; 'implied' by branches")

    commands = commands.add_parser('scales', help=COMMANDS['scales'].summary)
    commands = commands.add_subparsers(required=True, metavar='COMMAND')
    add_command(commands, 'list', _list, 'list the scales that ship, are published, or are in the cache of the Hub')
    show = add_command(commands, 'show', _show, 'show scales, and how far they are from their initial values')
    extract = add_command(commands, 'extract', _extract, 'write scales, from the checkpoint of a search or any source')
    plot = add_command(commands, 'plot', _plot, 'draw scales against depth')
    share = add_command(commands, 'push', _share, 'publish scales on the Hub')
    for parser in (show, extract, plot, share):
        parser.add_argument('source', help=f'{_SOURCE}; the last three need --architecture')
        parser.add_argument('--architecture', metavar='MODEL', help='plain model that the scales are for')
    extract.add_argument('out', help='.safetensors file, or folder for a model card')
    plot.add_argument('out', help='picture to write')

    for parser in (push, share):
        parser.add_argument('repo', help='repository on the Hub, user/repo')
        parser.add_argument('--private', action='store_true', default=None, help='make a new repository private')
        parser.add_argument('--revision', help='branch to commit to')
        text = 'open a pull request instead of changing the branch'
        parser.add_argument('--create-pr', action='store_true', help=text)
    for parser in (save, push, convert, extract, share):
        text = 'licence for a card that states none, such as mit [that of what it comes from, as far as known]'
        parser.add_argument('--license', metavar='ID', help=text)
        text = 'put the scales into scales.safetensors beside the card, as is done when the Hub refuses a large card'
        parser.add_argument('--scales-file', action='store_true', help=text)


def _add_trained_scales(parser: argparse.ArgumentParser, further: str = '') -> None:
    text = f'scales that it was trained with: {_SOURCE}{further}'
    parser.add_argument('--scales', metavar='SOURCE', help=text)


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the options that a command has for its card and the Hub, to pass on."""
    options = ('license', 'scales_file', 'private', 'revision', 'create_pr', 'precision')
    return {name: value for name, value in vars(args).items() if name in options}


def _save(args: argparse.Namespace) -> None:
    check_output_folder(args.out)
    if args.class_map and not args.data:
        raise ValueError('--class-map is for the images of --data, which is missing.')
    metrics: dict[str, Any] | None = None
    values, text = {'checkpoint': args.checkpoint, 'out': args.out}, f'{args.checkpoint} -> {args.out}'
    if args.data:
        with TemporaryDirectory() as folder:
            # The warnings come with the card that stays.
            with quiet():
                save_pretrained(args.checkpoint, folder, args.scales, **_options(args))
            found = evaluate(folder, args.data, class_map=args.class_map)
        measured = {name: round(found[name], 3) for name in ('top1', 'top5')}
        metrics = {'dataset': Path(args.data).resolve().name, **measured}
        values |= measured
        text += f': top-1 {measured["top1"]:.2f} %, top-5 {measured["top5"]:.2f} % of {found["images"]} images'
    save_pretrained(args.checkpoint, args.out, args.scales, metrics, **_options(args))
    print_result(args, values, text)


def _push(args: argparse.Namespace) -> None:
    url = push_to_hub(args.checkpoint, args.repo, scales=args.scales, **_options(args))
    print_result(args, {'checkpoint': args.checkpoint, 'url': url}, f'{args.checkpoint} -> {url}')


def _convert_checkpoint(args: argparse.Namespace) -> None:
    check_output_folder(args.out)
    implied = args.scales == IMPLIED
    model: Any = merge_trained(args.checkpoint, args.model, args.data, implied)
    path = Path(args.checkpoint.removeprefix('local-dir:'))
    training = {'converted_from': path.name if path.exists() else args.checkpoint}
    if merged_from(model):
        training['trained_with'] = 'branches; merged into plain kernels'
        measured = f'measured on images of {Path(args.data).resolve().name}' if args.data else 'estimated from branches'
        training['batchnorm'] = measured
    else:
        training['method'] = "published by the method's authors"
    save_pretrained(model, args.out, None if implied else args.scales, training=training, **_options(args))
    values = {'architecture': model.pretrained_cfg['architecture'], 'num_classes': model.num_classes, 'out': args.out}
    print_result(args, values, ', '.join(f'{name} {value}' for name, value in values.items()))


def _load(args: argparse.Namespace) -> Scales:
    if args.architecture is None:
        return load_scales(args.source)
    with explaining(f"--architecture is '{args.architecture}'"):
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
        save_scales_card(scales, args.out, **_options(args))
    _print_written(args, scales, out=args.out)


def _plot(args: argparse.Namespace) -> None:
    check_output(args.out, args.source)
    scales = _load(args)
    plot_scales(scales, args.out, scales.title, initial_values(scales))
    _print_written(args, scales, out=args.out)


def _share(args: argparse.Namespace) -> None:
    scales = _load(args)
    _print_written(args, scales, url=push_scales(scales, args.repo, **_options(args)))
