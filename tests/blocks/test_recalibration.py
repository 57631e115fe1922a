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
    recalibrate(twin, [(x[:1], 0), (x[1:], 0)])
    assert twin.training
    torch.testing.assert_close(copy.deepcopy(twin).eval()(x), before)
    assert ((twin(x) - expected).norm() / expected.norm()).item() < 0.03


def test_without_images_a_merged_block_renormalizes_in_training_mode():
    block, channels, _ = copy.deepcopy(EXAMPLES['mobileone-depthwise'])
    x = images(channels, size=16)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    expected = block.train()(x)
    twin = plain_twin(block, weights=True)
    assert ((twin(x) - expected).norm() / expected.norm()).item() > 0.1


def test_statistics_are_those_of_all_batches_together():
    twin = plain_twin(EXAMPLES['repvgg'].block, weights=True)
    other = copy.deepcopy(twin)
    x = images(8)
    recalibrate(twin, [x])
    recalibrate(other, [x[:3], x[3:]])
    torch.testing.assert_close(twin.state_dict(), other.state_dict())
    torch.testing.assert_close(twin.bn.running_var, twin.conv(x).var((0, 2, 3)))


def test_a_folded_twin_is_not_recalibrated():
    twin = reparameterize_model(plain_twin(timm.create_model('repvgg_a0').eval()))
    with pytest.raises(ValueError, match=r"Identity at 'stem\.bn' of .*, expected a BatchNorm: recalibrate"):
        recalibrate(twin, [images()])


def test_a_frozen_twin_is_not_recalibrated_and_a_synchronized_one_is():
    twin = plain_twin(EXAMPLES['repvgg'].block, weights=True)
    other, x = copy.deepcopy(twin), images(8)
    with pytest.raises(ValueError, match=r"FrozenBatchNorm.* at 'bn' of .*, expected a BatchNorm: recalibrate"):
        recalibrate(freeze_batch_norm_2d(copy.deepcopy(twin)), [x])
    recalibrate(twin, [x])
    recalibrate(convert_sync_batchnorm(other), [x])
    torch.testing.assert_close(twin.state_dict(), other.state_dict())


def test_there_has_to_be_something_to_recalibrate_with():
    with pytest.raises(ValueError, match='Linear has no block to recalibrate'):
        recalibrate(nn.Linear(2, 2), [])
    with pytest.raises(ValueError, match='no images'):
        recalibrate(plain_twin(EXAMPLES['repvgg'].block, weights=True), [])
