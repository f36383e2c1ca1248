"""The tensors of a checkpoint into a live model; see `view.state_dict` for the way out."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from funcadapt.checkpoint import not_saved
from funcadapt.config import AdapterConfig
from funcadapt.errors import AdapterError
from funcadapt.keys import PREFIX, ROOT
from funcadapt.method import Draw, method_of
from funcadapt.sharing import SHARED, complete, in_files
from funcadapt.sites import Site, device_of
from funcadapt.view.auxiliary import AuxiliaryTrainingWrapper, TokensHolder
from funcadapt.view.entries import Entries, above, config_of, join, reduced, without_name
from funcadapt.view.holding import Address, held_by, is_left_out, set_buffer, take
from funcadapt.view.layer import AdapterLayer
from funcadapt.view.values import adapter_of
from funcadapt.view.walking import layers, root_of, unwrapped, view_state


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
        RuntimeError: if a shape differs, a value is no tensor, or a key is there twice.
    """
    config = config or config_of(model, name)
    entries = Entries(model, name)
    held = entries.with_unsaved(model.state_dict())
    tensors = _restored(entries, name, config, tensors)
    to_model = _load_map(entries, name, held, tensors)
    prefixed = any(key.startswith(PREFIX) for key, _ in model.named_parameters())
    values: dict[str, Any] = {}
    for key, value in tensors.items():
        target = to_model.get(key, key)
        target = target if prefixed else target.removeprefix(PREFIX)
        # PEFT itself saves the biases of modules that are saved whole under two names
        if target in values and (PREFIX + key in tensors or key.removeprefix(PREFIX) in tensors.keys() - {key}):
            raise RuntimeError(f"The state dict has {target!r} twice, with and without the prefix {PREFIX!r}.")
        values[target] = value
    resized = _resized(entries, name, config, held, values)
    held.update(resized)
    mismatched = [key for key in values if key in held and not _fits(values[key], held[key])]
    if mismatched and not ignore_mismatched_sizes:
        raise RuntimeError(_mismatch_error(model, mismatched, values, held))
    message = _mismatch_warning(model, mismatched, values, held)
    for key in mismatched:
        del values[key]
    check_tensors(model, values)
    _check_tied(entries, name, values)
    _resize(entries, name, resized, values)
    split = {key: _split_like(held.get(key), value) for key, value in values.items()}
    stale = _is_stale(entries, name, held, split)
    unsaved = {key: split.pop(key) for key in list(split) if key in entries.unsaved}
    result: Any = model.load_state_dict(split, strict=False, assign=low_cpu_mem_usage)
    for key, value in unsaved.items():
        _set_unsaved(entries, key, value, low_cpu_mem_usage)
    result.missing_keys.extend(
        key for key in entries.unsaved if key not in unsaved and _is_in_files(entries, key, config)
    )
    for _, key in entries.shared.values() if entries.own else ():
        if key in split:  # all layers hold the same one
            suffix = key.removeprefix(entries.own[0].path)
            result.missing_keys[:] = [other for other in result.missing_keys if not other.endswith(suffix)]
    if low_cpu_mem_usage:
        for _, layer in entries.layers:
            _move_to_base(layer, name)
    if low_cpu_mem_usage or stale:
        _fill(model, name, stale)
    if low_cpu_mem_usage:
        for _, wrapper in entries.wrappers:
            if isinstance(wrapper, TokensHolder):
                wrapper.token_adapter._move_adapter_to_device_of_base_layer(name)
    if mismatched:
        warnings.warn(message, stacklevel=2)
    return result


def _is_in_files(entries: Entries, key: str, config: AdapterConfig) -> bool:
    """Whether a checkpoint has a leaf that state dicts lack."""
    layer, (leaf, *_) = entries.unsaved[key]
    return not is_left_out(layer.adapters[entries.name].method, config, layer.site.path, leaf, entries.live(key))


def _set_unsaved(entries: Entries, key: str, value: Tensor, assign: bool) -> None:
    """Load a leaf that state dicts lack."""
    if assign:
        layer, address = entries.unsaved[key]
        set_buffer(held_by(layer, address.container), entries.name, address.rest, value)
    else:
        entries.live(key).copy_(value)


def _is_stale(entries: Entries, name: str, held: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> bool:
    """Whether a checkpoint brings other frozen leaves that sites share, from which others may follow: FRoD's basis."""
    method = entries.own[0].layer.adapters[name].method if entries.own else None
    keys = [key for leaf, (_, key) in entries.shared.items() if method is not None and method.is_constant(leaf)]
    return any(
        key in values and not held[key].is_meta and not torch.equal(held[key], values[key].to(held[key]))
        for key in keys
    )


def _fill(model: nn.Module, name: str, stale: bool) -> None:
    """Make the leaves that no checkpoint holds, where they are on the meta device, or all if they are stale."""
    own = [layer for _, layer in layers(model) if name in layer.adapters]
    held = [(layer, address) for layer in own for address in layer.addresses_of(name, layer.adapters[name])]
    method = method_of(view_state(model).configs[name])
    derived = {a.leaf for _, a in held if stale and a.leaf not in method.keys and a.leaf not in method.shared}
    empty = [(layer, a) for layer, a in held if a.leaf in derived or _at(layer, a, name).is_meta]
    if not empty:
        return
    root, adapter = root_of(model), adapter_of(model, name)
    params, buffers = (
        {
            path: {leaf: t for leaf, t in leaves.items() if not (t.is_meta or leaf in derived)}
            for path, leaves in tree.items()
        }
        for tree in (adapter.params, adapter.buffers)
    )

    def draw_of(site: Site) -> Draw:
        return Draw(None, site.dtype, site.device)

    with unwrapped(root):
        complete(root, method, adapter.config, [layer.site for layer in own], (params, buffers), draw_of)
    for layer, address in empty:
        path = SHARED if address.leaf in method.shared else layer.site.path
        value = {**params.get(path, {}), **buffers.get(path, {})}.get(address.leaf)
        if value is not None:
            set_buffer(held_by(layer, address.container), name, address.rest, value)


def _at(layer: AdapterLayer, address: Address, name: str) -> Tensor:
    found = take(held_by(layer, address.container), name, address.rest)
    assert found is not None
    return found


def _restored(
    entries: Entries, name: str, config: AdapterConfig, tensors: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    """A checkpoint with the leaves that its method holds, where it has them in another form."""
    if not entries.own:
        return tensors
    method = entries.own[0].layer.adapters[name].method
    found = dict(tensors)

    def take_out(keys: Mapping[str, str], prefix: str = PREFIX) -> dict[str, Tensor]:
        named = {leaf: (key, key.removeprefix(prefix), prefix + key) for leaf, key in keys.items()}
        given = {leaf: next((key for key in keys if key in found), None) for leaf, keys in named.items()}
        return {leaf: found.pop(key) for leaf, key in given.items() if key is not None}

    for own in entries.own if method.written else ():
        leaves = take_out({leaf: join(own.path, key) for leaf, key in method.written.items()})
        made = method.restore(config, own.layer.site.path, leaves) if leaves else leaves
        found |= {own.keys[leaf][0]: value for leaf, value in made.items()}
    shared = {leaf: key for leaf, (key, _) in entries.shared.items()}
    leaves = take_out(shared, ROOT)
    for own in entries.own if method.repeated else ():
        leaves = {**take_out({leaf: own.keys[leaf][0] for leaf in shared}), **leaves}
    lacking = [leaf for leaf in shared if leaf not in leaves and in_files(method, config, leaf)]
    if lacking:
        raise AdapterError(f"The checkpoint lacks {lacking[0]!r}, which layers share.{not_saved(config)}")
    made = method.restore(config, SHARED, leaves) if leaves else leaves
    return found | {shared[leaf]: value for leaf, value in made.items()}


def _load_map(entries: Entries, name: str, held: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, str]:
    """Key in a checkpoint -> key in the state dict."""
    places = {prefix: owner for prefix, owner in entries.layer_places() if owner == name}
    found: dict[str, str] = {}
    for key in held:  # also what PEFT has saved in earlier versions, such as AdaLoRA's ranknum
        if any(above in places for above in above(key)):
            found[without_name(key, name, places)] = key
    for own in entries.own:
        found.update({saved: key for saved, key in own.keys.values() if key in held})
    found.update({saved.removeprefix(ROOT): key for saved, key in entries.shared.values()})
    found.update({ROOT + saved.removeprefix(ROOT): key for saved, key in entries.shared.values()})
    for key in list(found):
        if not found[key].startswith(PREFIX):
            found[PREFIX + key] = found[key]
    for path, wrapper in entries.wrappers:
        for saved, key in wrapper.adapter_state_dict_load_map(name).items():
            # what one is tied to has it, too
            if not wrapper.is_tied or f"{path}.{saved}" in tensors or f"{PREFIX}{path}.{saved}" in tensors:
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


def _check_tied(entries: Entries, name: str, values: Mapping[str, Any]) -> None:
    """Refuse other numbers for rows that are the same ones in the model."""
    keys = {
        id(wrapper.token_adapter): f"{path}.{wrapper.rows_key(name)}"
        for path, wrapper in entries.wrappers
        if isinstance(wrapper, TokensHolder)
    }
    for path, wrapper in entries.wrappers:
        if isinstance(wrapper, TokensHolder) and wrapper.is_tied:
            own, first = values.get(keys[id(wrapper.token_adapter)]), keys[id(wrapper.token_adapter.tied_adapter)]
            if own is not None and first in values and not torch.equal(own, values[first]):
                raise RuntimeError(
                    f"The state dict has other trained rows for {path!r} than for the embedding, but the model ties "
                    "them to each other. Leave out those of the head."
                )


def _resized(
    entries: Entries, name: str, config: AdapterConfig, held: Mapping[str, Any], values: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The model's tensors that a checkpoint of that config has in another shape, in that shape."""
    found: dict[str, Tensor] = {}
    for own in entries.own:
        leaves = {leaf: held[key] for leaf, (_, key) in own.keys.items() if key in held}
        for leaf, value in reduced(own.layer, name, config, leaves).items():
            if leaf not in own.keys:
                continue
            key = own.keys[leaf][1]
            # a checkpoint that was written before the config was changed has all of it
            whole = isinstance(values.get(key), Tensor) and values[key].shape == leaves[leaf].shape
            if value.shape != leaves[leaf].shape and not whole:
                found[key] = value
    return found


def _resize(entries: Entries, name: str, resized: Mapping[str, Tensor], values: dict[str, Any]) -> None:
    """Put tensors of another shape into the layers: parameters of the values that are loaded next."""
    for own in entries.own if resized else ():
        held = own.layer.adapters[name]
        keys = {leaf: key for leaf, (_, key) in own.keys.items() if key in resized}
        # the layout is the method's: a layer that lost everything keeps one row of zeros
        new = held.method.layout({leaf: values.get(key, resized[key]) for leaf, key in keys.items()})
        for leaf, value in new.items() if keys else ():
            owner, _, short = keys[leaf].rpartition(".")
            parameters = own.layer.get_submodule(owner.removeprefix(f"{own.path}."))._parameters
            old: Any = parameters[short]
            value = value.detach().to(device=None if old.is_meta else old.device, dtype=old.dtype).clone()
            parameters[short] = nn.Parameter(value, requires_grad=old.requires_grad)
            if keys[leaf] in values:
                values[keys[leaf]] = value
        ranks: Any = getattr(own.layer, "r", None)
        if keys and isinstance(ranks, dict):
            ranks[name] = held.config.rank(own.layer.leaves(name))


def _split_like(held: Any, value: Tensor) -> Tensor:
    """A whole tensor split among devices as the model's is; all of them call this, each with the whole."""
    if not hasattr(held, "device_mesh") or hasattr(value, "device_mesh"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(held.device), held.device_mesh, held.placements)


def _move_to_base(layer: AdapterLayer, name: str) -> None:
    """The tensors of an adapter to the device and floating dtype of the base weight, unless they are on meta."""
    base = layer.get_base_layer()
    like: Tensor = getattr(base, layer.site.parameter)
    device, hides = device_of(base, like), layer.view.hidden
    hidden = [_at(layer, a, name) for a in layer.addresses_of(name, layer.adapters[name]) if a.container in hides]
    for tensor in [*hidden, *_listed(layer, name)]:
        if not tensor.is_meta:
            dtype = like.dtype if tensor.is_floating_point() and like.is_floating_point() else None
            tensor.data = tensor.data.to(device=device, dtype=dtype)


def _listed(layer: AdapterLayer, name: str) -> Iterator[Tensor]:
    """The tensors of an adapter that have names in a layer."""
    for container in layer.adapter_layer_names:
        entry: Any = layer._modules[container][name] if name in layer._modules.get(container, ()) else None  # pyright: ignore
        if isinstance(entry, nn.Module):
            yield from (*entry.parameters(), *entry.buffers())
        elif entry is not None:
            yield entry
