import logging
import math

import pytest
import timm
from timm.layers import StdConv2d
from torch import nn

from repopt_timm import ConvPrior, Scales, hyper_search, keep_branches, refused_convs, repvgg_prior
from repopt_timm.reparam import resolve_prior, stage_scale


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
    assert stage_scale(8) == 0.5


def test_squeeze_and_excitation_of_a_rep_opt_vgg_has_no_branches():
    prior = repvgg_prior(timm.create_model('repopt_vgg_d2se', device='meta'))
    assert len(prior) == 48
    assert all(name.endswith('.conv') for name in prior)


@pytest.mark.parametrize(
    'prior',
    [
        {'layer1.0.conv1': ['kxk', '1x3']},
        {'layer1.0.conv1': {'kxk': 1, '1x3': 1}},
        {'layer1.0.conv1': ConvPrior(['kxk', '1x3'], math.sqrt(2 / 2))},
        lambda model: {'layer1.0.conv1': ('1x3', 'kxk')},
    ],
    ids=['names', 'counts', 'prior', 'function'],
)
def test_a_prior_of_ones_own_may_have_any_form(prior):
    resolved = resolve_prior(timm.create_model('resnet18', device='meta'), prior)
    assert resolved == {'layer1.0.conv1': ConvPrior({'1x3': 1, 'kxk': 1}, 1.0)}


@pytest.mark.parametrize(
    ('prior', 'message'),
    [
        ({'layer9': ['kxk']}, "names 'layer9', but ResNet has no such module"),
        ({'bn1': ['kxk']}, "'bn1' of ResNet cannot have branches: BatchNorm2d is not exactly nn.Conv2d"),
        ({'conv1': ['identity']}, "'conv1': An identity branch needs"),
        ({'conv1': ConvPrior(['kxk', 'kxk'])}, "'conv1': The branch 'kxk' is listed 2 times"),
        ({'conv1': []}, "'conv1': A CSLA convolution needs at least one branch"),
        ({}, 'expected a mapping of module names'),
    ],
)
def test_a_prior_that_does_not_fit_is_refused(prior, message):
    with pytest.raises(ValueError, match=message):
        Scales.initial(timm.create_model('resnet18', device='meta'), prior)


def test_what_cannot_be_converted_is_listed_and_logged(caplog):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), StdConv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 2))
    refused = refused_convs(model)
    assert [(each.name, each.type) for each in refused] == [('1', 'StdConv2d'), ('2', 'Conv2d')]
    assert 'even' in refused[1].reason
    with caplog.at_level(logging.INFO):
        assert list(repvgg_prior(model)) == ['0']
    assert "'1' (StdConv2d): " in caplog.text
    with pytest.raises(ValueError, match="'1' of Sequential cannot have branches: StdConv2d is not exactly"):
        hyper_search(model, {'1': ['kxk']})


@pytest.mark.parametrize(
    'name', ['repvgg_a0', 'mobileone_s0', 'repvit_m0_9', 'repghostnet_050', 'fastvit_t8', 'ghostnetv3_050', 'shvit_s1']
)
def test_a_network_with_branches_of_its_own_is_pointed_to_its_plain_twin(name):
    if not timm.is_model(name):
        pytest.skip(f'timm {timm.__version__} does not have {name}')
    with pytest.raises(
        ValueError, match=r'with branches of its own, .* Make its plain twin first, plain_twin\(model\)'
    ):
        hyper_search(timm.create_model(name, device='meta'))


@pytest.mark.parametrize('name', ['levit_128s', 'tiny_vit_5m_224', 'nextvit_small', 'efficientnet_b0'])
def test_a_network_that_only_folds_its_normalization_is_converted(name):
    assert repvgg_prior(timm.create_model(name, device='meta'))


def test_a_network_whose_method_merges_no_branches_can_be_marked_as_plain():
    class Net(nn.Sequential):
        def fuse(self):
            """Folds BatchNorm, say."""

    model = Net(nn.Conv2d(4, 4, 3, padding=1))
    with pytest.raises(ValueError, match=r'repopt_timm\.keep_branches\(block\)'):
        Scales.initial(model)
    keep_branches(model)
    assert list(Scales.initial(model)) == ['0']


def test_a_submodule_is_no_method_that_merges_branches():
    neck = nn.ModuleDict({'lateral': nn.Conv2d(4, 4, 1), 'fuse': nn.Conv2d(4, 4, 3, padding=1)})
    assert list(repvgg_prior(neck)) == ['lateral', 'fuse']


def test_convolutions_of_other_dimensions_and_transposed_ones_are_listed():
    others = {'line': nn.Conv1d(4, 4, 3), 'volume': nn.Conv3d(4, 4, 3), 'up': nn.ConvTranspose2d(4, 4, 3)}
    model = nn.ModuleDict({**others, 'plain': nn.Conv2d(4, 4, 3, padding=1)})
    assert [(each.name, each.type) for each in refused_convs(model)] == [
        ('line', 'Conv1d'),
        ('volume', 'Conv3d'),
        ('up', 'ConvTranspose2d'),
    ]
    assert list(repvgg_prior(model)) == ['plain']


def test_a_network_whose_branches_are_merged_is_plain():
    merged = timm.utils.reparameterize_model(timm.create_model('repvgg_a0'))
    assert repvgg_prior(merged)
