import ast
import copy
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load, save
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel

import repopt_timm
from repopt_timm import Scales, hyper_search
from repopt_timm.reparam import Geometry

from ..helpers import TINY, random_scales, tiny_model

ONES = {'0': {'kxk': torch.ones(4)}}


def initial(architecture=TINY, **kwargs):
    return Scales.initial(timm.create_model(architecture, device='meta', **kwargs))


def changed(scales, module='stem.conv', **vectors):
    modules = {name: dict(scales[name]) for name in scales}
    modules[module].update({name.removeprefix('_'): vector for name, vector in vectors.items()})
    return Scales(scales.architecture, modules, scales.geometry)


def test_the_method_depends_on_torch_alone():
    for path in (Path(repopt_timm.__file__).parent / 'reparam').glob('*.py'):
        for node in ast.parse(path.read_text(encoding='utf-8')).body:
            if isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, 'level', 0):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                assert all(name.split('.')[0] in {'torch', *sys.stdlib_module_names} for name in names), path


def test_scales_equal_to_the_last_bit_have_one_fingerprint():
    scales = random_scales()
    modules = {name: scales[name] for name in reversed(list(scales))}
    same = Scales(TINY, modules, scales.geometry, provenance={'seed': 7})
    assert same == scales
    assert hash(same) == hash(scales)
    nudged = scales['stem.conv']['kxk'].clone()
    nudged[0] = torch.nextafter(nudged[0], torch.tensor(9.0))
    others = [
        changed(scales, kxk=nudged),
        scales.renamed('other'),
        Scales(TINY, scales),
        Scales(TINY, scales, scales.geometry, {'stem.conv': {'kxk': 2}}),
    ]
    assert len({scales, *others}) == 5
    assert initial(strides=(2, 2, 2, 1, 2)) != initial()


def test_the_fingerprint_is_the_one_that_cards_and_checkpoints_state():
    scales = Scales('net', {'0': {'kxk': torch.tensor([0.5, -2.0])}}, {'0': Geometry(None, 2, (3, 3), (1, 1), 1)})
    assert scales.fingerprint == '301e7b7818a207d24e1f77c203ef113de69b00729ac6b637508ab183ea8984a9'


def test_scales_cannot_be_changed():
    scales = random_scales()
    before = scales.fingerprint
    scales['stem.conv']['kxk'].zero_()
    scales.provenance['seed'] = 1
    scales.counts['stem.conv']['kxk'] = 2
    given = {'0': {'kxk': torch.ones(4)}}
    made = Scales('', given)
    given['0']['kxk'].zero_()
    assert made['0']['kxk'].all()
    assert Scales(TINY, scales, scales.geometry, scales.counts, scales.provenance).fingerprint == before
    assert copy.deepcopy(scales) == pickle.loads(pickle.dumps(scales)) == scales


def test_another_start_makes_other_scales_and_twins_keep_it():
    scales = random_scales()
    other = scales.with_start('identity')
    assert other != scales == other.with_start('paper')
    for kind in ('_csla', '_hs'):
        twin = tiny_model(kind, scales=other)
        assert Scales.from_model(twin).start == Scales.from_model(twin.to_plain()).start == 'identity'
    with pytest.raises(ValueError, match='zero'):
        scales.with_start('zero')
    with pytest.raises(ValueError, match='identity and paper'):
        Scales.from_model(torch.nn.ModuleList(tiny_model(scales=each) for each in (scales, other)))
    old = pickle.loads(pickle.dumps(scales))
    del vars(old)['_start']
    assert old.start == 'paper'


def test_bytes_and_files_give_back_every_bit_count_and_the_provenance(tmp_path):
    search = hyper_search(tiny_model(), {'stem.conv': {'kxk': 3, '1x1': 1}, 'stages.1.1.conv': ['kxk', 'identity']})
    scales = Scales.from_model(search, {'dataset': 'digits', 'seed': 3})
    scales.save(tmp_path / 'scales.safetensors')
    loaded = Scales.from_bytes((tmp_path / 'scales.safetensors').read_bytes(), 'here')
    assert loaded == scales
    assert (loaded.source, loaded.provenance) == ('here', {'dataset': 'digits', 'seed': 3})
    assert loaded.counts == {'stem.conv': {'1x1': 1, 'kxk': 3}, 'stages.1.1.conv': {'identity': 1, 'kxk': 1}}
    assert list(loaded) == list(scales)
    with pytest.raises(ValueError, match=r'scales\.pth'):
        scales.save(tmp_path / 'scales.pth')


def damaged(**metadata):
    data = random_scales().to_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], 'little')])['__metadata__']
    return save(load(data), {**header, **metadata})


def flipped(data):
    content = bytearray(data)
    content[-2] ^= 1
    return bytes(content)


@pytest.mark.parametrize(
    'data',
    [
        b'',
        b'not a file of scales',
        save({'0.kxk': torch.ones(4)}),
        flipped(random_scales().to_bytes()),
        random_scales().to_bytes()[:-4],
        damaged(modules='[' * 100_000),
        damaged(modules='[]'),
        damaged(provenance='{'),
        damaged(version='9' * 5000),
        damaged(version='3'),
        damaged(counts='3'),
        damaged(geometry='{"stem.conv": "large"}'),
        damaged(fingerprint='0' * 64),
    ],
    ids=range(13),
)
def test_damaged_bytes_are_refused_with_their_source(data):
    with pytest.raises(ValueError, match=r'^scales\.safetensors: '):
        Scales.from_bytes(data, 'scales.safetensors')


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
    assert Scales.from_bytes(path.read_bytes(), '') in (old, new)


@pytest.mark.parametrize(
    ('vectors', 'thing'),
    [
        ({'kxk': torch.ones(15)}, '15'),
        ({'kxk': torch.full((16,), float('nan'))}, 'nan at channel 0'),
        ({'kxk': torch.full((16,), 1e300, dtype=torch.float64)}, 'inf'),
        ({'kxk': torch.ones(16, dtype=torch.complex64)}, 'complex'),
        ({'kxk': torch.ones(16, 1)}, r'\(16, 1\)'),
        ({'kxk': torch.zeros(16)}, 'zeros'),
        ({'identity': torch.ones(16)}, 'identity'),
        ({'5x5': torch.ones(16)}, '5x5'),
    ],
)
def test_wrong_vectors_are_refused_with_their_module(vectors, thing):
    with pytest.raises(ValueError, match=rf"'stem\.conv'.*{thing}"):
        changed(random_scales(), **vectors)


@pytest.mark.parametrize(
    ('arguments', 'error'),
    [
        ({'modules': {}}, ValueError),
        ({'modules': {'0': {'kxk': torch.ones(8), '1x1': torch.ones(4)}}}, ValueError),
        ({'modules': {'0': {'kxk': torch.ones(8), 'avg': torch.ones(8)}}}, ValueError),
        ({'counts': {'1': {'kxk': 1}}}, ValueError),
        ({'counts': {'0': {'1x1': 1}}}, ValueError),
        ({'counts': {'0': {'kxk': 1.5}}}, ValueError),
        ({'geometry': {'1': Geometry(4, 8, (3, 3), (1, 1), 1)}}, ValueError),
        ({'provenance': {'lr': torch.ones(1)}}, TypeError),
    ],
)
def test_what_does_not_make_scales_is_refused(arguments, error):
    with pytest.raises(error):
        Scales(**{'architecture': '', 'modules': {'0': {'kxk': torch.ones(8)}}, **arguments})


def test_an_identity_may_have_learned_nothing():
    assert not Scales('', {'0': {'identity': torch.zeros(4), 'kxk': torch.ones(4)}})['0']['identity'].any()


def test_initial_scales_are_those_that_a_search_starts_from():
    assert initial() == Scales.from_model(tiny_model('_hs'))
    assert initial('repopt_vgg_b1')['stages.2.8.conv']['1x1'][0] == pytest.approx((2 / 8) ** 0.5)
    assert 'not searched' in initial().provenance['method']


@pytest.mark.parametrize('wrap', [AveragedModel, ModelEmaV2, ModelEmaV3, nn.DataParallel])
def test_a_wrapped_search_has_the_same_scales(wrap):
    model = tiny_model('_hs')
    assert Scales.from_model(wrap(model)) == Scales.from_model(torch.compile(wrap(model))) == Scales.from_model(model)


@pytest.mark.parametrize('kind', ['_hs', '_csla'])
def test_a_sharded_search_has_the_same_scales(kind, shard):
    model = tiny_model(kind, scales=random_scales())
    scales = Scales.from_model(model)
    assert Scales.from_model(shard(model)) == scales


@pytest.mark.parametrize('kwargs', [{'output_stride': 8}, {'output_stride': 2}, {'in_chans': 1}, {'num_classes': 3}])
@pytest.mark.parametrize('kind', ['', '_csla', '_hs'])
def test_dilation_and_image_channels_do_not_count(kind, kwargs):
    scales = random_scales()
    assert tiny_model(kind, scales=scales, **kwargs).scales == scales


@pytest.mark.parametrize(
    ('scales', 'thing'),
    [
        (lambda: initial('repopt_vgg_a0'), 'repopt_vgg_a0.*test_repopt_vgg'),
        (lambda: initial(strides=(2, 2, 2, 2, 1)), r"'stages\.3\.0\.conv'.*stride 1x1.*stride 2x2"),
        (lambda: Scales('', {**random_scales(), 'stem': {'kxk': torch.ones(16)}}), "'stem'"),
        (lambda: Scales('', {'stem.conv': random_scales()['stem.conv']}), r"'stages\.0\.0\.conv'.*has no scales"),
    ],
    ids=['network', 'stride', 'module', 'missing'],
)
@pytest.mark.parametrize('kind', ['', '_csla', '_hs'])
def test_scales_of_another_network_are_refused(kind, scales, thing):
    with pytest.raises(ValueError, match=thing):
        tiny_model(kind, scales=scales())


@pytest.mark.parametrize(
    'scales',
    [
        lambda: Scales.initial(nn.Sequential(nn.Conv2d(4, 4, 3, 2, 1))),
        lambda: Scales('', ONES),
        lambda: Scales('', {'1': {'kxk': torch.ones(4)}}),
        lambda: Scales('', {'0': {'kxk': torch.ones(4), '1x1': torch.ones(4)}}, counts={'0': {'kxk': 2}}),
    ],
    ids=['stride', 'branch', 'module', 'count'],
)
def test_scales_fit_a_twin_as_they_fit_its_plain_network(scales):
    twin = hyper_search(nn.Sequential(nn.Conv2d(4, 4, 3, 1, 1)), {'0': ['kxk', '1x1']})
    with pytest.raises(ValueError, match=r"'[01]'"):
        scales().for_model(twin)


def test_fitting_scales_take_name_geometry_and_order_of_the_model():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1))
    scales = Scales('', {'1': {'kxk': torch.ones(4)}, **ONES}).for_model(model)
    assert scales.architecture == 'Sequential'
    assert list(scales) == list(scales.geometry) == ['0', '1']
    assert scales.for_model(nn.DataParallel(model)) is scales
