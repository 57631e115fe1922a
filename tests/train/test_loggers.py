import sys
from argparse import Namespace
from types import SimpleNamespace

import pytest

from repopt_timm.cli import main
from repopt_timm.train.loggers import make_loggers

from ..helpers import TINY


def test_a_resumed_run_goes_on_with_its_run_of_wandb(tmp_path, monkeypatch):
    ids = iter(['first', 'second'])

    def init(id=None, **kwargs):
        return SimpleNamespace(id=id or next(ids))

    monkeypatch.setitem(sys.modules, 'wandb', SimpleNamespace(run=None, init=init))
    args = Namespace(log_tensorboard=False, log_wandb=True)
    known = []
    for name in ('run', 'run', 'other'):
        (tmp_path / name).mkdir(exist_ok=True)
        make_loggers(args, tmp_path / name)
        known.append((tmp_path / name / 'wandb_id.txt').read_text())
    assert known == ['first\n', 'first\n', 'second\n']


@pytest.mark.slow
def test_a_search_and_its_training_are_two_runs_of_wandb_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip('wandb')
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB_SILENT', 'true')
    where = ['--dataset', 'digits', '--output', str(tmp_path), '--experiment', 'run', '--search-first', '--log-wandb']
    settings = '--input-size 1 16 16 --batch-size 512 --epochs 2 --warmup-epochs 0 --workers 0 --no-aug'
    try:
        assert main(['train', *where, '--model', TINY, *settings.split()]) == 0
    finally:
        wandb.finish()
    for part in ('search', 'target'):
        assert len(list((tmp_path / 'run' / part / 'wandb').glob('offline-run-*/run-*.wandb'))) == 1
