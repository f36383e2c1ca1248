"""LoRA configs that were made for mixtures of experts in transformers before 5, rewritten for their present layers.

Transformers 5 stacks the weights of all experts, and fuses two of them, so that what was a module of its own for each
expert ("w1", "w3") is a part of one parameter ("experts.gate_up_proj"). A config that targets the modules is made to
target the parameter, with the rank that the factors have side by side, and the same scaling.

Differs from PEFT, whose rewriting is by the last part of names alone:

* A target that also names a module that is still there (dense layers, shared experts) stays; PEFT drops it.
* A regular expression that is about other modules stays as it is, and one about some layers is about those; PEFT makes
  it mean all layers, with or without experts in it. `layers_to_transform` and `exclude_modules` count for experts.
* `rank_pattern` and `alpha_pattern` for the old names hold for the new ones; PEFT ignores them.
* With `use_rslora` the scaling stays, too; PEFT's is sqrt(2) times too large.
* `target_modules=None` is left to the defaults of the model type; PEFT then fails.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from torch import nn

from funcadapt import targeting
from funcadapt._torch import named_modules
from funcadapt.config import matching_pattern
from funcadapt.parts.lora_leaves import patterns
from funcadapt.view.walking import unwrapped

# For each kind of model, the name of a module before -> the end of the parameter that it is in now.
_NEW_NAMES: Mapping[str, Mapping[str, str]] = {
    "mixtral": {"gate": "gate.weight", "w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"},
    "qwen2_moe": {
        "gate": "gate.weight",
        "gate_proj": "gate_up_proj",
        "up_proj": "gate_up_proj",
        "down_proj": "down_proj",
    },
}
# Where a module's parent had another name.
_OLD_PARENTS: Mapping[str, tuple[str, str]] = {"mixtral": (".mlp.", ".block_sparse_moe.")}


def may_target(config: Any, ends: Iterable[str]) -> bool:
    """Whether a config, rewritten or not, can target a module or a parameter with one of some last names.

    Args:
        config: the config, or None, which can target anything.
        ends: the last names, "w2".

    Returns:
        Whether it can. A regular expression is only known to with a model; here it is taken to, if it has the name in
        it, or matches the name in a usual place.
    """
    targets: Any = getattr(config, "target_modules", None)
    parameters: Any = getattr(config, "target_parameters", None) or ()
    for end in ends if config is not None else ():
        places = (f"model.layers.0.mlp.experts.0.{end}", f"model.layers.0.block_sparse_moe.experts.0.{end}")
        if isinstance(targets, str) and (_is_all_linear(targets) or end in targets):
            return True
        if any(targeting.names_match(targets or (), place) for place in places):
            return True
        if any(name == end or name.endswith(f".{end}") for name in parameters):
            return True
    return config is None


@dataclasses.dataclass(frozen=True)
class _Part:
    """What a parameter has in it of modules that were: those of one name, one for each expert.

    Attributes:
        parameter: the path of the parameter.
        end: the end of it that all such parameters have.
        name: the name of the modules.
        paths: for each expert, its module's path: as it was, with the parents of today, and without the number.
    """

    parameter: str
    end: str
    name: str
    paths: Sequence[Sequence[str]]


def convert_peft_config_for_transformers(peft_config: Any, model: nn.Module, conversions: Any = None) -> None:
    """Rewrite the targets of a LoRA config in place, if the model is a mixture of experts that transformers 5 changed.

    Args:
        peft_config: the config. Of another method it is left alone.
        model: the model; one that is not of transformers is left alone.
        conversions: transformers' conversions for the model; not used.

    Raises:
        ValueError: if some but not all of what is one parameter now is targeted, or with different scalings.
    """
    family = _family(model) if peft_config.peft_type == "LORA" else None
    if family is None or peft_config.target_modules is None:
        return
    with unwrapped(model):
        parts = _parts(model, family)
        selects = _rule(peft_config)
        chosen = [part for part in parts if _is_selected(part, selects)]
        if not chosen:
            return
        routers = {path for part in parts for path in part.paths[0] if part.end.endswith(".weight")}
        modules = {path: module for path, module in named_modules(model) if path and path not in routers}
        names = [name for name, _ in model.named_parameters()]
        targets = _remaining(peft_config, model, modules, parts, selects)
    by_parameter: dict[str, list[_Part]] = {}
    for part in chosen:
        by_parameter.setdefault(part.parameter, []).append(part)
    ends = {part.parameter: part.end for part in chosen}
    _check_whole(by_parameter, family)
    others = {*modules, *names} - {part.parameter for part in parts}
    _set_ranks(peft_config, by_parameter, ends, others)
    peft_config.target_modules = targets
    peft_config.target_parameters = set(peft_config.target_parameters or ()) | _shortened(ends, names)


def _family(model: nn.Module) -> str | None:
    """Which table is for a model. PEFT has none for qwen2_moe itself, and there what it saved must keep its meaning."""
    model_type = targeting.model_type(model)
    if model_type is None:
        return None
    try:
        from transformers import conversion_mapping
    except ImportError:  # transformers before 5 has the modules
        return None
    table: Mapping[str, str] = conversion_mapping._MODEL_TO_CONVERSION_PATTERN
    family = "mixtral" if model_type == "mixtral" else table.get(model_type)
    if family not in _NEW_NAMES or conversion_mapping.get_checkpoint_conversion_mapping(model_type) is None:  # pyright: ignore
        return None
    return family


def _parts(model: nn.Module, family: str) -> list[_Part]:
    found: list[_Part] = []
    new, old = _OLD_PARENTS.get(family, (".", "."))
    for path, parameter in model.named_parameters():
        for name, end in _NEW_NAMES[family].items():
            if not path.endswith(f".{end}"):
                continue
            container = path.removesuffix(f".{end}")
            if parameter.ndim == 3:
                now = [(f"{container}.{e}.{name}", f"{container}.{name}") for e in range(len(parameter))]
            elif end.endswith(".weight") and not isinstance(model.get_submodule(f"{container}.{name}"), nn.Linear):
                now = [(f"{container}.{name}",)]
            else:
                continue
            found.append(_Part(path, end, name, [(*paths, *(p.replace(new, old) for p in paths)) for paths in now]))
    return found


def _rule(config: Any) -> Callable[[str], bool]:
    """Whether a config targets a path, by PEFT's rules; "all-linear" every one."""
    targets: Any = config.target_modules
    layers: Any = getattr(config, "layers_to_transform", None)
    fields: Any = SimpleNamespace(
        layers_to_transform=layers if layers is None or isinstance(layers, int) else tuple(layers),
        layers_pattern=getattr(config, "layers_pattern", None),
        modules_to_save=getattr(config, "modules_to_save", None),
    )
    exclude: Any = getattr(config, "exclude_modules", None)
    every = _is_all_linear(targets)

    def selects(path: str) -> bool:
        if (exclude and targeting.names_match(exclude, path)) or targeting._is_kept_out(fields, path):
            return False
        return every or targeting._matches(fields, targets, path)

    return selects


def _is_all_linear(targets: Any) -> bool:
    return isinstance(targets, str) and targets.lower() == "all-linear"


def _is_selected(part: _Part, selects: Callable[[str], bool]) -> bool:
    """Whether the modules of a part are targeted: of all experts, or of none."""
    experts = [any(map(selects, paths)) for paths in part.paths]
    if any(experts) and not all(experts):
        some = [str(i) for i, targeted in enumerate(experts) if targeted]
        raise ValueError(
            f"Cannot convert target {part.name!r} of expert(s) {', '.join(some)} alone: {part.parameter!r} has the "
            f"weights of all {len(experts)} experts. Target all of them, or none."
        )
    return any(experts)


def _remaining(
    config: Any,
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    parts: Iterable[_Part],
    selects: Callable[[str], bool],
) -> set[str]:
    """The targets that modules still have."""
    targets: Any = config.target_modules
    if _is_all_linear(targets):
        return _shortened(dict.fromkeys(targeting._all_linear(model, config, modules)), modules)
    if isinstance(targets, str):
        return _shortened(dict.fromkeys(path for path in modules if selects(path)), modules)
    gone = {path for part in parts for paths in part.paths for path in paths}
    return {
        target
        for target in targets
        if any(targeting.names_match((target,), path) for path in modules)
        or not any(targeting.names_match((target,), path) for path in gone)
    }


def _shortened(paths: Mapping[str, str | None], known: Collection[str]) -> set[str]:
    """Paths, or their ends where these stand for nothing else. The ends are given, or the last parts."""
    last = {path: path.rpartition(".")[2] if end is None else end for path, end in paths.items()}
    others = [path for path in known if path not in paths]
    clear = {
        end: not end.isdigit() and not any(targeting.names_match((end,), path) for path in others)
        for end in set(last.values())
    }
    return {end if clear[end] else path for path, end in last.items()}


def _check_whole(by_parameter: Mapping[str, Sequence[_Part]], family: str) -> None:
    for parts in by_parameter.values():
        present = [part.name for part in parts]
        missing = [n for n, end in _NEW_NAMES[family].items() if end == parts[0].end and n not in present]
        if missing:
            raise ValueError(
                f"Cannot convert PEFT target(s) {', '.join(present)} without also targeting {', '.join(missing)} "
                f"because they are fused into {parts[0].end}."
            )


def _set_ranks(
    config: Any, by_parameter: Mapping[str, Sequence[_Part]], ends: Mapping[str, str], others: Collection[str]
) -> None:
    """Ranks and alphas of the parameters, as patterns before those that there are, which match no other path."""
    keys = patterns({*by_parameter, *others})
    values = {path: _rank_and_alpha(config, parts) for path, parts in by_parameter.items()}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for path, (rank, alpha) in values.items():
        same = all(other == values[path] for p, other in values.items() if ends[p] == ends[path])
        short = rf".*\.{re.escape(ends[path])}"
        pattern = short if same and not any(matching_pattern((short,), p) for p in others) else keys[path]
        if rank != _resolved(config.rank_pattern, (path,), config.r):
            ranks[pattern] = rank
        if alpha != _resolved(config.alpha_pattern, (path,), config.lora_alpha):
            alphas[pattern] = alpha
    old_ranks: dict[str, int] = config.rank_pattern or {}
    old_alphas: dict[str, float] = config.alpha_pattern or {}
    config.rank_pattern = ranks | {k: v for k, v in old_ranks.items() if k not in ranks}
    config.alpha_pattern = alphas | {k: v for k, v in old_alphas.items() if k not in alphas}


def _rank_and_alpha(config: Any, parts: Sequence[_Part]) -> tuple[int, float]:
    """Rank and alpha of a parameter: the ranks of what is fused in it add up, and the scaling stays."""
    single: list[tuple[int, float]] = []
    for part in parts:
        found = {
            (_resolved(config.rank_pattern, paths, config.r), _resolved(config.alpha_pattern, paths, config.lora_alpha))
            for paths in part.paths
        }
        if len(found) > 1:
            raise ValueError(
                f"rank_pattern or alpha_pattern has different values for the experts in {part.parameter!r}, which is "
                "one parameter with one rank now. Give all of them the same."
            )
        single += found
    rank, alpha = single[0]
    for other_rank, other_alpha in single[1:]:
        if not math.isclose(_scaling(config, other_rank, other_alpha), _scaling(config, rank, alpha)):
            raise ValueError(
                f"{' and '.join(part.name for part in parts)} are fused into {parts[0].parameter!r}, and have ranks "
                f"and alphas with different scalings: {single}. Give them the same scaling."
            )
    total = sum(r for r, _ in single)
    if total == rank:
        return rank, alpha
    factor = total / rank
    fused = alpha * (math.sqrt(factor) if config.use_rslora else factor)
    return total, int(fused) if isinstance(alpha, int) and fused == int(fused) else fused


def _resolved(patterns: Mapping[str, Any] | None, paths: Sequence[str], default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if any(matching_pattern((pattern,), path) for path in paths):
            return value
    return default


def _scaling(config: Any, rank: int, alpha: float) -> float:
    return alpha / math.sqrt(rank) if config.use_rslora else alpha / rank
