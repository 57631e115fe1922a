import logging
import math

import pytest
import timm
from timm.layers import Conv2dSame, StdConv2d
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.prune import l1_unstructured

from repopt_timm import Scales, hyper_search, refused_convs, repvgg_prior
from repopt_timm.reparam import ConvPrior, keep_branches, resolve_prior


def test_a_repvgg_prior_follows_channels_kernel_and_stride():
    prior = repvgg_prior(timm.create_model('resnet18', device='meta'))
    assert list(prior['conv1'].branches) == ['1x1', 'kxk']
    assert list(prior['layer1.0.conv1'].branches) == ['1x1', 'identity', 'kxk']
    assert list(prior['layer2.0.conv1'].branches) == ['1x1', 'kxk']
    assert list(prior['layer2.0.downsample.0'].branches) == ['kxk']


def test_scales_start_smaller_along_a_run_of_equal_channels_and_stride_1():
    convs = [nn.Conv2d(3, 8, 3, padding=1), *(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))]
    convs += [nn.Conv2d(8, 8, 3, 2, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)]
    prior = repvgg_prior(nn.Sequential(*convs))
    assert [each.initial for each in prior.values()] == [math.sqrt(2 / (n + 1)) for n in (1, 2, 3, 1, 2, 1)]


def test_a_rep_opt_vgg_starts_at_the_index_in_the_stage():
    prior = repvgg_prior(timm.create_model('repopt_vgg_b1', device='meta'))
    assert prior['stem.conv'].initial == prior['stages.2.0.conv'].initial == 1.0
    assert [prior[f'stages.2.{index}.conv'].initial for index in (1, 2, 8)] == [math.sqrt(2), 1.0, 0.5]


@pytest.mark.parametrize(
    'branches',
    [['kxk', '1x3'], {'kxk': 1, '1x3': 1}, ConvPrior({'kxk': 1, '1x3': 1}), lambda model: {'conv2': ('1x3', 'kxk')}],
    ids=['names', 'counts', 'prior', 'function'],
)
def test_a_prior_of_ones_own_may_have_any_form(branches):
    model = nn.ModuleDict({'conv1': nn.Conv2d(3, 8, 3, padding=1), 'conv2': nn.Conv2d(3, 8, 3, padding=1)})
    resolved = resolve_prior(model, branches if callable(branches) else {'conv2': branches})
    assert resolved == {'conv2': ConvPrior({'1x3': 1, 'kxk': 1}, 1.0)}


@pytest.mark.parametrize(
    ('prior', 'thing'),
    [
        ({'layer9': ['kxk']}, "'layer9'"),
        ({'bn1': ['kxk']}, "'bn1'"),
        ({'conv1': ['kxk', 'identity']}, "'conv1'.*identity"),
        ({'conv1': []}, "'conv1'.*kxk"),
        ({}, 'No convolution'),
    ],
)
def test_a_prior_that_does_not_fit_is_refused(prior, thing):
    with pytest.raises(ValueError, match=thing):
        Scales.initial(timm.create_model('resnet18', device='meta'), prior)


def replaced_forward(conv):
    conv.forward = lambda x: x
    return conv


@pytest.mark.parametrize(
    'conv',
    [
        StdConv2d(4, 4, 3, padding=1),
        Conv2dSame(4, 4, 3),
        nn.ConvTranspose2d(4, 4, 3),
        nn.Conv1d(4, 4, 3, padding=1),
        nn.Conv2d(4, 4, 2),
        nn.Conv2d(4, 4, 3),
        nn.Conv2d(4, 4, 3, padding='valid'),
        nn.Conv2d(4, 4, 3, padding=1, dilation=2),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode='circular'),
        weight_norm(nn.Conv2d(4, 4, 3, padding=1)),
        replaced_forward(nn.Conv2d(4, 4, 3, padding=1)),
        l1_unstructured(nn.Conv2d(4, 4, 3, padding=1), 'weight', 1),
    ],
    ids=lambda conv: str(conv)[:40],
)
def test_what_does_not_compute_the_centred_convolution_of_its_weight_is_refused(conv):
    model = nn.ModuleDict({'refused': conv, 'plain': nn.Conv2d(4, 4, 3, padding='same')})
    assert [each.name for each in refused_convs(model)] == ['refused']
    assert list(repvgg_prior(model)) == ['plain']
    with pytest.raises(ValueError, match='refused'):
        resolve_prior(model, {'refused': ['kxk']})


def test_the_log_of_a_search_names_the_convolutions_without_branches(caplog):
    model = nn.Sequential(StdConv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1))
    with caplog.at_level(logging.INFO):
        hyper_search(model, {'2': ['kxk']})
    assert '0 (StdConv2d' in caplog.text
    assert '1 (no scales)' in caplog.text


def test_settings_of_one_number_are_height_and_width():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    conv.stride, conv.padding, conv.dilation = 1, (1,), 1
    assert 'identity' in repvgg_prior(nn.Sequential(conv))['0'].branches


@pytest.mark.parametrize('name', ['repvgg_a0', 'repvit_m0_9', 'repghostnet_050', 'fastvit_t8', 'shvit_s1'])
def test_a_network_with_branches_of_its_own_needs_its_plain_twin(name):
    with pytest.raises(ValueError, match=r'plain_twin\(model\)'):
        hyper_search(timm.create_model(name, device='meta'))


@pytest.mark.parametrize('name', ['levit_128s', 'tiny_vit_5m_224', 'nextvit_small'])
def test_a_network_that_only_folds_its_normalization_is_converted(name):
    assert repvgg_prior(timm.create_model(name, device='meta'))


def test_a_network_whose_branches_are_merged_is_plain():
    assert repvgg_prior(timm.utils.reparameterize_model(timm.create_model('repvgg_a0')))


def test_a_network_whose_method_merges_no_branches_can_be_marked_as_plain():
    class Net(nn.Sequential):
        def fuse(self):
            """Folds BatchNorm, say."""

    model = Net(nn.Conv2d(4, 4, 3, padding=1))
    with pytest.raises(ValueError, match='keep_branches'):
        Scales.initial(model)
    keep_branches(model)
    assert list(Scales.initial(model)) == ['0']


def test_a_submodule_is_no_method_that_merges_branches():
    neck = nn.ModuleDict({'lateral': nn.Conv2d(4, 4, 1), 'fuse': nn.Conv2d(4, 4, 3, padding=1)})
    assert list(repvgg_prior(neck)) == ['lateral', 'fuse']
