"""The commands that write models as repositories: save, push and convert-checkpoint."""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .checkpoints.packing import PRECISIONS
from .deploy import add_class_map, evaluate
from .files import check_output_folder
from .merge_checkpoint import merge_trained
from .publish import push_to_hub, save_pretrained
from .reporting import add_command, print_result
from .scale_commands import SOURCE, add_card_options, add_publishing, card_options
from .sources import IMPLIED
from .weights_origin import merged_from


def add_commands(commands: Any) -> None:
    """Adds save, push and convert-checkpoint to the commands of `repopt-timm`."""
    save, push = add_command(commands, 'save', _save), add_command(commands, 'push', _push)
    for parser in (save, push):
        parser.add_argument('checkpoint', help='checkpoint of a training run')
        parser.add_argument('--scales', metavar='SOURCE', help=f'scales that it was trained with: {SOURCE}')
        text = 'number format of stored kernels'
        parser.add_argument('--precision', choices=PRECISIONS, default='float32', help=text)
    save.add_argument('out', help='folder to write, which local-dir:OUT loads')
    text = 'image folder on whose validation split to measure what is written, for the card'
    save.add_argument('--data', metavar='DIR', help=text)
    add_card_options(save)
    add_class_map(save)
    add_publishing(push)

    convert = add_command(commands, 'convert-checkpoint', _convert_checkpoint)
    convert.add_argument(
        'checkpoint',
        help='file of the authors, such as RepOpt-VGG-B1-acc78.62.pth or RepVGG-A0-train.pth; checkpoint of a '
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
    convert.add_argument('--out', metavar='DIR', required=True, help='folder to write, which local-dir:DIR loads')
    convert.add_argument(
        '--scales', metavar='SOURCE', help=f"scales that it was trained with: {SOURCE}; 'implied' by branches"
    )
    add_card_options(convert)


def _save(args: argparse.Namespace) -> None:
    check_output_folder(args.out)
    metrics: dict[str, Any] | None = None
    values, text = {'checkpoint': args.checkpoint, 'out': args.out}, f'{args.checkpoint} -> {args.out}'
    if args.data:
        with TemporaryDirectory() as folder:
            save_pretrained(args.checkpoint, folder, args.scales, **card_options(args))
            found = evaluate(folder, args.data, class_map=args.class_map)
        measured = {name: round(found[name], 3) for name in ('top1', 'top5')}
        metrics = {'dataset': Path(args.data).resolve().name, **measured}
        values |= measured
        text += f': top-1 {measured["top1"]:.2f} %, top-5 {measured["top5"]:.2f} % of {found["images"]} images'
    save_pretrained(args.checkpoint, args.out, args.scales, metrics, **card_options(args))
    print_result(args, values, text)


def _push(args: argparse.Namespace) -> None:
    url = push_to_hub(args.checkpoint, args.repo, scales=args.scales, **card_options(args))
    print_result(args, {'checkpoint': args.checkpoint, 'url': url}, f'{args.checkpoint} -> {url}')


def _convert_checkpoint(args: argparse.Namespace) -> None:
    check_output_folder(args.out)
    implied = args.scales == IMPLIED
    model: Any = merge_trained(args.checkpoint, args.model, args.data, implied)
    name = Path(args.checkpoint).name if Path(args.checkpoint).is_file() else args.checkpoint
    training = {'converted_from': name, 'method': "published by the method's authors"}
    if merged_from(model):
        measured = f'measured on images of {Path(args.data).resolve().name}' if args.data else 'estimated from branches'
        merged = 'branches; merged into plain kernels'
        training = {'converted_from': name, 'trained_with': merged, 'batchnorm': measured}
    scales = None if implied else args.scales
    save_pretrained(model, args.out, scales, training=training, **card_options(args))
    values = {'architecture': model.pretrained_cfg['architecture'], 'num_classes': model.num_classes, 'out': args.out}
    print_result(args, values, ', '.join(f'{name} {value}' for name, value in values.items()))
