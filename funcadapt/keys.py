"""The names of leaves in a PEFT checkpoint: site path and leaf name <-> key.

    model.layers.0.q_proj            lora_A   <-> base_model.model.model.layers.0.q_proj.lora_A.weight
    model.lm_head (modules_to_save)  weight   <-> base_model.model.lm_head.weight
    model.layers.0.q_proj (bias)     bias     <-> base_model.model.model.layers.0.q_proj.base_layer.bias
    mha.in_proj_weight, mha.out_proj lora_A   <-> mha.lora_A.weight, mha.base_layer.out_proj.lora_A.weight
    experts.down, experts.up         lora_A   <-> experts.lora_A.weight, experts.base_layer.lora_A.weight
    embed_tokens (trained rows)               <-> embed_tokens.token_adapter.trainable_tokens_delta

PEFT wraps a module once per targeted parameter, in the order in which the module registered them, so the last one is
outermost: the key tells the depth, not the parameter's name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from funcadapt.adapter import Adapter
from funcadapt.binding import TOKENS
from funcadapt.config import AdapterConfig
from funcadapt.errors import AdapterFileError, did_you_mean
from funcadapt.method import Method, StarredKeys
from funcadapt.sharing import SHARED, Tree
from funcadapt.targeting import held_in, is_saved, names_match

ROOT = "base_model."
PREFIX = f"{ROOT}model."
_PACKED = "in_proj_weight"
_BUFFER_NAMES = ("running_mean", "running_var", "num_batches_tracked")

Trees = tuple[Tree, Tree]


def encode(adapter: Adapter, method: Method) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a checkpoint.

    Args:
        adapter: the adapter.
        method: its method.

    Returns:
        Key -> tensor, and the paths of the plain-parameter sites in nesting order, innermost first.

    Raises:
        AdapterFileError: if two leaves would get the same key.
    """
    paths = [path for path in adapter.params if path]
    owners: dict[str, list[str]] = {}
    for path in paths:
        own = {name: leaf for name, leaf in adapter.params[path].items() if name in method.keys}
        if own and _is_parameter(adapter.config, path, stacked=method.pack(own) is not own):
            owners.setdefault(path.rpartition(".")[0], []).append(path)
    tensors: dict[str, Tensor] = {}
    in_common = {name: leaf for name, leaf in adapter.params.get(SHARED, {}).items() if name in method.shared}
    tensors |= {ROOT + method.shared[name]: leaf for name, leaf in in_common.items()}
    for path in {**adapter.params, **adapter.buffers}:
        leaves = adapter.params.get(path, {})
        if path == SHARED and in_common:
            leaves = {name: leaf for name, leaf in leaves.items() if name not in in_common}
        own = {name: leaf for name, leaf in leaves.items() if name in method.keys or name in method.written}
        # a site may have nothing of its own in a file
        bare = path == SHARED or path not in adapter.buffers or method.share is None or is_saved(adapter.config, path)
        where = _module_key(path, adapter.params, owners)
        for name, leaf in method.pack(own).items():
            _put(tensors, f"{where}.{method.written.get(name) or method.keys[name]}", leaf)
        for name, leaf in in_common.items() if own and method.repeated else ():
            _put(tensors, f"{where}.{method.shared[name]}", leaf.clone())  # a file cannot hold one tensor twice
        for name, leaf in leaves.items():
            if name == TOKENS:
                _put(tensors, f"{path}.{method.rows or f'token_adapter.{TOKENS}'}", leaf)
            elif method.whole and not is_saved(adapter.config, path):
                _put(tensors, _whole_key(method, adapter.config, path, name), leaf)
            elif name not in own:
                _put(tensors, f"{where}.{name}" if bare and not own else f"{where}.base_layer.{name}", leaf)
        for name, buffer in adapter.buffers.get(path, {}).items():
            if is_saved(adapter.config, path) and buffer.ndim + (name in _BUFFER_NAMES):
                _put(tensors, f"{path}.{name}", buffer)
            elif method.whole:
                _put(tensors, _whole_key(method, adapter.config, path, name), buffer)
    return tensors, [path for group in owners.values() for path in group]


def buffer_keys(adapter: Adapter) -> list[str]:
    """The keys of saved modules' buffers that neither their name nor their dtype gives away."""
    return [
        f"{PREFIX}{path}.{name}"
        for path, leaves in adapter.buffers.items()
        for name, buffer in leaves.items()
        if is_saved(adapter.config, path) and name not in _BUFFER_NAMES and buffer.is_floating_point()
    ]


def _whole_key(method: Method, config: AdapterConfig, path: str, name: str) -> str:
    target = held_in(config, path)
    return f"{target}.{method.whole}{path[len(target) :]}.{name}"


def _put(tensors: dict[str, Tensor], key: str, tensor: Tensor) -> None:
    if PREFIX + key in tensors:
        raise AdapterFileError(f"Two leaves would be saved under the key {PREFIX + key!r}.")
    tensors[PREFIX + key] = tensor


def _is_parameter(config: AdapterConfig, path: str, *, stacked: bool) -> bool:
    """Whether a site is one of `target_parameters`. A module and a parameter can go by one name, "down_proj"."""
    wanted: Sequence[str] = getattr(config, "target_parameters", None) or ()
    if not names_match(wanted, path):
        return False
    targets: Any = getattr(config, "target_modules", None) or ()
    both = names_match(targets, path) or (isinstance(targets, str) and targets.lower() == "all-linear")
    return stacked or not both


def _module_key(path: str, paths: Mapping[str, Any], owners: Mapping[str, list[str]]) -> str:
    owner, _, name = path.rpartition(".")
    group = owners.get(owner, [])
    if path in group:
        return owner + ".base_layer" * (len(group) - 1 - group.index(path))
    if name == _PACKED:
        return owner
    if name == "out_proj" and f"{owner}.{_PACKED}" in paths:
        return f"{owner}.base_layer.out_proj"
    return path


def decode(
    tensors: Mapping[str, Tensor],
    config: AdapterConfig,
    method: Method,
    order: Sequence[str] | None,
    model: nn.Module | None,
    known_buffers: Sequence[str] = (),
) -> Trees:
    """The leaves that a checkpoint holds.

    Args:
        tensors: key -> tensor, with or without PEFT's prefix.
        config: the config.
        method: its method.
        order: plain-parameter sites in nesting order, if the file says; else None.
        model: the model, if there is one to look things up in.
        known_buffers: keys of buffers, if the file says.

    Returns:
        Params and buffers.

    Raises:
        AdapterFileError: if a key is unexpected, or cannot be told without the model.
    """
    by_module: dict[str, dict[str, Tensor]] = {}
    shared: dict[str, Tensor] = {}
    params: dict[str, dict[str, Tensor]] = {}
    buffers: dict[str, dict[str, Tensor]] = {}
    wrappers: dict[str, str] = {}
    names = {key: leaf for leaf, key in (*method.keys.items(), *method.written.items())}
    in_common = {key: leaf for leaf, key in method.shared.items()}
    repeated = in_common if method.repeated else {}
    suffixes = tuple(f".{key}" for key in names)
    for key, tensor in tensors.items():
        short = key.removeprefix(PREFIX)
        if key != short and short in tensors:
            raise AdapterFileError(f"{short!r} is there twice, with and without the prefix {PREFIX!r}.")
        leaf = _shared_leaf(key.removeprefix(ROOT), in_common) if in_common and key == short else None
        if leaf is None and repeated:
            leaf = repeated.get(short.rpartition(".")[2])
        if leaf is not None:
            _check_dtype(method, SHARED, leaf, tensor)
            if leaf in shared and shared[leaf].shape != tensor.shape:
                raise AdapterFileError(f"All sites share {leaf!r}, but it has several shapes in the file ({key!r}).")
            shared[leaf] = tensor
            continue
        suffix = None
        for candidate in suffixes:
            if short.endswith(candidate):
                suffix = candidate
        numbered = _numbered(short, names) if suffix is None and isinstance(method.keys, StarredKeys) else None
        if suffix is not None or numbered is not None:
            module, leaf = numbered or (short[: -len(suffix or "")], names[(suffix or "")[1:]])
            _check_dtype(method, module, leaf, tensor)
            by_module.setdefault(module, {})[leaf] = tensor
            continue
        path, _, name = short.rpartition(".")
        if method.rows and name == method.rows:
            _check_dtype(method, path, name, tensor)
            params.setdefault(path, {})[TOKENS] = tensor
            continue
        if method.whole and f".{method.whole}." in short:
            path = path.replace(f".{method.whole}", "", 1)
            buffer = key in known_buffers or _is_buffer(path, name, tensor, model)
            (buffers if buffer else params).setdefault(path, {})[name] = tensor
            continue
        if name == TOKENS and path.endswith(".token_adapter"):
            _check_dtype(method, path.removesuffix(".token_adapter"), name, tensor)
            params.setdefault(path.removesuffix(".token_adapter"), {})[TOKENS] = tensor
            continue
        if name == "bias" and _is_copy(config, path):
            continue
        wrapped = path.endswith(".base_layer")
        path = path.removesuffix(".base_layer").replace(".base_layer.out_proj", ".out_proj")
        if wrapped and name != "bias":
            wrappers[path] = key
        if not _may_be_whole(config, path, name, wrapped):
            raise AdapterFileError(
                f"Unexpected key {key!r}: {method.name} has the leaves {', '.join(map(repr, method.keys.values()))}, "
                f"and {path!r} is not in modules_to_save.{did_you_mean(name, method.keys.values())}"
            )
        buffer = key in known_buffers or _is_buffer(path, name, tensor, model)
        (buffers if buffer else params).setdefault(path, {})[name] = tensor
    if not by_module and not params and not shared:
        raise AdapterFileError("The file holds no tensors of an adapter.")
    for module, leaves in by_module.items():
        path, parameter = _site_path(module, by_module, config, order, model)
        leaves = method.restore(config, path, method.unpack(config.at(path), leaves) if parameter else leaves)
        own = method.layout({n: leaves[n] for n in _in_order(method, leaves)})
        _sort(method, path, own, params, buffers)
        wrappers.pop(path, None)
    if shared:
        _sort(method, SHARED, method.restore(config, SHARED, shared), params, buffers)
    if wrappers:
        first = next(iter(wrappers.values()))
        raise AdapterFileError(f"Unexpected key {first!r}: its layer has no adapter in the file.")
    return params, buffers


def _is_copy(config: AdapterConfig, path: str) -> bool:
    """Whether PEFT's bias="all" wrote the biases of a saved module again, under the names of its wrapper's parts."""
    head, _, part = path.rpartition(".")
    every = getattr(config, "bias", "none") == "all"
    return every and part in ("modules_to_save", "original_module") and is_saved(config, head)


def _in_order(method: Method, leaves: Mapping[str, Tensor]) -> list[str]:
    """The names of a method's leaves in the method's order, numbered ones after."""
    named = [name for name in method.keys if name in leaves]
    return named + sorted(leaves.keys() - set(named), key=lambda name: (name.rpartition(".")[0], len(name), name))


def _sort(method: Method, path: str, leaves: Mapping[str, Tensor], params: Tree, buffers: Tree) -> None:
    """Leaves of a file into the two trees."""
    trained = {name: leaf for name, leaf in leaves.items() if not method.is_constant(name)}
    if trained:
        params[path] = {**trained, **params.get(path, {})}
    if len(trained) < len(leaves):
        frozen = {name: leaf for name, leaf in leaves.items() if name not in trained}
        buffers[path] = {**frozen, **buffers.get(path, {})}


def _shared_leaf(key: str, names: Mapping[str, str]) -> str | None:
    """The leaf that sites share, of a key without a prefix; None if it is none."""
    if key in names:
        return names[key]
    for name, leaf in names.items():
        stem = name.removesuffix("*")
        if stem != name and key.startswith(stem) and "." not in key[len(stem) :]:
            return leaf.removesuffix("*") + key[len(stem) :]
    return None


def _numbered(key: str, names: Mapping[str, str]) -> tuple[str, str] | None:
    """The module and the leaf of a key with a number in it; None if it is none."""
    for name, leaf in names.items():
        before, star, after = name.partition("*")
        found = re.fullmatch(rf"(.+)\.{re.escape(before)}(\d+){re.escape(after)}", key) if star else None
        if found:
            return found[1], leaf.replace("*", found[2])
    return None


def _check_dtype(method: Method, path: str, leaf: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point() and not method.is_constant(leaf) and leaf not in method.written:
        raise AdapterFileError(f"The site {path!r} has {leaf!r} of {tensor.dtype}, expected floating-point numbers.")


def _is_buffer(path: str, name: str, tensor: Tensor, model: nn.Module | None) -> bool:
    if model is not None:
        try:
            return name in model.get_submodule(path)._buffers
        except AttributeError:
            pass
    return name in _BUFFER_NAMES or not (tensor.is_floating_point() or tensor.is_complex())


def _may_be_whole(config: AdapterConfig, path: str, name: str, wrapped: bool) -> bool:
    embedding = name == "weight" and (wrapped or path.rpartition(".")[2] in ("embed_tokens", "lm_head"))
    bias = name == "bias" and getattr(config, "bias", "none") != "none"
    return embedding or bias or is_saved(config, path)


def _site_path(
    module: str, modules: Mapping[str, Any], config: AdapterConfig, order: Sequence[str] | None, model: nn.Module | None
) -> tuple[str, bool]:
    """The site that a module's key stands for, and whether it is one of `target_parameters`."""
    head, nested, tail = module.partition(".base_layer.out_proj")
    if nested and not tail and head in modules:
        return f"{head}.out_proj", False
    if f"{module}.base_layer.out_proj" in modules:
        return f"{module}.{_PACKED}", False
    wanted: Sequence[str] = getattr(config, "target_parameters", None) or ()
    if not wanted:
        return module, False
    owner = module
    while owner.endswith(".base_layer"):
        owner = owner.removesuffix(".base_layer")
    depth = (len(module) - len(owner)) // len(".base_layer")
    targets: Any = getattr(config, "target_modules", None)
    if order is not None:
        group = [path for path in order if path.rpartition(".")[0] == owner]
        if any(not names_match(wanted, path) for path in group):
            raise AdapterFileError(f"The header has {group}, which target_parameters={list(wanted)} does not select.")
    elif owner == module and targets and names_match(targets, owner):
        return module, False
    else:
        group = _parameters_of(owner, wanted, model)
    depths = sum(1 for m in modules if m == owner or m.startswith(f"{owner}.base_layer"))
    if not group and owner == module:
        return module, False
    if len(group) != depths or (len(group) > 1 and order is None and model is None):
        raise AdapterFileError(
            f"{owner!r} has {depths} adapted parameters, and PEFT's keys do not say which is which. Pass the model: "
            "fa.load(directory, model=model)."
        )
    return group[len(group) - 1 - depth], True


def _parameters_of(owner: str, wanted: Sequence[str], model: nn.Module | None) -> list[str]:
    """The targeted parameters of one module, in the order in which PEFT wraps them."""
    if model is not None:
        try:
            names = [name for name, _ in model.get_submodule(owner).named_parameters(recurse=False)]
        except AttributeError:
            return []
        return [f"{owner}.{name}" for name in names if names_match(wanted, f"{owner}.{name}")]
    return [f"{owner}.{w.rpartition('.')[2]}" for w in wanted if names_match((w,), f"{owner}.{w.rpartition('.')[2]}")]
