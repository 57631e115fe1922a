"""ONNX and ONNX Runtime: lazy imports, files and sessions."""

import importlib
import io
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

from ..datasets import core_count
from ..errors import reason_of
from ..files import replacing


def require(module: str) -> Any:
    """Imports a module of the `[deploy]` extra; says how to install it if it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.split('.')[0]
        raise ImportError(f'Deployment needs {name} ({error}): pip install "repopt-timm[deploy]"') from None


def load_onnx(path: str | os.PathLike) -> Any:
    """Reads an ONNX file with one input and one output as an `onnx.ModelProto`."""
    onnx = require('onnx')
    try:
        model = onnx.load(os.fspath(path))
        onnx.checker.check_model(model)
    except OSError:
        raise
    # Errors of ONNX and its runtime have no common base class.
    except Exception as error:
        raise ValueError(f"'{path}' is not a readable ONNX model: {reason_of(error)}.") from None
    graph = model.graph
    # Names of nodes are optional in ONNX, but are what ONNX Runtime quantizes by.
    for number, node in enumerate(graph.node):
        node.name = node.name or f'{node.op_type}.{number}'
    inputs = {value.name for value in graph.input} - {tensor.name for tensor in graph.initializer}
    if len(inputs) != 1 or len(graph.output) != 1:
        raise ValueError(
            f"'{path}' has {len(inputs)} inputs and {len(graph.output)} outputs; expected images in and logits out."
        )
    return model


def save_onnx(model: Any, path: str | os.PathLike) -> None:
    """Writes an `onnx.ModelProto` to a single file, whole or not at all.

    Raises:
        OSError: If it cannot be written, for instance to a full disk.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(model.SerializeToString())


def open_session(model: Any, threads: int | None = None, optimize: bool = True) -> Any:
    """Opens an `onnx.ModelProto` on the CPU; without `optimize` no node is fused, so that all tensors have values."""
    onnxruntime = require('onnxruntime')
    options = onnxruntime.SessionOptions()
    # ONNX Runtime crashes if it cannot start this many threads.
    options.intra_op_num_threads = min(threads or 0, core_count())
    # Errors are raised anyway, so do not log them too.
    options.log_severity_level = 4
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=['CPUExecutionProvider'])
    except Exception as error:
        problem = f'ONNX Runtime {onnxruntime.__version__} cannot run the model: {reason_of(error)}.'
        raise ValueError(problem) from None


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps libraries from printing, warning and logging below errors."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        logging.disable(before)
