"""How the leaves of one adapter are held in a module: PEFT's names in a state dict.

A key of a checkpoint, "lora_A.weight", becomes `lora_A.<adapter>.weight`: the entry of a ModuleDict. A key of one part,
"ia3_l", becomes `ia3_l.<adapter>`: the entry of a ParameterDict, or of a BufferDict.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Set
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from funcadapt.method import Method, View, _always, methods
from funcadapt.sites import Site
from funcadapt.view.buffer_dict import BufferDict


class Address(NamedTuple):
    """Where a leaf is held: `container.<adapter>.rest`, or `container.<adapter>`."""

    leaf: str
    container: str
    rest: str


@functools.cache
def view_of(method: Method) -> View:
    """A method's view: its own, or what follows from its config and its keys.

    Args:
        method: the method.

    Returns:
        The view.

    Example:
        >>> import funcadapt as fa
        >>> view_of(fa.method_of(fa.IA3Config())).prefix
        'ia3_'
    """
    if method.view is not None:
        return method.view
    named = next((m for m in methods() if m.config is method.config and m.view is not None), None)
    if named is not None:
        assert named.view is not None
        return named.view
    name = method.config.__name__.removesuffix("Config")
    firsts = {key.partition("_")[0] for key in method.keys.values()}
    prefix = f"{firsts.pop()}_" if len(firsts) == 1 else f"{method.name}_"
    return View(package=method.config.peft_type.lower(), name=name, prefix=prefix)


DERIVED = "derived_leaves"
"""The dict of a layer for leaves that no checkpoint holds, see `Method.derive`."""


@functools.cache
def addresses(method: Method) -> tuple[Address, ...]:
    """Where each leaf of a method can be held. A star stands for what the leaves are numbered by."""
    view = view_of(method)
    names = {**method.keys, **method.shared}
    names |= {leaf: held for leaf, held in view.held.items() if leaf in names}
    names |= {leaf: view.held.get(leaf, leaf) for leaf in view.frozen | view.buffers if leaf not in names}
    return tuple(Address(leaf, name.partition(".")[0], name.partition(".")[2]) for leaf, name in names.items())


@functools.cache
def family_addresses(view: View) -> tuple[Address, ...]:
    """The addresses of all methods that share a view, in the order in which the dicts print."""
    found = dict.fromkeys(a for method in methods() if view_of(method) is view for a in addresses(method))
    order = {name: i for i, name in enumerate(view.containers)}
    return tuple(sorted(found, key=lambda a: order.get(a.container, len(order))))


@functools.cache
def standard_containers(view: View) -> tuple[str, ...]:
    """The dicts that every layer has. Those of a variant alone, as KaSA is of LoRA, come with its first adapter."""
    plain = [m for m in methods() if view_of(m) is view and m.when is _always]
    everywhere = {*view.containers, *(a.container for method in plain for a in addresses(method))}
    return tuple(dict.fromkeys(a.container for a in family_addresses(view) if a.container in everywhere))


@functools.cache
def is_derived(view: View) -> bool:
    """Whether every layer holds leaves that no checkpoint holds."""
    own = [method for method in methods() if view_of(method) is view and method.when is _always]
    return any(method.derive is not None or method.share is not None or method.inputs for method in own)


@functools.cache
def shared_containers(view: View) -> tuple[str, ...]:
    """The dicts that all layers of a model have in common."""
    own = [method for method in methods() if view_of(method) is view]
    return tuple({a.container: None for method in own for a in addresses(method) if a.leaf in method.shared})


def is_hidden(view: View, container: str) -> bool:
    """Whether a dict of a layer is out of the model's lists of names: no submodule, but it moves with the layer."""
    return container == DERIVED or container in view.hidden


def held_by(layer: nn.Module, container: str) -> Any:
    """A dict of a layer, a hidden one too; None if the layer has none of that name."""
    found = layer._modules.get(container)
    return layer.__dict__.get(container) if found is None else found


class ByPart(nn.ModuleDict):
    """A dict of dicts in which the adapter's name comes last: `frod_V.<part>.<adapter>`."""

    def put(self, name: str, parts: Mapping[str, Tensor]) -> None:
        """Hold the buffers of one adapter.

        Args:
            name: the adapter's name.
            parts: part -> tensor.
        """
        for part, value in parts.items():
            if part not in self:
                self[part] = BufferDict(persistent=True)
            self._modules[part][name] = value  # pyright: ignore[reportIndexIssue, reportOptionalSubscript]

    def parts_of(self, name: str) -> list[str]:
        """The parts that an adapter has."""
        return [part for part, held in self._modules.items() if name in held._buffers]  # pyright: ignore

    def drop(self, name: str) -> None:
        """Forget an adapter, and the parts that no other one has."""
        for part in self.parts_of(name):
            held: Any = self._modules[part]
            del held[name]
            if not held:
                del self[part]


def new_containers(view: View) -> dict[str, nn.Module]:
    """The empty dicts of a new layer, by name."""
    made = {name: _container(view, name) for name in standard_containers(view)}
    made |= {name: kind() for name, kind in view.empty.items()}
    made = {name: made[name] for name in dict.fromkeys((*view.containers, *made)) if name in made}
    return {**made, DERIVED: nn.ModuleDict()} if is_derived(view) else made


def _container(view: View, name: str) -> nn.Module:
    """An empty dict. One of leaves that a method of the family trains holds parameters."""
    own = [method for method in methods() if view_of(method) is view]
    leaf, _, rest = next(a for a in family_addresses(view) if a.container == name)
    kinds = {method.is_constant(leaf) for method in own if leaf in method.keys or leaf in method.shared}
    if rest:
        return ByPart() if name in view.hidden else nn.ModuleDict()
    return BufferDict(persistent=True) if leaf in view.buffers or kinds == {True} else nn.ParameterDict()


def _container_in(layer: Any, view: View, name: str) -> Any:
    """A dict of a layer, which is made if the layer has none."""
    held = held_by(layer, name)
    if held is None:
        held = nn.ModuleDict() if name == DERIVED else _container(view, name)
        (layer.__dict__ if is_hidden(view, name) else layer._modules)[name] = held
        attribute = "other_param_names" if name == DERIVED else "adapter_layer_names"
        setattr(layer, attribute, (*getattr(layer, attribute), name))
    return held


class Entry(nn.Module):
    """The entry of a ModuleDict that is no layer: it only holds parameters."""

    def __init__(self, label: str = "") -> None:
        super().__init__()
        self._label = label

    def _get_name(self) -> str:
        return self._label or "Entry"


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """An `nn.Linear` that holds given values, without drawing others first."""
    made = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(made)
    made.out_features, made.in_features = weight.shape
    made.register_parameter("weight", nn.Parameter(weight))
    made.register_parameter("bias", None if bias is None else nn.Parameter(bias))
    return made


def entry_of(
    view: View,
    site: Site,
    base: nn.Module,
    container: str,
    parts: Mapping[str, Tensor],
    buffers: Set[str] = frozenset(),
) -> nn.Module:
    """The entry of a ModuleDict for the leaves in it.

    Args:
        view: the method's view.
        site: the site.
        base: the layer that is wrapped.
        container: the dict's name.
        parts: the rest of each leaf's name -> value.
        buffers: those of them that are held as buffers.

    Returns:
        The module.
    """
    made = view.holder(site, base, container, parts)
    if made is not None:
        return made
    weight = parts.get("weight")
    if weight is not None and weight.ndim == 2 and parts.keys() <= {"weight", "bias"}:
        return linear(weight, parts.get("bias"))
    made = Entry(view.entries.get(f"{container}:{site.kind}", view.entries.get(container, "")))
    for name, value in parts.items():
        owner, last = _owner(made, name)
        if name in buffers:
            owner.register_buffer(last, value)
        else:
            owner.register_parameter(last, nn.Parameter(value))
    return made


def _owner(entry: nn.Module, name: str) -> tuple[nn.Module, str]:
    *path, last = name.split(".")
    for part in path:
        if part not in entry._modules:
            entry.add_module(part, Entry())
        entry = entry._modules[part]  # pyright: ignore[reportAssignmentType]
    return entry, last


def put(layer: nn.Module, method: Method, site: Site, base: nn.Module, name: str, leaves: Mapping[str, Tensor]) -> None:
    """Make the entries of an adapter in the dicts of a layer.

    Args:
        layer: the layer.
        method: the adapter's method.
        site: the site.
        base: the layer that is wrapped.
        name: the adapter's name.
        leaves: the values; they become parameters (or buffers) as they are, without a copy.
    """
    view = view_of(method)
    grouped: dict[str, dict[str, Tensor]] = {}
    frozen_parts: dict[str, set[str]] = {}
    derived = nn.Module()
    for leaf, value in leaves.items():
        address = address_of(method, leaf)
        if address is None:
            if leaf not in view.derived:
                derived.register_buffer(leaf, value, persistent=False)
            continue
        _, container, rest = address
        held: Any = _container_in(layer, view, container)
        if leaf in method.shared and take(held, name, rest) is not None:
            continue  # another layer has put it there
        constant = leaf in view.buffers or method.is_constant(leaf)
        if constant and isinstance(held, nn.ParameterDict):  # other methods of the family train it
            held[name] = nn.Parameter(value, requires_grad=False)
            continue
        if rest:
            grouped.setdefault(container, {})[rest] = value
            if constant:
                frozen_parts.setdefault(container, set()).add(rest)
            continue
        frozen = leaf in view.frozen
        value = value.reshape(1) if frozen and not value.ndim else value  # PEFT has no 0-d ones
        held[name] = value if constant else nn.Parameter(value, requires_grad=not frozen)
    for container, parts in grouped.items():
        held = held_by(layer, container)
        if isinstance(held, ByPart):
            held.put(name, parts)
            continue
        held._modules[name] = entry_of(view, site, base, container, parts, frozen_parts.get(container, frozenset()))
    if derived._buffers:
        _container_in(layer, view, DERIVED)._modules[name] = derived


def unsaved(layer: Any, method: Method, config: Any, path: str, name: str, leaves: Mapping[str, Tensor]) -> None:
    """Keep frozen leaves out of state dicts that the config keeps out of checkpoints, as in PEFT.

    Args:
        layer: the layer, which holds the leaves.
        method: the adapter's method.
        config: its config.
        path: the site's path.
        name: the adapter's name.
        leaves: its leaves.
    """
    view = view_of(method)
    for leaf, value in leaves.items():
        if not (leaf in view.buffers or method.is_constant(leaf)):
            continue
        address = address_of(method, leaf)
        if address is None or not is_left_out(method, config, path, leaf, value):
            continue
        held = held_by(layer, address.container)
        if isinstance(held, ByPart):
            held = held[address.rest]
        if name in held._buffers:
            held._non_persistent_buffers_set.add(name)


def is_left_out(method: Method, config: Any, path: str, leaf: str, value: Tensor) -> bool:
    """Whether the checkpoints of a config lack a leaf.

    Args:
        method: the method.
        config: the config.
        path: the site's path.
        leaf: the leaf's name.
        value: its value.

    Returns:
        Whether they do.
    """
    if leaf not in method.keys and leaf not in method.shared:
        return True
    if method.stored is None:
        return False
    return method.stored(config, "" if leaf in method.shared else path, {leaf: value}).get(leaf, value) is None


def is_saved(layer: nn.Module, address: Address, name: str) -> bool:
    """Whether a leaf is in the state dict of its layer.

    Args:
        layer: the layer.
        address: where the leaf is.
        name: the adapter's name.

    Returns:
        Whether it is. What a tuner holds for its layers is not.
    """
    held = layer._modules.get(address.container)
    if held is None:
        return False
    return bool(address.rest) or name not in held._non_persistent_buffers_set


def address_of(method: Method, leaf: str) -> Address | None:
    """Where a leaf is held, or None if no checkpoint has it."""
    numbered = leaf.rpartition(".")
    for address in addresses(method):
        if address.leaf == leaf:
            return address
        if address.leaf == f"{numbered[0]}.*":
            return Address(leaf, address.container, address.rest.replace("*", numbered[2]))
    return None


def present(layer: nn.Module, known: tuple[Address, ...], name: str) -> tuple[Address, ...]:
    """Where an adapter has leaves in a layer.

    Args:
        layer: the layer.
        known: where its method can have some.
        name: the adapter's name.

    Returns:
        The addresses, numbered ones one by one, with those of leaves that no checkpoint holds.
    """
    found: list[Address] = []
    for address in known:
        stem, star, after = address.rest.partition("*")
        held = held_by(layer, address.container)
        if held is None:
            continue
        if not star:
            if take(held, name, address.rest) is not None:
                found.append(address)
            continue
        if isinstance(held, ByPart):
            found += [Address(address.leaf.replace("*", n), address.container, n) for n in held.parts_of(name)]
            continue
        entry = held._modules.get(name)
        for part in stem.split(".")[:-1]:
            entry = None if entry is None else entry._modules.get(part)
        if entry is not None:
            numbers = entry._modules if after else [*entry._parameters, *entry._buffers]
            found += [
                Address(address.leaf.replace("*", n), address.container, address.rest.replace("*", n)) for n in numbers
            ]
    derived = held_by(layer, DERIVED)
    kept = None if derived is None else derived._modules.get(name)
    return (*found, *(Address(leaf, DERIVED, leaf) for leaf in (kept._buffers if kept is not None else ())))


def take(container: nn.Module, name: str, rest: str) -> Tensor | None:
    """The live tensor at an address, or None if the adapter has none there."""
    if not rest:
        found = container._parameters.get(name)
        return container._buffers.get(name) if found is None else found
    if isinstance(container, ByPart):
        part = container._modules.get(rest)
        return None if part is None else part._buffers.get(name)
    entry = container._modules.get(name)
    *path, last = rest.split(".") if "." in rest else (rest,)
    for part in path:
        entry = None if entry is None else entry._modules.get(part)
    if entry is None:
        return None
    found = entry._parameters.get(last)
    # sharding and functional calls keep it as a plain attribute
    return found if found is not None else getattr(entry, last, None)


def set_buffer(container: nn.Module, name: str, rest: str, value: Tensor) -> None:
    """Put another tensor in the place of a buffer at an address."""
    if isinstance(container, ByPart):
        owner, last = container[rest], name
    else:
        owner, last = _owner(container._modules[name], rest) if rest else (container, name)  # pyright: ignore
    owner._buffers[last] = value


def dropout_module(rate: float) -> nn.Module:
    """The entry of the dict of dropout modules, as PEFT makes it."""
    return nn.Dropout(p=rate) if rate > 0 else nn.Identity()


def scalar(value: Any, like: Tensor) -> Tensor:
    """A number of a layer as the 0-d leaf that the pure functions read."""
    if isinstance(value, Tensor):
        return value.to(dtype=like.dtype, device=like.device)
    return torch.full((), value, dtype=like.dtype, device=like.device)  # torch.jit.trace warns of torch.tensor
