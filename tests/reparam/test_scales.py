import copy
import json
import os
import pickle

import pytest
import timm
import torch
from safetensors.torch import load, save
from timm.utils import ModelEmaV3
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.optim.swa_utils import AveragedModel

from repopt_timm import Scales, csla, hyper_search, make_grad_mults, prepare, to_plain
from repopt_timm.reparam import Geometry

from ..helpers import TINY, random_scales, tiny_model

ONES = {'0': {'kxk': torch.ones(4)}}


def initial(architecture=TINY, **kwargs):
    return Scales.initial(timm.create_model(architecture, device='meta', **kwargs))


def test_scales_equal_to_the_last_bit_have_one_fingerprint():
    scales = random_scales()
    same = Scales(
        TINY, {name: scales[name] for name in reversed(list(scales))}, scales.geometry, provenance={'seed': 7}
    )
    assert same == scales
    assert hash(same) == hash(scales)
    nudged = dict(scales)
    nudged['stem.conv']['kxk'][0] = torch.nextafter(nudged['stem.conv']['kxk'][0], torch.tensor(9.0))
    others = [
        Scales(TINY, nudged, scales.geometry),
        scales.renamed('other'),
        scales.with_start('identity'),
        Scales(TINY, scales),
        Scales(TINY, scales, scales.geometry, {'stem.conv': {'kxk': 2}}),
    ]
    assert len({scales, *others}) == 6
    assert initial(strides=(2, 2, 2, 1, 2)) != initial()


def test_the_fingerprint_is_the_one_that_cards_and_checkpoints_state():
    scales = Scales('net', {'0': {'kxk': torch.tensor([0.5, -2.0])}}, {'0': Geometry(None, 2, (3, 3), (1, 1), 1)})
    assert scales.fingerprint == '301e7b7818a207d24e1f77c203ef113de69b00729ac6b637508ab183ea8984a9'


def test_scales_cannot_be_changed():
    vectors = {'0': {'kxk': torch.ones(4)}}
    scales = Scales('', vectors, provenance={'seed': 0})
    before = Scales('', ONES)
    vectors['0']['kxk'].zero_()
    scales['0']['kxk'].zero_()
    scales.provenance['seed'] = 1
    scales.counts['0']['kxk'] = 2
    assert Scales('', scales, scales.geometry, scales.counts) == before
    assert scales.provenance == {'seed': 0}
    assert copy.deepcopy(scales) == pickle.loads(pickle.dumps(scales)) == scales


def test_scales_keep_their_provenance_on_a_model_and_a_search_starts_without_one():
    scales = random_scales().with_provenance({'dataset': 'digits'})
    plain = tiny_model()
    prepare(plain, scales)
    twin = csla(plain)
    features = tiny_model('_csla', scales=scales, features_only=True)
    part = torch.nn.ModuleDict({'backbone': tiny_model('_csla', scales=scales)})
    for model in (plain, twin, to_plain(twin), tiny_model(scales=scales), features, part, to_plain(part)):
        assert Scales.from_model(model).provenance == {'dataset': 'digits'}
    for search in (hyper_search(plain), tiny_model('_hs', scales=scales)):
        assert Scales.from_model(search).provenance == {}


def test_twins_keep_the_start_and_one_network_has_one():
    scales = random_scales()
    other = scales.with_start('identity')
    for kind in ('_csla', '_hs'):
        twin = tiny_model(kind, scales=other)
        assert Scales.from_model(twin).start == Scales.from_model(to_plain(twin)).start == 'identity'
        # Its tensors do not state it.
        twin.load_state_dict(tiny_model(kind, scales=scales).state_dict())
        assert Scales.from_model(twin).start == 'identity'
    with pytest.raises(ValueError, match='zero'):
        scales.with_start('zero')
    with pytest.raises(ValueError, match='identity and paper'):
        Scales.from_model(torch.nn.ModuleList(tiny_model(scales=each) for each in (scales, other)))


def damaged(**metadata):
    data = random_scales().to_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], 'little')])['__metadata__']
    return save(load(data), {**header, **metadata})


@pytest.mark.parametrize(
    'data',
    [
        b'not a file of scales',
        save({'0.kxk': torch.ones(4)}),
        random_scales().to_bytes()[:-1] + b'\0',
        random_scales().to_bytes()[:-4],
        damaged(modules='[' * 100_000),
        damaged(modules='[]'),
        damaged(provenance='{'),
        damaged(version='3'),
        damaged(counts='3'),
        damaged(geometry='{"stem.conv": "large"}'),
    ],
    ids=range(10),
)
def test_damaged_bytes_are_refused_with_their_source(data):
    with pytest.raises(ValueError, match=r'^scales\.safetensors: '):
        Scales.from_bytes(data, 'scales.safetensors')


def test_a_file_is_replaced_and_never_half_written(tmp_path):
    old, new, path = initial(), random_scales(), tmp_path / 'scales.safetensors'
    old.save(path)
    os.link(path, tmp_path / 'link')
    new.save(path)
    assert Scales.from_bytes(path.read_bytes(), '') == new
    assert Scales.from_bytes((tmp_path / 'link').read_bytes(), '') == old


@pytest.mark.parametrize(
    ('arguments', 'thing'),
    [
        *(
            ({'modules': {'0': {'kxk': torch.ones(8), **vectors}}}, f"'0'.*{thing}")
            for vectors, thing in [
                ({'kxk': torch.ones(7)}, '7'),
                ({'kxk': torch.full((8,), float('nan'))}, 'nan at channel 0'),
                ({'kxk': torch.full((8,), 1e300, dtype=torch.float64)}, 'inf'),
                ({'kxk': torch.ones(8, dtype=torch.complex64)}, 'complex'),
                ({'kxk': torch.ones(8, 1)}, r'\(8, 1\)'),
                ({'kxk': torch.zeros(8)}, 'zeros'),
                ({'identity': torch.ones(8)}, 'identity'),
                ({'5x5': torch.ones(8)}, '5x5'),
            ]
        ),
        ({'modules': {}}, 'no scales'),
        ({'modules': {'0': {}}}, "'0'"),
        ({'geometry': {}, 'modules': {'0': {'kxk': torch.ones(8), '1x1': torch.ones(4)}}}, '4'),
        ({'geometry': {}, 'modules': {'0': {'kxk': torch.tensor(1.0)}}}, r'\(\)'),
        ({'counts': {'1': {'kxk': 1}}}, "'1'"),
        ({'counts': {'0': {'1x1': 1}}}, "'1x1'"),
        ({'counts': {'0': {'kxk': 1.5}}}, '1.5'),
        ({'geometry': {'1': Geometry(4, 8, (3, 3), (1, 1), 1)}}, "'0'"),
    ],
)
def test_what_does_not_make_scales_is_refused(arguments, thing):
    geometry = {'0': Geometry(4, 8, (3, 3), (1, 1), 1)}
    with pytest.raises(ValueError, match=thing):
        Scales(**{'architecture': '', 'modules': {'0': {'kxk': torch.ones(8)}}, 'geometry': geometry, **arguments})


def test_a_provenance_is_json():
    with pytest.raises(TypeError):
        Scales('', {'0': {'kxk': torch.ones(8)}}, provenance={'lr': torch.ones(1)})


def test_an_identity_may_have_learned_nothing():
    assert not Scales('', {'0': {'identity': torch.zeros(4), 'kxk': torch.ones(4)}})['0']['identity'].any()


def test_initial_scales_are_those_that_a_search_starts_from():
    assert initial() == Scales.from_model(tiny_model('_hs'))


@pytest.mark.parametrize('wrap', [AveragedModel, ModelEmaV3, nn.DataParallel])
def test_a_wrapped_search_has_the_same_scales(wrap):
    model = tiny_model('_hs')
    assert Scales.from_model(wrap(model)) == Scales.from_model(torch.compile(wrap(model))) == Scales.from_model(model)


@pytest.mark.parametrize('kind', ['_hs', '_csla'])
def test_a_sharded_search_has_the_same_scales(kind, shard):
    model = tiny_model(kind, scales=random_scales())
    scales = Scales.from_model(model)
    assert Scales.from_model(shard(model)) == scales


class Network(nn.Sequential):
    """A network that timm does not know."""


@pytest.mark.parametrize('wrapped', ['sharded', 'checkpointed', 'within'])
def test_a_wrapped_network_of_ones_own_keeps_its_names(wrapped, shard):
    model = Network(nn.Conv2d(4, 4, 3, 1, 1), nn.Conv2d(4, 4, 3, 1, 1))
    scales = Scales.initial(model)
    if wrapped == 'sharded':
        shard(model)
    elif wrapped == 'within':
        model = checkpoint_wrapper(model)
    else:
        apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, nn.Conv2d))
    assert Scales.initial(model) == scales == Scales.from_model(prepare(model, scales, init=False))
    assert len(make_grad_mults(model)) == 2


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


@pytest.mark.parametrize('use', [prepare, csla, make_grad_mults])
@pytest.mark.parametrize('scales', ['initial', {'0': {'identity': torch.ones(4), 'kxk': torch.ones(4)}}])
def test_a_name_and_an_identity_of_other_channels_are_no_scales_of_a_network(use, scales):
    with pytest.raises(ValueError, match=r"'initial'|'0'"):
        use(nn.Sequential(nn.Conv2d(2, 4, 3, 1, 1)), scales)


@pytest.mark.parametrize(
    'scales',
    [
        lambda: Scales('', ONES),
        lambda: Scales('', {'0': {'kxk': torch.ones(4), '1x1': torch.ones(4)}}, counts={'0': {'kxk': 2}}),
    ],
    ids=['branch', 'count'],
)
def test_scales_fit_a_twin_as_they_fit_its_plain_network(scales):
    twin = hyper_search(nn.Sequential(nn.Conv2d(4, 4, 3, 1, 1)), {'0': ['kxk', '1x1']})
    with pytest.raises(ValueError, match="'0'"):
        scales().for_model(twin)


def test_fitting_scales_take_name_geometry_and_order_of_the_model():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1))
    scales = Scales('', {'1': {'kxk': torch.ones(4)}, **ONES}).for_model(model)
    assert scales.architecture == 'Sequential'
    assert list(scales) == list(scales.geometry) == ['0', '1']
    assert scales.for_model(nn.DataParallel(model)) is scales
