"""What a run refuses: a row is a name, its arguments, and a part of the message. A new mistake is a new line.

`DATA` stands for a folder of images, `TMP` for an empty one; a row that has a config gives its text after `-c`.
"""

import random
import shutil

import pytest
import torch
from PIL import Image

from repopt_timm.cli import main
from repopt_timm.train import run
from repopt_timm.train.loaders import make_datasets
from repopt_timm.train.parsing import parse_arguments
from repopt_timm.train.schema import ARGUMENTS

from ..helpers import TINY, write_tar

ROWS = [
    # Counts.
    ('no epochs', '--epochs 0', '--epochs is 0, expected an integer at least 1'),
    ('negative epochs', '--epochs -3', '--epochs is -3'),
    ('half an epoch', '--epochs 1.5', "--epochs is '1.5', expected an integer"),
    ('epochs in words', '--epochs three', "--epochs is 'three'"),
    ('too many epochs', '--epochs 99999999999', '--epochs is 99999999999'),
    ('no batch', '--batch-size 0', '--batch-size is 0'),
    ('negative batch', '-b -8', '--batch-size is -8'),
    ('no validation batch', '-vb 0', '--validation-batch-size is 0'),
    ('no accumulation', '--grad-accum-steps 0', '--grad-accum-steps is 0'),
    ('no validation interval', '--val-interval 0', '--val-interval is 0'),
    ('no log interval', '--log-interval 0', '--log-interval is 0'),
    ('negative log interval', '--log-interval -1', '--log-interval is -1'),
    ('no checkpoints', '--checkpoint-hist 0', '--checkpoint-hist is 0'),
    ('negative workers', '--workers -1', '--workers is -1'),
    ('very many workers', '-j 100000', '--workers is 100000'),
    ('base size', '--lr-base-size 0', '--lr-base-size is 0'),
    ('decay epochs', '--decay-epochs 0', '--decay-epochs is 0'),
    ('decay milestones', '--decay-milestones 5 0', '--decay-milestones is [5, 0]'),
    ('warm-up', '--warmup-epochs -1', '--warmup-epochs is -1'),
    ('cool-down', '--cooldown-epochs -1', '--cooldown-epochs is -1'),
    ('patience', '--patience-epochs -1', '--patience-epochs is -1'),
    ('erasing count', '--recount 0', '--recount is 0'),
    ('mixup off', '--mixup-off-epoch -1', '--mixup-off-epoch is -1'),
    ('training samples', '--train-num-samples 0', '--train-num-samples is 0'),
    ('validation samples', '--val-num-samples -5', '--val-num-samples is -5'),
    ('negative seed', '--seed -1', '--seed is -1'),
    ('huge seed', '--seed 4294967296', '--seed is 4294967296, expected an integer from 0 to 1000000000'),
    # Numbers.
    ('NaN learning rate', '--lr nan', '--lr is nan, expected a finite number at least 0'),
    ('infinite learning rate', '--lr inf', '--lr is inf'),
    ('negative learning rate', '--lr=-0.1', '--lr is -0.1'),
    ('learning rate in words', '--lr fast', "--lr is 'fast'"),
    ('learning rate beyond floats', '--lr 1e999', '--lr is inf'),
    ('base learning rate', '--lr-base nan', '--lr-base is nan'),
    ('warm-up learning rate', '--warmup-lr=-1', '--warmup-lr is -1.0'),
    ('lowest learning rate', '--min-lr inf', '--min-lr is inf'),
    ('momentum', '--momentum 2', '--momentum is 2.0, expected a finite number at least 0 and below 1'),
    ('momentum 1', '--momentum 1', '--momentum is 1.0'),
    ('negative momentum', '--momentum=-0.5', '--momentum is -0.5'),
    ('weight decay', '--weight-decay=-1', '--weight-decay is -1.0'),
    ('NaN weight decay', '--weight-decay nan', '--weight-decay is nan'),
    ('clipping', '--clip-grad=-1', '--clip-grad is -1.0'),
    ('NaN clipping', '--clip-grad nan', '--clip-grad is nan'),
    ('layer decay', '--layer-decay 0', '--layer-decay is 0.0'),
    ('epsilon', '--opt-eps=-1', '--opt-eps is -1.0'),
    ('betas', '--opt-betas 0.9 2', '--opt-betas is [0.9, 2.0]'),
    ('four betas', '--opt-betas 0.9 0.9 0.9 0.9', '--opt-betas is [0.9, 0.9, 0.9, 0.9], expected 2 or 3'),
    ('one beta', '--opt adamw --opt-betas 0.9', '--opt-betas is [0.9], expected 2 or 3'),
    ('milestones', '--decay-milestones 9 1', '--decay-milestones are [9, 1], expected rising epochs'),
    ('lower bound', '--lr 0.1 --min-lr 0.2', '--min-lr is 0.2 and --lr 0.1'),
    ('learning rate twice', '--opt sgd --opt-kwargs lr=0.3', '--opt-kwargs has lr, which has a flag of its own'),
    ('decay rate', '--decay-rate 0', '--decay-rate is 0.0'),
    ('smoothing', '--smoothing 2', '--smoothing is 2.0, expected a finite number at least 0 and below 1'),
    ('negative smoothing', '--smoothing=-0.1', '--smoothing is -0.1'),
    ('dropout', '--drop 1', '--drop is 1.0'),
    ('flip', '--hflip 1.5', '--hflip is 1.5'),
    ('vertical flip', '--vflip=-0.5', '--vflip is -0.5'),
    ('erasing', '--reprob 2', '--reprob is 2.0'),
    ('jitter', '--color-jitter=-1', '--color-jitter is -1.0'),
    ('NaN jitter', '--color-jitter nan', '--color-jitter is nan'),
    ('mixup', '--mixup=-1', '--mixup is -1.0'),
    ('infinite mixup', '--mixup inf', '--mixup is inf'),
    ('cutmix', '--cutmix nan', '--cutmix is nan'),
    ('mixup probability', '--mixup-prob 1.1', '--mixup-prob is 1.1'),
    ('switch probability', '--mixup-switch-prob=-1', '--mixup-switch-prob is -1.0'),
    ('average', '--model-ema-decay 1', '--model-ema-decay is 1.0'),
    ('negative average', '--model-ema-decay=-0.5', '--model-ema-decay is -0.5'),
    ('crop', '--crop-pct 0', '--crop-pct is 0.0'),
    ('crop beyond the image', '--crop-pct 1.5', '--crop-pct is 1.5'),
    # Pairs and lists.
    ('one scale', '--scale 0.5', '--scale: expected 2 arguments'),
    ('scale of nothing', '--scale 0 1', '--scale is [0.0, 1.0]'),
    ('scale beyond the image', '--scale 0.5 2', '--scale is [0.5, 2.0]'),
    ('scale the wrong way', '--scale 0.9 0.5', '--scale is 0.9 0.5, expected the smaller value first'),
    ('ratio the wrong way', '--ratio 2 1', '--ratio is 2 1, expected the smaller'),
    ('negative ratio', '--ratio=-1 1', '--ratio: expected 2 arguments'),
    ('ratio of nothing', '--ratio 0 1', '--ratio is [0.0, 1.0]'),
    ('two numbers of a size', '--input-size 3 32', '--input-size: expected 3 arguments'),
    ('no pixels', '--input-size 3 0 32', '--input-size is [3, 0, 32]'),
    ('size in words', '--input-size 3 big 32', "--input-size is [3, 'big', 32]"),
    ('two means', '--mean 0.5 0.5', '--mean has 2 values, expected 1 or one for each of 3 channels'),
    ('two deviations', '--std 0.5 0.5', '--std has 2 values'),
    ('no deviation', '--std 0', '--std is [0.0]'),
    ('five means', '--mean 1 2 3 4 5', '--mean is [1.0, 2.0, 3.0, 4.0, 5.0]'),
    ('NaN mean', '--mean nan', '--mean is [nan]'),
    # Choices.
    ('pool', '--gp bogus', "--gp is 'bogus', expected one of"),
    ('policy', '--aa bogus', "--aa is 'bogus', expected a policy of timm: rand-m9"),
    ('policy option', '--aa rand-x9', "--aa is 'rand-x9'"),
    ('policy magnitude', '--aa rand-mhigh', "--aa is 'rand-mhigh'"),
    ('augmix option', '--aa augmix-q3', "--aa is 'augmix-q3'"),
    ('original policy option', '--aa original-x', "--aa is 'original-x'"),
    ('interpolation', '--interpolation bogus', "--interpolation is 'bogus', expected one of '', 'nearest'"),
    ('random interpolation', '--interpolation random', "--interpolation is 'random'"),
    ('training interpolation', '--train-interpolation bogus', "--train-interpolation is 'bogus'"),
    ('crop mode', '--train-crop-mode bogus', "--train-crop-mode is 'bogus', expected one of 'rrc'"),
    ('erasing mode', '--remode bogus', "--remode is 'bogus', expected one of 'pixel', 'rand', 'const'"),
    ('mixup mode', '--mixup-mode bogus', "--mixup-mode is 'bogus'"),
    ('schedule', '--sched bogus', "--sched is 'bogus', expected one of 'cosine'"),
    ('precision', '--amp-dtype float8', "--amp-dtype is 'float8', expected one of 'float16', 'bfloat16'"),
    ('clipping mode', '--clip-mode bogus', "--clip-mode is 'bogus'"),
    ('statistics', '--dist-bn bogus', "--dist-bn is 'bogus'"),
    ('base scale', '--lr-base-scale bogus', "--lr-base-scale is 'bogus'"),
    ('color mode', '--input-img-mode bogus', "--input-img-mode is 'bogus'"),
    ('compiler', '--torchcompile bogus', "--torchcompile 'bogus' is unknown"),
    ('optimizer', '--opt bogus', "--opt 'bogus' is unknown"),
    ('nearly an optimizer', '--opt repopt_sdg', "--opt 'repopt_sdg' is unknown. Did you mean repopt_sgd"),
    ('a suffix that timm trains with', '--opt bogus_sgd', "--opt 'bogus_sgd' is unknown"),
    ('another spelling of an optimizer', '--opt repoptsgd', "'repoptsgd' is unknown. Did you mean repopt_sgd"),
    ('optimizer of a package', '--opt bnbsgd', '--opt bnbsgd needs bitsandbytes: pip install bitsandbytes'),
    ('model', '--model repopt_vgg_a00', "timm knows no model 'repopt_vgg_a00'. Did you mean repopt_vgg_a0"),
    ('no model', '--model=', "--model is '', expected the name of a timm model"),
    ('no folder of a model', '--model local-dir:nowhere', "there is no model in 'nowhere'"),
    # Devices.
    ('device', '--device bogus', "--device is 'bogus', expected cpu, cuda"),
    ('second CPU', '--device cpu:1', "--device is 'cpu:1', which this machine does not have"),
    ('meta', '--device meta', "--device is 'meta', which this machine does not have. Try --device cpu"),
    ('device without float64', '--device mps', "--device is 'mps', which has no float64"),
    ('GPU that is not there', '--device cuda:99', "--device is 'cuda:99', which this machine does not have"),
    ('synchronized BatchNorm', '--sync-bn --device cpu', '--sync-bn works on GPUs, not on cpu'),
    # Data.
    ('data set', '--dataset bogus/x', "--dataset is 'bogus/x', expected digits, torch/NAME"),
    ('data set without prefix', '--dataset imagenet', "--dataset is 'imagenet', expected digits"),
    ('data set without name', '--dataset torch/', 'which names no data set, expected torch/NAME'),
    ('torch data set', '--dataset torch/cifar11', "--dataset torch/ 'cifar11' is unknown. Did you mean cifar10"),
    ('data that are not downloaded', '--dataset torch/cifar10 --data-dir TMP/none', 'download=True'),
    ('no data', '--data-dir=', 'No data: give the path of an image folder'),
    ('folder', '--data-dir nowhere', "There is no image folder 'nowhere'"),
    ('folder twice', '--data-dir two', 'names two folders of data'),
    ('training split', '--train-split bogus', "the split 'bogus', but with train, validation"),
    ('validation split', '--val-split test', "the split 'test', but with train, validation"),
    ('folder without images', '--data-dir TMP', "is not a folder with the split 'train'"),
    ('class map', '--class-map nowhere.txt', 'nowhere.txt'),
    ('class map of another kind', '--class-map DATA/train/dark/0.png', 'is not a text file with a name per line'),
    ('fewer classes than the data', '--num-classes 1', '--num-classes is 1, but the data have 2 classes'),
    ('no classes', '--num-classes 0', '--num-classes is 0'),
    ('batch beyond the data', '--batch-size 998', 'do not fill one batch of 998'),
    # Channels.
    (
        'a size that the model does not take',
        '--model vit_tiny_patch16_224 --scales=',
        'does not take images of 3 x 32 x 32',
    ),
    ('pool of transformers', '--gp token', 'Invalid pool type: token'),
    ('five channels', '--in-chans 5', '--in-chans is 5'),
    ('no channels', '--in-chans 0', '--in-chans is 0'),
    ('channels twice', '--in-chans 1', '--in-chans is 1 and --input-size has 3 channels'),
    ('many channels', '--input-size 12 32 32', 'expected 1, 3 or 4'),
    ('two channels', '--input-size 2 32 32', 'expected 1, 3 or 4'),
    ('grey images for a color model', '--input-img-mode L', 'images of 3 channels in the mode L'),
    ('size twice', '--img-size 64', '--img-size is 64 and --input-size [3, 32, 32]: give one of them'),
    # Combinations.
    ('mixup of an odd batch', '--mixup 0.2 -b 7', '--batch-size is 7, expected an even number'),
    ('cutmix of an odd batch', '--cutmix 1 -b 5', '--batch-size is 5, expected an even number'),
    ('plateau on updates', '--sched plateau --sched-on-updates', 'remove --sched-on-updates'),
    ('agc', '--clip-grad 1 --clip-mode agc', 'breaks the equivalence'),
    ('resume without a name', '--resume --experiment=', '--resume without a file needs --experiment'),
    ('resume from nowhere', '--resume nowhere.pth.tar', "there is no checkpoint file 'nowhere.pth.tar'"),
    ('weights from nowhere', '--initial-checkpoint nowhere', "there is no checkpoint file 'nowhere'"),
    ('weights from a picture', '--initial-checkpoint DATA/train/dark/0.png', '0.png'),
    ('search with scales', '--search-first', '--search-first searches the scales itself'),
    ('search of a search', f'--search-first --model {TINY}_hs --scales=', f"'{TINY}_hs', which --search-first has no"),
    ('search of a timm model', '--search-first --model resnet18 --scales=', 'a target, such as repopt_resnet18.'),
    ('search of a folder', '--search-first --model local-dir:DATA --scales=', 'a target, such as repopt_vgg_a0.'),
    ('search of an unknown model', '--search-first --model repopt_vgg_z9 --scales=', "knows no model 'repopt_vgg_z9'."),
    ('search model with scales', f'--model {TINY}_hs', 'searches scales, so it does not take --scales'),
    ('branches with scales', f'--model {TINY}_branches', 'has branches instead of scales'),
    ('search arguments alone', '--search-kwargs epochs=2', '--search-kwargs are for --search-first'),
    ('scales from nowhere', '--scales nowhere.safetensors', 'No scales found'),
    ('scales twice', '--model-kwargs scales=initial', 'Give scales with --scales instead of --model-kwargs'),
    # Further arguments.
    ('model argument', '--model-kwargs bogus=1', "unexpected keyword argument 'bogus'"),
    ('model argument with a flag', '--model-kwargs num_classes=3', '--model-kwargs has num_classes, which has a flag'),
    ('model argument of no value', '--model-kwargs bogus', "--model-kwargs has 'bogus', expected K=V"),
    ('model argument twice', '--model-kwargs a=1 a=2', "--model-kwargs gives 'a' twice"),
    ('strides', '--model-kwargs strides=abc', 'strides'),
    ('optimizer argument', '--opt-kwargs bogus=1', "--opt-kwargs of repopt_sgd: 'bogus' is unknown. Expected one of"),
    ('nearly an optimizer argument', '--opt-kwargs nestrov=True', 'Did you mean nesterov'),
    ('optimizer of another argument', '--opt sgd --opt-kwargs betas=1', "--opt-kwargs of sgd: 'betas' is unknown"),
    ('optimizer argument of no value', '--opt-kwargs =1', "--opt-kwargs has '=1', expected K=V"),
    ('optimizer within the optimizer', '--opt-kwargs opt=sgd', "'opt' is not an option of the optimizer"),
    # Names.
    ('flag', '--bogus', "unknown argument '--bogus'"),
    ('nearly a flag', '--wieght-decay 1', "unknown argument '--wieght-decay'. Did you mean '--weight-decay'?"),
    ('label key of a folder', '--target-key label', '--target-key is for --dataset hfds/'),
    ('two folders of images', 'more', "unknown argument 'more'"),
    ('flag without value', '--model', '--model: expected one argument'),
    ('several flags', '--mod x', 'ambiguous option: --mod could match'),
    ('value of a switch', '--amp=yes', "ignored explicit argument 'yes'"),
    ('output', '--output=', "--output is '', expected the name of a folder"),
    ('output that is a file', '--output DATA/train/dark/0.png', "0.png' is not a folder"),
    ('output below a file', '--output DATA/train/dark/0.png/x', "0.png' is not a folder"),
    ('experiment outside', '--experiment ../x', "--experiment is '../x', expected a name inside of --output"),
    ('absolute experiment', '--experiment /x', "--experiment is '/x', expected a name inside"),
    ('config', '-c bogus', "There is no config 'bogus'. Give a YAML file, or one of those that ship: "),
    ('config that is a folder', '-c TMP', 'There is no config'),
    ('config that is a picture', '-c DATA/train/dark/0.png', 'is not UTF-8 text'),
]

CONFIGS = [
    ('unknown key', 'learning_rate: 1', "unknown argument 'learning_rate'"),
    ('nearly a key', 'epoch: 1', "unknown argument 'epoch'. Did you mean 'epochs'?"),
    ('dashes', 'weight-decay: 1', "unknown argument 'weight-decay'. Did you mean 'weight_decay'?"),
    ('broken list', 'scale: [1, 2', 'is not a YAML file'),
    ('tab', 'lr:\t- 1\n\tx', 'is not a YAML file'),
    ('two documents', 'lr: 1\n---\nlr: 2', 'it has more than one document, expected one'),
    ('number as a key', '1: 2', 'line 1: the key 1 is not text'),
    ('null as a key', '~: 2', 'the key None is not text'),
    ('list as a key', '[1]: 2', 'is not text'),
    ('key twice', 'lr: 1\nlr: 2', "line 2: 'lr' is given twice"),
    ('key twice within', 'opt_kwargs: {a: 1, a: 2}', "'a' is given twice"),
    ('unknown anchor', 'lr: *x', 'is not a YAML file'),
    ('code', 'lr: !!python/object/apply:os.getcwd []', 'is not a YAML file'),
    ('list', '- 1', 'holds a list, expected'),
    ('empty', '', 'holds a NoneType, expected'),
    ('text', 'hello', 'holds a str, expected'),
    ('deep', 'opt_kwargs: ' + '[' * 3000, 'is not a YAML file'),
    ('text for a boolean', 'model_ema: "false"', "'model_ema' is 'false', expected true or false"),
    ('number for a boolean', 'amp: 1', "'amp' is 1, expected true or false"),
    ('boolean for a count', 'epochs: true', "'epochs' is True, expected an integer"),
    ('fraction for a count', 'epochs: 2.0', "'epochs' is 2.0, expected an integer"),
    ('text for a count', 'epochs: "3"', "'epochs' is '3', expected an integer"),
    ('boolean for a number', 'lr: true', "'lr' is True, expected a finite number"),
    ('list for a number', 'lr: [1]', "'lr' is [1], expected a finite number"),
    ('infinity', 'lr: .inf', "'lr' is inf, expected a finite number"),
    ('NaN', 'weight_decay: .nan', "'weight_decay' is nan"),
    ('null for a number', 'momentum: null', "'momentum' is None"),
    ('null for a text', 'model: null', "'model' is None, expected text"),
    ('number for a text', 'model: 3', "'model' is 3, expected text"),
    ('boolean for a choice', 'sched: no', "'sched' is False, expected one of"),
    ('unknown choice', 'amp_dtype: bf16', "'amp_dtype' is 'bf16', expected one of 'float16', 'bfloat16'"),
    ('number for a pair', 'scale: 0.5', "'scale' is 0.5, expected 2 finite numbers"),
    ('three for a pair', 'scale: [0.1, 0.5, 1]', "'scale' is [0.1, 0.5, 1], expected 2 finite numbers"),
    ('text in a pair', 'ratio: [a, 1]', "'ratio' is ['a', 1]"),
    ('mapping for a list', 'mean: {a: 1}', "'mean' is {'a': 1}"),
    ('empty list', 'mean: []', "'mean' is []"),
    ('list for pairs', 'opt_kwargs: [a=1]', "'opt_kwargs' is ['a=1'], expected 'argument: value' pairs"),
    ('long value', 'lr: ' + 'x' * 200, 'xxx..., expected a finite number'),
    ('resume', 'resume: x', "'resume' belongs on the command line, as --resume"),
    ('config in a config', 'config: quickstart', "unknown argument 'config'"),
    ('two folders', 'data: a\ndata_dir: b', "names two folders of data, 'a' and 'b'"),
    ('tag of another kind', 'amp: !!bool maybe', 'line 1: a value is not the bool that it seems'),
    ('number of no digits', 'lr: !!int "_"', 'line 1: a value is not the int that it seems'),
    ('no date', 'lr: !!timestamp x', 'line 1: a value is not the timestamp that it seems'),
    ('null character', 'model: "a\\0b"', "'model' has a null character"),
    ('search argument', 'search_first: true\nscales: null\nsearch_kwargs: {epoch: 1}', "unknown argument 'epoch'"),
    ('search value', 'search_kwargs: {epochs: 0}', '--search-kwargs epochs is 0'),
    ('text for a search switch', 'search_kwargs: {amp: "no"}', "--search-kwargs amp is 'no', expected true or false"),
]


def refuse(capsys, output, message, words):
    assert main(['train', *words]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1]
    assert lines[-1].startswith('error: ')
    assert 'Traceback' not in ''.join(lines)
    assert 'foreseen' not in lines[-1]
    assert 'weights_only' not in lines[-1]
    assert not output.exists()


def with_paths(text, images, tmp_path):
    return text.replace('DATA', str(images)).replace('TMP', str(tmp_path)).split()


@pytest.mark.parametrize(('text', 'message'), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_a_bad_argument_is_refused_in_one_line_and_leaves_no_folder(images, tmp_path, capsys, text, message):
    (tmp_path / 'empty').mkdir()
    extra = with_paths(text, images, tmp_path / 'empty')
    data = [] if any(word.startswith('--data-dir') for word in extra) and 'two' not in extra else [str(images)]
    words = [*data, '--model', TINY, '--scales', 'initial', '--input-size', '3', '32', '32', '--epochs', '1']
    where = ['--batch-size', '8', '--workers', '0', '--output', str(tmp_path / 'output'), '--experiment', 'run']
    refuse(capsys, tmp_path / 'output', message, [*words, *where, *extra])


@pytest.mark.parametrize(('text', 'message'), [row[1:] for row in CONFIGS], ids=[row[0] for row in CONFIGS])
def test_a_bad_config_is_refused_in_one_line_and_leaves_no_folder(tmp_path, capsys, text, message):
    config = tmp_path / 'config.yaml'
    config.write_text(text)
    where = ['--output', str(tmp_path / 'output'), '--experiment', 'run']
    refuse(capsys, tmp_path / 'output', message, ['-c', str(config), *where])


@pytest.mark.slow
@pytest.mark.parametrize('seed', range(40))
def test_random_bytes_are_refused_wherever_a_file_is_read(images, tmp_path, capsys, seed):
    generator = random.Random(seed)
    flag, suffix = generator.choice(
        [
            ('-c', '.yaml'),
            ('--scales', '.pth'),
            ('--scales', '.safetensors'),
            ('--initial-checkpoint', '.pth'),
            ('--class-map', '.pkl'),
            ('--resume', '.pth.tar'),
        ]
    )
    source = tmp_path / f'noise{suffix}'
    source.write_bytes(generator.randbytes(generator.choice([0, 1, 100, 10000])))
    where = ['--output', str(tmp_path / 'output'), '--experiment', 'run']
    refuse(capsys, tmp_path / 'output', '', [str(images), '--model', TINY, *where, flag, str(source)])


CHECKPOINTS = [
    {},
    [1, 2],
    torch.zeros(3),
    {'state_dict': {}},
    {'state_dict': {'stem.conv.weight': 1}},
    {'state_dict': {'stem.conv.weight': torch.zeros(2, 2).to_sparse()}},
    {'state_dict': {'stem.conv.weight': torch.quantize_per_tensor(torch.zeros(2, 2), 1.0, 0, torch.quint8)}},
    {'state_dict': {1: torch.zeros(2)}},
    {'history': 'long', 'state_dict': {}},
    {'history': [1], 'state_dict': {}},
    {'history': [{'epoch': 3}], 'state_dict': {}},
    {'history': [{'epoch': 0}], 'state_dict': {}, 'optimizer': 3},
    {'history': [{'epoch': 0}], 'state_dict': {'x': 2}, 'optimizer': {}, 'args': 'none'},
]


@pytest.mark.parametrize('flag', ['--initial-checkpoint', '--resume'])
@pytest.mark.parametrize('content', CHECKPOINTS, ids=range(len(CHECKPOINTS)))
def test_checkpoints_of_other_content_are_refused_in_one_line(images, tmp_path, capsys, content, flag):
    torch.save(content, tmp_path / 'strange.pth')
    words = [str(images), '--model', TINY, '--scales', 'initial', '--input-size', '3', '32', '32', '--workers', '0']
    where = [
        '-b',
        '8',
        '--output',
        str(tmp_path / 'output'),
        '--experiment',
        'run',
        flag,
        str(tmp_path / 'strange.pth'),
    ]
    refuse(capsys, tmp_path / 'output', 'strange.pth', [*words, *where])


NASTY = ['', '0', '-1', 'nan', 'inf', '1e999', 'bogus', '3', '0.5', '9' * 30, 'None', 'True', '../x', '1,2', 'a=b', '☃']


@pytest.mark.slow
@pytest.mark.parametrize('seed', range(100))
def test_no_value_of_any_argument_comes_unforeseen(images, tmp_path, capsys, monkeypatch, seed):
    def train_one_epoch(*args):
        raise ValueError('accepted')

    monkeypatch.setattr(run, 'train_one_epoch', train_one_epoch)
    generator = random.Random(seed)
    arguments = [argument for argument in ARGUMENTS.values() if argument.kind is not bool]
    words = [str(images), '--model', TINY, '--scales', 'initial', '--input-size', '3', '32', '32', '--batch-size', '8']
    words += ['--workers', '0', '--output', str(tmp_path / 'output'), '--experiment', 'run']
    for _ in range(10):
        argument = generator.choice(arguments)
        count = generator.choice([1, 2, 3]) if argument.count or argument.kind is dict else 1
        values = [generator.choice(NASTY) for _ in range(count)]
        assert main(['train', *words, argument.flag, *values]) == 1
        told = capsys.readouterr().err.strip().splitlines()[-1]
        assert told.startswith('error: ')
        assert 'not foreseen' not in told
        assert not (tmp_path / 'output').exists()


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda root: (root / 'train.tar').write_bytes(b'x' * 1000), 'train.tar'),
    ],
    ids=['bad tar'],
)
def test_bad_data_are_refused_in_one_line(tmp_path, capsys, make, message):
    root = tmp_path / 'data'
    root.mkdir()
    make(root)
    words = ['--train-split', 'train.tar', '--val-split', 'train.tar', '--data-dir', str(root), '--scales', 'initial']
    where = ['--output', str(tmp_path / 'output'), '--experiment', 'run']
    refuse(capsys, tmp_path / 'output', message, [*words, '--model', TINY, *where])


def test_one_file_is_not_trained_and_validated_on(tmp_path, capsys):
    write_tar(tmp_path / 'images.tar', 20)
    words = [str(tmp_path / 'images.tar'), '--model', TINY, '--scales', 'initial']
    where = ['--output', str(tmp_path / 'output'), '--experiment', 'run']
    message = "is not a folder with the split 'train'"
    refuse(capsys, tmp_path / 'output', message, [*words, *where])
    assert [len(part) for part in make_datasets(parse_arguments([*words, '--holdout', '0.25']))] == [15, 5]


def test_a_class_map_that_would_run_code_is_refused(images, tmp_path, capsys):
    (tmp_path / 'map.pkl').write_bytes(b'cos\ngetcwd\n(tR.')
    words = [str(images), '--model', TINY, '--scales', 'initial', '--class-map', str(tmp_path / 'map.pkl')]
    where = ['--output', str(tmp_path / 'output'), '--experiment', 'run']
    refuse(capsys, tmp_path / 'output', 'map.pkl', [*words, *where])


def test_a_damaged_image_is_named(images, tmp_path, capfd):
    shutil.copytree(images, tmp_path / 'images')
    for split in ('train', 'validation'):
        picture = tmp_path / 'images' / split / 'dark/3.png'
        picture.write_bytes(picture.read_bytes()[:200])
    words = [str(tmp_path / 'images'), '--model', TINY, '--scales', 'initial', '--workers', '1', '--epochs', '1']
    where = ['--output', str(tmp_path / 'output'), '--experiment', 'run', '--input-size', '3', '32', '32', '-b', '8']
    assert main(['train', *words, *where]) == 1
    told = capfd.readouterr().err
    assert f"The image '{tmp_path}/images/train/dark/3.png' is damaged and skipped" in told
    assert told.splitlines()[-1].startswith(f"error: The image '{tmp_path}/images/validation/dark/3.png' is damaged: ")
    assert not (tmp_path / 'output').exists()


def test_images_of_other_channels_are_refused(tmp_path, capsys, monkeypatch):
    class Grey(torch.utils.data.Dataset):
        classes = ('a', 'b')
        transform = None

        def __init__(self, **kwargs):
            pass

        def __len__(self):
            return 64

        def __getitem__(self, index):
            return self.transform(Image.new('L', (32, 32))), index % 2

    monkeypatch.setitem(__import__('timm').data.dataset_factory._TORCH_BASIC_DS, 'grey', Grey)
    words = ['--dataset', 'torch/grey', '--data-dir', str(tmp_path), '--model', TINY, '--scales', 'initial']
    where = ['--output', str(tmp_path / 'output'), '--experiment', 'run', '--input-size', '3', '32', '32', '-b', '8']
    refuse(capsys, tmp_path / 'output', 'have 1 channels and the model 3: give --in-chans 1', [*words, *where])
