import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from repopt_timm import Scales, csla, hyper_search, prepare, to_plain
from repopt_timm.reparam import branches_of, carried_scales, kind_of

from ..helpers import counted_scales


class Neck(nn.Module):
    """A detector's neck: one convolution on several scales of features."""

    def __init__(self):
        super().__init__()
        self.lateral = nn.Conv2d(3, 8, 1)
        self.shared = nn.Conv2d(8, 8, 3, padding=1)
        self.also_shared = self.shared

    def forward(self, x):
        fine = self.shared(self.lateral(x)).relu()
        coarse = self.also_shared(F.avg_pool2d(fine, 2)).relu()
        return torch.cat([fine.mean((2, 3)), coarse.mean((2, 3))], 1)


def conv_net():
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1))


def test_a_twin_differs_in_the_kernels_of_its_convolutions_alone():
    model = timm.create_model('resnet18', num_classes=5).to(torch.bfloat16).eval()
    calls = []
    model.conv1.register_forward_hook(lambda *_: calls.append('hook'))
    model.layer1[0].conv1.note = 'mine'
    model.layer2.requires_grad_(False)
    twin = hyper_search(model)
    assert (kind_of(twin), kind_of(model)) == ('hs', 'target')
    assert all(branches_of(module) for module in twin.modules() if isinstance(module, nn.Conv2d))
    assert twin.pretrained_cfg == model.pretrained_cfg
    assert twin.layer1[0].conv1.note == 'mine'
    assert not twin.training
    assert not any(param.requires_grad for param in twin.layer2.parameters())
    assert {param.dtype for param in twin.parameters()} == {torch.bfloat16}
    assert all(torch.equal(buffer, twin.get_buffer(name)) for name, buffer in model.named_buffers())
    images = torch.randn(1, 3, 64, 64, dtype=torch.bfloat16)
    expected = twin(images)
    assert calls == ['hook']
    plain = to_plain(twin)
    assert list(plain.state_dict()) == list(model.state_dict())
    assert repr(plain) == repr(model)
    assert {type(each) for each in plain.modules() if isinstance(each, nn.Conv2d)} == {nn.Conv2d}
    assert not plain.layer2[0].conv1.weight.requires_grad
    torch.testing.assert_close(plain(images), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_a_plain_convolution_comes_back_as_it_was(layout):
    model, seen = conv_net().to(memory_format=layout), []
    model[0].register_full_backward_hook(lambda *_: seen.append(1))
    model[0].register_buffer('amax', torch.ones(1))
    plain = to_plain(hyper_search(model))
    assert list(plain.state_dict()) == list(model.state_dict())
    assert plain[0].weight.is_contiguous(memory_format=layout)
    plain(torch.randn(1, 4, 5, 5, requires_grad=True)).sum().backward()
    assert seen == [1]


@pytest.mark.parametrize(
    'model',
    [
        lambda: nn.Conv2d(4, 4, 3, padding=1),
        Neck,
        lambda: nn.ModuleDict({'module': conv_net(), 'head': nn.Conv2d(4, 4, 1)}),
        lambda: timm.create_model('resnet18', in_chans=4),
    ],
    ids=['one convolution', 'shared', 'a child called module', 'resnet18'],
)
def test_a_search_starts_from_the_prior_or_from_scales_and_its_plain_network_carries_them(model):
    model = model()
    assert Scales.from_model(hyper_search(model)) == Scales.initial(model)
    scales = counted_scales(model)
    twin = hyper_search(model, scales)
    assert Scales.from_model(twin) == scales == Scales.from_model(to_plain(twin))


def test_a_shared_convolution_stays_shared():
    twin = hyper_search(Neck())
    assert twin.shared is twin.also_shared
    plain = to_plain(twin)
    assert plain.shared is plain.also_shared


def test_a_csla_twin_takes_the_scales_and_counts_that_a_model_carries():
    scales = counted_scales(conv_net(), {'0': {'kxk': 3, '1x1': 1}})
    twin = csla(prepare(conv_net(), scales))
    assert Scales.from_model(twin) == scales == Scales.from_model(to_plain(twin))
    with pytest.raises(ValueError, match='no scales'):
        csla(conv_net())


def test_a_twin_of_some_convolutions_keeps_no_scales_on_the_others():
    model = nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1) for _ in range(2)))
    twin = csla(prepare(model, Scales.initial(model)), {'0': {'kxk': torch.ones(4)}})
    assert list(Scales.from_model(to_plain(twin))) == ['0'] == list(carried_scales(to_plain(twin)))


@pytest.mark.parametrize('convert', [hyper_search, csla])
def test_a_twin_is_not_converted_again_and_a_plain_network_is_plain(convert):
    with pytest.raises(ValueError, match='CSLA convolutions already'):
        convert(hyper_search(conv_net()))
    with pytest.raises(ValueError, match='plain already'):
        to_plain(conv_net())


@pytest.mark.parametrize('prior', [None, {'1': ['kxk']}])
def test_tied_kernels_are_not_silently_untied(prior):
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match=r"'[01]' and '[01]' share one kernel"):
        hyper_search(model, prior)


def test_twins_of_a_wrapped_network_are_those_of_the_network_inside():
    wrapped = nn.DataParallel(conv_net())
    for twin in (csla(wrapped, {'0': {'kxk': torch.ones(4)}}), hyper_search(wrapped)):
        assert type(twin) is nn.Sequential
        assert type(to_plain(nn.DataParallel(twin))) is nn.Sequential
