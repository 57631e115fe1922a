"""An ONNX classifier as a PyTorch module: its weights train, and round wherever the file quantizes."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .onnx_operators import OPERATORS
from .onnx_plan import Bias, Operation, Rounding, Step, Weight, read_plan
from .runtime import require

__all__ = ['OnnxNetwork']

_LARGEST_BIAS = 2**31 - 1

# Highest code of 7 bits: from there on ranges are those of ONNX Runtime.
_EXACT_LEVELS = 64

# Of a weight's largest value, which few codes reach only if the others share one.
_SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)


class OnnxNetwork(nn.Module):
    """Runs the graph of an ONNX file, from images to logits, with PyTorch's operators.

    Weights and activations are rounded where the file has a QuantizeLinear or a DequantizeLinear. Gradients pass
    straight through, except where a value is outside of the range. Ranges of activations are those of the file. A
    weight's scale follows its largest value: in 8 bits its range ends there, as in the file, and in fewer at that share
    of it which rounds the weight as it is now with the least error. There are no modes: an exported file has neither
    Dropout nor batch statistics.

    Parameters are the float weights under the names that the file gives them, so that those of a convolution are
    `<module>.weight`.

    Args:
        model: An `onnx.ModelProto`, in QDQ format or without any rounding.
        floats: The constants of the model before it was quantized, see `onnx_graph.constants_of`. Defaults to its own.
        weight_bits: Width of the weights of layers, 8 as in the file, or fewer.

    Raises:
        ValueError: If one of its operators is unknown here, or a code cannot be traced to a weight.
    """

    activation_scales: Tensor
    activation_zeros: Tensor

    def __init__(self, model: Any, floats: Mapping[str, np.ndarray] | None = None, weight_bits: int = 8):
        super().__init__()
        plan = read_plan(model, floats, weight_bits)
        self._input, self._output, self._steps = plan.input, plan.output, plan.steps
        for name, (values, learns) in plan.parameters.items():
            _put(self, name, nn.Parameter(torch.from_numpy(values.copy()), requires_grad=learns))
        # Numbers, which go with tensors of any device, and shapes, which stay on the CPU.
        self._constants = {
            name: torch.tensor(values.item() if values.size == 1 and values.dtype == np.float32 else values)
            for name, values in plan.constants.items()
        }
        # Not in checkpoints: a resumed run, too, trains with the ranges that its file will have.
        self.register_buffer('activation_scales', torch.tensor(plan.scales, dtype=torch.float32), persistent=False)
        self.register_buffer('activation_zeros', torch.tensor(plan.zeros, dtype=torch.int32), persistent=False)
        self._weights = {step.output: step for step in self._steps if isinstance(step, Weight)}
        self._biases = {step.weight: step for step in self._steps if isinstance(step, Bias)}
        for step in self._weights.values():
            if step.levels < _EXACT_LEVELS:
                share = _best_share(self.get_parameter(step.name), step)
                _put(self, f'{step.name}_share', share)
        self._last_uses = _last_uses(self._steps, self._output)

    def forward(self, images: Tensor) -> Tensor:
        """Maps images, float of shape (N, C, H, W), to logits of shape (N, classes)."""
        parameters = dict(self.named_parameters())
        scales = {name: self._weight_scale(step) for name, step in self._weights.items()}
        values: dict[str, Any] = {'': None, **self._constants, **parameters, self._input: images}
        for step, unused in zip(self._steps, self._last_uses):
            if isinstance(step, Operation):
                function = OPERATORS[step.operator][0]
                found = function(*(values[name] for name in step.inputs), **step.attributes)
                values.update(zip(step.outputs, found if isinstance(found, tuple) else (found,)))
            elif isinstance(step, Rounding):
                values[step.output] = self._rounded(values[step.name], step)
            elif isinstance(step, Weight):
                values[step.output] = _fake_quantize(values[step.name], scales[step.output], step.axis, step.levels)
            else:
                scale = step.input_scale * scales[step.weight]
                values[step.output] = _fake_quantize(values[step.name], scale, 0 if scale.ndim else None, _LARGEST_BIAS)
            # Images at full resolution fill the memory, batches of them.
            for name in unused:
                del values[name]
        return values[self._output]

    def _rounded(self, tensor: Tensor, step: Rounding) -> Tensor:
        scale, zero = self.activation_scales[step.index], self.activation_zeros[step.index]
        return torch.fake_quantize_per_tensor_affine(tensor, scale, zero, *step.limits)

    @torch.no_grad()
    def _weight_scale(self, step: Weight) -> Tensor:
        weight = self.get_parameter(step.name)
        dims = [axis for axis in range(weight.ndim) if axis != step.axis]
        scale = weight.abs().amax(dims) / step.levels
        if step.levels < _EXACT_LEVELS:
            scale = scale * self.get_buffer(f'{step.name}_share')
        if (bias := self._biases.get(step.output)) is not None:
            # A channel of next to nothing has a bias all the same, which is to fit into 32 bits of its scale.
            least = self.get_parameter(bias.name).abs() / (bias.input_scale * _LARGEST_BIAS / 2)
            scale = torch.maximum(scale, least if step.axis is not None else least.max())
        return torch.where(scale > 0, scale, 1.0)

    @torch.no_grad()
    def write_to(self, model: Any) -> Any:
        """Returns a copy of the file with the weights as they are now, and their scales.

        Args:
            model: The `onnx.ModelProto` that this network was made of.
        """
        constants: dict[str, np.ndarray] = {name: _array(value) for name, value in self.named_parameters()}
        for step in self._steps:
            if isinstance(step, Operation):
                continue
            if isinstance(step, Rounding):
                if step.codes:
                    scale, zero = self.activation_scales[step.index], self.activation_zeros[step.index]
                    codes = (self.get_parameter(step.name) / scale).round() + zero
                    constants[step.codes] = _array(codes.clamp(*step.limits))
                continue
            weight = step if isinstance(step, Weight) else self._weights[step.weight]
            scale = self._weight_scale(weight) * (1.0 if isinstance(step, Weight) else step.input_scale)
            values = self.get_parameter(step.name)
            axis = weight.axis if isinstance(step, Weight) else 0
            step_sizes = scale.reshape([-1 if axis == place else 1 for place in range(values.ndim)])
            codes = (values.double() / step_sizes.double()).round()
            if isinstance(step, Weight):
                codes = codes.clamp(-step.levels, step.levels)
            # A weight in float is rounded by the file, to 8 bits: to these codes if it is a multiple of the scale.
            constants[step.codes] = _array(codes * step_sizes if step.codes == step.name else codes)
            constants[step.scale] = _array(scale)
        return _with_constants(model, constants)


def _fake_quantize(tensor: Tensor, scale: Tensor, axis: int | None, levels: int) -> Tensor:
    zero = torch.zeros_like(scale, dtype=torch.int32)
    if axis is None:
        return torch.fake_quantize_per_tensor_affine(tensor, scale, zero, -levels, levels)
    return torch.fake_quantize_per_channel_affine(tensor, scale, zero, axis, -levels, levels)


@torch.no_grad()
def _best_share(weight: Tensor, step: Weight) -> Tensor:
    """Returns where the range of each channel, or of all, is to end for the least squared error of rounding."""
    dims = [axis for axis in range(weight.ndim) if axis != step.axis]
    largest = weight.abs().amax(dims, keepdim=True).clamp(min=1e-30)
    best = torch.ones_like(largest)
    least = torch.full_like(largest, float('inf'))
    for share in _SHARES:
        size = largest * share / step.levels
        rounded = (weight / size).round().clamp(-step.levels, step.levels) * size
        error = (rounded - weight).square().sum(dims, keepdim=True)
        best = torch.where(error < least, share, best)
        least = torch.minimum(error, least)
    return best.flatten() if step.axis is not None else best.reshape(())


def _put(root: nn.Module, name: str, tensor: Tensor) -> None:
    """Registers a parameter or buffer under a name with dots."""
    *path, last = name.split('.')
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    if isinstance(tensor, nn.Parameter):
        root.register_parameter(last, tensor)
    else:
        root.register_buffer(last, tensor)


def _last_uses(steps: list[Step], output: str) -> list[list[str]]:
    """Returns for each step the names of what no later one reads."""
    read: set[str] = {output, ''}
    unused: list[list[str]] = []
    made = {name for step in steps for name in (step.outputs if isinstance(step, Operation) else (step.output,))}
    for step in reversed(steps):
        names = step.inputs if isinstance(step, Operation) else (step.name,)
        unused.append(list({name for name in names if name in made} - read))
        read |= set(names)
    return unused[::-1]


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()


def _with_constants(model: Any, constants: Mapping[str, np.ndarray]) -> Any:
    numpy_helper = require('onnx.numpy_helper')
    copy = type(model)()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        if tensor.name in constants:
            before = numpy_helper.to_array(tensor)
            values = constants[tensor.name].astype(before.dtype).reshape(before.shape)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return copy
