"""Swaps: values for the slots of live modules, and the leaves that act by changing a parameter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from funcadapt.binding import Place
from funcadapt.compose import Level, Weight, check_dense, dense_levels, interpolate
from funcadapt.errors import AdapterError
from funcadapt.factored import Factored
from funcadapt.layer import Layer
from funcadapt.sites import tied_names


class Swaps:
    """Values to be put into dicts of live modules and taken out again.

    Attributes:
        values: (id of the dict, name) -> the dict, the name, the value.
    """

    __slots__ = ("_below", "_saved", "values")

    def __init__(self, below: Swaps | None = None) -> None:
        self.values: dict[tuple[int, str], tuple[dict[str, Any], str, Any]] = {}
        self._below = below
        self._saved: list[tuple[dict[str, Any], str, Any]] = []

    def set(self, slot: dict[str, Any], name: str, value: Any) -> None:
        """Note a value."""
        self.values[id(slot), name] = (slot, name, value)

    def get(self, slot: dict[str, Any], name: str) -> Any:
        """The value that will be there."""
        held = self.values.get((id(slot), name))
        if held is not None:
            return held[2]
        return slot[name] if self._below is None else self._below.get(slot, name)

    def enter(self) -> None:
        """Put every value in place."""
        for slot, name, value in self.values.values():
            self._saved.append((slot, name, slot[name]))
            slot[name] = value

    def exit(self) -> None:
        """Put back what was there."""
        while self._saved:
            slot, name, value = self._saved.pop()
            slot[name] = value


def slot_of(module: nn.Module, name: str) -> dict[str, Any]:
    """Where a module keeps a parameter or buffer."""
    return module._parameters if name in module._parameters else module._buffers


def value_of(swaps: Swaps, module: nn.Module, name: str) -> Any:
    """The parameter or buffer as it will be."""
    return swaps.get(slot_of(module, name), name)


def swap_weight(swaps: Swaps, place: Place, levels: Sequence[Level], *, factored: bool) -> None:
    """Adapters that act through the weight at a site: factored where the layer only multiplies with it, or dense.

    Args:
        swaps: where the new weight (and bias) is noted.
        place: the site.
        levels: the adapters there, innermost first.
        factored: whether a stand-in may be used; not while compiling.

    Raises:
        AdapterError: if dropout or weights per row would have to act.
    """
    site, module = place.site, place.module
    assert site is not None
    if site.kind in ("parameter", "experts") and factored:
        stand_in = Factored.create(value_of(swaps, module, site.parameter), levels, site, module)
        swaps.set(slot_of(module, site.parameter), site.parameter, stand_in)
        return
    layer = Layer(site, module, levels[0].config)
    weight = layer.canonical(value_of(swaps, module, site.parameter))
    bias = value_of(swaps, module, site.bias) if site.bias else None
    for level in levels:
        check_dense(level, site, training=module.training)
    weight, new_bias = dense_levels(levels, site, module, weight, bias)
    swaps.set(slot_of(module, site.parameter), site.parameter, layer.stored(weight))
    if new_bias is not bias:
        swaps.set(slot_of(module, site.bias), site.bias, new_bias)


def swap_whole(swaps: Swaps, module: nn.Module, name: str, tensor: Tensor, w: Weight) -> None:
    """A parameter that an adapter holds in full.

    Args:
        swaps: where it is noted.
        module: the owner.
        name: the parameter's name.
        tensor: the new value.
        w: how much of it acts.

    Raises:
        AdapterError: if the shape does not fit, or the weight is per row.
    """
    old = value_of(swaps, module, name)
    if old.shape != tensor.shape:
        raise AdapterError(
            f"The adapter holds a {name!r} of shape {tuple(tensor.shape)} for a {type(module).__name__} whose own has "
            f"shape {tuple(old.shape)}."
        )
    if isinstance(w, Tensor) and w.ndim:
        raise AdapterError(f"weights per row or token cannot act on the whole parameter {name!r}. Use a scalar.")
    swaps.set(slot_of(module, name), name, interpolate(old, tensor, w))


def swap_tokens(
    swaps: Swaps, path: str, heads: Sequence[tuple[nn.Module, str]], rows: Tensor, indices: Tensor, w: Weight
) -> None:
    """Trained rows of an embedding, in it and in every head that is tied to it.

    Args:
        swaps: where the new weight is noted.
        path: the embedding's path.
        heads: the embedding first, then what shares its weight: (module, parameter name).
        rows: (tokens, width).
        indices: (tokens).
        w: how much of it acts.

    Raises:
        AdapterError: if the shapes do not fit.
    """
    weight = value_of(swaps, *heads[0])
    if rows.shape != (indices.shape[0], weight.shape[1]):
        raise AdapterError(
            f"trainable tokens at {path!r}: got {tuple(rows.shape)}, expected {(indices.shape[0], weight.shape[1])}."
        )
    new = interpolate(weight, weight.index_copy(0, indices, rows.to(weight.dtype)), w)
    for module, name in heads:
        swaps.set(slot_of(module, name), name, new)


def heads_of(model: nn.Module, path: str, module: nn.Module) -> list[tuple[nn.Module, str]]:
    """An embedding and every parameter tied to its weight, as PEFT trains them together.

    Args:
        model: the model.
        path: the embedding's path.
        module: the embedding.

    Returns:
        (module, parameter name), the embedding first.
    """
    found: list[tuple[nn.Module, str]] = [(module, "weight")]
    for other in tied_names(model).get(f"{path}.weight", ()):
        owner, _, short = other.rpartition(".")
        found.append((model.get_submodule(owner), short))
    return found
