"""Trials: what one run of a sweep trains, and how."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable, Sequence
from typing import Any

from funcadapt.config import AdapterConfig
from funcadapt.errors import AdapterError, did_you_mean


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
        for fields, what, holds in _RULES:
            for field in fields:
                if not holds(got := getattr(self, field)):
                    raise AdapterError(f"{field} must be {what}, got {got!r}.")
        object.__setattr__(self, "betas", tuple(self.betas))
        for field, known in _CHOICES.items():
            if (got := getattr(self, field)) not in known:
                raise AdapterError(f"{field} {got!r} is unknown.{did_you_mean(str(got), known)}")
        if self.nesterov and not self.momentum:
            raise AdapterError("nesterov needs a momentum.")

    def to_dict(self) -> dict[str, Any]:
        """In JSON types: the fields of the trial, and those of its config that are not at their defaults."""
        config, default = self.config.to_dict(), type(self.config)().to_dict()
        changed = {k: v for k, v in config.items() if k == "peft_type" or v != default[k]}
        return {**{name: getattr(self, name) for name in OWN}, "betas": list(self.betas), "config": changed}


OWN = tuple(field.name for field in dataclasses.fields(Trial) if field.name not in ("config", "name"))
"""The hyperparameters that a trial has beside those of its config."""


def value(trial: Trial, name: str) -> Any:
    """The value of a field of the trial, or of its config."""
    return getattr(trial if name in OWN else trial.config, name)


def varied(trials: Sequence[Trial]) -> list[str]:
    """The fields in which trials differ; of the configs, those that all have."""
    fields = [field.name for field in dataclasses.fields(trials[0].config)]
    names = [*OWN, *(name for name in fields if all(hasattr(trial.config, name) for trial in trials))]
    return [name for name in names if any(value(trial, name) != value(trials[0], name) for trial in trials)]


def shown(x: Any) -> str:
    """A value in a few characters."""
    if isinstance(x, float):
        return f"{x:g}"
    if isinstance(x, list | tuple):
        return "+".join(map(shown, typing.cast("Sequence[Any]", x)))
    return str(x)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _are_betas(value: Any) -> bool:
    pair = typing.cast("Sequence[Any]", value if isinstance(value, list | tuple) else ())
    return len(pair) == 2 and all(_is_number(beta) and 0 <= beta < 1 for beta in pair)


_RULES: tuple[tuple[Sequence[str], str, Callable[[Any], bool]], ...] = (
    (("lr", "weight_decay", "momentum", "end"), "a number >= 0", lambda v: _is_number(v) and v >= 0),
    (("eps",), "a number > 0", _is_positive),
    (("clip",), "a number > 0", lambda v: v is None or _is_positive(v)),
    (("seed", "data_seed"), "an integer", _is_integer),
    (("warmup",), "an integer >= 0", lambda v: _is_integer(v) and v >= 0),
    (("betas",), "two numbers in [0, 1)", _are_betas),
)
_CHOICES = {"optimizer": ("adamw", "sgd"), "schedule": ("constant", "linear", "cosine")}
