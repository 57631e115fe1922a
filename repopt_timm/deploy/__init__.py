"""From a trained model to an INT8 one with measured accuracy and speed: ONNX, and ONNX Runtime on the CPU."""

from .classifier import load_model
from .deploy_commands import add_class_map
from .equalization import Equalization, equalize
from .evaluation import evaluate, predict
from .int8_table import compare_int8, comparison_table
from .layer_sensitivity import layer_sensitivity
from .onnx_export import export_onnx
from .quantization import Quantization, QuantizationOptions, quantize_onnx
from .runtime import save_onnx

__all__ = [
    'Equalization',
    'Quantization',
    'QuantizationOptions',
    'add_class_map',
    'compare_int8',
    'comparison_table',
    'equalize',
    'evaluate',
    'export_onnx',
    'layer_sensitivity',
    'load_model',
    'predict',
    'quantize_onnx',
    'save_onnx',
]
