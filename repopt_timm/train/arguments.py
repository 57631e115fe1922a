"""The arguments of a training run. Names and defaults are those of timm's training script, unless the help differs."""

import argparse
from typing import Any

from ..console import Pairs, number

_INTERPOLATIONS = ('nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos')
SEARCH_DECAY = 4e-5
"""Weight decay of the search of `--search-first`: strongly decayed identities leave targets that learn slowly."""

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

    def add(flags: str, text: str, default: Any = None, kind: Any = None, **options: Any) -> None:
        """Adds an argument whose kind is a type or a tuple of choices."""
        options |= {'choices': kind} if isinstance(kind, tuple) else {'type': kind}
        group.add_argument(*flags.split(), default=default, help=text, **options)

    def switch(flag: str, text: str) -> None:
        group.add_argument(flag, action='store_true', help=text)

    def toggle(flag: str, text: str) -> None:
        """Adds a switch that the command line can turn off again, as shipped configs set it."""
        # Set afterwards, as argparse adds the default to its help.
        group.add_argument(flag, action=argparse.BooleanOptionalAction, default=False).help = text

    group = parser.add_argument_group('Data')
    add('--data-dir', 'path to dataset: image folders, or .tar files')
    add('--dataset', 'dataset type, such as torch/cifar10, hfds/NAME, wds/NAME, digits [folder or .tar]', '')
    add('--train-split', 'dataset train split', 'train')
    add('--val-split', 'dataset validation split', 'validation')
    add('--train-num-samples', 'number of training samples, for streamed data', None, _count)
    add('--val-num-samples', 'number of validation samples, for streamed data', None, _count)
    add('--train-images', 'train on N images, the same random ones for each seed', None, _count)
    add('--holdout', 'validate on this share of the training images instead of training on it', 0.0, _fraction)
    switch('--cache-images', 'keep decoded images in memory, without workers')
    add('--sampler', 'draw training images so that all classes come equally often', None, ('balanced',))
    switch('--dataset-download', 'allow download for torch/ and others that support it')
    add('--class-map', 'class map: a .txt file with the name of a class on each line', '')
    add('--input-key', 'dataset key of the images')
    add('--target-key', 'dataset key of the labels')

    group = parser.add_argument_group('Model')
    add('--model', 'name of a timm model; _hs for a search, _csla for validation', 'repopt_vgg_a0')
    add(
        '--scales',
        "a file, a folder with a model card, 'hf-hub:user/repo[@revision]', a name of `scales list`, 'published' by "
        "the authors, 'implied' by the branches of pretrained weights, 'initial' for unsearched values, 'identity' for "
        'these from convolutions that start as the identity [those of pretrained or initial weights, else initial]',
    )
    add('--init', "'dirac' starts convolutions of equal channels and stride 1 as the identity", '', ('', 'dirac'))
    switch('--pretrained', 'start from pretrained weights')
    add('--initial-checkpoint', 'start from the weights of a checkpoint', '')
    add('--resume', 'continue from a file [last.pth.tar in --output/--experiment]', nargs='?', const='auto')
    switch('--override', 'resume with other arguments, or from an earlier checkpoint than the last')
    add('--num-classes', "number of classes [the dataset's]", None, _count)
    add('--gp', "global pool type, such as avg [the model's]")
    add('--img-size', 'image size, for square images', None, _count)
    add('--in-chans', 'number of image channels', None, (1, 3, 4), type=int)
    add('--input-size', 'image dimensions: channels height width', None, _count, nargs=3)
    add('--crop-pct', 'share of the resized image that the crop keeps, in validation', None, _part)
    add('--mean', 'mean pixel value', None, number(float), nargs='+')
    add('--std', 'standard deviation of pixel values', None, _positive, nargs='+')
    add('--interpolation', "resize interpolation [the model's]", '', ('', *_INTERPOLATIONS))
    add('-b --batch-size', 'batch size of each process', 128, _count)
    add('-vb --validation-batch-size', 'batch size for validation [--batch-size]', None, _count)
    toggle('--channels-last', 'channels_last memory layout')
    add('--grad-accum-steps', 'batches to accumulate gradients of before a step', 1, _count)
    switch('--grad-checkpointing', 'recompute activations in the backward pass')
    add('--model-kwargs', 'further model arguments', {}, nargs='*', action=Pairs, metavar='K=V')
    add('--torchcompile', 'compile the model', nargs='?', const='inductor')

    group = parser.add_argument_group('Device')
    add('--device', 'device to train on [cuda if available, else cpu]')
    toggle('--amp', 'mixed precision')
    add('--amp-dtype', 'lower precision of --amp', 'float16', ('float16', 'bfloat16'))

    group = parser.add_argument_group('Optimizer')
    add('--opt', 'optimizer [repopt_sgd for a plain repopt_* model, else sgd]', None, str.lower, metavar='NAME')
    add('--opt-eps', 'epsilon of the optimizer', None, _nonnegative)
    add('--opt-betas', 'betas of the optimizer', None, _share, nargs='+')
    add('--momentum', 'momentum', 0.9, _fraction)
    add('--weight-decay', 'weight decay', 2e-5, _nonnegative)
    add('--clip-grad', 'clip gradients; RepOptimizers measure the equivalent CSLA norm', None, _nonnegative)
    add('--clip-mode', 'how to clip; RepOptimizers: norm only', 'norm', ('norm', 'value', 'agc'))
    add('--layer-decay', 'layer-wise learning rate decay', None, _part)
    add('--opt-kwargs', 'further optimizer arguments', {}, nargs='*', action=Pairs, metavar='K=V')

    group = parser.add_argument_group('Learning rate schedule')
    add('--sched', 'schedule', 'cosine', _SCHEDULES)
    switch('--sched-on-updates', 'step the schedule on updates; done anyway if --epochs is less than 50')
    add('--lr', 'learning rate; overrides --lr-base', None, _nonnegative)
    add('--lr-base', 'learning rate at --lr-base-size: lr = lr_base * batch size / base size', 0.1, _nonnegative)
    add('--lr-base-size', 'global batch size of --lr-base', 256, _count)
    add('--lr-base-scale', 'how --lr-base scales [what suits --opt]', '', ('', 'linear', 'sqrt'))
    add('--warmup-lr', 'learning rate that the warm-up starts from', 1e-5, _nonnegative)
    add('--min-lr', 'lower bound of the learning rate', 0.0, _nonnegative)
    add('--epochs', 'number of epochs', 300, _count)
    add('--warmup-epochs', 'epochs of warm-up [a fifth of --epochs, 5 at most]', None, _nonnegative)
    switch('--warmup-prefix', 'start the schedule after the warm-up, which then adds to --epochs')
    add('--cooldown-epochs', 'epochs at the lowest learning rate, after the schedule', 0, _natural)
    add('--decay-epochs', 'interval of the step schedule', 90.0, _positive)
    add('--decay-milestones', 'epochs of the multistep schedule', [90, 180, 270], _count, nargs='+')
    add('--decay-rate', 'factor of the step schedules', 0.1, _positive)
    add('--patience-epochs', 'patience of the plateau schedule', 10, _natural)
    add('--patience', 'stop when the validation accuracy has not improved for N epochs', None, _count)

    group = parser.add_argument_group('Augmentation and regularization')
    switch('--no-aug', 'no training augmentation')
    add('--train-crop-mode', 'crop mode in train', None, ('rrc', 'rkrc', 'rkrr'))
    add('--scale', 'range of the random crop area', [0.08, 1.0], _part, nargs=2)
    add('--ratio', 'range of the random aspect ratio', [3 / 4, 4 / 3], _positive, nargs=2)
    add('--hflip', 'probability of a horizontal flip', 0.5, _share)
    add('--vflip', 'probability of a vertical flip', 0.0, _share)
    add('--color-jitter', 'color jitter; null in a config for none', 0.4, _nonnegative)
    add('--aa', 'AutoAugment policy, such as rand-m9-mstd0.5')
    add('--aug-repeats', 'repeats of an image, in a parallel run', 0.0, _nonnegative)
    add('--reprob', 'probability of random erasing', 0.0, _share)
    add('--remode', 'mode of random erasing', 'pixel', ('pixel', 'rand', 'const'))
    add('--recount', 'count of random erasing', 1, _count)
    add('--mixup', 'mixup alpha', 0.0, _nonnegative)
    add('--cutmix', 'cutmix alpha', 0.0, _nonnegative)
    add('--mixup-prob', 'probability of mixup or cutmix', 1.0, _share)
    add('--mixup-switch-prob', 'probability of cutmix when both are on', 0.5, _share)
    add('--mixup-mode', 'mixup per batch, pair or elem', 'batch', ('batch', 'pair', 'elem'))
    add('--mixup-off-epoch', 'turn mixup off after this epoch', 0, _natural)
    switch('--bce-loss', 'binary cross entropy')
    switch('--bce-sum', 'sum the binary cross entropy over the classes')
    add('--bce-target-thresh', 'binary cross entropy: targets above this are 1, others 0', None, _share)
    add('--bce-pos-weight', 'binary cross entropy: weight of positive targets', None, _positive)
    add('--smoothing', 'label smoothing', 0.1, _fraction)
    add('--class-weights', 'weigh the loss of an image by the inverse size of its class', None, ('balanced',))
    add('--train-interpolation', 'interpolation of training images', 'random', ('random', *_INTERPOLATIONS))
    add('--drop', 'dropout rate of the classifier', 0.0, _fraction)
    add('--drop-path', 'rate of stochastic depth', None, _fraction)
    add('--drop-block', 'rate of dropped blocks', None, _fraction)

    group = parser.add_argument_group('BatchNorm and weight averaging')
    add('--bn-momentum', "momentum of BatchNorm [the model's]", None, _share)
    add('--bn-eps', "epsilon of BatchNorm [the model's]", None, _positive)
    switch('--sync-bn', 'synchronized BatchNorm, on GPUs')
    add('--dist-bn', 'BatchNorm statistics between processes', 'reduce', ('', 'broadcast', 'reduce'))
    switch('--model-ema', 'keep an exponential moving average of the weights')
    add('--model-ema-decay', 'decay of the average', 0.9998, _fraction)
    switch('--model-ema-warmup', 'warm the decay up')

    group = parser.add_argument_group('Run')
    add('--seed', 'random seed', 42, number(int, low=0, high=10**9))
    add('--log-interval', 'batches between lines of progress', 50, _count)
    add('--val-interval', 'epochs between validations', 1, _count)
    add('--checkpoint-hist', 'number of best checkpoints to keep', 3, _count)
    add('-j --workers', 'processes that load data, not more than there are cores', 4, _natural)
    switch('--pin-mem', 'pin memory, for GPUs')
    add('--output', 'folder of runs', 'output')
    add('--experiment', "folder of this run in --output [time and model's name]", '')
    switch('--log-tensorboard', 'log to TensorBoard, if installed')
    switch('--log-wandb', 'log to Weights & Biases, if installed')
    switch('--debug', 'show the traceback of an error')
    switch('--search-first', f'search scales with a weight decay of {SEARCH_DECAY:g}, then train --model with them')
