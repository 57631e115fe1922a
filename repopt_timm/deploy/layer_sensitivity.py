"""The accuracy that each layer costs in INT8."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.utils import tqdm

from ..reporting import markdown_table
from .classifier import onnx_classifier
from .evaluation import check_classes
from .onnx_graph import layers_of
from .quantization import Quantization, quantize


def layer_sensitivity(done: Quantization) -> dict[str, Any]:
    """Measures a model with one layer at a time in INT8, on its calibration images, which are all in memory.

    Args:
        done: What `quantize_onnx` returned.

    Returns:
        Plain data: `images`; `labelled`, whether their folders are the classes of the model; `int8`, the whole model;
        and `layers`, the most sensitive one first, each with `layer` and `operator`. Both have `kl`, the mean
        Kullback-Leibler divergence of the probabilities from those of float32, in nats, and, if labelled, `drop` in
        top-1 accuracy, in points. Layers are ranked by the drop, if labelled, then by the divergence.

    Raises:
        ValueError: If an image does not decode.
    """
    try:
        check_classes(onnx_classifier(done.model), done.images)
        labelled = True
    except ValueError:
        labelled = False
    batches, targets = zip(*done.images.batches(done.indices, 32, 'sensitivity'))
    labels = torch.cat(targets)

    def logits(model: Any) -> torch.Tensor:
        return torch.cat([*map(onnx_classifier(model).run, batches)]).double()

    def compare(model: Any) -> dict[str, float]:
        found = logits(model)
        right = [(each.argmax(1) == labels).double().mean().item() for each in (expected, found)]
        distance = F.kl_div(found.log_softmax(1), expected.log_softmax(1), reduction='batchmean', log_target=True)
        return {**({'drop': 100 * (right[0] - right[1])} if labelled else {}), 'kl': distance.item()}

    expected = logits(done.model)
    nodes = done.quantized.graph.node
    inputs = {node.name: node.input for node in nodes}
    # Tensors that were in INT8.
    restored = {node.output[0] for node in nodes if node.op_type == 'DequantizeLinear'}
    rows = []
    for name, node in tqdm(layers_of(done.model).items(), 'sensitivity', unit='layer', disable=None):
        if inputs[node.name][1] in restored:
            following = node.successors()
            # The rounding comes after these, as in the whole model.
            alone = len(following) == 1 and following[0].op_type in ('Relu', 'Clip')
            only = [node.name, *(user.name for user in following if alone)]
            found = compare(quantize(done.model, done.options, done.ranges, only=only)[0])
            rows.append({'layer': name, 'operator': node.op_type, **found})
    rows.sort(key=lambda row: (row.get('drop', 0), row['kl']), reverse=True)
    return {'images': len(labels), 'labelled': labelled, 'int8': compare(done.quantized), 'layers': rows}


def sensitivity_table(ranking: Mapping[str, Any], most: int | None = None) -> str:
    """Formats what `layer_sensitivity` returned as Markdown, the `most` sensitive layers or all."""
    rows = [{'layer': 'all', 'operator': '', **ranking['int8']}, *ranking['layers'][:most]]
    drop = ['drop'] if ranking['labelled'] else []
    body = [[row['layer'], row['operator'], *(f'{row[name]:.2f}' for name in drop), f'{row["kl"]:.2e}'] for row in rows]
    return markdown_table(['layer in INT8', 'operator', *drop, 'KL'], body, align=True)
