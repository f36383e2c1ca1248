"""The engine: a model called with adapters, and left exactly as it was.

For the duration of a call each site's module gets a `forward` in its `__dict__` that runs
`after(p, x, base(before(p, x)))`; leaves that replace or reparametrise a parameter are swapped into
`_parameters`. (A forward hook would break `torch.compile(fullgraph=True)`; an instance `forward` does not, and module
hooks, accelerate's wrapped forwards and FSDP's hooks keep working.) Everything is restored in `finally`, in
reverse order, also if the call raises.
"""

from __future__ import annotations

import contextlib
import functools
import re
import threading
import warnings
from collections.abc import Generator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from funcadapt import _torch
from funcadapt._torch import checkpoint
from funcadapt.adapter import Adapter
from funcadapt.binding import Bound, ModelState, bind, check_shapes, state_of
from funcadapt.compose import Forward, Hooked, Level, Weight, check_dense, dense, interpolate, nest
from funcadapt.errors import AdapterError, BypassWarning, did_you_mean
from funcadapt.factored import Factored
from funcadapt.layer import Dense, Layer
from funcadapt.sharing import Group, Watch, make_groups
from funcadapt.sites import Site, tied_names

Adapters = Adapter | Mapping[str, Adapter]
Weights = float | Tensor | Mapping[str, float | Tensor]

_thread = threading.local()
_UNSET: Any = object()


def functional_call(
    model: nn.Module,
    adapters: Adapters,
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    weights: Weights | None = None,
    parameters: Mapping[str, Tensor] | None = None,
    strict: bool = False,
) -> Any:
    """Call a model with adapters. The model is never changed: `torch.func.functional_call`, for adapters.

    Several adapters at one site nest in the order of the dict, the first innermost; additive methods sum exactly.
    A weight w interpolates between the layer without and with an adapter, `y + w * (after(x, y) - y)`.

    Dropout acts exactly where the site's module is in training mode. Calls on one model are serialised by a
    re-entrant lock (swapping attributes of a live module is not thread-safe, `torch.func.functional_call`'s
    neither); use `fa.structural_copy` for parallel threads. Works under `torch.func` transforms,
    `torch.compile(fullgraph=True)` and `torch.export`; compile a function that calls this, not the model.

    Activation checkpointing on Hugging Face models works by itself if it is non-reentrant; elsewhere pass
    `context_fn=fa.checkpoint_context` to `torch.utils.checkpoint.checkpoint`. Forward-mode and second-order derivatives
    through scaled dot-product attention need `with fa.math_attention():` around the whole transform.

    Args:
        model: the model.
        adapters: one adapter, or adapters by name; an empty dict is the bare model.
        args: positional arguments of the model; a tuple, or a single one.
        kwargs: keyword arguments of the model.
        weights: by adapter name: a number, a 0-d tensor, a vector (one weight per row) or a matrix (one per row and
            token). For a single adapter, just the value.
        parameters: base parameters or buffers by name that replace the model's own in this call, so that base and
            adapter can be differentiated together. Tied ones are replaced together, unless both are given.
        strict: whether an adapted layer that never ran is an error rather than a warning.

    Returns:
        What the model returns.

    Raises:
        SiteError: if a leaf fits nothing in the model, or its shape does not fit.
        AdapterError: if a name in `weights` or `parameters` is unknown, a weight cannot act, or in strict mode a layer
            was bypassed.
        RuntimeError: if an activation checkpoint would lose the adapters' gradients.

    Example:
        >>> import torch
        >>> import funcadapt as fa
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> adapter = fa.init(model, fa.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False))
        >>> x = torch.randn(3, 4)
        >>> y = fa.functional_call(model, adapter, (x,))
        >>> torch.equal(y, model(x))
        False
        >>> half = fa.functional_call(model, {"a": adapter}, (x,), weights={"a": 0.0})
        >>> torch.equal(half, model(x))
        True
        >>> g = torch.func.grad(lambda p: fa.functional_call(model, adapter.replace(params=p), x).sum())(adapter.params)
        >>> sorted(g["0"])
        ['lora_A', 'lora_B']
    """
    positional: tuple[Any, ...] = args if isinstance(args, tuple) else (args,)  # pyright: ignore
    kwargs = {} if kwargs is None else kwargs
    compiling = _torch.is_compiling()
    _refuse_compiled(model)
    entries = entries_of(adapters, weights)
    if compiling:
        installed = Installation(model, entries, parameters, None)
        try:
            installed.enter()
            return model(*positional, **kwargs)
        finally:
            installed.exit()
    state = state_of(model)
    with state.lock:
        installed = Installation(model, entries, parameters, state)
        try:
            installed.enter()
            result = model(*positional, **kwargs)
        except Exception as error:
            installed.exit()
            _explain(error, installed.bound)
            raise
        finally:
            installed.exit()
    installed.check_ran(strict)
    return result


@contextlib.contextmanager
def applied(
    model: nn.Module,
    adapters: Adapters,
    *,
    weights: Weights | None = None,
    parameters: Mapping[str, Tensor] | None = None,
    strict: bool = False,
) -> Generator[nn.Module, None, None]:
    """Adapters applied for the duration of a `with` block, for code that calls the model itself.

    Holds the model's lock for the whole block. Blocks nest: the inner one's adapters go around the outer one's.

    Args:
        model: the model.
        adapters: as in `functional_call`.
        weights: as in `functional_call`.
        parameters: as in `functional_call`.
        strict: as in `functional_call`.

    Yields:
        The model.

    Example:
        >>> import torch
        >>> import funcadapt as fa
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2))
        >>> adapter = fa.init(model, fa.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
        >>> x = torch.randn(3, 4)
        >>> with fa.applied(model, adapter):
        ...     y = model(x)
        >>> torch.equal(y, fa.functional_call(model, adapter, (x,)))
        True
    """
    _refuse_compiled(model)
    state = state_of(model)
    with state.lock:
        installed = Installation(model, entries_of(adapters, weights), parameters, state)
        try:
            installed.enter()
            yield model
        except Exception as error:
            installed.exit()
            _explain(error, installed.bound)
            raise
        finally:
            installed.exit()
    installed.check_ran(strict)


def _refuse_compiled(model: nn.Module) -> None:
    target: Any = getattr(model, "_orig_mod", model)
    if target is not model:
        raise AdapterError(
            "The model is the result of torch.compile(model), whose compiled code would not see an adapter. Compile "
            "the call: torch.compile(lambda adapter, x: fa.functional_call(model, adapter, (x,)), fullgraph=True)."
        )


def entries_of(adapters: Adapters, weights: Weights | None) -> list[tuple[str, Adapter, Weight]]:
    """Adapters and weights, in every form that `functional_call` takes, as (name, adapter, weight) in order.

    Args:
        adapters: one adapter, or adapters by name.
        weights: a weight, or weights by name.

    Returns:
        The list.

    Raises:
        AdapterError: if the two do not fit together; near matches are listed.
        TypeError: if something is no adapter.
    """
    if isinstance(adapters, Adapter):
        if isinstance(weights, Mapping):
            raise AdapterError(
                "weights is a dict, but there is one adapter without a name. Pass the weight itself, or a dict of adapters."
            )
        return [("", adapters, weights)]
    if not isinstance(adapters, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"Expected an Adapter or a dict of them, got {type(adapters).__name__}.")
    if weights is None:
        weights = {}
    if not isinstance(weights, Mapping):
        raise AdapterError(f"weights must be a dict over the adapters' names: {', '.join(map(repr, adapters))}.")
    for name in weights:
        if name not in adapters:
            raise AdapterError(f"weights names an unknown adapter {name!r}.{did_you_mean(name, adapters)}")
    for name, adapter in adapters.items():
        if not isinstance(adapter, Adapter):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"adapters[{name!r}] is a {type(adapter).__name__}, expected an Adapter.")
    return [(name, adapter, weights.get(name)) for name, adapter in adapters.items()]


class Installed:
    """The outermost forward at one site: notes that the site ran, and lets sites with one input share work.

    It must not refer to its installation: a cycle would leave every call's objects to the garbage collector.
    """

    __slots__ = ("check", "group", "inner", "number", "path", "ran", "watch")

    def __init__(
        self, inner: Hooked, path: str, ran: set[str], check: bool, group: Group | None, watch: Watch | None
    ) -> None:
        self.inner, self.path, self.ran, self.check = inner, path, ran, check
        self.group, self.watch = group, watch if inner.level.method.shared is not None else None
        self.number = group.join(inner.layer, inner.level.p) if group is not None else 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The adapted forward."""
        self.ran.add(self.path)
        if self.check and not torch.is_grad_enabled() and _torch.in_reentrant_checkpoint():
            raise RuntimeError(_REENTRANT)
        inner, group = self.inner, self.group
        if group is not None and args:
            h = group.take(self.number, args[0])
            if h is not None:
                return group.shared.up(inner.layer, inner.level.p, h, inner.base(*args, **kwargs))
        elif self.watch is not None and args:
            self.watch.see(self.path, args[0])
        return inner(*args, **kwargs)

    def dense(self) -> Dense:
        """The dense form of all levels here, for an inner call's adapters."""
        return self.inner.dense()


class Installation:
    """Adapters prepared for one model, that can be put in place and taken away again, more than once.

    More than once, because an activation checkpoint runs parts of the model again in the backward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        entries: Sequence[tuple[str, Adapter, Weight]],
        parameters: Mapping[str, Tensor] | None,
        state: ModelState | None,
    ) -> None:
        self.model, self.state = model, state
        self.bound = bind(model, entries, state)
        self.forwards: list[tuple[nn.Module, Forward]] = []
        self.swaps: dict[tuple[int, str], tuple[dict[str, Any], str, Any]] = {}
        self.ran: set[str] = set()
        self.hooked: list[str] = []
        self._saved_forwards: list[tuple[dict[str, Any], Any]] = []
        self._saved_values: list[tuple[dict[str, Any], str, Any]] = []
        self._entered = False
        self._groups: dict[str, Group] = {}
        self._watch: Watch | None = None
        if parameters:
            self._override(parameters)
        for module, name, tensor, w in self.bound.replaced:
            self._replace(module, name, tensor, w)
        if self.bound.tokens:
            self._tokens()
        if state is not None:
            self._find_groups(state)
        for path, levels in self.bound.levels.items():
            place = self.bound.places[path]
            site = place.site
            assert site is not None
            if site.kind in ("parameter", "experts") and state is not None:
                factored = Factored.create(self._value(place.module, site.parameter), levels, site, place.module)
                self._swap(place.module, site.parameter, factored)
            elif site.kind in ("mha", "parameter", "experts") or place.dense():
                self._dense(levels, site, place.module)
            else:
                self.forwards.append((place.module, self._hooked(levels, site, place.module, path)))
        if state is not None:
            self._wrap_checkpoints(state)

    def _find_groups(self, state: ModelState) -> None:
        """Which sites share an input: known from the first call, or watched for in this one."""
        levels = self.bound.levels
        self._key = tuple(levels)
        known = state.groups.get(self._key)
        if known is None:
            self._watch = Watch()
            return
        shares = {path: only[0].method.shared for path, only in levels.items() if len(only) == 1 and only[0].w is None}
        self._groups = make_groups(known, {path: share for path, share in shares.items() if share is not None})

    # -- what to put in place ---------------------------------------------------------------------------

    def _hooked(self, levels: list[Level], site: Site, module: nn.Module, path: str) -> Forward:
        base: Any = module.forward
        below = base.dense if isinstance(base, Installed | Hooked) else None  # an outer call's adapters
        inner = nest(base, levels, site, module, below)
        if self.state is None:
            return inner
        self.hooked.append(path)
        # A reentrant checkpoint runs its forward without gradients, though the call was made with them.
        check = torch.is_grad_enabled() and any(t.requires_grad for level in levels for t in level.p.values())
        return Installed(inner, path, self.ran, check, self._groups.get(path), self._watch)

    def _dense(self, levels: list[Level], site: Site, module: nn.Module) -> None:
        layer = Layer(site, module, levels[0].config)
        weight = layer.canonical(self._value(module, site.parameter))
        bias = self._value(module, site.bias) if site.bias else None
        new_bias = bias
        for level in levels:
            check_dense(level, site, training=module.training)
            below: Dense = (weight, new_bias)
            layer = Layer(site, module, level.config, lambda below=below: below)
            weight, new_bias = dense(level, layer, weight, new_bias)
        self._swap(module, site.parameter, layer.stored(weight))
        if new_bias is not bias:
            self._swap(module, site.bias, new_bias)

    def _override(self, parameters: Mapping[str, Tensor]) -> None:
        ties = self._ties()
        for full, tensor in parameters.items():
            for name in (full, *(other for other in ties.get(full, ()) if other not in parameters)):
                owner, _, short = name.rpartition(".")
                module = self.model.get_submodule(owner) if full in self._names() else None
                if module is None:
                    raise AdapterError(
                        f"parameters names {full!r}, which the model lacks.{did_you_mean(full, self._names())}"
                    )
                self._swap(module, short, tensor)

    def _names(self) -> list[str]:
        return [n for n, _ in (*self.model.named_parameters(remove_duplicate=False), *self.model.named_buffers())]

    def _ties(self) -> dict[str, tuple[str, ...]]:
        if self.state is None:
            return tied_names(self.model)
        if self.state.ties is None:
            self.state.ties = tied_names(self.model)
        return self.state.ties

    def _replace(self, module: nn.Module, name: str, tensor: Tensor, w: Weight) -> None:
        old = self._value(module, name)
        if old.shape != tensor.shape:
            check_shapes(self.bound)
        if isinstance(w, Tensor) and w.ndim:
            raise AdapterError(f"weights per row or token cannot act on the whole parameter {name!r}. Use a scalar.")
        self._swap(module, name, interpolate(old, tensor, w))

    def _tokens(self) -> None:
        ties = self._ties()
        for path, module, rows, indices, w in self.bound.tokens:
            weight = self._value(module, "weight")
            if rows.shape != (indices.shape[0], weight.shape[1]):
                raise AdapterError(
                    f"trainable tokens at {path!r}: got {tuple(rows.shape)}, expected {(indices.shape[0], weight.shape[1])}."
                )
            new = interpolate(weight, weight.index_copy(0, indices, rows.to(weight.dtype)), w)
            self._swap(module, "weight", new)
            for other in ties.get(f"{path}.weight", ()):  # a tied head shares the trained rows, as in PEFT
                owner, _, short = other.rpartition(".")
                self._swap(self.model.get_submodule(owner), short, new)

    def _slot(self, module: nn.Module, name: str) -> dict[str, Any]:
        return module._parameters if name in module._parameters else module._buffers

    def _value(self, module: nn.Module, name: str) -> Any:
        slot = self._slot(module, name)
        held = self.swaps.get((id(slot), name))
        return slot[name] if held is None else held[2]

    def _swap(self, module: nn.Module, name: str, value: Any) -> None:
        slot = self._slot(module, name)
        self.swaps[id(slot), name] = (slot, name, value)

    def _wrap_checkpoints(self, state: ModelState) -> None:
        """Make Hugging Face's activation checkpoints re-enter the engine when they recompute."""
        if state.checkpointers is None:
            state.checkpointers = [m for m in self.model.modules() if hasattr(m, "gradient_checkpointing")]
        for module in state.checkpointers:
            m: Any = module
            if not (m.gradient_checkpointing and m.training and torch.is_grad_enabled()):
                continue
            function: Any = getattr(m, "_gradient_checkpointing_func", None)
            if not isinstance(function, functools.partial) or function.func is not checkpoint:
                continue
            if _torch.in_functorch():
                raise RuntimeError(
                    "torch.func cannot run through activation checkpoints (neither mode). Call "
                    "model.activation_checkpointing_disable() (gradient_checkpointing_disable() in older transformers), or use "
                    "ordinary autograd: loss.backward()."
                )
            if function.keywords.get("use_reentrant", True):
                raise RuntimeError(_REENTRANT)
            options: dict[str, Any] = {"context_fn": checkpoint_context, **function.keywords}
            wrapped: Any = functools.partial(function, **options)  # pyright: ignore
            slot = m.__dict__
            self.swaps[id(slot), "_gradient_checkpointing_func"] = (slot, "_gradient_checkpointing_func", wrapped)

    # -- in place, and away -----------------------------------------------------------------------------

    def enter(self) -> None:
        """Put everything in place."""
        self._entered = True
        for slot, name, value in self.swaps.values():
            self._saved_values.append((slot, name, slot[name]))
            slot[name] = value
        for module, forward in self.forwards:
            slot = module.__dict__
            self._saved_forwards.append((slot, slot.get("forward", _UNSET)))
            slot["forward"] = forward
        if self.state is not None:
            self.state.active.append(self)
            _active_states().append(self.state)

    def exit(self) -> None:
        """Take everything away, in reverse order. Harmless if it is not in place."""
        if not self._entered:
            return
        self._entered = False
        if self.state is not None and self in self.state.active:
            self.state.active.remove(self)
            _active_states().remove(self.state)
        while self._saved_forwards:
            slot, forward = self._saved_forwards.pop()
            if forward is _UNSET:
                del slot["forward"]
            else:
                slot["forward"] = forward
        while self._saved_values:
            slot, name, value = self._saved_values.pop()
            slot[name] = value

    # -- checks -----------------------------------------------------------------------------------------

    def check_ran(self, strict: bool) -> None:
        """Note what a first call showed; warn, or raise, if an adapted layer never ran.

        A member of a module list of which nothing ran while another member did is no bypass: an expert that got no
        token, a layer that was dropped.
        """
        if self._watch is not None and self.state is not None:
            self.state.groups.setdefault(self._key, self._watch.groups())
        if len(self.ran) == len(self.hooked):
            return
        missing = [path for path in self.hooked if path not in self.ran and not _skipped(path, self.ran)]
        if not missing:
            return
        names = ", ".join(map(repr, missing[:5])) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        message = (
            f"The adapted layers {names} never ran in this call, so the adapter had no effect there. Either the model's "
            "forward skips them, or their parent reads their weight without calling them: then target the weight itself "
            f"with target_parameters (e.g. '{missing[0]}.weight')."
        )
        if strict:
            raise AdapterError(message)
        warnings.warn(message, BypassWarning, stacklevel=3)


_REENTRANT = (
    "A reentrant activation checkpoint loses the adapters' gradients without a word: it recomputes after the call "
    "is over. Use model.activation_checkpointing_enable(activation_checkpointing_kwargs={'use_reentrant': False}) "
    "(gradient_checkpointing_enable in older transformers), or "
    "torch.utils.checkpoint.checkpoint(..., use_reentrant=False, context_fn=fa.checkpoint_context)."
)


def _skipped(path: str, ran: set[str]) -> bool:
    member = re.match(r"(.*\.)?\d+(?=\.|$)", path)
    if member is None:
        return False
    inside = f"{member.group()}."
    siblings = re.compile(re.escape(member.group(1) or "") + r"\d+(\.|$)")
    return not any(p.startswith(inside) for p in ran) and any(siblings.match(p) for p in ran)


def _explain(error: Exception, bound: Bound) -> None:
    """Turn an error from inside the model into one that names the site, if a leaf does not fit it."""
    if not isinstance(error, AdapterError):
        try:
            check_shapes(bound)
        except AdapterError as better:
            raise better from error
    if "scaled_dot_product" in str(error) or "_attention" in str(error):
        error.add_note(
            "funcadapt: forward-mode and second-order derivatives need the math kernel of attention: put "
            "`with fa.math_attention():` around the transform."
        )


def _active_states() -> list[ModelState]:
    states: list[ModelState] = _thread.__dict__.setdefault("states", [])
    return states


def checkpoint_context() -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
    """The `context_fn` of non-reentrant activation checkpointing: the recomputation sees the adapters, too.

    Hugging Face models get it by themselves. Elsewhere it is one argument:
    `torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False, context_fn=fa.checkpoint_context)`.

    Returns:
        A context for the forward pass, and one for the recomputation in the backward pass.

    Example:
        >>> import torch
        >>> import funcadapt as fa
        >>> class Checkpointed(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.block = torch.nn.Linear(4, 4)
        ...     def forward(self, x):
        ...         return torch.utils.checkpoint.checkpoint(
        ...             self.block, x, use_reentrant=False, context_fn=fa.checkpoint_context)
        >>> model = Checkpointed().requires_grad_(False)
        >>> adapter = fa.init(model, fa.LoraConfig(r=2, target_modules=["block"])).map(torch.Tensor.requires_grad_)
        >>> fa.functional_call(model, adapter, torch.randn(3, 4)).sum().backward()
        >>> adapter.params["block"]["lora_B"].grad is not None
        True
    """
    states = _active_states()
    if not states:
        return contextlib.nullcontext(), contextlib.nullcontext()
    state = states[-1]
    return contextlib.nullcontext(), as_it_was(state, tuple(state.active))


@contextlib.contextmanager
def as_it_was(state: ModelState, then: tuple[Installation, ...]) -> Generator[None, None, None]:
    """The installations that were active when a checkpoint ran forward, and no others."""
    if tuple(state.active) == then:
        yield
        return
    if not state.lock.acquire(timeout=60):
        raise RuntimeError(
            "An activation checkpoint waits for the model, which another thread holds. Call backward outside of "
            "`with fa.applied(...)` blocks for other adapters."
        )
    try:
        now: list[Installation] = list(state.active)
        for installed in reversed(now):
            installed.exit()
        for installed in then:
            installed.enter()
        try:
            yield
        finally:
            for installed in reversed(then):
                installed.exit()
            for installed in now:
                installed.enter()
    finally:
        state.lock.release()


def math_attention() -> contextlib.AbstractContextManager[Any]:
    """The switch for forward-mode and second-order derivatives: attention in its math kernel.

    The fused kernels of scaled dot-product attention have no forward-mode and no second derivative.

    Returns:
        A context manager; put it around the whole transform.

    Example:
        >>> import torch
        >>> import funcadapt as fa
        >>> with fa.math_attention():
        ...     pass  # torch.func.jvp, hessian, grad of grad ...
    """
    return cast("contextlib.AbstractContextManager[Any]", sdpa_kernel(SDPBackend.MATH))
