"""What timm promises of a model, and what twins promise besides, for networks of all kinds."""

import copy
import functools
import json
import pickle

import pytest
import timm
import torch
from timm.data import resolve_data_config
from timm.models import save_for_hf

from repopt_timm import Scales, make_grad_mults, prepare, register_twins, to_plain
from repopt_timm.reparam import kind_of

from ..helpers import random_scales

register_twins('test_resnet')
register_twins('edgenext_xx_small')
KINDS = ['', '_hs', '_csla']
FAST = ['test_repopt_vgg', 'repopt_test_resnet', 'repopt_lcnetv2_small']
SLOW = ['edgenext_xx_small', 'fastvit_t8', 'ghostnetv3_050', 'mobileone_s0', 'repghostnet_050', 'repvit_m0_9']
IMAGES = torch.randn(2, 3, 64, 64)


def models(fast, names=(*FAST, *(f'repopt_{name}' for name in SLOW)), kinds=KINDS):
    cases = [
        pytest.param(name, kind, marks=[] if name in fast else pytest.mark.slow)
        for name in names
        for kind in kinds
        # Constant scales are tested on the fast ones.
        if timm.is_model(name) and (name in fast or kind != '_csla')
    ]
    return pytest.mark.parametrize(('name', 'kind'), cases)


def model_of(name, kind='', **kwargs):
    kwargs.setdefault('num_classes', 5)
    return timm.create_model(name + kind, scales=searched(name), **kwargs).eval()


@functools.cache
def searched(name):
    torch.manual_seed(1)
    return random_scales(name, num_classes=5)


@functools.cache
def shared(name, kind):
    """A model that no test changes."""
    return model_of(name, kind)


@models(FAST)
def test_a_model_has_the_scales_that_it_was_given_and_trains_on_images(name, kind):
    model = copy.deepcopy(shared(name, kind)).train()
    assert kind_of(model) == (kind[1:] or 'target')
    assert Scales.from_model(model) == searched(name)
    optimizer = timm.optim.create_optimizer_v2(model, 'sgd' if kind else 'repopt_sgd', lr=0.1)
    before = [parameter.clone() for parameter in model.parameters()]
    model(IMAGES).square().mean().backward()
    optimizer.step()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert not all(torch.equal(old, new) for old, new in zip(before, model.parameters()))


@models(FAST, kinds=KINDS[1:])
def test_the_plain_model_of_a_twin_is_a_target_in_every_respect(name, kind, tmp_path):
    twin = copy.deepcopy(shared(name, kind)).double()
    plain, target = to_plain(twin), shared(name, '')
    torch.testing.assert_close(plain(IMAGES.double()), twin(IMAGES.double()), rtol=1e-9, atol=1e-9)
    assert plain.pretrained_cfg['first_conv'] == target.pretrained_cfg['first_conv']
    shapes = [{key: each.shape for key, each in model.state_dict().items()} for model in (plain, target)]
    assert shapes[0] == shapes[1]
    save_for_hf(plain, tmp_path)
    assert json.loads((tmp_path / 'config.json').read_text())['architecture'] == name


@models(FAST)
def test_records_heads_channels_and_classes_are_those_that_were_chosen(name, kind):
    model = model_of(name, kind, in_chans=1, drop_rate=0.1).to(memory_format=torch.channels_last)
    config = model.pretrained_cfg
    assert config['architecture'] == name + kind
    # A distilled network has two classifiers; timm adapts the first convolution of targets alone.
    names = [config[key] for key in ('classifier', *(() if kind else ('first_conv',)))]
    flat = [each for found in names for each in ([found] if isinstance(found, str) else found)]
    assert all(any(key.startswith(f'{each}.') for key in model.state_dict()) for each in flat)
    # timm before 1.0.31 does not record arguments.
    assert getattr(model, '_model_args', {}).keys() <= {'in_chans', 'num_classes', 'drop_rate'}
    grey = IMAGES[:, :1]
    final, features = model.forward_intermediates(grey)
    assert torch.equal(model.forward_head(final), model(grey))
    assert len(features) >= 4
    model.reset_classifier(3)
    assert model(grey).shape == (2, 3)
    model.reset_classifier(0)
    assert model(grey).shape == (2, getattr(model, 'head_hidden_size', model.num_features))


@models(FAST)
def test_features_are_those_of_timm_with_its_preprocessing_and_the_scales_of_the_network(name, kind):
    feature_cls = {'': None, '_hs': 'list', '_csla': 'hook'}[kind]
    features = model_of(name, kind, features_only=True, feature_cls=feature_cls)
    original = f'{name}_branches' if name == FAST[0] else name.removeprefix('repopt_')
    reference = timm.create_model(original, features_only=True)
    assert features.feature_info.channels() == reference.feature_info.channels()
    assert [each.shape for each in features(IMAGES)] == [each.shape for each in reference(IMAGES)]
    assert resolve_data_config({}, model=features) == resolve_data_config({}, model=reference)
    assert features.default_cfg == features.pretrained_cfg
    found, whole = Scales.from_model(features), searched(name)
    assert all(torch.equal(vectors['kxk'], whole[module]['kxk']) for module, vectors in found.items())
    again = to_plain(features) if kind else prepare(features, found)
    assert Scales.from_model(again) == found
    assert len(make_grad_mults(again)) == len(found)


@models(FAST)
def test_weights_of_ones_own_are_adapted_to_other_channels_and_classes(name, kind, tmp_path):
    model = shared(name, kind)
    save_for_hf(model, tmp_path)
    same = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert torch.equal(same(IMAGES), model(IMAGES))
    grey = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, in_chans=1, num_classes=3).eval()
    alike = IMAGES[:, :1].expand(-1, 3, -1, -1)
    expected = model.forward_features(alike)
    assert (grey.forward_features(IMAGES[:, :1]) - expected).norm() / expected.norm() < 1e-4
    assert grey(IMAGES[:, :1]).shape == (2, 3)


@models(FAST)
def test_models_are_copied_pickled_and_scripted(name, kind):
    model = shared(name, kind)
    expected = model(IMAGES)
    assert torch.equal(copy.deepcopy(model)(IMAGES), expected)
    if not kind:
        assert torch.equal(pickle.loads(pickle.dumps(model))(IMAGES), expected)
        if not name.startswith(('repopt_ghostnetv3', 'repopt_fastvit')):
            # timm's own cannot be scripted either, or not once it is merged.
            torch.testing.assert_close(torch.jit.script(model)(IMAGES), expected)


@models(FAST[:1])
def test_models_are_compiled_and_exported(name, kind):
    model = shared(name, kind)
    torch.testing.assert_close(torch.compile(model, backend='eager')(IMAGES), model(IMAGES))
    torch.testing.assert_close(torch.export.export(model, (IMAGES,)).module()(IMAGES), model(IMAGES))


@models(FAST[:2], [*FAST[:2], 'repopt_mobileone_s0'])
def test_an_output_stride_does_not_change_what_scales_belong_to(name, kind):
    # A dilated convolution of equal channels looks as if it had an identity.
    stride = 2 if name == FAST[0] else 8
    model = model_of(name, kind, output_stride=stride)
    assert Scales.from_model(model) == searched(name)
    assert kind or Scales.initial(model).counts == searched(name).counts
    assert model.forward_features(IMAGES).shape[-1] == 64 // stride


def test_a_network_is_made_where_the_context_says():
    with torch.device('meta'):
        model = timm.create_model('test_repopt_vgg_csla', scales='initial')
    assert all(tensor.is_meta for tensor in model.state_dict().values())
