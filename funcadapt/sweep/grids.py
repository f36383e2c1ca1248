"""Grids: many trials in a line, or in a YAML or JSON file."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any

from funcadapt.config import AdapterConfig, config_from_dict
from funcadapt.errors import AdapterError, did_you_mean
from funcadapt.recipes.pretrained import optional
from funcadapt.sweep.trials import OWN, Trial, shown, value


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
    common = {key: given for key, given in spec.items() if key != "trials"}
    entries: Any = spec.get("trials", [{}])
    if not isinstance(entries, list) or not entries:
        raise AdapterError(f"'trials' must be a list of at least one trial, got {entries!r}.")
    trials: list[Trial] = []
    for entry in typing.cast("list[Any]", entries):
        if not isinstance(entry, Mapping):
            raise AdapterError(f"An entry of 'trials' must have fields and values, got {entry!r}.")
        own = {str(key): given for key, given in typing.cast("Mapping[Any, Any]", entry).items()}
        fields = {**common, **own}
        start = Trial(config_from_dict({"peft_type": fields.pop("peft_type", "LORA")}), name=fields.pop("name", None))
        fields = {name: _as_number(given, _hint(start, name)) for name, given in fields.items()}
        trials += _product(start, fields, named=own if start.name is None else ())
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
        kind, parse, malformed = "JSON", json.loads, json.JSONDecodeError
    else:
        yaml = optional("yaml")
        kind, parse, malformed = "YAML", yaml.safe_load, yaml.YAMLError
    try:
        spec = parse(text)
    except malformed as error:
        raise AdapterError(f"The grid file {str(file)!r} is no {kind}: {error}") from error
    if not isinstance(spec, dict) or not spec:
        raise AdapterError(f"The grid file {str(file)!r} must hold fields and values, such as 'lr: [1.0e-3, 3.0e-3]'.")
    return trials_from({str(key): given for key, given in typing.cast("dict[Any, Any]", spec).items()})


def _product(start: Trial, fields: Mapping[str, Any], named: typing.Container[str] = ()) -> list[Trial]:
    """The product of all fields that are axes. Names say the values on the axes, and of the fields in `named`."""
    kind = type(start.config)
    known = [*OWN, *(field.name for field in dataclasses.fields(start.config))]
    axes: dict[str, list[Any]] = {}
    for name, given in fields.items():
        if name not in known:
            raise AdapterError(f"{kind.__name__} and Trial have no field {name!r}.{did_you_mean(name, known)}")
        if isinstance(given, list):
            values = typing.cast("list[Any]", given)
            if not values:
                raise AdapterError(f"The axis {name!r} of the grid is an empty list.")
            if not _holds_sequence(_hint(start, name)) or any(isinstance(v, list | tuple) for v in values):
                axes[name] = values
    trials: list[Trial] = []
    for values in itertools.product(*axes.values()):
        changes = {**fields, **dict(zip(axes, values, strict=True))}
        own = {name: changes.pop(name) for name in OWN if name in changes}
        try:
            config = dataclasses.replace(start.config, **changes)
        except (TypeError, ValueError) as error:
            raise AdapterError(f"The values do not make a {kind.__name__}: {error}") from error
        trial = dataclasses.replace(start, config=config, **own)
        parts = [start.name] if start.name else []
        parts += [f"{name}={shown(value(trial, name))}" for name in fields if name in axes or name in named]
        trials.append(dataclasses.replace(trial, name=" ".join(parts) or None))
    return trials


def _hint(trial: Trial, name: str) -> Any:
    return typing.get_type_hints(Trial if name in OWN else type(trial.config)).get(name)


def _holds_sequence(hint: Any) -> bool:
    """Whether values of this type may be sequences: then a flat list is a value, and no axis."""
    origin = typing.get_origin(hint)
    if origin in (UnionType, typing.Union):
        return any(_holds_sequence(option) for option in typing.get_args(hint))
    return isinstance(origin, type) and issubclass(origin, Sequence)


def _holds_float(hint: Any) -> bool:
    return hint is float or any(_holds_float(part) for part in typing.get_args(hint))


def _as_number(given: Any, hint: Any) -> Any:
    """YAML 1.1 reads 1e-3, without a point, as text: numbers where numbers belong."""
    if isinstance(given, list):
        return [_as_number(v, hint) for v in typing.cast("list[Any]", given)]
    if isinstance(given, str) and _holds_float(hint):
        try:
            return float(given)
        except ValueError:
            return given
    return given
