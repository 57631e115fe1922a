"""The arguments of a training run: one typed table, from which parser, config check and validation derive.

Names and defaults are those of timm's training script, unless the help says otherwise.
"""

import ast
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ['ARGUMENTS', 'SECTIONS', 'Argument']

_POOLS = ('avg', 'max', 'avgmax', 'catavgmax')
_INTERPOLATIONS = ('nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos')
_SCHEDULES = ('cosine', 'tanh', 'step', 'multistep', 'constant', 'plateau', 'poly', 'wsd', 'rsqrt', 'none')
_TRUE, _FALSE = ('true', 'yes', '1'), ('false', 'no', '0')
_LARGEST_INT = 2**31 - 1


@dataclass(frozen=True)
class Argument:
    """One argument, on the command line, in a config and in `--search-kwargs`.

    Attributes:
        name: Name in a config; the flag is `--name` with dashes.
        kind: `str`, `int`, `float`, `bool`, or `dict` for K=V pairs.
        default: Value if it is not given.
        help: What it is.
        low: Smallest value.
        above: Value that it has to exceed.
        high: Largest value.
        below: Value that it has to stay below.
        choices: The values that a text can have.
        count: Numbers of values that a list can have; a single value without.
        short: Short flag.
        metavar: Name of the value in the help.
        const: Value of the flag without one.
        optional: Whether a config may set it to null although that is not the default.
        free: Whether a resumed run may change it without `--override`.
    """

    name: str
    kind: type
    default: Any = None
    help: str = ''
    low: float | None = None
    above: float | None = None
    high: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    count: tuple[int, ...] = ()
    short: str = ''
    metavar: str | None = None
    const: str | None = None
    optional: bool = False
    free: bool = False

    @property
    def flag(self) -> str:
        return '--' + self.name.replace('_', '-')

    @property
    def expected(self) -> str:
        """What values it can have, in words."""
        if self.choices:
            return 'one of ' + ', '.join(repr(choice) for choice in self.choices)
        if self.kind is dict:
            return "'argument: value' pairs"
        if self.kind is bool:
            return 'true or false'
        if self.kind is str:
            return 'text'
        limits = [('at least', self.low), ('above', self.above), ('at most', self.high), ('below', self.below)]
        limits_text = ' and '.join(f'{word} {limit:g}' for word, limit in limits if limit is not None)
        what = 'whole number' if self.kind is int else 'finite number'
        if self.count:
            counts = ' or '.join(str(count) for count in self.count) + ' ' if self.count != _ANY_COUNT else ''
            return f'{counts}{what}s {limits_text}'.rstrip()
        return f'a {what} {limits_text}'.rstrip()

    def parse(self, text: Any, where: str) -> Any:
        """Converts what the command line gives: text, a list of texts, or the default of a flag.

        Raises:
            ValueError: If it is not a value of this argument.
        """
        if self.kind is dict:
            return _pairs(text, self.expected, where)
        if self.count:
            values = text if isinstance(text, list) else text.strip('()[] ').replace(',', ' ').split()
            return self.check([self._number(value) for value in values], where)
        if isinstance(text, str):
            return self.check(self._number(text), where)
        return self.check(text, where)

    def _number(self, text: str) -> Any:
        # What is not a number stays text, which `check` refuses.
        if self.kind is bool:
            return {**dict.fromkeys(_TRUE, True), **dict.fromkeys(_FALSE, False)}.get(text.lower(), text)
        if self.kind is str:
            return text
        try:
            return self.kind(text)
        except ValueError:
            return text

    def check(self, value: Any, where: str) -> Any:
        """Checks a typed value, such as YAML gives.

        Args:
            value: The value; None stands for the default if that is None.
            where: What an error calls the argument.

        Returns:
            The value; whole numbers as floats where those are asked for.

        Raises:
            ValueError: If it is not a value of this argument.
        """
        if value is None and (self.default is None or self.optional):
            return None
        if self.count:
            if not isinstance(value, list | tuple) or (self.count != _ANY_COUNT and len(value) not in self.count):
                raise self._error(value, where)
            if not value:
                raise self._error(value, where)
            return [self._one(item, value, where) for item in value]
        return self._one(value, value, where)

    def _one(self, item: Any, value: Any, where: str) -> Any:
        kind: Any = self.kind
        if self.kind is float and isinstance(item, str):
            # YAML takes 4e-5 for text.
            item = self._number(item)
        if self.kind is float and isinstance(item, int) and not isinstance(item, bool) and abs(item) < 2**53:
            item = float(item)
        if type(item) is not kind or not self._in_range(item):
            raise self._error(value, where)
        if kind is str and '\0' in item:
            raise ValueError(f'{where} has a null character, expected {self.expected}.')
        if kind is dict and not all(isinstance(key, str) for key in item):
            raise self._error(value, where)
        return item

    def _in_range(self, item: Any) -> bool:
        if self.choices:
            return item in self.choices
        if self.kind not in (int, float):
            return True
        if self.kind is int and abs(item) > _LARGEST_INT:
            return False
        return (
            math.isfinite(item)
            and (self.low is None or item >= self.low)
            and (self.above is None or item > self.above)
            and (self.high is None or item <= self.high)
            and (self.below is None or item < self.below)
        )

    def _error(self, value: Any, where: str) -> ValueError:
        found = repr(value)
        return ValueError(f'{where} is {found if len(found) < 80 else found[:77] + "..."}, expected {self.expected}.')


_ANY_COUNT = tuple(range(1, 1000))
_PAIR = (2,)
_MODES = ('1', 'L', 'LA', 'RGB', 'RGBA', 'CMYK', 'YCbCr', 'LAB', 'HSV', 'I', 'F')


def _pairs(texts: Sequence[str] | dict[str, Any], expected: str, where: str) -> dict[str, Any]:
    if isinstance(texts, dict):
        return texts
    pairs: dict[str, Any] = {}
    for text in texts:
        key, separator, value = text.partition('=')
        if not separator or not key:
            raise ValueError(f"{where} has '{text}', expected K=V, such as {where} name=value.")
        if key in pairs:
            raise ValueError(f"{where} gives '{key}' twice, expected it once.")
        try:
            pairs[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            pairs[key] = value
    return pairs


def _probability(name: str, default: float, text: str) -> Argument:
    return Argument(name, float, default, text, low=0, high=1)


SECTIONS: dict[str, tuple[Argument, ...]] = {
    'Data': (
        Argument('data_dir', str, None, 'path to dataset: image folders, or .tar files', metavar='DIR'),
        Argument(
            'dataset',
            str,
            '',
            'dataset type, such as torch/cifar10, hfds/NAME, wds/NAME, digits. Defaults to an image folder or .tar. '
            'Streamed data (wds/, hfids/) is not repeated exactly when a run is resumed.',
            metavar='NAME',
        ),
        Argument('train_split', str, 'train', 'dataset train split', metavar='NAME'),
        Argument('val_split', str, 'validation', 'dataset validation split', metavar='NAME', free=True),
        Argument('train_num_samples', int, None, 'number of training samples, for streamed data', low=1),
        Argument('val_num_samples', int, None, 'number of validation samples, for streamed data', low=1, free=True),
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
            "'published' by the authors, 'initial' for unsearched values. Defaults to those that ship for a target",
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
        Argument('num_classes', int, None, "number of classes. Defaults to the dataset's", low=1),
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
        Argument('interpolation', str, '', 'resize interpolation', choices=('', *_INTERPOLATIONS), free=True),
        Argument('batch_size', int, 128, 'batch size of each process', low=1, short='-b'),
        Argument('validation_batch_size', int, None, 'batch size for validation', low=1, short='-vb', free=True),
        Argument('channels_last', bool, False, 'channels_last memory layout', free=True),
        Argument('grad_accum_steps', int, 1, 'batches to accumulate gradients of before a step', low=1),
        Argument('grad_checkpointing', bool, False, 'recompute activations in the backward pass', free=True),
        Argument('model_kwargs', dict, {}, 'further model arguments', metavar='K=V'),
        Argument('torchcompile', str, None, 'compile the model', metavar='BACKEND', const='inductor', free=True),
    ),
    'Device': (
        Argument('device', str, None, 'device to train on. Defaults to cuda if available, else cpu', free=True),
        Argument('amp', bool, False, 'mixed precision'),
        Argument('amp_dtype', str, 'float16', 'lower precision of --amp', choices=('float16', 'bfloat16')),
    ),
    'Optimizer': (
        Argument('opt', str, None, 'optimizer. Defaults to repopt_sgd for a RepOpt-VGG target, else sgd'),
        Argument('opt_eps', float, None, 'epsilon of the optimizer', low=0),
        Argument('opt_betas', float, None, 'betas of the optimizer', low=0, high=1, count=(1, 2, 3)),
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
            'how --lr-base scales. Defaults to what suits --opt',
            choices=('', 'linear', 'sqrt'),
        ),
        Argument('warmup_lr', float, 1e-5, 'learning rate that the warm-up starts from', low=0),
        Argument('min_lr', float, 0.0, 'lower bound of the learning rate', low=0),
        Argument('epochs', int, 300, 'number of epochs', low=1, free=True),
        Argument('warmup_epochs', int, 5, 'epochs of warm-up', low=0),
        Argument('cooldown_epochs', int, 0, 'epochs at the lowest learning rate, after the schedule', low=0, free=True),
        Argument('decay_epochs', float, 90.0, 'interval of the step schedule', above=0),
        Argument('decay_milestones', int, [90, 180, 270], 'epochs of the multistep schedule', low=1, count=_ANY_COUNT),
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
            choices=('random', *_INTERPOLATIONS),
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
            "folder of this run in --output. Defaults to time and model's name",
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
            'arguments of the search that differ, such as data_dir=... epochs=... lr=...',
            metavar='K=V',
            free=True,
        ),
    ),
}

ARGUMENTS: dict[str, Argument] = {argument.name: argument for section in SECTIONS.values() for argument in section}
