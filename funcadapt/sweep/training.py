"""Training a sweep: stacks of trials, from the first step to the last."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from time import perf_counter
from typing import Any

import optree
import torch
from torch import Tensor, nn

from funcadapt._torch import named_modules
from funcadapt.adapter import Adapter
from funcadapt.call import functional_call
from funcadapt.copying import structural_copy
from funcadapt.errors import AdapterError
from funcadapt.many import grouped
from funcadapt.method import method_of
from funcadapt.sweep import examples
from funcadapt.sweep.examples import Inputs, Tree
from funcadapt.sweep.losses import token_loss
from funcadapt.sweep.reporting import Event, Listener, reporting
from funcadapt.sweep.results import Result, Run
from funcadapt.sweep.stacks import Progress, Stack, started
from funcadapt.sweep.starting import Start, groups, starts
from funcadapt.sweep.trials import Trial

Loss = Callable[[Any, Any], Tensor]
"""(what the model returns, the batch) -> one loss for each row, (rows,)."""


def run(
    model: nn.Module,
    trials: Sequence[Trial],
    data: Tree,
    *,
    steps: int,
    batch: int = 1,
    held_out: Tree = None,
    every: int | None = None,
    patience: int | None = None,
    max_loss: float = math.inf,
    loss: Loss = token_loss,
    inputs: Inputs | None = None,
    at_once: int | None = None,
    dtype: torch.dtype | None = None,
    report: Listener | None = None,
    progress: Any = False,
) -> Result:
    """Train all trials, as many as fit together in one stack at once.

    The model is not changed, not even its `requires_grad` or its training mode. The base runs in the mode that it is
    in (in eval mode nothing in it is random), the adapters' dropout acts in training and not in evaluation.

    Args:
        model: the base model.
        trials: the trials. Those that cannot be in one stack (LoRA and IA3, AdamW and SGD) train after one another.
        data: the training examples, a pytree of tensors with the examples as the first axis: token ids (examples,
            length), or what a tokenizer returns, or (x, y).
        steps: how many updates each trial gets.
        batch: how many examples a trial sees in a step.
        held_out: examples to measure on, a tree of the same form; all of them are used.
        every: how many steps lie between evaluations; by default a tenth of all.
        patience: how many evaluations in a row may bring nothing new before a trial is stopped.
        max_loss: the loss above which a trial counts as diverged. One that is not finite always does.
        loss: (output, batch) -> a loss for each row; by default `token_loss`. The loss of a step is the mean.
        inputs: batch -> (args, kwargs) of the model. By default a tensor is the only argument, a dict are keyword
            arguments (without "labels"), and of a tuple the first entry is the argument.
        at_once: how many trials train together at the most.
        dtype: of the adapters; by default that of the base weights. Use float32 on a base in half precision.
        report: is called with an `Event` after every step and evaluation.
        progress: whether to show a progress bar: True, or a `rich.console.Console`.

    Returns:
        The runs, in the order of the trials.

    Raises:
        AdapterError: if there are no trials, two have one name, there is too little data, the loss does not fit, or a
            number is out of range.
        MissingExtraError: if a progress bar is wanted, and rich is not installed.

    Example:
        >>> import torch
        >>> import funcadapt as fa
        >>> from funcadapt import sweep
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        >>> x = torch.randn(64, 4)
        >>> trials = sweep.grid(fa.LoraConfig(r=2, target_modules=["0", "2"]), lr=[0.0, 1e-2])
        >>> mse = lambda output, batch: (output - batch[1]).square().mean(1)
        >>> result = sweep.run(model, trials, (x, x[:, :1]), steps=50, batch=8, held_out=(x, x[:, :1]), loss=mse)
        >>> result.best.name
        'lr=0.01'
    """
    started = perf_counter()
    names = _names(trials)
    counts = {"steps": steps, "batch": batch, "every": every, "patience": patience, "at_once": at_once}
    for name, count in counts.items():
        if count is not None and (not isinstance(count, int) or count < 1):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise AdapterError(f"{name} must be an integer >= 1, got {count!r}.")
    if patience is not None and held_out is None:
        raise AdapterError("patience needs held_out data to measure on.")
    data = examples.checked(data, "data", batch)
    held_out = None if held_out is None else examples.checked(held_out, "held_out", 1)
    begun = starts(model, trials, dtype)
    runs: dict[int, Run] = {}
    with reporting(report, progress, len(trials) * steps) as tell:
        task = _Task(
            model=model,
            data=data,
            held_out=held_out,
            steps=steps,
            batch=batch,
            every=every or max(1, steps // 10),
            patience=patience,
            max_loss=max_loss,
            loss=loss,
            inputs=inputs or examples.default_inputs(model),
            tell=tell,
        )
        for group in groups(trials, begun, at_once):
            done = task.train([task.progress(trials[i], names[i], begun[i]) for i in group])
            runs.update(zip(group, done, strict=True))
    return Result(tuple(runs[i] for i in range(len(trials))), perf_counter() - started)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Task:
    """What all stacks of a sweep have in common."""

    model: nn.Module
    data: Tree
    held_out: Tree
    steps: int
    batch: int
    every: int
    patience: int | None
    max_loss: float
    loss: Loss
    inputs: Inputs
    tell: Listener

    def progress(self, trial: Trial, name: str, start: Start) -> Progress:
        order = examples.order(examples.size(self.data), self.steps * self.batch, trial.data_seed)
        return Progress(trial, name, start, order.view(self.steps, self.batch))

    def train(self, members: list[Progress]) -> list[Run]:
        """Train the trials of one stack, from the first step to the last."""
        live = started(members, self.steps)
        learning = _twin(self.model, training=live.adapters.params if _has_dropout(live.trials) else ())
        measuring = _twin(self.model).eval()
        for step in range(self.steps + 1):
            if self.held_out is not None and (step % self.every == 0 or step == self.steps):
                self._evaluate(measuring, live, step)
            if step < self.steps and live.members:
                self._step(learning, live, step)
            if not live.members:
                break
        if self.held_out is None:
            for i, member in enumerate(live.members):
                member.adapter = live.single(i)
        return [member.run() for member in members]

    def _step(self, model: nn.Module, live: Stack, step: int) -> None:
        members = live.members
        params = optree.tree_map(lambda t: t.detach().requires_grad_(), live.adapters.params)  # pyright: ignore
        rows = torch.cat([member.order[step] for member in members])
        seeds = [_seed(trial.seed, step) for trial in live.trials] if _has_dropout(live.trials) else None
        with torch.enable_grad():
            losses = self._losses(model, live, live.adapters.replace(params=params), self.data, rows, seeds)
            means = losses.view(len(members), self.batch).mean(1)
            if not means.requires_grad:
                raise AdapterError("The loss does not depend on the adapters: it has no gradient.")
            leaves: list[Tensor] = optree.tree_leaves(params)  # pyright: ignore
            found = torch.autograd.grad(means.sum(), leaves, allow_unused=True, materialize_grads=True)
        with torch.no_grad():
            live.update(optree.tree_unflatten(optree.tree_structure(params), found), step)  # pyright: ignore
        values: list[float] = means.tolist()  # pyright: ignore
        self.tell(Event("step", step, live.names, tuple(values)))
        for member, value in zip(members, values, strict=True):
            member.losses.append(value)
            if self._diverged(value):
                member.stopped = "diverged"
        self._drop(live, step)

    @torch.no_grad()
    def _evaluate(self, model: nn.Module, live: Stack, step: int) -> None:
        n, count = len(live.members), examples.size(self.held_out)
        total = torch.zeros(n, dtype=torch.float64)
        for start in range(0, count, self.batch):
            rows = torch.arange(start, min(count, start + self.batch)).repeat(n)
            losses = self._losses(model, live, live.adapters, self.held_out, rows, None)
            total += losses.view(n, -1).to("cpu", torch.float64).sum(1)
        values: list[float] = (total / count).tolist()  # pyright: ignore
        self.tell(Event("evaluation", step, live.names, tuple(values)))
        for i, (member, value) in enumerate(zip(live.members, values, strict=True)):
            member.held_out.append((step, value))
            if self._diverged(value):
                member.stopped = "diverged"
            elif value < member.best:
                member.best, member.waited = value, 0
                member.adapter = live.single(i)
            else:
                member.waited += 1
                if self.patience is not None and member.waited >= self.patience and step < self.steps:
                    member.stopped = "patience"
        self._drop(live, step)

    def _losses(
        self, model: nn.Module, live: Stack, adapters: Adapter, data: Tree, rows: Tensor, seeds: list[int] | None
    ) -> Tensor:
        batch = examples.take(data, rows, next(adapters.tensors()).device)
        args, kwargs = self.inputs(batch)
        levels: Any = {"adapter": grouped(adapters, seeds=seeds)}
        if live.residual is not None:
            levels = {"residual": grouped(live.residual), **levels}
        losses: Any = self.loss(functional_call(model, levels, args, kwargs), batch)
        n = len(rows)
        if not isinstance(losses, Tensor) or losses.shape != (n,):
            got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise AdapterError(f"loss must return one loss for each of the {n} rows, shape ({n},), got {got}.")
        return losses

    def _diverged(self, loss: float) -> bool:
        return not math.isfinite(loss) or loss > self.max_loss

    def _drop(self, live: Stack, step: int) -> None:
        gone = [member for member in live.members if member.stopped is not None]
        if gone:
            self.tell(Event("stop", step, tuple(m.name for m in gone), tuple(m.best for m in gone)))
            live.keep([i for i, member in enumerate(live.members) if member.stopped is None])


def _names(trials: Sequence[Trial]) -> list[str]:
    if not trials:
        raise AdapterError("There are no trials to run.")
    names: list[str] = []
    for i, trial in enumerate(trials):
        if not isinstance(trial, Trial):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"trials[{i}] is a {type(trial).__name__}, expected a Trial. See fa.sweep.grid.")
        name = trial.name or f"trial-{i}"
        if name in names:
            raise AdapterError(f"Two trials have the name {name!r}: {names.index(name)} and {i}. Names must differ.")
        names.append(name)
    return names


def _has_dropout(trials: Iterable[Trial]) -> bool:
    return any(method_of(trial.config).dropout(trial.config) for trial in trials)


def _twin(model: nn.Module, training: Iterable[str] = ()) -> nn.Module:
    """A frozen copy that shares the tensors, with the layers at these paths in training mode."""
    twin = structural_copy(model)
    frozen: dict[int, nn.Parameter] = {}
    for module in twin.modules():
        for name, held in module._parameters.items():
            if held is not None and held.requires_grad:  # tied ones stay tied
                new = frozen.setdefault(id(held), nn.Parameter(held.detach(), requires_grad=False))
                module._parameters[name] = new
    modules = dict(named_modules(twin))
    for path in training:
        if path in modules:
            modules[path].training = True
    return twin


def _seed(seed: int, step: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:dropout:{step}".encode()).digest()[:8], "little") >> 1
