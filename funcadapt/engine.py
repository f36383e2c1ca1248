"""The engine: adapters put in place on a live model for the duration of a call, and taken away without a trace.

Each site's module gets a `forward` in its `__dict__` that runs `after(p, x, base(before(p, x)))`; leaves that replace
or reparametrise a parameter are swapped into `_parameters`. (A forward hook would break
`torch.compile(fullgraph=True)`; an instance `forward` does not, and module hooks, accelerate's wrapped forwards and
FSDP's hooks keep working.) Everything is restored in reverse order, also if the call raises.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from funcadapt import _torch
from funcadapt._torch import checkpoint
from funcadapt.adapter import Adapter
from funcadapt.binding import ModelState, bind, check_shapes
from funcadapt.compose import Forward, Hooked, Level, Weight, check_dense, dense_levels, interpolate, nest
from funcadapt.errors import AdapterError, BypassWarning, did_you_mean
from funcadapt.factored import Factored
from funcadapt.layer import Layer
from funcadapt.recompute import checkpoint_context
from funcadapt.sites import Site, tied_names

_UNSET: Any = object()


_REENTRANT = (
    "A reentrant activation checkpoint loses the adapters' gradients without a word: it recomputes after the call "
    "is over. Use model.activation_checkpointing_enable(activation_checkpointing_kwargs={'use_reentrant': False}) "
    "(gradient_checkpointing_enable in older transformers), or "
    "torch.utils.checkpoint.checkpoint(..., use_reentrant=False, context_fn=fa.checkpoint_context)."
)


class Installed(Hooked):
    """The outermost level at one site: notes that the site ran.

    It must not refer to its installation: a cycle would leave every call's objects to the garbage collector.
    """

    __slots__ = ("check", "path", "ran")

    def __init__(self, inner: Hooked, path: str, ran: set[str], check: bool) -> None:
        super().__init__(inner.base, inner.level, inner.layer)
        self.path, self.ran, self.check = path, ran, check

    def __call__(self, x: Any = None, /, *args: Any, **kwargs: Any) -> Any:
        """The adapted forward."""
        self.ran.add(self.path)
        if self.check and not torch.is_grad_enabled() and _torch.in_reentrant_checkpoint():
            raise RuntimeError(_REENTRANT)
        level = self.level
        if level.w is not None or x is None:
            return super().__call__(x, *args, **kwargs)
        # the usual case once more, as a call of the parent's costs a tenth of what the engine may cost
        method, layer, p = level.method, self.layer, level.p
        y = self.base(x if method.before is None else method.before(layer, p, x), *args, **kwargs)
        return y if method.after is None else method.after(layer, p, x, y)


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
        if parameters:
            self._override(parameters)
        for module, name, tensor, w in self.bound.replaced:
            self._replace(module, name, tensor, w)
        if self.bound.tokens:
            self._tokens()
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
            self._wrap_checkpoints()

    # -- what to put in place ---------------------------------------------------------------------------

    def _hooked(self, levels: list[Level], site: Site, module: nn.Module, path: str) -> Forward:
        base: Any = module.forward
        below = base.dense if isinstance(base, Hooked) else None  # an outer call's adapters
        inner = nest(base, levels, site, module, below)
        if self.state is None:
            return inner
        self.hooked.append(path)
        # A reentrant checkpoint runs its forward without gradients, though the call was made with them.
        check = torch.is_grad_enabled() and any(t.requires_grad for level in levels for t in level.p.values())
        return Installed(inner, path, self.ran, check)

    def _dense(self, levels: list[Level], site: Site, module: nn.Module) -> None:
        layer = Layer(site, module, levels[0].config)
        weight = layer.canonical(self._value(module, site.parameter))
        bias = self._value(module, site.bias) if site.bias else None
        for level in levels:
            check_dense(level, site, training=module.training)
        weight, new_bias = dense_levels(levels, site, module, weight, bias)
        self._swap(module, site.parameter, layer.stored(weight))
        if new_bias is not bias:
            self._swap(module, site.bias, new_bias)

    def _override(self, parameters: Mapping[str, Tensor]) -> None:
        ties = tied_names(self.model)
        named = (*self.model.named_parameters(remove_duplicate=False), *self.model.named_buffers())
        known = {name: None for name, _ in named}
        for full, tensor in parameters.items():
            if full not in known:
                raise AdapterError(f"parameters names {full!r}, which the model lacks.{did_you_mean(full, known)}")
            for name in (full, *(other for other in ties.get(full, ()) if other not in parameters)):
                owner, _, short = name.rpartition(".")
                self._swap(self.model.get_submodule(owner), short, tensor)

    def _replace(self, module: nn.Module, name: str, tensor: Tensor, w: Weight) -> None:
        old = self._value(module, name)
        if old.shape != tensor.shape:
            check_shapes(self.bound)
        if isinstance(w, Tensor) and w.ndim:
            raise AdapterError(f"weights per row or token cannot act on the whole parameter {name!r}. Use a scalar.")
        self._swap(module, name, interpolate(old, tensor, w))

    def _tokens(self) -> None:
        ties = tied_names(self.model)
        for path, module, rows, indices, w in self.bound.tokens:
            weight = self._value(module, "weight")
            if rows.shape != (indices.shape[0], weight.shape[1]):
                raise AdapterError(
                    f"trainable tokens at {path!r}: got {tuple(rows.shape)}, expected "
                    f"{(indices.shape[0], weight.shape[1])}."
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

    def _wrap_checkpoints(self) -> None:
        """Make Hugging Face's activation checkpoints re-enter the engine when they recompute."""
        if not torch.is_grad_enabled():
            return
        for module in self.model.modules():
            m: Any = module
            if not (m.training and getattr(m, "gradient_checkpointing", False)):
                continue
            function: Any = getattr(m, "_gradient_checkpointing_func", None)
            if not isinstance(function, functools.partial) or function.func is not checkpoint:
                continue
            if _torch.in_functorch():
                raise RuntimeError(
                    "torch.func cannot run through activation checkpoints (neither mode). Call "
                    "model.activation_checkpointing_disable() (gradient_checkpointing_disable() in older "
                    "transformers), or use ordinary autograd: loss.backward()."
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

    def exit(self) -> None:
        """Take everything away, in reverse order. Harmless if it is not in place."""
        if not self._entered:
            return
        self._entered = False
        if self.state is not None and self in self.state.active:
            self.state.active.remove(self)
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

    def check_ran(self, strict: bool, stacklevel: int = 2) -> None:
        """Warn, or raise, if an adapted layer never ran.

        A member of a module list of which nothing ran while another member did is no bypass: an expert that got no
        token, a layer that was dropped.

        Args:
            strict: whether to raise.
            stacklevel: whose line the warning shows, counted from here.

        Raises:
            AdapterError: in strict mode, if a layer was bypassed.
        """
        if len(self.ran) == len(self.hooked):
            return
        missing = [path for path in self.hooked if path not in self.ran and not _skipped(path, self.ran)]
        if not missing:
            return
        names = ", ".join(map(repr, missing[:5])) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        message = (
            f"The adapted layers {names} never ran in this call, so the adapter had no effect there. Either the "
            "model's forward skips them, or their parent reads their weight without calling them: then target the "
            f"weight itself with target_parameters (e.g. '{missing[0]}.weight')."
        )
        if strict:
            raise AdapterError(message)
        warnings.warn(message, BypassWarning, stacklevel=stacklevel)


def _skipped(path: str, ran: set[str]) -> bool:
    member = re.match(r"(.*\.)?\d+(?=\.|$)", path)
    if member is None:
        return False
    inside = f"{member.group()}."
    siblings = re.compile(re.escape(member.group(1) or "") + r"\d+(\.|$)")
    return not any(p.startswith(inside) for p in ran) and any(siblings.match(p) for p in ran)
