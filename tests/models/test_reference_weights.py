import json

import pytest
import timm
import torch
from torch import nn

from repopt_timm import Scales
from repopt_timm.cli import main
from repopt_timm.models.reference_weights import model_from_reference
from repopt_timm.scales import read_scale_file

from ..helpers import TINY


def plain_block(in_channels, out_channels, stride):
    block = nn.Sequential()
    block.add_module('conv', nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False))
    block.add_module('bn', nn.BatchNorm2d(out_channels))
    block.add_module('relu', nn.ReLU())
    return block


class PublishedLayout(nn.Module):
    """A target network with the module names of the reference repository."""

    def __init__(self, depths=(1, 2, 2, 1), widths=(16, 16, 32, 64, 128), num_classes=1000):
        super().__init__()
        self.stage0 = plain_block(3, widths[0], 2)
        for stage, depth in enumerate(depths, start=1):
            channels = [widths[stage - 1]] + [widths[stage]] * depth
            blocks = [plain_block(channels[i], channels[i + 1], 2 if i == 0 else 1) for i in range(depth)]
            setattr(self, f'stage{stage}', nn.Sequential(*blocks))
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(widths[-1], num_classes)

    def forward(self, x):
        for stage in (self.stage0, self.stage1, self.stage2, self.stage3, self.stage4):
            x = stage(x)
        return self.linear(self.gap(x).flatten(1))


@pytest.fixture
def published():
    model = PublishedLayout()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


@pytest.mark.parametrize('nest', [lambda state: state, lambda state: {'model': state, 'epoch': 119}])
def test_a_converted_model_has_the_same_logits(tmp_path, published, nest):
    torch.save(nest(published.state_dict()), tmp_path / 'RepOpt.pth')
    images = torch.randn(2, 3, 64, 64)
    model = model_from_reference(tmp_path / 'RepOpt.pth')
    assert model.architecture == TINY
    torch.testing.assert_close(model(images), published(images))


def test_the_command_writes_timms_format_with_the_tag_in1k(tmp_path, published, capsys):
    torch.save(published.state_dict(), tmp_path / 'RepOpt.pth')
    assert main(['convert-checkpoint', str(tmp_path / 'RepOpt.pth'), '--out', str(tmp_path / 'out'), '--json']) == 0
    assert json.loads(capsys.readouterr().out)['architecture'] == TINY
    config = json.loads((tmp_path / 'out/config.json').read_text())
    assert config['pretrained_cfg']['tag'] == 'in1k'
    model = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(model(images), published(images))


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
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


def test_a_converted_ghost_net_has_the_same_logits(tmp_path):
    published = published_ghost_net()
    torch.save({'model': published.state_dict()}, tmp_path / 'ghost.pth')
    images = torch.randn(2, 3, 64, 64)
    model = model_from_reference(tmp_path / 'ghost.pth')
    assert model.architecture == 'repghostnet_050'
    torch.testing.assert_close(model(images), published(images))


def test_the_scales_of_a_ghost_net_go_by_name(tmp_path):
    searched = published_ghost_net(searched=True).state_dict()
    torch.save({'state_dict': searched}, tmp_path / 'RepOptGhostNet_0_5x_scales.pth')
    target = timm.create_model('repopt_repghostnet_050', scales=tmp_path / 'RepOptGhostNet_0_5x_scales.pth')
    scales = Scales.from_model(target)
    assert len(scales) == 32
    module = 'blocks.1.0.ghost2'
    assert torch.equal(scales[f'{module}.cheap_operation.conv']['kxk'], searched[f'{module}.cheap_operation.1.weight'])
    assert torch.equal(scales[f'{module}.cheap_operation.conv']['identity'], searched[f'{module}.fusion_scale.weight'])
    with pytest.raises(ValueError, match=r'scales\.pth.*has shape \(4,\), expected \(8,\)'):
        timm.create_model('repopt_repghostnet_100', scales=tmp_path / 'RepOptGhostNet_0_5x_scales.pth')
    with pytest.raises(ValueError, match=r'It is a hyper-search; take its scales'):
        model_from_reference(tmp_path / 'RepOptGhostNet_0_5x_scales.pth')


def test_a_ghost_net_with_branches_is_no_target(tmp_path):
    model = timm.create_model('repghostnet_050')
    torch.save(model.state_dict(), tmp_path / 'branches.pth')
    with pytest.raises(ValueError, match=r"branches\.pth: .*is a branch's BatchNorm.*plain_twin\(model"):
        model_from_reference(tmp_path / 'branches.pth')
    with pytest.raises(ValueError, match='no scales in it'):
        read_scale_file(tmp_path / 'branches.pth')


def test_a_hyper_search_is_no_target(tmp_path):
    torch.save({'stage0.scale_conv.weight': torch.ones(64)}, tmp_path / 'hs.pth')
    with pytest.raises(ValueError, match=r'hs\.pth: .*take its scales: repopt-timm scales extract'):
        model_from_reference(tmp_path / 'hs.pth')


def test_unknown_widths_are_refused(tmp_path):
    torch.save(PublishedLayout(widths=(8, 8, 8, 8, 8)).state_dict(), tmp_path / 'other.pth')
    with pytest.raises(ValueError, match=r'other\.pth: its 7 convolutions fit no known architecture'):
        model_from_reference(tmp_path / 'other.pth')
