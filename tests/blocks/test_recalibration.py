import copy

import pytest
import timm
import torch
from timm.layers import convert_sync_batchnorm, freeze_batch_norm_2d
from timm.utils import reparameterize_model
from torch import nn

from repopt_timm import plain_twin, recalibrate

from .block_examples import examples, images

EXAMPLES = examples()


@pytest.fixture
def twin():
    return plain_twin(EXAMPLES['repvgg'].block, weights=True)


@pytest.mark.parametrize('name', EXAMPLES)
def test_in_training_mode_a_recalibrated_block_computes_what_its_branches_do(name):
    block, channels, _ = copy.deepcopy(EXAMPLES[name])
    x = images(channels, size=16)
    # Running statistics that are those of the batch: what is left of a difference is the merge's own.
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    expected = block.train()(x)
    twin = plain_twin(block, weights=True)
    estimated = copy.deepcopy(twin)
    recalibrate(twin, [(x[:2], 0), (x[2:], 0)])
    assert twin.training
    # The branches know the mean, and guess the variance.
    means = [tensor for key, tensor in twin.state_dict().items() if key.endswith('running_mean')]
    known = [tensor for key, tensor in estimated.state_dict().items() if key.endswith('running_mean')]
    torch.testing.assert_close(means, known, rtol=0.01, atol=0.01)
    torch.testing.assert_close(copy.deepcopy(twin).eval()(x), estimated.eval()(x))
    assert ((twin(x) - expected).norm() / expected.norm()).item() < 0.03


def test_statistics_are_the_mean_over_batches_for_a_synchronized_batchnorm_too(twin):
    x, other = images(8), convert_sync_batchnorm(copy.deepcopy(twin))
    batches = [x[:2], x[2:]]
    recalibrate(twin, batches)
    y = twin.conv(x)
    torch.testing.assert_close(twin.bn.running_mean, y.mean((0, 2, 3)))
    variances = torch.stack([half.var((0, 2, 3)) for half in (y[:2], y[2:])])
    torch.testing.assert_close(twin.bn.running_var, variances.mean(0))
    torch.testing.assert_close(recalibrate(other, batches).state_dict(), twin.state_dict())


@pytest.mark.parametrize('bad', [[float('nan')], [float('inf')], None, []], ids=['nan', 'infinite', 'empty', 'none'])
def test_what_is_no_batch_is_refused_and_the_network_stays_as_it_was(twin, bad):
    before = copy.deepcopy(twin.state_dict())
    batches = [images(8), images(8)[:0]] if bad is None else [images(8) + value for value in bad]
    with pytest.raises(ValueError, match=r'NaN|empty|no images'):
        recalibrate(twin.train(), batches)
    torch.testing.assert_close(twin.state_dict(), before)
    assert all(module.training for module in twin.modules())


@pytest.mark.parametrize('change', [reparameterize_model, freeze_batch_norm_2d])
def test_a_folded_or_frozen_twin_is_refused(change):
    with pytest.raises(ValueError, match=r"'stem\.bn'"):
        recalibrate(change(plain_twin(timm.create_model('repvgg_a0').eval())), [images()])


def test_a_network_without_plain_blocks_is_refused():
    with pytest.raises(ValueError, match='Linear'):
        recalibrate(nn.Linear(2, 2), [])
