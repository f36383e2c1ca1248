"""Where trials start: their initial adapters, what can be in one stack, and inits that change the base weights.

Those (PiSSA, OLoRA) share the base with the others: W - s B0 A0 is W with a second, frozen adapter of the negated
initial factors, innermost: the residual. What comes out of them is a plain LoRA of twice the rank, [B, -B0] [A; A0],
which acts on the base as it is.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from funcadapt.adapter import Adapter
from funcadapt.config import AdapterConfig
from funcadapt.errors import AdapterError
from funcadapt.init import init_with_base
from funcadapt.method import method_of
from funcadapt.stacking import stack
from funcadapt.sweep.trials import Trial


@dataclasses.dataclass(frozen=True)
class Start:
    """A trial's adapter before training, and the frozen one that goes under it (PiSSA, OLoRA)."""

    adapter: Adapter
    residual: Adapter | None


def starts(model: nn.Module, trials: Sequence[Trial], dtype: torch.dtype | None) -> list[Start]:
    """The adapters before training. Trials that begin alike share theirs: an SVD is made once."""
    made: dict[tuple[AdapterConfig, int], Start] = {}
    for trial in trials:
        key = (trial.config, trial.seed)
        if key not in made:
            adapter, base = init_with_base(model, trial.config, seed=trial.seed, dtype=dtype)
            made[key] = Start(adapter, _residual(adapter) if base else None)
    return [made[trial.config, trial.seed] for trial in trials]


def groups(trials: Sequence[Trial], begun: Sequence[Start], at_once: int | None) -> list[list[int]]:
    """The trials that can be in one stack, in groups of at most `at_once`."""
    found: list[list[int]] = []
    for i, trial in enumerate(trials):
        for group in found:
            other = trials[group[0]]
            alike = (trial.optimizer, trial.nesterov) == (other.optimizer, other.nesterov)
            if alike and (at_once is None or len(group) < at_once) and _stackable(begun[group[0]], begun[i]):
                group.append(i)
                break
        else:
            found.append([i])
    return found


def stacked_residuals(begun: Sequence[Start]) -> Adapter | None:
    """A stack of the residuals, zeros for trials without one; None if there is none."""
    first = next((start.residual for start in begun if start.residual is not None), None)
    if first is None:
        return None
    return stack([start.residual or Adapter({}, {}, first.config) for start in begun])


def joined(adapter: Adapter, residual: Adapter) -> Adapter:
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


def _residual(adapter: Adapter) -> Adapter:
    """The adapter that takes the initial factors out of the base weight: -s B0 A0."""
    params = {
        path: {"lora_A": leaves["lora_A"], "lora_B": -leaves["lora_B"]}
        for path, leaves in adapter.params.items()
        if "lora_A" in leaves and "lora_B" in leaves
    }
    buffers = {path: {"scaling": adapter.buffers[path]["scaling"]} for path in params}
    config = dataclasses.replace(
        typing.cast("Any", adapter.config),
        lora_dropout=0.0,
        init_lora_weights=True,
        use_dora=False,
        bias="none",
        modules_to_save=None,
        trainable_token_indices=None,
    )
    return Adapter(params, buffers, config)


def _stackable(a: Start, b: Start) -> bool:
    try:
        stack([a.adapter, b.adapter])
    except AdapterError:
        return False
    return True
