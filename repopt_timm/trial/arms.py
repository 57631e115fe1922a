"""The arms of a trial: ways to train one network."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import timm

from ..models import ensure_registered
from ..names import PREFIX, ModelName

# Scales of an arm: from the command line, or from a search that precedes each run.
GIVEN, SEARCHED = 'given', 'searched'


@dataclass(frozen=True)
class Arm:
    """One way to train: words for it, and arguments of the training command that make it."""

    title: str
    arguments: Mapping[str, Any]
    kind: str = 'target'
    # What the learning rates of the command line are multiplied with.
    rate: float = 1.0

    @property
    def network_key(self) -> str:
        """A key that arms of the same network share."""
        return f'{self.kind} {self.arguments.get("model_kwargs", "")}'


# In the order of reports. Scales that were given a name make further arms.
ARMS: dict[str, Arm] = {
    'branches': Arm("timm's multi-branch network, SGD", {'opt': 'sgd'}, 'branches'),
    'unit_branches': Arm(
        'multi-branch network, BatchNorm from 1, SGD',
        {'opt': 'sgd', 'model_kwargs': {'unit_norms': True}},
        'branches',
    ),
    'sgd': Arm('plain network, SGD', {'opt': 'sgd'}),
    'adamw': Arm('plain network, AdamW, decay 0.05', {'opt': 'adamw', 'weight_decay': 0.05}, rate=0.01),
    'dirac': Arm('plain network, nn.init.dirac_, SGD', {'opt': 'sgd', 'init': 'dirac'}),
    'init': Arm('Rule of Initialization alone, SGD', {'opt': 'sgd', 'scales': 'initial'}),
    'repopt': Arm('RepOptSGD, unsearched scales', {'opt': 'repopt_sgd', 'scales': 'initial'}),
    'identity': Arm('RepOptSGD, unsearched scales, identity start', {'opt': 'repopt_sgd', 'scales': 'identity'}),
    'scales': Arm('RepOptSGD, given scales', {'opt': 'repopt_sgd', 'scales': GIVEN}),
    'search': Arm('RepOptSGD, searched scales', {'opt': 'repopt_sgd', 'scales': SEARCHED}),
}

# Arms that a trial has only if it is asked for them.
EXTRA = ('unit_branches', 'adamw')


def arm_of(name: str) -> Arm:
    """Returns an arm of `ARMS`; any other name is of scales that were given."""
    return ARMS.get(name) or Arm(f'RepOptSGD, scales {name}', ARMS['scales'].arguments)


def in_order(names: Iterable[str]) -> list[str]:
    """Returns names of arms, each once, in the order of reports."""
    found = list(dict.fromkeys(names))
    return [name for name in ARMS if name in found] + [name for name in found if name not in ARMS]


def target_name(model: str) -> str:
    """Returns the name of the plain network that a trial is of; `resnet18` means `repopt_resnet18`."""
    if ModelName.parse(model).kind != 'target' or any(mark in model for mark in '.:/'):
        raise ValueError(f"The model is '{model}', expected the name of a plain network, such as repopt_vgg_a0.")
    full = model if PREFIX in model else PREFIX + model
    ensure_registered(full)
    if not timm.is_model(full):
        raise ValueError(f"timm does not know a model '{full}'; expected a name such as repopt_vgg_a0 or resnet18.")
    return full


def arms_of(model: str, names: Sequence[str] | None, scales: Collection[str], search: int | None) -> list[str]:
    """Returns the arms of a trial: the ones in `names`, or all possible ones except `EXTRA`."""
    possible = in_order([*ARMS, *scales])
    branches = ModelName.parse(model).of_kind('branches')
    lacking = {}
    if not timm.is_model(branches):
        lacking['branches'] = lacking['unit_branches'] = f'a {branches} in timm'
    if 'scales' not in scales:
        lacking['scales'] = 'scales: give them with --scales SOURCE'
    if not search:
        lacking['search'] = 'a search: give its epochs with --search N'
    for name in names or ():
        if name not in possible:
            raise ValueError(f"--arms has '{name}', expected one of {', '.join(possible)}, or a name of --scales.")
        if name in lacking:
            raise ValueError(f"--arms has '{name}', which needs {lacking[name]}.")
    if unused := {*scales, *(['search'] if search else [])}.difference(names or possible):
        raise ValueError(f'--arms lacks {", ".join(sorted(unused))}, which --scales or --search asks for.')
    return [name for name in possible if name in (names or set(possible) - {*lacking, *EXTRA})]
