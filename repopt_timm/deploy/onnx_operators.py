"""The operators of exported image classifiers in PyTorch, differentiable."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ['OPERATORS']


def _symmetric(x: Tensor, pads: Sequence[int], value: float) -> tuple[Tensor, list[int]]:
    """Pads what PyTorch's own padding, equal on both sides, cannot; returns what is left for it."""
    top, left, bottom, right = pads
    if (top, left) == (bottom, right):
        return x, [top, left]
    return F.pad(x, (left, right, top, bottom), value=value), [0, 0]


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, **at: Any) -> Tensor:
    x, padding = _symmetric(x, at['pads'], 0.0)
    return F.conv2d(x, weight, bias, at['strides'], padding, at['dilations'], at['group'])


def _max_pool(x: Tensor, **at: Any) -> Tensor:
    x, padding = _symmetric(x, at['pads'], float('-inf'))
    return F.max_pool2d(x, at['kernel_shape'], at['strides'], padding, at['dilations'], bool(at['ceil_mode']))


def _average_pool(x: Tensor, **at: Any) -> Tensor:
    top, left, bottom, right = at['pads']
    if (top, left) != (bottom, right):
        raise NotImplementedError('AveragePool with other padding at the end than at the start')
    counts_padding = bool(at['count_include_pad'])
    return F.avg_pool2d(x, at['kernel_shape'], at['strides'], [top, left], bool(at['ceil_mode']), counts_padding)


def _gemm(a: Tensor, b: Tensor, c: Tensor | None = None, **at: Any) -> Tensor:
    a, b = (a.T if at['transA'] else a), (b.T if at['transB'] else b)
    product = a @ b if at['alpha'] == 1 else at['alpha'] * (a @ b)
    return product if c is None else product + (c if at['beta'] == 1 else at['beta'] * c)


def _reduce_mean(x: Tensor, axes: Tensor | None = None, **at: Any) -> Tensor:
    if axes is None:
        return x if at['noop_with_empty_axes'] else x.mean(tuple(range(x.ndim)), bool(at['keepdims']))
    return x.mean(axes.tolist(), bool(at['keepdims']))


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, **at: Any) -> Tensor:
    return F.layer_norm(x, x.shape[at['axis'] :], weight, bias, at['epsilon'])


def _batch_norm(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, **at: Any) -> Tensor:
    return F.batch_norm(x, mean.detach(), var.detach(), weight, bias, False, 0.0, at['epsilon'])


def _reshape(x: Tensor, shape: Tensor, **at: Any) -> Tensor:
    sizes = shape.tolist()
    return x.reshape([x.shape[i] if size == 0 and not at['allowzero'] else size for i, size in enumerate(sizes)])


def _squeeze(x: Tensor, axes: Tensor | None = None, **_: Any) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(tuple(axes.tolist()))


def _unsqueeze(x: Tensor, axes: Tensor, **_: Any) -> Tensor:
    rank = x.ndim + len(axes)
    for axis in sorted(axis % rank for axis in axes.tolist()):
        x = x.unsqueeze(axis)
    return x


def _slice(
    x: Tensor, starts: Tensor, ends: Tensor, axes: Tensor | None = None, steps: Tensor | None = None, **_: Any
) -> Tensor:
    places = list(range(len(starts))) if axes is None else axes.tolist()
    strides = [1] * len(starts) if steps is None else steps.tolist()
    if min(strides) < 1:
        raise NotImplementedError('Slice with a negative step')
    index = [slice(None)] * x.ndim
    for axis, start, end, step in zip(places, starts.tolist(), ends.tolist(), strides):
        index[axis] = slice(start, end, step)
    return x[tuple(index)]


def _gather(x: Tensor, indices: Tensor, **at: Any) -> Tensor:
    axis, indices = at['axis'] % x.ndim, indices.to(x.device)
    taken = x.index_select(axis, indices.reshape(-1) % x.shape[axis])
    return taken.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


def _split(x: Tensor, sizes: Tensor | None = None, **at: Any) -> tuple[Tensor, ...]:
    if sizes is None:
        return x.chunk(at['num_outputs'], at['axis'])
    return x.split(sizes.tolist(), at['axis'])


def _pad(x: Tensor, pads: Tensor, value: Tensor | None = None, axes: Tensor | None = None, **at: Any) -> Tensor:
    if at['mode'] != 'constant' or axes is not None:
        raise NotImplementedError(f"Pad with mode '{at['mode']}'{'' if axes is None else ' and axes'}")
    half = len(pads) // 2
    pairs = [(pads[axis].item(), pads[axis + half].item()) for axis in reversed(range(half))]
    return F.pad(x, [int(size) for pair in pairs for size in pair], value=0.0 if value is None else value.item())


def _expand(x: Tensor, shape: Tensor, **_: Any) -> Tensor:
    return x.expand(torch.broadcast_shapes(x.shape, shape.tolist()))


def _shape(x: Tensor, **at: Any) -> Tensor:
    end = x.ndim if at['end'] is None else at['end']
    return torch.tensor(x.shape[at['start'] : end], dtype=torch.int64)


def _clip(x: Tensor, low: Tensor | None = None, high: Tensor | None = None, **_: Any) -> Tensor:
    return x.clamp(None if low is None else low.item(), None if high is None else high.item())


_IMAGE = {'pads': [0, 0, 0, 0], 'strides': [1, 1], 'dilations': [1, 1]}

OPERATORS: Mapping[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    'Add': (lambda a, b, **_: a + b, {}),
    'AveragePool': (_average_pool, {**_IMAGE, 'ceil_mode': 0, 'count_include_pad': 0}),
    'BatchNormalization': (_batch_norm, {'epsilon': 1e-5}),
    'Clip': (_clip, {}),
    'Concat': (lambda *parts, **at: torch.cat(parts, at['axis']), {}),
    'Conv': (_conv, {**_IMAGE, 'group': 1}),
    'Div': (lambda a, b, **_: a / b, {}),
    'Erf': (lambda x, **_: x.erf(), {}),
    'Expand': (_expand, {}),
    'Flatten': (lambda x, **at: x.flatten(1) if at['axis'] == 1 else _unsupported_flatten(at['axis']), {'axis': 1}),
    'Gather': (_gather, {'axis': 0}),
    'Gemm': (_gemm, {'alpha': 1.0, 'beta': 1.0, 'transA': 0, 'transB': 0}),
    'GlobalAveragePool': (lambda x, **_: x.mean((2, 3), keepdim=True), {}),
    'HardSigmoid': (lambda x, **at: (at['alpha'] * x + at['beta']).clamp(0, 1), {'alpha': 0.2, 'beta': 0.5}),
    'HardSwish': (lambda x, **_: F.hardswish(x), {}),
    'Identity': (lambda x, **_: x, {}),
    'LayerNormalization': (_layer_norm, {'axis': -1, 'epsilon': 1e-5}),
    'MatMul': (lambda a, b, **_: a @ b, {}),
    'MaxPool': (_max_pool, {**_IMAGE, 'ceil_mode': 0}),
    'Mul': (lambda a, b, **_: a * b, {}),
    'Pad': (_pad, {'mode': 'constant'}),
    'Pow': (lambda a, b, **_: a**b, {}),
    'Range': (lambda start, end, step, **_: torch.arange(start.item(), end.item(), step.item()), {}),
    'ReduceMean': (_reduce_mean, {'keepdims': 1, 'noop_with_empty_axes': 0}),
    'Relu': (lambda x, **_: x.relu(), {}),
    'Reshape': (_reshape, {'allowzero': 0}),
    'Shape': (_shape, {'start': 0, 'end': None}),
    'Sigmoid': (lambda x, **_: x.sigmoid(), {}),
    'Slice': (_slice, {}),
    'Softmax': (lambda x, **at: x.softmax(at['axis']), {'axis': -1}),
    'Split': (_split, {'axis': 0, 'num_outputs': None}),
    'Sqrt': (lambda x, **_: x.sqrt(), {}),
    'Squeeze': (_squeeze, {}),
    'Sub': (lambda a, b, **_: a - b, {}),
    'Tanh': (lambda x, **_: x.tanh(), {}),
    'Transpose': (lambda x, **at: x.permute(at['perm']), {}),
    'Unsqueeze': (_unsqueeze, {}),
}
"""ONNX operator to a function of its inputs and attributes, and the defaults of these attributes."""


def _unsupported_flatten(axis: int) -> Tensor:
    raise NotImplementedError(f'Flatten with axis {axis}')
