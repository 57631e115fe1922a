import argparse
import os
import signal
import subprocess
import sys
import time
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file

from repopt_timm import Scales
from repopt_timm.architectures import ARCHITECTURES
from repopt_timm.sources import load_scales

from .helpers import TINY, random_scales, tiny_model


def changed(scales, module='stem.conv', **vectors):
    modules = {name: dict(scales[name]) for name in scales}
    modules[module].update({name.removeprefix('_'): vector for name, vector in vectors.items()})
    return Scales(scales.architecture, modules, scales.strides)


def reference_keys(scales):
    """The layout of the reference repository's files."""
    state = OrderedDict()
    for module, vectors in scales.items():
        parts = module.split('.')
        prefix = 'stage0' if module == 'stem.conv' else f'stage{int(parts[1]) + 1}.{parts[2]}'
        for branch, vector in vectors.items():
            state[f'{prefix}.scale_{branch.replace("kxk", "conv")}.weight'] = vector
    return state


def test_scales_equal_to_the_last_bit_have_one_fingerprint():
    scales = random_scales()
    same = Scales(TINY, {name: scales[name] for name in reversed(list(scales))}, provenance={'seed': 7})
    assert same == scales
    assert hash(same) == hash(scales)
    nudged = scales['stem.conv']['kxk'].clone()
    nudged[0] = torch.nextafter(nudged[0], torch.tensor(9.0))
    assert changed(scales, kxk=nudged) != scales
    strided = Scales.initial(TINY, (2, 2, 2, 1, 2))
    assert strided.fingerprint != Scales.initial(TINY).fingerprint


def test_scales_cannot_be_changed():
    scales = random_scales()
    before = scales.fingerprint
    scales['stem.conv']['kxk'].zero_()
    scales.provenance['seed'] = 1
    assert scales['stem.conv']['kxk'].any()
    assert scales.provenance == {}
    with pytest.raises(TypeError):
        scales['stem.conv'] = {}
    assert Scales(TINY, {name: scales[name] for name in scales}).fingerprint == before


def test_a_file_gives_back_every_bit_and_the_provenance(tmp_path):
    scales = random_scales(strides=(1, 1, 2, 2, 2)).with_provenance({'dataset': 'digits', 'seed': 3})
    scales.save(tmp_path / 'scales.safetensors')
    loaded = Scales.load(tmp_path / 'scales.safetensors')
    assert loaded == scales
    assert loaded.provenance == {'dataset': 'digits', 'seed': 3}
    assert loaded.strides == (1, 1, 2, 2, 2)
    assert list(loaded) == list(scales)


def test_modules_come_in_the_order_of_the_network(tmp_path):
    scales = Scales.initial('repopt_vgg_b1')
    scales.save(tmp_path / 'b1.safetensors')
    order = [spec.name for spec in ARCHITECTURES['repopt_vgg_b1'].convs()]
    assert list(Scales.load(tmp_path / 'b1.safetensors')) == order


@pytest.mark.parametrize(
    'wrap',
    [
        lambda state: state,
        lambda state: {'model': state, 'epoch': 3},
        lambda state: {'state_dict': state, 'arch': f'{TINY}_hs', 'args': argparse.Namespace(model_kwargs={})},
        lambda state: {'state_dict': {}, 'state_dict_ema': state},
        lambda state: {'state_dict': {f'module.{key}': value for key, value in state.items()}},
        lambda state: {'state_dict': {f'_orig_mod.{key}': value for key, value in state.items()}},
    ],
    ids=['bare', 'model', 'timm', 'ema', 'ddp', 'compiled'],
)
def test_scales_are_read_from_the_checkpoints_of_a_search(tmp_path, wrap):
    model = tiny_model('_hs', scales=random_scales())
    torch.save(wrap(model.state_dict()), tmp_path / 'last.pth.tar')
    assert Scales.load(tmp_path / 'last.pth.tar') == Scales.from_model(model)
    save_file(model.state_dict(), tmp_path / 'model.safetensors')
    assert Scales.load(tmp_path / 'model.safetensors') == Scales.from_model(model)


def test_a_bare_state_dict_has_the_strides_of_the_model_that_wants_it(tmp_path):
    strides = (1, 2, 2, 2, 2)
    torch.save(tiny_model('_hs', strides=strides).state_dict(), tmp_path / 'bare.pth')
    assert tiny_model(scales=tmp_path / 'bare.pth', strides=strides).scales.strides == strides


def test_vectors_are_judged_as_float32():
    with pytest.raises(ValueError, match="'kxk' is inf"):
        changed(random_scales(), kxk=torch.full((16,), 1e300, dtype=torch.float64))


def test_a_wrapped_search_has_the_same_scales():
    model = tiny_model('_hs')
    assert Scales.from_model(torch.compile(torch.nn.DataParallel(model))) == Scales.from_model(model)


def test_the_strides_of_a_search_are_read_from_its_arguments(tmp_path):
    strides = (2, 1, 2, 2, 2)
    model = tiny_model('_hs', strides=strides)
    arguments = argparse.Namespace(model_kwargs={'strides': strides})
    torch.save({'state_dict': model.state_dict(), 'arch': f'{TINY}_hs', 'args': arguments}, tmp_path / 'last.pth.tar')
    assert Scales.load(tmp_path / 'last.pth.tar').strides == strides


@pytest.mark.parametrize('architecture', ['repopt_vgg_b1', 'repopt_vgg_l2'])
@pytest.mark.parametrize(
    'nest', [lambda state: state, lambda state: {'model': {**state, 'linear.bias': torch.ones(9)}}]
)
def test_the_reference_repositorys_files_are_read_by_name(tmp_path, architecture, nest):
    scales = Scales.initial(architecture)
    torch.save(nest(reference_keys(scales)), tmp_path / 'RepOpt-VGG-scales.pth')
    assert Scales.load(tmp_path / 'RepOpt-VGG-scales.pth') == scales


def test_the_architecture_that_is_asked_for_settles_what_shapes_cannot(tmp_path):
    torch.save(reference_keys(Scales.initial('repopt_vgg_d2se')), tmp_path / 'se.pth')
    assert Scales.load(tmp_path / 'se.pth').architecture == 'repopt_vgg_l2'
    assert load_scales(tmp_path / 'se.pth', 'repopt_vgg_d2se').architecture == 'repopt_vgg_d2se'


def test_initial_scales_are_those_that_a_search_starts_from():
    initial = Scales.initial(TINY)
    assert initial == Scales.from_model(tiny_model('_hs'))
    assert 'not searched' in initial.provenance['method']
    assert Scales.initial('repopt_vgg_b1')['stages.2.8.conv']['1x1'][0] == pytest.approx((2 / 8) ** 0.5)


@pytest.mark.parametrize(
    ('vectors', 'message'),
    [
        ({'kxk': torch.ones(15)}, r"'stem.conv': the scale of branch 'kxk' has shape \(15,\), expected \(16,\)"),
        ({'kxk': torch.full((16,), float('nan'))}, "branch 'kxk' is nan at channel 0"),
        ({'kxk': torch.full((16,), float('inf'))}, "branch 'kxk' is inf at channel 0"),
        ({'kxk': torch.zeros(16)}, 'all zeros'),
        ({'identity': torch.ones(16)}, r"has scales for the branches \['1x1', 'identity', 'kxk'\]"),
    ],
)
def test_wrong_vectors_are_refused(vectors, message):
    with pytest.raises(ValueError, match=message):
        changed(random_scales(), **vectors)


def test_a_missing_or_left_over_block_is_named_with_its_file(tmp_path):
    state = tiny_model('_hs').state_dict()
    short = {key: value for key, value in state.items() if not key.startswith('stages.3')}
    torch.save({'state_dict': short, 'arch': TINY + '_hs'}, tmp_path / 'short.pth.tar')
    with pytest.raises(
        ValueError, match=r"short\.pth\.tar: module 'stages\.3\.0\.conv' of test_repopt_vgg has no scales"
    ):
        Scales.load(tmp_path / 'short.pth.tar')
    extra = {**state, 'stages.4.0.conv.branches.kxk.scale': torch.ones(8)}
    torch.save({'state_dict': extra, 'arch': TINY + '_hs'}, tmp_path / 'long.pth.tar')
    with pytest.raises(ValueError, match=r"long\.pth\.tar: there are scales for a module 'stages\.4\.0\.conv'"):
        Scales.load(tmp_path / 'long.pth.tar')


def test_a_checkpoint_without_scales_is_refused(tmp_path):
    torch.save(tiny_model().state_dict(), tmp_path / 'plain.pth')
    with pytest.raises(ValueError, match=r'plain\.pth: no scales in it'):
        Scales.load(tmp_path / 'plain.pth')


def test_a_damaged_file_does_not_match_its_fingerprint(tmp_path):
    path = tmp_path / 'scales.safetensors'
    random_scales().save(path)
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match='do not match their fingerprint'):
        Scales.load(path)


@pytest.mark.parametrize(
    ('scales', 'message'),
    [
        (Scales.initial('repopt_vgg_a0'), 'are scales of repopt_vgg_a0, but the model is a test_repopt_vgg'),
        (
            Scales.initial(TINY, (2, 2, 2, 2, 1)),
            r'searched with strides \(2, 2, 2, 2, 1\), but the model has strides \(2, 2, 2, 2, 2\)',
        ),
    ],
)
@pytest.mark.parametrize('kind', ['', '_csla', '_hs'])
def test_scales_of_another_network_are_refused(kind, scales, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(kind, scales=scales)


def test_a_source_that_is_nowhere_is_named():
    with pytest.raises(FileNotFoundError, match=r"No scales found at 'missing\.safetensors'"):
        tiny_model(scales='missing.safetensors')


def test_a_killed_process_leaves_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / 'scales.safetensors'
    old, new = Scales.initial(TINY), random_scales()
    old.save(path)
    new.save(tmp_path / 'new.safetensors')
    code = (
        'import sys\nfrom repopt_timm import Scales\nnew = Scales.load(sys.argv[1])\nprint("ready", flush=True)\n'
        'while True: new.save(sys.argv[2])'
    )
    command = [sys.executable, '-c', code, str(tmp_path / 'new.safetensors'), str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        time.sleep(0.2)
        os.kill(process.pid, signal.SIGKILL)
    assert Scales.load(path) in (old, new)
