"""The command line, `repopt-timm`."""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm

from . import bench, deploy
from .cards.transfer import HUB_PREFIX
from .cards.writing import push_scales, save_scales_card
from .checkpoints.packing import PRECISIONS
from .console import exit_code
from .deploy import add_class_map, evaluate
from .models import ensure_registered
from .models.reference_weights import model_from_reference
from .names import ModelName
from .plot import plot_scales
from .publish import push_to_hub, save_pretrained
from .reporting import add_command, print_result
from .scales import Scales
from .scales.table import scales_table
from .sources import load_scales
from .train.command import main as train_main

__all__ = ['main']

# Folders of repositories may have a dot in their names too.
_FILE_SUFFIXES = {'.bin', '.json', '.md', '.pickle', '.pkl', '.png', '.pt', '.pth', '.tar'}

_SOURCE = "file, folder, model card, 'hf-hub:user/repo[@revision]', shipped name, or 'initial' with --architecture"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `repopt-timm`.

    Args:
        argv: Command-line arguments. Defaults to those of the process.

    Returns:
        The exit code: 0, or 1 after an error, which is reported in one line.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = '--debug' in argv
    return exit_code(partial(_run, [word for word in argv if word != '--debug']), debug)


def _run(argv: list[str]) -> None:
    # Training has a parser of its own, which reads configs.
    if argv[:1] == ['train']:
        train_main(argv[1:])
    elif argv[:1] == ['quickstart']:
        train_main(['-c', 'quickstart', *argv[1:]])
    else:
        args = _parser().parse_args(argv)
        args.run(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='repopt-timm', description='RepOpt-VGG and RepOptimizers for timm.')
    commands = parser.add_subparsers(required=True, metavar='COMMAND')
    commands.add_parser('train', help='search scales or train a model; see repopt-timm train --help')
    commands.add_parser('quickstart', help='search, train and report on handwritten digits, in minutes')
    _add_scales_commands(commands.add_parser('scales', help='show, convert, draw and share searched scales'))
    bench.add_commands(commands)

    save = add_command(commands, 'save', _save, 'write a checkpoint as a folder in the format of the Hub')
    save.add_argument('checkpoint', help='checkpoint of a training run')
    save.add_argument('out', help='folder to write, which local-dir:OUT loads')
    _add_contents(save)
    save.add_argument(
        '--data', metavar='DIR', help='image folder on whose validation split to measure what is written, for the card'
    )
    add_class_map(save)

    push = add_command(
        commands, 'push', _push, 'publish a checkpoint as a model on the Hub, with its scales in the card'
    )
    push.add_argument('checkpoint', help='checkpoint of a training run')
    push.add_argument('repo', help='repository on the Hub, user/repo')
    _add_contents(push)
    _add_publishing(push)

    convert = add_command(
        commands, 'convert-checkpoint', _convert_checkpoint, "convert the reference repository's weights"
    )
    convert.add_argument('checkpoint', help='target checkpoint, such as RepOpt-VGG-B1-acc78.62.pth')
    convert.add_argument('--out', metavar='DIR', help='folder to write, which local-dir:DIR loads')
    convert.add_argument('--push', metavar='REPO', help='repository on the Hub to publish it in')
    convert.add_argument('--scales', metavar='SOURCE', help=f'scales that it was trained with: {_SOURCE}')
    _add_publishing(convert)
    deploy.add_commands(commands)
    return parser


def _add_scales_commands(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(required=True, metavar='COMMAND')
    show = add_command(commands, 'show', _show, 'show scales')
    _add_source(show)
    extract = add_command(commands, 'extract', _write, 'take the scales out of the checkpoint of a hyper-search')
    _add_source(extract)
    extract.add_argument('out', help='.safetensors file, or folder for a model card')
    convert = add_command(
        commands, 'convert', _write, 'write scales as a .safetensors file, or as a folder with a model card'
    )
    _add_source(convert)
    convert.add_argument('out', help='.safetensors file, or folder for a model card')
    plot = add_command(commands, 'plot', _plot, 'draw scales against depth')
    _add_source(plot)
    plot.add_argument('out', help='picture to write')
    push = add_command(commands, 'push', _push_scales, 'publish scales on the Hub')
    _add_source(push)
    push.add_argument('repo', help='repository on the Hub, user/repo')
    _add_publishing(push)
    pull = add_command(commands, 'pull', _pull, 'get scales from the Hub')
    pull.add_argument('repo', help='repository on the Hub, user/repo[@revision]')
    pull.add_argument('out', help='.safetensors file, or folder for a model card')


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('source', help=_SOURCE)
    parser.add_argument('--architecture', metavar='MODEL', help='plain model that the scales are for')


def _add_contents(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--scales', metavar='SOURCE', help=f'scales that it was trained with: {_SOURCE}')
    parser.add_argument('--curves', metavar='PNG', help='picture of the training curves [drawn from CHECKPOINT]')
    parser.add_argument('--precision', choices=PRECISIONS, default='float32', help='of the kernels in the file')


def _add_publishing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--private', action='store_true', default=None, help='make a new repository private')
    parser.add_argument('--revision', help='branch to commit to')
    parser.add_argument('--create-pr', action='store_true', help='open a pull request instead of changing the branch')


def _load(args: argparse.Namespace) -> Scales:
    if args.architecture is None:
        return load_scales(args.source)
    ensure_registered(args.architecture)
    name = ModelName.parse(args.architecture)
    if not timm.is_model(name.variant):
        raise ValueError(f"timm does not know a model '{args.architecture}', expected such as repopt_vgg_a0.")
    return load_scales(args.source, timm.create_model(name.of_kind('target')))


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


def _write_scales(scales: Scales, args: argparse.Namespace) -> None:
    if Path(args.out).suffix == '.safetensors':
        scales.save(args.out)
    elif Path(args.out).suffix in _FILE_SUFFIXES:
        raise ValueError(f"'{args.out}': scales are written as .safetensors or as a folder with a model card.")
    else:
        save_scales_card(scales, args.out)
    print_result(args, {**_summary(scales), 'out': args.out}, f'{scales.title} -> {args.out}')


def _write(args: argparse.Namespace) -> None:
    _write_scales(_load(args), args)


def _pull(args: argparse.Namespace) -> None:
    _write_scales(load_scales(HUB_PREFIX + args.repo), args)


def _plot(args: argparse.Namespace) -> None:
    scales = _load(args)
    plot_scales(scales, args.out, scales.title)
    print_result(args, {**_summary(scales), 'out': args.out}, f'{scales.title} -> {args.out}')


def _push_scales(args: argparse.Namespace) -> None:
    scales = _load(args)
    url = push_scales(scales, args.repo, args.private, args.revision, args.create_pr)
    print_result(args, {**_summary(scales), 'url': url}, f'{scales.title} -> {url}')


def _save(args: argparse.Namespace) -> None:
    save = partial(save_pretrained, args.checkpoint, scales=args.scales, curves=args.curves, precision=args.precision)
    values, text = {'checkpoint': args.checkpoint, 'out': args.out}, f'{args.checkpoint} -> {args.out}'
    metrics = None
    if args.data:
        with TemporaryDirectory() as folder:
            save(folder)
            found = evaluate(folder, args.data, class_map=args.class_map)
        measured = {name: round(found[name], 3) for name in ('top1', 'top5')}
        metrics = {'dataset': Path(args.data).resolve().name, **measured}
        values |= measured
        text += f': top-1 {measured["top1"]:.2f} %, top-5 {measured["top5"]:.2f} % of {found["images"]} images'
    save(args.out, metrics=metrics)
    print_result(args, values, text)


def _push(args: argparse.Namespace) -> None:
    url = push_to_hub(
        args.checkpoint,
        args.repo,
        scales=args.scales,
        curves=args.curves,
        precision=args.precision,
        private=args.private,
        revision=args.revision,
        create_pr=args.create_pr,
    )
    print_result(args, {'checkpoint': args.checkpoint, 'url': url}, f'{args.checkpoint} -> {url}')


def _convert_checkpoint(args: argparse.Namespace) -> None:
    if not args.out and not args.push:
        raise ValueError('Name a folder to write with --out, a repository to publish in with --push, or both.')
    model = model_from_reference(args.checkpoint)
    values: dict[str, Any] = {'architecture': model.architecture, 'num_classes': model.num_classes}
    training = {'converted_from': Path(args.checkpoint).name, 'method': "published by the method's authors"}
    if args.out:
        save_pretrained(model, args.out, scales=args.scales, training=training)
        values['out'] = args.out
    if args.push:
        values['url'] = push_to_hub(
            model,
            args.push,
            scales=args.scales,
            training=training,
            private=args.private,
            revision=args.revision,
            create_pr=args.create_pr,
        )
    print_result(args, values, ', '.join(f'{name} {value}' for name, value in values.items()))


if __name__ == '__main__':
    sys.exit(main())
