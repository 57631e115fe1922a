import os
import shutil
from functools import partial

import pytest
import torch

from repopt_timm.train import engine, run
from repopt_timm.train.command import main

from ..helpers import TINY
from .runs import short_run


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Pictures of each run's report take longer than these runs."""
    for name in ('train.run_report.plot_curves', 'train.run_report.plot_scales', 'deploy.evaluation.write_confusion'):
        monkeypatch.setattr(f'repopt_timm.{name}', lambda *args: None)


@pytest.fixture
def arguments(images, tmp_path):
    """Makes arguments of a short run on these images."""
    return partial(short_run, images, tmp_path)


@pytest.fixture
def train(arguments):
    """Trains with arguments beyond those of a short run."""
    return lambda *args, **kwargs: main(arguments(*args, **kwargs))


@pytest.fixture(scope='session')
def trained(images, tmp_path_factory):
    """The folder of a target after three epochs, with pictures; to read only."""
    output = tmp_path_factory.mktemp('trained')
    main(short_run(images, output, '--log-tensorboard'))
    return output / 'run'


@pytest.fixture(scope='session')
def searched(images, tmp_path_factory):
    """The folder of a search after three epochs, with pictures; to read only."""
    output = tmp_path_factory.mktemp('searched')
    extra = '--model-kwargs strides=(2,1,2,2,2) --mixup 0.1 --model-ema --model-ema-decay 0.5'
    main(short_run(images, output, extra, model=f'{TINY}_hs'))
    return output / 'run'


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of `trained`, as the run of `arguments()`."""
    return shutil.copytree(trained, tmp_path / 'run')


@pytest.fixture
def signalled(monkeypatch):
    """Sends a signal to this process at the start of its n-th epoch from now on, and notes the epochs begun."""
    begun = []
    original = run.train_one_epoch

    def send(signum, nth):
        def train_one_epoch(state, loaders, loss_fn, clip, autocast, epoch, args):
            begun.append(epoch)
            if len(begun) == nth:
                os.kill(os.getpid(), signum)
            return original(state, loaders, loss_fn, clip, autocast, epoch, args)

        monkeypatch.setattr(run, 'train_one_epoch', train_one_epoch)
        return begun

    return send


@pytest.fixture
def tops(monkeypatch):
    """The accuracies of the next validations."""
    values = []
    found = torch.zeros(2, 16, dtype=torch.int64)
    measured = lambda *args: ({'loss': 1.0, 'top1': values.pop(0), 'top5': 100.0}, found)  # noqa: E731
    monkeypatch.setattr(engine, 'validate', measured)
    return values
