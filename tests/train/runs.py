"""Short runs of the training command, and what they left behind."""

import contextlib
import multiprocessing
import os
import sys

import torch

from repopt_timm.cli import main as command

from ..helpers import TINY
from ..processes import SERVER


def short_run(images, output, extra='', model=TINY, experiment='run'):
    """Arguments of a short run on these images; of these folders' names none has spaces."""
    where = f'{images} --model {model} --output {output} --experiment {experiment}'
    defaults = '--input-size 3 32 32 --batch-size 8 --epochs 3 --warmup-epochs 1 --lr 0.02 --workers 0 --seed 1'
    return f'{where} {defaults} {extra}'.split()


def in_child(words, log=os.devnull, prepare=contextlib.nullcontext, **environment):
    """Starts a run in a process and group of its own; an interpreter would take longer to start than to train."""
    process = SERVER.Process(target=_run, args=(words, log, prepare, environment))
    process.start()
    return process


def _run(words, log, prepare, environment):
    os.setsid()
    # Workers of loaders must be forked.
    multiprocessing.set_start_method('fork', force=True)
    os.environ.update(environment)
    torch.set_num_threads(1)
    prepare()
    with open(log, 'w') as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        code = command(['train', *words])
    sys.exit(code)


def read(folder, name='last.pth.tar'):
    return torch.load(folder / name, weights_only=False)


def assert_same_bits(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
