import copy

import pytest
import torch

from repopt_timm import clip_grad_norm_, make_grad_mults

from ..helpers import tiny_model


def filled(value):
    model = tiny_model(scales='initial')
    for param in model.parameters():
        param.grad = torch.full_like(param, value)
    return model


def test_small_half_precision_gradients_count_and_stay():
    model = filled(1e-4)
    norm = clip_grad_norm_(model.parameters(), 1.0, make_grad_mults(model))
    half = tiny_model(scales='initial').half()
    for param in half.parameters():
        param.grad = torch.full_like(param, 1e-4)
    found = clip_grad_norm_(half.parameters(), 1.0, make_grad_mults(half)).float()
    torch.testing.assert_close(found, norm, rtol=0.02, atol=0)
    assert (model.stem.conv.weight.grad == 1e-4).all()


def test_a_head_is_clipped_alone_and_nothing_without_gradients():
    model = filled(0.5)
    mults = make_grad_mults(model)
    expected = torch.nn.utils.get_total_norm([param.grad for param in model.head.parameters()])
    assert clip_grad_norm_(model.head.parameters(), 1.0, mults) == expected
    assert clip_grad_norm_(tiny_model(scales='initial').head.parameters(), 1.0, mults) == 0


@pytest.mark.parametrize(
    ('mults', 'thing'),
    [
        (lambda model: make_grad_mults(model, update_rule='adamw'), 'update rule'),
        (lambda model: make_grad_mults(copy.deepcopy(model)), '7 kernels'),
    ],
)
def test_grad_mults_that_give_another_norm_are_refused(mults, thing):
    model = filled(1.0)
    with pytest.raises(ValueError, match=thing):
        clip_grad_norm_(model.parameters(), 1.0, mults(model))


def test_a_norm_that_is_not_finite_can_be_an_error():
    model = filled(float('inf'))
    with pytest.raises(RuntimeError, match='non-finite'):
        clip_grad_norm_(model.parameters(), 1.0, make_grad_mults(model), error_if_nonfinite=True)
