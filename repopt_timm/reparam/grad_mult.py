"""Grad Mults, the Rule of Iteration (section 3.3 and appendix A of arXiv 2205.15242)."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .branches import Branch, merge
from .convolution import branches_of
from .modules import is_sharded, modules_of, unwrap, whole
from .prior import log_convs_without, refusal
from .scales import CarriedScales, Scales, ScalesMapping, carried_scales, scales_for

UPDATE_RULES = {'sgd': 2, 'adamw': 1}
"""Exponent of |s_b| in the Grad Mult, by update rule."""


class GradMults(Mapping[Tensor, Tensor]):
    """Parameter to Grad Mult for one update rule: a mask of the kernel's shape, on its device.

    Attributes:
        update_rule: `sgd` or `adamw`.
        fingerprint: Identifies the scales that the Grad Mults were made of.
    """

    def __init__(
        self,
        masks: Mapping[Tensor, Tensor],
        update_rule: str,
        fingerprint: str,
        names: Mapping[Tensor, str],
        without_zeros: Mapping[Tensor, Tensor],
    ):
        self._masks = dict(masks)
        self._names = dict(names)
        self._without_zeros = dict(without_zeros)
        self.update_rule = update_rule
        self.fingerprint = fingerprint

    def __getitem__(self, parameter: Tensor) -> Tensor:
        mask = self._masks[parameter]
        if mask.device != parameter.device:
            # The model has moved since.
            mask = self._masks[parameter] = mask.to(parameter.device)
        return mask

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def name_of(self, parameter: Tensor) -> str:
        """Returns the name of a kernel's convolution, for messages."""
        return self._names[parameter]

    def of(self, parameters: Iterable[Tensor]) -> 'GradMults':
        """Returns the Grad Mults of some of the parameters, for an optimizer of these alone."""
        own = {kernel: self._masks[kernel] for kernel in parameters if kernel in self._masks}
        return GradMults(own, self.update_rule, self.fingerprint, self._names, self._without_zeros)

    def divisor(self, parameter: Tensor) -> Tensor:
        """Returns what RepOptAdamW divides a kernel by: its mask, with 1 where the mask is 0."""
        divisor = self._without_zeros.get(parameter)
        return self[parameter] if divisor is None else divisor.to(parameter.device)


def make_grad_mults(model: nn.Module, scales: ScalesMapping | None = None, update_rule: str = 'sgd') -> GradMults:
    """Makes the Grad Mults of a plain model's kernels.

    Logs one line that names the convolutions without one.

    Args:
        model: The model, or any wrapper around it: convolutions are found wherever they are. With `scales` it may be a
            graph without convolutions, as after `torch.export` or a pt2e preparation: kernels are then found by the
            name of the parameter, `<module>.weight`.
        scales: Module name to branch name to vector of shape (O,). Defaults to the scales that the convolutions carry.
        update_rule: `sgd` for the power 2, `adamw` for the power 1.

    Returns:
        Kernel to Grad Mult, `sum_b n_b |s_b|^power M_b` with the counts n_b: a mask of the kernel's shape, device,
        memory format and placement, in float32 or the kernel's dtype if that is wider.

    Raises:
        ValueError: If no convolution has scales, a kernel with scales cannot be trained by them (pruned,
            weight-normalized, replaced, tied to one with other scales), the scales do not fit, the model is a
            Hyper-Search or CSLA model, whose branches already are scaled, or the update rule is unknown.
    """
    if update_rule not in UPDATE_RULES:
        raise ValueError(f"Unknown update rule '{update_rule}', expected one of {sorted(UPDATE_RULES)}.")
    model = unwrap(model)
    for name, module in model.named_modules():
        if branches_of(module) and any(parameter.requires_grad for parameter in module.parameters()):
            raise ValueError(
                f"'{name}' of {type(model).__name__} is a CSLA convolution: its branches are scaled already, Grad "
                f'Mults would scale them twice. Train it with an ordinary optimizer, or train to_plain(model).'
            )
    modules: dict[str, Any] = modules_of(model)
    graph = isinstance(model, torch.fx.GraphModule)
    if scales is None:
        kernels = _carrying_kernels(model)
    elif graph and not all(isinstance(modules.get(name), nn.Conv2d) for name in scales):
        kernels = _kernels_of_graph(model, scales)
    else:
        if graph and isinstance(scales, Scales):
            # A graph is named after its class, not after the network.
            fitting = scales.renamed('').for_model(model).renamed(scales.architecture)
        else:
            fitting = scales_for(model, scales)
        kernels = {name: (modules[name].weight, CarriedScales(fitting, name)) for name in fitting}
    if not kernels:
        raise ValueError(
            f'No convolution of {type(model).__name__} carries scales: no gradient would be multiplied. Create the '
            f'model with scales=..., call prepare(model, scales), or name the scales: make_grad_mults(model, scales).'
        )
    weights = {weight for weight, _ in kernels.values()}
    having = [name for name, each in modules.items() if isinstance(each, nn.Conv2d) and each.weight in weights]
    log_convs_without(model, having, 'have no Grad Mult and train as usual', logging.WARNING)
    names: dict[Tensor, str] = {}
    masks: dict[Tensor, Tensor] = {}
    zeros: dict[Tensor, Tensor] = {}
    for name, (weight, own) in kernels.items():
        # `M = sum_b |s_b|^power A_b 1` is the kernel that the branches merge to if all operators are ones.
        options: dict[str, Any] = {'device': weight.device, 'dtype': torch.promote_types(weight.dtype, torch.float32)}
        counts = own.scales.counts[own.module]
        branches = [Branch.of(branch, weight.shape[2:], count) for branch, count in counts.items()]
        ones = {branch.name: torch.ones(branch.operator_shape(weight.shape), **options) for branch in branches}
        vectors = own.scales[own.module]
        powers = {branch: each.to(**options).abs().pow(UPDATE_RULES[update_rule]) for branch, each in vectors.items()}
        mask = merge(branches, ones, powers, weight.shape)
        if weight in masks and not torch.equal(whole(masks[weight]), mask):
            raise ValueError(f"'{names[weight]}' and '{name}' share one kernel, but have different scales.")
        names[weight], masks[weight] = name, _laid_out_like(weight, mask)
        if not mask.all():
            zeros[weight] = _laid_out_like(weight, mask.masked_fill(mask == 0, 1.0))
    fingerprints = {own.scales.fingerprint for _, own in kernels.values()}
    return GradMults(masks, update_rule, '+'.join(sorted(fingerprints)), names, zeros)


def _laid_out_like(weight: Any, mask: Tensor) -> Tensor:
    if is_sharded(weight):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(mask, weight.device_mesh, weight.placements, src_data_rank=None)
    return torch.empty_like(weight, dtype=mask.dtype, requires_grad=False).copy_(mask)


def _carrying_kernels(model: nn.Module) -> dict[str, tuple[Tensor, CarriedScales]]:
    carried = carried_scales(model)
    modules: dict[str, Any] = modules_of(model)
    networks = {
        (name.removesuffix(each.module), each.scales) for name, each in carried.items() if name.endswith(each.module)
    }
    for prefix, scales in networks:
        for sibling in scales:
            # A part of the network, such as a backbone without its last stage, may lack some or have an Identity.
            found = modules.get(prefix + sibling)
            if not isinstance(found, nn.Identity | None) and not carried_scales(found):
                raise ValueError(
                    f"'{prefix + sibling}' of {type(model).__name__} got scales, but a {type(found).__name__} without "
                    f'them has taken its place. Attach the scales after replacing modules.'
                )
    for name in carried:
        if reason := refusal(modules[name]):
            raise ValueError(
                f"'{name}' of {type(model).__name__} carries scales, but {reason}. Its Grad Mult would be lost: undo "
                f'that, or leave its scales out.'
            )
    return {name: (modules[name].weight, each) for name, each in carried.items()}


def _kernels_of_graph(graph: nn.Module, scales: ScalesMapping) -> dict[str, tuple[Tensor, CarriedScales]]:
    if not isinstance(scales, Scales) or not scales.geometry:
        raise ValueError(
            f'{type(graph).__name__} has no convolutions that show their geometry. Give scales.for_model(model), made '
            f'with the plain model.'
        )
    modules, params = modules_of(graph), dict(graph.named_parameters())
    kernels: dict[str, tuple[Tensor, CarriedScales]] = {}
    for name, searched in scales.geometry.items():
        weight = params.get(f'{name}.weight')
        # An exported graph has plain holders of parameters in the place of modules.
        holder = modules.get(name, nn.Module())
        shape = () if weight is None or (type(holder) is not nn.Module and refusal(holder)) else tuple(weight.shape)
        inputs = shape[1:2] if searched.in_channels is None else (searched.in_channels // searched.groups,)
        expected = (searched.out_channels, *inputs, *searched.kernel_size)
        if weight is None or shape != expected:
            raise ValueError(
                f"{scales.source or 'The scales'}: '{name}' was searched with a kernel of shape {expected}, but "
                f"{type(graph).__name__} has {shape or 'none'} as '{name}.weight'. Use the scales of this network."
            )
        kernels[name] = (weight, CarriedScales(scales, name))
    return kernels
