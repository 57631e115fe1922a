import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from repopt_timm.reparam import Branch, CSLAConv2d, embed, make_grad_mults
from repopt_timm.reparam.branches import make_branches
from repopt_timm.reparam.prior import repvgg_branches

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4}


@st.composite
def convs(draw):
    """Convolutions that can have centred branches, of all shapes that the algebra speaks of."""
    groups = draw(st.sampled_from([1, 2, 3]))
    in_channels = groups * draw(st.integers(1, 3))
    out_channels = draw(st.sampled_from([in_channels, groups * draw(st.integers(1, 3))]))
    kernel_size = draw(st.tuples(st.sampled_from([1, 3, 5]), st.sampled_from([1, 3, 5])))
    dilation = draw(st.integers(1, 2))
    padding = tuple(dilation * (size - 1) // 2 for size in kernel_size)
    return nn.Conv2d(
        in_channels,
        out_channels,
        kernel_size,
        stride=draw(st.integers(1, 2)),
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
        dtype=draw(st.sampled_from([torch.float32, torch.float64])),
    )


def csla(conv, **kwargs):
    """A CSLA convolution with scales that differ from channel to channel."""
    module = CSLAConv2d(conv, repvgg_branches(conv), **kwargs)
    module.set_vectors({name: torch.randn(conv.out_channels) + 0.1 for name in module.branches})
    return module


def separately(module, x):
    """The sum of the branches' outputs, each branch a convolution of its own."""
    total = 0 if module.bias is None else module.bias.view(1, -1, 1, 1)
    for name, operator in module.branches.items():
        window = operator.weight.shape[2:]
        padding = [
            outer - (d * (size - inner)) // 2
            for outer, d, size, inner in zip(module.padding, module.dilation, module.kernel_size, window)
        ]
        groups = module.out_channels if name == 'identity' else module.groups
        y = F.conv2d(x, operator.weight, None, module.stride, padding, module.dilation, groups)
        total = total + (y if name == 'identity' else y * operator.scale.view(1, -1, 1, 1))
    return total


@settings(deadline=None)
@given(convs())
def test_one_merged_convolution_is_the_sum_of_the_branches(conv):
    module = csla(conv)
    x = torch.randn(2, conv.in_channels, 9, 8, dtype=conv.weight.dtype)
    torch.testing.assert_close(module(x), separately(module, x), atol=TOLERANCE[x.dtype], rtol=TOLERANCE[x.dtype])


@settings(deadline=None)
@given(convs(), st.booleans())
def test_its_gradients_are_those_of_the_branches(conv, trainable_scales):
    module = csla(conv, trainable_scales=trainable_scales)
    x = torch.randn(2, conv.in_channels, 9, 8, dtype=conv.weight.dtype, requires_grad=True)
    inputs = [x, *module.parameters()]
    merged = torch.autograd.grad(module(x).square().sum(), inputs)
    expected = torch.autograd.grad(separately(module, x).square().sum(), inputs)
    torch.testing.assert_close(merged, expected, rtol=10 * TOLERANCE[x.dtype], atol=1e3 * TOLERANCE[x.dtype])


@settings(deadline=None)
@given(convs())
def test_a_step_on_the_branches_moves_the_kernel_by_grad_mult_times_gradient(conv):
    module = csla(conv)
    plain = module.to_conv()
    x = torch.randn(2, conv.in_channels, 9, 8, dtype=conv.weight.dtype)
    for net in (module, plain):
        net(x).square().sum().backward()
    with torch.no_grad():
        before = module.kernel()
        for operator in module.branches.values():
            operator.weight -= operator.weight.grad
        moved = before - module.kernel()
    mult = make_grad_mults(nn.Sequential(plain), {'0': module.vectors()})[plain.weight]
    expected = mult.multiply(plain.weight.grad)
    torch.testing.assert_close(moved, expected, rtol=10 * TOLERANCE[x.dtype], atol=10 * TOLERANCE[x.dtype] * 1e2)


@settings(deadline=None)
@given(convs(), st.sampled_from(['sgd', 'adamw']))
def test_a_grad_mult_is_the_sum_of_scaled_support_masks(conv, update_rule):
    vectors = csla(conv).vectors()
    expected = torch.zeros_like(conv.weight)
    for name, vector in vectors.items():
        branch = Branch.of(name, conv.kernel_size)
        operator = torch.ones(branch.operator_shape(conv.weight.shape), dtype=conv.weight.dtype)
        mask = embed(operator, conv.weight.shape, branch)
        power = {'sgd': 2, 'adamw': 1}[update_rule]
        expected += mask if name == 'identity' else vector.abs().view(-1, 1, 1, 1) ** power * mask
    mult = make_grad_mults(nn.Sequential(conv), {'0': vectors}, update_rule)[conv.weight]
    torch.testing.assert_close(mult.dense().expand_as(expected), expected)
    half = conv.out_channels // 2
    torch.testing.assert_close(mult.rows(half, conv.out_channels).dense().expand_as(expected[half:]), expected[half:])


def test_the_identity_of_a_grouped_convolution_lies_on_each_groups_diagonal():
    conv = nn.Conv2d(6, 6, 3, padding=1, groups=2, bias=False)
    x = torch.randn(1, 6, 5, 5)
    with torch.no_grad():
        conv.weight.copy_(embed(torch.ones(6, 1, 1, 1), conv.weight.shape, Branch.of('identity', (3, 3))))
    torch.testing.assert_close(conv(x), x)


def test_a_branch_of_another_window_is_named_by_its_size():
    assert Branch.of('1x3', (3, 3)) == Branch('1x3', (1, 3))


@pytest.mark.parametrize(
    ('arguments', 'branch', 'message'),
    [
        ({'kernel_size': 3, 'padding': 1, 'stride': 2}, 'identity', 'stride'),
        ({'kernel_size': 3, 'padding': 1}, '5x5', 'does not fit'),
        ({'kernel_size': 3, 'padding': 1}, 'avg', 'Unknown branch'),
    ],
)
def test_a_branch_that_cannot_be_embedded_is_refused(arguments, branch, message):
    with pytest.raises(ValueError, match=message):
        make_branches([branch], nn.Conv2d(4, 4, **arguments))


def test_two_branches_of_one_name_are_refused_in_favour_of_a_count():
    with pytest.raises(ValueError, match=r"'kxk' is listed 2 times. Write \{'kxk': 2\}"):
        make_branches(['kxk', '1x1', 'kxk'], nn.Conv2d(4, 4, 3, padding=1))


def test_a_block_has_an_identity_only_where_shapes_allow_it():
    assert list(repvgg_branches(nn.Conv2d(8, 8, 3))) == ['1x1', 'identity', 'kxk']
    assert list(repvgg_branches(nn.Conv2d(8, 8, 3, stride=2))) == ['1x1', 'kxk']
    assert list(repvgg_branches(nn.Conv2d(4, 8, 1))) == ['kxk']
