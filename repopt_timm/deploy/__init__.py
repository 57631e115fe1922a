"""From a trained model to an INT8 one whose accuracy and speed are measured: ONNX, and ONNX Runtime on the CPU."""

from .classifier import Classifier, load_classifier
from .comparison import compare_int8, comparison_table
from .evaluation import evaluate
from .export import export_onnx, to_onnx
from .models import load_model
from .quantization import Quantization, QuantizationOptions, calibrate, quantize, quantize_onnx
from .report import layer_report, plot_layers
from .runtime import save_onnx

__all__ = [
    'Classifier',
    'Quantization',
    'QuantizationOptions',
    'calibrate',
    'compare_int8',
    'comparison_table',
    'evaluate',
    'export_onnx',
    'layer_report',
    'load_classifier',
    'load_model',
    'plot_layers',
    'quantize',
    'quantize_onnx',
    'save_onnx',
    'to_onnx',
]
