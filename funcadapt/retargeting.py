"""The config of a LoRA that is made of something else: what it selects, holds in full, and says of its leaves."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from funcadapt._torch import named_modules
from funcadapt.errors import AdapterError, TargetError
from funcadapt.init import _with_name
from funcadapt.methods.lora import LoraConfig
from funcadapt.sites import Site
from funcadapt.targeting import model_type, names_match, sites

_SELECTION = ("target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern")


def named(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """The config with the model type's defaults and the model's name filled in."""
    found: Any = _with_name(config.for_model(model_type(model)), model)
    return found


def carried(config: LoraConfig, theirs: Any) -> LoraConfig:
    """The config, which holds in full what an adapter's does.

    Args:
        config: the config of the LoRA.
        theirs: the config of the adapter that it stands for.

    Returns:
        The config.

    Raises:
        AdapterError: if both train token rows, and others.
    """
    saved = tuple(dict.fromkeys([*(config.modules_to_save or ()), *(getattr(theirs, "modules_to_save", None) or ())]))
    bias, tokens = getattr(theirs, "bias", "none"), getattr(theirs, "trainable_token_indices", None)
    if tokens and config.trainable_token_indices not in (None, tokens):
        raise AdapterError(
            f"convert: the config has trainable_token_indices={config.trainable_token_indices}, the adapter {tokens}."
        )
    if bias == "none" or config.bias == "all":
        bias = config.bias
    return dataclasses.replace(
        config,
        modules_to_save=saved or None,
        bias=bias if bias in ("none", "all") else "lora_only",
        trainable_token_indices=tokens or config.trainable_token_indices,
    )


def aimed_at(
    model: nn.Module, config: LoraConfig, theirs: Any, own: Mapping[str, Site]
) -> tuple[LoraConfig, Sequence[Site]]:
    """The config with targets: those of an adapter, if it has none.

    Args:
        model: the model.
        config: the config of the LoRA.
        theirs: the config of the adapter.
        own: the sites of the adapter, by path.

    Returns:
        The config, and the sites that it selects: all of the adapter's.

    Raises:
        TargetError: if some of the adapter's are not among them.
    """
    if config.target_modules is not None or config.target_parameters is not None:
        table = sites(model, config)
        left = sorted(own.keys() - {site.path for site in table})
        if left:
            raise TargetError(
                f"convert: the adapter changes {left[0]!r} ({len(left)} such sites), which the config does not target. "
                "Leave target_modules and target_parameters out to take the adapter's."
            )
        return named(model, config), table
    chosen = {name: getattr(theirs, name, None) for name in _SELECTION if getattr(config, name) is None}
    if chosen["target_modules"] is not None or chosen["target_parameters"]:
        aimed = named(model, dataclasses.replace(config, **chosen))
        table = selected(model, aimed)
        if table is not None and {site.path for site in table} == set(own):
            return aimed, table
    aimed = named(model, dataclasses.replace(config, **_one_by_one(model, own)))
    table = selected(model, aimed) or ()
    if {site.path for site in table} != set(own):
        raise TargetError(
            f"convert: no LoraConfig selects exactly what the adapter changes, {', '.join(map(repr, own))}. Name the "
            "targets in the config."
        )
    return aimed, table


def selected(model: nn.Module, config: LoraConfig) -> Sequence[Site] | None:
    """The sites that a config selects; None if nothing is left."""
    try:
        return sites(model, config, strict=False)
    except TargetError:
        return None


def _one_by_one(model: nn.Module, own: Mapping[str, Site]) -> dict[str, Any]:
    """Target fields that name every site."""
    packed = {site.owner for site in own.values() if site.parameter == "in_proj_weight" and site.kind == "mha"}
    packed = {owner for owner in packed if f"{owner}.out_proj" in own}  # one target for both
    modules: list[str] = []
    parameters: list[str] = []
    for path, site in own.items():
        if site.owner in packed or (path.rpartition(".")[0] in packed and path.endswith(".out_proj")):
            modules.append(path.rpartition(".")[0])
        else:
            (modules if site.owner == path else parameters).append(path)
    return {
        "target_modules": _names(model, list(dict.fromkeys(modules))),
        "target_parameters": tuple(parameters) or None,
    }


def _names(model: nn.Module, paths: Sequence[str]) -> str | tuple[str, ...]:
    """What a list of names selects is these modules and no others; else a regular expression."""
    every = [path for path, _ in named_modules(model) if path]
    if sum(names_match(paths, path) for path in every) == len(paths):
        return tuple(paths)
    return "|".join(re.escape(path) for path in paths)


def without(model: nn.Module, config: LoraConfig, empty: Sequence[Site]) -> LoraConfig:
    """The config that does not select some sites, as far as it can say so.

    Args:
        model: the model.
        config: the config.
        empty: the sites to leave out.

    Returns:
        The config with more in `exclude_modules`, and less in `target_parameters`.
    """
    plain = {site.path for site in empty if site.kind in ("parameter", "experts")}
    if plain:
        every = [site.path for site in selected(model, config) or () if site.kind in ("parameter", "experts")]
        left = tuple(path for path in every if path not in plain)
        config = dataclasses.replace(config, target_parameters=left or None)
    modules = dict.fromkeys(site.owner for site in empty if site.path not in plain)
    if not modules:
        return config
    names, old = _names(model, list(modules)), config.exclude_modules
    if isinstance(names, str) or isinstance(old, str):
        old = "|".join(rf"(.*\.)?{re.escape(name)}" for name in old or ()) if not isinstance(old, str) else old
        names = names if isinstance(names, str) else "|".join(re.escape(path) for path in names)
        return dataclasses.replace(config, exclude_modules=f"({old})|({names})" if old else names)
    return dataclasses.replace(config, exclude_modules=tuple(dict.fromkeys([*(old or ()), *names])))
