import copy
import pickle

import pytest
import timm
import torch
from timm.models import save_for_hf

from repopt_timm import Scales, make_grad_mults, prepare, register_twins, save_pretrained, to_plain
from repopt_timm.models import ensure_registered
from repopt_timm.names import ModelName
from repopt_timm.reparam import kind_of

from ..helpers import spread

register_twins('test_resnet')
KINDS = {'': 'target', '_hs': 'hs', '_csla': 'csla'}
IMAGES = torch.randn(2, 3, 64, 64)


def twin(kind='', **kwargs):
    return timm.create_model(f'repopt_test_resnet{kind}', num_classes=kwargs.pop('num_classes', 5), **kwargs)


def searched(**kwargs):
    return spread(Scales.initial(timm.create_model('test_resnet', **kwargs)))


@pytest.mark.parametrize('kind', KINDS)
def test_any_timm_model_has_the_three_kinds(kind):
    scales = searched()
    model = twin(kind, scales=scales).eval()
    assert kind_of(model) == KINDS[kind]
    assert Scales.from_model(model) == scales
    assert model(IMAGES).shape == (2, 5)
    assert model.pretrained_cfg['architecture'] == f'repopt_test_resnet{kind}'
    assert torch.equal(pickle.loads(pickle.dumps(copy.deepcopy(model)))(IMAGES), model(IMAGES))
    if kind:
        plain = to_plain(model)
        assert plain.pretrained_cfg['architecture'] == 'repopt_test_resnet'
        torch.testing.assert_close(plain(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('kwargs', [{'in_chans': 1}, {'output_stride': 8}, {'num_classes': 0}])
def test_timms_arguments_work_and_do_not_change_what_scales_belong_to(kind, kwargs):
    scales = searched()
    model = twin(kind, scales=scales, **kwargs).eval()
    assert Scales.from_model(model) == scales
    assert model(torch.randn(2, kwargs.get('in_chans', 3), 64, 64)).isfinite().all()


@pytest.mark.parametrize('kind', KINDS)
def test_features_only_gives_features_and_trains(kind):
    model = twin(kind, scales=searched(), features_only=True, out_indices=(1, 3))
    reference = timm.create_model('test_resnet', features_only=True, out_indices=(1, 3))
    assert model.feature_info.channels() == reference.feature_info.channels()
    assert [each.shape for each in model(IMAGES)] == [each.shape for each in reference(IMAGES)]
    optimizer = timm.optim.create_optimizer_v2(model, 'sgd' if kind else 'repopt_sgd', lr=0.1)
    model(IMAGES)[-1].sum().backward()
    optimizer.step()


@pytest.mark.parametrize('kind', KINDS)
def test_features_have_the_scales_of_the_whole_network(kind, tmp_path):
    scales = searched()
    features = twin(kind, scales=scales, features_only=True)
    found = Scales.from_model(features)
    assert found == scales
    found.save(tmp_path / 'scales.safetensors')
    assert Scales.from_model(twin(scales=tmp_path / 'scales.safetensors')) == scales
    assert Scales.from_model(to_plain(features) if kind else prepare(features, scales)) == scales


def test_features_without_the_last_convolution_train():
    register_twins('mobilenetv3_small_050')
    features = timm.create_model('repopt_mobilenetv3_small_050', scales='initial', features_only=True)
    assert isinstance(features.model.conv_head, torch.nn.Identity)
    assert make_grad_mults(features)


def test_features_only_counts_from_the_end_like_timm():
    expected = timm.create_model('test_resnet', features_only=True, out_indices=2).feature_info.channels()
    assert twin('_hs', features_only=True, out_indices=2).feature_info.channels() == expected


@pytest.mark.parametrize('kind', KINDS)
def test_weights_of_ones_own_are_adapted_to_other_image_channels(kind, tmp_path):
    save_for_hf(twin(kind, scales=searched()), tmp_path, model_config={'num_classes': 5})
    model = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, in_chans=1)
    assert model(torch.randn(1, 1, 64, 64)).isfinite().all()


def test_a_card_registers_the_model_before_it_is_created(tmp_path):
    save_pretrained(twin(scales=searched()), tmp_path)
    assert "repopt_timm.register_twins('test_resnet')" in (tmp_path / 'README.md').read_text()


def test_registering_twice_and_by_name_is_safe():
    register_twins('test_resnet')
    ensure_registered('repopt_test_vit_csla')
    assert timm.is_model('repopt_test_vit_csla')
    ensure_registered('repopt_nonsense')
    with pytest.raises(ValueError, match="timm does not know a model 'nonsense'"):
        register_twins('nonsense')


def test_pretrained_weights_of_timm_are_the_targets_and_stay_as_they_are():
    weights = timm.create_model('test_resnet').state_dict()
    overlay = {'state_dict': weights, 'num_classes': 1000}
    scales = searched()
    model = timm.create_model('repopt_test_resnet', pretrained=True, pretrained_cfg_overlay=overlay, scales=scales)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert make_grad_mults(model).fingerprint == scales.fingerprint
    assert timm.list_pretrained('repopt_test_resnet*')
    with pytest.raises(ValueError, match='has no pretrained weights: its kernels are sums of branches'):
        twin('_hs', pretrained=True)


def test_a_csla_twin_takes_its_scales_from_a_checkpoint_or_a_folder(tmp_path):
    trained = twin('_csla', scales=searched()).eval()
    torch.save(trained.state_dict(), tmp_path / 'trained.pth')
    loaded = twin('_csla', checkpoint_path=tmp_path / 'trained.pth').eval()
    assert torch.equal(loaded(IMAGES), trained(IMAGES))
    save_for_hf(trained, tmp_path / 'saved', model_config={'num_classes': 5})
    again = timm.create_model(f'local-dir:{tmp_path / "saved"}', pretrained=True).eval()
    assert torch.equal(again(IMAGES), trained(IMAGES))


@pytest.mark.parametrize(
    ('text', 'architecture', 'kind', 'tag', 'network'),
    [
        ('repopt_vgg_a0_hs.cifar10', 'repopt_vgg_a0', 'hs', 'cifar10', 'repopt_vgg_a0'),
        ('repopt_resnet18_csla', 'repopt_resnet18', 'csla', '', 'resnet18'),
        ('resnet18.a1_in1k', 'resnet18', 'target', 'a1_in1k', 'resnet18'),
    ],
)
def test_a_models_name_is_taken_apart_in_one_place(text, architecture, kind, tag, network):
    name = ModelName.parse(text)
    assert (name.architecture, name.kind, name.tag, name.network) == (architecture, kind, tag, network)
