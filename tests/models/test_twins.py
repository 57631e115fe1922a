import pytest
import timm
import torch
from timm.utils import reparameterize_model
from torch import nn

from repopt_timm import Scales, make_grad_mults, plain_twin, register_twins, to_plain
from repopt_timm.models import ensure_registered
from repopt_timm.names import KINDS, MULTI_BRANCH, ModelName
from repopt_timm.reparam import multi_branch_blocks, network_name

from ..helpers import TINY, random_scales, tiny_model
from .test_byobnet import convs

register_twins('test_resnet')
IMAGES = torch.randn(2, 3, 64, 64)
STRIDES = (1, 1, 2, 2, 2)


def twin(name, **kwargs):
    kwargs.setdefault('num_classes', 5)
    return timm.create_model(f'repopt_{name}', **kwargs)


def test_each_multi_branch_network_of_timm_has_all_kinds():
    names = [name for pattern in MULTI_BRANCH for name in timm.list_models(pattern)]
    assert 'mobileone_s4' in names
    for name in names:
        assert all(timm.is_model(f'repopt_{name}{ending}') for ending in KINDS.values())


@pytest.mark.parametrize('strides', [(2, 2, 2, 2, 2), STRIDES])
def test_a_mobileone_and_its_branches_are_one_network_once_merged(strides):
    plain, branches = (twin(f'mobileone_s0{kind}', strides=strides, device='meta') for kind in ('', '_branches'))
    original = timm.create_model('mobileone_s0', device='meta')
    assert list(multi_branch_blocks(branches))
    assert plain.state_dict().keys() == plain_twin(original).state_dict().keys()
    assert (convs(original) == convs(branches)) == (strides != STRIDES)
    with torch.device('meta'):
        assert convs(reparameterize_model(branches)) == convs(reparameterize_model(plain))
    firsts = [plain.stem, *(stage[0] for stage in plain.stages)]
    assert tuple(block.conv.stride[0] for block in firsts) == strides
    reductions = [1, 2, 4, 8] if strides == STRIDES else [2, 4, 8, 16, 32]
    for kind in ('', '_branches'):
        features = twin(f'mobileone_s0{kind}', strides=strides, features_only=True, device='meta')
        assert features.feature_info.reduction() == reductions
    with pytest.raises(ValueError, match='Make the model alike'):
        twin('mobileone_s0', strides=(2, 1, 2, 2, 2), scales=Scales.initial(plain), device='meta')


@pytest.mark.parametrize(
    ('name', 'kwargs', 'reason'),
    [
        ('mobileone_s0', {'strides': (1, 2)}, 'strides='),
        ('mobileone_s0', {'drop_path_rate': 0.1}, 'drop_path_rate=0'),
        ('mobileone_s0_branches', {'scales': 'initial'}, 'does not take scales'),
        ('mobileone_s0', {'scales': 'implied'}, 'trained branches'),
        ('test_resnet_hs', {'pretrained': True}, 'no trained weights'),
        (
            'test_resnet_hs',
            {'pretrained': True, 'pretrained_cfg_overlay': {'state_dict': {'a': 1}}},
            'no weights of timm',
        ),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(name, kwargs, reason):
    with pytest.raises(ValueError, match=reason):
        twin(name, **kwargs)


def test_features_end_where_timms_do():
    register_twins('mobilenetv3_small_050')
    features = twin('mobilenetv3_small_050', scales='initial', features_only=True)
    assert isinstance(features.model.conv_head, nn.Identity)
    assert make_grad_mults(features)


def test_registering_twice_and_by_name_is_safe():
    register_twins('test_resnet')
    ensure_registered('repopt_test_vit_csla')
    assert timm.is_model('repopt_test_vit_csla')
    ensure_registered('repopt_nonsense')
    for name in ('nonsense', 'repopt_vgg_a0'):
        with pytest.raises(ValueError, match=f"'{name}'"):
            register_twins(name)


def test_timms_weights_are_the_targets_and_stay_as_they_are():
    weights = timm.create_model('test_resnet').state_dict()
    overlay = {'state_dict': weights, 'num_classes': 1000}
    scales = random_scales('test_resnet')
    model = twin('test_resnet', pretrained=True, pretrained_cfg_overlay=overlay, scales=scales, num_classes=1000)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert make_grad_mults(model).fingerprint == scales.fingerprint
    assert timm.list_pretrained('repopt_test_resnet*')


@pytest.mark.parametrize(
    ('text', 'name', 'network'),
    [
        ('repopt_vgg_a0_hs.cifar10', ModelName('repopt_vgg_a0', 'hs', 'cifar10'), 'repopt_vgg_a0'),
        ('repopt_resnet18_csla', ModelName('repopt_resnet18', 'csla'), 'resnet18'),
        ('resnet18.a1_in1k', ModelName('resnet18', 'target', 'a1_in1k'), 'resnet18'),
    ],
)
def test_a_models_name_is_taken_apart_in_one_place(text, name, network):
    assert ModelName.parse(text) == name
    assert name.network == network


def test_a_search_inside_a_detector_is_plain_by_name_too():
    detector = nn.ModuleDict({'backbone': tiny_model('_hs'), 'neck': nn.Conv2d(8, 8, 3)})
    plain = to_plain(detector)
    assert network_name(detector['backbone']) == network_name(plain['backbone']) == TINY
    assert plain['backbone'].pretrained_cfg['architecture'] == TINY
