import pytest
import timm
import torch

from repopt_timm import Scales
from repopt_timm.models import ensure_registered
from repopt_timm.models.initial_values import initial_values
from repopt_timm.scales.summary import movement, scales_table

from ..helpers import TINY, tiny_model


@pytest.fixture
def initial():
    return Scales.initial(tiny_model())


def moved(initial, change):
    """Scales whose vectors are `change(module, branch) + 1` times the initial ones."""
    vectors = {m: {b: v * (1 + change(m, b)) for b, v in initial[m].items()} for m in initial}
    return Scales(initial.architecture, vectors, initial.geometry, initial.counts)


def test_a_search_that_left_the_scales_is_called_that(initial):
    assert movement([initial], initial).mean == 0
    found = movement([moved(initial, lambda m, b: 0.01)], initial)
    assert found.hardly and found.mean == pytest.approx(0.01, abs=1e-6)
    assert found.sentence().startswith('The search left the scales where they started')
    assert 'Layer means moved by 1.0% on average' in found.sentence()


def test_a_search_that_moved_them_says_where(initial):
    far = {('stages.1.1.conv', '1x1'): 0.9}
    found = movement([moved(initial, lambda m, b: far.get((m, b), -0.3 if b != 'identity' else 0.5))], initial)
    assert not found.hardly and found.where == 'stages.1.1.conv 1x1' and found.largest == pytest.approx(0.9, abs=1e-5)
    assert found.identity == pytest.approx(0.5, abs=1e-5)
    assert found.sentence().startswith('The search moved the scales. ')


def test_a_movement_is_compared_with_that_from_search_to_search(initial):
    noise = movement([moved(initial, lambda m, b, sign=sign: sign * 0.2) for sign in (1, -1)], initial)
    assert noise.sentence().startswith('The search moved the scales no farther than chance does')
    steady = movement([moved(initial, lambda m, b, more=more: 0.2 + more) for more in (0.01, -0.01)], initial)
    assert steady.spread == pytest.approx(0.01 * 2**0.5, abs=1e-5)
    assert steady.sentence().startswith('The search moved the scales. ')


def test_channels_that_go_both_ways_leave_a_layer_where_it_is(initial):
    vectors = {m: {b: v * torch.linspace(0.5, 1.5, len(v)) for b, v in initial[m].items()} for m in initial}
    assert movement([Scales(initial.architecture, vectors)], initial).mean < 1e-6


@pytest.mark.parametrize(
    ('name', 'kwargs'),
    [
        (TINY, {}),
        ('repopt_vgg', {'depths': (1, 3), 'widths': (4, 8, 8), 'strides': (1, 2, 2)}),
        ('repopt_resnet18', {}),
    ],
)
def test_initial_values_are_found_by_the_name_of_the_network(name, kwargs):
    ensure_registered(name)
    scales = Scales.from_model(timm.create_model(name, scales='initial', **kwargs))
    found = initial_values(scales)
    assert all(torch.equal(found[m][b], scales[m][b]) for m in scales for b in scales[m])


def test_a_network_that_timm_does_not_know_has_none(initial):
    assert initial_values(Scales('nonesuch', initial)) is None


def test_scales_of_a_part_of_a_network_have_initial_values_too():
    model = timm.create_model('repopt_vgg_a0', device='meta')
    part = Scales.initial(model, {'stages.0.1.conv': ['kxk', '1x1']})
    assert 'stages.0.1.conv' in initial_values(part)


def test_a_table_has_a_row_for_each_stage_and_branch(initial):
    rows = scales_table({**initial, 'stages.1.0.conv': {'kxk': torch.tensor([1.0, 4.0]), '1x1': torch.ones(2)}})
    assert [(row['stage'], row['branch']) for row in rows[:3]] == [('stem', '1x1'), ('stem', 'kxk'), ('stage 1', '1x1')]
    row = next(row for row in rows if (row['stage'], row['branch']) == ('stage 2', 'kxk'))
    assert (row['min'], row['max']) == (1, 4)
    second = initial['stages.1.1.conv']['kxk'].tolist()
    assert row['mean'] == pytest.approx((5 + sum(second)) / (2 + len(second)))
