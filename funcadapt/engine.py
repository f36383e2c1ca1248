"""The engine: adapters put in place on a live model for the duration of a call, and taken away without a trace.

Each site's module gets a `forward` in its `__dict__` that runs `after(p, x, base(before(p, x)))`; leaves that replace
or reparametrise a parameter are swapped into `_parameters`. (A forward hook would break
`torch.compile(fullgraph=True)`; an instance `forward` does not, and module hooks, accelerate's wrapped forwards and
FSDP's hooks keep working.) Everything is restored in reverse order, also if the call raises.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from funcadapt import _torch
from funcadapt._torch import checkpoint
from funcadapt.binding import Entry, ModelState, Place, Tokens, Whole, bind, check_shapes
from funcadapt.compose import Forward, Hooked, Level, Weight, nest
from funcadapt.errors import AdapterError, BypassWarning, did_you_mean
from funcadapt.quantised import transformable
from funcadapt.recompute import checkpoint_context
from funcadapt.sites import tied_names
from funcadapt.splitting import Assignment, Root, Split
from funcadapt.swapping import Swaps, heads_of, slot_of, swap_tokens, swap_weight, swap_whole

_UNSET: Any = object()


_REENTRANT = (
    "A reentrant activation checkpoint loses the adapters' gradients without a word: it recomputes after the call "
    "is over. Use model.activation_checkpointing_enable(activation_checkpointing_kwargs={'use_reentrant': False}) "
    "(gradient_checkpointing_enable in older transformers), or "
    "torch.utils.checkpoint.checkpoint(..., use_reentrant=False, context_fn=fa.checkpoint_context)."
)


# Experts that are modules see the tokens that were sent to them, in no order: their block is run adapter by adapter.
_EXPERT = re.compile(r"(.*?)\.?\bexperts\.\d+\.")


@dataclasses.dataclass(slots=True)
class Owner:
    """A module that is run adapter by adapter, and what each adapter puts into it."""

    module: nn.Module
    path: str
    wholes: list[Whole]
    tokens: list[tuple[Tokens, list[tuple[nn.Module, str]]]]
    weights: list[tuple[Place, list[Level]]]


def _owner(owners: dict[int, Owner], module: nn.Module, path: str) -> Owner:
    return owners.setdefault(id(module), Owner(module, path, [], [], []))


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
        if level.w is not None or level.rows is not None or level.method.folds is not None or x is None:
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
        entries: Sequence[tuple[str, Entry, Weight]],
        parameters: Mapping[str, Tensor] | None,
        state: ModelState | None,
    ) -> None:
        self.model, self.state, self.entries, self.parameters = model, state, entries, parameters
        self.bound = bind(model, entries, state)
        self.forwards: dict[int, tuple[nn.Module, Forward]] = {}
        self.swaps = Swaps()
        self.ran: set[str] = set()
        self.hooked: list[str] = []
        self._saved_forwards: list[tuple[dict[str, Any], Any]] = []
        self._entered = False
        self._prepare(parameters)

    # -- what to put in place ---------------------------------------------------------------------------

    def _prepare(self, parameters: Mapping[str, Tensor] | None) -> None:
        bound = self.bound
        if self.state is not None and _torch.in_functorch():
            for module, forward in transformable(self.model):
                if not isinstance(vars(module).get("forward"), Hooked):  # an outer call's adapters
                    self.forwards[id(module)] = module, forward
        if parameters:
            self._override(parameters)
        owners: dict[int, Owner] = {}
        if bound.rows:
            self._rows_first()
        for whole in bound.replaced:
            if whole.rows is None:
                self._replace(self.swaps, whole)
            else:
                _owner(owners, whole.module, whole.path).wholes.append(whole)
        for tokens in bound.tokens:
            heads = heads_of(self.model, tokens.path, tokens.module)
            if tokens.rows is None:
                swap_tokens(self.swaps, tokens.path, heads, tokens.rows_of, tokens.indices, tokens.w)
            else:
                for module, name in heads:
                    path = tokens.path if module is tokens.module else f"{tokens.path} (tied)"
                    _owner(owners, module, path).tokens.append((tokens, [(module, name)]))
        for path, levels in bound.levels.items():
            place = bound.places[path]
            site, many = place.site, any(level.rows is not None for level in levels)
            assert site is not None
            # an encoder layer's fast path is off where rows have different adapters
            inside = place.dense() and not (many and isinstance(place.parent, nn.TransformerEncoderLayer))
            if site.kind in ("mha", "parameter", "experts") or inside:
                if not many:
                    swap_weight(self.swaps, place, levels, factored=self.state is not None)
                    continue
                parent = site.path.rpartition(".")[0]
                owner = (place.parent, parent) if inside and place.parent is not None else (place.module, site.owner)
                _owner(owners, *owner).weights.append((place, levels))
            else:
                self._hook(levels, place)
                if many and (experts := _EXPERT.match(path)):
                    _owner(owners, self.model.get_submodule(experts[1]), experts[1])
        for owner in owners.values():
            self._split(owner)
        if bound.rows:
            self.forwards[id(self.model)] = self.model, Root(self._forward(self.model), bound.rows)
        if self.state is not None:
            self._wrap_checkpoints()

    def _forward(self, module: nn.Module) -> Any:
        """The forward that a module has so far."""
        held = self.forwards.get(id(module))
        return module.forward if held is None else held[1]

    def _hook(self, levels: list[Level], place: Place) -> None:
        module, site, path = place.module, place.site, place.path
        assert site is not None
        base: Any = self._forward(module)
        below = base.dense if isinstance(base, Hooked) else None  # an outer call's adapters
        inner = nest(base, levels, site, module, below)
        if self.state is not None:
            self.hooked.append(path)
            # A reentrant checkpoint runs its forward without gradients, though the call was made with them.
            check = torch.is_grad_enabled() and any(t.requires_grad for level in levels for t in level.p.values())
            inner = Installed(inner, path, self.ran, check)
        self.forwards[id(module)] = module, inner

    def _rows_first(self) -> None:
        """What would hide from many adapters which row is which."""
        for module in self.model.modules():
            if isinstance(module, nn.MultiheadAttention) and not module.batch_first:
                raise AdapterError(
                    "Grouped and routed adapters need the rows on the first axis, but this model has an "
                    "nn.MultiheadAttention with batch_first=False, whose first axis are the tokens."
                )
            if isinstance(module, nn.TransformerEncoderLayer) and not module.training:
                # the switch of its fast path, which would read the weights of its layers without calling them
                self.swaps.set(module.__dict__, "activation_relu_or_gelu", 0)

    def _split(self, owner: Owner) -> None:
        """Run a module adapter by adapter."""
        entries = self.bound.rows

        def weights(assignment: Assignment) -> Swaps:
            # made anew every time: a recomputation must save the same tensors as the first run did
            return self._weights(owner, dict(zip(map(id, entries), assignment, strict=True)))

        sites = [place.path for place, _ in owner.weights]
        if self.state is not None:
            self.hooked.extend(sites)
        base = self._forward(owner.module)
        split = Split(base, owner.path, owner.module, entries, weights, sites, self.ran)
        self.forwards[id(owner.module)] = owner.module, split

    def _weights(self, owner: Owner, adapters: Mapping[int, int]) -> Swaps:
        """What one adapter of each entry puts into a module."""
        swaps = Swaps(self.swaps)
        for whole in owner.wholes:
            adapter = adapters[id(whole.rows)]
            if adapter >= 0:
                self._replace(swaps, whole._replace(tensor=whole.tensor[adapter], rows=None))
        for tokens, heads in owner.tokens:
            adapter = adapters[id(tokens.rows)]
            if adapter >= 0:
                swap_tokens(swaps, tokens.path, heads, tokens.rows_of[adapter], tokens.indices[adapter], tokens.w)
        for place, levels in owner.weights:
            alone = [
                level if level.rows is None else level.rows.alone(level, adapters[id(level.rows)]) for level in levels
            ]
            present = [level for level in alone if level is not None]
            if present:
                swap_weight(swaps, place, present, factored=self.state is not None)
        return swaps

    def _override(self, parameters: Mapping[str, Tensor]) -> None:
        ties = tied_names(self.model)
        named = (*self.model.named_parameters(remove_duplicate=False), *self.model.named_buffers())
        known = {name: None for name, _ in named}
        for full, tensor in parameters.items():
            if full not in known:
                raise AdapterError(f"parameters names {full!r}, which the model lacks.{did_you_mean(full, known)}")
            for name in (full, *(other for other in ties.get(full, ()) if other not in parameters)):
                owner, _, short = name.rpartition(".")
                module = self.model.get_submodule(owner)
                self.swaps.set(slot_of(module, short), short, tensor)

    def _replace(self, swaps: Swaps, whole: Whole) -> None:
        try:
            swap_whole(swaps, whole.module, whole.name, whole.tensor, whole.w)
        except AdapterError:
            check_shapes(self.bound)  # says more, if it is the shape
            raise

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
            self.swaps.set(m.__dict__, "_gradient_checkpointing_func", wrapped)

    # -- in place, and away -----------------------------------------------------------------------------

    def enter(self) -> None:
        """Put everything in place."""
        self._entered = True
        self.swaps.enter()
        for module, forward in self.forwards.values():
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
        self.swaps.exit()

    def mark(self) -> list[Any]:
        """Where the call stands, for a part of it that is run again in the backward pass."""
        return [rows.mark() for rows in self.bound.rows]

    def restore(self, marks: Sequence[Any]) -> None:
        """Stand there again."""
        for rows, mark in zip(self.bound.rows, marks, strict=True):
            rows.restore(mark)

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
