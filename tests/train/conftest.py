import shutil

import pytest

from repopt_timm.train.command import main

from ..helpers import TINY
from .runs import TARGET


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Pictures of each run's report take longer than these runs."""
    for name in ('plot_curves', 'plot_scales'):
        monkeypatch.setattr(f'repopt_timm.train.run_report.{name}', lambda *args: None)


def short_run(images, output, *extra, model=TINY, experiment='run'):
    """Arguments of a short run on these images."""
    defaults = '--input-size 3 32 32 --batch-size 8 --epochs 3 --warmup-epochs 1 --lr 0.02 --workers 0 --seed 1'
    where = [str(images), '--model', model, '--output', str(output), '--experiment', experiment]
    return [*where, *defaults.split(), *extra]


@pytest.fixture
def arguments(images, tmp_path):
    """Makes arguments of a short run on these images."""
    return lambda *extra, **kwargs: short_run(images, tmp_path, *extra, **kwargs)


@pytest.fixture(scope='session')
def trained(images, tmp_path_factory):
    """The folder of a target after three epochs, with pictures; to read only."""
    output = tmp_path_factory.mktemp('trained')
    main(short_run(images, output, *TARGET))
    return output / 'run'


@pytest.fixture(scope='session')
def searched(images, tmp_path_factory):
    """The folder of a search after three epochs, with pictures; to read only."""
    output = tmp_path_factory.mktemp('searched')
    strides = ('--model-kwargs', 'strides=(2,1,2,2,2)')
    main(short_run(images, output, *strides, '--mixup', '0.1', model=f'{TINY}_hs'))
    return output / 'run'


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of `trained`, as the run of `arguments(*TARGET)`."""
    return shutil.copytree(trained, tmp_path / 'run')
