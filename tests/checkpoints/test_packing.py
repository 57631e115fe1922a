import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from repopt_timm.checkpoints.packing import pack, unpack

SIZES = st.integers(1, 5)
WEIGHTS = st.tuples(SIZES, SIZES, SIZES, st.floats(1e-6, 1e6)).map(lambda s: torch.randn(s[0], s[1], s[2]) * s[3])


@given(WEIGHTS)
def test_eight_bits_are_off_by_half_a_step_of_the_channel_at_most(weight):
    restored = unpack(pack({'weight': weight}, 'int8'))['weight']
    step = weight.flatten(1).abs().amax(1) / 127
    assert ((restored - weight).flatten(1).abs().amax(1) <= 0.501 * step).all()


def test_vectors_and_counters_stay_as_they_are():
    state = {'weight': torch.randn(3, 3), 'bias': torch.randn(3), 'count': torch.tensor(7)}
    for precision in ('float32', 'float16', 'int8'):
        restored = unpack(pack(state, precision))
        assert restored.keys() == state.keys()
        assert torch.equal(restored['bias'], state['bias'])
        assert torch.equal(restored['count'], state['count'])


def test_a_channel_of_zeros_stays_one():
    assert torch.equal(unpack(pack({'weight': torch.zeros(2, 3)}, 'int8'))['weight'], torch.zeros(2, 3))


def test_an_integer_tensor_without_a_scale_is_left_alone():
    state = {'weight': torch.ones(2, 2, dtype=torch.int8), 'other_scale': torch.ones(2)}
    assert all(unpack(state)[name] is tensor for name, tensor in state.items())


@pytest.mark.parametrize(
    ('value', 'precision', 'message'),
    [(1e6, 'float16', "'weight' has values that float16"), (float('nan'), 'int8', 'int8'), (1.0, 'int4', 'Unknown')],
)
def test_what_cannot_be_packed_is_named(value, precision, message):
    with pytest.raises(ValueError, match=message):
        pack({'weight': torch.full((2, 2), value)}, precision)


@pytest.mark.parametrize('scale', [torch.ones(7), torch.ones(2, dtype=torch.int8), torch.ones(2, 2)])
def test_scales_that_do_not_fit_their_tensor_are_named(scale):
    with pytest.raises(ValueError, match=r"'weight_scale' has the shape .*, expected a floating point number for each"):
        unpack({'weight': torch.ones(2, 3, dtype=torch.int8), 'weight_scale': scale})
