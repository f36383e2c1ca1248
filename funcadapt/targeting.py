"""Targeting: which sites a config selects in a model, by PEFT's rules."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from funcadapt._torch import named_modules
from funcadapt.config import AdapterConfig, matching_pattern
from funcadapt.errors import SiteError, TargetError, did_you_mean
from funcadapt.method import method_of
from funcadapt.quantised import is_quantised_linear
from funcadapt.sites import Site, SiteTable, describe, describe_module, tied_names


def sites(model: nn.Module, config: AdapterConfig, *, expect: int | None = None, strict: bool = True) -> SiteTable:
    """The sites that a config selects in a model, by PEFT's rules.

    `target_modules` is a list of names (each matches a module of that path, or one that ends in it after a dot), a
    regular expression for the whole path, "all-linear", or None for the model type's default. `exclude_modules`,
    `layers_to_transform` with `layers_pattern`, `modules_to_save` and `target_parameters` mean what they mean in
    PEFT. An `nn.MultiheadAttention` gives two sites, its packed in-projection and its out-projection.

    Args:
        model: the model.
        config: the config.
        expect: how many sites there must be.
        strict: whether a name or pattern that matched nothing is an error (PEFT ignores it), and so is one tied weight
            under two names (each can be adapted, but they cannot be merged into one weight).

    Returns:
        The table of sites.

    Raises:
        TargetError: if nothing matched, a name or pattern was unused, the count differs from `expect`, or one tied
            weight would be adapted under two names.
        SiteError: if a matched module is of a kind that the method cannot adapt.

    Example:
        >>> import torch
        >>> import funcadapt as fa
        >>> model = torch.nn.ModuleDict({"up": torch.nn.Linear(4, 8), "down": torch.nn.Linear(8, 4)})
        >>> fa.sites(model, fa.LoraConfig(target_modules=["up", "down"]), expect=2)
        path  kind    shape  parameters  tied with
        up    linear  8x4    32
        down  linear  4x8    32
        2 sites, 64 base parameters
    """
    by_default = getattr(config, "target_modules", None) is None
    config = config.for_model(model_type(model))
    method = method_of(config)
    tied = tied_names(model)
    _check_saved_modules(model, config)
    if config.target_parameters and not method.kinds:
        raise TargetError(f"{method.name} adapts no plain parameters, but target_parameters names some.")
    if method.rows:
        return SiteTable([])  # `token_table` finds the embeddings
    chosen = _target_modules(model, config, strict, by_default)
    found: dict[str, Site] = {}
    for path, module in () if method.whole else chosen.items():
        for site in describe_module(path, module, method.name):
            found[site.path] = site
    for path in _target_parameters(model, config, strict):
        if path.rpartition(".")[0] in chosen:
            raise TargetError(
                f"Parameter {path!r} is in target_parameters, and its module {path.rpartition('.')[0]!r} is in "
                "target_modules: each weight is adapted once. Drop one of them, or pass target_modules=[]."
            )
        found[path] = describe(model, path)[0]
    table = [dataclasses.replace(s, tied=tied.get(s.weight_name, ())) for s in found.values()]
    for site in table:
        if site.kind not in method.kinds:
            raise SiteError(
                f"{method.name} cannot adapt {site.path!r}, which is of kind {site.kind!r}. It supports: "
                f"{', '.join(sorted(method.kinds))}. Name other target_modules, or exclude it with exclude_modules."
            )
    if strict:
        _check_ties(table)
    _check_patterns(config, table, strict)
    if expect is not None and len(table) != expect:
        raise TargetError(f"Expected {expect} sites, got {len(table)}:\n{SiteTable(table)!r}")
    return SiteTable(table)


def model_type(model: nn.Module) -> str | None:
    """Transformers' model type ("llama"), from the model's config, or None."""
    config: Any = getattr(model, "config", None)
    found = config.get("model_type") if isinstance(config, Mapping) else getattr(config, "model_type", None)  # pyright: ignore
    return found if isinstance(found, str) else None


def names_match(names: str | Sequence[str], path: str) -> bool:
    """PEFT's rule: a string is a regular expression for the whole path, a list holds paths or endings of paths."""
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)


def is_saved(config: AdapterConfig, path: str) -> bool:
    """Whether a path is in or below a module that `modules_to_save` names.

    PEFT's rule: the end of the module's path decides, without a dot before it, so that "norm" also is
    "layers.0.input_layernorm".

    Args:
        config: the config.
        path: the path.

    Returns:
        Whether it is.
    """
    saved: Sequence[str] = getattr(config, "modules_to_save", None) or ()
    return any(f"{name}." in f"{path}." for name in saved)


def whole_names(model: nn.Module, config: AdapterConfig, adapted: Collection[str]) -> Iterator[tuple[str, str]]:
    """The parameters and buffers that `modules_to_save` and `bias` put into an adapter in full.

    Args:
        model: the model.
        config: the config.
        adapted: the paths of the sites.

    Yields:
        The module's path and the name in it.
    """
    bias = getattr(config, "bias", "none")
    targeted = _target_modules(model, config, False, False) if method_of(config).whole else {}
    for path, module in named_modules(model, remove_duplicate=False):
        whole = bool(path) and (is_saved(config, path) or any(part in targeted for part in _and_above(path)))
        trained = bias == "all" or (bias.endswith("_only") and path in adapted)
        for name, parameter in module._parameters.items():
            if parameter is not None and (whole or (name == "bias" and trained)):
                yield path, name
        for name, buffer in module._buffers.items() if whole else ():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield path, name


def _and_above(path: str) -> Iterator[str]:
    while path:
        yield path
        path = path.rpartition(".")[0]


def held_in(config: AdapterConfig, path: str) -> str:
    """The target module that a path is in or below of, the outermost one; "" if there is none."""
    targets: Any = getattr(config, "target_modules", None) or ()
    return next((part for part in [*_and_above(path)][::-1] if names_match(targets, part)), "")


def _is_kept_out(config: AdapterConfig, path: str) -> bool:
    """Whether `modules_to_save` keeps a path from being a target. PEFT's rule here has the dot before the name."""
    saved: Sequence[str] = getattr(config, "modules_to_save", None) or ()
    return any(f".{name}." in f".{path}." for name in saved)


def _target_modules(model: nn.Module, config: AdapterConfig, strict: bool, by_default: bool) -> dict[str, nn.Module]:
    targets: Any = getattr(config, "target_modules", None)
    parameters = getattr(config, "target_parameters", None)
    if targets is None and parameters:
        return {}
    modules = {path: m for path, m in named_modules(model) if path}
    if isinstance(targets, str) and targets.lower() == "all-linear":
        targets = _all_linear(model, config, modules)
    assert targets is not None  # for_model filled it in
    exclude: Any = getattr(config, "exclude_modules", None)
    excluded = [path for path in modules if exclude and names_match(exclude, path)]
    left = {path: module for path, module in modules.items() if _matches(config, targets, path)}
    chosen = {p: m for p, m in left.items() if p not in set(excluded) and not _is_kept_out(config, p)}
    for path in chosen:
        if is_saved(config, path):
            raise TargetError(
                f"{path!r} is in target_modules, and its name ends in one of modules_to_save={config.modules_to_save}: "  # pyright: ignore
                "it would be trained twice. Give the longer path in modules_to_save, or drop it from target_modules."
            )
    if not chosen and not parameters:
        _nothing_matched(config, targets, list(modules), bool(left))
    if strict:
        if exclude and not excluded:
            raise TargetError(f"exclude_modules={exclude!r} excludes nothing.{_near(exclude, modules)}")
        # of PEFT's defaults for a model type, some are in none but an older transformers
        for name in () if isinstance(targets, str) or by_default else targets:
            used = any(names_match((name,), path) for path in (*chosen, *excluded))
            if not used and not _is_kept_out(config, name):
                raise TargetError(
                    f"target_modules names {name!r}, which matches no module"
                    f"{_layers_note(config)}.{did_you_mean(name, _endings(modules))}"
                )
    return chosen


def _matches(config: AdapterConfig, targets: str | Sequence[str], path: str) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    if path in targets:  # PEFT: an exact path is meant, whatever layers_to_transform says
        return True
    if not names_match(targets, path):
        return False
    layers: Any = getattr(config, "layers_to_transform", None)
    if layers is None or layers == ():
        return True
    patterns: Any = getattr(config, "layers_pattern", None) or None
    found: re.Match[str] | None = None
    if patterns is None:
        found = re.match(r".*?\.[^.]*\.(\d+)\.", path)
    else:
        for pattern in (patterns,) if isinstance(patterns, str) else patterns:
            found = found or re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", path)
    index = int(found.group(1)) if found else None
    return index is not None and (index == layers if isinstance(layers, int) else index in layers)


def _all_linear(model: nn.Module, config: AdapterConfig, modules: Mapping[str, nn.Module]) -> tuple[str, ...]:
    get_output: Any = getattr(model, "get_output_embeddings", None)
    output: Any = get_output() if get_output is not None else None
    if output is None and get_output is not None and getattr(config, "task_type", None) == "SEQ_CLS":
        heads = (getattr(model, name, None) for name in ("score", "classifier"))
        output = next((head for head in heads if head is not None), None)
    names: list[str] = []
    for path, module in modules.items():
        linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D" or is_quantised_linear(module)
        if linear and module is not output:
            names.append(path)
    return tuple(names)


def _target_parameters(model: nn.Module, config: AdapterConfig, strict: bool) -> list[str]:
    wanted: Sequence[str] = getattr(config, "target_parameters", None) or ()
    if not wanted:
        return []
    names = [name for name, _ in model.named_parameters()]
    found = [name for name in names if names_match(wanted, name)]
    for name in wanted:
        if strict and not any(names_match((name,), path) for path in found):
            near = did_you_mean(name, [*_endings(names), *names])
            raise TargetError(f"target_parameters names {name!r}, which matches no parameter.{near}")
    return found


def _nothing_matched(config: AdapterConfig, targets: Any, paths: list[str], excluded: bool) -> None:
    if excluded:
        raise TargetError(
            "All modules were excluded. This is likely unintended. Check your `target_modules`, `exclude_modules` "
            "and `modules_to_save` configuration."
        )
    if not targets and targets is not None and _has_others(config):
        return  # only modules_to_save, trainable tokens or biases are trained
    raise TargetError(
        f"Target modules {targets!r} not found in the base model. Please check the target modules and try again."
        f"{_layers_note(config)}{pattern_note(targets, paths) or _near(targets, paths)}"
    )


def pattern_note(targets: Any, paths: Iterable[str]) -> str:
    """What to write instead of a string that matched nothing, if it is a name; "" otherwise."""
    if not isinstance(targets, str) or not any(names_match((targets,), path) for path in paths):
        return ""
    return (
        f" A string is a regular expression for a module's whole path; modules of that name are a list: [{targets!r}]."
    )


def _has_others(config: AdapterConfig) -> bool:
    return any(getattr(config, f, None) for f in ("modules_to_save", "trainable_token_indices"))


def _layers_note(config: AdapterConfig) -> str:
    layers, pattern = (getattr(config, f, None) for f in ("layers_to_transform", "layers_pattern"))
    note = f" Note: You specified 'layers_to_transform': {layers}." if layers is not None else ""
    return note + (f" You also specified 'layers_pattern': {pattern}." if pattern is not None else "")


def _endings(paths: Iterator[str] | Mapping[str, Any] | Sequence[str]) -> list[str]:
    """The last components of paths that are not numbers, most frequent first: what people name as targets."""
    counts = Counter(path.rpartition(".")[2] for path in paths)
    return [name for name, _ in counts.most_common() if not name.isdigit()]


def _near(names: Any, paths: Mapping[str, Any] | Sequence[str]) -> str:
    first = names if isinstance(names, str) else next(iter(names), "")
    return did_you_mean(first, _endings(paths), count=6)


def _check_saved_modules(model: nn.Module, config: AdapterConfig) -> None:
    saved: Sequence[str] = getattr(config, "modules_to_save", None) or ()
    for path, module in named_modules(model) if saved else ():
        named = path and any(path.endswith(name) for name in saved)
        if named and isinstance(module, nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict):
            raise TargetError(
                f"modules_to_save names {path!r}, which is a {type(module).__name__}: it is never called, so PEFT "
                "cannot save it. Name the modules in it."
            )


def _check_ties(table: Sequence[Site]) -> None:
    by_name = {site.weight_name: site for site in table}
    for site in table:
        for other in site.tied:
            if other in by_name:
                raise TargetError(
                    f"{site.path!r} and {by_name[other].path!r} share one tied weight, and both are targeted. Adapt it "
                    "under one name (exclude_modules drops the other), or untie the weight first."
                )


def _check_patterns(config: AdapterConfig, table: Sequence[Site], strict: bool) -> None:
    for field in config.patterned.values():
        patterns: Mapping[str, Any] = getattr(config, field) or {}
        for pattern in patterns if strict else ():
            if not any(matching_pattern((pattern,), site.path) for site in table):
                near = did_you_mean(pattern, [*_endings([s.path for s in table]), *(s.path for s in table)])
                raise TargetError(f"{field} has the key {pattern!r}, which matches none of the sites.{near}")
