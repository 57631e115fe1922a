import copy
import json
import pickle

import pytest
import timm
import torch
from timm.data import resolve_data_config
from timm.models import save_for_hf
from timm.utils import reparameterize_model
from torch import nn

from repopt_timm import CSLAConv2d, Scales, make_grad_mults, prepare, to_plain
from repopt_timm.architectures import ARCHITECTURES

from ..helpers import TINY, random_scales, tiny_model

KINDS = ['', '_hs', '_csla']
IMAGES = torch.randn(2, 3, 64, 64)


def model_of(kind, **kwargs):
    return tiny_model(kind, scales='initial' if kind == '_csla' else None, **kwargs)


@pytest.mark.parametrize(
    ('name', 'millions'),
    [
        ('a0', 8.3),
        ('a1', 12.8),
        ('a2', 25.5),
        ('b0', 14.3),
        ('b1', 51.8),
        ('b2', 80.3),
        ('b3', 111.0),
        ('l1', 76.0),
        ('l2', 118.1),
    ],
)
def test_variants_have_their_published_sizes(name, millions):
    model = timm.create_model(f'repopt_vgg_{name}', device='meta')
    assert round(sum(param.numel() for param in model.parameters()) / 1e6, 1) == millions


@pytest.mark.parametrize('architecture', ARCHITECTURES)
def test_the_architecture_states_the_models_convolutions(architecture):
    model = timm.create_model(architecture, device='meta')
    convs = {name: module.out_channels for name, module in model.named_modules() if name.endswith('.conv')}
    assert ARCHITECTURES[architecture].out_channels() == convs


@pytest.mark.parametrize('strides', [(2, 2, 2, 2, 2), (1, 1, 2, 1, 1)])
def test_strides_are_those_of_the_stem_and_of_each_stages_first_block(strides):
    model = timm.create_model('repopt_vgg_b0', device='meta', strides=strides)
    firsts = [model.stem, *(stage[0] for stage in model.stages)]
    assert tuple(block.conv.stride[0] for block in firsts) == strides
    assert model.stages[1][1].conv.stride == (1, 1)


def test_stem_and_stages_are_initialized_alike():
    model = timm.create_model('repopt_vgg_b0')
    for name in ('stem.conv', 'stages.0.1.conv', 'stages.2.0.conv'):
        conv = model.get_submodule(name)
        fan_out = 9 * conv.out_channels
        assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)


def test_all_kinds_of_all_variants_are_listed():
    listed = timm.list_models('*repopt_vgg*')
    assert set(listed) == {name + kind for name in ARCHITECTURES for kind in [*KINDS, '_branches']}


def test_a_targets_state_dict_is_that_of_a_plain_network():
    state = tiny_model(scales=random_scales()).state_dict()
    bn = ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked')
    blocks = ['stem', *(name.removesuffix('.conv') for name in random_scales() if name != 'stem.conv')]
    expected = {f'{block}.{name}' for block in blocks for name in ('conv.weight', *(f'bn.{each}' for each in bn))}
    assert set(state) == expected | {'head.fc.weight', 'head.fc.bias'}


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('kind', ['_hs', '_csla'])
@pytest.mark.parametrize('kwargs', [{}, {'use_se': True, 'strides': (1, 1, 2, 2, 2)}, {'output_stride': 8}])
def test_the_plain_twin_computes_the_same(kind, training, kwargs):
    strides = kwargs.get('strides', (2, 2, 2, 2, 2))
    scales = random_scales(strides=strides)
    model = tiny_model(kind, scales=scales, **kwargs).double().train(training)
    plain = model.to_plain()
    assert plain.training == training
    assert not any(isinstance(module, CSLAConv2d) for module in plain.modules())
    torch.testing.assert_close(plain(IMAGES.double()), model(IMAGES.double()), rtol=0, atol=1e-12)
    assert plain.scales == scales


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('use_se', [False, True])
def test_checkpointing_changes_nothing_but_what_is_kept(kind, use_se):
    model = model_of(kind, use_se=use_se).double()
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing()
    kept = []
    for net in (model, twin):
        sizes = {}
        kept.append(sizes)
        save = lambda tensor, sizes=sizes: sizes.update({tensor.data_ptr(): tensor.numel()}) or tensor  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            loss = net(IMAGES.double()).square().sum()
        loss.backward()
    for param, other in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(param.grad, other.grad, rtol=0, atol=0)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, twin.get_buffer(name)), name
    assert sum(kept[1].values()) < 0.7 * sum(kept[0].values())


@pytest.mark.parametrize('kind', KINDS)
def test_timm_reparameterizes_it_to_convolutions_without_batchnorm(kind):
    model = model_of(kind).double()
    model(IMAGES.double())
    merged = reparameterize_model(model)
    assert not any(isinstance(module, nn.BatchNorm2d | CSLAConv2d) for module in merged.modules())
    torch.testing.assert_close(merged.eval()(IMAGES.double()), model.eval()(IMAGES.double()), rtol=0, atol=1e-12)


def test_a_hyper_search_merges_its_live_scales():
    model = tiny_model('_hs').double().eval()
    with torch.no_grad():
        model.stem.conv.branches['kxk'].scale += 1e-9
    torch.testing.assert_close(model.to_plain()(IMAGES.double()), model(IMAGES.double()), rtol=0, atol=1e-12)


def test_the_plain_twin_is_a_target_in_every_respect(tmp_path):
    plain = tiny_model('_hs').to_plain()
    assert plain.pretrained_cfg['architecture'] == TINY
    again = tiny_model()
    again.load_state_dict(plain.state_dict())
    save_for_hf(plain, tmp_path)
    assert json.loads((tmp_path / 'config.json').read_text())['architecture'] == TINY
    with pytest.raises(ValueError, match='is plain already'):
        plain.to_plain()


def test_a_search_starts_from_given_scales():
    scales = random_scales()
    assert tiny_model('_hs', scales=scales).scales == scales


def test_a_csla_model_without_scales_raises_until_a_checkpoint_brings_them(tmp_path):
    trained = tiny_model('_csla', scales=random_scales()).eval()
    empty = tiny_model('_csla')
    for use in (lambda: empty(IMAGES), empty.to_plain, lambda: Scales.from_model(empty)):
        with pytest.raises(ValueError, match=r'has no scales yet\. Create the model with scales='):
            use()
    torch.save(trained.state_dict(), tmp_path / 'trained.pth')
    loaded = tiny_model('_csla', checkpoint_path=tmp_path / 'trained.pth').eval()
    assert torch.equal(loaded(IMAGES), trained(IMAGES))
    save_for_hf(trained, tmp_path / 'saved', model_config={'num_classes': 5})
    again = timm.create_model(f'local-dir:{tmp_path / "saved"}', pretrained=True).eval()
    assert torch.equal(again(IMAGES), trained(IMAGES))
    assert again.scales == trained.scales


def test_a_target_starts_by_the_rule_of_initialization_unless_it_has_weights(tmp_path):
    scales = Scales.initial(tiny_model())
    trained = tiny_model()
    torch.save(trained.state_dict(), tmp_path / 'trained.pth')
    loaded = tiny_model(scales=scales, checkpoint_path=tmp_path / 'trained.pth')
    assert torch.equal(loaded.stem.conv.weight, trained.stem.conv.weight)
    assert loaded.scales == scales
    kernel = tiny_model(scales=scales).stages[1][1].conv.weight
    diagonal = kernel[torch.arange(32), torch.arange(32), 1, 1]
    assert diagonal.mean() > 0.9


def test_pretrained_weights_win_over_initialization():
    trained = tiny_model()
    overlay = {'state_dict': trained.state_dict(), 'num_classes': 5}
    model = timm.create_model(TINY, pretrained=True, scales=random_scales(), pretrained_cfg_overlay=overlay)
    assert torch.equal(model.stages[0][0].conv.weight, trained.stages[0][0].conv.weight)
    assert model.scales is not None


@pytest.mark.parametrize('name', ['repopt_vgg_a0', 'repopt_vgg_b1', 'repopt_vgg_b1_hs'])
def test_an_untrained_model_has_imagenets_classes_and_size(name):
    model = timm.create_model(name, device='meta')
    assert model.num_classes == 1000
    assert resolve_data_config({}, model=model)['input_size'] == (3, 224, 224)


def test_scales_are_kept_out_of_a_models_arguments():
    model = tiny_model(scales=random_scales(), strides=(2, 2, 2, 2, 2), drop_rate=0.1)
    assert getattr(model, '_model_args', {}).keys() <= {'num_classes', 'strides', 'drop_rate'}


def test_strides_and_drop_path_are_checked():
    with pytest.raises(ValueError, match='expected 5 values of 1 or 2'):
        tiny_model(strides=(2, 2, 2))
    with pytest.raises(ValueError, match='expected 5 values of 1 or 2'):
        tiny_model(strides=(2, 2, 2), scales='initial')
    with pytest.raises(ValueError, match='no residual branch to drop'):
        tiny_model(drop_path_rate=0.1)


@pytest.mark.parametrize('kind', KINDS)
def test_timms_model_interface_works(kind):
    model = model_of(kind, in_chans=4, num_classes=7, global_pool='max', drop_rate=0.2).eval()
    images = torch.randn(2, 4, 64, 64)
    assert model(images).shape == (2, 7)
    final, features = model.forward_intermediates(images)
    assert [tuple(feature.shape[1:]) for feature in features] == [
        (16, 32, 32),
        (16, 16, 16),
        (32, 8, 8),
        (64, 4, 4),
        (128, 2, 2),
    ]
    assert torch.equal(model.forward_head(final), model(images))
    model.reset_classifier(3)
    assert isinstance(model.get_classifier(), nn.Linear)
    assert model(images).shape == (2, 3)
    assert len(timm.models.group_parameters(model, model.group_matcher())) == 8


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize(
    ('kwargs', 'reductions'),
    [
        ({}, [2, 4, 8, 16, 32]),
        ({'out_indices': (1, 3)}, [4, 16]),
        ({'output_stride': 8}, [2, 4, 8, 8, 8]),
        ({'strides': (1, 2, 2, 2, 2)}, [1, 2, 4, 8, 16]),
        ({'strides': (2, 1, 2, 2, 2)}, [2, 4, 8, 16]),
        ({'strides': (1, 1, 2, 2, 2), 'output_stride': 4}, [1, 2, 4, 4]),
    ],
)
def test_features_have_the_reductions_that_they_claim(kind, kwargs, reductions):
    model = model_of(kind, features_only=True, **kwargs).eval()
    assert model.feature_info.reduction() == reductions
    assert [64 // feature.shape[-1] for feature in model(IMAGES)] == reductions
    assert [feature.shape[1] for feature in model(IMAGES)] == model.feature_info.channels()


@pytest.mark.parametrize('kind', KINDS)
def test_features_have_the_scales_of_the_whole_network(kind):
    scales = random_scales()
    features = tiny_model(kind, scales=scales, features_only=True)
    found = Scales.from_model(features)
    assert found == scales
    assert tiny_model(scales=found, features_only=True)
    assert Scales.from_model(to_plain(features) if kind else prepare(features, found)) == scales


def test_a_convolution_that_was_replaced_in_features_is_named():
    features = tiny_model(scales='initial', features_only=True)
    features['stages_1'][1].conv = nn.Conv2d(16, 16, 3, padding=1, bias=False)
    with pytest.raises(ValueError, match=r"'stages\.1\.1\.conv' of FeatureListNet got scales"):
        make_grad_mults(features)


@pytest.mark.parametrize('kind', KINDS)
def test_models_can_be_copied_pickled_cast_compiled_and_exported(kind):
    model = model_of(kind).eval()
    expected = model(IMAGES)
    assert torch.equal(copy.deepcopy(model)(IMAGES), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(IMAGES), expected)
    assert model_of(kind, dtype=torch.bfloat16).eval()(IMAGES.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(torch.compile(model, backend='aot_eager')(IMAGES), expected)
    exported = torch.export.export(model, (IMAGES,)).module()
    torch.testing.assert_close(exported(IMAGES), expected)


def test_a_target_is_scriptable():
    model = tiny_model(scales='initial').eval()
    torch.testing.assert_close(torch.jit.script(model)(IMAGES), model(IMAGES))


def test_models_are_built_inside_of_a_meta_context():
    with torch.device('meta'):
        model = tiny_model('_csla', scales='initial')
    assert model.stem.conv.branches['kxk'].scale.is_meta


@pytest.mark.parametrize('kind', KINDS)
def test_squeeze_and_excitation_comes_after_the_relu(kind):
    block = model_of(kind, use_se=True).stem
    assert [name for name, _ in block.named_children()] == ['conv', 'bn', 'attn']
    assert isinstance(block.bn.act, nn.ReLU)
    assert block.attn.fc1.out_channels == 1
