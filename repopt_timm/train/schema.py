"""The arguments of a training run: one typed table, from which parser, config check and validation derive.

Names and defaults are those of timm's training script, unless the help says otherwise.
"""

from ..console import default_text
from .argument import ANY_COUNT, Argument

__all__ = ['ARGUMENTS', 'INTERPOLATIONS', 'SEARCH_DEFAULTS', 'SECTIONS']

SEARCH_DEFAULTS = {'weight_decay': 4e-5}
"""Of a search, unless `--search-kwargs` say otherwise: strongly decayed identities leave targets that learn slowly."""

_POOLS = ('avg', 'max', 'avgmax', 'catavgmax')
INTERPOLATIONS = ('nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos')
_SCHEDULES = ('cosine', 'tanh', 'step', 'multistep', 'constant', 'plateau', 'poly', 'wsd', 'rsqrt', 'none')
_PAIR = (2,)
_MODES = ('1', 'L', 'LA', 'RGB', 'RGBA', 'CMYK', 'YCbCr', 'LAB', 'HSV', 'I', 'F')


def _probability(name: str, default: float, text: str) -> Argument:
    return Argument(name, float, default, text, low=0, high=1)


SECTIONS: dict[str, tuple[Argument, ...]] = {
    'Data': (
        Argument('data_dir', str, None, 'path to dataset: image folders, or .tar files', metavar='DIR'),
        Argument(
            'dataset',
            str,
            '',
            'dataset type, such as torch/cifar10, hfds/NAME, wds/NAME, digits; streamed data (wds/, hfids/) is not '
            'repeated exactly when a run is resumed [image folder or .tar]',
            metavar='NAME',
        ),
        Argument('train_split', str, 'train', 'dataset train split', metavar='NAME'),
        Argument('val_split', str, 'validation', 'dataset validation split', metavar='NAME', free=True),
        Argument('train_num_samples', int, None, 'number of training samples, for streamed data', low=1),
        Argument('val_num_samples', int, None, 'number of validation samples, for streamed data', low=1, free=True),
        Argument('train_images', int, None, 'train on this many images, the same random ones for each seed', low=1),
        Argument(
            'holdout',
            float,
            0.0,
            'validate on this share of the training images, on which the run then does not train, instead of on '
            '--val-split: to choose hyperparameters',
            low=0,
            below=1,
        ),
        Argument(
            'cache_images',
            bool,
            False,
            'keep decoded images in memory, from the first epoch on; with --workers 0',
            free=True,
        ),
        Argument('dataset_download', bool, False, 'allow download for torch/ and others that support it', free=True),
        Argument('class_map', str, '', 'path to class to index mapping file', metavar='FILE'),
        Argument('input_img_mode', str, None, 'image color mode, such as RGB or L', choices=_MODES),
        Argument('input_key', str, None, 'dataset key of the images'),
        Argument('target_key', str, None, 'dataset key of the labels'),
    ),
    'Model': (
        Argument('model', str, 'repopt_vgg_a0', 'name of a timm model; _hs for a search, _csla for validation'),
        Argument(
            'scales',
            str,
            None,
            "scales: a file, a folder with a model card, 'hf-hub:user/repo[@revision]', a name of `scales list`, "
            "'published' by the authors, 'implied' by the branches of pretrained weights, 'initial' for unsearched "
            'values [of a target: what its pretrained or initial weights were trained with, else initial]',
            metavar='SOURCE',
            free=True,
        ),
        Argument('pretrained', bool, False, 'start from pretrained weights', free=True),
        Argument('initial_checkpoint', str, '', 'start from the weights of a checkpoint', metavar='FILE', free=True),
        Argument(
            'resume',
            str,
            None,
            'continue a run from its checkpoint, in its folder. Without FILE: from last.pth.tar in '
            '--output/--experiment if there is one, else from the start',
            metavar='FILE',
            const='auto',
            free=True,
        ),
        Argument(
            'override',
            bool,
            False,
            'resume with arguments that differ from those of the run, or from an earlier checkpoint than its last',
            free=True,
        ),
        Argument('num_classes', int, None, "number of classes [the dataset's]", low=1),
        Argument(
            'gp',
            str,
            None,
            'global pool type',
            metavar='POOL',
            choices=('', *_POOLS, *(f'fast{pool}' for pool in ('', *_POOLS)), 'token', 'map'),
        ),
        Argument('img_size', int, None, 'image size, for square images', low=1),
        Argument('in_chans', int, None, 'number of image channels', low=1, high=4),
        Argument('input_size', int, None, 'image dimensions: channels height width', low=1, count=(3,), metavar='N'),
        Argument('crop_pct', float, None, 'center crop percent, for validation', above=0, high=1, free=True),
        Argument('mean', float, None, 'mean pixel value', count=(1, 2, 3, 4)),
        Argument('std', float, None, 'standard deviation of pixel values', above=0, count=(1, 2, 3, 4)),
        Argument('interpolation', str, '', 'resize interpolation', choices=('', *INTERPOLATIONS), free=True),
        Argument('batch_size', int, 128, 'batch size of each process', low=1, short='-b'),
        Argument('validation_batch_size', int, None, 'batch size for validation', low=1, short='-vb', free=True),
        Argument('channels_last', bool, False, 'channels_last memory layout', free=True),
        Argument('grad_accum_steps', int, 1, 'batches to accumulate gradients of before a step', low=1),
        Argument('grad_checkpointing', bool, False, 'recompute activations in the backward pass', free=True),
        Argument('model_kwargs', dict, {}, 'further model arguments', metavar='K=V'),
        Argument('torchcompile', str, None, 'compile the model', metavar='BACKEND', const='inductor', free=True),
    ),
    'Device': (
        Argument('device', str, None, 'device to train on [cuda if available, else cpu]', free=True),
        Argument('amp', bool, False, 'mixed precision'),
        Argument('amp_dtype', str, 'float16', 'lower precision of --amp', choices=('float16', 'bfloat16')),
    ),
    'Optimizer': (
        Argument('opt', str, None, 'optimizer [repopt_sgd for a plain repopt_* model, else sgd]', any_case=True),
        Argument('opt_eps', float, None, 'epsilon of the optimizer', low=0),
        Argument('opt_betas', float, None, 'betas of the optimizer', low=0, high=1, count=(2, 3)),
        Argument('momentum', float, 0.9, 'momentum', low=0, below=1),
        Argument('weight_decay', float, 2e-5, 'weight decay', low=0),
        Argument(
            'clip_grad',
            float,
            None,
            'clip gradients; RepOptimizers measure the equivalent CSLA norm',
            low=0,
            metavar='NORM',
        ),
        Argument('clip_mode', str, 'norm', 'how to clip; RepOptimizers: norm only', choices=('norm', 'value', 'agc')),
        Argument('layer_decay', float, None, 'layer-wise learning rate decay', above=0, high=1),
        Argument('opt_kwargs', dict, {}, 'further optimizer arguments', metavar='K=V'),
    ),
    'Learning rate schedule': (
        Argument('sched', str, 'cosine', 'schedule', choices=_SCHEDULES),
        Argument('sched_on_updates', bool, False, 'step the schedule on updates instead of epochs'),
        Argument('lr', float, None, 'learning rate; overrides --lr-base', low=0),
        Argument(
            'lr_base',
            float,
            0.1,
            'learning rate at --lr-base-size: lr = lr_base * batch size / base size',
            low=0,
        ),
        Argument('lr_base_size', int, 256, 'global batch size of --lr-base', low=1),
        Argument(
            'lr_base_scale',
            str,
            '',
            'how --lr-base scales: linear or sqrt [what suits --opt]',
            choices=('', 'linear', 'sqrt'),
            metavar='RULE',
        ),
        Argument('warmup_lr', float, 1e-5, 'learning rate that the warm-up starts from', low=0),
        Argument('min_lr', float, 0.0, 'lower bound of the learning rate', low=0),
        Argument('epochs', int, 300, 'number of epochs', low=1, free=True),
        Argument('warmup_epochs', int, None, 'epochs of warm-up [a fifth of --epochs, 5 at most]', low=0),
        Argument('cooldown_epochs', int, 0, 'epochs at the lowest learning rate, after the schedule', low=0, free=True),
        Argument('decay_epochs', float, 90.0, 'interval of the step schedule', above=0),
        Argument('decay_milestones', int, [90, 180, 270], 'epochs of the multistep schedule', low=1, count=ANY_COUNT),
        Argument('decay_rate', float, 0.1, 'factor of the step schedules', above=0),
        Argument('patience_epochs', int, 10, 'patience of the plateau schedule', low=0),
    ),
    'Augmentation and regularization': (
        Argument('no_aug', bool, False, 'no training augmentation'),
        Argument('train_crop_mode', str, None, 'crop mode in train', choices=('rrc', 'rkrc', 'rkrr')),
        Argument('scale', float, [0.08, 1.0], 'range of the random crop area', above=0, high=1, count=_PAIR),
        Argument('ratio', float, [3 / 4, 4 / 3], 'range of the random aspect ratio', above=0, count=_PAIR),
        _probability('hflip', 0.5, 'probability of a horizontal flip'),
        _probability('vflip', 0.0, 'probability of a vertical flip'),
        Argument('color_jitter', float, 0.4, 'color jitter; null in a config for none', low=0, optional=True),
        Argument('aa', str, None, 'AutoAugment policy, such as rand-m9-mstd0.5'),
        _probability('reprob', 0.0, 'probability of random erasing'),
        Argument('remode', str, 'pixel', 'mode of random erasing', choices=('pixel', 'rand', 'const')),
        Argument('recount', int, 1, 'count of random erasing', low=1),
        Argument('mixup', float, 0.0, 'mixup alpha', low=0),
        Argument('cutmix', float, 0.0, 'cutmix alpha', low=0),
        _probability('mixup_prob', 1.0, 'probability of mixup or cutmix'),
        _probability('mixup_switch_prob', 0.5, 'probability of cutmix when both are on'),
        Argument('mixup_mode', str, 'batch', 'mixup per batch, pair or elem', choices=('batch', 'pair', 'elem')),
        Argument('mixup_off_epoch', int, 0, 'turn mixup off after this epoch', low=0),
        Argument('bce_loss', bool, False, 'binary cross entropy'),
        Argument('smoothing', float, 0.1, 'label smoothing', low=0, below=1),
        Argument(
            'train_interpolation',
            str,
            'random',
            'interpolation of training images',
            choices=('random', *INTERPOLATIONS),
        ),
        Argument('drop', float, 0.0, 'dropout rate of the classifier', low=0, below=1),
    ),
    'BatchNorm and weight averaging': (
        Argument('sync_bn', bool, False, 'synchronized BatchNorm, on GPUs'),
        Argument(
            'dist_bn', str, 'reduce', 'BatchNorm statistics between processes', choices=('', 'broadcast', 'reduce')
        ),
        Argument('model_ema', bool, False, 'keep an exponential moving average of the weights'),
        Argument('model_ema_decay', float, 0.9998, 'decay of the average', low=0, below=1),
        Argument('model_ema_warmup', bool, False, 'warm the decay up'),
    ),
    'Run': (
        Argument(
            'seed',
            int,
            42,
            'random seed; epochs are seeded one by one, so that a resumed run repeats',
            low=0,
            high=10**9,
        ),
        Argument('log_interval', int, 50, 'batches between lines of progress', low=1, free=True),
        Argument('val_interval', int, 1, 'epochs between validations', low=1, free=True),
        Argument('checkpoint_hist', int, 3, 'number of best checkpoints to keep', low=1, free=True),
        Argument('workers', int, 4, 'processes that load data', low=0, high=1024, short='-j', free=True),
        Argument('pin_mem', bool, False, 'pin memory, for GPUs', free=True),
        Argument('no_prefetcher', bool, False, "load without timm's prefetcher"),
        Argument('output', str, 'output', 'folder of runs', metavar='DIR', free=True),
        Argument(
            'experiment',
            str,
            '',
            "folder of this run in --output [time and model's name]",
            metavar='NAME',
            free=True,
        ),
        Argument('log_tensorboard', bool, False, 'log to TensorBoard, if installed', free=True),
        Argument('log_wandb', bool, False, 'log to Weights & Biases, if installed', free=True),
        Argument('debug', bool, False, 'show the traceback of an unforeseen error', free=True),
    ),
    'Search and train': (
        Argument(
            'search_first', bool, False, 'search the scales, then train --model with them, then report', free=True
        ),
        Argument(
            'search_kwargs',
            dict,
            {},
            f'arguments of the search that differ, such as data_dir=... epochs=...{default_text(SEARCH_DEFAULTS)}',
            metavar='K=V',
            free=True,
        ),
    ),
}

ARGUMENTS: dict[str, Argument] = {argument.name: argument for section in SECTIONS.values() for argument in section}
