"""What a run refuses, in one line and without a folder left behind. A new mistake is a new line of a table.

`DATA` stands for a folder of images, `TMP` for an empty one.
"""

import random
from typing import Any

import pytest
import torch

from repopt_timm.cli import main
from repopt_timm.train import run
from repopt_timm.train.parsing import ARGUMENTS
from repopt_timm.train.validation import check_layout

from ..helpers import TINY

# Arguments, and what the error names.
ROWS = [
    # Numbers and choices.
    ('--epochs 99999999999', '--epochs'),
    ('--decay-milestones 9 1', 'rising epochs'),
    ('--lr nan', '--lr'),
    ('--lr 0.1 --min-lr 0.2', '--min-lr'),
    ('--momentum 0', 'Nesterov'),
    ('--init dirac --pretrained', '--init'),
    ('--mean 0.5 0.5', '--mean has 2 values'),
    ('--aa bogus', 'bogus'),
    ('--aa rand-mhigh', "'rand-mhigh'"),
    ('--sched plateau --sched-on-updates', 'plateau'),
    ('--sched step --cooldown-epochs 1', '--cooldown-epochs'),
    ('--torchcompile bogus', "'bogus'"),
    ('--opt bogus_sgd', "'bogus_sgd'"),
    ('--opt repopt_sdg', "Did you mean 'repopt_sgd'"),
    ('--opt adamw --opt-betas 0.9', 'adamw'),
    ('--model-kwargs num_classes=3', "'num_classes'"),
    ('--model-kwargs depths=1 depths=2', "'depths'"),
    ('--device cpu --sync-bn', '--sync-bn'),
    ('--experiment ../escaped', '--experiment'),
    ('--initial-checkpoint nonesuch.pth', 'nonesuch.pth'),
    ('--model-kwargs scales=initial', '--scales'),
    ('--device bogus', '--device'),
    ('--device meta', '--device'),
    ('--aug-repeats 3', 'non-distributed'),
    # Words.
    ('--wieght-decay 1', "Did you mean '--weight-decay'?"),
    # Models and scales.
    ('--model repopt_vgg_a00', "Did you mean 'repopt_vgg_a0'"),
    ('--model local-dir:nowhere', 'nowhere'),
    ('--model vit_tiny_patch16_224 --scales=', '3 x 32 x 32'),
    (f'--model {TINY}_hs --scales published', 'published'),
    (f'--model {TINY}_branches', 'scales'),
    (f'--model {TINY}_csla --scales= --opt sgd', 'no scales'),
    (f'--model {TINY}_branches --scales= --opt sgd --init dirac', '--init'),
    ('--scales nowhere.safetensors', 'nowhere.safetensors'),
    ('--scales= --pretrained', 'has no scales'),
    ('--clip-grad 1 --clip-mode agc', 'breaks the equivalence'),
    ('--search-first', '--scales'),
    (f'--search-first --model {TINY}_hs --scales=', f"'{TINY}_hs'"),
    ('--search-first --opt repopt_adamw --scales=', 'repopt_adamw'),
    # Data.
    ('--dataset imagenet', "'imagenet'"),
    ('--data-dir=', 'No data'),
    ('--data-dir= --dataset torch/cifar10', '--data-dir'),
    ('--data-dir TMP', "the split 'train'"),
    ('--data-dir photos_\udce9', 'UTF-8'),
    ('--class-map nowhere.txt', 'nowhere.txt'),
    ('--num-classes 1', 'the data have 2 classes'),
    ('--batch-size 998', 'do not fill one batch'),
    ('--mixup 0.2 -b 7', 'pairs'),
    ('--train-images 40 --holdout 0.25', 'there are 36 with --holdout 0.25'),
    ('--bce-loss --class-weights balanced', '--sampler'),
    ('--train-split train/dark --val-split validation/dark', 'one class'),
    ('--in-chans 1', '--in-chans'),
    ('--img-size 64', '--img-size'),
    # Files and folders.
    ('--resume --experiment=', '--experiment'),
    ('--resume nowhere.pth.tar', "'nowhere.pth.tar'"),
    ('--initial-checkpoint DATA/train/dark/0.png', '0.png'),
    ('--output DATA/train/dark/0.png/x', '0.png'),
    ('-c DATA/train/dark/0.png', 'YAML'),
]

# Text of a config, and what the error names.
CONFIGS = [
    ('epoch: 1', "Did you mean 'epochs'?"),
    ('- 1', 'holds a list'),
    ('opt_kwargs: ' + '[' * 3000, 'YAML'),
    ('model_ema: "false"', "'model_ema'"),
    ('lr: [1]\nscale: [0.1, 0.5, 1]', 'arguments: 1'),
    ('momentum: null', '--momentum'),
    ('sched: no', '--sched'),
    ('opt_kwargs: [a]', 'expected K=V'),
    ('resume: x', '--resume'),
]


def refused(output, capsys, words, named):
    where = ['--output', str(output), '--experiment', 'run']
    # The last of two equal flags holds.
    assert main(['train', *where, *words]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith('error: ') and named in lines[-1]
    assert not any(word in ''.join(lines) for word in ('Traceback', 'not foreseen', 'weights_only'))
    assert not output.exists()


@pytest.fixture
def words(images):
    settings = f'--model {TINY} --scales initial --input-size 3 32 32 --epochs 1 --batch-size 8 --workers 0'
    return [str(images), *settings.split()]


@pytest.mark.parametrize(('text', 'named'), ROWS, ids=[ascii(row[0]) for row in ROWS])
def test_a_bad_argument_is_refused(words, images, tmp_path, capsys, text, named):
    (tmp_path / 'empty').mkdir()
    extra = text.replace('DATA', str(images)).replace('TMP', str(tmp_path / 'empty')).split()
    words = words[1:] if text.startswith('--data-dir') else words
    refused(tmp_path / 'output', capsys, [*words, *extra], named)


@pytest.mark.parametrize(('text', 'named'), CONFIGS)
def test_a_bad_config_is_refused(tmp_path, capsys, text, named):
    (tmp_path / 'config.yaml').write_text(text)
    refused(tmp_path / 'output', capsys, ['-c', str(tmp_path / 'config.yaml')], named)


CHECKPOINTS = [
    b'noise' * 99,
    {},
    [1, 2],
    {'state_dict': {'stem.conv.weight': torch.zeros(2, 2).to_sparse()}},
    {'history': [{'epoch': 3}], 'state_dict': {}},
    {'history': [{'epoch': 0}], 'state_dict': {'x': 2}, 'optimizer': {}, 'args': 'none'},
]


@pytest.mark.parametrize('flag', ['--initial-checkpoint', '--resume'])
@pytest.mark.parametrize('content', CHECKPOINTS, ids=range(len(CHECKPOINTS)))
def test_a_checkpoint_of_other_content_is_refused(words, tmp_path, capsys, content, flag):
    path = tmp_path / 'strange.pth'
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    refused(tmp_path / 'output', capsys, [*words, flag, str(path)], 'strange.pth')


NASTY = ['', '0', '-1', 'nan', 'inf', '1e999', 'bogus', '3', '0.5', '9' * 30, 'None', 'True', '../x', '1,2', 'a=b', '☃']


@pytest.mark.slow
@pytest.mark.parametrize('seed', range(8))
def test_no_value_of_any_argument_comes_unforeseen(words, tmp_path, capsys, monkeypatch, seed):
    def train_one_epoch(*args):
        raise ValueError('accepted')

    monkeypatch.setattr(run, 'train_one_epoch', train_one_epoch)
    monkeypatch.chdir(tmp_path)
    generator = random.Random(seed)
    # --output and --experiment may be anything.
    actions = [each for each in ARGUMENTS.values() if each.nargs != 0 and each.dest not in ('output', 'experiment')]
    for _ in range(16):
        action = generator.choice(actions)
        count = action.nargs if isinstance(action.nargs, int) else 1
        extra = [action.option_strings[-1], *(generator.choice(NASTY) for _ in range(count))]
        refused(tmp_path / 'output', capsys, [*words, *extra], '')


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize(('size', 'dtype'), [(8, None), (8, torch.float16), (96, torch.bfloat16)])
def test_a_layout_in_which_torch_corrupts_memory_is_refused(channels, size, dtype):
    for stride in (2, (2, 2)):
        conv: Any = torch.nn.Conv2d(channels, 8, 1)
        conv.stride = stride
        with pytest.raises(ValueError, match="'0'"):
            check_layout(torch.nn.Sequential(conv), (channels, size, size), torch.device('cpu'), dtype)


def test_a_layout_that_is_safe_is_taken():
    for conv, dtype in ((torch.nn.Conv2d(3, 8, 1, 2), torch.bfloat16), (torch.nn.Conv2d(16, 8, 1, 2), None)):
        check_layout(torch.nn.Sequential(conv), (3, 64, 64), torch.device('cpu'), dtype)
