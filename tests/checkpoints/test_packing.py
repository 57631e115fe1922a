import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from repopt_timm.checkpoints.packing import pack, unpack

SIZES = st.integers(1, 5)
SHAPES, SIZE = st.tuples(SIZES, SIZES, SIZES), st.just(0.0) | st.floats(1e-20, 1e6)
WEIGHTS = st.tuples(SHAPES, SIZE).map(lambda drawn: drawn[1] * torch.randn(drawn[0]))


@given(WEIGHTS)
def test_eight_bits_are_off_by_half_a_step_of_the_channel_at_most(weight):
    restored = unpack(pack({'weight': weight}, 'int8'))['weight']
    step = weight.flatten(1).abs().amax(1) / 127
    assert ((restored - weight).flatten(1).abs().amax(1) <= 0.501 * step).all()


@pytest.mark.parametrize('precision', ['float32', 'float16', 'int8'])
def test_vectors_and_integers_stay_as_they_are(precision):
    state = {'bias': torch.randn(3), 'count': torch.tensor(7), 'index': torch.ones(2, 2, dtype=torch.int8)}
    restored = unpack(pack({**state, 'weight': torch.randn(3, 3)}, precision))
    assert restored.keys() == {*state, 'weight'}
    assert all(torch.equal(restored[name], tensor) for name, tensor in state.items())


def test_what_float16_cannot_hold_is_named():
    with pytest.raises(ValueError, match="'weight'"):
        pack({'weight': torch.full((2, 2), 1e6)}, 'float16')


@pytest.mark.parametrize('scale', [torch.ones(7), torch.ones(1)])
def test_scales_that_do_not_fit_their_tensor_are_named(scale):
    with pytest.raises(ValueError, match=r"'weight_scale'"):
        unpack({'weight': torch.ones(2, 3, dtype=torch.int8), 'weight_scale': scale})
