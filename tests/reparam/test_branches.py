import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from repopt_timm.reparam import make_branches, make_grad_mults, merge

from ..helpers import counted_scales


@st.composite
def convs(draw):
    """A convolution in float64 and the counts of its branches, of all shapes that the algebra speaks of."""
    groups = draw(st.sampled_from([1, 2, 3]))
    in_channels = groups * draw(st.integers(1, 3))
    out_channels = draw(st.sampled_from([in_channels, groups * draw(st.integers(1, 3))]))
    kernel_size = draw(st.tuples(st.sampled_from([1, 3, 5]), st.sampled_from([1, 3, 5])))
    stride, dilation = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    padding = tuple(dilation * (size - 1) // 2 for size in kernel_size)
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, dtype=torch.float64)
    windows = [(height, width) for height in (1, 3) for width in (1, 3) if (height, width) <= kernel_size]
    fitting = [f'{height}x{width}' for height, width in windows if width <= kernel_size[1]]
    counts = {'kxk': 2} | draw(st.dictionaries(st.sampled_from(['kxk', *fitting]), st.integers(1, 3), max_size=3))
    if in_channels == out_channels and stride == 1 and draw(st.booleans()):
        counts['identity'] = 1
    return conv, counts


def sum_of_branches(conv, branches, operators, scales, x):
    """Each branch as a convolution of its own, `sum_b s_b * sum_i conv(x; theta_i)`."""
    total = conv.bias.view(1, -1, 1, 1)
    for branch in branches:
        margins = [
            (outer - inner) // 2 * conv.dilation[0] for outer, inner in zip(conv.kernel_size, branch.kernel_size)
        ]
        padding = [outer - margin for outer, margin in zip(conv.padding, margins)]
        groups = conv.groups if branch.scaled else conv.out_channels
        for operator in operators[branch.name].chunk(branch.count):
            y = F.conv2d(x, operator, None, conv.stride, padding, conv.dilation, groups)
            total = total + (y * scales[branch.name].view(1, -1, 1, 1) if branch.scaled else y)
    return total


@settings(deadline=None, max_examples=50)
@given(convs())
def test_the_merged_kernel_computes_the_sum_of_the_branches_and_has_its_gradients(given_conv):
    conv, counts = given_conv
    branches = make_branches(counts, conv)
    shapes = {branch.name: branch.operator_shape(conv.weight.shape) for branch in branches}
    operators = {name: torch.randn(shape).double().requires_grad_() for name, shape in shapes.items()}
    scales = {name: torch.randn(conv.out_channels).double().requires_grad_() for name in counts}
    x = torch.randn(2, conv.in_channels, 7, 6, dtype=torch.float64)
    kernel = merge(branches, operators, scales, conv.weight.shape)
    merged = F.conv2d(x, kernel, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    expected = sum_of_branches(conv, branches, operators, scales, x)
    torch.testing.assert_close(merged, expected)
    leaves = [*operators.values(), *(scales[branch.name] for branch in branches if branch.scaled)]
    gradients = [torch.autograd.grad(y.square().sum(), leaves) for y in (merged, expected)]
    torch.testing.assert_close(*gradients)


@settings(deadline=None, max_examples=50)
@given(convs(), st.sampled_from([('sgd', 2), ('adamw', 1)]))
def test_a_grad_mult_adds_up_the_powers_of_the_scales_on_their_supports(given_conv, rule):
    conv, counts = given_conv
    model = nn.Sequential(conv)
    scales = counted_scales(model, {'0': counts})
    expected = torch.zeros_like(conv.weight, requires_grad=False)
    for branch in make_branches(counts, conv):
        (top, left), (height, width) = (
            [(outer - inner) // 2 for outer, inner in zip(conv.kernel_size, branch.kernel_size)],
            branch.kernel_size,
        )
        support = expected[:, :, top : top + height, left : left + width]
        if branch.scaled:
            support += branch.count * scales['0'][branch.name].double().abs().view(-1, 1, 1, 1) ** rule[1]
        else:
            channels = torch.arange(conv.out_channels)
            support[channels, channels % conv.weight.shape[1]] += 1
    torch.testing.assert_close(make_grad_mults(model, scales, rule[0])[conv.weight], expected)


@pytest.mark.parametrize(
    ('arguments', 'branches', 'thing'),
    [
        ({'kernel_size': 3, 'stride': 2}, ['kxk', 'identity'], 'stride'),
        ({'kernel_size': 3}, ['kxk', '5x5'], '5x5'),
        ({'kernel_size': 3}, ['kxk', '2x2'], '2x2'),
        ({'kernel_size': 2}, ['kxk', '1x1'], '1x1'),
        ({'kernel_size': 3}, ['kxk', 'avg'], 'avg'),
        ({'kernel_size': 3}, ['kxk', '1x1', 'kxk'], "'kxk'"),
        ({'kernel_size': 3}, ['1x1'], 'kxk'),
        ({'kernel_size': 3}, {'kxk': 0}, 'kxk'),
        ({'kernel_size': 3}, {'kxk': 1, 'identity': 2}, 'identity'),
    ],
)
def test_branches_that_a_convolution_cannot_have_are_refused_by_name(arguments, branches, thing):
    with pytest.raises(ValueError, match=thing):
        make_branches(branches, nn.Conv2d(4, 4, **arguments))
