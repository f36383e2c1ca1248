"""Calling a model with adapters: `functional_call`, and `applied` for code that calls the model itself."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Generator, Mapping
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from funcadapt import _torch
from funcadapt.adapter import Adapter
from funcadapt.binding import Bound, Entry, check_shapes, state_of
from funcadapt.compose import Weight
from funcadapt.engine import Installation
from funcadapt.errors import AdapterError, did_you_mean
from funcadapt.many import Grouped, Routed
from funcadapt.method import method_of
from funcadapt.recompute import as_it_was, calling
from funcadapt.rows import BY_ROW
from funcadapt.sharing import SHARED
from funcadapt.stacking import is_single

Adapters = Entry | Mapping[str, Entry]
Weights = float | Tensor | Mapping[str, float | Tensor]


def functional_call(
    model: nn.Module,
    adapters: Adapters,
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    weights: Weights | None = None,
    parameters: Mapping[str, Tensor] | None = None,
    inputs: Mapping[str, Tensor] | None = None,
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
        adapters: one adapter, `fa.grouped(...)`, `fa.routed(...)`, or any of them by name; an empty dict is the bare
            model.
        args: positional arguments of the model; a tuple, or a single one.
        kwargs: keyword arguments of the model.
        weights: by adapter name: a number, a 0-d tensor, a vector (one weight per row) or a matrix (one per row and
            token). For a single adapter, just the value.
        parameters: base parameters or buffers by name that replace the model's own in this call, so that base and
            adapter can be differentiated together. Tied ones are replaced together, unless both are given.
        inputs: what a method needs of every call beside the layers' inputs, by name, rows first: Poly's "task_ids".
        strict: whether an adapted layer that never ran is an error rather than a warning.

    Returns:
        What the model returns.

    Raises:
        SiteError: if a leaf fits nothing in the model, or its shape does not fit.
        AdapterError: if a name in `weights`, `parameters` or `inputs` is unknown, a weight cannot act, or in strict
            mode a layer was bypassed.
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
    entries = with_inputs(entries_of(adapters, weights), inputs)
    if compiling:
        installed = Installation(model, entries, parameters, None)
        try:
            installed.enter()
            return model(*positional, **kwargs)
        finally:
            installed.exit()
    with _in_place(model, entries, parameters, strict, stacklevel=5):
        return model(*positional, **kwargs)


@contextlib.contextmanager
def _in_place(
    model: nn.Module,
    entries: list[tuple[str, Entry, Weight]],
    parameters: Mapping[str, Tensor] | None,
    strict: bool,
    stacklevel: int,
) -> Generator[None, None, None]:
    """Adapters in place, under the model's lock; errors explained, bypasses noticed."""
    state = state_of(model)
    with state.lock:
        outer: list[Installation] = list(state.active)
        together = outer and (
            any(o.bound.rows for o in outer) or any(not isinstance(e, Adapter) for _, e, _ in entries)
        )
        if together:  # many adapters do not nest by nesting calls: all act as one
            entries = [entry for o in outer for entry in o.entries] + entries
            parameters = {k: v for p in (*(o.parameters for o in outer), parameters) for k, v in (p or {}).items()}
        with as_it_was(state, ()) if together else contextlib.nullcontext():
            installed = Installation(model, entries, parameters, state)
            try:
                installed.enter()
                with calling(state):
                    yield
            except Exception as error:
                installed.exit()
                _explain(error, installed.bound)
                raise
            finally:
                installed.exit()
        for o in outer if together else ():
            o.ran.update(installed.ran.intersection(o.hooked))
    installed.check_ran(strict, stacklevel)


@contextlib.contextmanager
def applied(
    model: nn.Module,
    adapters: Adapters,
    *,
    weights: Weights | None = None,
    parameters: Mapping[str, Tensor] | None = None,
    inputs: Mapping[str, Tensor] | None = None,
    strict: bool = False,
) -> Generator[nn.Module, None, None]:
    """Adapters applied for the duration of a `with` block, for code that calls the model itself.

    Holds the model's lock for the whole block. Blocks nest: the inner one's adapters go around the outer one's.

    Args:
        model: the model.
        adapters: as in `functional_call`.
        weights: as in `functional_call`.
        parameters: as in `functional_call`.
        inputs: as in `functional_call`.
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
    with _in_place(model, with_inputs(entries_of(adapters, weights), inputs), parameters, strict, stacklevel=6):
        yield model


def _refuse_compiled(model: nn.Module) -> None:
    target: Any = getattr(model, "_orig_mod", model)
    if target is not model:
        raise AdapterError(
            "The model is the result of torch.compile(model), whose compiled code would not see an adapter. Compile "
            "the call: torch.compile(lambda adapter, x: fa.functional_call(model, adapter, (x,)), fullgraph=True)."
        )


def entries_of(adapters: Adapters, weights: Weights | None) -> list[tuple[str, Entry, Weight]]:
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
    if isinstance(adapters, Adapter | Grouped | Routed):
        if isinstance(weights, Mapping):
            raise AdapterError(
                "weights is a dict, but there is one adapter without a name. Pass the weight itself, or a dict of "
                "adapters."
            )
        return [("", _checked(adapters), weights)]
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
        if not isinstance(adapter, Adapter | Grouped | Routed):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"adapters[{name!r}] is a {type(adapter).__name__}, expected an Adapter.")
    return [(name, _checked(adapter), weights.get(name)) for name, adapter in adapters.items()]


def with_inputs(
    entries: list[tuple[str, Entry, Weight]], inputs: Mapping[str, Tensor] | None
) -> list[tuple[str, Entry, Weight]]:
    """The inputs of a call among the leaves of the adapters whose methods read them.

    Args:
        entries: name, adapter and weight of each.
        inputs: name -> tensor, rows first.

    Returns:
        The entries.

    Raises:
        AdapterError: if no method reads an input, or its rows do not fall into equal groups.
    """
    if not inputs:
        return entries
    known = {name for _, entry, _ in entries for name in method_of(_value(entry).config).inputs}
    for name in inputs:
        if name not in known:
            raise AdapterError(f"inputs has {name!r}, which none of the adapters reads.{did_you_mean(name, known)}")
    return [(name, _given(entry, inputs), w) for name, entry, w in entries]


def _value(entry: Entry) -> Adapter:
    return entry if isinstance(entry, Adapter) else entry.stack


def _given(entry: Entry, inputs: Mapping[str, Tensor]) -> Entry:
    adapter = _value(entry)
    own = {name: inputs[name] for name in method_of(adapter.config).inputs if name in inputs}
    if not own:
        return entry
    if isinstance(entry, Grouped):
        n = len(entry.stack.members.configs) if entry.stack.members else 1
        for name, tensor in own.items():
            if not tensor.ndim or tensor.shape[0] % n:
                raise AdapterError(f"inputs[{name!r}] of shape {tuple(tensor.shape)} does not fall into {n} groups.")
            own[name] = tensor.reshape(n, tensor.shape[0] // n, *tensor.shape[1:])
    if isinstance(entry, Routed):
        own = {BY_ROW + name: tensor for name, tensor in own.items()}
    buffers = {**adapter.buffers, SHARED: {**adapter.buffers.get(SHARED, {}), **own}}
    adapter = adapter.replace(buffers=buffers)
    return adapter if isinstance(entry, Adapter) else dataclasses.replace(entry, stack=adapter)


def _checked(entry: Entry) -> Entry:
    if isinstance(entry, Adapter) and not is_single(entry):
        raise AdapterError(
            "A stack of adapters cannot act by itself. Say which row uses which: fa.grouped(stack) or fa.routed(stack, "
            "index); or map over it: torch.func.vmap(lambda a: fa.functional_call(model, a, ...))(stack)."
        )
    return entry


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
