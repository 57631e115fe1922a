"""Do ONNX Runtime and OpenVINO agree on INT8 files of repopt_vgg_a0.cifar10?

    python docs/evidence/runtimes.py IMAGES

Quantizes the network as `repopt-timm quantize` does by default, per channel and per tensor, in the form for ONNX
Runtime and in TensorRT's. Prints top-1 on the validation images of the folder IMAGES in both runtimes, and the
percentage of images that both take for the same class. Needs openvino; see docs/deployment.md.
"""

import sys
from itertools import product
from typing import Any

import openvino
import torch

from repopt_timm.datasets import open_evaluation
from repopt_timm.deploy import QuantizationOptions
from repopt_timm.deploy.classifier import Classifier, onnx_classifier
from repopt_timm.deploy.evaluation import classify
from repopt_timm.deploy.onnx_export import float_onnx
from repopt_timm.deploy.quantization import quantize_in
from repopt_timm.reporting import markdown_table


def in_openvino(model: Any) -> Classifier:
    core = openvino.Core()
    # Float operators could run in bfloat16 otherwise.
    options = {'INFERENCE_PRECISION_HINT': 'f32', 'INFERENCE_NUM_THREADS': 1}
    compiled = core.compile_model(core.read_model(model.SerializeToString()), 'CPU', options)

    def run(images: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(compiled(images.numpy())[0].copy())

    known = onnx_classifier(model)
    return Classifier('openvino', run, known.config, known.size, known.class_names)


def main() -> None:
    model = float_onnx('repopt_vgg_a0.cifar10')
    classifiers = {('float32', '', 'ONNX Runtime'): onnx_classifier(model, 1)}
    config, names = next((each.config, each.class_names) for each in classifiers.values())
    train, validation = (open_evaluation(sys.argv[1], split, config, '', names) for split in ('train', 'validation'))
    ways = list(product(('per-channel', 'per-tensor'), ('ort', 'tensorrt')))
    options = [QuantizationOptions(weights=weights, target=target) for weights, target in ways]
    for way, done in zip(ways, quantize_in(options, model, train)):
        classifiers[(*way, 'ONNX Runtime')] = onnx_classifier(done.quantized, 1)
        classifiers[(*way, 'OpenVINO')] = in_openvino(done.quantized)
    found = classify(classifiers, validation)
    print(f'float32: {found["float32", "", "ONNX Runtime"].accuracy():.2f} % of {len(validation)} images')
    rows = []
    for way in ways:
        ours, theirs = (found[(*way, runtime)] for runtime in ('ONNX Runtime', 'OpenVINO'))
        same = 100 * (ours.ranked[:, 0] == theirs.ranked[:, 0]).float().mean().item()
        rows.append([*way, *(f'{value:.2f}' for value in (ours.accuracy(), theirs.accuracy(), same))])
    print(markdown_table(['weights', 'target', 'ONNX Runtime', 'OpenVINO', 'same class'], rows, align=True))


if __name__ == '__main__':
    main()
