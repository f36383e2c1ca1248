"""The tensors of one adapter of a live model, under the keys of a PEFT checkpoint; and back into the model.

The state dict of a model with adapters says which adapter a tensor belongs to, a checkpoint does not:

    q_proj.lora_A.default.weight              <-> q_proj.lora_A.weight
    q_proj.lora_magnitude_vector.a.weight     <-> q_proj.lora_magnitude_vector
    lm_head.modules_to_save.default.weight    <-> lm_head.weight

What is an adapter's is read off the modules, never off the names in a key. (PEFT looks for the names: an adapter that
is called like a module takes that module's keys out of every other adapter's checkpoint, its defect B11.)
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from funcadapt._torch import distribute
from funcadapt.config import AdapterConfig
from funcadapt.errors import AdapterError, did_you_mean
from funcadapt.keys import PREFIX
from funcadapt.method import Leaf
from funcadapt.view.auxiliary import AuxiliaryTrainingWrapper
from funcadapt.view.embeddings import Lookup, embedding_prefixes, is_embedding_saved, local_vocabulary
from funcadapt.view.holding import addresses
from funcadapt.view.layer import AdapterLayer
from funcadapt.view.walking import auxiliaries, layers, view_state

# names that torch's wrappers put into the paths of modules, but not into the keys of a state dict
_SHARDING = frozenset({"_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def _path(path: str) -> str:
    return ".".join(part for part in path.split(".") if part not in _SHARDING)


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


@dataclasses.dataclass
class Own:
    """The leaves of one adapter at one layer.

    Attributes:
        layer: the layer.
        path: its path in the state dict.
        keys: leaf -> (key in a checkpoint, key in the state dict).
    """

    layer: AdapterLayer
    path: str
    keys: dict[str, tuple[str, str]]


def _own(model: nn.Module, name: str) -> Iterator[Own]:
    """What an adapter has at each layer. Layers in auxiliary wrappers are theirs."""
    within = tuple(f"{path}." for path, _ in auxiliaries(model))
    for live, layer in layers(model):
        held = layer.adapters.get(name)
        if held is None or live.startswith(within):
            continue
        path, keys = _path(live), held.method.keys
        named = [a for a in addresses(held.method) if a.leaf in keys]
        found = {leaf: (_join(path, keys[leaf]), _join(path, held_in, name, rest)) for leaf, held_in, rest in named}
        yield Own(layer, path, found)


def _places(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Every place where a model holds something of an adapter: (prefix of its keys, the adapter's name)."""
    for live, layer in layers(model):
        for container in layer.adapter_layer_names:
            for name in layer.adapters:
                yield f"{_path(live)}.{container}.{name}", name
    for live, wrapper in auxiliaries(model):
        for container in wrapper.adapter_layer_names:
            for name in wrapper.available_adapters:
                yield f"{_path(live)}.{container}.{name}", name


def _above(key: str) -> Iterator[str]:
    """A key and everything that it is below of."""
    while key:
        yield key
        key = key.rpartition(".")[0]


def config_of(model: nn.Module, name: str) -> AdapterConfig:
    """The config of an adapter of a model.

    Args:
        model: the model.
        name: the adapter's name.

    Returns:
        The config.

    Raises:
        AdapterError: if there is no such adapter; near matches are listed.
    """
    configs = view_state(model).configs
    if name not in configs:
        raise AdapterError(f"Adapter {name} not found.{did_you_mean(name, configs)}")
    return configs[name]


# -- out of the model -------------------------------------------------------------------------------------


def adapter_state_dict(
    model: nn.Module,
    name: str,
    state_dict: Mapping[str, Tensor] | None = None,
    save_embedding_layers: bool | Literal["auto"] = "auto",
    unwrap_compiled: bool = False,
    *,
    config: AdapterConfig | None = None,
    lookup: Lookup = local_vocabulary,
) -> dict[str, Tensor]:
    """What a checkpoint of one adapter of a live model holds.

    Args:
        model: the model.
        name: the adapter's name.
        state_dict: the state dict of the model, if it had to be gathered first; by default the model's own.
        save_embedding_layers: whether the embeddings are in it, too. "auto" is PEFT's rule: if they are targeted, or the
            vocabulary has another size than the base model's.
        unwrap_compiled: whether `model` is what `torch.compile` returned.
        config: the adapter's config, where somebody changed it; by default the one that it was made with.
        lookup: finds the size of the vocabulary of the base model, for "auto".

    Returns:
        Key -> tensor, the live ones.

    Raises:
        AdapterError: if there is no such adapter.
        KeyError: if `state_dict` lacks a module that was trained in full, or trained rows.

    Example:
        >>> import torch
        >>> import funcadapt as fa
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2))
        >>> adapter = fa.init(model, fa.LoraConfig(r=2, target_modules=["0"]))
        >>> sorted(adapter_state_dict(fa.materialize(model, adapter), "default"))
        ['0.lora_A.weight', '0.lora_B.weight']
    """
    if unwrap_compiled:
        model = getattr(model, "_orig_mod", model)
    config = config or config_of(model, name)
    every: Mapping[str, Tensor] = model.state_dict() if state_dict is None else state_dict
    found: dict[str, Tensor] = {}
    for own in _own(model, name):
        found.update(_stored(own, name, config, every))
    places = dict(_places(model))
    whole = {key: value for key, value in every.items() if all(places.get(k, name) == name for k in _above(key))}
    chosen = _biases(model, name, config, whole)
    for live, wrapper in auxiliaries(model):
        path = f"{_path(live)}."
        relative = {key.removeprefix(path): value for key, value in every.items() if key.startswith(path)}
        found.update({path + key: value for key, value in wrapper.adapter_state_dict(name, relative).items()})
    if is_embedding_saved(model, config, save_embedding_layers, lookup):
        for prefix in embedding_prefixes(model, config):
            chosen.update({key: value for key, value in whole.items() if key.startswith(prefix)})
    own_keys = {held for own in _own(model, name) for _, held in own.keys.values()}
    for key, value in chosen.items():
        if key not in own_keys:
            found[_without_name(key, name, places)] = value
    return {key: _gathered(model, value) for key, value in found.items()} if state_dict is None else found


def _stored(own: Own, name: str, config: AdapterConfig, every: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The leaves of one layer, as the method stores them."""
    leaves = {leaf: every[held] for leaf, (_, held) in own.keys.items() if held in every}
    return {own.keys[leaf][0]: value for leaf, value in _reduced(own.layer, name, config, leaves).items()}


def _reduced(layer: AdapterLayer, name: str, config: AdapterConfig, leaves: Leaf) -> Leaf:
    """Leaves of one layer in the form that a checkpoint of that config has: AdaLoRA leaves out what it pruned."""
    method, path = layer.adapters[name].method, layer.site.path
    if method.stored is None or not leaves:
        return leaves
    if layer.site.kind not in ("parameter", "experts"):
        return {**leaves, **method.stored(config, path, leaves)}
    inner = method.unpack(config.at(path), leaves)
    return method.pack({**inner, **method.stored(config, path, inner)})


def _biases(model: nn.Module, name: str, config: Any, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
    which: str = getattr(config, "bias", "none")
    if which == "all":
        return {key: value for key, value in whole.items() if key == "bias" or key.endswith(".bias")}
    if which.endswith("_only"):
        keys = [_join(_path(live), "base_layer.bias") for live, _ in layers(model)]
        return {key: whole[key] for key in keys if key in whole}
    return {}


def _without_name(key: str, name: str, places: Mapping[str, str]) -> str:
    """A key without the adapter's name, where it stands for the adapter and is PEFT's to strip."""
    last, parent = key, key.rpartition(".")[0]
    if last in places:
        return parent
    if parent in places:  # PEFT looks no deeper
        return f"{parent.rpartition('.')[0]}.{key.rpartition('.')[2]}"
    return key


def _gathered(model: nn.Module, value: Tensor) -> Tensor:
    """The whole of a tensor that transformers' tensor parallelism has split."""
    full = getattr(value, "full_tensor", None)
    return full() if full is not None and getattr(model, "_tp_size", None) else value


# -- into the model ---------------------------------------------------------------------------------------


def load_adapter_state_dict(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    name: str,
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
    *,
    config: AdapterConfig | None = None,
) -> Any:
    """Give an adapter of a live model the values of a checkpoint. Everything is checked before anything is written.

    Args:
        model: the model. A model without PEFT's prefix `base_model.model.` takes keys with it and without.
        tensors: key -> tensor.
        name: the adapter's name.
        ignore_mismatched_sizes: whether tensors of another shape than the model's are left out, with a warning.
        low_cpu_mem_usage: whether the tensors take the place of the model's, which may be on the meta device, instead
            of being copied into them. They are moved to the base layers' device and dtype.
        config: the adapter's config, where somebody changed it.

    Returns:
        As `nn.Module.load_state_dict` of the whole model: a named tuple of `missing_keys`, those of the base model
        among them, and `unexpected_keys`.

    Raises:
        AdapterError: if there is no such adapter.
        KeyError: if the checkpoint lacks a module that is trained in full, or trained rows.
        RuntimeError: if a shape differs, or a value is no tensor.
    """
    config = config or config_of(model, name)
    held: dict[str, Any] = model.state_dict()
    to_model = _load_map(model, name, held, tensors)
    prefixed = any(key.startswith(PREFIX) for key, _ in model.named_parameters())
    values: dict[str, Any] = {}
    for key, value in tensors.items():
        target = to_model.get(key, key)
        values[target if prefixed else target.removeprefix(PREFIX)] = value
    resized = _resized(model, name, config, held, values)
    held.update(resized)
    mismatched = [key for key in values if key in held and not _fits(values[key], held[key])]
    if mismatched and not ignore_mismatched_sizes:
        raise RuntimeError(_mismatch_error(model, mismatched, values, held))
    message = _mismatch_warning(model, mismatched, values, held)
    for key in mismatched:
        del values[key]
    check_tensors(model, values)
    _resize(model, name, resized, values)
    split = {key: distribute(value, held[key]) if key in held else value for key, value in values.items()}
    result = model.load_state_dict(split, strict=False, assign=low_cpu_mem_usage)
    if low_cpu_mem_usage:
        for _, layer in layers(model):
            _move_to_base(layer, name)
        for _, wrapper in auxiliaries(model):
            if hasattr(wrapper, "token_adapter"):
                wrapper.token_adapter._move_adapter_to_device_of_base_layer(name)
    if mismatched:
        warnings.warn(message, stacklevel=2)
    return result


def _load_map(model: nn.Module, name: str, held: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, str]:
    """Key in a checkpoint -> key in the state dict."""
    places = {prefix: owner for prefix, owner in _places(model) if owner == name}
    found: dict[str, str] = {}
    for key in held:  # also what PEFT has saved in earlier versions, such as AdaLoRA's ranknum
        if any(above in places for above in _above(key)):
            found[_without_name(key, name, places)] = key
    for own in _own(model, name):
        found.update({saved: key for saved, key in own.keys.values() if key in held})
    for key in list(found):
        if not found[key].startswith(PREFIX):
            found[PREFIX + key] = found[key]
    for live, wrapper in auxiliaries(model):
        path = _path(live)
        for saved, key in wrapper.adapter_state_dict_load_map(name).items():
            found[_saved_key(wrapper, f"{path}.{saved}", tensors)] = f"{path}.{key}"
    return found


def _saved_key(wrapper: AuxiliaryTrainingWrapper, key: str, tensors: Mapping[str, Any]) -> str:
    for candidate in (key, PREFIX + key):
        if candidate in tensors:
            return candidate
    raise KeyError(f"{key!r} is missing: {wrapper._field()} of the adapter's config says that the checkpoint has it.")


def _fits(value: Any, held: Any) -> bool:
    """Whether a value can be loaded in the place of another one, as far as its shape goes."""
    if not isinstance(value, Tensor) or not isinstance(held, Tensor):
        return True
    packed = held.ndim > 0 and held.shape[-1] == 1 and held.numel() * 2 == value.numel()  # two 4-bit weights in a byte
    scalar = held.ndim == 0 and value.shape == (1,)
    return packed or scalar or value.shape == held.shape


def _mismatch_error(model: nn.Module, keys: Iterable[str], values: Mapping[str, Any], held: Mapping[str, Any]) -> str:
    lines = [
        f"\tsize mismatch for {key}: copying a param with shape {values[key].shape} from checkpoint, the shape in "
        f"current model is {held[key].shape}."
        for key in keys
    ]
    return f"Error(s) in loading state_dict for {type(model).__name__}:\n" + "\n".join(lines)


def _mismatch_warning(model: nn.Module, keys: Iterable[str], values: Mapping[str, Any], held: Mapping[str, Any]) -> str:
    lines = [
        f"- {key}: found shape {values[key].shape} in the checkpoint and {held[key].shape} in the model instantiated"
        for key in keys
    ]
    return (
        f"Some weights of {type(model).__name__} were not initialized from the model checkpoint and are being ignored "
        f"because you passed `ignore_mismatched_sizes=True`: {chr(10).join(lines)}."
    )


def check_tensors(model: nn.Module, values: Mapping[str, Any]) -> None:
    """Refuse what torch would only find when half of it is written.

    Args:
        model: the model, for the message.
        values: the state dict to be loaded.

    Raises:
        RuntimeError: for the first value that is no tensor.
    """
    for key, value in values.items():
        if not isinstance(value, Tensor):
            raise RuntimeError(
                f"Error(s) in loading state_dict for {type(model).__name__}:\n\tWhile copying the parameter named "
                f'"{key}", expected torch.Tensor or Tensor-like object from checkpoint but received {type(value)}.'
            )


def _resized(
    model: nn.Module, name: str, config: AdapterConfig, held: Mapping[str, Any], values: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The model's tensors that a checkpoint of that config has in another shape, in that shape."""
    found: dict[str, Tensor] = {}
    for own in _own(model, name):
        leaves = {leaf: held[key] for leaf, (_, key) in own.keys.items() if key in held}
        reduced = _reduced(own.layer, name, config, leaves)
        for leaf, value in reduced.items():
            key = own.keys[leaf][1]
            # a checkpoint that was written before the config was changed has all of it
            whole = isinstance(values.get(key), Tensor) and values[key].shape == leaves[leaf].shape
            if value.shape != leaves[leaf].shape and not whole:
                found[key] = value
    return found


def _resize(model: nn.Module, name: str, resized: Mapping[str, Tensor], values: dict[str, Any]) -> None:
    """Put tensors of another shape into the layers: parameters of the values that are loaded next."""
    for own in _own(model, name) if resized else ():
        held = own.layer.adapters[name]
        keys = {leaf: key for leaf, (_, key) in own.keys.items() if key in resized}
        # the layout is the method's: a layer that lost everything keeps one row of zeros
        new = held.method.layout({leaf: values.pop(key, resized[key]) for leaf, key in keys.items()})
        for leaf, value in new.items() if keys else ():
            owner, _, short = keys[leaf].rpartition(".")
            module: Any = _submodule(model, owner)
            old = module._parameters[short]
            value = value.detach().to(device=old.device, dtype=old.dtype).clone()
            module._parameters[short] = nn.Parameter(value, requires_grad=old.requires_grad)
        ranks: Any = getattr(own.layer, "r", None)
        if keys and isinstance(ranks, dict):
            ranks[name] = held.config.rank(own.layer.leaves(name))


def _submodule(model: nn.Module, path: str) -> nn.Module:
    """A module by the path that a state dict has."""
    return next(module for live, module in model.named_modules() if _path(live) == path)  # pyright: ignore


def _move_to_base(layer: AdapterLayer, name: str) -> None:
    """The tensors of an adapter to the device and floating dtype of the base weight, unless they are on meta."""
    like = layer.weight
    for container in layer.adapter_layer_names:
        held: Any = layer._modules[container]
        if name not in held:
            continue
        entry = held[name]
        for tensor in [entry] if isinstance(entry, Tensor) else [*entry.parameters(), *entry.buffers()]:
            if not tensor.is_meta:
                dtype = like.dtype if tensor.is_floating_point() and like.is_floating_point() else None
                tensor.data = tensor.data.to(device=like.device, dtype=dtype)
