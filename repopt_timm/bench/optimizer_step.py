"""`bench optimizer`: time and memory of a RepOptimizer's step against those of the fused plain optimizer."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from ..optim import RepOptAdamW, RepOptSGD
from ..optim.reference import ReferenceRepOptAdamW, ReferenceRepOptSGD
from ..reparam import GradMults, make_grad_mults
from ..reporting import time_call
from .allocation import allocation
from .bench_models import architecture_of, make_optimizer, synchronized, target, time_in_turns
from .rows import Goal, Row, memory_rows, ratio_rows
from .settings import Settings

__all__ = ['bench_optimizer']


@dataclass(frozen=True)
class _Rule:
    """An update rule: its optimizers, their settings and how long a RepOptimizer's step may take."""

    name: str
    plain: Any
    repopt: Any
    reference: Any
    settings: dict[str, Any]
    goal: Goal


_RULES = (
    _Rule(
        'sgd',
        SGD,
        RepOptSGD,
        ReferenceRepOptSGD,
        {'lr': 1e-4, 'momentum': 0.9, 'nesterov': True, 'weight_decay': 4e-5},
        Goal(1.25, '<= 1.25 x'),
    ),
    _Rule(
        'adamw',
        AdamW,
        RepOptAdamW,
        ReferenceRepOptAdamW,
        {'lr': 1e-5, 'weight_decay': 1e-2},
        Goal(1.5, '<= 1.5 x'),
    ),
)
_HELD_GOAL = Goal(0.02, '<= 2 %')
_WORKING_GOAL = Goal(0.1, '<= 10 %')
_UNCHANGED_GOAL = Goal(0, 'none', of_value=True)
_CONSTRUCTION_GOAL = Goal(1, '< 1 s', strict=True, of_value=True)


@dataclass(frozen=True)
class _Contender:
    """How an optimizer is made; `ours` are the RepOptimizers, which the goals are for."""

    make: Callable[[], Optimizer]
    ours: bool = False
    compiled: bool = False


@dataclass(frozen=True)
class _Probe:
    """An optimizer, and what did not need a contest to be measured.

    Attributes:
        optimizer: The optimizer, after some steps.
        first: Time of its first step.
        held: Memory that it keeps between steps, its state included.
        transient: Memory that a step takes and gives back.
        changed: Number of parameters whose gradient a step changes.
    """

    optimizer: Optimizer
    first: float
    held: int
    transient: int
    changed: int


def bench_optimizer(settings: Settings) -> list[Row]:
    """Compares steps of both RepOptimizers with those of others, on the same parameters and gradients."""
    model = target(architecture_of(settings.model), settings.device)
    rows: list[Row] = []
    for rule in _RULES:
        rows += _Comparison(model, rule, settings).rows()
    del model
    names = [settings.model] if settings.quick else [settings.model, 'repopt_vgg_l2']
    return rows + [_construction_row(name, settings) for name in dict.fromkeys(names)]


class _Comparison:
    """Optimizers of one update rule on the same parameters and gradients.

    Args:
        model: A target that carries scales.
        rule: The update rule.
        settings: What to measure.
    """

    def __init__(self, model: nn.Module, rule: _Rule, settings: Settings):
        self.model = model
        self.rule = rule
        self.settings = settings
        self.parameters = list(model.parameters())
        self.gradients = [1e-3 * torch.randn_like(parameter) for parameter in self.parameters]
        self.baseline = f'{rule.plain.__name__}, fused'
        for parameter, gradient in zip(self.parameters, self.gradients):
            parameter.grad = gradient.clone()

    def rows(self) -> list[Row]:
        """Measures everything."""
        device = self.settings.device
        made = allocation(lambda: make_grad_mults(self.model, update_rule=self.rule.name), device)
        contenders = self._contenders(made.result)
        probes: dict[str, _Probe] = {}
        with _empty_compiler_cache():
            for name, contender in contenders.items():
                self.settings.report_progress(f'memory, {name}')
                probes[name] = self._probe(contender)
        self.settings.report_progress(f'time, {self.rule.name}')
        steps = {name: probe.optimizer.step for name, probe in probes.items()}
        seconds = time_in_turns(steps, device, self.settings.rounds, warmup=2, prepare=self._restore)
        goals = {name: self.rule.goal for name, contender in contenders.items() if contender.ours}
        rows = ratio_rows(f'{self.rule.name}: step', 's', seconds, self.baseline, goals)
        rows += self._memory_rows(contenders, probes, made.held)
        return rows + self._other_rows(contenders, probes)

    def _contenders(self, mults: GradMults) -> dict[str, _Contender]:
        def make(optimizer: Any, **kwargs: Any) -> Callable[[], Optimizer]:
            return lambda: optimizer(self.parameters, **self.rule.settings, **kwargs)

        rule = self.rule
        repopt, plain = rule.repopt.__name__, rule.plain.__name__
        contenders = {
            self.baseline: _Contender(make(rule.plain, fused=True)),
            repopt: _Contender(make(rule.repopt, grad_mults=mults), ours=True),
            f'{repopt}, compiled': _Contender(make(rule.repopt, grad_mults=mults, compiled=True), True, True),
            f'{repopt}, dense': _Contender(make(rule.repopt, grad_mults=mults, dense=True)),
            f'dense masks, {plain} fused': _Contender(make(rule.reference, grad_mults=mults, fused=True)),
            f'dense masks, {plain} in a loop': _Contender(make(rule.reference, grad_mults=mults, foreach=False)),
        }
        return {name: each for name, each in contenders.items() if self.settings.compiled or not each.compiled}

    def _restore(self) -> None:
        # Masks multiplied in over and over would make gradients infinite or denormal, which takes another time.
        for parameter, gradient in zip(self.parameters, self.gradients):
            _gradient(parameter).copy_(gradient)

    def _probe(self, contender: _Contender) -> _Probe:
        device = self.settings.device
        self._restore()
        optimizer = contender.make()
        try:
            first = time_call(synchronized(optimizer.step, device))
        except RuntimeError as error:
            if not contender.compiled:
                raise
            raise ValueError(
                f'{type(optimizer).__name__}(compiled=True) does not compile here; leave it out with --no-compiled. '
                f'{error}'
            ) from None
        held = allocation(lambda: _after_a_step(contender.make()), device).held
        self._restore()
        transient = allocation(optimizer.step, device).peak
        pairs = zip(self.parameters, self.gradients)
        changed = sum(not torch.equal(_gradient(parameter), gradient) for parameter, gradient in pairs)
        return _Probe(optimizer, first, held, transient, changed)

    def _memory_rows(self, contenders: dict[str, _Contender], probes: dict[str, _Probe], grad_mults: int) -> list[Row]:
        parameters = 'parameters'
        masks = {parameters: sum(parameter.nbytes for parameter in self.parameters)}
        working = dict(masks)
        for name, probe in probes.items():
            # All keep the state that the baseline keeps; beyond it the reference keeps masks, ours memory to work in.
            more = max(0, probe.held - probes[self.baseline].held)
            masks[name] = grad_mults if contenders[name].ours else more
            working[name] = probe.transient + (more if contenders[name].ours else 0)
        ours = [name for name in probes if contenders[name].ours]
        held_goals, working_goals = dict.fromkeys(ours, _HELD_GOAL), dict.fromkeys(ours, _WORKING_GOAL)
        del masks[self.baseline]
        rule = self.rule.name
        return [
            *memory_rows(f'{rule}: memory of the Grad Mults', masks, parameters, held_goals),
            *memory_rows(f'{rule}: memory that a step works in', working, parameters, working_goals),
        ]

    def _other_rows(self, contenders: dict[str, _Contender], probes: dict[str, _Probe]) -> list[Row]:
        changed = [
            Row(
                f'{self.rule.name}: gradients that a step changes',
                name,
                probe.changed,
                'tensors',
                goal=_UNCHANGED_GOAL if contenders[name].ours else None,
            )
            for name, probe in probes.items()
        ]
        first = [
            Row(f'{self.rule.name}: first step, which compiles', name, probe.first, 's')
            for name, probe in probes.items()
            if contenders[name].compiled
        ]
        return changed + first


def _construction_row(name: str, settings: Settings) -> Row:
    settings.report_progress(f'construction, {name}')
    model = target(architecture_of(name), settings.device)
    seconds = time_call(synchronized(lambda: make_optimizer(model), settings.device))
    return Row('sgd: construction of RepOptSGD', name, seconds, 's', goal=_CONSTRUCTION_GOAL)


@contextmanager
def _empty_compiler_cache() -> Iterator[None]:
    # What was compiled by an earlier process would make the first step look free.
    names = ('TORCHINDUCTOR_CACHE_DIR', 'TRITON_CACHE_DIR')
    before = {name: os.environ.get(name) for name in names}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ.update(dict.fromkeys(names, folder))
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def _after_a_step(optimizer: Optimizer) -> Optimizer:
    optimizer.step()
    return optimizer


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
