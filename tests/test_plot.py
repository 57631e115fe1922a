import matplotlib
import pytest
from matplotlib import pyplot

from repopt_timm.plot import plot_curves, plot_scales

from .helpers import random_scales


def test_pictures_leave_backend_and_figures_of_the_user_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(matplotlib, 'use', lambda *args, **kwargs: pytest.fail("the backend is the user's"))
    mine = pyplot.figure()
    scales = random_scales()
    histories = {'run': [{'epoch': 0, 'train_loss': 2.0, 'eval_top1': 10.0}]}
    figures = [plot_scales(scales, tmp_path / 'scales.png', 'Title'), plot_curves(histories, tmp_path / 'curves.svg')]
    assert pyplot.get_fignums() == [mine.number]
    assert pyplot.gcf() is mine
    pyplot.close(mine)
    assert figures[0].axes[0].get_title(loc='left') == 'Title'
    assert figures[1].axes[1].lines[0].get_ydata().tolist() == [10.0]
    assert {path.name for path in tmp_path.iterdir()} == {'scales.png', 'curves.svg'}
    plot_scales(scales)
    assert len(list(tmp_path.iterdir())) == 2
