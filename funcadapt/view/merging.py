"""Adapters into the base weights of a live model, and out of them again."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from funcadapt.compose import Level
from funcadapt.errors import AdapterError
from funcadapt.layer import Layer
from funcadapt.merge import merge_levels
from funcadapt.quantised import dequantised, is_quantised, put_back, requantise
from funcadapt.view.auxiliary import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TokensHolder
from funcadapt.view.own import OwnModule
from funcadapt.view.tokens import TrainableTokensLayer
from funcadapt.view.walking import auxiliaries, layers, root_of, wrapped

if TYPE_CHECKING:
    from funcadapt.view.layer import AdapterLayer


def _dense(layer: AdapterLayer, levels: list[Level], values: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the base parameters become with some adapters in them; parameters that stay are left out."""
    base, site = layer.get_base_layer(), layer.site
    at = Layer(site, base, levels[0].config)
    with torch.no_grad():
        weight, bias = merge_levels(levels, at, values[site.parameter], values.get(site.bias))
    return {site.parameter: weight} if bias is None else {site.parameter: weight, site.bias: bias}


def merge_layer(layer: AdapterLayer, names: Sequence[str] | None, safe: bool) -> None:
    """Write adapters of one layer into its base weight. Those that are in it already are left out.

    The old values are kept until `unmerge_layer`, which gives them back bit for bit. (PEFT subtracts or divides again,
    with rounding errors.) They take the memory of the merged weights.

    A weight that bitsandbytes quantised is quantised again, with the rounding that this brings.

    A parameter that another module shares, such as the weight of an embedding that is the head's, too, is not changed:
    the layer gets one of its own. (PEFT changes it for both, so that the model computes something else than before.)

    Args:
        layer: the layer.
        names: which adapters; None for the active ones.
        safe: whether to refuse a result that is not finite.

    Raises:
        AdapterError: in safe mode, if it is not, or if the base weight is quantised by another library than
            bitsandbytes. Nothing is merged at this layer.
        TypeError: if `names` is a string.
    """
    if isinstance(names, str):
        raise TypeError("adapter_names should be a list of strings, got a string.")
    wanted = [name for name in (layer.active_adapters if names is None else names) if name in layer.adapters]
    new = [name for name in dict.fromkeys(wanted) if name not in layer.merged_adapters]
    if not new:
        return
    base, site = layer.get_base_layer(), layer.site
    values = {name: _value(base, name) for name in (site.parameter, site.bias) if name}
    changed = _dense(layer, layer.levels(new), values)
    for value in changed.values():
        if safe and not torch.isfinite(value).all():
            raise AdapterError(
                f"NaNs detected in the merged weights. The adapter {new[0]} seems to be broken, at {site.path!r}."
            )
    try:
        for name, value in changed.items():  # the weight first
            _write(layer, name, value)
    except TypeError as error:
        raise AdapterError(f"The weight at {site.path!r} is quantised and cannot be merged into: {error}.") from error
    layer.merged_adapters.extend(new)


def _value(base: nn.Module, name: str) -> Tensor:
    """A parameter as it acts."""
    parameter = base._parameters.get(name)
    return dequantised(base, name) if parameter is None or is_quantised(parameter) else parameter.data


def _write(layer: AdapterLayer, name: str, value: Tensor) -> None:
    from funcadapt.view.switches import Kept

    owner = layer.get_base_layer()._parameters
    parameter = owner.get(name)
    if parameter is None or is_quantised(parameter):
        kept = layer.kept.get(name)
        made = requantise(layer.get_base_layer(), name, value)
        assert parameter is not None  # or it could not be quantised again
        layer.kept[name] = Kept(
            parameter.data if kept is None else kept.value,
            (made.data_ptr(), made._version),
            parameter if kept is None else kept.shared,
        )
        return
    kept = layer.kept.get(name) or Kept(parameter.data, (0, 0), parameter if name in layer.tied else None)
    if parameter is kept.shared:
        parameter = owner[name] = nn.Parameter(value, requires_grad=parameter.requires_grad)
    else:
        parameter.data = value
    layer.kept[name] = dataclasses.replace(kept, now=(parameter.data_ptr(), parameter._version))


def unmerge_layer(layer: AdapterLayer) -> None:
    """Take the merged adapters out of one layer's base weight.

    If nobody touched the weight since, its old values come back bit for bit. If it was moved or trained, what the
    adapters had added is taken away, and the rest stays. A quantised one is not trained: it always comes back.

    Args:
        layer: the layer.
    """
    if not layer.merged_adapters:
        warnings.warn("Already unmerged. Nothing to do.", stacklevel=3)
        return
    base = layer.get_base_layer()
    held = {name: base._parameters[name] for name in layer.kept}
    old = {name: kept.value.to(held[name]) for name, kept in layer.kept.items()}  # pyright: ignore
    quantised = {name for name, parameter in held.items() if is_quantised(parameter)}
    touched = not quantised and any((p.data_ptr(), p._version) != layer.kept[name].now for name, p in held.items())  # pyright: ignore
    if touched:
        values = {
            name: old.get(name, base._parameters[name]) for name in (layer.site.parameter, layer.site.bias) if name
        }
        merged = _dense(layer, layer.levels(layer.merged_adapters), values)  # pyright: ignore[reportArgumentType]
        old = {name: parameter.data + (old[name] - merged[name]) for name, parameter in held.items()}  # pyright: ignore
    for name, parameter in held.items():
        shared = layer.kept[name].shared
        if shared is not None and is_quantised(shared):
            put_back(base, name, shared)
        elif shared is not None and not touched:
            base._parameters[name] = shared
        else:
            parameter.data = old[name]  # pyright: ignore[reportOptionalMemberAccess]
    layer.kept.clear()
    layer.merged_adapters.clear()


def merge(model: nn.Module, names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
    """Write adapters of a live model into its base weights; `unmerge` takes them out again.

    Args:
        model: the model.
        names: which adapters; None for the active ones.
        safe_merge: whether to refuse results that are not finite.

    Raises:
        AdapterError: if a weight cannot be merged into. Everything is then as it was.
        TypeError: if `names` is a string.
    """
    if isinstance(names, str):
        raise TypeError("adapter_names should be a list of strings, got a string.")
    before = [(layer, list(layer.merged_adapters)) for _, layer in layers(model)]
    _warn_if_merged([layer for layer, _ in before], names)
    own = _own_parts(model)
    before_own = [(part, list(part.merged_adapters)) for part in own]
    try:
        for layer, _ in reversed(before):  # inner layers first: the outer ones act on what these make
            layer.merge(safe_merge, names)
        for part in own:
            part.merge(safe_merge, None if names is None else list(names))
    except Exception:
        changed = [(part, old) for part, old in (*before, *before_own) if part.merged_adapters != old]
        for part, _ in changed:
            part.unmerge()
        for part, old in reversed(changed):
            if old:
                part.merge(False, old)
        raise


def _own_parts(model: nn.Module) -> list[TrainableTokensLayer | OwnModule]:
    """What merges beside the layers: trained rows, and the modules of a method that trains them in full."""
    wrappers = [wrapper for _, wrapper in auxiliaries(model)]
    rows = [wrapper.token_adapter for wrapper in wrappers if isinstance(wrapper, TokensHolder) and not wrapper.is_tied]
    return [*rows, *(wrapper for wrapper in wrappers if isinstance(wrapper, OwnModule))]


def merged_parts(model: nn.Module) -> list[AdapterLayer | TrainableTokensLayer | OwnModule]:
    """Everything that has adapters in the base weights now, in the order in which it can be unmerged: outer first.

    Args:
        model: the model.

    Returns:
        Layers, trained rows, and modules that are trained in full.
    """
    every = (*(layer for _, layer in layers(model)), *_own_parts(model))
    return [part for part in every if part.merged_adapters]


def _warn_if_merged(found: Sequence[AdapterLayer], names: Sequence[str] | None) -> None:
    merged = list(dict.fromkeys(name for layer in found for name in layer.merged_adapters))
    if not merged:
        return
    wanted = names if names is not None else list(dict.fromkeys(n for layer in found for n in layer.active_adapters))
    new = [name for name in wanted if name not in merged]
    then = (
        f"You are now additionally merging {','.join(new)}."
        if new
        else "All adapters are already merged, nothing to do."
    )
    warnings.warn(f"Already following adapters were merged {','.join(merged)}. {then}", stacklevel=3)


def unmerge(model: nn.Module) -> None:
    """Take all merged adapters out of the base weights of a live model.

    Args:
        model: the model.
    """
    merged = merged_parts(model)
    if not merged:
        warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
    for layer in merged:
        layer.unmerge()


def unload(
    model: nn.Module, *, merge_first: bool = False, safe_merge: bool = False, names: Sequence[str] | None = None
) -> nn.Module:
    """Take the wrappers out of a live model, with the active adapters merged into it or without them.

    Unlike `fa.dematerialize` this is for good: base weights keep what was merged, modules that were saved whole take
    the place of the originals (merging or not, as in PEFT), and nothing is returned of the adapters.

    Args:
        model: the model, or one that has it as a part.
        merge_first: whether to merge.
        safe_merge: whether to refuse results that are not finite.
        names: which adapters are merged; None for the active ones.

    Returns:
        The bare model.

    Raises:
        AdapterError: if a weight cannot be merged into. Nothing is changed then.
    """
    from funcadapt.view.values import remove_wrappers

    root = root_of(model)
    if merge_first:
        merge(root, names, safe_merge)
    else:
        for part in merged_parts(root):
            part.unmerge()
    last: dict[int, nn.Module] = {}
    for parent, name, wrapper in wrapped(root):
        if isinstance(wrapper, ModulesToSaveWrapper):
            kept = last.setdefault(id(wrapper), _unloaded(wrapper, merge_first, safe_merge, names))
            parent._modules[name] = kept
    remove_wrappers(root)
    return root


def _unloaded(wrapper: AuxiliaryTrainingWrapper, merge: bool, safe: bool, names: Sequence[str] | None) -> nn.Module:
    return wrapper.unload_and_optionally_merge_module(merge, safe, None if names is None else list(names))
