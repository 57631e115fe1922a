import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from repopt_timm.deploy.onnx_operators import OPERATORS

IMAGES, SEQUENCE, MATRIX = (2, 4, 6, 5), (2, 3, 4), (3, 4)

# Operator, shapes of float inputs or values of others, attributes.
CASES = [
    ('Add', [IMAGES, (4, 1, 1)], {}),
    ('AveragePool', [IMAGES], {'kernel_shape': [3, 3], 'strides': [2, 2], 'pads': [1, 1, 1, 1]}),
    ('AveragePool', [IMAGES], {'kernel_shape': [3, 3], 'pads': [1, 1, 1, 1], 'count_include_pad': 1}),
    ('BatchNormalization', [IMAGES, (4,), (4,), (4,), np.ones(4, np.float32)], {'epsilon': 0.1}),
    ('Clip', [SEQUENCE, np.float32(0), np.float32(1)], {}),
    ('Concat', [SEQUENCE, SEQUENCE], {'axis': 1}),
    ('Conv', [IMAGES, (6, 2, 3, 3), (6,)], {'group': 2, 'strides': [2, 1], 'pads': [1, 0, 1, 0], 'dilations': [1, 2]}),
    ('Conv', [IMAGES, (3, 4, 2, 2)], {'pads': [0, 0, 1, 1]}),
    ('Div', [SEQUENCE, np.float32(2)], {}),
    ('Erf', [SEQUENCE], {}),
    ('Expand', [(2, 1, 4), np.array([2, 3, 4])], {}),
    ('Flatten', [IMAGES], {}),
    ('Gather', [SEQUENCE, np.array(0)], {'axis': 1}),
    ('Gather', [SEQUENCE, np.array([[1, -1]])], {'axis': 2}),
    ('Gemm', [MATRIX, (5, 4), (5,)], {'transB': 1}),
    ('Gemm', [(4, 3), (4, 5)], {'transA': 1, 'alpha': 0.5}),
    ('GlobalAveragePool', [IMAGES], {}),
    ('HardSigmoid', [SEQUENCE], {'alpha': 0.3}),
    ('HardSwish', [SEQUENCE], {}),
    ('Identity', [SEQUENCE], {}),
    ('LayerNormalization', [SEQUENCE, (4,), (4,)], {'epsilon': 1e-3}),
    ('MatMul', [SEQUENCE, (4, 5)], {}),
    ('MaxPool', [IMAGES], {'kernel_shape': [3, 3], 'strides': [2, 2], 'pads': [0, 0, 1, 1]}),
    ('Mul', [SEQUENCE, SEQUENCE], {}),
    ('Pad', [IMAGES, np.array([0, 0, 1, 2, 0, 0, 0, 1])], {}),
    ('Pow', [SEQUENCE, np.float32(2)], {}),
    ('Range', [np.array(1), np.array(7), np.array(2)], {}),
    ('ReduceMean', [IMAGES, np.array([2, 3])], {'keepdims': 0}),
    ('ReduceMean', [SEQUENCE], {}),
    ('Relu', [SEQUENCE], {}),
    ('Reshape', [SEQUENCE, np.array([0, -1])], {}),
    ('Shape', [IMAGES], {'start': 1, 'end': 3}),
    ('Sigmoid', [SEQUENCE], {}),
    ('Slice', [SEQUENCE, np.array([1]), np.array([9]), np.array([2]), np.array([2])], {}),
    ('Softmax', [SEQUENCE], {'axis': 1}),
    ('Split', [SEQUENCE, np.array([1, 3])], {'axis': 2}),
    ('Sqrt', [np.ones(SEQUENCE, np.float32)], {}),
    ('Squeeze', [(2, 1, 4, 1), np.array([1])], {}),
    ('Squeeze', [(2, 1, 4, 1)], {}),
    ('Sub', [SEQUENCE, SEQUENCE], {}),
    ('Tanh', [SEQUENCE], {}),
    ('Transpose', [SEQUENCE], {'perm': [2, 0, 1]}),
    ('Unsqueeze', [SEQUENCE, np.array([-1, 0])], {}),
]


@pytest.mark.parametrize(('operator', 'inputs', 'attributes'), CASES, ids=[case[0] for case in CASES])
def test_an_operator_computes_what_the_standard_says(operator, inputs, attributes):
    values = [
        np.random.default_rng(i).normal(size=each).astype(np.float32) if isinstance(each, tuple) else np.asarray(each)
        for i, each in enumerate(inputs)
    ]
    names = [f'x{i}' for i in range(len(values))]
    outputs = ['y0', 'y1'] if operator == 'Split' else ['y0']
    node = helper.make_node(operator, names, outputs, **attributes)
    kinds = [TensorProto.FLOAT if value.dtype == np.float32 else TensorProto.INT64 for value in values]
    graph = helper.make_graph(
        [node],
        'one',
        [helper.make_tensor_value_info(*pair, value.shape) for *pair, value in zip(names, kinds, values)],
        [helper.make_tensor_value_info(name, kinds[0], None) for name in outputs],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 18)])
    expected = ReferenceEvaluator(model).run(None, dict(zip(names, values)))
    function, defaults = OPERATORS[operator]
    found = function(*map(torch.from_numpy, values), **{**defaults, **attributes})
    for tensor, array in zip(found if isinstance(found, tuple) else (found,), expected):
        np.testing.assert_allclose(tensor.numpy(), array, rtol=1e-5, atol=1e-5)


def test_every_operator_is_compared_with_the_standard():
    assert {case[0] for case in CASES} == set(OPERATORS)
