import pytest
import torch

from repopt_timm import Scales
from repopt_timm.scales.summary import movement, scales_table

from ..helpers import tiny_model

INITIAL = Scales.initial(tiny_model())


def moved(change):
    """Scales whose vectors are `change(module, branch) + 1` times the initial ones."""
    return {m: {b: v * (1 + change(m, b)) for b, v in vectors.items()} for m, vectors in INITIAL.items()}


def test_a_search_is_told_from_one_that_left_the_scales():
    found = movement([moved(lambda m, b: 0.01)], INITIAL)
    assert found.mean == pytest.approx(0.01, abs=1e-6)
    assert 'left the scales where they started' in found.sentence() and '1.0%' in found.sentence()
    far = {('stages.1.1.conv', '1x1'): 0.9}
    found = movement([moved(lambda m, b: far.get((m, b), -0.3 if b != 'identity' else 0.5))], INITIAL)
    assert 'The search moved the scales. ' in found.sentence() and found.where == 'stages.1.1.conv 1x1'
    assert (found.largest, found.identity) == pytest.approx((0.9, 0.5), abs=1e-5)


def test_a_movement_is_compared_with_that_from_search_to_search():
    noise = movement([moved(lambda m, b, sign=sign: sign * 0.2) for sign in (1, -1)], INITIAL)
    assert 'no farther than chance' in noise.sentence()
    steady = movement([moved(lambda m, b, more=more: 0.2 + more) for more in (0.01, -0.01)], INITIAL)
    assert steady.spread == pytest.approx(0.01 * 2**0.5, abs=1e-5)
    assert 'The search moved the scales. ' in steady.sentence()


def test_a_table_has_a_row_for_each_stage_and_branch():
    rows = scales_table({'stem.conv': INITIAL['stem.conv'], 'stages.2.0.conv': {'kxk': torch.tensor([1.0, 4.0])}})
    assert [(row['stage'], row['branch']) for row in rows] == [('stem', '1x1'), ('stem', 'kxk'), ('stage 3', 'kxk')]
    assert [rows[2][key] for key in ('mean', 'min', 'max')] == [2.5, 1, 4]
