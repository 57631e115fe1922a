import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from repopt_timm.train.parsing import parse_arguments

from ..helpers import TINY

TRAIN = Path(__file__).parents[2] / 'train.py'


def test_the_recipe_is_the_published_one_on_eight_processes():
    args = parse_arguments(['-c', 'imagenet_target'])
    assert (args.model, args.opt) == ('repopt_vgg_b1', 'repopt_sgd')
    assert (args.epochs, args.warmup_epochs, args.sched) == (120, 5, 'cosine')
    assert (args.lr, args.momentum, args.weight_decay, args.smoothing) == (0.1, 0.9, 4e-5, 0.1)
    assert args.batch_size * args.grad_accum_steps * 8 == 256


@pytest.mark.slow
def test_a_run_starts_from_the_recipe_in_two_processes(tmp_path):
    for split, count in (('train', 8), ('val', 2)):
        for label, value in (('dark', 60), ('light', 190)):
            folder = tmp_path / 'imagenet' / split / label
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = (value + 30 * torch.randn(40, 40, 3)).clamp(0, 255).byte().numpy()
                Image.fromarray(pixels).save(folder / f'{index}.png')
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', str(TRAIN)]
    recipe = ['-c', 'imagenet_target', '--data-dir', str(tmp_path / 'imagenet'), '--scales', 'initial']
    smaller = f'--model {TINY} --input-size 3 32 32 --batch-size 4 --epochs 2 --warmup-epochs 1 --workers 0'.split()
    where = ['--device', 'cpu', '--output', str(tmp_path), '--experiment', 'run']
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    subprocess.run([*launch, *recipe, *smaller, *where], env=environment, check=True, capture_output=True, timeout=600)
    checkpoint = torch.load(tmp_path / 'run/last.pth.tar', weights_only=False)
    assert len(checkpoint['history']) == 2
    assert checkpoint['args'].world_size == 2
