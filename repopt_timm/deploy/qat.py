"""Quantization-aware training (QAT): what the INT8 file computes is trained, and its weights go back into the file."""

import argparse
import copy
import hashlib
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..datasets import Images, open_evaluation
from ..reparam import GradMults, carried_scales, make_grad_mults, network_name
from ..scales import Scales
from ..train.run import train
from ..train.run_checkpoints import find_checkpoint
from .classifier import image_input, onnx_classifier, preprocessing, torch_classifier
from .evaluation import check_classes, classify, random_images
from .onnx_export import to_onnx
from .onnx_graph import constants_of
from .onnx_network import OnnxNetwork
from .quantization import Quantization, QuantizationOptions, quantize_calibrated
from .runtime import open_session, require, save_onnx
from .trained_model import deployed, load_trained

__all__ = ['WEIGHT_BITS', 'FakeQuantized', 'fake_quantize', 'folded_grad_mults', 'train_quantized']

WEIGHT_BITS = (8, 4)

_logger = logging.getLogger(__name__)

# A factor of a folded kernel is exact but for the rounding of the folding.
_TOLERANCE = 1e-4

# Sums in another order round to another code now and then, and every layer passes it on.
_ROUNDING = 0.2


@dataclass(frozen=True)
class FakeQuantized:
    """A trained model on its way to INT8.

    Attributes:
        quantization: The model in float, BatchNorm folded, and in QDQ format.
        network: What the QDQ format computes, to be trained.
        initial: The QDQ format with the network's weights before training: what INT8 costs without it.
    """

    quantization: Quantization
    network: OnnxNetwork
    initial: Any


def fake_quantize(
    model: nn.Module,
    images: Images,
    config: Mapping[str, Any],
    options: QuantizationOptions | None = None,
    weight_bits: int = 8,
) -> FakeQuantized:
    """Makes the network that a model's INT8 file computes.

    BatchNorm is folded with its statistics as they are, and is not a layer any more: the folded kernels and biases are
    trained. Activations are quantized where `quantize` does, with the ranges that it calibrates.

    Args:
        model: As `load_trained` returns it; stays as it is.
        images: Images to calibrate on.
        config: Preprocessing, as `classifier.preprocessing` gives it.
        options: How to quantize.
        weight_bits: 8, or 4 for codes of -7 to 7, which the file keeps in 8 bits.

    Raises:
        ValueError: If the model cannot be exported or quantized, or has an operator that cannot be trained.
        ImportError: If the `[deploy]` extra is not installed.
    """
    options = options or QuantizationOptions()
    if weight_bits not in WEIGHT_BITS:
        raise ValueError(f'weight_bits={weight_bits}: expected one of {", ".join(map(str, WEIGHT_BITS))}.')
    require('onnxscript')
    proto, _ = to_onnx(deployed(copy.deepcopy(model)), config)
    done = quantize_calibrated(proto, images, options)
    network: Any = OnnxNetwork(done.quantized, constants_of(done.model), weight_bits)
    # What training, checkpoints and scales know a model by.
    trained: Any = model
    network.pretrained_cfg = {**trained.pretrained_cfg, 'architecture': network_name(model)}
    network.num_classes = trained.num_classes
    initial = network.write_to(done.quantized)
    _check_agreement(network, initial, config)
    return FakeQuantized(done, network, initial)


@torch.no_grad()
def _check_agreement(network: nn.Module, file: Any, config: Mapping[str, Any]) -> None:
    images = random_images(config, 2)
    try:
        trained = network(images)
    except NotImplementedError as error:
        raise ValueError(f'Fake-quantized training lacks {error}: quantize this model without training.') from None
    name = image_input(file)[0]
    run = torch.from_numpy(open_session(file, optimize=False).run(None, {name: images.numpy()})[0])
    difference = ((trained - run).norm() / run.norm().clamp(min=1e-6)).item()
    if not difference <= _ROUNDING:
        raise ValueError(
            f'The network to be trained differs from its file in ONNX Runtime: logits by {difference:.2g} of their '
            f'norm, expected at most {_ROUNDING}. Quantize this model without training.'
        )


def folded_grad_mults(model: nn.Module, network: nn.Module, update_rule: str = 'sgd') -> GradMults | None:
    """Makes the Grad Mults of a network with BatchNorm folded into its kernels.

    Training the kernel `c W` with `M |c|^power` is training W with M and BatchNorm's factor `c = gamma / sigma`
    constant.

    Args:
        model: The model as it was trained, whose convolutions carry scales.
        network: The same with folded kernels, by the same names.
        update_rule: `sgd` or `adamw`.

    Returns:
        The Grad Mults; None if the model carries no scales.

    Raises:
        ValueError: If a kernel with scales is missing, or is more than a folded one.
    """
    if not carried_scales(model):
        return None
    scales = Scales.from_model(model)
    mults = make_grad_mults(network, scales, update_rule)
    kernels = dict(network.named_parameters())
    trained: Any = model
    factors: dict[Tensor, Tensor] = {
        kernels[f'{name}.weight']: _factors(name, trained.get_submodule(name).weight, kernels[f'{name}.weight'])
        for name in scales
    }
    return mults.folded(factors)


@torch.no_grad()
def _factors(name: str, kernel: Tensor, folded: Tensor) -> Tensor:
    """Returns what each output channel of a kernel was multiplied by."""
    before, after = (each.cpu().double().flatten(1) for each in (kernel, folded))
    square = before.square().sum(1)
    # A channel of zeros stays one, whatever it is multiplied by.
    factors = torch.where(square > 0, (before * after).sum(1) / square.clamp(min=1e-300), 1.0)
    if not (after - factors[:, None] * before).norm() <= _TOLERANCE * after.norm():
        raise ValueError(
            f"The kernel of '{name}' in the exported model is not its own times a factor for each channel, so that its "
            f'Grad Mult is unknown. Leave its scales out.'
        )
    return factors


def train_quantized(
    source: str | os.PathLike,
    out: str | os.PathLike,
    args: argparse.Namespace,
    options: QuantizationOptions | None = None,
    weight_bits: int = 8,
) -> dict[str, Any]:
    """Trains a model in the form that it has in INT8, and writes that as an ONNX file in QDQ format.

    Args:
        source: What `load_trained` takes.
        out: File to write.
        args: Arguments of the training, as `parse_arguments` returns them, after `prepare_device`; `data_dir` is an
            image folder. `opt` defaults to `repopt_sgd` for a model with scales, else to `sgd`.
        options: How to quantize; its images come from the training split.
        weight_bits: See `fake_quantize`.

    Returns:
        `out`, `bytes`, `run`, `epochs`, `images`, and top-1 accuracy in percent on the validation split: `float32`;
        `untrained`, quantized without training; `fake_quantized`, trained, in PyTorch; `top1`, the file's in ONNX
        Runtime.

    Raises:
        FileNotFoundError: If there is no such model, folder or file.
        ValueError: If arguments do not go together, the model cannot be quantized or trained, or training diverges.
        OSError: If a checkpoint or the file cannot be written.
        InterruptedRunError: If Ctrl-C or SIGTERM ended it.
        ImportError: If the `[deploy]` extra is not installed.
    """
    options = options or QuantizationOptions()
    with_scales = args.opt is None or 'repopt' in args.opt
    model = load_trained(source, args.scales or None, need_scales=with_scales)
    if args.opt is None:
        args.opt = 'repopt_sgd' if carried_scales(model) else 'sgd'
    rule = {'repopt_sgd': 'sgd', 'repopt_adamw': 'adamw'}.get(args.opt.removeprefix('lookahead_'))
    if rule is not None and not carried_scales(model):
        raise ValueError(
            f"'{source}' carries no scales, which {args.opt} needs: name them with --scales, or --opt sgd."
        )
    if rule is not None and options.equalize:
        raise ValueError(
            f'--equalize scales kernels by their input channels, for which {args.opt} has no Grad Mults: train without '
            f'it, or with --opt sgd.'
        )
    if rule == 'adamw' and args.clip_grad is not None:
        raise ValueError('--clip-grad measures the CSLA norm with the Grad Mults of --opt repopt_sgd: take that.')
    args.model = network_name(model)
    args.quantization = {**asdict(options), 'weight_bits': weight_bits, 'weights_before': _digest(model)}
    _check_resumed(args)
    config = preprocessing(vars(args), model=model)
    args.input_size = list(config['input_size'])
    args.input_img_mode = config.get('input_img_mode')
    made: list[FakeQuantized] = []

    def make(args: argparse.Namespace, dataset: Any, device: torch.device) -> tuple[nn.Module, dict[str, Any]]:
        images = open_evaluation(args.data_dir, args.train_split, config, args.class_map)
        check_classes(torch_classifier(model.eval(), overrides=config), images)
        made.append(fake_quantize(model, images, config, options, weight_bits))
        for line in made[0].quantization.warnings():
            _logger.warning(line)
        network = made[0].network.to(device)
        mults = None if rule is None else folded_grad_mults(model, network, rule)
        return network, {} if mults is None else {'grad_mults': mults}

    result = train(args, make)
    done = made[0].quantization
    trained: Any = result.model
    network = trained.cpu().eval()
    file = network.write_to(done.quantized)
    save_onnx(file, out)
    images = open_evaluation(args.data_dir, args.val_split, config, args.class_map)
    classifiers = {
        'float32': onnx_classifier(done.model),
        'untrained': onnx_classifier(made[0].initial),
        'fake_quantized': torch_classifier(network, overrides=config),
        'top1': onnx_classifier(file),
    }
    found = classify(classifiers, images)
    return {
        'out': os.fspath(out),
        'bytes': file.ByteSize(),
        'run': os.fspath(result.folder),
        'epochs': len(result.history),
        'images': len(images),
        **{name: answers.accuracy() for name, answers in found.items()},
    }


def _check_resumed(args: argparse.Namespace) -> None:
    """Raises a ValueError if the run to be resumed was quantized otherwise: its weights are trained for that file."""
    folder = Path(args.output, args.experiment or '')
    found = find_checkpoint(folder, args.resume, override=True) if args.resume else None
    if found is None:
        return
    path, checkpoint = found
    saved = getattr(checkpoint.get('args'), 'quantization', None)
    if saved is None:
        raise ValueError(
            f"'{path}' is a run of `repopt-timm train`, expected one of `repopt-timm qat`: name the folder of "
            f'one, or start a new run in another --experiment.'
        )
    changes = [
        'other weights' if name == 'weights_before' else f'{name} {saved.get(name)!r} -> {value!r}'
        for name, value in args.quantization.items()
        if saved.get(name) != value
    ]
    if changes:
        raise ValueError(
            f"'{path}' was quantized otherwise: {', '.join(changes)}. Its weights fit no other file: resume with the "
            f'arguments of that run, or start a new one in another --experiment.'
        )


def _digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]
