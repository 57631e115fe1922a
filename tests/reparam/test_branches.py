import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from repopt_timm.reparam import Branch, GradMults, embed, make_branches, make_grad_mults, merge

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
    windows = [f'{height}x{width}' for height in (1, 3) for width in (1, 3)]
    fitting = [name for name in windows if all(int(a) <= b for a, b in zip(name.split('x'), kernel_size))]
    counts = draw(st.dictionaries(st.sampled_from(['kxk', *fitting]), st.integers(1, 3), max_size=3)) | {'kxk': 2}
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
        groups = conv.out_channels if branch.diagonal else conv.groups
        for operator in operators[branch.name].chunk(branch.count):
            y = F.conv2d(x, operator, None, conv.stride, padding, conv.dilation, groups)
            total = total + (y * scales[branch.name].view(1, -1, 1, 1) if branch.scaled else y)
    return total


def drawn(conv, counts):
    branches = make_branches(counts, conv)
    operators = {
        branch.name: torch.randn(branch.operator_shape(conv.weight.shape), dtype=torch.float64, requires_grad=True)
        for branch in branches
    }
    scales = {name: torch.randn(conv.out_channels, dtype=torch.float64, requires_grad=True) for name in counts}
    return branches, operators, scales, torch.randn(2, conv.in_channels, 7, 6, dtype=torch.float64)


@settings(deadline=None)
@given(convs())
def test_the_merged_kernel_computes_the_sum_of_the_branches_and_has_its_gradients(given_conv):
    conv, counts = given_conv
    branches, operators, scales, x = drawn(conv, counts)
    kernel = merge(branches, operators, scales, conv.weight.shape)
    merged = F.conv2d(x, kernel, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    expected = sum_of_branches(conv, branches, operators, scales, x)
    torch.testing.assert_close(merged, expected)
    leaves = [*operators.values(), *(scales[branch.name] for branch in branches if branch.scaled)]
    torch.testing.assert_close(
        torch.autograd.grad(merged.square().sum(), leaves), torch.autograd.grad(expected.square().sum(), leaves)
    )


@settings(deadline=None)
@given(convs())
def test_a_step_on_the_branches_moves_the_kernel_by_grad_mult_times_gradient(given_conv):
    conv, counts = given_conv
    branches, operators, _, x = drawn(conv, counts)
    model = nn.Sequential(conv)
    scales = counted_scales(model, {'0': counts})
    before = merge(branches, operators, scales['0'], conv.weight.shape)
    with torch.no_grad():
        conv.weight.copy_(before)
    conv(x).square().sum().backward()
    sum_of_branches(conv, branches, operators, scales['0'], x).square().sum().backward()
    with torch.no_grad():
        stepped = {name: operator - operator.grad for name, operator in operators.items()}
        moved = before - merge(branches, stepped, scales['0'], conv.weight.shape)
    mults: GradMults = make_grad_mults(model, scales)
    torch.testing.assert_close(moved, mults[conv.weight] * conv.weight.grad)


@settings(deadline=None)
@given(convs(), st.sampled_from([('sgd', 2), ('adamw', 1)]))
def test_a_grad_mult_adds_up_the_powers_of_the_scales_on_their_supports(given_conv, rule):
    conv, counts = given_conv
    model = nn.Sequential(conv)
    scales = counted_scales(model, {'0': counts})
    expected = torch.zeros_like(conv.weight)
    for name, count in counts.items():
        rows, columns = ((outer - inner) // 2 for outer, inner in zip(conv.kernel_size, _window(name, conv)))
        support = expected[:, :, rows : conv.kernel_size[0] - rows, columns : conv.kernel_size[1] - columns]
        if name == 'identity':
            for channel in range(conv.out_channels):
                support[channel, channel % conv.weight.shape[1]] += 1
        else:
            support += count * scales['0'][name].double().abs().view(-1, 1, 1, 1) ** rule[1]
    torch.testing.assert_close(make_grad_mults(model, scales, rule[0])[conv.weight], expected.detach())


def _window(name, conv):
    return {'kxk': conv.kernel_size, 'identity': (1, 1)}.get(name) or tuple(map(int, name.split('x')))


def test_the_identity_of_a_grouped_convolution_lies_on_each_groups_diagonal():
    conv = nn.Conv2d(6, 6, 3, padding=1, groups=2, bias=False)
    x = torch.randn(1, 6, 5, 5)
    with torch.no_grad():
        conv.weight.copy_(embed(torch.ones(6, 1, 1, 1), conv.weight.shape, Branch.of('identity', (3, 3))))
    torch.testing.assert_close(conv(x), x)


@pytest.mark.parametrize('channels_last', [False, True])
def test_operators_are_drawn_as_pytorch_draws_a_convolution(channels_last):
    kernel = torch.empty(64, 32, 3, 3)
    kernel = kernel.to(memory_format=torch.channels_last) if channels_last else kernel
    for name, fan_in in (('kxk', 9 * 32), ('1x1', 32)):
        operator = Branch.of(name, (3, 3), count=4).draw(kernel)
        assert operator.shape[0] == 4 * 64
        assert operator.abs().max() <= fan_in**-0.5
        assert operator.std().item() == pytest.approx((3 * fan_in) ** -0.5, rel=0.05)
        assert not torch.equal(operator[:64], operator[64:128])
        assert operator.is_contiguous(memory_format=torch.channels_last) or not channels_last
    assert Branch.of('identity', (3, 3)).draw(kernel).eq(1).all()


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
        ({'kernel_size': 3}, 'kxk', 'kxk'),
        ({'kernel_size': 3}, {'kxk': 0}, 'kxk'),
        ({'kernel_size': 3}, {'kxk': 1, 'identity': 2}, 'identity'),
    ],
)
def test_branches_that_a_convolution_cannot_have_are_refused_by_name(arguments, branches, thing):
    with pytest.raises(ValueError, match=thing):
        make_branches(branches, nn.Conv2d(4, 4, **arguments))
