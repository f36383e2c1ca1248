"""The life of one stack of trials: it starts, it is updated, trials leave it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from funcadapt import optim
from funcadapt.adapter import Adapter
from funcadapt.stacking import select, stack
from funcadapt.sweep.examples import Tree
from funcadapt.sweep.results import Run
from funcadapt.sweep.starting import Start, joined, stacked_residuals
from funcadapt.sweep.trials import Trial


@dataclasses.dataclass
class Progress:
    """What is known of one trial while it trains."""

    trial: Trial
    name: str
    start: Start
    order: Tensor
    losses: list[float] = dataclasses.field(default_factory=list[float])
    held_out: list[tuple[int, float]] = dataclasses.field(default_factory=list[tuple[int, float]])
    best: float = math.inf
    adapter: Adapter | None = None
    waited: int = 0
    stopped: str | None = None

    def run(self) -> Run:
        """What became of it."""
        adapter = self.adapter
        if adapter is not None and self.start.residual is not None:
            adapter = joined(adapter, self.start.residual)
        return Run(self.trial, self.name, adapter, tuple(self.losses), tuple(self.held_out), self.stopped)


@dataclasses.dataclass
class Stack:
    """The trials that are still training, and everything of theirs that has the adapter axis."""

    members: list[Progress]
    adapters: Adapter
    residual: Adapter | None
    state: Any
    hyper: dict[str, Any]
    clip: Tensor
    rates: Tensor

    @property
    def trials(self) -> list[Trial]:
        """The trials of the members."""
        return [member.trial for member in self.members]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the members."""
        return tuple(member.name for member in self.members)

    def single(self, i: int) -> Adapter:
        """A copy of one of the adapters."""
        return select(self.adapters, i).map(torch.clone)

    def keep(self, index: list[int]) -> None:
        """Let the others go."""
        self.members = [self.members[i] for i in index]
        if not index:
            return
        self.adapters = select(self.adapters, index)
        bent = any(member.start.residual is not None for member in self.members)
        self.residual = select(self.residual, index) if bent and self.residual is not None else None
        values = (self.state, self.hyper, self.clip, self.rates)
        self.state, self.hyper, self.clip, self.rates = optim.select(values, index)

    def update(self, grads: Tree, step: int) -> None:
        """One step of the optimiser. Where an adapter has nothing, its neutral leaves stay neutral."""
        first = self.members[0].trial
        update = (
            optim.adamw.update if first.optimizer == "adamw" else partial(optim.sgd.update, nesterov=first.nesterov)
        )
        grads = self._where_present(grads)
        if bool((self.clip < math.inf).any()):
            grads, _ = optim.clip_by_norm(grads, self.clip)
        old = self.adapters.params
        new, self.state = update(old, grads, self.state, lr=self.rates[:, step], **self.hyper)
        self.adapters = self.adapters.replace(params=self._where_present(new, old))

    def _where_present(self, new: Tree, old: Tree = None) -> Tree:
        """`new`, but `old` (or zeros) for each adapter at the paths where it has nothing."""
        changed = dict(new)
        for path, leaves in new.items():
            present = [path in member.start.adapter.params for member in self.members]
            if not all(present):
                changed[path] = {
                    name: torch.where(
                        torch.tensor(present, device=leaf.device).view(-1, *(1,) * (leaf.ndim - 1)),
                        leaf,
                        old[path][name] if old else 0.0,
                    )
                    for name, leaf in leaves.items()
                }
        return changed


def started(members: list[Progress], steps: int) -> Stack:
    """The stack before the first step."""
    trials = [member.trial for member in members]
    begun = [member.start for member in members]
    adapters = stack([start.adapter for start in begun])
    return Stack(
        members=members,
        adapters=adapters,
        residual=stacked_residuals(begun),
        state=getattr(optim, trials[0].optimizer).init(adapters.params),
        hyper=_hyper(trials),
        clip=_column(math.inf if trial.clip is None else trial.clip for trial in trials),
        rates=torch.stack([_rates(trial, steps) for trial in trials]),
    )


def _hyper(trials: Sequence[Trial]) -> dict[str, Any]:
    """What the optimiser is told beside the learning rate; each (N,)."""
    decay = _column(trial.weight_decay for trial in trials)
    if trials[0].optimizer == "sgd":
        return {"weight_decay": decay, "momentum": _column(trial.momentum for trial in trials)}
    betas = tuple(_column(trial.betas[i] for trial in trials) for i in (0, 1))
    return {"weight_decay": decay, "betas": betas, "eps": _column(trial.eps for trial in trials)}


def _column(values: Iterable[float]) -> Tensor:
    return torch.tensor([*values], dtype=torch.float64)


def _rates(trial: Trial, steps: int) -> Tensor:
    """The learning rate at every step, (steps,)."""
    if trial.schedule == "constant":
        schedule = optim.constant(warmup=trial.warmup)
    else:
        schedule = getattr(optim, trial.schedule)(steps, warmup=trial.warmup, end=trial.end)
    return trial.lr * schedule(torch.arange(steps))
