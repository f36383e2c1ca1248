"""What injection settles in a PEFT config: the targets that a default or "all-linear" stood for, and the layout."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Collection, Iterable
from typing import Any

from torch import nn

from funcadapt import targeting
from funcadapt._torch import named_modules
from funcadapt.config import thaw
from funcadapt.peft.config import PeftConfig
from funcadapt.view.walking import layers, unwrapped, view_state

_MANY = 20  # PEFT shortens lists of targets from here on


def settle(model: nn.Module, config: PeftConfig, name: str, resolved: Any) -> None:
    """Write into a config, in place, what its injection made of it, as PEFT does: it is what is saved.

    Args:
        model: the model, with the adapter in it.
        config: PEFT's config.
        name: the adapter's name.
        resolved: funcadapt's config, as it was injected.
    """
    fields: Any = config
    for field in ("target_modules", "feedforward_modules"):
        value = getattr(resolved, field, None)
        if hasattr(config, field) and getattr(config, field) is None and value is not None:
            setattr(config, field, value if isinstance(value, str) else set(value))
    targets: Any = getattr(config, "target_modules", None)
    if isinstance(targets, str) and targets.lower() == "all-linear":
        with unwrapped(model):
            found = targeting._all_linear(model, resolved, {p: m for p, m in named_modules(model) if p})
        fields.target_modules = targets = set(found)
        inner: Any = getattr(config, "feedforward_modules", None)
        if inner is not None and not isinstance(inner, str):
            # PEFT leaves the names, which are none of the targets then: it cannot read its own file
            fields.feedforward_modules = {path for path in found if path.endswith(tuple(inner))}
    if isinstance(targets, set | list) and len(targets) >= _MANY and config.peft_type != "IA3":  # pyright: ignore
        with unwrapped(model):
            paths = [path for path, _ in named_modules(model)]
        short = shortest_targets(targets, paths)  # pyright: ignore[reportUnknownArgumentType]
        if len(short) < len(targets):  # pyright: ignore[reportUnknownArgumentType]
            fields.target_modules = short
    if hasattr(config, "fan_in_fan_out"):
        _settle_layout(model, fields, name)


def as_held(model: nn.Module, config: Any, name: str) -> Any:
    """A config with the ranks and alphas that the adapter's layers have, where swapping or padding changed them.

    Args:
        model: the model.
        config: PEFT's config of the adapter.
        name: the adapter's name.

    Returns:
        The same config if it says so already.
    """
    frozen = config.to_funcadapt()
    held = view_state(model).configs.get(name, frozen)  # X-LoRA is no adapter of a layer
    fields = [field for pair in frozen.patterned.items() for field in pair]
    if not fields or all(
        getattr(frozen.at(layer.site.path), field) == getattr(layer.adapters[name].config, field)
        for _, layer in layers(model)
        for field in frozen.patterned
        if name in layer.adapters
    ):
        return config
    return dataclasses.replace(config, **{field: thaw(getattr(held, field)) for field in fields})


def shortest_targets(targets: Collection[str], paths: Iterable[str]) -> set[str]:
    """The fewest endings of paths that select the same modules, as PEFT finds them.

    Args:
        targets: the targets.
        paths: every module's path.

    Returns:
        The endings.

    Example:
        >>> paths = [f"layers.{i}.{part}" for i in range(9) for part in ("q", "k", "v")]
        >>> sorted(shortest_targets([path for path in paths if path[-1] != "k"], paths))
        ['q', 'v']
    """
    meant = set(targets)
    endings = tuple(f".{target}" for target in meant)
    others = (path for path in paths if path not in meant and not path.endswith(endings))
    taken = {ending for path in others for ending in _endings(path)}
    chosen: list[str] = []
    for target in sorted(meant, key=_endings):
        for ending in _endings(target):
            if ending in chosen or ending in taken:
                continue
            if not any(target.endswith(f".{known}") for known in chosen):
                chosen.append(ending)
                break
    return set(chosen) or meant


def _endings(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[i:]) for i in reversed(range(len(parts)))]


def _settle_layout(model: nn.Module, config: Any, name: str) -> None:
    """`fan_in_fan_out` says what the last adapted layer is. Here the layer's type decides, but the file should tell."""
    for _, layer in layers(model):
        kind, said = layer.site.kind, config.fan_in_fan_out
        if name in layer.adapters and kind in ("linear", "hf_conv1d") and said != (kind == "hf_conv1d"):
            type_name = "`torch.nn.Linear`" if said else "`Conv1D`"
            warnings.warn(
                f"fan_in_fan_out is set to {said} but the target module is {type_name}. Setting "
                f"fan_in_fan_out to {not said}.",
                stacklevel=5,
            )
            if config.peft_type == "HIRA":  # PEFT only says so
                return
            config.fan_in_fan_out = not said
