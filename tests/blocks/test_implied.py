import copy

import pytest
import torch
from torch import nn

from repopt_timm import csla, implied_scales, make_grad_mults, plain_twin, prepare
from repopt_timm.blocks.plain_twin import convert
from repopt_timm.reparam.branches import make_branches, merge

from .block_examples import examples

EXAMPLES = examples()


def with_equal_norms(block):
    """Equal branches share a scale, so that only equal ones can be written exactly."""
    for norm in block.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.constant_(norm.weight, -0.7)
            nn.init.constant_(norm.running_var, 2.0)
    return block


@pytest.mark.parametrize('name', EXAMPLES)
def test_operators_with_implied_scales_add_up_to_the_merged_kernel(name):
    block = with_equal_norms(copy.deepcopy(EXAMPLES[name].block))
    scales = implied_scales(block)
    assert scales.provenance['bounded_channels'] == 0
    merged = plain_twin(block, weights=True)
    for conv_name, source in convert(block).sums.items():
        conv = merged.get_submodule(conv_name)
        operators = {
            branch: torch.stack([part.conv.weight for part in source.parts if source.name_of(part) == branch])
            for branch in source.counts
            if branch != 'identity'
        }
        operators = {branch: each if len(each) > 1 else each[0] for branch, each in operators.items()}
        if 'identity' in source.counts:
            operators['identity'] = scales[conv_name]['identity'].double().view(-1, 1, 1, 1)
        signed = {b: v * (-1 if source.counts[b] > 1 else 1) for b, v in scales[conv_name].items()}
        kernel = merge(make_branches(source.counts, conv), operators, signed, conv.weight.shape)
        torch.testing.assert_close(kernel, conv.weight, rtol=1e-6, atol=1e-6)


def test_fine_tuning_starts_from_merged_weights_with_implied_scales():
    block = EXAMPLES['mobileone-depthwise'].block
    scales = implied_scales(block)
    merged = plain_twin(block, weights=True)
    before = merged.conv.weight.clone()
    prepare(merged, scales, init=False)
    assert torch.equal(merged.conv.weight, before)
    (mult,) = make_grad_mults(merged).values()
    kxk = [branch.bn.weight / (branch.bn.running_var + branch.bn.eps).sqrt() for branch in block.conv_kxk]
    corner = torch.stack(kxk).square().sum(0)
    torch.testing.assert_close(mult.dense()[:, 0, 0, 0], corner)
    assert csla(merged, scales).conv.branch_counts == scales.counts['conv']


def test_dead_and_exploding_channels_are_bounded_and_counted(caplog):
    block = with_equal_norms(copy.deepcopy(EXAMPLES['repvgg'].block))
    with torch.no_grad():
        block.conv_1x1.bn.weight[2] = 0
        block.conv_kxk.bn.running_var[5] = 0
        block.identity.weight[1] = 0
    with caplog.at_level('INFO'):
        scales = implied_scales(block)
    typical = 0.7 / 2**0.5
    assert scales.provenance['bounded_channels'] == 2
    assert "'conv', branch 1x1: 1 dead, 0 exploding channels are bounded." in caplog.text
    assert scales['conv']['1x1'][2].item() == pytest.approx(typical / 30, rel=1e-4)
    assert scales['conv']['kxk'][5].item() == pytest.approx(-typical * 30, rel=1e-4)
    assert scales['conv']['identity'][1] == 0
