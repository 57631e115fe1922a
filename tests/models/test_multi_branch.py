import copy
import pickle

import pytest
import timm
import torch
from repopt_timm.reparam.convolutions import multi_branch_blocks
from timm.utils import reparameterize_model
from torch import nn

from repopt_timm import Scales, plain_twin, register_twins, save_pretrained, to_plain
from repopt_timm.models.timm_twins import register_multi_branch
from repopt_timm.names import KINDS, MULTI_BRANCH
from repopt_timm.reparam import kind_of

_OTHERS = ('fastvit_t8', 'ghostnetv3_050', 'lcnetv2_small', 'repghostnet_050', 'repvit_m0_9')
SMALLEST = [
    'mobileone_s0',
    # Older versions of timm lack some.
    *(pytest.param(name, marks=pytest.mark.slow) for name in _OTHERS if timm.is_model(name)),
]
IMAGES = torch.randn(2, 3, 64, 64)
STRIDES = (1, 1, 2, 2, 2)


def twin(name, kind='', **kwargs):
    kwargs.setdefault('num_classes', 5)
    return timm.create_model(f'repopt_{name}{kind}', **kwargs)


def convs(model):
    found = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    return [(*conv.weight.shape, conv.stride, conv.padding, conv.groups, conv.bias is None) for conv in found]


def test_each_multi_branch_network_of_timm_has_all_kinds():
    names = [name for pattern in MULTI_BRANCH for name in timm.list_models(pattern)]
    assert 'mobileone_s4' in names
    assert all(timm.is_model(f'repopt_{name}{ending}') for name in names for ending in KINDS.values())


@pytest.mark.parametrize('name', SMALLEST)
def test_the_kinds_of_a_network_belong_together(name):
    scales = Scales.initial(twin(name))
    assert scales.architecture == name
    expected = plain_twin(timm.create_model(name, num_classes=5)).state_dict()
    timms_merged = sorted(convs(reparameterize_model(timm.create_model(name))))
    for kind in ('', '_hs', '_csla'):
        model = twin(name, kind, scales=scales).eval()
        assert kind_of(model) == {'': 'target'}.get(kind, kind[1:])
        assert Scales.from_model(model) == scales
        assert model.pretrained_cfg['architecture'] == f'repopt_{name}{kind}'
        assert torch.equal(pickle.loads(pickle.dumps(copy.deepcopy(model)))(IMAGES), model(IMAGES))
        plain = to_plain(model) if kind else model
        assert {key: each.shape for key, each in plain.state_dict().items()} == {
            key: each.shape for key, each in expected.items()
        }
        torch.testing.assert_close(plain(IMAGES), model(IMAGES), rtol=1e-3, atol=1e-4)
        merged = reparameterize_model(plain)
        assert sorted(convs(merged)) == timms_merged
        torch.testing.assert_close(merged(IMAGES), model(IMAGES), rtol=1e-3, atol=1e-4)
    if not name.startswith('ghostnetv3_'):
        # timm's own cannot be scripted either once it is merged.
        torch.jit.script(twin(name))


@pytest.mark.parametrize('name', SMALLEST)
@pytest.mark.parametrize('kind', KINDS.values())
def test_timms_arguments_work(name, kind):
    scales = {} if kind == '_branches' else {'scales': Scales.initial(twin(name))}
    model = twin(name, kind, in_chans=1, drop_rate=0.1, **scales).to(memory_format=torch.channels_last).eval()
    assert model(IMAGES[:, :1]).shape == (2, 5)
    features = twin(name, kind, features_only=True, **scales)
    theirs = timm.create_model(name, features_only=True)
    assert features.feature_info.channels() == theirs.feature_info.channels()
    assert [each.shape for each in features(IMAGES)] == [each.shape for each in theirs(IMAGES)]
    if name == 'mobileone_s0':
        dilated = twin(name, kind, output_stride=16, global_pool='max', **scales).eval()
        assert dilated.forward_features(IMAGES).shape[-2:] == (4, 4)


@pytest.mark.parametrize('strides', [(2, 2, 2, 2, 2), STRIDES])
def test_a_mobileone_and_its_branches_are_one_network_once_merged(strides):
    plain, branches = (twin('mobileone_s0', kind, strides=strides) for kind in ('', '_branches'))
    assert convs(reparameterize_model(branches)) == convs(reparameterize_model(plain))
    firsts = [plain.stem, *(stage[0] for stage in plain.stages)]
    assert tuple(block.conv.stride[0] for block in firsts) == strides
    for model in (plain, branches):
        assert [feature['reduction'] for feature in model.feature_info][-1] == (32 if strides[0] == 2 else 8)
    if strides == (2, 2, 2, 2, 2):
        assert convs(timm.create_model('mobileone_s0')) == convs(branches)


def test_reduced_strides_reach_features_scales_and_repositories(tmp_path):
    scales = Scales.initial(twin('mobileone_s0', strides=STRIDES))
    model = twin('mobileone_s0', strides=STRIDES, scales=scales).eval()
    save_pretrained(model, tmp_path / 'saved')
    assert "timm.create_model(\n    'repopt_mobileone_s0'" in (tmp_path / 'saved/README.md').read_text()
    loaded = timm.create_model(f'local-dir:{tmp_path / "saved"}', pretrained=True).eval()
    assert torch.equal(loaded(IMAGES), model(IMAGES))
    assert loaded.strides == STRIDES
    assert Scales.from_model(loaded) == scales
    assert twin('mobileone_s0', features_only=True, strides=STRIDES).feature_info.reduction() == [1, 2, 4, 8]
    with pytest.raises(ValueError, match='make the model alike'):
        twin('mobileone_s0', scales=scales)
    with pytest.raises(ValueError, match='expected 5 values of 1 or 2'):
        twin('mobileone_s0', strides=(1, 2))


def test_what_cannot_be_made_plain_or_take_scales_is_refused():
    with pytest.raises(ValueError, match='create the model with drop_path_rate=0'):
        twin('mobileone_s0', drop_path_rate=0.1)
    assert list(multi_branch_blocks(twin('mobileone_s0', '_branches', drop_path_rate=0.1)))
    with pytest.raises(ValueError, match='repopt_mobileone_s0_branches does not take scales'):
        twin('mobileone_s0', '_branches', scales='initial')


def test_weights_of_ones_own_are_adapted_to_channels_and_classes(tmp_path):
    for kind in ('', '_branches'):
        model = twin('mobileone_s0', kind)
        save_pretrained(model, tmp_path / kind)
        loaded = timm.create_model(f'local-dir:{tmp_path / kind}', pretrained=True, in_chans=1, num_classes=3).eval()
        assert loaded(IMAGES[:, :1]).shape == (2, 3)
        name = 'stem.conv' if not kind else 'stem.conv_kxk.0.conv'
        kernels = [each.get_submodule(name).weight for each in (loaded, model)]
        torch.testing.assert_close(kernels[0], kernels[1].sum(1, keepdim=True))


@pytest.mark.filterwarnings('ignore:Overwriting')
def test_registering_all_of_them_builds_no_network(monkeypatch):
    built = []
    monkeypatch.setattr(nn.Module, '__init__', lambda self, *args, **kwargs: built.append(type(self)))
    register_multi_branch()
    register_twins('resnet10t')
    assert timm.is_model('repopt_resnet10t_hs')
    assert not built
