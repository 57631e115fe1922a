"""Grad Mults, the Rule of Iteration (section 3.3 and appendix A of arXiv 2205.15242)."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .branches import Branch, make_branches, merge
from .convolution import branches_of
from .modules import is_sharded, modules_of, uncompiled_name, unwrap, whole
from .prior import log_convs_without, refusal
from .scales import CarriedScales, Scales, carried_scales
from .twins import ScalesMapping, scales_for

__all__ = ['UPDATE_RULES', 'GradMults', 'make_grad_mults']

UPDATE_RULES = {'sgd': 2, 'adamw': 1}
"""Update rule to the power of |s_b| in its Grad Mult."""


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
        names: Mapping[Tensor, str] | None = None,
        without_zeros: Mapping[Tensor, Tensor] | None = None,
    ):
        self._masks = dict(masks)
        self._names = dict(names or {})
        self._without_zeros = dict(without_zeros or {})
        self.update_rule = update_rule
        self.fingerprint = fingerprint

    def __getitem__(self, parameter: Tensor) -> Tensor:
        mask = self._masks[parameter]
        if mask.device != parameter.device:
            # The model has moved since.
            mask = self._masks[parameter] = mask.to(parameter.device)
        return mask

    def __contains__(self, parameter: object) -> bool:
        return parameter in self._masks

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def name_of(self, parameter: Tensor) -> str:
        """Returns the name of a kernel's convolution, for messages."""
        return self._names.get(parameter, f'a kernel of shape {tuple(parameter.shape)}')

    def of(self, parameters: Iterable[Tensor]) -> 'GradMults':
        """Returns the Grad Mults of some of the parameters, for an optimizer of these alone."""
        own = {kernel: self._masks[kernel] for kernel in parameters if kernel in self._masks}
        return GradMults(own, self.update_rule, self.fingerprint, self._names, self._without_zeros)

    def divisor(self, parameter: Tensor) -> Tensor:
        """Returns the mask of a kernel with ones in the place of zeros: the multiplied gradient is 0 there already."""
        if parameter in self._without_zeros and self._without_zeros[parameter].device != parameter.device:
            self._without_zeros[parameter] = self._without_zeros[parameter].to(parameter.device)
        return self._without_zeros.get(parameter, self[parameter])


class _Kernel(NamedTuple):
    name: str
    weight: Tensor
    branches: tuple[Branch, ...]
    vectors: Mapping[str, Tensor]


def make_grad_mults(model: nn.Module, scales: ScalesMapping | None = None, update_rule: str = 'sgd') -> GradMults:
    """Makes the Grad Mults of a plain model's kernels.

    One line of log names the convolutions that have none.

    Args:
        model: The model, or any wrapper around it: convolutions are found wherever they are. With `scales` it may have
            no convolutions at all, as after `torch.export` or a pt2e preparation: kernels are then found by the name of
            the parameter, `<module>.weight`.
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
    for name, module in model.named_modules():
        if (branches_of(module)) and any(parameter.requires_grad for parameter in module.parameters()):
            raise ValueError(
                f"'{name}' of {type(model).__name__} is a CSLA convolution: its branches are scaled already, Grad "
                f'Mults would scale them twice. Train it with an ordinary optimizer, or train to_plain(model).'
            )
    if scales is None:
        kernels, fingerprint = _carrying_kernels(model)
    else:
        kernels, fingerprint = _named_kernels(model, scales)
    if not kernels:
        raise ValueError(
            f'No convolution of {type(model).__name__} carries scales, so there is nothing to multiply its gradients '
            f"with. Create the model with scales=... (a file, 'hf-hub:user/repo', 'initial'), call attach_scales(), or "
            f'give make_grad_mults(model, scales) the scales, to find kernels by the names of parameters.'
        )
    having = {kernel.weight for kernel in kernels}
    named = [name for name, each in modules_of(model).items() if isinstance(each, nn.Conv2d) and each.weight in having]
    log_convs_without(model, named, 'have no Grad Mult and train as without scales')
    found: dict[Tensor, _Kernel] = {}
    masks = {}
    for kernel in kernels:
        other = found.setdefault(kernel.weight, kernel)
        same = other.branches == kernel.branches and all(
            torch.equal(vector, other.vectors[name]) for name, vector in kernel.vectors.items()
        )
        if not same:
            raise ValueError(
                f"'{other.name}' and '{kernel.name}' share one kernel, but have different scales. Give both the same."
            )
        masks[kernel.weight] = _grad_mult(kernel, UPDATE_RULES[update_rule])
    zeros = {kernel: mask.masked_fill(mask == 0, 1.0) for kernel, mask in masks.items() if not whole(mask.all())}
    return GradMults(masks, update_rule, fingerprint, {kernel.weight: kernel.name for kernel in kernels}, zeros)


def _grad_mult(kernel: _Kernel, power: int) -> Tensor:
    """Returns `M = sum_b |s_b|^power A_b 1`: the kernel that the branches merge to if all operators are ones."""
    weight = kernel.weight
    options: dict[str, Any] = {'device': weight.device, 'dtype': torch.promote_types(weight.dtype, torch.float32)}
    ones = {branch.name: torch.ones(branch.operator_shape(weight.shape), **options) for branch in kernel.branches}
    powers = {name: vector.to(**options).abs().pow(power) for name, vector in kernel.vectors.items()}
    mask = merge(kernel.branches, ones, powers, weight.shape)
    if is_sharded(weight):
        from torch.distributed.tensor import distribute_tensor

        sharded: Any = weight
        return distribute_tensor(mask, sharded.device_mesh, sharded.placements, src_data_rank=None)
    return torch.empty_like(weight, dtype=mask.dtype, requires_grad=False).copy_(mask)


def _carrying_kernels(model: nn.Module) -> tuple[list[_Kernel], str]:
    carried, modules = carried_scales(model), modules_of(model)
    _check_complete(model, carried, modules)
    kernels = []
    for name, each in carried.items():
        conv: Any = modules[name]
        if reason := refusal(conv):
            raise ValueError(
                f"'{name}' of {type(model).__name__} carries scales, but {reason}. Its Grad Mult would be lost: undo "
                f'that, or leave its scales out.'
            )
        branches = make_branches(each.scales.counts[each.module], conv)
        kernels.append(_Kernel(name, conv.weight, branches, each.scales[each.module]))
    return kernels, '+'.join(sorted({each.scales.fingerprint for each in carried.values()}))


def _check_complete(model: nn.Module, carried: Mapping[str, CarriedScales], modules: Mapping[str, nn.Module]) -> None:
    """Raises a ValueError if a convolution got scales, and another module has taken its place since."""
    # Names of each convolution that carries scales, and of each module that contains one.
    covered = {name.rsplit('.', end)[0] for name in carried for end in range(name.count('.') + 1)}
    for name, each in carried.items():
        prefix = name.removesuffix(each.module)
        if prefix + each.module != name:
            continue
        for sibling in each.scales:
            # A part of the network, such as a backbone without its last stage, may lack some or have an Identity.
            replaced = modules.get(prefix + sibling)
            if not isinstance(replaced, nn.Identity | None) and prefix + sibling not in covered:
                raise ValueError(
                    f"'{prefix + sibling}' of {type(model).__name__} got scales, but a {type(replaced).__name__} "
                    f'without them has taken its place. Attach the scales after replacing modules.'
                )


def _named_kernels(model: nn.Module, scales: ScalesMapping) -> tuple[list[_Kernel], str]:
    inner = unwrap(model)
    modules: dict[str, Any] = modules_of(inner)
    if all(isinstance(modules.get(name), nn.Conv2d) for name in scales):
        if isinstance(inner, torch.fx.GraphModule) and isinstance(scales, Scales):
            # A graph has the class's name, not the architecture's.
            scales = scales.renamed('').for_model(inner).renamed(scales.architecture)
        else:
            scales = scales_for(inner, scales)
        kernels = [
            _Kernel(name, modules[name].weight, make_branches(scales.counts[name], modules[name]), scales[name])
            for name in scales
        ]
        return kernels, scales.fingerprint
    if not isinstance(scales, Scales) or not scales.geometry:
        raise ValueError(
            f'{type(model).__name__} has no convolutions that show their geometry. Give scales.for_model(model), made '
            f'with the plain model.'
        )
    params = {uncompiled_name(name): param for name, param in inner.named_parameters()}
    kernels = []
    for name, vectors in scales.items():
        where = f"{scales.source or 'The scales'}: module '{name}'"
        weight = params.get(f'{name}.weight')
        # An exported graph has plain holders of parameters in the place of modules.
        graph = type(modules.get(name, nn.Module())) is nn.Module
        if weight is None or weight.ndim != 4 or not graph:
            raise ValueError(
                f'{where} has scales, but {type(model).__name__} has neither such a convolution nor a parameter '
                f"'{name}.weight' of four dimensions. Scales go by module name: use the scales of this network."
            )
        searched = scales.geometry[name]
        inputs = weight.shape[1] if searched.in_channels is None else searched.in_channels // searched.groups
        expected = (searched.out_channels, inputs, *searched.kernel_size)
        if tuple(weight.shape) != expected:
            raise ValueError(
                f'{where} was searched with a kernel of shape {expected}, but its kernel here has the shape '
                f'{tuple(weight.shape)}. Use the scales of this network.'
            )
        counts = scales.counts[name]
        branches = tuple(Branch.of(branch, weight.shape[2:], count) for branch, count in counts.items())
        kernels.append(_Kernel(name, weight, branches, vectors))
    return kernels, scales.fingerprint
