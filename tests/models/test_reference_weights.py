from collections import OrderedDict

import pytest
import timm
import torch
from torch import nn

from repopt_timm import load_scales
from repopt_timm.cli import main
from repopt_timm.models.reference_weights import model_from_reference

from ..helpers import TINY

IMAGES = torch.randn(2, 3, 64, 64)


def randomized(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


def conv_bn(in_channels, out_channels, kernel, stride, groups=1, **further):
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(out_channels), **further))


def target_block(in_channels, out_channels, stride, index):
    return conv_bn(in_channels, out_channels, 3, stride, relu=nn.ReLU())


class RepVggBlock(nn.Module):
    """A block as RepVGG's authors train it."""

    def __init__(self, in_channels, out_channels, stride, index, g4=False, se=False):
        super().__init__()
        groups = 4 if g4 and index in range(2, 27, 2) else 1
        self.rbr_identity = nn.BatchNorm2d(in_channels) if in_channels == out_channels and stride == 1 else None
        self.rbr_dense = conv_bn(in_channels, out_channels, 3, stride, groups)
        self.rbr_1x1 = conv_bn(in_channels, out_channels, 1, stride, groups)
        self.se = nn.Module()
        if se:
            self.se.down = nn.Conv2d(out_channels, out_channels // 16, 1)
            self.se.up = nn.Conv2d(out_channels // 16, out_channels, 1)

    def forward(self, x):
        total = self.rbr_dense(x) + self.rbr_1x1(x) + (self.rbr_identity(x) if self.rbr_identity else 0)
        if hasattr(self.se, 'down'):
            total = total * self.se.up(self.se.down(total.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return total.relu()


class PublishedVgg(nn.Module):
    """A network with the module names of the authors' repositories."""

    def __init__(self, block, depths, widths, num_classes=7):
        super().__init__()
        self.stage0 = block(3, widths[0], 2, 0)
        for stage, depth in enumerate(depths, start=1):
            channels, first = [widths[stage - 1]] + [widths[stage]] * depth, 1 + sum(depths[: stage - 1])
            blocks = [block(channels[i], channels[i + 1], 1 if i else 2, first + i) for i in range(depth)]
            setattr(self, f'stage{stage}', nn.Sequential(*blocks))
        self.linear = nn.Linear(widths[-1], num_classes)

    def forward(self, x):
        for stage in (self.stage0, self.stage1, self.stage2, self.stage3, self.stage4):
            x = stage(x)
        return self.linear(x.mean((2, 3)))


def tiny_target(widths=(16, 16, 32, 64, 128)):
    return randomized(PublishedVgg(target_block, (1, 2, 2, 1), widths, num_classes=1000))


def test_a_converted_target_has_the_same_logits_and_the_tag_in1k(tmp_path):
    published = tiny_target()
    torch.save({'model': published.state_dict(), 'epoch': 119}, tmp_path / 'RepOpt.pth')
    assert main(['convert-checkpoint', str(tmp_path / 'RepOpt.pth'), '--out', str(tmp_path / 'out')]) == 0
    model = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
    assert (model.pretrained_cfg['architecture'], model.pretrained_cfg['tag']) == (TINY, 'in1k')
    torch.testing.assert_close(model(IMAGES), published(IMAGES))


def test_a_repvgg_of_its_authors_becomes_a_plain_network_with_the_same_logits(tmp_path):
    published = randomized(PublishedVgg(RepVggBlock, (2, 4, 14, 1), (48, 48, 96, 192, 1280)))
    file, out = str(tmp_path / 'RepVGG-A0-train.pth'), tmp_path / 'out'
    torch.save(published.state_dict(), file)
    assert torch.equal(model_from_reference(file)(IMAGES), published(IMAGES))
    assert main(['convert-checkpoint', file, '--out', str(out), '--scales', 'implied']) == 0
    plain = timm.create_model(f'local-dir:{out}', pretrained=True).eval()
    torch.testing.assert_close(plain(IMAGES), published(IMAGES), rtol=1e-4, atol=1e-4)
    assert load_scales(out).architecture == plain.pretrained_cfg['architecture'] == 'repopt_vgg_a0'


@pytest.mark.slow
@pytest.mark.parametrize(
    ('name', 'depths', 'widths', 'options'),
    [
        ('repvgg_b1g4', (4, 6, 16, 1), (64, 128, 256, 512, 2048), {'g4': True}),
        ('repvgg_d2se', (8, 14, 24, 1), (64, 160, 320, 640, 2560), {'se': True}),
    ],
)
def test_groups_and_attention_of_a_repvgg_are_found_by_its_shapes(tmp_path, name, depths, widths, options):
    published = randomized(PublishedVgg(lambda *args: RepVggBlock(*args, **options), depths, widths))
    torch.save(published.state_dict(), tmp_path / 'RepVGG.pth')
    model = model_from_reference(tmp_path / 'RepVGG.pth')
    assert model.pretrained_cfg['architecture'] == name
    torch.testing.assert_close(model(IMAGES), published(IMAGES), rtol=1e-4, atol=1e-4)


def test_a_ghost_net_of_the_reference_goes_by_name(tmp_path):
    model = randomized(timm.create_model('repopt_repghostnet_050', num_classes=7))
    names = {'cheap_operation.conv.': 'cheap_operation.0.', 'cheap_operation.bn.': 'final_bn.'}
    state = model.state_dict()
    for ours, theirs in names.items():
        state = {key.replace(ours, theirs): tensor for key, tensor in state.items()}
    torch.save({'model': state}, tmp_path / 'ghost.pth')
    torch.testing.assert_close(model_from_reference(tmp_path / 'ghost.pth')(IMAGES), model(IMAGES))


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
        (tiny_target((8, 8, 8, 8, 8)).state_dict(), 'no known architecture'),
        ({**tiny_target().state_dict(), 'linear.weight': torch.ones(3)}, TINY),
        ({'stage0.conv.weight': torch.ones(2, dtype=torch.int32)}, r"'stem\.conv\.weight'"),
    ],
    ids=['search', 'deployed RepVGG', 'unknown widths', 'classifier', 'integer'],
)
def test_what_is_no_target_is_named_with_its_file(tmp_path, state, name):
    torch.save(state, tmp_path / 'other.pth')
    with pytest.raises(ValueError, match=rf'other\.pth.*{name}'):
        model_from_reference(tmp_path / 'other.pth')
