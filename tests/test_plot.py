import matplotlib
import pytest
from matplotlib import pyplot

from repopt_timm import Scales
from repopt_timm.plot import plot_curves, plot_scales

from .helpers import random_scales, tiny_model


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


def test_initial_values_are_drawn_beside_the_searched_ones():
    scales = random_scales()
    initial = Scales.initial(tiny_model())
    lines = {line.get_label(): line.get_ydata() for line in plot_scales(scales, initial=initial).axes[0].lines}
    assert lines['kxk, initial'].tolist() == pytest.approx([initial[m]['kxk'].mean().item() for m in initial])
    assert {'kxk', 'identity', '1x1', 'identity, initial', '1x1, initial'} <= set(lines)
    for figure in (plot_scales(scales), plot_scales(initial, initial=initial)):
        assert not any('initial' in line.get_label() for line in figure.axes[0].lines)
