import pytest
from matplotlib import pyplot

from repopt_timm import Scales
from repopt_timm.plot import plot_curves, plot_scales

from .helpers import random_scales, tiny_model


def test_pictures_leave_the_figures_of_the_user_alone(tmp_path):
    mine = pyplot.figure()
    curves = plot_curves({'run': [{'epoch': 0, 'train_loss': 2.0, 'eval_top1': 10.0}]}, tmp_path / 'curves.svg')
    plot_scales(random_scales(), tmp_path / 'scales.png')
    assert pyplot.get_fignums() == [mine.number] and pyplot.gcf() is mine
    pyplot.close(mine)
    assert curves.axes[1].lines[0].get_ydata().tolist() == [10.0]
    assert {path.name for path in tmp_path.iterdir()} == {'scales.png', 'curves.svg'}


def test_initial_values_are_drawn_beside_the_searched_ones(tmp_path):
    scales, initial, path = random_scales(), Scales.initial(tiny_model()), tmp_path / 'scales.png'
    lines = {line.get_label(): line.get_ydata() for line in plot_scales(scales, path, initial=initial).axes[0].lines}
    assert lines['kxk'].tolist() == pytest.approx([scales[m]['kxk'].mean().item() for m in scales])
    assert lines['kxk, initial'].tolist() == pytest.approx([initial[m]['kxk'].mean().item() for m in initial])
    for figure in (plot_scales(scales, path), plot_scales(initial, path, initial=initial)):
        assert not any('initial' in line.get_label() for line in figure.axes[0].lines)
