import argparse
import os
import signal
import subprocess
import sys
import time
from collections import OrderedDict
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from repopt_timm import Scales, hyper_search, load_scales, save_scales_card
from repopt_timm.scales import read_scale_file
from repopt_timm.scales.files import checkpoint_entry

from ..helpers import TINY, random_scales, tiny_model

PUBLISHED = Path(__file__).parents[2] / 'shared/data/RepOpt-VGG-B1-scales.pth'


def initial(architecture=TINY, **kwargs):
    return Scales.initial(timm.create_model(architecture, device='meta', **kwargs))


def reference_keys(scales):
    """The layout of the reference repository's files."""
    state = OrderedDict()
    for module, vectors in scales.items():
        parts = module.split('.')
        prefix = 'stage0' if module == 'stem.conv' else f'stage{int(parts[1]) + 1}.{parts[2]}'
        for branch, vector in vectors.items():
            state[f'{prefix}.scale_{branch.replace("kxk", "conv")}.weight'] = vector
    return state


def sketch_keys(scales):
    """The layout of the method's published sketch: scales named after kernels, beside the rest of a block."""
    names = {'kxk': 'scale3x3.weight', '1x1': 'scale1x1.weight', 'identity': 'scale_identity.weight'}
    state = {'fc.weight': torch.ones(3, 4)}
    for module, vectors in scales.items():
        block = module.removesuffix('.conv')
        state |= {f'{block}.{names[branch]}': vector for branch, vector in vectors.items()}
        state[f'{block}.conv3x3.weight'] = torch.ones(2, 2, 3, 3)
    return state


def test_a_file_gives_back_every_bit_order_counts_geometry_and_provenance(tmp_path):
    scales = random_scales(strides=(1, 1, 2, 2, 2)).with_provenance({'dataset': 'digits', 'seed': 3})
    scales.save(tmp_path / 'scales.safetensors')
    loaded = read_scale_file(tmp_path / 'scales.safetensors')
    assert loaded == scales
    assert list(loaded) == list(scales)
    assert (loaded.provenance, loaded.counts) == (scales.provenance, scales.counts)
    assert loaded.geometry['stem.conv'].stride == (1, 1)


@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
def test_modules_come_in_the_order_of_the_network(tmp_path, suffix):
    model = timm.create_model('repopt_vgg_b1', device='meta')
    (torch.save if suffix == 'pth' else save_file)(reference_keys(Scales.initial(model)), tmp_path / f'b1.{suffix}')
    order = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    assert list(read_scale_file(tmp_path / f'b1.{suffix}')) == order


def test_counts_survive_file_card_and_checkpoint(tmp_path):
    search = hyper_search(
        tiny_model(), {'stem.conv': {'kxk': 3, '1x1': 2}, 'stages.1.1.conv': ['kxk', '1x3', 'identity']}
    )
    scales = Scales.from_model(search)
    assert scales.counts['stem.conv'] == {'1x1': 2, 'kxk': 3}
    scales.save(tmp_path / 'scales.safetensors')
    save_scales_card(scales, tmp_path / 'card')
    torch.save({'state_dict': search.state_dict(), 'arch': f'{TINY}_hs'}, tmp_path / 'last.pth.tar')
    assert load_scales(tmp_path / 'scales.safetensors') == load_scales(tmp_path / 'card') == scales
    assert load_scales(tmp_path / 'last.pth.tar').counts == scales.counts


def test_the_scales_of_a_network_that_is_one_convolution_are_read(tmp_path):
    search = hyper_search(nn.Conv2d(4, 4, 3, padding=1))
    torch.save(search.state_dict(), tmp_path / 'one.pth')
    found = load_scales(tmp_path / 'one.pth', nn.Conv2d(4, 4, 3, padding=1))
    assert found == Scales.from_model(search).renamed('Conv2d')


@pytest.mark.parametrize('kind', ['_hs', '_csla'])
@pytest.mark.parametrize(
    'wrap',
    [
        lambda state: state,
        lambda state: {'model': state, 'epoch': 3},
        lambda state: {'state_dict': state, 'arch': f'{TINY}_hs', 'args': argparse.Namespace(model_kwargs={})},
        lambda state: {'state_dict': {}, 'state_dict_ema': state},
        lambda state: {'state_dict': {f'module.{key}': value for key, value in state.items()}},
    ],
    ids=['bare', 'model', 'timm', 'ema', 'ddp'],
)
def test_scales_are_read_from_the_checkpoints_of_twins(tmp_path, kind, wrap):
    model = tiny_model(kind, scales=random_scales())
    torch.save(wrap(model.state_dict()), tmp_path / 'last.pth.tar')
    assert load_scales(tmp_path / 'last.pth.tar', tiny_model()) == Scales.from_model(model)
    save_file(model.state_dict(), tmp_path / 'model.safetensors')
    assert load_scales(tmp_path / 'model.safetensors', tiny_model()) == Scales.from_model(model)


def test_a_bare_state_dict_takes_the_geometry_of_the_model_that_wants_it(tmp_path):
    strides = (1, 2, 2, 2, 2)
    search = tiny_model('_hs', strides=strides)
    torch.save(search.state_dict(), tmp_path / 'bare.pth')
    assert read_scale_file(tmp_path / 'bare.pth').geometry == {}
    assert tiny_model(scales=tmp_path / 'bare.pth', strides=strides).scales == search.scales


def test_a_checkpoint_that_states_its_geometry_is_held_to_it(tmp_path):
    search = tiny_model('_hs', strides=(1, 2, 2, 2, 2))
    content = {'state_dict': search.state_dict(), 'arch': f'{TINY}_hs', 'repopt': checkpoint_entry(search.scales)}
    torch.save(content, tmp_path / 'last.pth.tar')
    assert read_scale_file(tmp_path / 'last.pth.tar') == search.scales
    with pytest.raises(ValueError, match=r"'stem\.conv'.*stride 1x1.*stride 2x2"):
        tiny_model(scales=tmp_path / 'last.pth.tar')


@pytest.mark.parametrize('keys', [reference_keys, sketch_keys])
@pytest.mark.parametrize('nest', [dict, lambda state: {'model': state}])
def test_published_layouts_are_read_by_name(tmp_path, keys, nest):
    scales = random_scales()
    torch.save(nest(keys(scales)), tmp_path / 'published.pth')
    assert load_scales(tmp_path / 'published.pth', tiny_model()) == scales


def test_the_network_of_a_published_file_is_found_by_its_widths_or_by_who_asks(tmp_path):
    torch.save(reference_keys(initial('repopt_vgg_d2se')), tmp_path / 'se.pth')
    assert read_scale_file(tmp_path / 'se.pth').architecture == 'repopt_vgg_l2'
    model = timm.create_model('repopt_vgg_d2se', device='meta')
    assert load_scales(tmp_path / 'se.pth', model).architecture == 'repopt_vgg_d2se'


@pytest.mark.skipif(not PUBLISHED.is_file(), reason="the authors' file is not here")
def test_the_published_scales_of_b1_are_read():
    scales = load_scales(PUBLISHED, timm.create_model('repopt_vgg_b1', device='meta'))
    assert len(scales) == 28
    assert scales['stages.0.1.conv'].keys() == {'kxk', '1x1', 'identity'}


def without(state, part):
    return {key: value for key, value in state.items() if part not in key}


@pytest.mark.parametrize(
    ('change', 'name'),
    [
        (lambda state: without(state, 'stages.3'), r'stages\.3\.0\.conv'),
        (
            lambda state: state | {k.replace('stages.3', 'stages.4'): v.clone() for k, v in state.items()},
            r'stages\.4\.0\.conv',
        ),
        (lambda state: without(state, 'stem.conv.parametrizations.weight.0.scales.1x1'), r'stem\.conv'),
        (lambda state: tiny_model().state_dict(), 'no scales'),
        (lambda state: {'stage1.0.rbr_dense.conv.weight': torch.ones(1)}, 'RepVGG.*--scales implied'),
        (lambda state: {'stage1.0.rbr_reparam.weight': torch.ones(1)}, 'already fused.*rbr_reparam'),
        (lambda state: {'stages.0.0.reparam_conv.weight': torch.ones(1)}, 'already fused.*reparam_conv'),
    ],
    ids=['missing', 'left over', 'branch', 'plain', 'RepVGG', 'deployed RepVGG', 'fused by timm'],
)
def test_a_file_without_the_scales_of_the_network_says_what_it_is(tmp_path, change, name):
    torch.save(change(tiny_model('_hs').state_dict()), tmp_path / 'last.pth')
    with pytest.raises(ValueError, match=rf'last\.pth.*{name}'):
        tiny_model(scales=tmp_path / 'last.pth')


@pytest.mark.parametrize(
    ('key', 'text'),
    [('modules', '[' * 100_000), ('provenance', '{'), ('version', '3'), ('counts', '3'), ('fingerprint', '0' * 64)],
    ids=lambda value: value[:9],
)
def test_a_damaged_header_is_named_with_its_file(tmp_path, key, text):
    path = tmp_path / 'scales.safetensors'
    random_scales().save(path)
    with safe_open(path, 'pt') as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    save_file(tensors, path, {**metadata, key: text})
    with pytest.raises(ValueError, match=r'scales\.safetensors'):
        read_scale_file(path)
    save_file({**tensors, 'one': torch.ones(1)}, path, metadata)
    with pytest.raises(ValueError, match=r'scales\.safetensors'):
        read_scale_file(path)


def test_a_changed_bit_does_not_match_the_fingerprint(tmp_path):
    path = tmp_path / 'scales.safetensors'
    random_scales().save(path)
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match='fingerprint'):
        read_scale_file(path)


def test_a_killed_process_leaves_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / 'scales.safetensors'
    old, new = initial(), random_scales()
    old.save(path)
    new.save(tmp_path / 'new.safetensors')
    code = (
        'import sys\nfrom repopt_timm import load_scales\nnew = load_scales(sys.argv[1])\nprint("ready", flush=True)\n'
        'while True: new.save(sys.argv[2])'
    )
    command = [sys.executable, '-c', code, str(tmp_path / 'new.safetensors'), str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        time.sleep(0.2)
        os.kill(process.pid, signal.SIGKILL)
    assert read_scale_file(path) in (old, new)
