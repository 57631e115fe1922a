import argparse

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from repopt_timm import Scales, hyper_search, load_scales
from repopt_timm.cards.repository import save_scales_card
from repopt_timm.scales import read_scale_file
from repopt_timm.scales.scale_files import checkpoint_entry

from ..helpers import TINY, card_of, random_scales, tiny_model


def reference_keys(scales, names=('scale_conv', 'scale_1x1', 'scale_identity')):
    """The layout of the reference repository's files."""
    state = {}
    for module, vectors in scales.items():
        parts = module.split('.')
        prefix = 'stage0' if module == 'stem.conv' else f'stage{int(parts[1]) + 1}.{parts[2]}'
        for branch, name in zip(('kxk', '1x1', 'identity'), names):
            if branch in vectors:
                state[f'{prefix}.{name}.weight'] = vectors[branch]
    return state


def test_modules_come_in_the_order_of_the_network(tmp_path):
    model = timm.create_model('repopt_vgg_b1', device='meta')
    save_file(reference_keys(Scales.initial(model)), tmp_path / 'b1.safetensors')
    order = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    assert list(read_scale_file(tmp_path / 'b1.safetensors')) == order


def test_scales_survive_file_card_and_checkpoint(tmp_path):
    prior = {'stem.conv': {'kxk': 3, '1x1': 2}, 'stages.1.1.conv': ['kxk', '1x3', 'identity']}
    search = hyper_search(tiny_model(), Scales.initial(tiny_model(), prior, start='identity'))
    scales = Scales.from_model(search, {'dataset': 'digits', 'seed': 3})
    assert (scales.start, scales.counts['stem.conv']) == ('identity', prior['stem.conv'])
    scales.save(tmp_path / 'scales.safetensors')
    save_scales_card(scales, tmp_path / 'card')
    content = {'state_dict': search.state_dict(), 'arch': f'{TINY}_hs', 'repopt': checkpoint_entry(scales)}
    torch.save(content, tmp_path / 'last.pth.tar')
    for name in ('scales.safetensors', 'card', 'last.pth.tar'):
        found = load_scales(tmp_path / name)
        assert (found, found.start, found.counts, list(found)) == (scales, 'identity', scales.counts, list(scales))
        assert found.source == str(tmp_path / name) or name == 'card'
        assert found.provenance == scales.provenance or name == 'last.pth.tar'
    with pytest.raises(ValueError, match=r'scales\.pth'):
        scales.save(tmp_path / 'scales.pth')
    assert card_of(tmp_path / 'card').data['repopt']['start'] == 'identity'


@pytest.mark.parametrize('kind', ['_hs', '_csla'])
def test_scales_are_read_from_the_checkpoints_of_twins(tmp_path, kind):
    model = tiny_model(kind, scales=random_scales())
    torch.save({'state_dict': model.state_dict(), 'args': argparse.Namespace()}, tmp_path / 'last.pth.tar')
    save_file(model.state_dict(), tmp_path / 'model.safetensors')
    for file in ('last.pth.tar', 'model.safetensors'):
        assert load_scales(tmp_path / file, tiny_model()) == Scales.from_model(model)


def test_a_convolution_that_is_the_network_or_stands_in_two_places_is_read(tmp_path):
    conv = nn.Conv2d(4, 4, 3, padding=1)
    for network in (conv, nn.Sequential(conv, conv)):
        torch.save(hyper_search(network).state_dict(), tmp_path / 'last.pth')
        assert load_scales(tmp_path / 'last.pth', network) == Scales.initial(network)


def test_a_checkpoint_is_held_to_the_geometry_that_it_states(tmp_path):
    strides = (1, 2, 2, 2, 2)
    search = tiny_model('_hs', strides=strides)
    content = {'state_dict': search.state_dict(), 'arch': f'{TINY}_hs'}
    torch.save(content, tmp_path / 'bare.pth')
    assert read_scale_file(tmp_path / 'bare.pth').geometry == {}
    scales = Scales.from_model(search)
    assert Scales.from_model(tiny_model(scales=tmp_path / 'bare.pth', strides=strides)) == scales
    torch.save({**content, 'repopt': checkpoint_entry(scales)}, tmp_path / 'last.pth')
    with pytest.raises(ValueError, match=r"'stem\.conv'.*stride 1x1.*stride 2x2"):
        tiny_model(scales=tmp_path / 'last.pth')


@pytest.mark.parametrize('names', [('scale_conv', 'scale_1x1'), ('scale3x3', 'scale1x1')])
def test_published_layouts_are_read_by_name(tmp_path, names):
    scales = random_scales()
    keys = reference_keys(scales, (*names, 'scale_identity')) | {'stage0.conv3x3.weight': torch.ones(2, 2, 3, 3)}
    torch.save({'model': keys}, tmp_path / 'published.pth')
    assert load_scales(tmp_path / 'published.pth', tiny_model()) == scales


def test_the_network_of_a_published_file_is_found_by_its_widths_or_by_who_asks(tmp_path):
    model = timm.create_model('repopt_vgg_d2se', device='meta')
    torch.save(reference_keys(Scales.initial(model)), tmp_path / 'se.pth')
    assert read_scale_file(tmp_path / 'se.pth').architecture == 'repopt_vgg_l2'
    assert load_scales(tmp_path / 'se.pth', model).architecture == 'repopt_vgg_d2se'


@pytest.mark.parametrize(
    ('change', 'name'),
    [
        (lambda state: {k: v for k, v in state.items() if 'stages.3' not in k}, r'stages\.3\.0\.conv'),
        (lambda state: {k: v for k, v in state.items() if 'stem' not in k or 'scales.1x1' not in k}, r'stem\.conv'),
        (lambda state: tiny_model().state_dict(), 'no scales'),
        (lambda state: {'stage1.0.rbr_dense.conv.weight': torch.ones(1)}, 'RepVGG.*--scales implied'),
        (lambda state: {'stage1.0.rbr_reparam.weight': torch.ones(1)}, 'already fused.*rbr_reparam'),
    ],
    ids=['missing', 'branch', 'plain', 'RepVGG', 'deployed RepVGG'],
)
def test_a_file_without_the_scales_of_the_network_says_what_it_is(tmp_path, change, name):
    torch.save(change(tiny_model('_hs').state_dict()), tmp_path / 'last.pth')
    with pytest.raises(ValueError, match=rf'last\.pth.*{name}'):
        tiny_model(scales=tmp_path / 'last.pth')
