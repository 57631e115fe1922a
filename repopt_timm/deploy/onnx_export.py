"""PyTorch to ONNX: dynamic batch, preprocessing in the metadata, verified against PyTorch."""

import copy
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from timm.utils import reparameterize_model
from torch import nn

from ..errors import reason_of
from .channel_health import kernel_outliers, still_channels
from .classifier import (
    is_onnx,
    label_names,
    largest_difference,
    load_trained,
    onnx_classifier,
    onnx_metadata,
    preprocessing,
)
from .runtime import load_onnx, quiet, require, save_onnx

# PyTorch's exporter writes it without a conversion, every ONNX Runtime since 1.14 runs it, and it has 8-bit
# convolutions, per channel too.
OPSET = 18


def export_onnx(
    source: str | os.PathLike, path: str | os.PathLike, overrides: Mapping[str, Any] | None = None, **form: Any
) -> dict[str, Any]:
    """Exports a trained model to an ONNX file with its preprocessing in the metadata.

    Args:
        source: What `load_model` takes.
        path: File to write.
        overrides: Preprocessing that differs from the model's own, by timm's names.
        **form: `opset`, the version of ONNX's operators; `batch`, the only number of images that the file takes at a
            time; `half`, to store and compute in float16.

    Returns:
        `out`, `opset`, `bytes`, `batchnorms` (the number that follow no convolution and stay), `difference`, the
        largest change of a logit from PyTorch's, relative to the largest logit, and `outliers` and `still_channels`,
        numbers by layer.

    Raises:
        OSError: If the checkpoint does not exist, or the file cannot be written.
        ValueError: If the model cannot be loaded or exported, or the result differs from PyTorch.
        ImportError: If the `[deploy]` extra is not installed.
    """
    if is_onnx(source):
        raise ValueError(f"'{source}' is an ONNX file, expected a model of PyTorch.")
    model = load_trained(source)
    still = still_channels(model)
    proto, difference = to_onnx(model, preprocessing(overrides, model=model), **form)
    save_onnx(proto, path)
    return {
        'out': os.fspath(path),
        'opset': form.get('opset', OPSET),
        'bytes': proto.ByteSize(),
        'batchnorms': sum(node.op_type == 'BatchNormalization' for node in proto.graph.node),
        'difference': difference,
        'outliers': kernel_outliers(proto),
        'still_channels': still,
    }


def float_onnx(source: str | os.PathLike, overrides: Mapping[str, Any] | None = None) -> Any:
    """Returns a trained model, an `.onnx` file or what `load_model` takes, as an `onnx.ModelProto`."""
    if not is_onnx(source):
        model = load_trained(source)
        return to_onnx(model, preprocessing(overrides, model=model))[0]
    proto = load_onnx(source)
    if any(node.op_type in ('QuantizeLinear', 'DequantizeLinear') for node in proto.graph.node):
        raise ValueError(f"'{source}' is quantized already; name the float32 one.")
    if any(tensor.data_type == tensor.FLOAT16 for tensor in proto.graph.initializer):
        raise ValueError(f"'{source}' is in float16, expected float32; name the file of an export without --fp16.")
    for name, value in require('onnx_ir').from_proto(proto).graph.initializers.items():
        if not np.isfinite(value.const_value.numpy()).all():
            raise ValueError(f"'{source}': '{name}' has values that are not finite. Export another checkpoint.")
    config = preprocessing(overrides, pretrained_cfg=onnx_metadata(proto))
    stated = {entry.key: entry.value for entry in proto.metadata_props}
    require('onnx').helper.set_model_props(proto, stated | {key: json.dumps(value) for key, value in config.items()})
    return proto


def to_onnx(
    model: nn.Module, config: Mapping[str, Any], opset: int = OPSET, batch: int = 0, half: bool = False
) -> tuple[Any, float]:
    """Exports a model from `load_trained`, its branches merged, as an `onnx.ModelProto`; the exporter folds BatchNorm.
    Returns its largest relative difference from PyTorch too.
    """
    require('onnxscript')
    name, model = type(model).__name__, reparameterize_model(model.eval())
    highest = require('onnx').defs.onnx_opset_version()
    if opset > highest:
        raise ValueError(f'There is no opset {opset}: the installed ONNX has opsets up to {highest}.')
    # The exporter takes a batch of one image for a constant.
    example = torch.randn(batch or 2, *config['input_size'], generator=torch.Generator().manual_seed(0))
    try:
        with quiet():
            program: Any = torch.onnx.export(
                model,
                (example,),
                input_names=['input'],
                output_names=['logits'],
                opset_version=opset,
                dynamo=True,
                dynamic_shapes=None if batch else ({0: torch.export.Dim('batch')},),
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        # The cause names the operator; the error itself advises developers.
        raise ValueError(f'{name} cannot be exported to ONNX: {reason_of(error.__cause__ or error)}') from None
    # The exporter records the line of code that each node comes from, with the paths of this machine.
    require('onnx_ir.passes.common').ClearMetadataAndDocStringPass()(program.model)
    # If PyTorch cannot convert to an opset, it writes another one without an error.
    if (written := program.model.opset_imports['']) != opset:
        raise ValueError(f'{name} cannot be exported to opset {opset}: PyTorch wrote opset {written}.')
    proto = program.model_proto
    if half:
        with quiet():
            convert = require('onnxruntime.transformers.float16').convert_float_to_float16
            proto = convert(proto, keep_io_types=True)
            # The casts of images and logits come last, which ONNX's own checker refuses.
            require('onnxruntime.quantization.onnx_model').ONNXModel(proto).topological_sort()
    pretrained: Any = getattr(model, 'pretrained_cfg', None) or {}
    facts = {'architecture': pretrained.get('architecture', name), 'label_names': label_names(model)}
    for key, value in {**config, **facts}.items():
        proto.metadata_props.add(key=key, value=json.dumps(value))
    return proto, _verify(model, proto, example, half)


@torch.inference_mode()
def _verify(model: nn.Module, proto: Any, example: torch.Tensor, half: bool) -> float:
    # Another batch size than the exported one shows whether the batch is dynamic.
    images = torch.cat([example, example.flip(-1)])[: len(example) + 1]
    expected = model(images)
    difference = largest_difference(onnx_classifier(proto).run(images), expected)
    # Summing in another order makes about 1e-6, float16 about 1e-3.
    bound = 1e-2 if half else 1e-3
    if not difference <= bound:
        # Some networks amplify what float32 rounds away; some do not run in float64.
        with suppress(RuntimeError):
            bound = max(bound, 4 * largest_difference(expected, copy.deepcopy(model).double()(images.double())))
    if not difference <= bound:
        raise ValueError(
            f"The exported model's logits differ from PyTorch's by {difference:.1e} of the largest logit, expected at "
            f'most {bound:.0e}. A weight is not finite or too large, or PyTorch exports an operator wrongly.'
        )
    return difference
