import copy

import numpy as np
import onnx_ir
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from repopt_timm.deploy import equalize
from repopt_timm.deploy.onnx_export import to_onnx
from repopt_timm.deploy.onnx_graph import Graph


class Everything(nn.Module):
    """Pairs of layers that can be equalized, and all kinds that cannot."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 8, 1, groups=2)
        self.residual = nn.Conv2d(8, 8, 1, bias=False)
        self.gated = nn.Conv2d(8, 8, 3, padding=1)
        self.padded = nn.Conv2d(8, 8, 3, padding=1)
        self.tied = nn.Conv2d(16, 16, 1)
        self.last = nn.Conv2d(16, 4, 3)
        self.first_fc = nn.Linear(16, 8)
        self.second_fc = nn.Linear(8, 3)

    def forward(self, x):
        x = self.grouped(F.relu(self.depthwise(F.relu(self.stem(x)))))
        x = F.leaky_relu(x, 0.1)
        x = F.silu(self.gated(self.residual(x) + x))
        x = torch.cat([F.relu(self.padded(x)), x], 1)
        x = F.max_pool2d(F.relu(self.last(self.tied(F.relu(self.tied(x))))), 7)
        return self.second_fc(F.relu(self.first_fc(x.flatten(1))))


class Images:
    """Takes the place of an image folder."""

    def batches(self, indices, batch_size, title, whole=False):
        pixels = [torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(index)) for index in indices]
        for start in range(0, len(pixels), batch_size):
            yield torch.stack(pixels[start : start + batch_size]), None


@pytest.fixture(scope='module')
def network():
    torch.manual_seed(0)
    model = Everything()
    with torch.no_grad():
        # Scales that no quantizer likes.
        for parameter in (model.stem.weight, model.stem.bias, model.first_fc.weight):
            parameter *= torch.logspace(-2, 1, 8).view(-1, *[1] * (parameter.dim() - 1))
        # Everything else is alive.
        for layer in (model.depthwise, model.last, model.first_fc):
            layer.bias += 5
        model.first_fc.weight.abs_()
        # Always 0, always 2, and always silu(3).
        model.stem.bias[1] = -1000
        model.depthwise.weight[2], model.depthwise.bias[2] = 0, 2
        model.gated.weight[3], model.gated.bias[3] = 0, 3
    return to_onnx(model, {'input_size': (3, 16, 16)})[0]


@pytest.fixture(scope='module')
def equalized(network):
    return equalize(network, Images(), range(16))


def test_dead_channels_are_removed_where_that_changes_no_logit(equalized):
    assert equalized.difference < 1e-5 and equalized.images == 16
    assert equalized.removed == {'depthwise': 1, 'grouped': 2}
    # Zeros around the image end what is constant within.
    assert equalized.kept == {'padded': 1}
    assert equalized.unread == {'stem': 2}
    assert not Graph(equalized.model).kernels['grouped'][0, :, 1:3].any()


def test_layers_are_equalized_through_homogeneous_functions_only(equalized):
    pairs = ('stem', 'depthwise'), ('depthwise', 'grouped'), ('last', 'first_fc'), ('first_fc', 'second_fc')
    assert equalized.pairs == {layer: [reader] for layer, reader in pairs}
    kernels = Graph(equalized.model).kernels
    rows = np.abs(kernels['last']).max((2, 3)).reshape(-1)
    np.testing.assert_allclose(rows, np.abs(kernels['first_fc']).max((1, 3)).reshape(len(rows), -1).max(1), rtol=0.01)
    reasons = {'grouped': 'Add', 'residual': 'Add', 'gated': 'Sigmoid', 'padded': 'Concat', 'second_fc': 'output'}
    assert reasons.items() <= equalized.left.items() and 'shared kernel' in equalized.left.values()


def test_a_channel_that_lives_on_other_images_is_not_dead(network):
    few = equalize(network, Images(), range(1))
    assert sum(few.removed.values()) > 3 and few.images == 1
    checked = equalize(network, Images(), range(1), range(1, 40))
    assert checked.removed == {'depthwise': 1, 'grouped': 2}
    assert checked.images > 33


def test_a_product_that_is_more_than_its_weights_stays(network):
    model = onnx_ir.from_proto(copy.deepcopy(network))
    next(node for node in model.graph if node.op_type == 'Gemm').attributes.add(onnx_ir.AttrFloat32('beta', 2.0))
    found = equalize(onnx_ir.to_proto(model), Images(), range(16))
    assert found.left['first_fc'] == found.left['last'] == 'Gemm'
    assert found.pairs.keys() == {'stem', 'depthwise'}


def test_a_layer_that_nothing_reads_is_set_to_0_and_not_equalized(network):
    graph = Graph(network)
    graph.kernels['second_fc'][:] = 0
    found = equalize(graph.model, Images(), range(4))
    assert found.left['first_fc'] == 'unread' and found.unread['first_fc'] == 8
    assert not Graph(found.model).kernels['first_fc'].any()


def test_a_rewrite_that_changes_logits_is_refused(network):
    with pytest.raises(ValueError, match='change'):
        equalize(network, Images(), range(16), tolerance=0)
    graph = Graph(network)
    graph.biases['second_fc'][0] = np.nan
    with pytest.raises(ValueError, match='nan'):
        equalize(graph.model, Images(), range(4))
