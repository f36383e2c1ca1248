"""Binding: which module each leaf of an adapter belongs to, and how it acts there.

Binding walks the model's tree once per set of paths; afterwards a call only checks that the modules are still
the ones it found.
"""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from funcadapt.adapter import Adapter
from funcadapt.compose import Level, Weight
from funcadapt.errors import AdapterError, SiteError, did_you_mean
from funcadapt.many import Grouped, Routed
from funcadapt.method import Method, method_of
from funcadapt.rows import Rows
from funcadapt.sharing import SHARED, shared_of
from funcadapt.sites import Site, describe
from funcadapt.tying import untied

TOKENS, TOKEN_INDICES = "trainable_tokens_delta", "token_indices"
_PLANS_KEPT = 64


class Place(NamedTuple):
    """What is at one path: a module, and the site there if it can have one."""

    path: str
    module: nn.Module
    site: Site | None
    parent: nn.Module | None
    name: str  # of the module in its parent
    weight_read: bool  # the parent is of a kind that may read the weight without calling the module

    def dense(self) -> bool:
        """Whether a hook would be bypassed now."""
        # attention always reads the weight of its out-projection; the fast path of an encoder layer reads those of
        # linear1 and linear2, but never in training
        parent = self.parent
        return self.weight_read and not (isinstance(parent, nn.TransformerEncoderLayer) and parent.training)


Plan = dict[str, Place]
Entry = Adapter | Grouped | Routed
"""What acts in a call: one adapter, or many."""
_NONE: Mapping[str, Tensor] = {}


class _Kept(NamedTuple):
    """A place without a hold on its modules: what is kept of a model must not keep the model."""

    module: weakref.ref[nn.Module]
    site: Site | None
    parent: weakref.ref[nn.Module] | None
    name: str
    weight_read: bool


class ModelState:
    """What belongs to one model while adapters act on it: the lock, who is active, the bindings."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.active: list[Any] = []
        self.plans: dict[tuple[str, ...], dict[str, _Kept]] = {}


_states: weakref.WeakKeyDictionary[nn.Module, ModelState] = weakref.WeakKeyDictionary()
_states_lock = threading.Lock()


def state_of(model: nn.Module) -> ModelState:
    """The state of a model. Models that share a submodule share the state, so they share the lock."""
    state = _states.get(model)
    if state is None:
        with _states_lock:
            modules = list(model.modules())
            known = (found for m in modules if (found := _states.get(m)) is not None)
            state = next(known, None) or ModelState()
            for module in modules:  # parts that were models of their own share the lock from now on
                _states[module] = state
    return state


def plan(model: nn.Module, paths: tuple[str, ...], state: ModelState | None) -> Plan:
    """Where each path leads.

    Args:
        model: the model.
        paths: the paths of an adapter.
        state: where plans are kept; None while compiling, when nothing is kept.

    Returns:
        path -> place, in the order of the paths.

    Raises:
        SiteError: if a path leads nowhere.
    """
    if state is None:
        return {path: _place(model, path) for path in paths}
    key = (str(id(model)), *paths)
    found = _still_there(state.plans.get(key))
    if found is None:
        found = {path: _place(model, path) for path in paths}
        if len(state.plans) >= _PLANS_KEPT:
            state.plans.pop(next(iter(state.plans)))
        state.plans[key] = {
            path: _Kept(
                weakref.ref(p.module),
                p.site,
                None if p.parent is None else weakref.ref(p.parent),
                p.name,
                p.weight_read,
            )
            for path, p in found.items()
        }
    return found


def _still_there(kept: Mapping[str, _Kept] | None) -> Plan | None:
    """The places of an earlier call, unless the model was changed since."""
    if kept is None:
        return None
    found: Plan = {}
    for path, (module_ref, site, parent_ref, name, weight_read) in kept.items():
        module, parent = module_ref(), None if parent_ref is None else parent_ref()
        if module is None or (parent_ref is not None and (parent is None or parent._modules.get(name) is not module)):
            return None
        found[path] = Place(path, module, site, parent, name, weight_read)
    return found


def _place(model: nn.Module, path: str) -> Place:
    owner, _, name = path.rpartition(".")
    parent: nn.Module | None = model
    for part in owner.split(".") if owner else ():
        parent = parent._modules.get(part) if parent is not None else None
    child = model if not path else parent._modules.get(name) if parent is not None else None
    if child is not None:
        try:
            site = describe(model, path)[0]
        except SiteError:
            site = None  # a module whose parameters are trained in full, such as a norm
        weight_read = isinstance(parent, nn.MultiheadAttention | nn.TransformerEncoderLayer)
        return Place(path, child, site, parent if path else None, name, weight_read)
    site, module = describe(model, path)  # a plain parameter, or an error that says what is there
    return Place(path, module, site, None, name, False)


class Whole(NamedTuple):
    """A parameter that an adapter (or each of a stack) holds in full."""

    path: str
    module: nn.Module
    name: str
    tensor: Tensor
    w: Weight
    rows: Rows | None


class Tokens(NamedTuple):
    """Rows of an embedding that an adapter (or each of a stack) trains."""

    path: str
    module: nn.Module
    rows_of: Tensor
    indices: Tensor
    w: Weight
    rows: Rows | None


@dataclasses.dataclass(slots=True)
class Bound:
    """Everything that acts in one call.

    Attributes:
        levels: path -> the adapters at that site, innermost first.
        places: path -> where that is.
        replaced: parameters that an adapter holds in full.
        tokens: trained rows of embeddings.
        rows: the grouped and routed entries.
    """

    levels: dict[str, list[Level]]
    places: Plan
    replaced: list[Whole]
    tokens: list[Tokens]
    rows: list[Rows]


def bind(model: nn.Module, entries: Sequence[tuple[str, Entry, Weight]], state: ModelState | None) -> Bound:
    """Sort the leaves of some adapters by what they do.

    Args:
        model: the model.
        entries: name, adapter and weight of each, innermost first.
        state: the model's state, or None while compiling.

    Returns:
        What acts where.

    Raises:
        SiteError: if a path or a leaf name fits nothing in the model.
    """
    bound = Bound({}, {}, [], [], [])
    for _, entry, w in entries:
        if isinstance(entry, Adapter):
            adapter, rows = entry, None
        else:
            adapter, rows = entry.stack, entry.rows()
            rows.compiling = state is None
            bound.rows.append(rows)
        method = method_of(adapter.config)
        params, buffers = adapter.params, adapter.buffers
        places = plan(model, tuple(params), state)
        for path in buffers:
            if path not in params and not method.rows:  # those say what is tied, which the model says, too
                places = {**places, **plan(model, (path,), state)}
        bound.places.update(places)
        keys = method.keys.keys()
        shared = shared_of(method, params, buffers)
        for path, place in places.items():
            leaves, frozen = params.get(path, _NONE), buffers.get(path, _NONE)
            if shared and path == SHARED:
                leaves = {name: leaf for name, leaf in leaves.items() if name not in shared}
                frozen = {name: leaf for name, leaf in frozen.items() if name not in shared}
            # usually all leaves are the method's
            usual = leaves and keys >= leaves.keys()
            own = leaves if usual else _own_leaves(place, method, leaves, w, bound, frozen, rows)
            # a site can be without trained leaves of its own, where sites share what is trained
            if own or (shared and any(name not in place.module._buffers for name in frozen)):
                if place.site is None or place.site.kind not in method.kinds:
                    raise SiteError(
                        f"{method.name} cannot act at {path!r}, which is a {type(place.module).__name__}. Was this "
                        "adapter made for another model?"
                    )
                p = {**own, **frozen}
                if method.tied:
                    p = untied(p, params, path)
                axis = int(rows is not None)
                if place.site.experts == 1:  # its leaves have no expert axis: a checkpoint cannot tell it from 2-D
                    p = {name: leaf.unsqueeze(axis) if leaf.ndim > axis else leaf for name, leaf in p.items()}
                if shared:
                    experts, here = place.site.experts, shared
                    if method.uses is not None:
                        here = {name: shared[name] for name in method.uses(place.site, p, shared)}
                    p = {**(with_experts(here, experts, axis) if experts else here), **p}
                bound.levels.setdefault(path, []).append(Level(method, adapter.config, p, w, rows))
    return bound


def with_experts(shared: Mapping[str, Tensor], experts: int, axis: int) -> Mapping[str, Tensor]:
    """What sites share, with the expert axis that the leaves of such a site have: a view."""
    return {
        name: leaf.unsqueeze(axis).expand(*leaf.shape[:axis], experts, *leaf.shape[axis:])
        for name, leaf in shared.items()
    }


def _own_leaves(
    place: Place,
    method: Method,
    leaves: Mapping[str, Tensor],
    w: Weight,
    bound: Bound,
    buffers: Mapping[str, Tensor],
    rows: Rows | None,
) -> Mapping[str, Tensor]:
    """The leaves that are the method's; the others are noted in `bound`."""
    keys, module = method.keys, place.module
    own: dict[str, Tensor] = {}
    for name, leaf in leaves.items():
        if name in keys:
            own[name] = leaf
        elif name == TOKENS:
            bound.tokens.append(Tokens(place.path, module, leaf, buffers[TOKEN_INDICES], w, rows))
        elif name in module._parameters or name in module._buffers:  # PEFT's files do not tell which
            bound.replaced.append(Whole(place.path, module, name, leaf, w, rows))
        else:
            known = [*keys, *module._parameters]
            raise SiteError(
                f"{method.name} at {place.path!r} has a leaf {name!r}, which neither the method nor "
                f"{type(module).__name__} has.{did_you_mean(name, known)}"
            )
    for name, leaf in buffers.items():
        if name in module._buffers:
            bound.replaced.append(Whole(place.path, module, name, leaf, w, rows))
    return own


def check_shapes(bound: Bound) -> None:
    """Compare every leaf with what the method would make for the site. For error messages: it is not cheap.

    Args:
        bound: what acts where.

    Raises:
        SiteError: for the first leaf whose shape does not fit.
        AdapterError: for the first whole parameter whose shape does not fit.
    """
    from funcadapt.init import expected_shapes, expected_shared_shapes

    sharing: dict[int, tuple[Level, dict[str, Tensor], list[Site]]] = {}
    for path, levels in bound.levels.items():
        site = bound.places[path].site
        assert site is not None
        for level in levels:
            p = level.p if level.rows is None else {name: leaf[0] for name, leaf in level.p.items()}
            if level.method.share is not None:
                one = {name: leaf[0] for name, leaf in p.items() if leaf.ndim} if site.experts else p
                _, every, table = sharing.setdefault(id(level.config), (level, {}, []))
                every.update(one)  # a site may not use all that is shared
                table.append(site)
            expected = expected_shapes(site, level.method, level.config, p)
            for name, shape in expected.items():
                got = tuple(p[name].shape) if name in p else None
                if got is None:
                    raise SiteError(f"{level.method.name} at {path!r} lacks the leaf {name!r} of shape {shape}.")
                if got != shape:
                    raise SiteError(
                        f"{level.method.name} at {path!r}: {name} has shape {got}, expected {shape} for a {site.kind} "
                        f"of shape {site.shape}. Was this adapter made for another model?"
                    )
    for level, p, table in sharing.values():
        for name, shape in expected_shared_shapes(table, level.method, level.config).items():
            got = tuple(p[name].shape) if name in p else None
            if got != shape:
                raise SiteError(f"What all sites share, {name}, must have shape {shape} by the config, got {got}.")
    for _, module, name, tensor, _, rows in bound.replaced:
        old = module._parameters.get(name, module._buffers.get(name))
        tensor = tensor if rows is None else tensor[0]
        if old is not None and old.shape != tensor.shape:
            raise AdapterError(
                f"The adapter holds a {name!r} of shape {tuple(tensor.shape)} for a {type(module).__name__} whose own "
                f"has shape {tuple(old.shape)}."
            )
