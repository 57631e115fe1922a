"""The arguments of a training run. Names and defaults are those of timm's training script, unless the help differs."""

import argparse

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

    def switch(flag: str, text: str) -> None:
        add(flag, action='store_true', help=text)

    add = parser.add_argument_group('Data').add_argument
    add('--data-dir', metavar='DIR', help='path to dataset: image folders, or .tar files')
    add(
        '--dataset',
        default='',
        metavar='NAME',
        help='dataset type, such as torch/cifar10, hfds/NAME, wds/NAME, digits; streamed data (wds/, hfids/) are not '
        'repeated exactly when a run is resumed [image folder or .tar]',
    )
    add('--train-split', default='train', metavar='NAME', help='dataset train split')
    add('--val-split', default='validation', metavar='NAME', help='dataset validation split')
    add('--train-num-samples', type=_count, help='number of training samples, for streamed data')
    add('--val-num-samples', type=_count, help='number of validation samples, for streamed data')
    add('--train-images', type=_count, help='train on N images, the same random ones for each seed')
    holdout = 'validate on this share of the training images, on which the run then does not train'
    add('--holdout', type=_fraction, default=0.0, metavar='SHARE', help=holdout)
    switch('--cache-images', 'keep decoded images in memory, from the first epoch on; with --workers 0')
    sampler = 'draw training images so that all classes come equally often'
    add('--sampler', choices=('balanced',), help=sampler)
    switch('--dataset-download', 'allow download for torch/ and others that support it')
    add('--class-map', default='', metavar='FILE', help='class map: a .txt file with the name of a class on each line')
    add('--input-img-mode', choices=('L', 'RGB', 'RGBA'), help='image color mode [that of the channels]')
    add('--input-key', metavar='KEY', help='dataset key of the images')
    add('--target-key', metavar='KEY', help='dataset key of the labels')

    add = parser.add_argument_group('Model').add_argument
    add('--model', default='repopt_vgg_a0', help='name of a timm model; _hs for a search, _csla for validation')
    add(
        '--scales',
        metavar='SOURCE',
        help="a file, a folder with a model card, 'hf-hub:user/repo[@revision]', a name of `scales list`, 'published' "
        "by the authors, 'implied' by the branches of pretrained weights, 'initial' for unsearched values, 'identity' "
        'for these from convolutions that start as the identity [what pretrained or initial weights were trained '
        'with, else initial]',
    )
    init = "'dirac' makes each convolution of equal channels and stride 1 the identity, by torch.nn.init.dirac_"
    add('--init', default='', choices=['', 'dirac'], help=init)
    switch('--pretrained', 'start from pretrained weights')
    add('--initial-checkpoint', default='', metavar='FILE', help='start from the weights of a checkpoint')
    resume = 'continue from FILE [last.pth.tar in --output/--experiment, if there is one]'
    add('--resume', nargs='?', const='auto', metavar='FILE', help=resume)
    switch('--override', 'resume with other arguments, or from an earlier checkpoint than the last')
    add('--num-classes', type=_count, help="number of classes [the dataset's]")
    add('--gp', metavar='POOL', help="global pool type, such as avg [the model's]")
    add('--img-size', type=_count, help='image size, for square images')
    add('--in-chans', type=int, choices=(1, 3, 4), help='number of image channels')
    add('--input-size', type=_count, nargs=3, help='image dimensions: channels height width')
    add('--crop-pct', type=_part, metavar='SHARE', help='center crop percent, for validation')
    add('--mean', type=number(float), nargs='+', help='mean pixel value')
    add('--std', type=_positive, nargs='+', help='standard deviation of pixel values')
    add('--interpolation', default='', choices=('', *INTERPOLATIONS), help="resize interpolation [the model's]")
    add('-b', '--batch-size', type=_count, default=128, help='batch size of each process')
    add('-vb', '--validation-batch-size', type=_count, help='batch size for validation [--batch-size]')
    switch('--channels-last', 'channels_last memory layout')
    accumulate = 'batches to accumulate gradients of before a step'
    add('--grad-accum-steps', type=_count, default=1, help=accumulate)
    switch('--grad-checkpointing', 'recompute activations in the backward pass')
    add('--model-kwargs', nargs='*', action=Pairs, default={}, metavar='K=V', help='further model arguments')
    add('--torchcompile', nargs='?', const='inductor', metavar='BACKEND', help='compile the model')

    add = parser.add_argument_group('Device').add_argument
    add('--device', help='device to train on [cuda if available, else cpu]')
    switch('--amp', 'mixed precision')
    add('--amp-dtype', default='float16', choices=('float16', 'bfloat16'), help='lower precision of --amp')

    add = parser.add_argument_group('Optimizer').add_argument
    add('--opt', type=str.lower, metavar='NAME', help='optimizer [repopt_sgd for a plain repopt_* model, else sgd]')
    add('--opt-eps', type=_nonnegative, help='epsilon of the optimizer')
    add('--opt-betas', type=_share, nargs='+', help='betas of the optimizer')
    add('--momentum', type=_fraction, default=0.9, help='momentum')
    add('--weight-decay', type=_nonnegative, default=2e-5, help='weight decay')
    clip = 'clip gradients; RepOptimizers measure the equivalent CSLA norm'
    add('--clip-grad', type=_nonnegative, metavar='NORM', help=clip)
    add('--clip-mode', default='norm', choices=('norm', 'value', 'agc'), help='how to clip; RepOptimizers: norm only')
    add('--layer-decay', type=_part, help='layer-wise learning rate decay')
    add('--opt-kwargs', nargs='*', action=Pairs, default={}, metavar='K=V', help='further optimizer arguments')

    add = parser.add_argument_group('Learning rate schedule').add_argument
    add('--sched', default='cosine', choices=_SCHEDULES, help='schedule')
    switch('--sched-on-updates', 'step the schedule on updates; done anyway if --epochs is less than 50')
    add('--lr', type=_nonnegative, help='learning rate; overrides --lr-base')
    base = 'learning rate at --lr-base-size: lr = lr_base * batch size / base size'
    add('--lr-base', type=_nonnegative, default=0.1, metavar='LR', help=base)
    add('--lr-base-size', type=_count, default=256, help='global batch size of --lr-base')
    rule = 'how --lr-base scales [what suits --opt]'
    add('--lr-base-scale', default='', choices=('', 'linear', 'sqrt'), help=rule)
    add('--warmup-lr', type=_nonnegative, default=1e-5, metavar='LR', help='learning rate that the warm-up starts from')
    add('--min-lr', type=_nonnegative, default=0.0, metavar='LR', help='lower bound of the learning rate')
    add('--epochs', type=_count, default=300, help='number of epochs')
    warmup = 'epochs of warm-up [a tenth of --epochs, 5 at most]'
    add('--warmup-epochs', type=_nonnegative, help=warmup)
    switch('--warmup-prefix', 'start the schedule after the warm-up, which then adds to --epochs')
    cooldown = 'epochs at the lowest learning rate, after the schedule'
    add('--cooldown-epochs', type=_natural, default=0, help=cooldown)
    add('--decay-epochs', type=_positive, default=90.0, help='interval of the step schedule')
    milestones = 'epochs of the multistep schedule'
    add('--decay-milestones', type=_count, nargs='+', default=[90, 180, 270], help=milestones)
    add('--decay-rate', type=_positive, default=0.1, help='factor of the step schedules')
    add('--patience-epochs', type=_natural, default=10, help='patience of the plateau schedule')
    patience = 'stop when the validation accuracy has not improved for N epochs'
    add('--patience', type=_count, help=patience)

    add = parser.add_argument_group('Augmentation and regularization').add_argument
    switch('--no-aug', 'no training augmentation')
    add('--train-crop-mode', choices=('rrc', 'rkrc', 'rkrr'), help='crop mode in train')
    area = 'range of the random crop area'
    add('--scale', type=_part, nargs=2, default=[0.08, 1.0], help=area)
    aspect = 'range of the random aspect ratio'
    add('--ratio', type=_positive, nargs=2, default=[3 / 4, 4 / 3], help=aspect)
    add('--hflip', type=_share, default=0.5, help='probability of a horizontal flip')
    add('--vflip', type=_share, default=0.0, help='probability of a vertical flip')
    add('--color-jitter', type=_nonnegative, default=0.4, help='color jitter; null in a config for none')
    add('--aa', metavar='POLICY', help='AutoAugment policy, such as rand-m9-mstd0.5')
    add('--aug-repeats', type=_nonnegative, default=0.0, help='repeats of an image, in a parallel run')
    add('--reprob', type=_share, default=0.0, help='probability of random erasing')
    add('--remode', default='pixel', choices=('pixel', 'rand', 'const'), help='mode of random erasing')
    add('--recount', type=_count, default=1, help='count of random erasing')
    add('--mixup', type=_nonnegative, default=0.0, help='mixup alpha')
    add('--cutmix', type=_nonnegative, default=0.0, help='cutmix alpha')
    add('--mixup-prob', type=_share, default=1.0, help='probability of mixup or cutmix')
    switched = 'probability of cutmix when both are on'
    add('--mixup-switch-prob', type=_share, default=0.5, help=switched)
    add('--mixup-mode', default='batch', choices=('batch', 'pair', 'elem'), help='mixup per batch, pair or elem')
    add('--mixup-off-epoch', type=_natural, default=0, help='turn mixup off after this epoch')
    switch('--bce-loss', 'binary cross entropy')
    switch('--bce-sum', 'sum it over the classes')
    add('--bce-target-thresh', type=_share, help='make its targets 1 above this value, else 0')
    add('--bce-pos-weight', type=_positive, help='weight of its positive targets')
    add('--smoothing', type=_fraction, default=0.1, help='label smoothing')
    weights = 'weigh the loss of an image by the inverse size of its class'
    add('--class-weights', choices=('balanced',), help=weights)
    training = 'interpolation of training images'
    add('--train-interpolation', default='random', choices=('random', *INTERPOLATIONS), help=training)
    add('--drop', type=_fraction, default=0.0, help='dropout rate of the classifier')
    add('--drop-path', type=_fraction, help='rate of stochastic depth')
    add('--drop-block', type=_fraction, help='rate of dropped blocks')

    add = parser.add_argument_group('BatchNorm and weight averaging').add_argument
    add('--bn-momentum', type=_share, help="momentum of BatchNorm [the model's]")
    add('--bn-eps', type=_positive, help="epsilon of BatchNorm [the model's]")
    switch('--sync-bn', 'synchronized BatchNorm, on GPUs')
    statistics = 'BatchNorm statistics between processes'
    add('--dist-bn', default='reduce', choices=('', 'broadcast', 'reduce'), help=statistics)
    switch('--model-ema', 'keep an exponential moving average of the weights')
    add('--model-ema-decay', type=_fraction, default=0.9998, help='decay of the average')
    switch('--model-ema-warmup', 'warm the decay up')

    add = parser.add_argument_group('Run').add_argument
    seed = 'random seed; epochs are seeded one by one, so that a resumed run repeats'
    add('--seed', type=number(int, low=0, high=10**9), default=42, help=seed)
    add('--log-interval', type=_count, default=50, help='batches between lines of progress')
    add('--val-interval', type=_count, default=1, help='epochs between validations')
    add('--checkpoint-hist', type=_count, default=3, help='number of best checkpoints to keep')
    workers = 'processes that load data, not more than there are cores'
    add('-j', '--workers', type=_natural, default=4, help=workers)
    switch('--pin-mem', 'pin memory, for GPUs')
    switch('--no-prefetcher', "load without timm's prefetcher")
    add('--output', default='output', metavar='DIR', help='folder of runs')
    experiment = "folder of this run in --output [time and model's name]"
    add('--experiment', default='', metavar='NAME', help=experiment)
    switch('--log-tensorboard', 'log to TensorBoard, if installed')
    switch('--log-wandb', 'log to Weights & Biases, if installed')
    switch('--debug', 'show the traceback of an error')
    decay = SEARCH_DEFAULTS['weight_decay']
    first = f'search the scales with a weight decay of {decay:g}, then train --model with them, then report'
    switch('--search-first', first)
