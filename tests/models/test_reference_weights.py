import re

import pytest
import timm
import torch

from repopt_timm import load_scales
from repopt_timm.cli import main
from repopt_timm.models.reference_weights import model_from_reference

from ..blocks.block_examples import randomized
from ..helpers import TINY, tiny_model

IMAGES = torch.randn(2, 3, 64, 64)


def published(model):
    """The state dict of a network, under the names of the authors' repositories."""
    names = {
        'head.fc.': 'linear.',
        '.conv_kxk.': '.rbr_dense.',
        '.conv_1x1.': '.rbr_1x1.',
        '.identity.': '.rbr_identity.',
        '.attn.fc1.': '.se.down.',
        '.attn.fc2.': '.se.up.',
        'cheap_operation.conv.': 'cheap_operation.0.',
        'cheap_operation.bn.': 'final_bn.',
    }
    state = {}
    for key, tensor in model.state_dict().items():
        key = re.sub(r'^stem\.', 'stage0.', re.sub(r'^stages\.(\d+)', lambda found: f'stage{int(found[1]) + 1}', key))
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        state[key] = tensor
    return state


def tiny_target():
    return randomized(timm.create_model(TINY))


def test_a_converted_target_has_the_same_logits_and_the_tag_in1k(tmp_path):
    target = tiny_target()
    state = published(target)
    torch.save({'model': state, 'epoch': 119}, tmp_path / 'RepOpt.pth')
    assert main(['convert-checkpoint', str(tmp_path / 'RepOpt.pth'), '--out', str(tmp_path / 'out')]) == 0
    model = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
    assert (model.pretrained_cfg['architecture'], model.pretrained_cfg['tag']) == (TINY, 'in1k')
    assert torch.equal(model(IMAGES), target(IMAGES))


def test_a_repvgg_of_its_authors_becomes_a_plain_network_with_the_same_logits(tmp_path):
    repvgg = randomized(timm.create_model('repvgg_a0', num_classes=7))
    file, out = str(tmp_path / 'RepVGG-A0-train.pth'), tmp_path / 'out'
    torch.save(published(repvgg), file)
    assert main(['convert-checkpoint', file, '--out', str(out), '--scales', 'implied']) == 0
    plain = timm.create_model(f'local-dir:{out}', pretrained=True).eval()
    torch.testing.assert_close(plain(IMAGES), repvgg(IMAGES), rtol=1e-4, atol=1e-4)
    assert load_scales(out).architecture == plain.pretrained_cfg['architecture'] == 'repopt_vgg_a0'


@pytest.mark.parametrize(
    'name',
    [
        *(pytest.param(f'repvgg_{each}', marks=pytest.mark.slow) for each in ('a0', 'b1g4', 'd2se')),
        'repghostnet_050',
        'repopt_repghostnet_050',
    ],
)
def test_groups_attention_and_ghost_modules_are_found_by_their_shapes(name):
    model = randomized(timm.create_model(name, num_classes=7))
    found = model_from_reference({'model': published(model)}, 'published.pth')
    assert found.pretrained_cfg['architecture'] == name
    assert torch.equal(found(IMAGES), model(IMAGES))


def test_the_scales_of_a_ghost_net_go_by_name(tmp_path):
    keys = {'kxk': 'cheap_operation.1.weight', 'identity': 'fusion_scale.weight'}
    plain = timm.create_model('repopt_repghostnet_050')
    initial, searched = load_scales('initial', plain), {}
    for module in initial:
        block = module.removesuffix('cheap_operation.conv')
        searched |= {block + key: torch.rand_like(initial[module][branch]) for branch, key in keys.items()}
    torch.save({'state_dict': searched}, tmp_path / 'RepOptGhostNet_0_5x_scales.pth')
    scales = load_scales(tmp_path / 'RepOptGhostNet_0_5x_scales.pth', plain)
    for branch, key in keys.items():
        expected = searched[f'blocks.1.0.ghost2.{key}']
        assert torch.equal(scales['blocks.1.0.ghost2.cheap_operation.conv'][branch], expected)


@pytest.mark.parametrize(
    ('state', 'name'),
    [
        ({'stage0.scale_conv.weight': torch.ones(64)}, 'scales extract'),
        ({'stage1.0.rbr_reparam.weight': torch.ones(2, 2, 3, 3)}, 'already fused.*rbr_reparam'),
        (published(tiny_model(depths=(1, 1), widths=(8, 8, 8))), 'no known architecture'),
        ({**published(tiny_target()), 'linear.weight': torch.ones(3)}, TINY),
        ({'stage0.conv.weight': torch.ones(2, dtype=torch.int32)}, r"'stem\.conv\.weight'"),
    ],
    ids=['search', 'deployed RepVGG', 'unknown widths', 'classifier', 'integer'],
)
def test_what_is_no_target_is_named_with_its_file(state, name):
    with pytest.raises(ValueError, match=rf'other\.pth.*{name}'):
        model_from_reference(state, 'other.pth')
