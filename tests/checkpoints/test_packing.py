import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from repopt_timm.checkpoints.packing import pack, unpack


@given(st.tuples(*[st.integers(1, 5)] * 3), st.just(0.0) | st.floats(1e-20, 1e6))
def test_eight_bits_are_off_by_half_a_step_of_the_channel_at_most(shape, size):
    weight = size * torch.randn(shape)
    restored = unpack(pack({'weight': weight}, 'int8'))['weight']
    step = weight.flatten(1).abs().amax(1) / 127
    assert ((restored - weight).flatten(1).abs().amax(1) <= 0.501 * step).all()


@pytest.mark.parametrize('precision', ['float32', 'float16', 'int8'])
def test_vectors_and_integers_stay_as_they_are(precision):
    state = {'bias': torch.randn(3), 'count': torch.tensor(7), 'index': torch.ones(2, 2, dtype=torch.int8)}
    restored = unpack(pack({**state, 'weight': torch.randn(3, 3)}, precision))
    assert restored.keys() == {*state, 'weight'}
    assert all(torch.equal(restored[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize('precision', ['float16', 'int4'])
def test_what_a_precision_cannot_hold_is_refused(precision):
    with pytest.raises(ValueError, match=r"'weight'|'int4'"):
        pack({'weight': torch.full((2, 2), 1e6)}, precision)


@pytest.mark.parametrize('scale', [torch.ones(7), torch.ones(1)])
def test_scales_that_do_not_fit_their_tensor_are_named(scale):
    with pytest.raises(ValueError, match=r"'weight_scale'"):
        unpack({'weight': torch.ones(2, 3, dtype=torch.int8), 'weight_scale': scale})
