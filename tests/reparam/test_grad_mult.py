import logging

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

from repopt_timm import RepOptSGD, Scales, build_repopt_sgd, make_grad_mults, prepare

from ..helpers import counted_scales, random_scales, tiny_model

IMAGES = torch.randn(2, 3, 32, 32)
CONV = nn.Conv2d(4, 4, 3, padding=1)
GROUPED = nn.Conv2d(4, 4, 3, padding=1, groups=2)


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_a_mask_lies_in_memory_like_its_kernel_in_float32_or_better(dtype):
    model = tiny_model(scales=random_scales()).to(dtype, memory_format=torch.channels_last)
    for kernel, mask in make_grad_mults(model).items():
        assert (mask.shape, mask.stride(), mask.device) == (kernel.shape, kernel.stride(), kernel.device)
        assert mask.dtype == torch.promote_types(dtype, torch.float32)
        assert not mask.requires_grad


@pytest.mark.parametrize(
    'wrap',
    [
        lambda model: torch.export.export(model, (IMAGES,)).module(),
        torch.fx.symbolic_trace,
        nn.DataParallel,
    ],
    ids=['export', 'fx', 'parallel'],
)
def test_kernels_are_found_by_the_name_of_the_parameter(wrap):
    scales = random_scales()
    model = tiny_model(scales=scales).eval()
    wrapped = wrap(model)
    mults, expected = make_grad_mults(wrapped, scales), make_grad_mults(model)
    named = [{each.name_of(kernel): mask for kernel, mask in each.items()} for each in (mults, expected)]
    torch.testing.assert_close(*named, rtol=0, atol=0)
    assert mults.fingerprint == expected.fingerprint == scales.fingerprint
    RepOptSGD(wrapped.parameters(), lr=0.1, grad_mults=mults)


def graph_of(*convs):
    return torch.export.export(nn.Sequential(*convs), (torch.randn(2, 4, 8, 8),)).module()


def initial(*convs):
    return Scales.initial(nn.Sequential(*convs))


def test_grouped_kernels_of_a_graph_are_found():
    mults = make_grad_mults(graph_of(GROUPED), initial(GROUPED))
    assert torch.equal(*mults.values(), *make_grad_mults(nn.Sequential(GROUPED), initial(GROUPED)).values())


@pytest.mark.parametrize(
    ('model', 'scales', 'thing'),
    [
        (lambda: graph_of(CONV), None, 'No convolution of GraphModule'),
        (lambda: graph_of(CONV), {'0': {'kxk': torch.ones(4)}}, 'for_model'),
        (lambda: graph_of(CONV), initial(CONV, nn.Conv2d(4, 4, 1)), "'1'"),
        (lambda: torch.fx.symbolic_trace(nn.Sequential(nn.ConvTranspose2d(4, 4, 3))), initial(CONV), "'0'"),
        (lambda: nn.Sequential(nn.ConvTranspose2d(4, 4, 3)), initial(CONV), "'0'"),
        (lambda: torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(4, 4, 3, 2, 1))), initial(CONV), "'0'"),
        (lambda: graph_of(nn.Conv2d(4, 4, 5, padding=2)), initial(CONV), r"'0'.*\(4, 4, 5, 5\)"),
        (lambda: graph_of(CONV, GROUPED), initial(CONV, nn.Conv2d(4, 4, 3, padding=1)), r"'1'.*\(4, 2, 3, 3\)"),
        (lambda: tiny_model(), None, 'No convolution'),
        (lambda: tiny_model('_hs'), None, 'CSLA convolution'),
        (lambda: tiny_model('_csla', scales='initial'), None, 'CSLA convolution'),
        (lambda: nn.Sequential(CONV), {'0': {'kxk': torch.zeros(3)}}, "'0'"),
    ],
)
def test_a_kernel_that_scales_are_not_for_is_refused_by_name(model, scales, thing):
    with pytest.raises(ValueError, match=thing):
        make_grad_mults(model(), scales)


@pytest.mark.parametrize(
    'change',
    [
        lambda m: prune.l1_unstructured(m.stem.conv, 'weight', 3),
        lambda m: weight_norm(m.stem.conv),
        lambda m: setattr(m.stem.conv, 'weight', nn.Parameter(m.stem.conv.weight.detach().flatten())),
        lambda m: setattr(m.stem, 'conv', nn.Conv2d(3, 16, 3, 2, 1, bias=False)),
    ],
    ids=['pruned', 'weight norm', 'flattened', 'replaced'],
)
def test_a_kernel_whose_grad_mult_would_be_lost_is_named(change):
    model = tiny_model(scales=random_scales())
    change(model)
    with pytest.raises(ValueError, match=r"'stem\.conv'"):
        make_grad_mults(model)


def test_tied_kernels_need_the_same_scales():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1))
    scales = counted_scales(model)
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match="'0' and '1' share one kernel"):
        make_grad_mults(prepare(model, scales))
    assert len(make_grad_mults(prepare(model, {'0': scales['0'], '1': scales['0']}))) == 1


def test_a_frozen_kernel_a_part_of_the_network_and_a_wrapped_convolution_are_no_mistakes():
    model = tiny_model(scales=random_scales())
    model.stem.requires_grad_(False)
    RepOptSGD((p for p in model.parameters() if p.requires_grad), lr=0.1, grad_mults=make_grad_mults(model))
    assert len(make_grad_mults(model.stages[:2])) == 3
    model.stem.conv = nn.Sequential(model.stem.conv, nn.BatchNorm2d(16))
    assert len(make_grad_mults(model)) == 7


def test_the_log_names_the_convolutions_without_a_grad_mult(caplog):
    detector = nn.ModuleDict({'backbone': tiny_model(), 'neck': nn.Conv2d(128, 8, 1), 'box': nn.Conv2d(8, 4, 2)})
    with caplog.at_level(logging.WARNING):
        build_repopt_sgd(detector, Scales.initial(detector), lr=0.1)
    (line,) = [record.message for record in caplog.records if 'Grad Mult' in record.message]
    assert 'neck' in line
    assert 'box (its kernel size (2, 2) is even' in line
    assert 'backbone' not in line
