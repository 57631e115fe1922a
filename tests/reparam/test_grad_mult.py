import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import weight_norm

from repopt_timm import Scales, csla, make_grad_mults, prepare
from repopt_timm.optim import RepOptSGD

from ..helpers import random_scales, spread, tiny_model

IMAGES = torch.randn(2, 3, 32, 32)


class FakeQuantize(nn.Module):
    """Rounds in the forward pass and lets gradients through."""

    fake_quantizes = True

    def forward(self, weight):
        return weight + ((weight * 16).round() / 16 - weight).detach()


def dense(mults):
    return {mults.name_of(kernel): mult.dense().expand_as(kernel) for kernel, mult in mults.items()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    'wrap',
    [
        lambda model: torch.export.export(model, (IMAGES,)).module(),
        lambda model: torch.fx.symbolic_trace(model),
        lambda model: torch.compile(model, backend='eager'),
        lambda model: nn.DataParallel(model),
    ],
    ids=['export', 'fx', 'compiled', 'parallel'],
)
def test_kernels_are_found_by_the_name_of_the_parameter(wrap):
    scales = random_scales()
    model = tiny_model(scales=scales).eval()
    wrapped = wrap(model)
    mults = make_grad_mults(wrapped, scales)
    assert_same(dense(mults), dense(make_grad_mults(model)))
    RepOptSGD(wrapped.parameters(), lr=0.1, grad_mults=mults)


def test_a_graph_without_convolutions_asks_for_the_scales():
    exported = torch.export.export(tiny_model(scales=random_scales()), (IMAGES,)).module()
    with pytest.raises(ValueError, match=r'No convolution of GraphModule.*make_grad_mults\(model, scales\)'):
        make_grad_mults(exported)
    with pytest.raises(ValueError, match=r"neither such a convolution nor a parameter 'layer1\.weight'"):
        make_grad_mults(exported, {'layer1': {'kxk': torch.ones(4)}})


def test_a_fake_quantized_kernel_keeps_its_grad_mult():
    scales = random_scales()
    model = tiny_model(scales=scales)
    expected = dense(make_grad_mults(model))
    parametrize.register_parametrization(model.stem.conv, 'weight', FakeQuantize())
    assert_same(dense(make_grad_mults(model)), expected)
    assert_same(dense(make_grad_mults(model, scales)), expected)
    assert model.stem.conv.parametrizations.weight.original in make_grad_mults(model)


def test_a_fake_quantized_kernel_is_initialized_and_not_converted():
    model, plain = (nn.Sequential(nn.Conv2d(3, 8, 3, padding=1)) for _ in range(2))
    parametrize.register_parametrization(model[0], 'weight', FakeQuantize())
    for each in (model, plain):
        torch.manual_seed(0)
        prepare(each, {'0': {'kxk': torch.ones(8)}})
    assert torch.equal(model[0].parametrizations.weight.original, plain[0].weight)
    with pytest.raises(ValueError, match='its weight is fake-quantized'):
        csla(model)


@pytest.mark.parametrize(
    ('kernel', 'branch', 'message'),
    [((8, 4, 3, 3), 'identity', 'does not show whether'), ((4, 4, 4, 4), '1x1', 'needs a centre, which a 4x4 kernel')],
)
def test_a_graph_has_no_branch_that_its_kernel_does_not_prove(kernel, branch, message):
    conv = nn.Conv2d(kernel[1], kernel[0], kernel[2:], padding=1)
    graph = torch.export.export(nn.Sequential(conv), (torch.randn(2, 4, 8, 8),)).module()
    with pytest.raises(ValueError, match=f"module '0'.* {message}"):
        make_grad_mults(graph, {'0': {'kxk': torch.ones(len(conv.weight)), branch: torch.ones(len(conv.weight))}})


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda m: prune.l1_unstructured(m.stem.conv, 'weight', 3), "'stem.conv' .*pruned or weight-normalized"),
        (lambda m: weight_norm(m.stem.conv), "'stem.conv' .*a parametrization computes its weight"),
        (
            lambda m: setattr(m.stem.conv, 'weight', nn.Parameter(m.stem.conv.weight.detach().flatten())),
            r"'stem.conv' .*shape \(\d+,\).* FSDP1.*before sharding",
        ),
        (
            lambda m: setattr(m.stem, 'conv', nn.Conv2d(3, 16, 3, 2, 1, bias=False)),
            "'stem.conv' of RepOptVgg got scales, but a Conv2d without them has taken its place",
        ),
    ],
    ids=['pruned', 'weight norm', 'flattened', 'replaced'],
)
def test_a_kernel_whose_grad_mult_would_be_lost_is_named(change, message):
    model = tiny_model(scales=random_scales())
    change(model)
    with pytest.raises(ValueError, match=message):
        make_grad_mults(model)


def test_tied_kernels_need_the_same_scales():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1))
    model[1].weight = model[0].weight
    scales = Scales.initial(model, {'0': ['kxk', '1x1'], '1': ['kxk', '1x1']})
    with pytest.raises(ValueError, match="'0' and '1' share one kernel, but have different scales"):
        make_grad_mults(prepare(model, spread(scales)))
    same = {'0': scales['0'], '1': scales['0']}
    assert len(make_grad_mults(prepare(model, same))) == 1


def test_a_frozen_kernel_and_a_part_of_the_network_are_not_mistakes():
    model = timm.create_model('test_repopt_vgg', scales=random_scales())
    model.stem.requires_grad_(False)
    RepOptSGD((p for p in model.parameters() if p.requires_grad), lr=0.1, grad_mults=make_grad_mults(model))
    assert len(make_grad_mults(model.stages[:2])) == 3


@pytest.mark.parametrize(('rule', 'power'), [('sgd', 2), ('adamw', 1)])
def test_a_count_multiplies_its_branch(rule, power):
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1))
    scales = Scales('', {'0': {'kxk': torch.full((4,), -3.0)}}, counts={'0': {'kxk': 5}})
    (mult,) = make_grad_mults(model, scales, rule).values()
    assert mult.dense().eq(5 * 3.0**power).all()


@pytest.mark.parametrize(
    ('other', 'message'),
    [
        (lambda: nn.Conv2d(4, 4, 5, padding=2), r"'1' of .*3x3.*, but its kernel here has the shape \(4, 4, 5, 5\)"),
        (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=2), r'its kernel here has the shape \(4, 2, 3, 3\)'),
    ],
)
def test_kernels_found_by_name_have_to_be_those_of_the_search(other, message):
    def net(conv):
        return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), conv)

    scales = Scales.initial(net(nn.Conv2d(4, 4, 3, padding=1)))
    exported = torch.export.export(net(other()), (torch.randn(1, 4, 8, 8),)).module()
    with pytest.raises(ValueError, match=message):
        make_grad_mults(exported, scales)


def test_modules_that_are_not_convolutions_are_not_found_by_name():
    scales = {'0': {'kxk': torch.ones(4)}}
    with pytest.raises(ValueError, match="neither such a convolution nor a parameter '0"):
        make_grad_mults(nn.Sequential(nn.ConvTranspose2d(4, 4, 3)), scales)
    with pytest.raises(ValueError, match='are a list, expected Scales or a mapping'):
        prepare(nn.Sequential(nn.Conv2d(4, 4, 3)), [('0', {'kxk': torch.ones(4)})])


def test_a_scaled_convolution_may_be_wrapped():
    model = tiny_model(scales=random_scales())
    model.stem.conv = nn.Sequential(model.stem.conv, nn.BatchNorm2d(16))
    assert len(make_grad_mults(model)) == 7
