"""The arms of a trial: ways to train one network."""

from collections.abc import Sequence
from dataclasses import dataclass

import timm

from ..models import ensure_registered
from ..names import PREFIX, ModelName

__all__ = ['ARMS', 'GIVEN', 'SEARCHED', 'Arm', 'arms_of', 'target_name']

GIVEN = 'given'
SEARCHED = 'searched'


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        title: What it is, in words.
        opt: Optimizer.
        suffix: End of the model's name.
        scales: `--scales` of the run: `initial`, `GIVEN` for those of the command line, `SEARCHED` for those of a
            search that precedes it, or none.
    """

    title: str
    opt: str
    suffix: str = ''
    scales: str = ''


ARMS: dict[str, Arm] = {
    'branches': Arm('multi-branch network, SGD', 'sgd', suffix='_branches'),
    'sgd': Arm('plain network, SGD', 'sgd'),
    'init': Arm('Rule of Initialization alone, SGD', 'sgd', scales='initial'),
    'repopt': Arm('RepOptSGD, unsearched scales', 'repopt_sgd', scales='initial'),
    'scales': Arm('RepOptSGD, given scales', 'repopt_sgd', scales=GIVEN),
    'search': Arm('RepOptSGD, searched scales', 'repopt_sgd', scales=SEARCHED),
}
"""Name of an arm to what it is, in the order of reports."""


def target_name(model: str) -> str:
    """Returns the name of the plain network that a trial is of; `resnet18` means `repopt_resnet18`.

    Raises:
        ValueError: If timm does not know it, or it is a search or CSLA model, or has a tag or repository.
    """
    name = ModelName.parse(model)
    if '.' in model or ':' in model or '/' in model or name.kind != 'target' or model.endswith(ARMS['branches'].suffix):
        raise ValueError(f"The model is '{model}', expected the name of a plain network, such as repopt_vgg_a0.")
    full = model if PREFIX in model else PREFIX + model
    ensure_registered(full)
    if not timm.is_model(full):
        raise ValueError(f"timm does not know a model '{full}', expected such as repopt_vgg_a0 or resnet18.")
    return full


def arms_of(model: str, names: Sequence[str] | None, scales: str | None, search: int | None) -> list[str]:
    """Returns the arms of a trial, in the order of reports.

    Args:
        model: Name of the plain network.
        names: Arms that were asked for. Defaults to all that there can be.
        scales: Given scales.
        search: Epochs of a search.

    Raises:
        ValueError: If an arm cannot be.
    """
    reasons = {}
    if not timm.is_model(model + ARMS['branches'].suffix):
        reasons['branches'] = f'timm has no {model}{ARMS["branches"].suffix}'
    if not scales:
        reasons['scales'] = 'there is no --scales'
    if not search:
        reasons['search'] = 'there is no --search'
    for name in names or ():
        if name in reasons:
            raise ValueError(f"--arms has '{name}', but {reasons[name]}. Add it, or choose other arms.")
    return [name for name in ARMS if (name in names if names else name not in reasons)]
