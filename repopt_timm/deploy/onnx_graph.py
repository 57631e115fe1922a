"""Lookups in ONNX graphs: layers, their kernels by channel, and who reads what."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from .runtime import require

__all__ = ['LAYERS', 'Graph', 'constants_of', 'layers_of', 'next_layer', 'with_outputs']

LAYERS = ('Conv', 'ConvTranspose', 'Gemm', 'MatMul')

# f(s x) = s f(x) for s > 0, channel by channel.
_HOMOGENEOUS = {
    'AveragePool',
    'Dropout',
    'Flatten',
    'GlobalAveragePool',
    'GlobalMaxPool',
    'Identity',
    'LeakyRelu',
    'MaxPool',
    'ReduceMax',
    'ReduceMean',
    'Relu',
    'Reshape',
}


def layers_of(model: Any) -> dict[str, Any]:
    """Lists the nodes with weights, by the name of the module that they come from, in the order of the network.

    Args:
        model: A float `onnx.ModelProto`.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    layers = {}
    for node in model.graph.node:
        if node.op_type in LAYERS and node.input[1] in constants:
            name = node.input[1].removesuffix('.weight')
            # Other weights are shared, or constants that the exporter made.
            layers[node.name if name == node.input[1] or name in layers else name] = node
    return layers


def constants_of(model: Any) -> dict[str, np.ndarray]:
    """Returns the initializers of an `onnx.ModelProto` by name."""
    numpy_helper = require('onnx.numpy_helper')
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def with_outputs(model: Any, names: Iterable[str]) -> Any:
    """Returns a copy of an `onnx.ModelProto` that gives these tensors too."""
    copy = type(model)()
    copy.CopyFrom(model)
    present = {value.name for value in copy.graph.output}
    copy.graph.output.extend(
        require('onnx.helper').make_empty_tensor_value_info(name) for name in names if name not in present
    )
    return copy


def next_layer(model: Any, layer: str) -> str:
    """Returns the first layer that the output of a layer goes to, through whatever stands between; '' if none."""
    layers = layers_of(model)
    names = {node.name: name for name, node in layers.items()}
    reached = set(layers[layer].output)
    for node in model.graph.node:
        if reached.intersection(node.input):
            if node.name in names:
                return names[node.name]
            reached |= set(node.output)
    return ''


class Graph:
    """A copy of a float model whose kernels and biases can be changed.

    Attributes:
        layers: See `layers_of`.
    """

    def __init__(self, model: Any):
        self._model = type(model)()
        self._model.CopyFrom(model)
        self.layers = layers_of(self._model)
        self._constants = constants_of(self._model)
        self._changed: dict[str, np.ndarray] = {}
        self._outputs = {value.name for value in model.graph.output}
        self._consumers: dict[str, list[Any]] = {}
        for node in self._model.graph.node:
            for name in node.input:
                self._consumers.setdefault(name, []).append(node)
        self._uses = Counter(name for node in self._model.graph.node for name in node.input)
        self._names = {node.name: name for name, node in self.layers.items()}

    @property
    def model(self) -> Any:
        """The `onnx.ModelProto` with all changes."""
        numpy_helper = require('onnx.numpy_helper')
        for tensor in self._model.graph.initializer:
            if tensor.name in self._changed:
                tensor.CopyFrom(numpy_helper.from_array(self._changed[tensor.name], tensor.name))
        return self._model

    def kernel(self, layer: str) -> np.ndarray | None:
        """Returns a layer's kernel, to be changed in place; None if there is an `obstacle`.

        Returns:
            A view of shape (groups, outputs of a group, inputs of a group, taps).
        """
        if self.obstacle(layer):
            return None
        node = self.layers[layer]
        weight = self._writable(node.input[1])
        if node.op_type == 'Conv':
            groups = self._attribute(node, 'group', 1)
            return weight.reshape(groups, len(weight) // groups, weight.shape[1], -1)
        matrix = weight if self._attribute(node, 'transB', 0) else weight.T
        return matrix[None, :, :, None]

    def obstacle(self, layer: str) -> str:
        """Returns why a layer has no `kernel`: its operator or `shared kernel`; '' if it has one."""
        node = self.layers[layer]
        if node.op_type not in ('Conv', 'Gemm'):
            return node.op_type
        if node.op_type == 'Gemm' and not self._is_linear(node):
            return 'Gemm'
        return 'shared kernel' if self._uses[node.input[1]] > 1 else ''

    def _is_linear(self, node: Any) -> bool:
        """Returns whether a Gemm is a product with a bias for each output, and nothing more."""
        factors = [self._attribute(node, name, 1.0) for name in ('alpha', 'beta')]
        outputs = self._constants[node.input[1]].shape[0 if self._attribute(node, 'transB', 0) else 1]
        bias = self._constants.get(node.input[2]) if len(node.input) > 2 and node.input[2] else np.empty(outputs)
        return (
            factors == [1, 1] and not self._attribute(node, 'transA', 0) and bias is not None and bias.size == outputs
        )

    def bias(self, layer: str, create: bool = False) -> np.ndarray | None:
        """Returns a layer's bias, to be changed in place; None if it has none.

        Args:
            layer: Name of a layer that has a kernel.
            create: Give it a bias of 0 in place of none.
        """
        node = self.layers[layer]
        present = len(node.input) > 2 and node.input[2] in self._constants
        if not present and not create:
            return None
        if not present or self._uses[node.input[2]] > 1:
            kernel = self.kernel(layer)
            assert kernel is not None
            old = self._constants[node.input[2]] if present else np.zeros(kernel.shape[0] * kernel.shape[1])
            name = f'{layer}.bias.own'
            self._add(name, old.astype(kernel.dtype))
            del node.input[2:]
            node.input.append(name)
            self._uses[name] = 1
        return self._writable(node.input[2])

    def has_padding(self, layer: str) -> bool:
        """Returns whether zeros around an input become part of what a layer sees."""
        node = self.layers[layer]
        automatic = self._attribute(node, 'auto_pad', b'NOTSET')
        return any(self._attribute(node, 'pads', ())) or automatic not in (b'NOTSET', b'VALID')

    def readers(self, layer: str) -> tuple[list[str], str]:
        """Finds what reads a layer's output through nothing but positively homogeneous operators.

        Returns:
            Names of layers, and the reason if they are not all that reads it: an operator, or `output`.
        """
        found: list[str] = []
        pending = [self.layers[layer].output[0]]
        while pending:
            tensor = pending.pop()
            if tensor in self._outputs:
                return found, 'output'
            for node in self._consumers.get(tensor, []):
                name = self._names.get(node.name)
                if name is not None and tensor == node.input[0] and tensor not in node.input[1:]:
                    found.append(name)
                elif node.op_type in _HOMOGENEOUS and tensor == node.input[0] and self._keeps_channels(node):
                    pending.append(node.output[0])
                else:
                    return found, node.op_type
        return list(dict.fromkeys(found)), ''

    def _keeps_channels(self, node: Any) -> bool:
        if node.op_type in ('ReduceMax', 'ReduceMean'):
            axes = self._constants.get(node.input[1]) if len(node.input) > 1 else self._attribute(node, 'axes', ())
            return axes is not None and len(axes) > 0 and {int(axis) for axis in axes} <= {-2, -1, 2, 3}
        if node.op_type == 'Flatten':
            return self._attribute(node, 'axis', 1) == 1
        if node.op_type == 'Reshape':
            # To (batch, features).
            shape = self._constants.get(node.input[1])
            return shape is not None and len(shape) == 2
        return True

    def _writable(self, name: str) -> np.ndarray:
        if name not in self._changed:
            self._constants[name] = self._changed[name] = np.array(self._constants[name])
        return self._changed[name]

    def _add(self, name: str, values: np.ndarray) -> None:
        self._model.graph.initializer.append(require('onnx.numpy_helper').from_array(values, name))
        self._constants[name] = values

    @staticmethod
    def _attribute(node: Any, name: str, default: Any) -> Any:
        for attribute in node.attribute:
            if attribute.name == name:
                return require('onnx.helper').get_attribute_value(attribute)
        return default
