import copy

import pytest
import timm
import torch
from timm.data import resolve_data_config
from torch import nn

from repopt_timm import Scales
from repopt_timm.architectures import ARCHITECTURES

from ..helpers import tiny_model
from .test_byobnet import NUMBERS

IMAGES = torch.randn(2, 3, 64, 64)
MILLIONS = {'a0': 8.3, 'a1': 12.8, 'a2': 25.5, 'b0': 14.3, 'b1': 51.8, 'b2': 80.3, 'b3': 111.0, 'l1': 76.0, 'l2': 118.1}


def test_variants_have_their_published_sizes_imagenets_classes_and_the_state_dict_of_a_plain_network():
    bn = ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked')
    for name, architecture in ARCHITECTURES.items():
        model = timm.create_model(name, device='meta')
        convs = {name: module.out_channels for name, module in model.named_modules() if name.endswith('.conv')}
        assert architecture.out_channels() == convs
        size = sum(param.numel() for param in model.parameters()) / 1e6
        assert round(size, 1) == MILLIONS.get(name.removeprefix('repopt_vgg_'), round(size, 1))
        assert model.num_classes == 1000
        assert resolve_data_config({}, model=model)['input_size'] == (3, 224, 224)
        blocks = [conv.removesuffix('.conv') for conv in convs]
        expected = {f'{block}.{key}' for block in blocks for key in ('conv.weight', *(f'bn.{each}' for each in bn))}
        assert {key for key in model.state_dict() if '.attn.' not in key} == expected | {
            'head.fc.weight',
            'head.fc.bias',
        }


@pytest.mark.parametrize(('kind', 'use_se'), [('', True), ('_hs', False)])
def test_checkpointing_changes_nothing_but_what_is_kept(kind, use_se):
    model = tiny_model(kind, use_se=use_se).double()
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing()
    convolutions = []
    twin.stages[1][1].conv.register_forward_hook(lambda *args: convolutions.append(args))
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
    # The merge of a twin's branches needs its kernel again.
    assert len(convolutions) == 1 or kind


@pytest.mark.parametrize(
    ('kind', 'kwargs', 'reductions'),
    [
        ('', {'out_indices': (1, 3)}, [4, 16]),
        ('', {'output_stride': 8}, [2, 4, 8, 8, 8]),
        ('', {'strides': (2, 1, 2, 2, 2)}, [2, 4, 8, 16]),
        ('', {'strides': (1, 1, 2, 2, 2), 'output_stride': 4}, [1, 2, 4, 4]),
        ('_branches', {**NUMBERS, 'drop_path_rate': 0.5}, [1, 2, 4]),
    ],
)
def test_features_have_the_reductions_that_they_claim(kind, kwargs, reductions):
    model = tiny_model(kind, features_only=True, **kwargs).eval()
    assert model.feature_info.reduction() == reductions
    assert [64 // feature.shape[-1] for feature in model(IMAGES)] == reductions
    assert [feature.shape[1] for feature in model(IMAGES)] == model.feature_info.channels()


def test_squeeze_and_excitation_comes_after_the_relu():
    block = tiny_model(use_se=True).stem
    assert [name for name, _ in block.named_children()] == ['conv', 'bn', 'attn']
    assert isinstance(block.bn.act, nn.ReLU)


def test_a_target_starts_by_the_rule_of_initialization():
    kernel = tiny_model(scales=Scales.initial(tiny_model())).stages[1][1].conv.weight
    assert kernel[torch.arange(32), torch.arange(32), 1, 1].mean() > 0.9
