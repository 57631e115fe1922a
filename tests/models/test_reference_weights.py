from collections import OrderedDict

import pytest
import timm
import torch
from torch import nn

from repopt_timm import Scales, load_scales
from repopt_timm.cli import main
from repopt_timm.models.reference_weights import model_from_reference

from ..helpers import TINY

IMAGES = torch.randn(2, 3, 64, 64)


def randomized(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1, 0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


def conv_bn(in_channels, out_channels, kernel, stride, groups=1):
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)
    block = nn.Sequential()
    block.add_module('conv', conv)
    block.add_module('bn', nn.BatchNorm2d(out_channels))
    return block


class TargetBlock(nn.Sequential):
    """A block of the reference repository's targets."""

    def __init__(self, in_channels, out_channels, stride, index):
        super().__init__(OrderedDict(conv_bn(in_channels, out_channels, 3, stride).named_children()))
        self.add_module('relu', nn.ReLU())


class RepVggBlock(nn.Module):
    """A block as RepVGG's authors train it."""

    def __init__(self, in_channels, out_channels, stride, index, g4=False, se=False):
        super().__init__()
        groups = 4 if g4 and index in range(2, 27, 2) else 1
        self.rbr_identity = nn.BatchNorm2d(in_channels) if in_channels == out_channels and stride == 1 else None
        self.rbr_dense = conv_bn(in_channels, out_channels, 3, stride, groups)
        self.rbr_1x1 = conv_bn(in_channels, out_channels, 1, stride, groups)
        self.se = nn.Module() if se else None
        if se:
            self.se.down = nn.Conv2d(out_channels, out_channels // 16, 1)
            self.se.up = nn.Conv2d(out_channels // 16, out_channels, 1)

    def forward(self, x):
        total = self.rbr_dense(x) + self.rbr_1x1(x) + (self.rbr_identity(x) if self.rbr_identity else 0)
        if self.se:
            total = total * self.se.up(self.se.down(total.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return total.relu()


class PublishedVgg(nn.Module):
    """A network with the module names of the authors' repositories."""

    def __init__(self, block, depths, widths, num_classes=1000):
        super().__init__()
        self.stage0 = block(3, widths[0], 2, 0)
        index = 1
        for stage, depth in enumerate(depths, start=1):
            blocks = []
            for position in range(depth):
                in_channels = widths[stage] if position else widths[stage - 1]
                blocks.append(block(in_channels, widths[stage], 1 if position else 2, index))
                index += 1
            setattr(self, f'stage{stage}', nn.Sequential(*blocks))
        self.linear = nn.Linear(widths[-1], num_classes)

    def forward(self, x):
        for stage in (self.stage0, self.stage1, self.stage2, self.stage3, self.stage4):
            x = stage(x)
        return self.linear(x.mean((2, 3)))


TINY_NUMBERS = (1, 2, 2, 1), (16, 16, 32, 64, 128)
A0_NUMBERS = (2, 4, 14, 1), (48, 48, 96, 192, 1280)


@pytest.fixture
def published():
    return randomized(PublishedVgg(TargetBlock, *TINY_NUMBERS))


@pytest.mark.parametrize('nest', [lambda state: state, lambda state: {'model': state, 'epoch': 119}])
def test_a_converted_target_has_the_same_logits_and_the_tag_in1k(tmp_path, published, nest):
    torch.save(nest(published.state_dict()), tmp_path / 'RepOpt.pth')
    assert main(['convert-checkpoint', str(tmp_path / 'RepOpt.pth'), '--out', str(tmp_path / 'out')]) == 0
    model = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
    assert (model.pretrained_cfg['architecture'], model.pretrained_cfg['tag']) == (TINY, 'in1k')
    torch.testing.assert_close(model(IMAGES), published(IMAGES))


def test_a_repvgg_of_its_authors_becomes_a_plain_network_with_the_same_logits(tmp_path):
    published = randomized(PublishedVgg(RepVggBlock, *A0_NUMBERS, num_classes=7))
    torch.save(published.state_dict(), tmp_path / 'RepVGG-A0-train.pth')
    file, out = str(tmp_path / 'RepVGG-A0-train.pth'), tmp_path / 'out'
    assert torch.equal(model_from_reference(file)(IMAGES), published(IMAGES))
    assert main(['convert-checkpoint', file, '--out', str(out), '--scales', 'implied']) == 0
    plain = timm.create_model(f'local-dir:{out}', pretrained=True).eval()
    assert plain.pretrained_cfg['architecture'] == 'repopt_vgg_a0'
    torch.testing.assert_close(plain(IMAGES), published(IMAGES), rtol=1e-4, atol=1e-4)
    assert load_scales(out).provenance


@pytest.mark.slow
@pytest.mark.parametrize(
    ('name', 'depths', 'widths', 'options'),
    [
        ('repvgg_b1g4', (4, 6, 16, 1), (64, 128, 256, 512, 2048), {'g4': True}),
        ('repvgg_d2se', (8, 14, 24, 1), (64, 160, 320, 640, 2560), {'se': True}),
    ],
)
def test_groups_and_attention_of_a_repvgg_are_found_by_its_shapes(tmp_path, name, depths, widths, options):
    published = randomized(PublishedVgg(lambda *args: RepVggBlock(*args, **options), depths, widths, num_classes=7))
    torch.save(published.state_dict(), tmp_path / 'RepVGG.pth')
    model = model_from_reference(tmp_path / 'RepVGG.pth')
    assert model.pretrained_cfg['architecture'] == name
    torch.testing.assert_close(model(IMAGES), published(IMAGES), rtol=1e-4, atol=1e-4)


class PublishedGhostModule(nn.Module):
    """A module of the reference repository's RepOptGhostNet, made of one of timm's."""

    def __init__(self, module, searched=False):
        super().__init__()
        conv = module.cheap_operation[0]
        self.primary_conv = module.primary_conv
        self.cheap_operation = nn.Sequential(conv, Scale(conv.out_channels) if searched else nn.Identity())
        self.fusion_scale = Scale(conv.out_channels) if searched else None
        self.final_bn = nn.BatchNorm2d(conv.out_channels)
        self.relu = module.relu

    def forward(self, x):
        return self.relu(self.final_bn(self.cheap_operation(self.primary_conv(x))))


class Scale(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(channels) + 0.5)


def published_ghost_net(searched=False):
    model = timm.create_model('repghostnet_050', num_classes=7)
    for name, module in list(model.named_modules()):
        if type(module).__name__ == 'RepGhostModule':
            model.set_submodule(name, PublishedGhostModule(module, searched))
    return randomized(model)


def test_a_converted_ghost_net_has_the_same_logits(tmp_path):
    published = published_ghost_net()
    torch.save({'model': published.state_dict()}, tmp_path / 'ghost.pth')
    torch.testing.assert_close(model_from_reference(tmp_path / 'ghost.pth')(IMAGES), published(IMAGES))


def test_the_scales_of_a_ghost_net_go_by_name(tmp_path):
    searched = published_ghost_net(searched=True).state_dict()
    torch.save({'state_dict': searched}, tmp_path / 'RepOptGhostNet_0_5x_scales.pth')
    target = timm.create_model('repopt_repghostnet_050', scales=tmp_path / 'RepOptGhostNet_0_5x_scales.pth')
    scales = Scales.from_model(target)
    assert len(scales) == 32
    module = 'blocks.1.0.ghost2'
    assert torch.equal(scales[f'{module}.cheap_operation.conv']['kxk'], searched[f'{module}.cheap_operation.1.weight'])
    assert torch.equal(scales[f'{module}.cheap_operation.conv']['identity'], searched[f'{module}.fusion_scale.weight'])
    with pytest.raises(ValueError, match=r"scales\.pth.*'blocks\.0\.0\.ghost1\.cheap_operation\.conv'"):
        timm.create_model('repopt_repghostnet_100', scales=tmp_path / 'RepOptGhostNet_0_5x_scales.pth')
    with pytest.raises(ValueError, match='scales extract'):
        model_from_reference(tmp_path / 'RepOptGhostNet_0_5x_scales.pth')


@pytest.mark.parametrize(
    ('state', 'name'),
    [
        ({'stage0.scale_conv.weight': torch.ones(64)}, 'scales extract'),
        ({'stage1.0.rbr_reparam.weight': torch.ones(2, 2, 3, 3)}, 'already fused.*rbr_reparam'),
        (PublishedVgg(TargetBlock, (1, 2, 2, 1), (8, 8, 8, 8, 8)).state_dict(), 'no known architecture'),
        ({**PublishedVgg(TargetBlock, *TINY_NUMBERS).state_dict(), 'linear.weight': torch.ones(3)}, TINY),
        ({'stage0.conv.weight': torch.ones(2, dtype=torch.int32)}, "'stem.conv.weight'"),
    ],
    ids=['search', 'deployed RepVGG', 'unknown widths', 'classifier', 'integer'],
)
def test_what_is_no_target_is_named_with_its_file(tmp_path, state, name):
    torch.save(state, tmp_path / 'other.pth')
    with pytest.raises(ValueError, match=rf'other\.pth.*{name}'):
        model_from_reference(tmp_path / 'other.pth')
