"""What does quantization-aware training with a library's QAT and RepOptSGD do to repopt_vgg_a0.cifar10?

    python docs/evidence/qat.py IMAGES

Trains 16 steps of 64 training images of the folder IMAGES in 8 bits, and prints top-1 on 2,000 validation images: in
float32, quantized before training, and quantized after it. Needs torchao; see docs/deployment.md.
"""

import copy
import random
import sys
from dataclasses import replace
from itertools import islice
from typing import Any

import timm
import torch
from timm.data import create_dataset, create_transform, resolve_model_data_config
from torch.utils.data import DataLoader, Subset
from torchao.quantization.pt2e import (
    FusedMovingAvgObsFakeQuantize,
    MovingAverageMinMaxObserver,
    allow_exported_model_train_eval,
    disable_observer,
)
from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

from repopt_timm import RepOptSGD, load_scales, make_grad_mults
from repopt_timm.reporting import markdown_table


def loader(split: str, count: int, transform: Any) -> DataLoader:
    dataset = create_dataset('', sys.argv[1], split=split, transform=transform)
    indices = random.Random(0).sample(range(len(dataset)), count)
    return DataLoader(Subset(dataset, indices), batch_size=64)


@torch.no_grad()
def accuracy(network: Any, batches: DataLoader) -> float:
    right = [network(images).argmax(1) == labels for images, labels in batches]
    return 100 * torch.cat(right).float().mean().item()


def row(weights: str) -> list[str]:
    model = timm.create_model('repopt_vgg_a0', pretrained=True).eval()
    scales = load_scales('repopt_vgg_a0.cifar10', model)
    transform = create_transform(**resolve_model_data_config(model))
    train, validation = loader('train', 1024, transform), loader('validation', 2000, transform)
    float32 = accuracy(model, validation)
    config = x86.get_default_x86_inductor_quantization_config(is_qat=True)
    if weights == 'per-tensor':
        observer = FusedMovingAvgObsFakeQuantize.with_args(observer=MovingAverageMinMaxObserver, eps=2**-12)
        common = {'qscheme': torch.per_tensor_symmetric, 'ch_axis': None}
        config = replace(config, weight=replace(config.weight, observer_or_fake_quant_ctr=observer, **common))
    example = (next(iter(train))[0],)
    graph = torch.export.export(model.train(), example, dynamic_shapes=({0: torch.export.Dim.AUTO},)).module()
    network = prepare_qat_pt2e(graph, x86.X86InductorQuantizer().set_global(config))
    allow_exported_model_train_eval(network)
    network.eval()
    with torch.no_grad():  # finds the ranges of activations
        for images, _ in islice(train, 8):
            network(images)
    before = accuracy(copy.deepcopy(network).apply(disable_observer), validation)
    mults = make_grad_mults(network, scales)
    optimizer = RepOptSGD(network.parameters(), lr=0.002, momentum=0.9, weight_decay=4e-5, grad_mults=mults)
    network.train()
    for images, labels in train:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()
    network.eval()
    after = accuracy(network.apply(disable_observer), validation)
    return [weights, *(f'{value:.2f}' for value in (float32, before, after))]


def main() -> None:
    torch.manual_seed(0)
    head = ['weights', 'float32', 'INT8, not trained', 'INT8, trained']
    print(markdown_table(head, map(row, ('per-channel', 'per-tensor')), align=True))


if __name__ == '__main__':
    main()
