"""`bench search`: a Hyper-Search step against one of the plain target."""

from .contenders import architecture_of, hyper_search, separate_branches, target
from .report import Goal, Row
from .settings import Settings
from .train import ACTIVATIONS, SAVED, TIME, step_rows

__all__ = ['bench_search']

_SAVED_GOAL = Goal(1.05, '<= 1.05 x')
_GOALS = {TIME: Goal(1.15, '<= 1.15 x'), ACTIVATIONS: _SAVED_GOAL, SAVED: _SAVED_GOAL}


def bench_search(settings: Settings) -> list[Row]:
    """Compares the search with merged kernels, and with branches that run one by one, with the target."""
    architecture, device = architecture_of(settings.model), settings.device
    searched = f'{settings.model}_hs'
    model = hyper_search(architecture, device)
    models = {
        settings.model: target(architecture, device),
        searched: model,
        f'{searched}, three separate branches': separate_branches(model),
    }
    goals = {what: {searched: goal} for what, goal in _GOALS.items()}
    return step_rows(models, settings.model, goals, settings)
