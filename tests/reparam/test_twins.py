import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import freeze_batch_norm_2d
from torch import nn

from repopt_timm import Scales, csla, hyper_search, load_scales, make_grad_mults, prepare, push_scales, to_plain
from repopt_timm.optim import RepOptSGD
from repopt_timm.reparam import CSLAConv2d, kind_of

from ..helpers import spread

LARGE = {'kxk': 1, '3x3': 1, '1x1': 1, 'identity': 1}


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


def large_kernels(model):
    return {name: LARGE for name, module in model.named_modules() if name.endswith('conv_dw')}


NETWORKS = {
    'resnet18': (lambda: timm.create_model('resnet18', num_classes=5), None),
    'convnext_atto': (lambda: timm.create_model('convnext_atto', num_classes=5, depths=(1, 1, 2, 1)), large_kernels),
    'regnetx_002': (lambda: timm.create_model('regnetx_002', num_classes=5), None),
    'vgg11_bn': (lambda: timm.create_model('vgg11_bn', num_classes=5, mlp_ratio=1 / 32), None),
    'ghostnet_100': (
        lambda: freeze_batch_norm_2d(timm.create_model('ghostnet_100', num_classes=5, drop_rate=0.0)),
        None,
    ),
    'neck': (Neck, None),
    'test_resnet': (lambda: timm.create_model('test_resnet', num_classes=5), None),
}
LARGE_NETWORKS = ['resnet18', 'convnext_atto', 'regnetx_002', 'vgg11_bn', 'ghostnet_100']


def difference(first, second):
    """Largest relative difference of a tensor; a bias in front of a BatchNorm stays zero but for rounding."""
    pairs = zip(first.state_dict().values(), second.state_dict().values())
    found = [(a - b).norm() / b.norm() for a, b in pairs if a.is_floating_point() and not b.norm() <= 1e-9]
    # Unlike Python's, this maximum of something and NaN is NaN.
    return torch.stack(found).max().item()


@pytest.mark.parametrize(
    'name', ['neck', 'test_resnet', *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE_NETWORKS)]
)
def test_the_csla_twin_under_sgd_is_the_plain_network_under_rep_opt_sgd(name):
    torch.manual_seed(0)
    make, prior = NETWORKS[name]
    model = make().double()
    twin = csla(model, spread(Scales.initial(model, prior)))
    plain = to_plain(twin)
    settings = {'lr': 0.001, 'momentum': 0.9, 'weight_decay': 1e-3, 'nesterov': True}
    optimizers = [
        torch.optim.SGD(twin.parameters(), **settings),
        RepOptSGD(plain.parameters(), grad_mults=make_grad_mults(plain), **settings),
    ]
    before = copy.deepcopy(plain)
    for _ in range(8 if name in LARGE_NETWORKS else 30):
        images, labels = torch.randn(4, 3, 64, 64, dtype=torch.float64), torch.randint(0, 5, (4,))
        for net, optimizer in zip((twin, plain), optimizers):
            optimizer.zero_grad()
            F.cross_entropy(net(images), labels).backward()
            optimizer.step()
    assert difference(plain, to_plain(twin)) < 1e-11
    assert difference(plain, before) > 1e-4


def test_a_twin_differs_in_its_convolutions_alone():
    model = timm.create_model('resnet18', num_classes=5).to(torch.bfloat16).eval()
    model.conv1.register_forward_hook(lambda *_: calls.append('hook'))
    model.layer1[0].conv1.note = 'mine'
    model.layer2.requires_grad_(False)
    calls = []
    twin = hyper_search(model)
    assert not any(type(module) is nn.Conv2d for module in twin.modules())
    assert not any(isinstance(module, CSLAConv2d) for module in model.modules())
    assert twin.pretrained_cfg == model.pretrained_cfg
    assert twin.layer1[0].conv1.note == 'mine'
    assert not twin.training
    assert not any(param.requires_grad for param in twin.layer2.parameters())
    assert {param.dtype for param in twin.parameters()} == {torch.bfloat16}
    assert all(torch.equal(buffer, twin.get_buffer(name)) for name, buffer in model.named_buffers())
    images = torch.randn(1, 3, 64, 64, dtype=torch.bfloat16)
    twin(images)
    assert calls == ['hook']
    plain = to_plain(twin)
    assert list(plain.state_dict()) == list(model.state_dict())
    assert repr(plain) == repr(model)
    assert plain.layer1[0].conv1.note == 'mine'
    assert not plain.layer2[0].conv1.weight.requires_grad
    torch.testing.assert_close(plain(images), twin(images), rtol=0.05, atol=0.05)


def test_a_shared_convolution_stays_shared():
    twin = hyper_search(Neck())
    assert twin.shared is twin.also_shared
    plain = to_plain(twin)
    assert plain.shared is plain.also_shared


def test_a_search_starts_from_scales_or_from_a_prior():
    model = timm.create_model('resnet18')
    scales = spread(Scales.initial(model))
    assert Scales.from_model(hyper_search(model, scales)) == scales
    assert Scales.from_model(hyper_search(model)) == Scales.initial(model)
    small = hyper_search(model, {'layer1.0.conv1': ['kxk', '1x3']})
    assert list(Scales.from_model(small)) == ['layer1.0.conv1']
    assert kind_of(small) == 'hs'


def test_a_csla_twin_of_a_prepared_model_takes_the_scales_that_it_carries():
    model = timm.create_model('resnet18')
    scales = spread(Scales.initial(model))
    assert Scales.from_model(csla(prepare(model, scales))) == scales
    with pytest.raises(ValueError, match='carries no scales'):
        csla(timm.create_model('resnet18'))


@pytest.mark.parametrize('convert', [hyper_search, lambda model: csla(model, {'x': {'kxk': torch.ones(1)}})])
def test_a_twin_is_not_converted_again(convert):
    with pytest.raises(ValueError, match='has CSLA convolutions already'):
        convert(hyper_search(timm.create_model('resnet18')))
    with pytest.raises(ValueError, match='is plain already'):
        to_plain(timm.create_model('resnet18'))


def test_scales_of_any_network_survive_card_file_and_hub(hub, client, tmp_path):
    model = timm.create_model('resnet18', num_classes=5)
    scales = Scales.from_model(hyper_search(model, spread(Scales.initial(model))))
    assert scales.architecture == 'resnet18'
    scales.save(tmp_path / 'scales.safetensors')
    push_scales(scales, 'ann/resnet18-scales')
    client('other', token=None)
    for source in (tmp_path / 'scales.safetensors', 'hf-hub:ann/resnet18-scales'):
        target = timm.create_model('resnet18', num_classes=3)
        prepare(target, load_scales(source, target))
        before = target.conv1.weight.detach().clone()
        settings = {'lr': 0.1, 'momentum': 0.0, 'weight_decay': 0.0, 'nesterov': False}
        optimizer = timm.optim.create_optimizer_v2(target, 'repopt_sgd', **settings)
        target(torch.randn(2, 3, 64, 64)).sum().backward()
        optimizer.step()
        mult = scales['conv1']['kxk'].square().view(-1, 1, 1, 1).expand_as(before).clone()
        mult[:, :, 3:4, 3:4] += scales['conv1']['1x1'].square().view(-1, 1, 1, 1)
        torch.testing.assert_close(target.conv1.weight.detach(), before - 0.1 * mult * target.conv1.weight.grad)


def test_counts_of_carried_scales_are_the_twins():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1))
    scales = Scales.initial(model, {'0': {'kxk': 3}})
    assert Scales.from_model(csla(prepare(model, scales))) == scales


def test_tied_kernels_are_not_silently_untied():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1))
    model[1].weight = model[0].weight
    for prior in (None, {'1': ['kxk']}):
        with pytest.raises(ValueError, match=r"'[01]' and '[01]' share one kernel"):
            hyper_search(model, prior)


def test_full_backward_hooks_and_buffers_of_a_convolution_stay():
    model, seen = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1)), []
    model[0].register_full_backward_hook(lambda *_: seen.append(1))
    model[0].register_buffer('amax', torch.ones(1))
    twin = hyper_search(model)
    twin(torch.randn(1, 4, 5, 5, requires_grad=True)).sum().backward()
    assert seen == [1]
    assert 'amax' in dict(twin[0].named_buffers())
    assert list(to_plain(twin).state_dict()) == list(model.state_dict())


def test_given_scales_survive_a_reset_and_do_not_appear_from_nowhere():
    scales = {'0': {'kxk': torch.full((4,), 3.0)}}
    twin = csla(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1)), scales)
    twin[0].reset_parameters()
    assert twin[0].vectors()['kxk'].eq(3).all()
    with torch.device('meta'):
        model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1))
    empty = csla(model, scales).to_empty(device='cpu')
    empty.load_state_dict({}, strict=False)
    with pytest.raises(ValueError, match='has no scales yet'):
        empty(torch.randn(1, 4, 5, 5))


def test_a_submodule_called_module_is_no_wrapper():
    model = nn.ModuleDict({'module': nn.Sequential(nn.Conv2d(4, 4, 3, padding=1)), 'head': nn.Conv2d(4, 4, 1)})
    scales = Scales.from_model(hyper_search(model))
    assert list(scales) == ['module.0', 'head']
    assert len(make_grad_mults(prepare(model, scales), scales)) == 2


def test_a_shared_convolution_is_once_in_a_checkpoint(tmp_path):
    model = Neck()
    search = hyper_search(model)
    torch.save(search.state_dict(), tmp_path / 'search.pth')
    assert load_scales(tmp_path / 'search.pth', model) == Scales.from_model(search)
    counted = hyper_search(model, {'shared': {'kxk': 2}})
    torch.save(counted.state_dict(), tmp_path / 'counted.pth')
    assert load_scales(tmp_path / 'counted.pth', model).counts == {'shared': {'kxk': 2}}


def test_a_csla_model_without_scales_is_not_saved():
    with pytest.raises(ValueError, match='has no scales yet'):
        csla(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1)), {'0': ['kxk']}).state_dict()


def test_unbatched_images_channels_last_and_float64_work_like_a_convolutions():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1)).to(memory_format=torch.channels_last)
    twin = hyper_search(model)
    twin(torch.randn(4, 5, 5)).sum().backward()
    assert to_plain(twin)[0].weight.is_contiguous(memory_format=torch.channels_last)
    with torch.autocast('cpu', torch.bfloat16):
        assert twin.double()(torch.randn(1, 4, 5, 5).double()).dtype == torch.float64


def test_twins_of_a_wrapped_network_are_those_of_the_network_inside():
    network = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1))
    scales = {'0': {'kxk': torch.ones(4)}}
    wrapped = nn.DataParallel(network)
    for twin in (csla(wrapped, scales), hyper_search(wrapped)):
        assert type(twin) is nn.Sequential
        assert type(to_plain(nn.DataParallel(twin))) is nn.Sequential
