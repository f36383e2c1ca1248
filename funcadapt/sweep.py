"""Sweeps: N adapters with different hyperparameters trained at once, one pass of the base model a step for all of them.

    trials = fa.sweep.grid(fa.LoraConfig(target_modules="all-linear"), lr=[1e-3, 3e-3], r=[4, 16], seed=[0, 1])
    result = fa.sweep.run(model, trials, ids, held_out=others, steps=200, batch=4, patience=3)

Each trial is, to rounding, the run that it would have been alone: its initial leaves, its examples and its dropout
depend on its own seeds, its gradient on its own rows, its optimiser and its clipping on its own leaves. A trial that
stops early leaves the stack, and the rest go on without its rows.

Inits that change the base weights (PiSSA, OLoRA) share the base with the others: W - s B0 A0 is W with a second, frozen
adapter of the negated initial factors, innermost. What comes out of them is a plain LoRA of twice the rank,
[B, -B0] [A; A0], which acts on the base as it is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import itertools
import json
import math
import os
import re
import typing
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from types import UnionType
from typing import Any

import optree
import torch
from torch import Tensor, nn

from funcadapt import optim
from funcadapt._torch import named_modules
from funcadapt.adapter import Adapter
from funcadapt.call import functional_call
from funcadapt.checkpoint import _write_all, save
from funcadapt.config import AdapterConfig, config_from_dict
from funcadapt.copying import structural_copy
from funcadapt.errors import AdapterError, did_you_mean
from funcadapt.init import init_with_base
from funcadapt.many import grouped
from funcadapt.method import method_of
from funcadapt.recipes.pretrained import optional
from funcadapt.stacking import select, stack

Tree = Any
"""A pytree of tensors."""

Loss = Callable[[Any, Any], Tensor]
"""(what the model returns, the batch) -> one loss for each row, (rows,)."""

Inputs = Callable[[Any], tuple[tuple[Any, ...], dict[str, Any]]]
"""The batch -> the model's positional and keyword arguments."""

RESULTS = "results.json"
"""The file that `Result.save` writes beside the checkpoints."""

_OPTIMIZERS = ("adamw", "sgd")
_SCHEDULES = ("constant", "linear", "cosine")


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run of a sweep: what to train, and how.

    Attributes:
        config: the adapter: rank, alpha, init, dropout, target modules ...
        lr: the learning rate, before the schedule.
        seed: of the initial leaves and of the dropout.
        data_seed: of the order of the examples.
        optimizer: "adamw" or "sgd".
        weight_decay: AdamW's decoupled weight decay, or SGD's L2 term.
        betas: AdamW's.
        eps: AdamW's.
        momentum: SGD's.
        nesterov: SGD's.
        clip: the largest global norm of the gradient, or None.
        schedule: of the learning rate: "constant", "linear" or "cosine".
        warmup: over how many steps the learning rate rises from 0.
        end: the factor of the learning rate after the last step ("linear" and "cosine").
        name: what it is called; must be unique in a sweep. By default "trial-0", "trial-1", ...

    Raises:
        AdapterError: if a value is out of range.
        TypeError: if `config` is none.

    Example:
        >>> import funcadapt as fa
        >>> from funcadapt import sweep
        >>> sweep.Trial(fa.LoraConfig(r=4), lr=-1e-3)
        Traceback (most recent call last):
        funcadapt.errors.AdapterError: lr must be a number >= 0, got -0.001.
    """

    config: AdapterConfig
    _: dataclasses.KW_ONLY
    lr: float = 1e-3
    seed: int = 0
    data_seed: int = 0
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.0
    nesterov: bool = False
    clip: float | None = None
    schedule: str = "constant"
    warmup: int = 0
    end: float = 0.0
    name: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.config, AdapterConfig):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"Trial: config must be a config such as fa.LoraConfig, got {self.config!r}.")
        for field in ("lr", "weight_decay", "momentum", "end"):
            if not _is_number(getattr(self, field)) or not getattr(self, field) >= 0:
                raise AdapterError(f"{field} must be a number >= 0, got {getattr(self, field)!r}.")
        for field, value in (("eps", self.eps), ("clip", self.clip)):
            if not (field == "clip" and value is None) and not (_is_number(value) and value > 0):  # pyright: ignore
                raise AdapterError(f"{field} must be a number > 0, got {value!r}.")
        for field in ("seed", "data_seed", "warmup"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or (field == "warmup" and value < 0):
                raise AdapterError(f"{field} must be an integer{' >= 0' * (field == 'warmup')}, got {value!r}.")
        betas: Any = self.betas
        pair = tuple(typing.cast("Sequence[Any]", betas)) if isinstance(betas, list | tuple) else ()
        if len(pair) != 2 or not all(_is_number(b) and 0 <= b < 1 for b in pair):
            raise AdapterError(f"betas must be two numbers in [0, 1), got {betas!r}.")
        object.__setattr__(self, "betas", pair)
        for field, known in (("optimizer", _OPTIMIZERS), ("schedule", _SCHEDULES)):
            if (value := getattr(self, field)) not in known:
                raise AdapterError(f"{field} {value!r} is unknown.{did_you_mean(str(value), known)}")
        if self.nesterov and not self.momentum:
            raise AdapterError("nesterov needs a momentum.")

    def to_dict(self) -> dict[str, Any]:
        """In JSON types: the fields of the trial, and those of its config that are not at their defaults."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("config", "name")}
        config, default = self.config.to_dict(), type(self.config)().to_dict()
        changed = {k: v for k, v in config.items() if k == "peft_type" or v != default[k]}
        return {**own, "betas": list(self.betas), "config": changed}


@dataclasses.dataclass(frozen=True)
class Event:
    """What `report` is told.

    Attributes:
        kind: "step" (the training loss), "evaluation" (the held-out loss) or "stop" (trials that ended early).
        step: how many updates there were before.
        names: the trials that it is about.
        losses: a loss for each of them.
    """

    kind: str
    step: int
    names: tuple[str, ...]
    losses: tuple[float, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """What became of one trial.

    Attributes:
        trial: the trial.
        name: its name.
        adapter: the adapter with the best held-out loss, or the last one if nothing was held out. It acts on the base
            model as it is, also after PiSSA and OLoRA. None if the trial diverged before there was any.
        losses: the training loss at every step.
        held_out: (step, loss) of every evaluation.
        stopped: why it ended before its time: "patience" or "diverged"; None if it did not.
    """

    trial: Trial
    name: str
    adapter: Adapter | None
    losses: tuple[float, ...]
    held_out: tuple[tuple[int, float], ...]
    stopped: str | None

    @property
    def loss(self) -> float:
        """The best held-out loss, or the last training loss if nothing was held out; infinite if not finite."""
        if self.stopped == "diverged" and self.adapter is None:
            return math.inf
        found = [loss for _, loss in self.held_out if math.isfinite(loss)] or list(self.losses[-1:])
        return min(found) if found and math.isfinite(min(found)) else math.inf

    @property
    def best_step(self) -> int:
        """After how many steps the loss was as good as `loss` says."""
        return next((step for step, loss in self.held_out if loss == self.loss), len(self.losses))


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """What came out of a sweep.

    Attributes:
        runs: one for each trial, in their order.
        seconds: the wall time.
    """

    runs: tuple[Run, ...]
    seconds: float

    @property
    def best(self) -> Run:
        """The run with the smallest loss."""
        return min(self.runs, key=lambda run: run.loss)

    def __getitem__(self, name: str) -> Run:
        """The run of a name."""
        for run in self.runs:
            if run.name == name:
                return run
        raise KeyError(f"There is no trial {name!r}.{did_you_mean(name, (run.name for run in self.runs))}")

    def records(self) -> list[dict[str, Any]]:
        """Everything but the adapters, in JSON types; losses that are not finite are None.

        Returns:
            One dict for each run, in the order of the trials.
        """
        return [
            {
                "name": run.name,
                **run.trial.to_dict(),
                "loss": _finite(run.loss),
                "best_step": run.best_step,
                "steps": len(run.losses),
                "stopped": run.stopped,
                "losses": [_finite(loss) for loss in run.losses],
                "held_out": [[step, _finite(loss)] for step, loss in run.held_out],
            }
            for run in self.runs
        ]

    def save(self, directory: str | os.PathLike[str]) -> list[Path | None]:
        """Write each adapter as a PEFT checkpoint in a folder of its own, and `results.json` when all are there.

        Args:
            directory: the folder, made if need be.

        Returns:
            The folder of each run's checkpoint; None for one without an adapter.
        """
        root = Path(directory)
        root.mkdir(parents=True, exist_ok=True)
        folders: list[Path | None] = []
        for i, run in enumerate(self.runs):
            folder = root / f"{i:03d}-{re.sub(r'[^A-Za-z0-9._=+-]+', '_', run.name)[:80]}"
            folders.append(folder if run.adapter is not None else None)
            if run.adapter is not None:
                save(run.adapter, folder)
        records = [
            {**record, "checkpoint": None if folder is None else folder.name}
            for record, folder in zip(self.records(), folders, strict=True)
        ]
        text = json.dumps({"seconds": self.seconds, "best": self.best.name, "runs": records}, indent=1)
        _write_all(root, {RESULTS: text.encode()})
        return folders

    def table(self) -> Any:
        """The runs as a `rich.table.Table`, the best first: what differs between them, and what came out.

        Returns:
            The table.

        Raises:
            MissingExtraError: if rich is not installed.
        """
        table = optional("rich.table").Table()
        varied = _varied([run.trial for run in self.runs])
        for column in ("trial", *varied, "loss", "at step", "steps", ""):
            table.add_column(column, justify="left" if column in ("trial", "") else "right")
        ranked = sorted(self.runs, key=lambda run: run.loss)
        for run in ranked:
            values = [_short(_get(run.trial, name)) for name in varied]
            shown = f"{run.loss:.4f}" if math.isfinite(run.loss) else "-"
            style = "bold green" if run is ranked[0] and math.isfinite(run.loss) else ""
            steps = (str(run.best_step), str(len(run.losses)))
            table.add_row(optional("rich.text").Text(run.name), *values, shown, *steps, run.stopped or "", style=style)
        return table

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the curves of all runs: training loss on the left, held-out loss on the right.

        Args:
            path: the picture, e.g. "sweep.png".

        Raises:
            MissingExtraError: if matplotlib is not installed.
        """
        figure = optional("matplotlib.figure").Figure(figsize=(11, 4.5), layout="constrained")
        left, right = figure.subplots(1, 2)
        colours = optional("matplotlib").colormaps["viridis"]
        ranked = sorted(self.runs, key=lambda run: run.loss)
        for i, run in enumerate(ranked):
            look = {"color": colours(i / max(1, len(ranked) - 1)), "label": run.name, "linewidth": 2 if i == 0 else 1}
            left.plot(range(len(run.losses)), run.losses, **look)
            right.plot(*(zip(*run.held_out, strict=True) if run.held_out else ((), ())), marker=".", **look)
        for axes, title in ((left, "training loss"), (right, "held-out loss")):
            axes.set_xlabel("step")
            axes.set_title(title)
        sound = [run for run in self.runs if run.stopped != "diverged"]
        curves = [[loss for run in sound for loss in run.losses], [loss for run in sound for _, loss in run.held_out]]
        for axes, values in zip((left, right), curves, strict=True):
            if values:  # a run that diverged must not squeeze the others into a line
                margin = 0.05 * (max(values) - min(values)) or 0.05
                axes.set_ylim(min(values) - margin, max(values) + margin)
        if len(ranked) <= 24:
            left.legend(fontsize="x-small", title="best first", title_fontsize="x-small")
        figure.savefig(path, dpi=150)  # a Figure without pyplot draws with Agg, and needs no display


# -- trials ---------------------------------------------------------------------------------------------


def grid(start: AdapterConfig | Trial, **fields: Any) -> list[Trial]:
    """The trials of a grid: the product of all values that are lists.

    A field whose own value is a sequence (`target_modules`, `betas`) is an axis where it is a list that holds lists, or
    tuples; a flat list is one value.

    Args:
        start: a config, or a trial, that says all the rest.
        **fields: fields of `Trial` or of the config. A list is an axis, anything else is for all trials.

    Returns:
        The trials, the last axis varying fastest, named after their values.

    Raises:
        AdapterError: if a field is unknown (near matches are listed), an axis is empty, or a value is refused.

    Example:
        >>> import funcadapt as fa
        >>> from funcadapt import sweep
        >>> [trial.name for trial in sweep.grid(fa.LoraConfig(), lr=[1e-3, 3e-3], r=[4, 8], clip=1.0)]
        ['lr=0.001 r=4', 'lr=0.001 r=8', 'lr=0.003 r=4', 'lr=0.003 r=8']
        >>> sweep.grid(fa.LoraConfig(), alpha=[8, 16])
        Traceback (most recent call last):
        funcadapt.errors.AdapterError: LoraConfig and Trial have no field 'alpha'. Did you mean 'lora_alpha', ...
    """
    return _product(start if isinstance(start, Trial) else Trial(start), fields)


def trials_from(spec: Mapping[str, Any]) -> list[Trial]:
    """The trials that a grid file describes.

    Keys are fields of `Trial` and of the config; lists are axes, as in `grid`. `peft_type` selects the method, LoRA by
    default. `trials` is a list of such dicts: each overrides the keys beside it, and is a grid of its own.

    Args:
        spec: the content of the file.

    Returns:
        The trials.

    Raises:
        AdapterError: as in `grid`; or if there are none.

    Example:
        >>> from funcadapt import sweep
        >>> trials = sweep.trials_from({"r": 4, "lr": [1e-3, 1e-2], "trials": [{"seed": 1}, {"r": 8, "lr": 3e-3}]})
        >>> [(trial.config.r, trial.lr, trial.seed) for trial in trials]
        [(4, 0.001, 1), (4, 0.01, 1), (8, 0.003, 0)]
    """
    common = {key: value for key, value in spec.items() if key != "trials"}
    entries: Any = spec.get("trials", [{}])
    if not isinstance(entries, list) or not entries:
        raise AdapterError(f"'trials' must be a list of at least one trial, got {entries!r}.")
    trials: list[Trial] = []
    for entry in typing.cast("list[Any]", entries):
        if not isinstance(entry, Mapping):
            raise AdapterError(f"An entry of 'trials' must have fields and values, got {entry!r}.")
        own = {str(key): value for key, value in typing.cast("Mapping[Any, Any]", entry).items()}
        fields = {**common, **own}
        start = Trial(config_from_dict({"peft_type": fields.pop("peft_type", "LORA")}), name=fields.pop("name", None))
        fields = {name: _number_from(value, name, start) for name, value in fields.items()}
        trials += _product(start, fields, shown=[name for name in own if name in fields and start.name is None])
    return trials


def read(path: str | os.PathLike[str]) -> list[Trial]:
    """The trials of a grid file, YAML or JSON: see `trials_from`.

    Args:
        path: the file; ".json" is read as JSON, anything else as YAML.

    Returns:
        The trials.

    Raises:
        AdapterError: if the file is missing, malformed or describes no trial.
        MissingExtraError: if it is YAML, and PyYAML is not installed.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise AdapterError(f"The grid file {str(file)!r} cannot be read: {error}") from error
    if file.suffix == ".json":
        try:
            spec = json.loads(text)
        except json.JSONDecodeError as error:
            raise AdapterError(f"The grid file {str(file)!r} is no JSON: {error}") from error
    else:
        yaml = optional("yaml")
        try:
            spec = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise AdapterError(f"The grid file {str(file)!r} is no YAML: {error}") from error
    if not isinstance(spec, dict) or not spec:
        raise AdapterError(f"The grid file {str(file)!r} must hold fields and values, such as 'lr: [1.0e-3, 3.0e-3]'.")
    return trials_from({str(key): value for key, value in spec.items()})  # pyright: ignore


# -- the loss of a language model -----------------------------------------------------------------------


class _TokenNLL(torch.autograd.Function):
    """The negative log-likelihood of each token, in at least float32, one row of the batch at a time.

    Nothing of the size of the logits is kept but the logits, and nothing of that size is made but their gradient.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        wide = torch.promote_types(logits.dtype, torch.float32)
        total = torch.stack([row.to(wide).logsumexp(-1) for row in logits])
        own = logits.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1).to(wide)
        ctx.save_for_backward(logits, targets, total)
        return (total - own).masked_fill(targets < 0, 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        logits, targets, total = ctx.saved_tensors
        grad = grad.masked_fill(targets < 0, 0.0)
        out = torch.empty_like(logits)
        for row, goal, norm, g, into in zip(logits, targets, total, grad, out, strict=True):
            p = torch.sub(row.to(norm.dtype), norm.unsqueeze(-1), out=into if into.dtype == norm.dtype else None)
            p.exp_().scatter_add_(-1, goal.clamp(min=0).unsqueeze(-1), p.new_full((len(goal), 1), -1.0))
            p.mul_(g.unsqueeze(-1))
            if p.data_ptr() != into.data_ptr():
                into.copy_(p)
        return out, None


def token_loss(output: Any, batch: Any) -> Tensor:
    """The loss of a causal language model, for each row: the mean negative log-likelihood of its tokens.

    Args:
        output: what the model returned: has `logits`, (rows, length, vocabulary).
        batch: token ids, (rows, length); or a dict with `input_ids`, and perhaps `labels` (-100 is left out) or an
            `attention_mask` (0 is left out).

    Returns:
        The losses, (rows,), in at least float32.

    Raises:
        AdapterError: if there are no logits or no ids.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> from funcadapt import sweep
        >>> sweep.token_loss(SimpleNamespace(logits=torch.zeros(2, 3, 10)), torch.zeros(2, 3, dtype=torch.long))
        tensor([2.3026, 2.3026])
    """
    logits: Any = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)  # pyright: ignore
    fields = typing.cast("Mapping[str, Any]", batch if isinstance(batch, Mapping) else {"input_ids": batch})
    labels = fields.get("labels", fields.get("input_ids"))
    if not isinstance(logits, Tensor) or logits.ndim != 3 or not isinstance(labels, Tensor):
        raise AdapterError(
            "The default loss is for causal language models: an output with `logits`, and a batch of token ids or a "
            "dict with `input_ids`. Pass loss=, a function of (output, batch) that returns one loss for each row."
        )
    if "labels" not in fields and fields.get("attention_mask") is not None:
        labels = labels.masked_fill(fields["attention_mask"] == 0, -100)
    targets = torch.cat([labels[:, 1:], labels.new_full((len(labels), 1), -100)], 1)  # the last token predicts nothing
    nll = typing.cast("Tensor", _TokenNLL.apply(logits, targets))  # pyright: ignore[reportUnknownMemberType]
    return nll.sum(1) / (targets >= 0).sum(1).clamp(min=1)


# -- the sweep ------------------------------------------------------------------------------------------


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
    report: Callable[[Event], None] | None = None,
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
    for name, value in (
        ("steps", steps),
        ("batch", batch),
        ("every", every),
        ("patience", patience),
        ("at_once", at_once),
    ):
        if value is not None and (not isinstance(value, int) or value < 1):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise AdapterError(f"{name} must be an integer >= 1, got {value!r}.")
    if patience is not None and held_out is None:
        raise AdapterError("patience needs held_out data to measure on.")
    data = _examples(data, "data", batch)
    held_out = None if held_out is None else _examples(held_out, "held_out", 1)
    begun = _initial(model, trials, dtype)
    with _reporting(report, progress, len(trials) * steps) as tell:
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
            inputs=inputs or _default_inputs(model),
            tell=tell,
        )
        runs: dict[int, Run] = {}
        for group in _groups(trials, begun, at_once):
            done = task.train([trials[i] for i in group], [names[i] for i in group], [begun[i] for i in group])
            runs.update(zip(group, done, strict=True))
    return Result(tuple(runs[i] for i in range(len(trials))), perf_counter() - started)


@dataclasses.dataclass(frozen=True)
class _Begun:
    """A trial's adapter before training, and the frozen one that goes under it (PiSSA, OLoRA)."""

    adapter: Adapter
    residual: Adapter | None


@dataclasses.dataclass
class _Progress:
    """What is known of one trial while it trains."""

    trial: Trial
    name: str
    begun: _Begun
    order: Tensor
    losses: list[float] = dataclasses.field(default_factory=list[float])
    held_out: list[tuple[int, float]] = dataclasses.field(default_factory=list[tuple[int, float]])
    best: float = math.inf
    adapter: Adapter | None = None
    waited: int = 0
    stopped: str | None = None

    def run(self) -> Run:
        adapter = self.adapter
        if adapter is not None and self.begun.residual is not None:
            adapter = _plain(adapter, self.begun.residual)
        return Run(self.trial, self.name, adapter, tuple(self.losses), tuple(self.held_out), self.stopped)


@dataclasses.dataclass
class _Stack:
    """The trials that are still training, and everything of theirs that has the adapter axis."""

    members: list[_Progress]
    adapters: Adapter
    residual: Adapter | None
    state: Any
    hyper: dict[str, Any]
    rates: Tensor

    def keep(self, index: list[int]) -> None:
        self.members = [self.members[i] for i in index]
        self.adapters = select(self.adapters, index)
        bent = any(member.begun.residual is not None for member in self.members)
        self.residual = select(self.residual, index) if bent and self.residual is not None else None
        self.state, self.hyper, self.rates = optim.select((self.state, self.hyper, self.rates), index)


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
    tell: Callable[[Event], None]

    def train(self, trials: Sequence[Trial], names: Sequence[str], begun: Sequence[_Begun]) -> list[Run]:
        """Train the trials of one stack, from the first step to the last."""
        count = self.steps * self.batch
        members = [
            _Progress(trial, name, b, _order(_size(self.data), count, trial.data_seed).view(self.steps, self.batch))
            for trial, name, b in zip(trials, names, begun, strict=True)
        ]
        adapters = stack([b.adapter for b in begun])
        optimizer = getattr(optim, trials[0].optimizer)
        live = _Stack(
            members=members,
            adapters=adapters,
            residual=_stacked_residuals(begun),
            state=optimizer.init(adapters.params),
            hyper=_hyper(trials),
            rates=torch.stack([_rates(trial, self.steps) for trial in trials]),
        )
        learning, measuring = _twin(self.model, adapters, trials), _twin(self.model).eval()
        for step in range(self.steps + 1):
            if self.held_out is not None and (step % self.every == 0 or step == self.steps):
                self._evaluate(measuring, live, step)
            if step == self.steps or not live.members:
                break
            self._step(learning, live, optimizer, step)
            if not live.members:
                break
        if self.held_out is None:
            for i, member in enumerate(live.members):
                member.adapter = _single(live.adapters, i)
        return [member.run() for member in members]

    def _step(self, model: nn.Module, live: _Stack, optimizer: optim.Optimizer, step: int) -> None:
        members, n = live.members, len(live.members)
        params = optree.tree_map(lambda t: t.detach().requires_grad_(), live.adapters.params)  # pyright: ignore
        rows = torch.cat([member.order[step] for member in members])
        seeds = None
        if any(method_of(m.trial.config).dropout(m.trial.config) for m in members):
            seeds = [_seed(member.trial.seed, step) for member in members]
        with torch.enable_grad():
            losses = self._losses(model, live, live.adapters.replace(params=params), _take(self.data, rows), seeds)
            means = losses.view(n, self.batch).mean(1)
            leaves: list[Tensor] = optree.tree_leaves(params)  # pyright: ignore
            if not means.requires_grad:
                raise AdapterError("The loss does not depend on the adapters: it has no gradient.")
            found = torch.autograd.grad(means.sum(), leaves, allow_unused=True, materialize_grads=True)
        grads: Any = optree.tree_unflatten(optree.tree_structure(params), found)  # pyright: ignore
        with torch.no_grad():
            self._update(live, optimizer, params, grads, step)
        values: list[float] = means.tolist()  # pyright: ignore
        for member, value in zip(members, values, strict=True):
            member.losses.append(value)
        self.tell(Event("step", step, tuple(m.name for m in members), tuple(values)))
        for member, value in zip(members, values, strict=True):
            if not value <= self.max_loss or not math.isfinite(value):
                member.stopped = "diverged"
        self._drop(live, step)

    def _update(self, live: _Stack, optimizer: optim.Optimizer, params: Tree, grads: Tree, step: int) -> None:
        absent = _absent(live.adapters)
        grads = _where_absent(absent, optree.tree_map(torch.zeros_like, grads), grads)  # pyright: ignore
        hyper = dict(live.hyper)
        limit: Tensor = hyper.pop("clip")
        if bool((limit < math.inf).any()):
            grads, _ = optim.clip_by_norm(grads, limit)
        if "beta1" in hyper:
            hyper["betas"] = (hyper.pop("beta1"), hyper.pop("beta2"))
        else:
            hyper["nesterov"] = live.members[0].trial.nesterov
        new, live.state = optimizer.update(live.adapters.params, grads, live.state, lr=live.rates[:, step], **hyper)
        live.adapters = live.adapters.replace(params=_where_absent(absent, live.adapters.params, new))

    @torch.no_grad()
    def _evaluate(self, model: nn.Module, live: _Stack, step: int) -> None:
        members, n = live.members, len(live.members)
        count = _size(self.held_out)
        total = torch.zeros(n, dtype=torch.float64)
        for start in range(0, count, self.batch):
            rows = torch.arange(start, min(count, start + self.batch)).repeat(n)
            losses = self._losses(model, live, live.adapters, _take(self.held_out, rows), None)
            total += losses.view(n, -1).to("cpu", torch.float64).sum(1)
        values: list[float] = (total / count).tolist()  # pyright: ignore
        self.tell(Event("evaluation", step, tuple(m.name for m in members), tuple(values)))
        for i, (member, value) in enumerate(zip(members, values, strict=True)):
            member.held_out.append((step, value))
            if not value <= self.max_loss or not math.isfinite(value):
                member.stopped = "diverged"
            elif value < member.best:
                member.best, member.waited = value, 0
                member.adapter = _single(live.adapters, i)
            else:
                member.waited += 1
                if self.patience is not None and member.waited >= self.patience and step < self.steps:
                    member.stopped = "patience"
        self._drop(live, step)

    def _losses(
        self, model: nn.Module, live: _Stack, adapters: Adapter, batch: Tree, seeds: list[int] | None
    ) -> Tensor:
        device = next(adapters.tensors()).device
        batch = optree.tree_map(lambda t: t.to(device), batch)  # pyright: ignore
        args, kwargs = self.inputs(batch)
        levels: Any = {"adapter": grouped(adapters, seeds=seeds)}
        if live.residual is not None:
            levels = {"residual": grouped(live.residual), **levels}
        losses: Any = self.loss(functional_call(model, levels, args, kwargs), batch)
        rows = _size(batch)
        if not isinstance(losses, Tensor) or losses.shape != (rows,):
            got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise AdapterError(f"loss must return one loss for each of the {rows} rows, shape ({rows},), got {got}.")
        return losses

    def _drop(self, live: _Stack, step: int) -> None:
        gone = [member for member in live.members if member.stopped is not None]
        if not gone:
            return
        self.tell(Event("stop", step, tuple(m.name for m in gone), tuple(m.best for m in gone)))
        kept = [i for i, member in enumerate(live.members) if member.stopped is None]
        if kept:
            live.keep(kept)
        else:
            live.members = []


# -- parts of it ----------------------------------------------------------------------------------------


def _initial(model: nn.Module, trials: Sequence[Trial], dtype: torch.dtype | None) -> list[_Begun]:
    """The adapters before training. Trials that begin alike share their leaves: an SVD is made once."""
    made: dict[tuple[AdapterConfig, int], _Begun] = {}
    found: list[_Begun] = []
    for trial in trials:
        config: Any = trial.config
        like = dataclasses.replace(config, lora_dropout=0.0) if hasattr(config, "lora_dropout") else config
        key = (like, trial.seed)
        if key not in made:
            adapter, base = init_with_base(model, config, seed=trial.seed, dtype=dtype)
            made[key] = _Begun(adapter, _residual(adapter) if base else None)
        begun = made[key]
        named: Any = begun.adapter.config
        if hasattr(config, "lora_dropout"):
            named = dataclasses.replace(named, lora_dropout=config.lora_dropout)
        found.append(dataclasses.replace(begun, adapter=begun.adapter.replace(config=named)))
    return found


def _residual(adapter: Adapter) -> Adapter:
    """The adapter that takes the initial factors out of the base weight: -s B0 A0."""
    params = {
        path: {"lora_A": leaves["lora_A"], "lora_B": -leaves["lora_B"]}
        for path, leaves in adapter.params.items()
        if "lora_A" in leaves and "lora_B" in leaves
    }
    buffers = {path: {"scaling": adapter.buffers[path]["scaling"]} for path in params}
    plain: dict[str, Any] = {
        "use_dora": False,
        "bias": "none",
        "modules_to_save": None,
        "trainable_token_indices": None,
    }
    config: Any = adapter.config
    return Adapter(params, buffers, dataclasses.replace(config, lora_dropout=0.0, init_lora_weights=True, **plain))


def _stacked_residuals(begun: Sequence[_Begun]) -> Adapter | None:
    first = next((b.residual for b in begun if b.residual is not None), None)
    if first is None:
        return None
    return stack([b.residual or Adapter({}, {}, first.config) for b in begun])  # nothing anywhere: zeros


def _plain(adapter: Adapter, residual: Adapter) -> Adapter:
    """The two in one, on the base as it is: s [B, -B0] [A; A0]."""
    method = method_of(adapter.config)
    params = dict(adapter.params)
    for path, under in residual.params.items():
        p = adapter.params[path]
        a, b = (torch.cat([p[name], under[name]], dim) for dim, name in enumerate(("lora_A", "lora_B")))
        params[path] = dict(method.layout({**p, "lora_A": a, "lora_B": b}))
    config = dataclasses.replace(typing.cast("Any", adapter.config), init_lora_weights=True)
    both = adapter.replace(params=params, config=config)
    return both.replace(config=method.describe(config, {path: both.leaves(path) for path in params}))


def _groups(trials: Sequence[Trial], begun: Sequence[_Begun], at_once: int | None) -> list[list[int]]:
    """The trials that can be in one stack, in groups of at most `at_once`."""
    groups: list[list[int]] = []
    for i, trial in enumerate(trials):
        for group in groups:
            other = trials[group[0]]
            alike = (trial.optimizer, trial.nesterov) == (other.optimizer, other.nesterov)
            if alike and (at_once is None or len(group) < at_once) and _stackable(begun[group[0]], begun[i]):
                group.append(i)
                break
        else:
            groups.append([i])
    return groups


def _stackable(a: _Begun, b: _Begun) -> bool:
    try:
        stack([a.adapter, b.adapter])
    except AdapterError:
        return False
    return True


def _single(adapters: Adapter, i: int) -> Adapter:
    """A copy of one adapter of a stack, with the rank that it had; others that were wider may be gone by now."""
    assert adapters.members is not None
    one = select(adapters, i)
    method, params = method_of(one.config), dict(one.params)
    for path, ranks in adapters.members.ranks.items():
        p = one.leaves(path)
        if p and method.with_rank is not None and 0 < ranks[i] < one.config.rank(p):
            cut = method.with_rank(p, ranks[i])
            params[path] = {name: cut[name] for name in params[path]}
    return one.replace(params=params).map(torch.clone)


def _twin(model: nn.Module, adapters: Adapter | None = None, trials: Sequence[Trial] = ()) -> nn.Module:
    """A frozen copy that shares the tensors. Adapted layers are in training mode if a trial has dropout."""
    twin = structural_copy(model)
    frozen: dict[int, nn.Parameter] = {}
    for module in twin.modules():
        for name, held in module._parameters.items():
            if held is not None and held.requires_grad:  # tied ones stay tied
                new = frozen.setdefault(id(held), nn.Parameter(held.detach(), requires_grad=False))
                module._parameters[name] = new
    if adapters is not None and any(method_of(t.config).dropout(t.config) for t in trials):
        modules = dict(named_modules(twin))
        for path in adapters.params:
            if path in modules:
                modules[path].training = True
    return twin


def _hyper(trials: Sequence[Trial]) -> dict[str, Tensor]:
    def column(values: Iterable[float | None]) -> Tensor:
        return torch.tensor([math.inf if v is None else v for v in values], dtype=torch.float64)

    hyper = {"clip": column(t.clip for t in trials), "weight_decay": column(t.weight_decay for t in trials)}
    if trials[0].optimizer == "sgd":
        return {**hyper, "momentum": column(t.momentum for t in trials)}
    beta1, beta2 = (column(t.betas[i] for t in trials) for i in (0, 1))
    return {**hyper, "beta1": beta1, "beta2": beta2, "eps": column(t.eps for t in trials)}


def _rates(trial: Trial, steps: int) -> Tensor:
    """The learning rate at every step, (steps,)."""
    if trial.schedule == "constant":
        schedule = optim.constant(warmup=trial.warmup)
    else:
        schedule = getattr(optim, trial.schedule)(steps, warmup=trial.warmup, end=trial.end)
    return trial.lr * schedule(torch.arange(steps))


def _absent(adapters: Adapter) -> dict[str, Tensor]:
    """Path -> which of the adapters has nothing there, (N,); only where there is one. Neutral leaves stay neutral."""
    assert adapters.members is not None
    ranks = adapters.members.ranks.items()
    return {path: torch.tensor([r == 0 for r in row]) for path, row in ranks if 0 in row and path in adapters.params}


def _where_absent(absent: Mapping[str, Tensor], old: Any, new: Any) -> Any:
    if not absent:
        return new
    changed = dict(new)
    for path, mask in absent.items():
        changed[path] = {
            name: torch.where(mask.to(leaf.device).reshape(-1, *(1,) * (leaf.ndim - 1)), old[path][name], leaf)
            for name, leaf in new[path].items()
        }
    return changed


def _order(examples: int, count: int, seed: int) -> Tensor:
    """Which example comes when: one permutation of all after another, (count,)."""
    generator = torch.Generator().manual_seed(seed)
    epochs = math.ceil(count / examples)
    return torch.cat([torch.randperm(examples, generator=generator) for _ in range(epochs)])[:count]


def _seed(seed: int, step: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:dropout:{step}".encode()).digest()[:8], "little") >> 1


def _examples(data: Tree, what: str, least: int) -> Tree:
    if isinstance(data, Mapping) and not isinstance(data, dict):
        data = dict(data)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    leaves: list[Any] = optree.tree_leaves(data)  # pyright: ignore
    if not leaves or not all(isinstance(t, Tensor) and t.ndim for t in leaves):
        raise AdapterError(f"{what} must be a tensor, or a dict or tuple of tensors, with the examples as first axis.")
    sizes = {len(t) for t in leaves}
    if len(sizes) > 1:
        raise AdapterError(f"{what} has tensors of {' and '.join(map(str, sorted(sizes)))} examples.")
    if min(sizes) < least:
        raise AdapterError(f"{what} has too few examples: {min(sizes)}, and {least} are needed for one batch.")
    return data  # pyright: ignore[reportUnknownVariableType]


def _size(tree: Tree) -> int:
    leaves: list[Tensor] = optree.tree_leaves(tree)  # pyright: ignore
    return len(leaves[0])


def _take(tree: Tree, rows: Tensor) -> Tree:
    return optree.tree_map(lambda t: t[rows.to(t.device)], tree)  # pyright: ignore


def _default_inputs(model: nn.Module) -> Inputs:
    takes_cache = "use_cache" in inspect.signature(model.forward).parameters
    extra: dict[str, Any] = {"use_cache": False} if takes_cache else {}

    def inputs(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if isinstance(batch, Mapping):
            fields = typing.cast("Mapping[str, Any]", batch)
            return (), {**{k: v for k, v in fields.items() if k != "labels"}, **extra}
        if isinstance(batch, tuple | list):
            return (typing.cast("Sequence[Any]", batch)[0],), dict(extra)
        return (batch,), dict(extra)

    return inputs


@contextmanager
def _reporting(
    report: Callable[[Event], None] | None, progress: Any, total: int
) -> Generator[Callable[[Event], None], None, None]:
    """What to call with events: the caller's function, a progress bar, both or neither."""
    listeners: list[Callable[[Event], None]] = [] if report is None else [report]

    def tell(event: Event) -> None:
        for listener in listeners:
            listener(event)

    if progress is False or progress is None:
        yield tell
        return
    rich: Any = optional("rich.progress")
    console = None if progress is True else progress
    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.TextColumn("{task.fields[training]} training, {task.fields[best]}"),
        rich.TimeElapsedColumn(),
    )
    with rich.Progress(*columns, console=console) as bars:
        bar = bars.add_task("sweep", total=total, training=0, best="no loss yet")
        steps = total
        best = math.inf

        def show(event: Event) -> None:
            nonlocal best
            if event.kind == "step":
                bars.update(bar, advance=len(event.names), training=len(event.names))
                return
            if event.kind == "evaluation":
                best = min([best, *(loss for loss in event.losses if math.isfinite(loss))])
                bars.update(bar, best=f"best held-out loss {best:.4f}")

        listeners.append(show)
        yield tell
        bars.update(bar, completed=steps, training=0)


# -- names and values -----------------------------------------------------------------------------------


def _own_fields() -> list[str]:
    return [f.name for f in dataclasses.fields(Trial) if f.name not in ("config", "name")]


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


def _product(first: Trial, fields: Mapping[str, Any], shown: Sequence[str] = ()) -> list[Trial]:
    """The product of all fields that are axes. Names say the values on the axes, and of the fields in `shown`."""
    own = _own_fields()
    known = [f.name for f in dataclasses.fields(first.config)]
    axes: dict[str, list[Any]] = {}
    for name, value in fields.items():
        if name not in own and name not in known:
            raise AdapterError(
                f"{type(first.config).__name__} and Trial have no field {name!r}.{did_you_mean(name, (*own, *known))}"
            )
        if isinstance(value, list):
            values = typing.cast("list[Any]", value)
            hint = typing.get_type_hints(Trial if name in own else type(first.config))[name]
            if not _holds_sequence(hint) or any(isinstance(v, list | tuple) for v in values):
                axes[name] = values
            if not values:
                raise AdapterError(f"The axis {name!r} of the grid is an empty list.")
    named = [name for name in fields if name in axes or name in shown]
    trials: list[Trial] = []
    for values in itertools.product(*axes.values()):
        changes = {**fields, **dict(zip(axes, values, strict=True))}
        try:
            config = dataclasses.replace(first.config, **{k: v for k, v in changes.items() if k not in own})
        except (TypeError, ValueError) as error:
            raise AdapterError(f"The values do not make a {type(first.config).__name__}: {error}") from error
        trial = dataclasses.replace(first, config=config, **{k: v for k, v in changes.items() if k in own})
        parts = [*([first.name] if first.name else []), *(f"{name}={_short(_get(trial, name))}" for name in named)]
        trials.append(dataclasses.replace(trial, name=" ".join(parts) or None))
    return trials


def _get(trial: Trial, name: str) -> Any:
    return getattr(trial if name in _own_fields() else trial.config, name)


def _varied(trials: Sequence[Trial]) -> list[str]:
    """The fields in which trials differ; of the configs, those that all have."""
    names = _own_fields()
    for field in dataclasses.fields(trials[0].config):
        if all(hasattr(trial.config, field.name) for trial in trials):
            names.append(field.name)
    return [name for name in names if any(_get(t, name) != _get(trials[0], name) for t in trials)]


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return "+".join(map(_short, value))  # pyright: ignore[reportUnknownArgumentType]
    return str(value)


def _holds_sequence(hint: Any) -> bool:
    """Whether values of this type may be sequences: then a flat list is a value, and no axis."""
    if isinstance(hint, UnionType) or typing.get_origin(hint) is typing.Union:
        return any(_holds_sequence(option) for option in typing.get_args(hint))
    origin = typing.get_origin(hint)
    return isinstance(origin, type) and issubclass(origin, Sequence | tuple)


def _number_from(value: Any, name: str, trial: Trial) -> Any:
    """YAML 1.1 reads 1e-3, without a point, as text: numbers where numbers belong."""
    if isinstance(value, list):
        return [_number_from(v, name, trial) for v in typing.cast("list[Any]", value)]
    hint = {**typing.get_type_hints(type(trial.config)), **typing.get_type_hints(Trial)}.get(name)
    if isinstance(value, str) and float in (hint, *_flat(hint)):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _flat(hint: Any) -> list[Any]:
    found: list[Any] = []
    for option in typing.get_args(hint):
        found += [option, *_flat(option)]
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
