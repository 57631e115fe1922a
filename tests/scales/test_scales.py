import argparse
import os
import signal
import subprocess
import sys
import time
from collections import OrderedDict

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel

from repopt_timm import Scales, hyper_search, load_scales, save_scales_card
from repopt_timm.reparam import Geometry
from repopt_timm.scales import read_scale_file
from repopt_timm.scales.scale_files import checkpoint_entry

from ..helpers import TINY, random_scales, tiny_model


def changed(scales, module='stem.conv', **vectors):
    modules = {name: dict(scales[name]) for name in scales}
    modules[module].update({name.removeprefix('_'): vector for name, vector in vectors.items()})
    return Scales(scales.architecture, modules, scales.geometry)


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


def test_scales_equal_to_the_last_bit_have_one_fingerprint():
    scales = random_scales()
    modules = {name: scales[name] for name in reversed(list(scales))}
    same = Scales(TINY, modules, scales.geometry, provenance={'seed': 7})
    assert same == scales
    assert hash(same) == hash(scales)
    nudged = scales['stem.conv']['kxk'].clone()
    nudged[0] = torch.nextafter(nudged[0], torch.tensor(9.0))
    assert changed(scales, kxk=nudged) != scales
    assert initial(strides=(2, 2, 2, 1, 2)) != initial()
    assert scales.renamed('other') != scales
    counted = Scales(TINY, scales, scales.geometry, {'stem.conv': {'kxk': 2}})
    assert counted != scales


def test_scales_cannot_be_changed():
    scales = random_scales()
    before = scales.fingerprint
    scales['stem.conv']['kxk'].zero_()
    scales.provenance['seed'] = 1
    assert scales['stem.conv']['kxk'].any()
    assert scales.provenance == {}
    with pytest.raises(TypeError):
        scales['stem.conv'] = {}
    assert Scales(TINY, scales, scales.geometry).fingerprint == before


def test_a_file_gives_back_every_bit_and_the_provenance(tmp_path):
    scales = random_scales(strides=(1, 1, 2, 2, 2)).with_provenance({'dataset': 'digits', 'seed': 3})
    scales.save(tmp_path / 'scales.safetensors')
    loaded = read_scale_file(tmp_path / 'scales.safetensors')
    assert loaded == scales
    assert loaded.provenance == {'dataset': 'digits', 'seed': 3}
    assert loaded.geometry['stem.conv'].stride == (1, 1)
    assert loaded.counts == scales.counts
    assert list(loaded) == list(scales)


def test_modules_come_in_the_order_of_the_network(tmp_path):
    model = timm.create_model('repopt_vgg_b1', device='meta')
    Scales.initial(model).save(tmp_path / 'b1.safetensors')
    order = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Conv2d)]
    assert list(read_scale_file(tmp_path / 'b1.safetensors')) == order
    torch.save(reference_keys(Scales.initial(model)), tmp_path / 'b1.pth')
    assert list(read_scale_file(tmp_path / 'b1.pth')) == order


def test_counts_survive_file_card_and_checkpoint(tmp_path):
    plain = tiny_model()
    search = hyper_search(plain, {'stem.conv': {'kxk': 3, '1x1': 1}, 'stages.1.1.conv': ['1x3', 'identity']})
    scales = Scales.from_model(search)
    assert scales.counts == {'stem.conv': {'1x1': 1, 'kxk': 3}, 'stages.1.1.conv': {'1x3': 1, 'identity': 1}}
    scales.save(tmp_path / 'scales.safetensors')
    save_scales_card(scales, tmp_path / 'card')
    torch.save({'state_dict': search.state_dict(), 'arch': f'{TINY}_hs'}, tmp_path / 'last.pth.tar')
    assert load_scales(tmp_path / 'scales.safetensors') == load_scales(tmp_path / 'card') == scales
    assert load_scales(tmp_path / 'last.pth.tar').counts == scales.counts


@pytest.mark.parametrize(
    ('scales', 'message'),
    [
        (lambda: Scales.initial(nn.Sequential(nn.Conv2d(4, 4, 3, 2, 1))), "searched with '0' of .*stride 2x2"),
        (lambda: Scales('', {'0': {'kxk': torch.ones(4)}}), r"expected \['1x1', 'kxk'\]"),
        (lambda: Scales('', {'1': {'kxk': torch.ones(4)}}), "module '0' of Sequential has no scales"),
    ],
    ids=['stride', 'branch', 'module'],
)
def test_scales_fit_a_twin_as_they_fit_its_plain_network(scales, message):
    twin = hyper_search(nn.Sequential(nn.Conv2d(4, 4, 3, 1, 1)), {'0': ['kxk', '1x1']})
    with pytest.raises(ValueError, match=message):
        scales().for_model(twin)


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
    plain = tiny_model()
    assert load_scales(tmp_path / 'last.pth.tar', plain) == Scales.from_model(model)
    save_file(model.state_dict(), tmp_path / 'model.safetensors')
    assert load_scales(tmp_path / 'model.safetensors', plain) == Scales.from_model(model)


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
    with pytest.raises(ValueError, match=r"'stem\.conv' of .*stride 1x1.* but the model has .*stride 2x2"):
        tiny_model(scales=tmp_path / 'last.pth.tar')


def test_vectors_are_judged_as_float32():
    with pytest.raises(ValueError, match="'kxk' is inf"):
        changed(random_scales(), kxk=torch.full((16,), 1e300, dtype=torch.float64))


@pytest.mark.parametrize('kind', ['_hs', '_csla'])
def test_a_sharded_search_has_the_same_scales(kind, shard):
    model = tiny_model(kind, scales=random_scales())
    scales = Scales.from_model(model)
    assert Scales.from_model(shard(model)) == scales


@pytest.mark.parametrize('wrap', [AveragedModel, ModelEmaV2, ModelEmaV3, nn.DataParallel])
def test_a_wrapped_search_has_the_same_scales(wrap):
    model = tiny_model('_hs')
    assert Scales.from_model(wrap(model)) == Scales.from_model(torch.compile(wrap(model))) == Scales.from_model(model)


def sketch_keys(scales):
    """The layout of the method's published sketch: scales named after kernels, beside the rest of a block."""
    names = {'kxk': 'scale3x3.weight', '1x1': 'scale1x1.weight', 'identity': 'scale_identity.weight'}
    state = {}
    for module, vectors in scales.items():
        block = module.removesuffix('.conv')
        state |= {f'{block}.{names[branch]}': vector for branch, vector in vectors.items()}
        state |= {f'{block}.conv3x3.weight': torch.ones(2, 2, 3, 3), f'{block}.conv1x1.weight': torch.ones(2, 2, 1, 1)}
    return {**state, 'fc.weight': torch.ones(3, 4)}


@pytest.mark.parametrize('keys', [reference_keys, sketch_keys])
@pytest.mark.parametrize('nest', [dict, lambda state: {'model': state}, lambda state: {'state_dict': state}])
def test_published_layouts_are_read_by_name(tmp_path, keys, nest):
    scales = random_scales()
    torch.save(nest(keys(scales)), tmp_path / 'published.pth')
    assert load_scales(tmp_path / 'published.pth', tiny_model()) == scales


@pytest.mark.parametrize('architecture', ['repopt_vgg_b1', 'repopt_vgg_l2'])
def test_the_network_of_a_published_file_is_found_by_its_widths(tmp_path, architecture):
    torch.save(reference_keys(initial(architecture)), tmp_path / 'RepOpt-VGG-scales.pth')
    assert read_scale_file(tmp_path / 'RepOpt-VGG-scales.pth').architecture == architecture


def test_the_network_that_is_asked_for_settles_what_shapes_cannot(tmp_path):
    torch.save(reference_keys(initial('repopt_vgg_d2se')), tmp_path / 'se.pth')
    assert read_scale_file(tmp_path / 'se.pth').architecture == 'repopt_vgg_l2'
    model = timm.create_model('repopt_vgg_d2se', device='meta')
    assert load_scales(tmp_path / 'se.pth', model).architecture == 'repopt_vgg_d2se'


def test_initial_scales_are_those_that_a_search_starts_from():
    assert initial() == Scales.from_model(tiny_model('_hs'))
    assert 'not searched' in initial().provenance['method']
    assert initial('repopt_vgg_b1')['stages.2.8.conv']['1x1'][0] == pytest.approx((2 / 8) ** 0.5)


@pytest.mark.parametrize(
    ('vectors', 'message'),
    [
        ({'kxk': torch.ones(15)}, r"'stem.conv': the scale of branch 'kxk' has shape \(15,\), expected \(16,\)"),
        ({'kxk': torch.full((16,), float('nan'))}, "branch 'kxk' is nan at channel 0"),
        (
            {'kxk': torch.full((16,), float('inf'))},
            "'kxk' is inf at channel 0, expected a finite number. Take the scales of an",
        ),
        ({'kxk': torch.full((16,), float('nan')).to(torch.float8_e4m3fn)}, "branch 'kxk' is nan at channel 0"),
        ({'kxk': torch.ones(16, dtype=torch.complex64)}, "branch 'kxk' has complex numbers"),
        ({'kxk': torch.zeros(16)}, 'all zeros'),
        ({'identity': torch.ones(16)}, "'stem.conv': an identity branch needs stride 1"),
        ({'5x5': torch.ones(16)}, "'stem.conv': A 5x5 branch does not fit"),
    ],
)
def test_wrong_vectors_are_refused(vectors, message):
    with pytest.raises(ValueError, match=message):
        changed(random_scales(), **vectors)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'modules': {'0': {'kxk': torch.ones(8), '1x1': torch.ones(4)}}}, r"'1x1' has shape \(4,\), expected \(8,\)"),
        ({'counts': {'0': ['kxk']}}, "the counts of '0' are .*expected {branch: count}"),
        ({'provenance': {'lr': torch.ones(1)}}, 'the provenance cannot be stored'),
        (
            {'geometry': {'0': Geometry(4, 8, (3, 3), (1, 1), 1)}, 'modules': {'0': {'identity': torch.ones(8)}}},
            'as many input as output channels',
        ),
    ],
)
def test_what_does_not_make_scales_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Scales(**{'architecture': '', 'modules': {'0': {'kxk': torch.ones(8)}}, **arguments})


def test_an_identity_may_have_learned_nothing():
    assert not Scales('', {'0': {'identity': torch.zeros(4), 'kxk': torch.ones(4)}})['0']['identity'].any()


def test_a_missing_or_left_over_block_is_named_with_its_file(tmp_path):
    state = tiny_model('_hs').state_dict()
    short = {key: value for key, value in state.items() if not key.startswith('stages.3')}
    torch.save({'state_dict': short, 'arch': TINY + '_hs'}, tmp_path / 'short.pth.tar')
    with pytest.raises(
        ValueError, match=r"short\.pth\.tar: module 'stages\.3\.0\.conv' of test_repopt_vgg has no scales"
    ):
        tiny_model(scales=tmp_path / 'short.pth.tar')
    extra = {**state, 'stages.4.0.conv.branches.kxk.scale': torch.ones(8)}
    torch.save({'state_dict': extra, 'arch': TINY + '_hs'}, tmp_path / 'long.pth.tar')
    with pytest.raises(ValueError, match=r"long\.pth\.tar: there are scales for a convolution 'stages\.4\.0\.conv'"):
        tiny_model(scales=tmp_path / 'long.pth.tar')
    bare = {key: value for key, value in state.items() if 'stem.conv.branches.1x1' not in key}
    torch.save(bare, tmp_path / 'bare.pth')
    with pytest.raises(ValueError, match=r"'stem\.conv' has scales for the branches \['kxk'\], expected"):
        tiny_model(scales=tmp_path / 'bare.pth')


def test_a_checkpoint_without_scales_is_refused(tmp_path):
    torch.save(tiny_model().state_dict(), tmp_path / 'plain.pth')
    with pytest.raises(ValueError, match=r'plain\.pth: no scales in it'):
        read_scale_file(tmp_path / 'plain.pth')


def test_a_damaged_file_does_not_match_its_fingerprint(tmp_path):
    path = tmp_path / 'scales.safetensors'
    random_scales().save(path)
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match='do not match their fingerprint'):
        read_scale_file(path)


@pytest.mark.parametrize(
    ('scales', 'message'),
    [
        (initial('repopt_vgg_a0'), 'are scales of repopt_vgg_a0, but the model is a test_repopt_vgg'),
        (
            initial(strides=(2, 2, 2, 2, 1)),
            r"searched with 'stages\.3\.0\.conv' of .*stride 1x1, groups 1, but the model has .*stride 2x2",
        ),
    ],
)
@pytest.mark.parametrize('kind', ['', '_csla', '_hs'])
def test_scales_of_another_network_are_refused(kind, scales, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(kind, scales=scales)


@pytest.mark.parametrize('kwargs', [{'output_stride': 8}, {'output_stride': 2}, {'in_chans': 1}, {'num_classes': 3}])
@pytest.mark.parametrize('kind', ['', '_csla', '_hs'])
def test_dilation_and_image_channels_do_not_count(kind, kwargs):
    scales = random_scales()
    assert tiny_model(kind, scales=scales, **kwargs).scales == scales


def test_scales_given_by_position_are_refused():
    with pytest.raises(ValueError, match=r'is a list, expected a file.*never by position'):
        tiny_model(scales=[(torch.ones(16), torch.ones(16))])


def test_a_source_that_is_nowhere_is_named():
    with pytest.raises(FileNotFoundError, match=r"No scales found at 'missing\.safetensors'"):
        tiny_model(scales='missing.safetensors')


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


@pytest.mark.parametrize(
    ('key', 'text'),
    [('modules', '[' * 100_000), ('provenance', '{'), ('version', 'abc'), ('version', '9' * 5000), ('counts', '3')],
    ids=lambda value: value[:9],
)
def test_a_damaged_header_is_named_with_its_file(tmp_path, key, text):
    path = tmp_path / 'scales.safetensors'
    random_scales().save(path)
    with safe_open(path, 'pt') as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    save_file(tensors, path, {**metadata, key: text})
    with pytest.raises(ValueError, match=r'scales\.safetensors: .* damaged'):
        read_scale_file(path)
    save_file({**tensors, 'one': torch.ones(1)}, path, metadata)
    with pytest.raises(ValueError, match=r"scales\.safetensors: .*does not list the module ''"):
        read_scale_file(path)
