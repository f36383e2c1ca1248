"""Hot-swapping: the values of one LoRA adapter replaced by those of another, in place, also in a compiled model."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import warnings
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from funcadapt.layer import Layer
from funcadapt.method import Leaf
from funcadapt.methods.dora import row_norm
from funcadapt.peft.config import PeftConfig
from funcadapt.view.classes import family
from funcadapt.view.entries import Own, own_leaves
from funcadapt.view.holding import addresses, take
from funcadapt.view.layer import AdapterLayer
from funcadapt.view.walking import layers, view_state

CONFIG_KEYS_TO_CHECK = {"LORA": ("use_rslora", "lora_dropout", "alpha_pattern", "use_dora")}
_MAGNITUDE = "lora_magnitude_vector"


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | os.PathLike[str],
    adapter_name: str,
    torch_device: Any = None,
    **kwargs: Any,
) -> None:
    """Replace the values of a LoRA adapter of a `PeftModel` by those of another one in a folder or on the Hub.

    The name stays. Rank and alpha may differ, also by `rank_pattern`: the scaling of each layer is the one that the new
    config says for it. (PEFT looks the patterns up under names that never match, and the output is wrong: its defect
    B8. It also leaves the old rank and alpha in the config that is saved with the new weights; here they are replaced.)

    Args:
        model: the `PeftModel`, compiled or not.
        model_name_or_path: the new adapter's folder, or its repository on the Hub.
        adapter_name: the name of the adapter to replace.
        torch_device: the device to which the file is read.
        **kwargs: `subfolder`, and what `hf_hub_download` takes.

    Raises:
        ValueError: if the configs do not go together, or the adapter is merged now.
        RuntimeError: if the new adapter has tensors for which there is no place. Nothing is changed then.
    """
    from funcadapt.peft.functional import load_peft_weights

    inner: Any = getattr(model, "_orig_mod", model)
    config: Any = PeftConfig.from_pretrained(model_name_or_path, **kwargs)
    check_hotswap_configs_compatible(inner.active_peft_config, config)
    tensors = load_peft_weights(os.fspath(model_name_or_path), device=torch_device, **kwargs)
    stored = {pair[0]: pair[1] for own in own_leaves(inner, adapter_name) for pair in own.keys.values()}
    named = {stored.get(key, key): tensor for key, tensor in tensors.items()}
    hotswap_adapter_from_state_dict(model, named, adapter_name, config)


def check_hotswap_configs_compatible(config0: Any, config1: Any) -> None:
    """Check that one adapter can take the place of another.

    Args:
        config0: PEFT's config of one.
        config1: of the other.

    Raises:
        ValueError: if they are of different types, no LoRA, or differ in a field that is not swapped.
    """
    if config0.peft_type != config1.peft_type:
        types = f"{config0.peft_type.value} and {config1.peft_type.value}"
        raise ValueError(f"Incompatible PEFT types found: {types}")
    if config0.peft_type not in CONFIG_KEYS_TO_CHECK:
        raise ValueError(
            f"Hotswapping only supports {', '.join(CONFIG_KEYS_TO_CHECK)} but {config0.peft_type.value} was passed."
        )
    for field in CONFIG_KEYS_TO_CHECK[config0.peft_type]:
        one, other = getattr(config0, field), getattr(config1, field)
        if one != other:
            raise ValueError(f"Configs are incompatible: for {field}, {one} != {other}")


class _Change(NamedTuple):
    """What is to be written at one layer: the new leaves by name, and the config that they then have."""

    own: Own
    leaves: Leaf
    config: Any


def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    adapter_name: str,
    config: Any,
    parameter_prefix: str = "lora_",
) -> None:
    """Replace the values of a LoRA adapter by those in a state dict.

    Layers that the state dict leaves out get an adapter that changes nothing. A smaller rank than the tensors have is
    padded with zeros, so that no shape changes; a larger one replaces the tensors.

    Args:
        model: the model, compiled or not.
        state_dict: the new values by the keys of the model's state dict, with the adapter's name in them.
        adapter_name: the name of the adapter to replace.
        config: PEFT's config of the new adapter, for its rank, alpha and patterns.
        parameter_prefix: as in PEFT, of no effect: the adapter's tensors are known.

    Raises:
        ValueError: if the adapter is merged now, or shapes do not fit.
        RuntimeError: if there is no place for a tensor. Nothing is changed then.
    """
    inner: nn.Module = getattr(model, "_orig_mod", model)
    if any(adapter_name in layer.merged_adapters for _, layer in layers(inner)):
        raise ValueError(
            f"Cannot hot-swap adapter '{adapter_name}' because it is currently merged into the base weights. Please "
            "unmerge the adapter first by calling `peft_model.unmerge_adapter()` (or, for diffusers models, "
            "`diffusers_model.unfuse_lora()`); unmerging after a swap of merged weights would otherwise corrupt them."
        )
    given = {key.removeprefix("_orig_mod."): tensor for key, tensor in state_dict.items()}
    found = list(own_leaves(inner, adapter_name))
    held = {key: key for own in found for _, key in own.keys.values()}
    held |= {key.removesuffix(".weight"): key for key in held if f".{_MAGNITUDE}." in key}  # PEFT's form of it
    unexpected = [key for key in given if key not in held]
    if unexpected:
        raise RuntimeError(f"Hot swapping the adapter did not succeed, unexpected keys found: {', '.join(unexpected)}.")
    given = {held[key]: tensor for key, tensor in given.items()}
    frozen = config.to_funcadapt()
    changes = [_planned(own, adapter_name, given, frozen.at(own.layer.site.path)) for own in found]
    for change in changes:
        _write(change, adapter_name)
    _record(inner, adapter_name, found)
    _rename(inner, adapter_name, config)


def _current(own: Own, name: str) -> dict[str, Tensor]:
    found = ((a.leaf, take(own.layer._modules[a.container], name, a.rest)) for a in _addresses(own, name))  # pyright: ignore
    return {leaf: tensor for leaf, tensor in found if tensor is not None and leaf in own.keys}


def _addresses(own: Own, name: str) -> Any:
    return addresses(own.layer.adapters[name].method)


def _planned(own: Own, name: str, given: Mapping[str, Tensor], config: Any) -> _Change:
    layer, old = own.layer, _current(own, name)
    now: Any = layer.adapters[name].config
    new = {leaf: given[own.keys[leaf][1]].to(t) for leaf, t in old.items() if own.keys[leaf][1] in given}
    if new and _MAGNITUDE in old and _MAGNITUDE not in new:
        raise RuntimeError(f"Hot swapping the adapter did not succeed: {own.keys[_MAGNITUDE][1]} is missing.")
    if new and not {leaf for leaf in old if leaf not in new} <= {leaf for leaf in old if "bias" in leaf}:
        missing = [own.keys[leaf][1] for leaf in old if leaf not in new]
        raise RuntimeError(f"Hot swapping the adapter did not succeed: {', '.join(missing)} is missing.")
    if not new and _MAGNITUDE in old:
        p = layer.leaves(name)
        weight = Layer(layer.site, layer.get_base_layer(), now).weight
        zero = torch.zeros_like(p["lora_A"]), torch.zeros_like(p["lora_B"]), p["scaling"]
        new[_MAGNITUDE] = row_norm(weight, *zero).to(old[_MAGNITUDE]).view_as(old[_MAGNITUDE])
    whole = {leaf: new[leaf] if leaf in new else torch.zeros_like(t) for leaf, t in old.items()}
    rank: int = config.r if any(key in given for _, key in own.keys.values()) else now.r
    final = max(rank, now.r)
    fitted = _with_rank(layer, name, dataclasses.replace(config, r=rank), whole, final)
    expected = _with_rank(layer, name, now, old, final)
    for leaf, tensor in fitted.items():
        if tensor.shape != expected[leaf].shape:
            raise ValueError(
                f"Incompatible shapes found for LoRA weights {own.keys[leaf][1]}: {tuple(old[leaf].shape)} vs "
                f"{tuple(whole[leaf].shape)}. Please ensure that all ranks are padded to the largest rank among all "
                "LoRA adapters by using peft.utils.hotswap.prepare_model_for_compiled_hotswap."
            )
    return _Change(own, fitted, _with_scaling_of(config, final))


def _with_rank(layer: AdapterLayer, name: str, config: Any, leaves: Leaf, rank: int) -> Leaf:
    """Leaves in the shapes of a checkpoint, padded with zeros to a rank."""
    method = layer.adapters[name].method
    if config.r == rank:
        return leaves
    assert method.with_rank is not None
    padded = method.with_rank(_unpacked(layer, name, config, leaves), config.r, rank)
    return method.pack(padded) if layer.site.kind in ("parameter", "experts") else padded


def _unpacked(layer: AdapterLayer, name: str, config: Any, leaves: Leaf) -> Leaf:
    experts = layer.site.kind in ("parameter", "experts")
    return layer.adapters[name].method.unpack(config, leaves) if experts else leaves


def _with_scaling_of(config: Any, rank: int) -> Any:
    """The config with another rank and the alpha that then gives the same scaling."""
    if rank == config.r:
        return config
    ratio = rank / config.r
    return dataclasses.replace(
        config, r=rank, lora_alpha=config.lora_alpha * (math.sqrt(ratio) if config.use_rslora else ratio)
    )


def _write(change: _Change, name: str) -> None:
    layer, held = change.own.layer, change.own.layer.adapters[name]
    for leaf, tensor in _current(change.own, name).items():
        value = change.leaves[leaf]
        if tensor.shape == value.shape:
            tensor.data.copy_(value)
        else:
            tensor.data, tensor.grad = value.contiguous(), None
    _say_sizes(layer, name)
    _set_config(layer, name, change.config)
    _set_scaling(layer, name, held.method.buffers(change.config)["scaling"].item())


def _say_sizes(layer: AdapterLayer, name: str) -> None:
    """The entries that are `nn.Linear` print their sizes."""
    for container in layer.adapter_layer_names:
        entry = layer._modules[container]._modules.get(name)  # pyright: ignore[reportOptionalMemberAccess]
        if isinstance(entry, nn.Linear):
            entry.out_features, entry.in_features = entry.weight.shape


def _set_config(layer: Any, name: str, config: Any) -> None:
    layer.adapters[name].config = config
    layer.r[name], layer.lora_alpha[name] = config.r, config.lora_alpha


def _set_scaling(layer: Any, name: str, scaling: float) -> None:
    """In place where it is a tensor, which a compiled graph reads; its copy in another dtype, too."""
    now = layer.scaling[name]
    if not isinstance(now, Tensor):
        layer.scaling[name] = scaling
        return
    now.fill_(scaling)
    for number, made in layer.adapters[name].derived.values():
        if number is now and made is not now:
            made.fill_(scaling)


def _rename(model: nn.Module, name: str, config: Any) -> None:
    """The model's `peft_config`, too, says the new rank and alpha."""
    configs: Any = getattr(model, "peft_config", None) or {}
    for field in ("r", "lora_alpha", "rank_pattern", "alpha_pattern") if name in configs else ():
        setattr(configs[name], field, copy.copy(getattr(config, field)))


def _record(model: nn.Module, name: str, found: list[Own]) -> None:
    """The model's own config says what its adapter now is: it is what is saved."""
    configs = view_state(model).configs
    leaves: dict[str, Leaf] = {}
    for own in found:
        config: Any = own.layer.adapters[name].config
        derived = own.layer.adapters[name].method.buffers(config)
        leaves[own.layer.site.path] = {**_unpacked(own.layer, name, config, _current(own, name)), **derived}
    for own in found[:1]:
        configs[name] = own.layer.adapters[name].method.describe(configs[name], leaves)


def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: Any = None,
    check_compiled: Literal["error", "warn", "ignore"] = "error",
) -> None:
    """Make a model ready to be compiled once for all adapters that are swapped into it later.

    Scalings become tensors, and ranks are padded with zeros to a common one: neither shapes nor constants change when
    adapters are swapped, so that nothing is compiled again.

    Args:
        model: the model with its first adapter, not compiled yet.
        target_rank: the largest rank that will come, or None to leave the ranks as they are.
        config: PEFT's config, or configs by name, whose ranks are set to `target_rank`.
        check_compiled: what to do if the model is compiled already: "error", "warn" or "ignore".

    Raises:
        ValueError: if the model is compiled, has no LoRA layer, or has a larger rank.
    """
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", False):
        if check_compiled == "error":
            raise ValueError("Call prepare_model_for_compiled_hotswap *before* compiling the model")
        if check_compiled == "warn":
            warnings.warn(
                "prepare_model_for_compiled_hotswap was called with a model that is already compiled. This will likely "
                "result in re-compilation, hurting performance. Call the function before compiling the model.",
                stacklevel=2,
            )
        elif check_compiled != "ignore":
            raise ValueError(
                f"check_compiles should be one of 'error', 'warn', or 'ignore', got '{check_compiled}' instead."
            )
    found: list[Any] = [layer for _, layer in layers(model) if isinstance(layer, family("lora"))]
    if not found:
        raise ValueError(
            "No adapter layers found on the model, make sure call `prepare_model_for_compiled_hotswap` after loading "
            "the first adapter and before loading the second adapter."
        )
    names = list(view_state(model).configs)
    if target_rank is not None:
        for name in names:
            owned = list(own_leaves(model, name))
            for own in owned:
                _pad(own, name, target_rank)
            _record(model, name, owned)
    for layer in found:
        for name, value in layer.scaling.items():
            if not isinstance(value, Tensor):
                layer.scaling[name] = torch.tensor(float(value), device=layer.weight.device)
        for name in layer.adapters:
            layer.leaves(name)  # what it remembers, it remembers before it is compiled
    if target_rank is not None and config:
        configs: list[Any] = list(config.values()) if isinstance(config, dict) else [config]  # pyright: ignore
        for each in configs:
            each.r = target_rank
            each.rank_pattern = dict.fromkeys(each.rank_pattern or (), target_rank)


def _pad(own: Own, name: str, rank: int) -> None:
    config: Any = own.layer.adapters[name].config
    if config.r > rank:
        raise ValueError(
            f"Trying to pad the adapter to the target rank {rank}, but the original rank is larger ({config.r}). This "
            "is not possible."
        )
    leaves = _with_rank(own.layer, name, config, _current(own, name), rank)
    for leaf, tensor in _current(own, name).items():
        tensor.data, tensor.grad = leaves[leaf].detach().contiguous(), None
    _say_sizes(own.layer, name)
    _set_config(own.layer, name, _with_scaling_of(config, rank))
