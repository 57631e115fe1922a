import time

import pytest
import timm
import torch

from repopt_timm.bench.bench_models import (
    architecture_of,
    batch,
    forward_pass,
    hyper_search,
    make_optimizer,
    repvgg,
    separate_branches,
    target,
    time_in_turns,
    training_step,
)
from repopt_timm.optim import RepOptSGD

from ..helpers import TINY, random_scales, tiny_model

CPU, META = torch.device('cpu'), torch.device('meta')


def test_separate_branches_compute_what_the_search_computes():
    merged = tiny_model('_hs', scales=random_scales(), num_classes=1000).double()
    separate = separate_branches(merged)
    images, labels = batch(4, 64, CPU)
    for model in (merged, separate):
        forward_pass(model, images.double(), labels)().backward()
    torch.testing.assert_close(separate(images.double()), merged(images.double()))
    gradients = {name: parameter.grad for name, parameter in separate.named_parameters()}
    for name, parameter in merged.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)


@pytest.mark.parametrize('name', ['a0', 'b1', 'd2se'])
def test_the_repvgg_is_the_one_of_timm(name):
    own = repvgg(architecture_of(f'repopt_vgg_{name}'), META)
    theirs = timm.create_model(f'repvgg_{name}', device='meta')
    # But for the name of the class.
    assert str(own).partition('\n')[2] == str(theirs).partition('\n')[2]


def test_a_training_step_trains_and_leaves_no_gradients():
    model = target(architecture_of(TINY), CPU)
    step = training_step(model, *batch(4, 64, CPU))
    before = model.stem.conv.weight.clone()
    step()
    assert not torch.equal(model.stem.conv.weight, before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_targets_are_trained_with_grad_mults_and_searches_without():
    assert isinstance(make_optimizer(target(architecture_of(TINY), CPU)), RepOptSGD)
    assert not isinstance(make_optimizer(hyper_search(architecture_of(TINY), CPU)), RepOptSGD)


def test_preparing_is_not_timed():
    calls = []
    prepare = lambda: (calls.append('prepare'), time.sleep(0.05))  # noqa: E731
    found = time_in_turns({'a': lambda: calls.append('a')}, CPU, rounds=2, prepare=prepare)
    assert calls == ['prepare', 'a'] * 2
    assert max(found['a']) < 0.04
