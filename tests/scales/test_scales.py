import pytest
import timm
import torch
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel

from repopt_timm import Scales, hyper_search
from repopt_timm.reparam import Geometry

from ..helpers import TINY, random_scales, tiny_model


def changed(scales, module='stem.conv', **vectors):
    modules = {name: dict(scales[name]) for name in scales}
    modules[module].update({name.removeprefix('_'): vector for name, vector in vectors.items()})
    return Scales(scales.architecture, modules, scales.geometry)


def initial(architecture=TINY, **kwargs):
    return Scales.initial(timm.create_model(architecture, device='meta', **kwargs))


def test_scales_equal_to_the_last_bit_have_one_fingerprint():
    scales = random_scales()
    same = Scales(
        TINY, {name: scales[name] for name in reversed(list(scales))}, scales.geometry, provenance={'seed': 7}
    )
    assert same == scales
    assert hash(same) == hash(scales)
    nudged = scales['stem.conv']['kxk']
    nudged[0] = torch.nextafter(nudged[0], torch.tensor(9.0))
    others = [
        changed(scales, kxk=nudged),
        scales.renamed('other'),
        Scales(TINY, scales, scales.geometry, {'stem.conv': {'kxk': 2}}),
    ]
    assert scales not in others
    assert initial(strides=(2, 2, 2, 1, 2)) != initial()


def test_scales_cannot_be_changed():
    scales = random_scales()
    before = scales.fingerprint
    scales['stem.conv']['kxk'].zero_()
    scales.provenance['seed'] = 1
    assert scales.provenance == {}
    with pytest.raises(TypeError):
        scales['stem.conv'] = {}
    assert Scales(TINY, scales, scales.geometry).fingerprint == before


@pytest.mark.parametrize(
    ('scales', 'message'),
    [
        (lambda: Scales.initial(nn.Sequential(nn.Conv2d(4, 4, 3, 2, 1))), "'0'.*stride 2x2"),
        (lambda: Scales('', {'0': {'kxk': torch.ones(4)}}), "'0'.*1x1"),
        (lambda: Scales('', {'1': {'kxk': torch.ones(4)}}), "'[01]'"),
    ],
    ids=['stride', 'branch', 'module'],
)
def test_scales_fit_a_twin_as_they_fit_its_plain_network(scales, message):
    twin = hyper_search(nn.Sequential(nn.Conv2d(4, 4, 3, 1, 1)), {'0': ['kxk', '1x1']})
    with pytest.raises(ValueError, match=message):
        scales().for_model(twin)


@pytest.mark.parametrize('kind', ['_hs', '_csla'])
def test_a_sharded_search_has_the_same_scales(kind, shard):
    model = tiny_model(kind, scales=random_scales())
    scales = Scales.from_model(model)
    assert Scales.from_model(shard(model)) == scales


@pytest.mark.parametrize('wrap', [AveragedModel, ModelEmaV2, ModelEmaV3, nn.DataParallel])
def test_a_wrapped_search_has_the_same_scales(wrap):
    model = tiny_model('_hs')
    assert Scales.from_model(wrap(model)) == Scales.from_model(torch.compile(wrap(model))) == Scales.from_model(model)


def test_initial_scales_are_those_that_a_search_starts_from():
    assert initial() == Scales.from_model(tiny_model('_hs'))
    assert 'not searched' in initial().provenance['method']
    assert initial('repopt_vgg_b1')['stages.2.8.conv']['1x1'][0] == pytest.approx((2 / 8) ** 0.5)


@pytest.mark.parametrize(
    'vectors',
    [
        {'kxk': torch.ones(15)},
        {'kxk': torch.full((16,), float('nan'))},
        {'kxk': torch.full((16,), 1e300, dtype=torch.float64)},
        {'kxk': torch.full((16,), float('nan')).to(torch.float8_e4m3fn)},
        {'kxk': torch.ones(16, dtype=torch.complex64)},
        {'kxk': torch.zeros(16)},
        {'identity': torch.ones(16)},
        {'5x5': torch.ones(16)},
    ],
    ids=['length', 'nan', 'infinite in float32', 'float8', 'complex', 'zeros', 'identity at stride 2', 'window'],
)
def test_wrong_vectors_are_refused_with_the_name_of_their_convolution(vectors):
    with pytest.raises(ValueError, match=r"'stem\.conv'"):
        changed(random_scales(), **vectors)


@pytest.mark.parametrize(
    'arguments',
    [
        {'modules': {}},
        {'modules': {'0': {'kxk': torch.ones(8), '1x1': torch.ones(4)}}},
        {'counts': {'0': {'1x1': 2}}},
        {'geometry': {'0': Geometry(4, 8, (3, 3), (1, 1), 1)}, 'modules': {'0': {'identity': torch.ones(8)}}},
    ],
)
def test_what_does_not_make_scales_is_refused(arguments):
    with pytest.raises(ValueError):
        Scales(**{'architecture': '', 'modules': {'0': {'kxk': torch.ones(8)}}, **arguments})


def test_an_identity_may_have_learned_nothing():
    assert not Scales('', {'0': {'identity': torch.zeros(4), 'kxk': torch.ones(4)}})['0']['identity'].any()


@pytest.mark.parametrize('kind', ['', '_csla', '_hs'])
def test_scales_of_another_network_are_refused(kind):
    with pytest.raises(ValueError, match='repopt_vgg_a0.*test_repopt_vgg'):
        tiny_model(kind, scales=initial('repopt_vgg_a0'))
    with pytest.raises(ValueError, match=r"'stages\.3\.0\.conv'.*stride 1x1.*stride 2x2"):
        tiny_model(kind, scales=initial(strides=(2, 2, 2, 2, 1)))


@pytest.mark.parametrize('kwargs', [{'output_stride': 8}, {'output_stride': 2}, {'in_chans': 1}, {'num_classes': 3}])
@pytest.mark.parametrize('kind', ['', '_csla', '_hs'])
def test_dilation_and_image_channels_do_not_count(kind, kwargs):
    scales = random_scales()
    assert tiny_model(kind, scales=scales, **kwargs).scales == scales
