"""The arms of a trial: ways to train one network."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import timm

from ..architectures import ARCHITECTURES
from ..models import ensure_registered
from ..names import PREFIX, ModelName

__all__ = ['ARMS', 'GIVEN', 'SEARCHED', 'Arm', 'arm_of', 'arms_of', 'in_order', 'target_name']

GIVEN = 'given'
SEARCHED = 'searched'


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        title: What it is, in words.
        opt: Optimizer.
        kind: Kind of the model.
        model_kwargs: Model arguments of the arm.
        scales: `--scales` of the run: `initial`, `GIVEN` for those of the command line, `SEARCHED` for those of a
            search that precedes it, or none.
    """

    title: str
    opt: str
    kind: str = 'target'
    scales: str = ''
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def network_key(self) -> str:
        """A key that arms of the same network share."""
        return f'{self.kind} {self.model_kwargs}'


ARMS: dict[str, Arm] = {
    'branches': Arm("timm's multi-branch network, SGD", 'sgd', 'branches'),
    'unit_branches': Arm(
        'multi-branch network, BatchNorm from 1, SGD', 'sgd', 'branches', model_kwargs={'unit_norms': True}
    ),
    'sgd': Arm('plain network, SGD', 'sgd'),
    'init': Arm('Rule of Initialization alone, SGD', 'sgd', scales='initial'),
    'repopt': Arm('RepOptSGD, unsearched scales', 'repopt_sgd', scales='initial'),
    'scales': Arm('RepOptSGD, given scales', 'repopt_sgd', scales=GIVEN),
    'search': Arm('RepOptSGD, searched scales', 'repopt_sgd', scales=SEARCHED),
}
"""Name of an arm to what it is, in the order of reports. Scales that were given a name make further arms."""


def arm_of(name: str) -> Arm:
    """Returns an arm of `ARMS`; any other name is of scales that were given."""
    return ARMS.get(name) or Arm(f'RepOptSGD, scales {name}', 'repopt_sgd', scales=GIVEN)


def in_order(names: Iterable[str]) -> list[str]:
    """Returns names of arms, each once, in the order of reports."""
    found = list(dict.fromkeys(names))
    return [name for name in ARMS if name in found] + [name for name in found if name not in ARMS]


def target_name(model: str) -> str:
    """Returns the name of the plain network that a trial is of; `resnet18` means `repopt_resnet18`.

    Raises:
        ValueError: If timm does not know it, or it is a search or CSLA model, or has a tag or repository.
    """
    name = ModelName.parse(model)
    if '.' in model or ':' in model or '/' in model or name.kind != 'target':
        raise ValueError(f"The model is '{model}', expected the name of a plain network, such as repopt_vgg_a0.")
    full = model if PREFIX in model else PREFIX + model
    ensure_registered(full)
    if not timm.is_model(full):
        raise ValueError(f"timm does not know a model '{full}'; expected a name such as repopt_vgg_a0 or resnet18.")
    return full


def arms_of(model: str, names: Sequence[str] | None, scales: Iterable[str], search: int | None) -> list[str]:
    """Returns the arms of a trial, in the order of reports.

    Args:
        model: Name of the plain network.
        names: Arms that were asked for. Defaults to all that there can be, but `unit_branches`.
        scales: Names of given scales.
        search: Epochs of a search.

    Raises:
        ValueError: If an arm cannot be.
    """
    possible = in_order([*ARMS, *scales])
    reasons = {}
    branches = ModelName.parse(model).of_kind('branches')
    if not timm.is_model(branches):
        reasons['branches'] = reasons['unit_branches'] = f'timm has no {branches}. Choose other arms.'
    elif model not in ARCHITECTURES:
        reasons['unit_branches'] = f'the BatchNorms of {branches} start at 1 anyway. Choose branches.'
    if 'scales' not in scales:
        reasons['scales'] = 'it needs scales. Give them with --scales SOURCE.'
    if not search:
        reasons['search'] = 'it needs a search. Give its epochs with --search N.'
    for name in names or ():
        if name not in possible:
            raise ValueError(f"--arms has '{name}', expected one of {', '.join(possible)}, or a name of --scales.")
        if name in reasons:
            raise ValueError(f"--arms has '{name}', but {reasons[name]}")
    default = [name for name in possible if name not in reasons and name != 'unit_branches']
    return [name for name in possible if name in (names or default)]
