import copy

import pytest
import torch
from timm.layers import convert_sync_batchnorm, freeze_batch_norm_2d
from timm.models.byobnet import MobileOneBlock, RepVggBlock
from timm.utils import reparameterize_model
from torch import nn

from repopt_timm import (
    RepOptSGD,
    Scales,
    csla,
    hyper_search,
    implied_scales,
    make_grad_mults,
    plain_twin,
    prepare,
    to_plain,
)
from repopt_timm.blocks import PlainBlock
from repopt_timm.reparam import carried_scales

from ..helpers import counted_scales, random_scales, relative_difference, tiny_model
from .block_examples import examples, images

EXAMPLES = examples()


@pytest.fixture(params=EXAMPLES)
def example(request):
    return EXAMPLES[request.param]


def with_equal_norms(block):
    """Equal branches share a scale, so that only equal ones can be written exactly."""
    for norm in block.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.constant_(norm.weight, -0.7)
            nn.init.constant_(norm.running_var, 2.0)
    return block


def test_a_merged_block_computes_what_its_branches_did(example):
    x = images(example.channels)
    before = copy.deepcopy(example.block.state_dict())
    block = copy.deepcopy(example.block).eval()
    twin = plain_twin(block, weights=True)
    torch.testing.assert_close(twin(x), block(x), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(plain_twin(block)(x), block(x))
    torch.testing.assert_close(example.block.state_dict(), before)
    torch.testing.assert_close(torch.jit.script(copy.deepcopy(twin))(x), twin(x))


def test_a_csla_block_under_sgd_is_the_plain_block_under_rep_opt_sgd(example):
    # Merged weights leave no parameter at zero, of which a relative difference would say nothing.
    plain = plain_twin(example.block, weights=True)
    twin = csla(plain, counted_scales(plain))
    plain = to_plain(twin)
    start, settings = copy.deepcopy(plain), {'lr': 0.01, 'momentum': 0.9, 'weight_decay': 5e-3}
    optimizers = [torch.optim.SGD(twin.parameters(), **settings)]
    optimizers.append(RepOptSGD(plain.parameters(), grad_mults=make_grad_mults(plain), **settings))
    for _ in range(5):
        x = images(example.channels)
        for net, optimizer in zip((twin, plain), optimizers):
            optimizer.zero_grad()
            net(x).sin().mean().backward()
            optimizer.step()
    assert relative_difference(plain, to_plain(twin)) < 1e-10
    assert relative_difference(plain, start) > 1e-4


def test_a_folded_twin_has_no_batchnorm_in_the_place_of_a_block(example):
    x = images(example.channels)
    twin = plain_twin(copy.deepcopy(example.block).eval(), weights=True)
    for model in (twin, hyper_search(twin)):
        folded = reparameterize_model(nn.Sequential(model))
        blocks = [module for module in folded.modules() if isinstance(module, PlainBlock)]
        assert len(blocks) == len(example.branches)
        assert not any(hasattr(module, 'running_var') for block in blocks for module in block.modules())
        torch.testing.assert_close(folded(x), model(x))


@pytest.mark.parametrize(('convert', 'kind'), [(freeze_batch_norm_2d, ''), (convert_sync_batchnorm, '_hs')])
def test_folding_drops_the_scales(convert, kind):
    model = convert(tiny_model(kind, scales=random_scales())).eval()
    folded = reparameterize_model(model)
    assert isinstance(folded.stem.bn, nn.ReLU)
    assert carried_scales(folded) == {}
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('norm', [nn.GroupNorm(2, 4), nn.BatchNorm2d(4, track_running_stats=False)])
def test_where_nothing_can_be_folded_scales_stay(norm):
    block = PlainBlock(nn.Conv2d(4, 4, 3, padding=1), norm).eval()
    prepare(block, Scales.initial(block))
    assert list(carried_scales(block.fuse())) == ['conv']
    assert block.bn is norm


def test_hooks_of_a_block_are_those_of_what_takes_its_place():
    model = nn.Sequential(MobileOneBlock(4, 4))
    calls = []
    model[0].register_forward_hook(lambda module, inputs, output: calls.append(type(module)))
    plain_twin(model)(torch.randn(2, 4, 4, 4))
    assert calls == [PlainBlock]


def test_a_shared_block_stays_shared():
    block = RepVggBlock(4, 4)
    twin = plain_twin(nn.Sequential(block, nn.Sequential(block)))
    assert twin[0] is twin[1][0]


def test_a_csla_twin_of_operators_and_implied_scales_has_the_merged_kernel():
    block = with_equal_norms(MobileOneBlock(8, 8, num_conv_branches=3).double().eval())
    scales = implied_scales(block)
    assert scales.provenance['bounded_channels'] == 0
    merged = plain_twin(block, weights=True)
    # Equal branches share a scale, whose sign they lose.
    kxk = -scales['conv']['kxk'].double().view(-1, 1, 1, 1) * sum(each.conv.weight for each in block.conv_kxk)
    kxk[:, :, 1:2, 1:2] += scales['conv']['1x1'].double().view(-1, 1, 1, 1) * block.conv_scale.conv.weight
    kxk[:, :, 1, 1] += torch.diag(scales['conv']['identity'].double())
    torch.testing.assert_close(merged.conv.weight, kxk, rtol=1e-6, atol=1e-6)


def test_equal_branches_share_the_root_of_their_mean_square():
    block = EXAMPLES['mobileone-depthwise'].block
    each = [branch.bn.weight / (branch.bn.running_var + branch.bn.eps).sqrt() for branch in block.conv_kxk]
    scales = implied_scales(block)['conv']['kxk'].double()
    torch.testing.assert_close(scales, torch.stack(each).square().mean(0).sqrt(), rtol=1e-6, atol=0)


def test_dead_and_exploding_channels_are_bounded_and_counted():
    block = with_equal_norms(copy.deepcopy(EXAMPLES['repvgg'].block))
    with torch.no_grad():
        block.conv_1x1.bn.weight[2] = 0
        block.conv_kxk.bn.running_var[5] = 0
        block.identity.weight[1] = 0
    scales = implied_scales(block)
    typical = 0.7 / 2**0.5
    assert scales.provenance['bounded_channels'] == 2
    assert scales['conv']['1x1'][2].item() == pytest.approx(typical / 30, rel=1e-4)
    assert scales['conv']['kxk'][5].item() == pytest.approx(-typical * 30, rel=1e-4)
    assert scales['conv']['identity'][1] == 0


def test_a_twin_of_a_twin_is_an_error():
    with pytest.raises(ValueError, match='PlainBlock'):
        plain_twin(plain_twin(RepVggBlock(4, 4)))
