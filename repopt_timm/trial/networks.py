"""What the networks of a trial cost: parameters, saved activations, time of a step."""

import json
import logging
import statistics
import timeit
from collections.abc import Callable
from functools import partial

import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..errors import explaining
from ..files import write_text
from ..model_size import count_parameters
from ..reporting import take_turns
from ..tables import read_mapping
from ..train.validation import check_layout
from .arms import arm_of
from .trial_folder import Trial

_FILE = 'networks.json'
_COSTS = ('parameters', 'convolutions', 'activations', 'step_seconds')

_logger = logging.getLogger(__name__)


def read_networks(trial: Trial) -> dict[str, dict[str, float]]:
    """Reads what `measure_networks` wrote; nothing if it did not."""
    path = trial.folder / _FILE
    found = read_mapping(path) if path.exists() else {}
    try:
        return {arm: {name: costs[name] + 0 for name in _COSTS} for arm, costs in found.items()}
    except (KeyError, TypeError) as error:
        raise ValueError(f"'{path}' is damaged: {error!r}.") from None


def measure_networks(trial: Trial, device: torch.device) -> None:
    """Measures the network of each arm, and writes `networks.json`: arm to numbers.

    `activations` are the bytes that a forward pass saves for each image, `step_seconds` the median of a training step.
    """
    if set(trial.arms) <= set(read_networks(trial)):
        return
    shared = trial.shared
    size, batch = tuple(shared['input_size']), shared['batch_size']
    dtype = getattr(torch, shared['amp_dtype']) if shared['amp'] else None
    layout = torch.channels_last if shared['channels_last'] else torch.contiguous_format
    images = torch.randn(max(batch, 3), *size, device=device).to(memory_format=layout)
    labels = torch.randint(trial.num_classes, images.shape[:1], device=device)
    _logger.info(f'Measuring training steps on {device}, {batch} images of {size} each.')
    keys = {arm: arm_of(arm).network_key for arm in trial.arms}
    found: dict[str, dict[str, float]] = {}
    steps: dict[str, Callable[[], float]] = {}
    for key, arm in {key: arm for arm, key in keys.items()}.items():
        with explaining(f'The network of arm {arm} cannot be made with these --model-kwargs, or trained on {size}'):
            model = make_network(trial, arm).to(device).to(memory_format=layout)
            if shared['channels_last']:
                check_layout(model, size, device, dtype)
            step = training_step(model, images[:batch], labels[:batch], dtype)
            step()
            found[key] = {
                'parameters': count_parameters(model),
                'convolutions': sum(isinstance(module, nn.Conv2d) for module in model.modules()),
                'activations': activation_bytes(model, images, labels, dtype),
            }
        steps[key] = partial(timeit.timeit, step, number=1)
    for key, seconds in take_turns(steps, 5, warmup=1).items():
        found[key]['step_seconds'] = statistics.median(seconds)
    write_text(trial.folder / _FILE, json.dumps({arm: found[key] for arm, key in keys.items()}, indent=2) + '\n')


def make_network(trial: Trial, arm: str = 'sgd') -> nn.Module:
    """Makes the network of an arm, by default the plain one."""
    shared, arguments = trial.shared, trial.arguments_of(arm)
    model: nn.Module = timm.create_model(
        arguments['model'],
        num_classes=trial.num_classes,
        in_chans=shared['input_size'][0],
        global_pool=shared['gp'],
        **arguments['model_kwargs'],
    )
    return model


def training_step(
    model: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype | None = None, opt: str = 'sgd'
) -> Callable[[], None]:
    """Returns a training step, which waits until the device has finished it; its forward pass is in `dtype`, if any."""
    optimizer = create_optimizer_v2(model.train(), opt, lr=1e-3, momentum=0.9, weight_decay=4e-5)

    def step() -> None:
        _loss(model, images, labels, dtype).backward()
        optimizer.step()
        optimizer.zero_grad()
        if images.is_cuda:
            torch.cuda.synchronize(images.device)

    return step


def activation_bytes(model: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype | None = None) -> int:
    """Returns the memory that a forward pass saves for the backward pass for each image, of three images or more.

    Tensors that share their memory count once; what is saved for the kernels alone does not count.
    """
    saved = []
    for count in (2, 3):
        storages: dict[int, Tensor] = {}

        def pack(tensor: Tensor, storages: dict[int, Tensor] = storages) -> Tensor:
            # Kept, so that no later tensor gets the same storage; detached, as its own graph would never be freed.
            storages[tensor.untyped_storage()._cdata] = tensor.detach()
            return tensor.detach()

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            _loss(model.train(), images[:count], labels[:count], dtype)
        # Parameters and the batch are as large both times.
        saved.append(sum(each.untyped_storage().nbytes() for each in storages.values()))
    return saved[1] - saved[0]


def _loss(model: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype | None) -> Tensor:
    with torch.autocast(images.device.type, dtype=dtype, enabled=dtype is not None):
        return F.cross_entropy(model(images), labels)
