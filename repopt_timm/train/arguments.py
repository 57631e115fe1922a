"""The arguments of a training run. Names and defaults are those of timm's training script, unless the help differs."""

import argparse
from typing import Any

from ..console import Pairs, number

__all__ = ['INTERPOLATIONS', 'SEARCH_DEFAULTS', 'add_arguments']

INTERPOLATIONS = ('nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos')
SEARCH_DEFAULTS = {'weight_decay': 4e-5}
"""Of the search of `--search-first`: strongly decayed identities leave targets that learn slowly."""

_SCHEDULES = ('cosine', 'tanh', 'step', 'multistep', 'constant', 'plateau', 'poly', 'wsd', 'rsqrt', 'none')

_count = number(int, low=1)
_natural = number(int, low=0)
_share = number(float, low=0, high=1)
_fraction = number(float, low=0, below=1)
_nonnegative = number(float, low=0)
_positive = number(float, above=0)
_part = number(float, above=0, high=1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of a run to a parser, by section."""

    def add(flags: str, kind: Any, default: Any, text: str, **options: Any) -> None:
        """Adds an argument whose kind is a type or a tuple of choices."""
        options |= {'choices': kind} if isinstance(kind, tuple) else {'type': kind}
        group.add_argument(*flags.split(), default=default, help=text, **options)

    def switch(flag: str, text: str) -> None:
        group.add_argument(flag, action='store_true', help=text)

    group = parser.add_argument_group('Data')
    add('--data-dir', None, None, 'path to dataset: image folders, or .tar files', metavar='DIR')
    add(
        '--dataset',
        None,
        '',
        'dataset type, such as torch/cifar10, hfds/NAME, wds/NAME, digits; streamed data (wds/, hfids/) are not '
        'repeated exactly when a run is resumed [image folder or .tar]',
        metavar='NAME',
    )
    add('--train-split', None, 'train', 'dataset train split', metavar='NAME')
    add('--val-split', None, 'validation', 'dataset validation split', metavar='NAME')
    add('--train-num-samples', _count, None, 'number of training samples, for streamed data')
    add('--val-num-samples', _count, None, 'number of validation samples, for streamed data')
    add('--train-images', _count, None, 'train on N images, the same random ones for each seed')
    add(
        '--holdout',
        _fraction,
        0.0,
        'validate on this share of the training images, on which the run then does not train',
        metavar='SHARE',
    )
    switch('--cache-images', 'keep decoded images in memory, from the first epoch on; with --workers 0')
    add('--sampler', ('balanced',), None, 'draw training images so that all classes come equally often')
    switch('--dataset-download', 'allow download for torch/ and others that support it')
    add('--class-map', None, '', 'class map: a .txt file with the name of a class on each line', metavar='FILE')
    add('--input-img-mode', ('L', 'RGB', 'RGBA'), None, 'image color mode [from the number of channels]')
    add('--input-key', None, None, 'dataset key of the images', metavar='KEY')
    add('--target-key', None, None, 'dataset key of the labels', metavar='KEY')

    group = parser.add_argument_group('Model')
    add('--model', None, 'repopt_vgg_a0', 'name of a timm model; _hs for a search, _csla for validation')
    add(
        '--scales',
        None,
        None,
        "a file, a folder with a model card, 'hf-hub:user/repo[@revision]', a name of `scales list`, 'published' "
        "by the authors, 'implied' by the branches of pretrained weights, 'initial' for unsearched values, 'identity' "
        'for these from convolutions that start as the identity [what pretrained or initial weights were trained '
        'with, else initial]',
        metavar='SOURCE',
    )
    add(
        '--init',
        ('', 'dirac'),
        '',
        "'dirac' makes each convolution of equal channels and stride 1 the identity, by torch.nn.init.dirac_",
    )
    switch('--pretrained', 'start from pretrained weights')
    add('--initial-checkpoint', None, '', 'start from the weights of a checkpoint', metavar='FILE')
    add(
        '--resume',
        None,
        None,
        'continue from FILE [last.pth.tar in --output/--experiment, if there is one]',
        nargs='?',
        const='auto',
        metavar='FILE',
    )
    switch('--override', 'resume with other arguments, or from an earlier checkpoint than the last')
    add('--num-classes', _count, None, "number of classes [the dataset's]")
    add('--gp', None, None, "global pool type, such as avg [the model's]", metavar='POOL')
    add('--img-size', _count, None, 'image size, for square images')
    add('--in-chans', (1, 3, 4), None, 'number of image channels', type=int)
    add('--input-size', _count, None, 'image dimensions: channels height width', nargs=3)
    add('--crop-pct', _part, None, 'center crop percent, for validation', metavar='SHARE')
    add('--mean', number(float), None, 'mean pixel value', nargs='+')
    add('--std', _positive, None, 'standard deviation of pixel values', nargs='+')
    add('--interpolation', ('', *INTERPOLATIONS), '', "resize interpolation [the model's]")
    add('-b --batch-size', _count, 128, 'batch size of each process')
    add('-vb --validation-batch-size', _count, None, 'batch size for validation [--batch-size]')
    switch('--channels-last', 'channels_last memory layout')
    add('--grad-accum-steps', _count, 1, 'batches to accumulate gradients of before a step')
    switch('--grad-checkpointing', 'recompute activations in the backward pass')
    add('--model-kwargs', None, {}, 'further model arguments', nargs='*', action=Pairs, metavar='K=V')
    add('--torchcompile', None, None, 'compile the model', nargs='?', const='inductor', metavar='BACKEND')

    group = parser.add_argument_group('Device')
    add('--device', None, None, 'device to train on [cuda if available, else cpu]')
    switch('--amp', 'mixed precision')
    add('--amp-dtype', ('float16', 'bfloat16'), 'float16', 'lower precision of --amp')

    group = parser.add_argument_group('Optimizer')
    add('--opt', str.lower, None, 'optimizer [repopt_sgd for a plain repopt_* model, else sgd]', metavar='NAME')
    add('--opt-eps', _nonnegative, None, 'epsilon of the optimizer')
    add('--opt-betas', _share, None, 'betas of the optimizer', nargs='+')
    add('--momentum', _fraction, 0.9, 'momentum')
    add('--weight-decay', _nonnegative, 2e-5, 'weight decay')
    add(
        '--clip-grad',
        _nonnegative,
        None,
        'clip gradients; RepOptimizers measure the equivalent CSLA norm',
        metavar='NORM',
    )
    add('--clip-mode', ('norm', 'value', 'agc'), 'norm', 'how to clip; RepOptimizers: norm only')
    add('--layer-decay', _part, None, 'layer-wise learning rate decay')
    add('--opt-kwargs', None, {}, 'further optimizer arguments', nargs='*', action=Pairs, metavar='K=V')

    group = parser.add_argument_group('Learning rate schedule')
    add('--sched', _SCHEDULES, 'cosine', 'schedule')
    switch('--sched-on-updates', 'step the schedule on updates; done anyway if --epochs is less than 50')
    add('--lr', _nonnegative, None, 'learning rate; overrides --lr-base')
    add(
        '--lr-base',
        _nonnegative,
        0.1,
        'learning rate at --lr-base-size: lr = lr_base * batch size / base size',
        metavar='LR',
    )
    add('--lr-base-size', _count, 256, 'global batch size of --lr-base')
    add('--lr-base-scale', ('', 'linear', 'sqrt'), '', 'how --lr-base scales [what suits --opt]')
    add('--warmup-lr', _nonnegative, 1e-5, 'learning rate that the warm-up starts from', metavar='LR')
    add('--min-lr', _nonnegative, 0.0, 'lower bound of the learning rate', metavar='LR')
    add('--epochs', _count, 300, 'number of epochs')
    add('--warmup-epochs', _nonnegative, None, 'epochs of warm-up [a tenth of --epochs, 5 at most]')
    switch('--warmup-prefix', 'start the schedule after the warm-up, which then adds to --epochs')
    add('--cooldown-epochs', _natural, 0, 'epochs at the lowest learning rate, after the schedule')
    add('--decay-epochs', _positive, 90.0, 'interval of the step schedule')
    add('--decay-milestones', _count, [90, 180, 270], 'epochs of the multistep schedule', nargs='+')
    add('--decay-rate', _positive, 0.1, 'factor of the step schedules')
    add('--patience-epochs', _natural, 10, 'patience of the plateau schedule')
    add('--patience', _count, None, 'stop when the validation accuracy has not improved for N epochs')

    group = parser.add_argument_group('Augmentation and regularization')
    switch('--no-aug', 'no training augmentation')
    add('--train-crop-mode', ('rrc', 'rkrc', 'rkrr'), None, 'crop mode in train')
    add('--scale', _part, [0.08, 1.0], 'range of the random crop area', nargs=2)
    add('--ratio', _positive, [3 / 4, 4 / 3], 'range of the random aspect ratio', nargs=2)
    add('--hflip', _share, 0.5, 'probability of a horizontal flip')
    add('--vflip', _share, 0.0, 'probability of a vertical flip')
    add('--color-jitter', _nonnegative, 0.4, 'color jitter; null in a config for none')
    add('--aa', None, None, 'AutoAugment policy, such as rand-m9-mstd0.5', metavar='POLICY')
    add('--aug-repeats', _nonnegative, 0.0, 'repeats of an image, in a parallel run')
    add('--reprob', _share, 0.0, 'probability of random erasing')
    add('--remode', ('pixel', 'rand', 'const'), 'pixel', 'mode of random erasing')
    add('--recount', _count, 1, 'count of random erasing')
    add('--mixup', _nonnegative, 0.0, 'mixup alpha')
    add('--cutmix', _nonnegative, 0.0, 'cutmix alpha')
    add('--mixup-prob', _share, 1.0, 'probability of mixup or cutmix')
    add('--mixup-switch-prob', _share, 0.5, 'probability of cutmix when both are on')
    add('--mixup-mode', ('batch', 'pair', 'elem'), 'batch', 'mixup per batch, pair or elem')
    add('--mixup-off-epoch', _natural, 0, 'turn mixup off after this epoch')
    switch('--bce-loss', 'binary cross entropy')
    switch('--bce-sum', 'sum it over the classes')
    add('--bce-target-thresh', _share, None, 'make its targets 1 above this value, else 0')
    add('--bce-pos-weight', _positive, None, 'weight of its positive targets')
    add('--smoothing', _fraction, 0.1, 'label smoothing')
    add('--class-weights', ('balanced',), None, 'weigh the loss of an image by the inverse size of its class')
    add('--train-interpolation', ('random', *INTERPOLATIONS), 'random', 'interpolation of training images')
    add('--drop', _fraction, 0.0, 'dropout rate of the classifier')
    add('--drop-path', _fraction, None, 'rate of stochastic depth')
    add('--drop-block', _fraction, None, 'rate of dropped blocks')

    group = parser.add_argument_group('BatchNorm and weight averaging')
    add('--bn-momentum', _share, None, "momentum of BatchNorm [the model's]")
    add('--bn-eps', _positive, None, "epsilon of BatchNorm [the model's]")
    switch('--sync-bn', 'synchronized BatchNorm, on GPUs')
    add('--dist-bn', ('', 'broadcast', 'reduce'), 'reduce', 'BatchNorm statistics between processes')
    switch('--model-ema', 'keep an exponential moving average of the weights')
    add('--model-ema-decay', _fraction, 0.9998, 'decay of the average')
    switch('--model-ema-warmup', 'warm the decay up')

    group = parser.add_argument_group('Run')
    add(
        '--seed',
        number(int, low=0, high=10**9),
        42,
        'random seed; epochs are seeded one by one, so that a resumed run repeats',
    )
    add('--log-interval', _count, 50, 'batches between lines of progress')
    add('--val-interval', _count, 1, 'epochs between validations')
    add('--checkpoint-hist', _count, 3, 'number of best checkpoints to keep')
    add('-j --workers', _natural, 4, 'processes that load data, not more than there are cores')
    switch('--pin-mem', 'pin memory, for GPUs')
    switch('--no-prefetcher', "load without timm's prefetcher")
    add('--output', None, 'output', 'folder of runs', metavar='DIR')
    add('--experiment', None, '', "folder of this run in --output [time and model's name]", metavar='NAME')
    switch('--log-tensorboard', 'log to TensorBoard, if installed')
    switch('--log-wandb', 'log to Weights & Biases, if installed')
    switch('--debug', 'show the traceback of an error')
    decay = SEARCH_DEFAULTS['weight_decay']
    switch(
        '--search-first',
        f'search the scales with a weight decay of {decay:g}, then train --model with them, then report',
    )
