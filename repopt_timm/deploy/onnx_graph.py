"""ONNX graphs through `onnx_ir`: layers, their kernels by channel, and who reads what."""

from typing import Any

import numpy as np

from .runtime import require

__all__ = ['LAYERS', 'Graph', 'layers_of']

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


class Graph:
    """A copy of a float model whose kernels and biases can be changed in place.

    Attributes:
        layers: See `layers_of`.
        kernels: Layer to a view of its kernel, of shape (groups, outputs of a group, inputs of a group, taps).
        biases: The same layers to their biases, of their own; zeros where there was none.
        obstacles: Other layers to why they are not among these: their operator, or `shared kernel`.
    """

    def __init__(self, model: Any):
        ir = require('onnx_ir')
        self._ir, self._model = ir, ir.from_proto(model)
        for value in self._model.graph.initializers.values():
            value.const_value = ir.tensor(np.array(value.const_value.numpy()), name=value.name)
        self.layers = layers_of(self._model)
        self._names = {node: name for name, node in self.layers.items()}
        self.kernels: dict[str, np.ndarray] = {}
        self.biases: dict[str, np.ndarray] = {}
        self.obstacles: dict[str, str] = {}
        for name, node in self.layers.items():
            kernel, bias = _kernel(node), node.inputs[2] if len(node.inputs) > 2 else None
            outputs = 0 if kernel is None else kernel.shape[0] * kernel.shape[1]
            if kernel is None or (bias is not None and (not bias.is_initializer() or bias.const_value.size != outputs)):
                self.obstacles[name] = node.op_type
                continue
            if len(node.inputs[1].uses()) > 1:
                self.obstacles[name] = 'shared kernel'
                continue
            if bias is None or len(bias.uses()) > 1:
                own = np.zeros(outputs, kernel.dtype) if bias is None else bias.const_value.numpy().copy()
                bias = ir.Value(name=f'{name}.bias.own', const_value=ir.tensor(own, name=f'{name}.bias.own'))
                self._model.graph.register_initializer(bias)
                node.resize_inputs(3)
                node.replace_input_with(2, bias)
            self.kernels[name], self.biases[name] = kernel, bias.const_value.numpy()

    @property
    def model(self) -> Any:
        """The `onnx.ModelProto` with all changes."""
        return self._ir.to_proto(self._model)

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


def _kernel(node: Any) -> np.ndarray | None:
    weight, attributes = node.inputs[1].const_value.numpy(), node.attributes
    if node.op_type == 'Conv':
        groups = attributes.get_int('group', 1)
        return weight.reshape(groups, len(weight) // groups, weight.shape[1], -1)
    factors = {attributes.get_float(name, 1.0) for name in ('alpha', 'beta')}
    if node.op_type != 'Gemm' or attributes.get_int('transA', 0) or factors != {1.0}:
        return None
    return (weight if attributes.get_int('transB', 0) else weight.T)[None, :, :, None]


def _keeps_channels(node: Any) -> bool:
    constant = node.inputs[1].const_value if len(node.inputs) > 1 and node.inputs[1] is not None else None
    if node.op_type in ('ReduceMax', 'ReduceMean'):
        axes = constant.numpy() if constant is not None else node.attributes.get_ints('axes', ())
        return len(axes) > 0 and {int(axis) for axis in axes} <= {-2, -1, 2, 3}
    if node.op_type == 'Flatten':
        return node.attributes.get_int('axis', 1) == 1
    # A Reshape to (batch, features).
    return node.op_type != 'Reshape' or (constant is not None and constant.size == 2)
