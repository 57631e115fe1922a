"""What a run left behind."""

import os

import torch

from ..helpers import python_path

# The order of sums, and so the last bit, depends on the number of threads.
ENVIRONMENT = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': python_path()}


TARGET = ['--scales', 'initial']


def read(folder, name='last.pth.tar'):
    return torch.load(folder / name, weights_only=False)


def assert_same_bits(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
