"""ONNX graphs: their input, layers, kernels by channel, and who reads what."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ..datasets import Images
from .runtime import require

LAYERS = ('Conv', 'ConvTranspose', 'Gemm', 'MatMul')

# Images whose activations are in memory at a time: 60 MB each in RepOpt-VGG-B1 at 224 px.
BATCH = 8

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


def image_input(model: Any) -> tuple[str, list[int]]:
    """Returns name and sizes of an `onnx.ModelProto`'s input; dynamic sizes, such as the batch's, are 0."""
    constants = {tensor.name for tensor in model.graph.initializer}
    images = next(value for value in model.graph.input if value.name not in constants)
    return images.name, [size.dim_value for size in images.type.tensor_type.shape.dim]


def feeds(model: Any, images: Images, indices: Sequence[int], title: str) -> Iterator[dict[str, np.ndarray]]:
    """Yields what sessions of a model take, in whole batches if its batch is fixed."""
    name, (fixed, *_) = image_input(model)
    for batch, _ in images.batches(indices, fixed or BATCH, title, whole=fixed > 0):
        yield {name: batch.numpy()}


def layers_of(model: Any) -> dict[str, Any]:
    """Maps modules of an `onnx.ModelProto` or `onnx_ir.Model` to nodes, whose second input is the weight."""
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
    """A copy of a float model whose `kernels`, of shape (groups, outputs of a group, inputs of a group, taps), and
    `biases` can be changed in place. `readers` are the layers that alone read a layer, through nothing but positively
    homogeneous operators; `left` maps the other layers to the reason.
    """

    def __init__(self, model: Any):
        ir = require('onnx_ir')
        self._model = ir.from_proto(model)
        for value in self._model.graph.initializers.values():
            value.const_value = ir.tensor(np.array(value.const_value.numpy()), name=value.name)
        self.layers = layers_of(self._model)
        self.kernels: dict[str, np.ndarray] = {}
        self.biases: dict[str, np.ndarray] = {}
        obstacles = {}
        for name, node in self.layers.items():
            kernel, bias = _kernel(node), node.inputs[2] if len(node.inputs) > 2 else None
            if len(node.inputs[1].uses()) > 1:
                obstacles[name] = 'shared kernel'
            elif kernel is None or (bias is not None and not bias.is_initializer()):
                obstacles[name] = node.op_type
            else:
                outputs = kernel.shape[0] * kernel.shape[1]
                if bias is None or len(bias.uses()) > 1 or bias.const_value.size != outputs:
                    own = np.zeros(outputs, kernel.dtype) + (0 if bias is None else bias.const_value.numpy())
                    bias = ir.Value(name=f'{name}.bias.own', const_value=ir.tensor(own, name=f'{name}.bias.own'))
                    self._model.graph.register_initializer(bias)
                    node.resize_inputs(3)
                    node.replace_input_with(2, bias)
                self.kernels[name], self.biases[name] = kernel, bias.const_value.numpy()
        self.readers: dict[str, list[str]] = {}
        self.left: dict[str, str] = {}
        for name in self.layers:
            readers, reason = self._read_by(name)
            reasons = [reason, *(obstacles.get(each, '') for each in (name, *readers)), '' if readers else 'unread']
            if any(reasons):
                self.left[name] = next(filter(None, reasons))
            else:
                self.readers[name] = readers

    @property
    def model(self) -> Any:
        """The `onnx.ModelProto` with all changes."""
        return require('onnx_ir').to_proto(self._model)

    def _read_by(self, layer: str) -> tuple[list[str], str]:
        """Returns the layers that read this one, and the first operator that prevents equalizing, or `output`."""
        names = {node: name for name, node in self.layers.items()}
        found: list[str] = []
        pending = [self.layers[layer].outputs[0]]
        while pending:
            tensor = pending.pop()
            if tensor.is_graph_output():
                return found, 'output'
            for node, place in tensor.uses():
                if node in names and place == 0 and tensor not in node.inputs[1:]:
                    found.append(names[node])
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
    if node.op_type == 'Flatten':
        return node.attributes.get_int('axis', 1) == 1
    if node.op_type == 'Reshape':  # to (batch, features)
        return constant is not None and constant.size == 2
    # Before opset 18 these axes are an attribute: layers before such a reduction stay as they are.
    return not node.op_type.startswith('Reduce') or (
        constant is not None and constant.size and {*constant.numpy()} <= {-2, -1, 2, 3}
    )
