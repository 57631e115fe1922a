"""ONNX graphs through `onnx_ir`: layers, their kernels by channel, and who reads what."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from .runtime import require

__all__ = ['LAYERS', 'Graph', 'layers_of', 'with_outputs']

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
        model: A float `onnx.ModelProto`, or an `onnx_ir.Model`.

    Returns:
        Name to `onnx_ir.Node`, whose second input is the weight.
    """
    ir = require('onnx_ir')
    model = model if isinstance(model, ir.Model) else ir.from_proto(model)
    layers: dict[str, Any] = {}
    for node in model.graph:
        if node.op_type in LAYERS and node.inputs[1].is_initializer():
            name = node.inputs[1].name.removesuffix('.weight')
            # Other weights are shared, or constants that the exporter made.
            layers[node.name if name == node.inputs[1].name or name in layers else name] = node
    return layers


def with_outputs(model: Any, names: Iterable[str]) -> Any:
    """Returns a copy of an `onnx.ModelProto` that gives these tensors too."""
    copy = type(model)()
    copy.CopyFrom(model)
    present = {value.name for value in copy.graph.output}
    copy.graph.output.extend(
        require('onnx.helper').make_empty_tensor_value_info(name) for name in names if name not in present
    )
    return copy


class Graph:
    """A copy of a float model whose kernels and biases can be changed.

    Attributes:
        layers: See `layers_of`.
    """

    def __init__(self, model: Any):
        self._ir = require('onnx_ir')
        self._model = self._ir.from_proto(model)
        for value in self._model.graph.initializers.values():
            value.const_value = self._ir.tensor(np.array(value.const_value.numpy()), name=value.name)
        self.layers = layers_of(self._model)
        self._names = {node: name for name, node in self.layers.items()}

    @property
    def model(self) -> Any:
        """The `onnx.ModelProto` with all changes."""
        return self._ir.to_proto(self._model)

    def kernel(self, layer: str) -> np.ndarray | None:
        """Returns a layer's kernel, to be changed in place; None if there is an `obstacle`.

        Returns:
            A view of shape (groups, outputs of a group, inputs of a group, taps).
        """
        if self.obstacle(layer):
            return None
        node = self.layers[layer]
        weight = node.inputs[1].const_value.numpy()
        if node.op_type == 'Conv':
            return weight.reshape(
                groups := node.attributes.get_int('group', 1), len(weight) // groups, weight.shape[1], -1
            )
        return (weight if node.attributes.get_int('transB', 0) else weight.T)[None, :, :, None]

    def obstacle(self, layer: str) -> str:
        """Returns why a layer has no `kernel`: its operator or `shared kernel`; '' if it has one."""
        node = self.layers[layer]
        if node.op_type not in ('Conv', 'Gemm') or (node.op_type == 'Gemm' and not _is_linear(node)):
            return node.op_type
        return 'shared kernel' if len(node.inputs[1].uses()) > 1 else ''

    def bias(self, layer: str, create: bool = False) -> np.ndarray | None:
        """Returns a layer's bias, to be changed in place; None if it has none.

        Args:
            layer: Name of a layer that has a kernel.
            create: Give it a bias of 0 in place of none.
        """
        node, value = self.layers[layer], _bias(self.layers[layer])
        if value is None and not create:
            return None
        if value is None or len(value.uses()) > 1:
            kernel = self.kernel(layer)
            assert kernel is not None
            old = np.zeros(kernel.shape[0] * kernel.shape[1]) if value is None else value.const_value.numpy()
            name = f'{layer}.bias.own'
            value = self._ir.Value(name=name, const_value=self._ir.tensor(old.astype(kernel.dtype), name=name))
            self._model.graph.register_initializer(value)
            node.resize_inputs(3)
            node.replace_input_with(2, value)
        return value.const_value.numpy()

    def has_padding(self, layer: str) -> bool:
        """Returns whether zeros around an input become part of what a layer sees."""
        attributes = self.layers[layer].attributes
        return any(attributes.get_ints('pads', ())) or attributes.get_string('auto_pad', 'NOTSET').startswith('SAME')

    def readers(self, layer: str) -> tuple[list[str], str]:
        """Finds what reads a layer's output through nothing but positively homogeneous operators.

        Returns:
            Names of layers, and the reason if they are not all that reads it: an operator, or `output`.
        """
        found: list[str] = []
        pending = [self.layers[layer].outputs[0]]
        while pending:
            tensor = pending.pop()
            if tensor.is_graph_output():
                return found, 'output'
            for node, place in tensor.uses():
                if node in self._names and place == 0 and tensor not in node.inputs[1:]:
                    found.append(self._names[node])
                elif node.op_type in _HOMOGENEOUS and place == 0 and _keeps_channels(node):
                    pending.append(node.outputs[0])
                else:
                    return found, node.op_type
        return list(dict.fromkeys(found)), ''


def _bias(node: Any) -> Any:
    value = node.inputs[2] if len(node.inputs) > 2 else None
    return value if value is not None and value.is_initializer() else None


def _is_linear(node: Any) -> bool:
    """Returns whether a Gemm is a product with a bias for each output, and nothing more."""
    attributes, weight = node.attributes, node.inputs[1]
    if attributes.get_int('transA', 0) or {attributes.get_float(name, 1.0) for name in ('alpha', 'beta')} != {1.0}:
        return False
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return True
    bias = _bias(node)
    return bias is not None and bias.const_value.size == weight.shape[0 if attributes.get_int('transB', 0) else 1]


def _keeps_channels(node: Any) -> bool:
    constant = node.inputs[1].const_value if len(node.inputs) > 1 and node.inputs[1] is not None else None
    if node.op_type in ('ReduceMax', 'ReduceMean'):
        axes = constant.numpy() if constant is not None else node.attributes.get_ints('axes', ())
        return len(axes) > 0 and {int(axis) for axis in axes} <= {-2, -1, 2, 3}
    if node.op_type == 'Flatten':
        return node.attributes.get_int('axis', 1) == 1
    # A Reshape to (batch, features).
    return node.op_type != 'Reshape' or (constant is not None and constant.size == 2)
