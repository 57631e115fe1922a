"""The commands that write models as repositories: save, push and convert-checkpoint."""

import argparse
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .checkpoints.packing import PRECISIONS
from .deploy import add_class_map, evaluate
from .files import check_output_folder
from .merge_checkpoint import merge_trained
from .publish import push_to_hub, save_pretrained
from .reporting import add_command, print_result
from .scale_commands import SOURCE, add_license, add_publishing, add_scales_file
from .sources import IMPLIED
from .weights_origin import merged_from

__all__ = ['add_commands']


def add_commands(commands: Any) -> None:
    """Adds save, push and convert-checkpoint to the commands of `repopt-timm`.

    Args:
        commands: What `ArgumentParser.add_subparsers` returned.
    """
    save = add_command(commands, 'save', _save)
    save.add_argument('checkpoint', help='checkpoint of a training run')
    save.add_argument('out', help='folder to write, which local-dir:OUT loads')
    _add_contents(save)
    save.add_argument(
        '--data', metavar='DIR', help='image folder on whose validation split to measure what is written, for the card'
    )
    add_class_map(save)

    push = add_command(commands, 'push', _push)
    push.add_argument('checkpoint', help='checkpoint of a training run')
    push.add_argument('repo', help='repository on the Hub, user/repo')
    _add_contents(push)
    add_publishing(push)

    convert = add_command(commands, 'convert-checkpoint', _convert_checkpoint)
    convert.add_argument(
        'checkpoint',
        help='target checkpoint of the reference repository, such as RepOpt-VGG-B1-acc78.62.pth; checkpoint of a '
        'multi-branch network; or what timm.create_model takes, such as mobileone_s0.apple_in1k',
    )
    convert.add_argument(
        '--model', default='', metavar='NAME', help='timm name of the network, if the file does not state it'
    )
    convert.add_argument(
        '--data',
        metavar='DIR',
        help='image folder to measure the BatchNorms of a merged network on [estimates from the branches]',
    )
    convert.add_argument('--out', metavar='DIR', help='folder to write, which local-dir:DIR loads')
    convert.add_argument('--push', metavar='REPO', help='repository on the Hub to publish it in')
    convert.add_argument(
        '--scales', metavar='SOURCE', help=f"scales that it was trained with: {SOURCE}; 'implied' by branches"
    )
    add_license(convert)
    add_publishing(convert)


def _add_contents(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--scales', metavar='SOURCE', help=f'scales that it was trained with: {SOURCE}')
    parser.add_argument('--curves', metavar='PNG', help='picture of the training curves [drawn from CHECKPOINT]')
    parser.add_argument('--precision', choices=PRECISIONS, default='float32', help='number format of stored kernels')
    add_license(parser)
    add_scales_file(parser)


def _save(args: argparse.Namespace) -> None:
    save = partial(
        save_pretrained,
        args.checkpoint,
        scales=args.scales,
        curves=args.curves,
        precision=args.precision,
        license=args.license,
    )
    values, text = {'checkpoint': args.checkpoint, 'out': args.out}, f'{args.checkpoint} -> {args.out}'
    metrics = None
    check_output_folder(args.out)
    if args.data:
        with TemporaryDirectory() as folder:
            save(folder)
            found = evaluate(folder, args.data, class_map=args.class_map)
        measured = {name: round(found[name], 3) for name in ('top1', 'top5')}
        metrics = {'dataset': Path(args.data).resolve().name, **measured}
        values |= measured
        text += f': top-1 {measured["top1"]:.2f} %, top-5 {measured["top5"]:.2f} % of {found["images"]} images'
    save(args.out, metrics=metrics, scales_file=args.scales_file)
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
        scales_file=args.scales_file,
        license=args.license,
    )
    print_result(args, {'checkpoint': args.checkpoint, 'url': url}, f'{args.checkpoint} -> {url}')


def _convert_checkpoint(args: argparse.Namespace) -> None:
    if not args.out and not args.push:
        raise ValueError('Name a folder to write with --out, a repository to publish in with --push, or both.')
    if args.out:
        check_output_folder(args.out)
    implied = args.scales == IMPLIED
    model = merge_trained(args.checkpoint, args.model, args.data, implied)
    source = Path(args.checkpoint)
    training = {'converted_from': source.name if source.is_file() else args.checkpoint}
    if merged_from(model):
        training['trained_with'] = 'branches; merged into plain kernels'
        training['batchnorm'] = (
            f'measured on images of {Path(args.data).resolve().name}' if args.data else 'estimated from the branches'
        )
    else:
        training['method'] = "published by the method's authors"
    scales = None if implied else args.scales
    values: dict[str, Any] = {'architecture': model.pretrained_cfg['architecture'], 'num_classes': model.num_classes}
    if args.out:
        save_pretrained(model, args.out, scales=scales, training=training, license=args.license)
        values['out'] = args.out
    if args.push:
        values['url'] = push_to_hub(
            model,
            args.push,
            scales=scales,
            training=training,
            private=args.private,
            revision=args.revision,
            create_pr=args.create_pr,
            license=args.license,
        )
    print_result(args, values, ', '.join(f'{name} {value}' for name, value in values.items()))
