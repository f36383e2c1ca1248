"""What adapters that are combined have beside their method's leaves: configs, and parameters held in full."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from funcadapt.adapter import Adapter, TensorTree
from funcadapt.binding import TOKEN_INDICES, TOKENS
from funcadapt.combining import united
from funcadapt.errors import AdapterError
from funcadapt.method import Leaf, Method
from funcadapt.targeting import names_match

Tree = dict[str, dict[str, Tensor]]
Own = Mapping[str, Leaf]


class Whole(NamedTuple):
    """Parameters and buffers that an adapter holds in full, by path and name."""

    params: TensorTree
    buffers: TensorTree


def split(adapter: Adapter, method: Method) -> tuple[Own, Whole]:
    """The leaves of an adapter: the method's own, and what it holds in full.

    Args:
        adapter: the adapter.
        method: its method.

    Returns:
        Path -> the method's leaves, params and buffers; and the rest.
    """
    own: Tree = {}
    params: Tree = {}
    buffers: Tree = {}
    for path, leaves in adapter.params.items():
        for name, leaf in leaves.items():
            (own if name in method.keys or name in method.shared else params).setdefault(path, {})[name] = leaf
    for path, leaves in adapter.buffers.items():
        for name, leaf in leaves.items():
            mine = (path in own or method.shared) and name != TOKEN_INDICES
            (own if mine else buffers).setdefault(path, {})[name] = leaf
    return own, Whole(params, buffers)


def whole_leaves(parts: Sequence[tuple[Own, Whole]]) -> tuple[Tree, Tree]:
    """What one of several adapters holds in full, and no other.

    Args:
        parts: the adapters, split.

    Returns:
        The params and the buffers.

    Raises:
        AdapterError: if two hold the same, or one adapts what another holds in full.
    """
    holders: dict[str, int] = {}
    twice: list[str] = []
    params: Tree = {}
    buffers: Tree = {}
    for i, (own, whole) in enumerate(parts):
        for path, leaves in (*whole.params.items(), *whole.buffers.items()):
            if holders.setdefault(path, i) != i and path not in twice:
                twice.append(path)
            for j, (other, _) in enumerate(parts):
                if path in other and path not in own and not leaves.keys() <= {"bias", TOKENS, TOKEN_INDICES}:
                    raise AdapterError(f"{path!r} is saved in full by adapters[{i}], and adapted by adapters[{j}].")
        for tree, held in ((params, whole.params), (buffers, whole.buffers)):
            for path, leaves in held.items():
                tree.setdefault(path, {}).update(leaves)
    if twice:
        raise AdapterError(
            "Cannot add weighted adapters if they target the same module with modules_to_save, but found "
            f"{len(twice)} such instance(s). More than one adapter holds parameters of {twice[0]!r} in full "
            "(modules_to_save, trained biases, token rows), and they cannot be merged. Drop them from all but one: "
            "adapter.replace(params=...)."
        )
    return params, buffers


def config_of(
    adapters: Sequence[Adapter], owns: Sequence[Own], method_config: Callable[[Sequence[Any], Any], Any]
) -> Any:
    """The config of the new adapter: the first one's, with the union of what all target.

    Args:
        adapters: the adapters.
        owns: the leaves of each that are the method's.
        method_config: the method's own part, see `Algebra.config`.

    Returns:
        The config. Ranks and alphas are not yet those of the leaves.

    Raises:
        AdapterError: if the configs do not go together.
    """
    configs: list[Any] = [adapter.config for adapter in adapters]
    names = {field.name for field in dataclasses.fields(configs[0])}
    changes: dict[str, Any] = {}
    if "target_modules" in names:
        changes = _targets(configs, owns)
    for field in ("target_parameters", "modules_to_save"):
        if field in names:
            changes[field] = united([getattr(config, field) for config in configs], field)
    if "bias" in names:
        changes["bias"] = next((config.bias for config in configs if config.bias != "none"), "none")
    if "trainable_token_indices" in names:
        changes["trainable_token_indices"] = _token_indices([c.trainable_token_indices for c in configs])
    return method_config(configs, dataclasses.replace(configs[0], **changes))


_SELECTION = ("exclude_modules", "layers_to_transform", "layers_pattern")


def _targets(configs: Sequence[Any], owns: Sequence[Own]) -> dict[str, Any]:
    """Target fields that select the sites of all. Where selections cannot be united, the sites are named one by one."""
    every = [config.target_modules for config in configs]
    selections = [tuple(getattr(config, field, None) for field in _SELECTION) for config in configs]
    if len(set(zip(every, selections, strict=True))) == 1:
        return {}
    plain = [None if _all_linear(targets) else targets for targets in every]
    targets = united(plain, "target_modules")
    if len(set(selections)) == 1 and plain == every:
        return {"target_modules": targets}
    names = dict.fromkeys(name for config, own in zip(configs, owns, strict=True) for name in _sites(config, own))
    return {"target_modules": tuple(names), **{f: None for f in _SELECTION if hasattr(configs[0], f)}}


def _all_linear(targets: Any) -> bool:
    return isinstance(targets, str) and targets.lower() == "all-linear"


def _sites(config: Any, own: Own) -> list[str]:
    """The paths of the modules that an adapter adapts, as target modules name them."""
    parameters: Sequence[str] = getattr(config, "target_parameters", None) or ()
    paths = [path for path in own if not names_match(parameters, path)]
    packed = {path.removesuffix(".in_proj_weight") for path in paths if path.endswith(".in_proj_weight")}
    found = [path.removesuffix(".in_proj_weight") for path in paths]
    return [path for path in found if path.rpartition(".")[0] not in packed or not path.endswith(".out_proj")]


def _token_indices(given: Sequence[Any]) -> Any:
    held = [indices for indices in given if indices]
    if len(held) < 2:
        return held[0] if held else given[0]
    if not all(isinstance(indices, Mapping) for indices in held):
        raise AdapterError(
            "More than one adapter trains token rows, and trainable_token_indices does not name the embeddings."
        )
    return {name: rows for indices in held for name, rows in indices.items()}
