import pytest

from ..helpers import TINY


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Pictures of each run's report take longer than these runs."""
    for name in ('plot_curves', 'plot_scales'):
        monkeypatch.setattr(f'repopt_timm.train.run_report.{name}', lambda *args: None)


@pytest.fixture
def arguments(images, tmp_path):
    """Makes arguments of a short run on these images."""

    def make(*extra, model=TINY, experiment='run'):
        defaults = '--input-size 3 32 32 --batch-size 8 --epochs 3 --warmup-epochs 1 --lr 0.02 --workers 0 --seed 1'
        where = [str(images), '--model', model, '--output', str(tmp_path), '--experiment', experiment]
        return [*where, *defaults.split(), *extra]

    return make
