import copy

import pytest
import torch

from repopt_timm import clip_grad_norm_, make_grad_mults
from repopt_timm.reparam import GradMult, GradMults

from ..helpers import random_scales, tiny_model


def test_it_clips_by_the_norm_of_the_branches_gradients():
    csla = tiny_model('_csla', scales=random_scales()).double()
    plain = csla.to_plain()
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    for net in (csla, plain):
        net(images).square().sum().backward()
    expected = torch.nn.utils.clip_grad_norm_(csla.parameters(), 0.1)
    before = plain.stem.conv.weight.grad.clone()
    torch.testing.assert_close(clip_grad_norm_(plain.parameters(), 0.1, make_grad_mults(plain)), expected)
    torch.testing.assert_close(plain.stem.conv.weight.grad, before * 0.1 / (expected + 1e-6))


def test_small_half_precision_gradients_count():
    model = tiny_model(scales='initial').half()
    for param in model.parameters():
        param.grad = torch.full_like(param, 1e-4)
    norm = clip_grad_norm_(model.parameters(), 1.0, make_grad_mults(model))
    exact = tiny_model(scales='initial')
    for param in exact.parameters():
        param.grad = torch.full_like(param, 1e-4)
    torch.testing.assert_close(
        norm.float(), clip_grad_norm_(exact.parameters(), 1.0, make_grad_mults(exact)), rtol=0.02, atol=0
    )


def test_small_gradients_pass():
    model = tiny_model(scales='initial')
    for param in model.parameters():
        param.grad = torch.full_like(param, 1e-6)
    clip_grad_norm_(model.parameters(), 1.0, make_grad_mults(model))
    assert (model.stem.conv.weight.grad == 1e-6).all()


def test_the_power_is_two_for_every_optimizer():
    model = tiny_model(scales='initial')
    with pytest.raises(ValueError, match="update rule 'sgd', but got 'adamw'"):
        clip_grad_norm_(model.parameters(), 1.0, make_grad_mults(model, update_rule='adamw'))


def test_the_grad_mults_of_a_copy_are_refused():
    model = tiny_model(scales='initial')
    mults = make_grad_mults(copy.deepcopy(model))
    with pytest.raises(ValueError, match=r'None of the 7 kernels .* from the very model'):
        clip_grad_norm_(model.parameters(), 1.0, mults)


def test_a_head_is_clipped_alone():
    model = tiny_model(scales='initial')
    mults = make_grad_mults(model)
    for param in model.head.parameters():
        param.grad = torch.full_like(param, 0.5)
    expected = torch.nn.utils.get_total_norm([param.grad for param in model.head.parameters()])
    assert clip_grad_norm_(model.head.parameters(), 1.0, mults) == expected
    assert clip_grad_norm_(model.parameters(), 1.0, mults) <= 1.0


def test_a_norm_that_is_not_finite_can_be_an_error():
    model = tiny_model(scales='initial')
    model.stem.conv.weight.grad = torch.full_like(model.stem.conv.weight, float('inf'))
    with pytest.raises(RuntimeError, match='is inf'):
        clip_grad_norm_(model.parameters(), 1.0, make_grad_mults(model), error_if_nonfinite=True)


def test_a_process_may_hold_no_row_of_a_kernel():
    shard = torch.nn.Parameter(torch.empty(0, 4, 3, 3))
    shard.grad = torch.empty_like(shard)
    mults = GradMults({shard: GradMult(torch.empty(0, 1, 3, 3), None, 4)}, 'sgd', '')
    assert clip_grad_norm_([shard], 1.0, mults) == 0
