"""Reads an ONNX graph, float or in QDQ format, as a list of steps that a PyTorch module can take."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .classifier import image_input
from .onnx_graph import LAYERS, constants_of
from .onnx_operators import OPERATORS
from .runtime import require

__all__ = ['Bias', 'Operation', 'Plan', 'Rounding', 'Step', 'Weight', 'read_plan']

# What ONNX Runtime appends to the name of a weight.
_SUFFIX = '_quantized'

_LEARNING = (*LAYERS, 'LayerNormalization', 'BatchNormalization')


@dataclass(frozen=True)
class Operation:
    """A node that computes.

    Attributes:
        operator: Name of the operator.
        inputs: Names of its inputs; empty for one that it does without.
        outputs: Names of its outputs.
        attributes: Its attributes, defaults included.
    """

    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]


@dataclass(frozen=True)
class Rounding:
    """Rounding with a scale that stays: of an activation, or of a constant that is added or multiplied.

    Attributes:
        name: Tensor to round.
        output: The rounded tensor.
        index: Which of the plan's scales and zero points.
        limits: Lowest and highest code.
        codes: Constant of the file that holds the codes, if the tensor is one.
    """

    name: str
    output: str
    index: int
    limits: tuple[int, int]
    codes: str = ''


@dataclass(frozen=True)
class Weight:
    """Rounding of a weight with the scale that its largest value needs.

    Attributes:
        name: The weight.
        output: The rounded weight.
        scale: Constant of the file that holds the scale.
        codes: Constant that holds the codes; the weight itself where the file keeps it in float.
        axis: Axis of the channels that have a scale each; None for one scale.
        levels: Highest code; the lowest is its negative.
    """

    name: str
    output: str
    scale: str
    codes: str
    axis: int | None
    levels: int


@dataclass(frozen=True)
class Bias:
    """Rounding of a bias to 32 bits, with the scale of the products that it is added to.

    Attributes:
        name: The bias.
        output: The rounded bias.
        scale: Constant of the file that holds the scale.
        codes: Constant that holds the codes.
        weight: The rounded weight of these products.
        input_scale: Scale of the activation in these products.
    """

    name: str
    output: str
    scale: str
    codes: str
    weight: str
    input_scale: float


Step = Operation | Rounding | Weight | Bias


@dataclass
class Plan:
    """What a file computes.

    Attributes:
        input: Name of the images.
        output: Name of the logits.
        steps: What to do, in this order.
        parameters: Float weights, and whether they train, by name.
        constants: Everything else that is not computed.
        scales: Scales of activations.
        zeros: Their zero points.
    """

    input: str
    output: str
    steps: list[Step] = field(default_factory=list)
    parameters: dict[str, tuple[np.ndarray, bool]] = field(default_factory=dict)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    scales: list[float] = field(default_factory=list)
    zeros: list[int] = field(default_factory=list)


def read_plan(model: Any, floats: Mapping[str, np.ndarray] | None = None, weight_bits: int = 8) -> Plan:
    """Reads a model.

    Args:
        model: An `onnx.ModelProto`.
        floats: The constants of the model before it was quantized. Defaults to its own.
        weight_bits: Width of the weights of layers, 8 as in the file, or fewer.

    Raises:
        ValueError: If PyTorch has no form here of one of its operators, or a code cannot be traced to a weight.
    """
    constants = constants_of(model)
    return _Reader(model, constants, constants if floats is None else floats, weight_bits).read()


class _Reader:
    def __init__(
        self, model: Any, constants: Mapping[str, np.ndarray], floats: Mapping[str, np.ndarray], weight_bits: int
    ):
        self.nodes = list(model.graph.node)
        self.constants = constants
        self.floats = floats
        self.weight_bits = weight_bits
        self.producers = {output: node for node in self.nodes for output in node.output}
        self.users: dict[str, list[Any]] = {}
        for node in self.nodes:
            for name in node.input:
                self.users.setdefault(name, []).append(node)
        self.plan = Plan(image_input(model)[0], model.graph.output[0].name)
        self.indices: dict[str, int] = {}

    def read(self) -> Plan:
        unknown = sorted({node.op_type for node in self.nodes} - {*OPERATORS, 'QuantizeLinear', 'DequantizeLinear'})
        if unknown:
            raise ValueError(
                f'Fake-quantized training lacks the operators {", ".join(unknown)} of this model: quantize it without '
                f'training, or train another one.'
            )
        for node in self.nodes:
            step = self._step(node)
            if step is not None:
                self.plan.steps.append(step)
                self._take_inputs(step)
        return self.plan

    def _step(self, node: Any) -> Step | None:
        if node.op_type == 'QuantizeLinear':
            name, scale, zero = node.input
            if name in self.constants:
                return self._rounded_constant(name, name, node)
            return Rounding(name, node.output[0], self._index(scale, zero), self._limits(zero))
        if node.op_type == 'DequantizeLinear':
            codes = node.input[0]
            if codes not in self.constants:
                return Operation('Identity', (codes,), (node.output[0],), {})
            name = codes.removesuffix(_SUFFIX)
            if name not in self.floats:
                # A bias that several layers share has a scale, and so a name, for each.
                name = name.rstrip('0123456789')
            if name not in self.floats:
                raise ValueError(
                    f"The quantized model has the codes '{codes}', expected those of a weight of the float model, "
                    f"which has no '{name}'. onnxruntime may name them otherwise: try another version of it."
                )
            return self._rounded_constant(name, codes, node)
        attributes = {**OPERATORS[node.op_type][1], **_attributes(node)}
        return Operation(node.op_type, tuple(node.input), tuple(node.output), attributes)

    def _rounded_constant(self, name: str, codes: str, node: Any) -> Step | None:
        _, scale, zero = node.input
        output, values = node.output[0], self.floats[name]
        if values.size == 1:
            # A number that the exporter made of an operator, which is not to be learnt.
            self.plan.constants[output] = self._restored(values, codes, scale, zero)
            return None
        if self.constants[zero].dtype == np.int32:
            consumer = self.users[output][0]
            source = self.producers[consumer.input[0]]
            weight = self.producers[consumer.input[1]]
            rounded = weight.output[0] if weight.input[0] in self.constants else weight.input[0]
            return Bias(name, output, scale, codes, rounded, float(self.constants[source.input[1]]))
        if self.constants[zero].dtype != np.int8 or self.constants[zero].any():
            return Rounding(name, output, self._index(scale, zero), self._limits(zero), codes)
        step = self.constants[scale]
        axis = _attributes(node).get('axis', 1) % values.ndim if step.ndim else None
        return Weight(name, output, scale, codes, axis, self._levels(values, output, step, axis))

    def _restored(self, values: np.ndarray, codes: str, scale: str, zero: str) -> np.ndarray:
        step, offset = self.constants[scale], self.constants[zero].astype(np.float32)
        found = np.rint(values / step) + offset if codes in self.floats else self.constants[codes].astype(np.float32)
        return np.asarray((found - offset) * step, np.float32)

    def _levels(self, values: np.ndarray, output: str, scale: np.ndarray, axis: int | None) -> int:
        if self.weight_bits < 8 and any(node.op_type in LAYERS for node in self._readers(output)):
            return 2 ** (self.weight_bits - 1) - 1
        # 127, or 64 where the range is reduced.
        shape = [-1 if axis == place else 1 for place in range(values.ndim)]
        return max(1, int(np.rint(np.abs(values / scale.reshape(shape)).max())))

    def _readers(self, name: str) -> list[Any]:
        """Returns the nodes that compute with a tensor, rounded or not."""
        found = []
        for user in self.users.get(name, []):
            found += self._readers(user.output[0]) if user.op_type == 'DequantizeLinear' else [user]
        return found

    def _index(self, scale: str, zero: str) -> int:
        if scale not in self.indices:
            if self.constants[scale].size != 1:
                raise ValueError(f"'{scale}' has a scale for each channel of an activation, expected one scale.")
            self.indices[scale] = len(self.plan.scales)
            self.plan.scales.append(float(self.constants[scale]))
            self.plan.zeros.append(int(self.constants[zero]))
        return self.indices[scale]

    def _limits(self, zero: str) -> tuple[int, int]:
        limits = np.iinfo(self.constants[zero].dtype)
        return limits.min, limits.max

    def _take_inputs(self, step: Step) -> None:
        for name in step.inputs if isinstance(step, Operation) else (step.name,):
            values = self.floats.get(name, self.constants.get(name))
            if values is None or name in self.plan.constants:
                continue
            if values.dtype == np.float32 and values.size > 1:
                # The exporter names what it computes from weights by numbers, and weights by their modules.
                used = self._readers(name if isinstance(step, Operation) else step.output)
                learns = '.' in name or any(node.op_type in _LEARNING for node in used)
                self.plan.parameters[name] = (values, learns)
            else:
                self.plan.constants[name] = values


def _attributes(node: Any) -> dict[str, Any]:
    get = require('onnx.helper').get_attribute_value
    values = {attribute.name: get(attribute) for attribute in node.attribute}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in values.items()}
