import copy

import pytest
import torch
from timm.layers import convert_sync_batchnorm, freeze_batch_norm_2d
from timm.utils import reparameterize_model
from torch import nn

from repopt_timm import Scales, plain_twin, prepare
from repopt_timm.blocks import PlainBlock
from repopt_timm.reparam import carried_scales

from ..helpers import random_scales, tiny_model
from .block_examples import examples, images


@pytest.mark.parametrize('convert', [freeze_batch_norm_2d, convert_sync_batchnorm])
@pytest.mark.parametrize('kind', ['', '_hs'])
def test_frozen_and_synchronized_batchnorms_are_folded(convert, kind):
    model = convert(tiny_model(kind, scales=random_scales())).eval()
    folded = reparameterize_model(model)
    assert isinstance(folded.stem.bn, nn.ReLU)
    assert carried_scales(folded) == {}
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-3, atol=1e-5)


def test_the_block_of_a_plain_twin_folds_a_frozen_batchnorm():
    example = examples()['repvgg']
    twin = freeze_batch_norm_2d(plain_twin(copy.deepcopy(example.block).eval(), weights=True))
    folded = reparameterize_model(nn.Sequential(twin))
    x = images(example.channels)
    assert isinstance(folded[0].bn, nn.Identity | nn.ReLU)
    torch.testing.assert_close(folded(x), twin(x))


@pytest.mark.parametrize('norm', [nn.GroupNorm(2, 4), nn.BatchNorm2d(4, track_running_stats=False)])
def test_where_nothing_can_be_folded_scales_stay(norm):
    block = PlainBlock(nn.Conv2d(4, 4, 3, padding=1), norm).eval()
    prepare(block, Scales.initial(block))
    before = copy.deepcopy(block)
    block.reparameterize()
    assert block.bn is norm
    assert list(carried_scales(block)) == ['conv']
    x = torch.randn(2, 4, 6, 6)
    torch.testing.assert_close(block(x), before(x))
