"""The tensors of one adapter of a live model, under the keys of a PEFT checkpoint; and back into the model.

The state dict of a model with adapters says which adapter a tensor belongs to, a checkpoint does not:

    q_proj.lora_A.default.weight              <-> q_proj.lora_A.weight
    q_proj.lora_magnitude_vector.a.weight     <-> q_proj.lora_magnitude_vector
    lm_head.modules_to_save.default.weight    <-> lm_head.weight

What is an adapter's is read off the modules, never off the names in a key. (PEFT looks for the names: an adapter that
is called like a module takes that module's keys out of every other adapter's checkpoint, its defect B11.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

from funcadapt.config import AdapterConfig
from funcadapt.sharing import SHARED
from funcadapt.view.embeddings import Lookup, embedding_prefixes, is_embedding_saved, local_vocabulary
from funcadapt.view.entries import Entries, Own, above, config_of, join, reduced, without_name
from funcadapt.view.loading import load_adapter_state_dict as load_adapter_state_dict


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
        save_embedding_layers: whether the embeddings are in it, too. "auto" is PEFT's rule: if they are targeted, or
            the vocabulary has another size than the base model's.
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
    entries = Entries(model, name)
    found: dict[str, Tensor] = {}
    for own in entries.own:
        found.update(_stored(entries, own, config, every))
    if entries.shared:
        found.update(_stored_shared(entries, config, every))
    for path, wrapper in entries.wrappers:
        below = f"{path}."
        relative = {key.removeprefix(below): value for key, value in every.items() if key.startswith(below)}
        found.update({below + key: value for key, value in wrapper.adapter_state_dict(name, relative).items()})
    embeddings = is_embedding_saved(model, config, save_embedding_layers, lookup)
    if embeddings or getattr(config, "bias", "none") != "none":
        places = dict(entries.places())
        whole = {key: value for key, value in every.items() if all(places.get(k, name) == name for k in above(key))}
        chosen = _biases(entries, config, whole)
        for prefix in embedding_prefixes(model, config) if embeddings else ():
            chosen.update({key: value for key, value in whole.items() if key.startswith(prefix)})
        own_keys = {held for own in entries.own for _, held in own.keys.values()}
        found |= {without_name(key, name, places): chosen[key] for key in chosen if key not in own_keys}
    return {key: _gathered(model, value) for key, value in found.items()} if state_dict is None else found


def _stored(entries: Entries, own: Own, config: AdapterConfig, every: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The leaves of one layer, as the method stores them."""
    leaves = {leaf: every[held] for leaf, (_, held) in own.keys.items() if held in every}
    if not leaves:  # a state dict that is a checkpoint's already, as scripts make it that replace `model.state_dict`
        return {key: every[key] for key, _ in own.keys.values() if key in every}
    leaves = _with_unsaved(entries, leaves, own.keys)
    written = own.layer.adapters[entries.name].method.written
    stored = reduced(own.layer, entries.name, config, leaves)
    return {join(own.path, written[k]) if k in written else own.keys[k][0]: value for k, value in stored.items()}


def _with_unsaved(
    entries: Entries, leaves: dict[str, Tensor], keys: Mapping[str, tuple[str, str]]
) -> dict[str, Tensor]:
    """Leaves of a state dict with those that state dicts lack, all in the order of the keys."""
    every = {leaf: held for leaf, (_, held) in keys.items() if leaf in leaves or held in entries.unsaved}
    return {leaf: leaves[leaf] if leaf in leaves else entries.live(held) for leaf, held in every.items()}


def _stored_shared(entries: Entries, config: AdapterConfig, every: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the layers share, as the method stores it."""
    method = entries.own[0].layer.adapters[entries.name].method
    leaves = {leaf: every[held] for leaf, (_, held) in entries.shared.items() if held in every}
    leaves = _with_unsaved(entries, leaves, entries.shared)
    other: Mapping[str, Tensor | None] = {}
    if method.stored is not None:
        other = method.stored(config, SHARED, leaves)
    kept = {leaf: value for leaf, value in {**leaves, **other}.items() if value is not None}
    return {entries.shared[leaf][0]: value for leaf, value in kept.items()}


def _biases(entries: Entries, config: Any, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
    which: str = getattr(config, "bias", "none")
    if which == "all":
        return {key: value for key, value in whole.items() if key == "bias" or key.endswith(".bias")}
    if which.endswith("_only"):
        keys = [join(path, "base_layer.bias") for path, _ in entries.layers]
        return {key: whole[key] for key in keys if key in whole}
    return {}


def _gathered(model: nn.Module, value: Tensor) -> Tensor:
    """The whole of a tensor that transformers' tensor parallelism has split."""
    full = getattr(value, "full_tensor", None)
    return full() if full is not None and getattr(model, "_tp_size", None) else value
