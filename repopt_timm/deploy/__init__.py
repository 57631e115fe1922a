"""From a trained model to an INT8 one with measured accuracy and speed: ONNX, and ONNX Runtime on the CPU."""

from .classifier import Classifier, load_classifier
from .deploy_commands import add_class_map, add_commands
from .equalization import Equalization, equalize
from .evaluation import evaluate, predict
from .int8_table import compare_int8, comparison_table
from .layer_reports import layer_report, layer_sensitivity, plot_layers, plot_sensitivity, sensitivity_table
from .onnx_export import export_onnx, to_onnx
from .quantization import Quantization, QuantizationOptions, calibrate, quantize, quantize_onnx
from .runtime import save_onnx
from .trained_model import load_model

__all__ = [
    'Classifier',
    'Equalization',
    'Quantization',
    'QuantizationOptions',
    'add_class_map',
    'add_commands',
    'calibrate',
    'compare_int8',
    'comparison_table',
    'equalize',
    'evaluate',
    'export_onnx',
    'layer_report',
    'layer_sensitivity',
    'load_classifier',
    'load_model',
    'plot_layers',
    'plot_sensitivity',
    'predict',
    'quantize',
    'quantize_onnx',
    'save_onnx',
    'sensitivity_table',
    'to_onnx',
]
