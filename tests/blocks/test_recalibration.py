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
    before = copy.deepcopy(twin).eval()(x)
    recalibrate(twin, [(x[:2], 0), (x[2:], 0)])
    assert twin.training
    torch.testing.assert_close(copy.deepcopy(twin).eval()(x), before)
    assert ((twin(x) - expected).norm() / expected.norm()).item() < 0.03


def test_statistics_are_the_mean_over_batches(twin):
    x = images(8)
    recalibrate(twin, [x[:2], x[2:]])
    y = twin.conv(x)
    torch.testing.assert_close(twin.bn.running_mean, y.mean((0, 2, 3)))
    variances = torch.stack([half.var((0, 2, 3)) for half in (y[:2], y[2:])])
    torch.testing.assert_close(twin.bn.running_var, variances.mean(0))


def test_a_synchronized_batchnorm_is_recalibrated_alike(twin):
    x, other = images(8), convert_sync_batchnorm(copy.deepcopy(twin))
    torch.testing.assert_close(recalibrate(other, [x]).state_dict(), recalibrate(twin, [x]).state_dict())


@pytest.mark.parametrize(
    ('values', 'reason'),
    [([0.0, float('nan')], "'bn' has a NaN"), ([float('inf')], "'bn' has a NaN"), ([], 'no images')],
)
def test_what_is_no_batch_is_refused_and_the_network_stays_as_it_was(twin, values, reason):
    before = copy.deepcopy(twin.state_dict())
    with pytest.raises(ValueError, match=reason):
        recalibrate(twin.train(), [images(8) + value for value in values])
    with pytest.raises(ValueError, match='empty'):
        recalibrate(twin, [images(8), images(8)[:0]])
    torch.testing.assert_close(twin.state_dict(), before)
    assert all(module.training for module in twin.modules())


@pytest.mark.parametrize(
    ('change', 'found'), [(reparameterize_model, "Identity at 'stem"), (freeze_batch_norm_2d, "FrozenBatch.* at 'stem")]
)
def test_a_folded_or_frozen_twin_is_refused(change, found):
    with pytest.raises(ValueError, match=found):
        recalibrate(change(plain_twin(timm.create_model('repvgg_a0').eval())), [images()])


def test_a_network_without_plain_blocks_is_refused():
    with pytest.raises(ValueError, match='Linear has no block'):
        recalibrate(nn.Linear(2, 2), [])
