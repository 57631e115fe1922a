"""What timm promises of a model, and what twins promise besides, for networks of all kinds."""

import copy
import functools
import json
import pickle

import pytest
import timm
import torch
from timm.data import resolve_data_config
from timm.models import get_pretrained_cfg, save_for_hf

from repopt_timm import Scales, make_grad_mults, prepare, register_twins, to_plain
from repopt_timm.reparam import kind_of

from ..helpers import spread

register_twins('test_resnet')
register_twins('edgenext_xx_small')
SLOW = ['edgenext_xx_small', 'fastvit_t8', 'ghostnetv3_050', 'lcnetv2_small', 'repghostnet_050', 'repvit_m0_9']
FAST = ['test_repopt_vgg', 'repopt_test_resnet', 'repopt_mobileone_s0']
KINDS = ['', '_hs', '_csla']
MODELS: list = [(name, kind) for name in FAST[:2] for kind in KINDS] + [(FAST[2], ''), (FAST[2], '_hs')]
MODELS += [
    pytest.param(f'repopt_{name}', kind, marks=pytest.mark.slow)
    for name, kind in [('mobileone_s0', '_csla'), *((name, kind) for name in SLOW for kind in KINDS)]
    if timm.is_model(name)
]
IMAGES = torch.randn(2, 3, 64, 64)

models = pytest.mark.parametrize(('name', 'kind'), MODELS)


def model_of(name, kind='', **kwargs):
    kwargs.setdefault('num_classes', 5)
    return timm.create_model(name + kind, scales=searched(name), **kwargs)


@functools.cache
def searched(name):
    torch.manual_seed(1)
    return spread(Scales.initial(timm.create_model(name, num_classes=5)))


@models
def test_a_model_has_the_scales_that_it_was_given_and_trains_on_images(name, kind):
    model = model_of(name, kind)
    assert kind_of(model) == (kind[1:] or 'target')
    assert Scales.from_model(model) == searched(name)
    optimizer = timm.optim.create_optimizer_v2(model, 'sgd' if kind else 'repopt_sgd', lr=0.1)
    before = [parameter.clone() for parameter in model.parameters()]
    model(IMAGES).square().mean().backward()
    optimizer.step()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert not all(torch.equal(old, new) for old, new in zip(before, model.parameters()))


@models
def test_the_plain_model_of_a_twin_is_a_target_in_every_respect(name, kind, tmp_path):
    if not kind:
        return
    twin = model_of(name, kind).double().eval()
    plain = to_plain(twin)
    torch.testing.assert_close(plain(IMAGES.double()), twin(IMAGES.double()), rtol=1e-9, atol=1e-9)
    target = model_of(name)
    assert plain.pretrained_cfg['architecture'] == name
    assert plain.pretrained_cfg['first_conv'] == target.pretrained_cfg['first_conv']
    assert {key: each.shape for key, each in plain.state_dict().items()} == {
        key: each.shape for key, each in target.state_dict().items()
    }
    save_for_hf(plain, tmp_path)
    assert json.loads((tmp_path / 'config.json').read_text())['architecture'] == name


@models
def test_the_records_of_timm_are_right(name, kind):
    model = model_of(name, kind, drop_rate=0.1)
    config = model.pretrained_cfg
    assert config['architecture'] == name + kind
    named = [config['first_conv'], config['classifier']] if not kind else [config['classifier']]
    # A distilled network has two classifiers.
    names = [name for each in named for name in ([each] if isinstance(each, str) else each)]
    assert all(any(key.startswith(f'{name}.') for key in model.state_dict()) for name in names)
    # timm before 1.0.31 does not record arguments.
    assert getattr(model, '_model_args', {}).keys() <= {'num_classes', 'drop_rate'}
    if name.startswith('repopt_'):
        theirs = timm.create_model(name.removeprefix('repopt_'))
        assert not hasattr(type(theirs), '_model_args')
        assert resolve_data_config({}, model=model) == resolve_data_config({}, model=theirs)


@models
def test_heads_channels_and_classes_can_be_chosen(name, kind):
    model = model_of(name, kind, in_chans=1, drop_rate=0.1).to(memory_format=torch.channels_last).eval()
    grey = IMAGES[:, :1]
    final, features = model.forward_intermediates(grey)
    assert torch.equal(model.forward_head(final), model(grey))
    assert len(features) >= 4
    model.reset_classifier(3)
    assert model(grey).shape == (2, 3)
    headless = model_of(name, kind, num_classes=0).eval()
    assert headless(IMAGES).shape == (2, getattr(headless, 'head_hidden_size', headless.num_features))


@pytest.mark.parametrize(('name', 'kind'), [*MODELS, (FAST[0], '_branches'), (FAST[2], '_branches')])
def test_features_are_those_of_timm_with_its_preprocessing(name, kind):
    kwargs = {'scales': 'initial'} if kind == '_csla' else {}
    features = timm.create_model(name + kind, features_only=True, **kwargs)
    original = f'{name}_branches' if name == FAST[0] else name.removeprefix('repopt_')
    reference = timm.create_model(original, features_only=True)
    assert features.feature_info.channels() == reference.feature_info.channels()
    assert [each.shape for each in features(IMAGES)] == [each.shape for each in reference(IMAGES)]
    assert resolve_data_config({}, model=features) == resolve_data_config({}, model=reference)
    assert features.default_cfg == features.pretrained_cfg
    by_name = timm.create_model(name + kind, features_only=True, feature_cls='dict', out_indices=(1, 3), **kwargs)
    assert list(by_name(IMAGES)) == ['1', '3']


@models
def test_features_have_the_scales_of_the_whole_network(name, kind):
    feature_cls = {'': None, '_hs': 'list', '_csla': 'hook'}[kind]
    features = model_of(name, kind, features_only=True, feature_cls=feature_cls)
    found = Scales.from_model(features)
    assert {module: vectors['kxk'].tolist() for module, vectors in found.items()}.items() <= {
        module: vectors['kxk'].tolist() for module, vectors in searched(name).items()
    }.items()
    again = to_plain(features) if kind else prepare(features, found)
    assert Scales.from_model(again) == found
    assert len(make_grad_mults(again)) == len(found)


@models
def test_weights_of_ones_own_are_adapted_to_other_channels_and_classes(name, kind, tmp_path):
    model = model_of(name, kind).eval()
    save_for_hf(model, tmp_path)
    same = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert torch.equal(same(IMAGES), model(IMAGES))
    grey = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, in_chans=1, num_classes=3).eval()
    alike = IMAGES[:, :1].expand(-1, 3, -1, -1)
    expected = model.forward_features(alike)
    assert (grey.forward_features(IMAGES[:, :1]) - expected).norm() / expected.norm() < 1e-4
    assert grey(IMAGES[:, :1]).shape == (2, 3)


@models
def test_models_are_copied_compiled_and_exported(name, kind):
    model = model_of(name, kind).eval()
    expected = model(IMAGES)
    assert torch.equal(copy.deepcopy(model)(IMAGES), expected)
    torch.testing.assert_close(torch.compile(model, backend='eager')(IMAGES), expected)
    torch.testing.assert_close(torch.export.export(model, (IMAGES,)).module()(IMAGES), expected)
    if not kind:
        assert torch.equal(pickle.loads(pickle.dumps(model))(IMAGES), expected)
        if not name.startswith(('repopt_ghostnetv3', 'repopt_fastvit')):
            # timm's own cannot be scripted either, or not once it is merged.
            torch.testing.assert_close(torch.jit.script(model)(IMAGES), expected)


@pytest.mark.parametrize('kind', KINDS[1:])
def test_a_network_that_reads_the_weights_of_its_convolutions_has_twins(kind):
    model = model_of('repopt_edgenext_xx_small', kind).eval()
    torch.testing.assert_close(to_plain(model)(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(('name', 'kind'), MODELS[:8])
def test_an_output_stride_does_not_change_what_scales_belong_to(name, kind):
    model = model_of(name, kind, output_stride=8).eval()
    assert Scales.from_model(model) == searched(name)
    assert model.forward_features(IMAGES).shape[-1] == 8


def test_a_network_is_made_where_the_context_says():
    with torch.device('meta'):
        model = timm.create_model('test_repopt_vgg_csla', scales='initial')
    assert all(tensor.is_meta for tensor in model.state_dict().values())


def test_the_preprocessing_of_fastvits_features_is_fastvits():
    features = timm.create_model('repopt_fastvit_t8', features_only=True)
    assert resolve_data_config({}, model=features)['crop_pct'] == get_pretrained_cfg('fastvit_t8').crop_pct == 0.9
