"""Many adapters in one pass: `grouped` and `routed`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from funcadapt import _torch
from funcadapt.adapter import Adapter
from funcadapt.errors import AdapterError
from funcadapt.method import method_of
from funcadapt.pytrees import register_pytree
from funcadapt.rows import HOW, Rows
from funcadapt.stacking import size


@dataclasses.dataclass(frozen=True, eq=False)
class Grouped:
    """A stack whose adapters each act on an equal group of rows. Made by `fa.grouped`.

    Attributes:
        stack: the adapters.
        seeds: of each adapter's dropout, or None.
        expand: whether all groups share one input.
    """

    stack: Adapter
    seeds: tuple[int, ...] | None = None
    expand: bool = False

    def rows(self) -> Rows:
        """Which row belongs to which adapter, for one call."""
        members = self.stack.members
        assert members is not None
        return Rows(len(members.configs), members.configs, seeds=self.seeds, expand=self.expand)


@dataclasses.dataclass(frozen=True, eq=False)
class Routed:
    """A stack, and which of its adapters acts on which row. Made by `fa.routed`.

    Attributes:
        stack: the adapters.
        index: the adapter of each row, (rows), or of each token, (rows, tokens); -1 for the bare base model.
        how: the execution by name, or None for the cheapest.
        may_skip: whether the index may hold -1.
    """

    stack: Adapter
    index: Tensor
    how: str | None = None
    may_skip: bool = True

    def rows(self) -> Rows:
        """Which row belongs to which adapter, for one call."""
        members = self.stack.members
        assert members is not None
        # one graph for any index: what is known of its values must not reach a compiled function
        may_skip = _torch.is_compiling() or self.may_skip
        return Rows(len(members.configs), members.configs, index=self.index, how=self.how, may_skip=may_skip)


def grouped(stack: Adapter, *, seeds: Sequence[int] | None = None, expand: bool = False) -> Grouped:
    """N adapters, each for an equal group of rows: group i of the batch uses adapter i.

    The base model runs once on all N B rows; only the adapters' own arithmetic has an adapter axis. Row b of group i is

        y[i B + b] = after(p[i], x[i B + b], base(before(p[i], x[i B + b])))

    Gradients reach each adapter's part of the stack from its own rows alone, so the sum of N losses trains N
    adapters as if each were alone. Rows must be the first axis of the model's inputs and of every adapted layer's
    input, and the model must treat rows independently (no batch norm in training mode).

    Layers whose weight is read without a call (attention's packed projections, plain parameters, whole modules that
    the adapters hold) run once for each adapter, on its rows.

    Args:
        stack: from `fa.stack`.
        seeds: one for each adapter: the mask of its inputs at a site then depends on (seed, path) alone, not on its
            neighbours. Pass new ones every step. By default torch's global generator draws, as it always does for
            other noise: BOFT's dropped blocks, the samples of PVeRA, MonteCLoRA and Poly.
        expand: whether the call's inputs have B rows that all groups share; the outputs have N B.

    Returns:
        What `fa.functional_call` and `fa.applied` take in an adapter's place.

    Raises:
        AdapterError: if `stack` is none, or there is another number of seeds.

    Example:
        >>> import torch
        >>> import funcadapt as fa
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> config = fa.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        >>> adapters = [fa.init(model, config, seed=i) for i in range(3)]
        >>> x = torch.randn(6, 4)
        >>> y = fa.functional_call(model, fa.grouped(fa.stack(adapters)), x)
        >>> loop = torch.cat([fa.functional_call(model, a, x[2 * i : 2 * i + 2]) for i, a in enumerate(adapters)])
        >>> torch.allclose(y, loop, atol=1e-6)
        True
        >>> fa.functional_call(model, fa.grouped(fa.stack(adapters), expand=True), x).shape
        torch.Size([18, 3])
    """
    n = size(stack)
    if seeds is not None and len(seeds) != n:
        raise AdapterError(f"grouped: got {len(seeds)} seeds for a stack of {n}.")
    return Grouped(stack, None if seeds is None else tuple(int(s) for s in seeds), expand)


def routed(stack: Adapter, index: Tensor | Sequence[int], *, how: str | None = None) -> Routed:
    """N adapters, and which of them each row uses.

    Row i uses adapter `index[i]`, and -1 is the bare base model. An index of shape (rows, tokens) routes every token
    by itself. Where a layer sees k times as many rows as the index has entries (beams, several return sequences,
    rows and tokens flattened into one axis), each entry is for k consecutive ones. Differentiable with respect to
    the stack.

    Args:
        stack: from `fa.stack`, or an `fa.AdapterBank`'s.
        index: integers in [-1, N).
        how: "gather" (each row's leaves are copied, one batched product), "sort" (adapter by adapter; not while
            compiling) or "masked" (one product with all adapters, all but one masked; LoRA-type methods). By default
            the shapes decide, site by site. The masked form multiplies other adapters' numbers by zero, so one that is
            not finite spoils every row.

    Returns:
        What `fa.functional_call` and `fa.applied` take in an adapter's place.

    Raises:
        AdapterError: if `stack` is none, the index is not 1-D or 2-D, not integer or out of range, or `how` is
            unknown, or none for a method whose rows act on each other.

    Example:
        >>> import torch
        >>> import funcadapt as fa
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> config = fa.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        >>> adapters = [fa.init(model, config, seed=i) for i in range(3)]
        >>> x = torch.randn(4, 4)
        >>> y = fa.functional_call(model, fa.routed(fa.stack(adapters), [2, 0, -1, 2]), x)
        >>> torch.allclose(y[0], fa.functional_call(model, adapters[2], x)[0], atol=1e-6)
        True
        >>> torch.equal(y[2], model(x)[2])
        True
    """
    n = size(stack)
    if how is not None and how not in HOW:
        raise AdapterError(f"routed: how must be one of {', '.join(map(repr, HOW))} or None, got {how!r}.")
    if how == "masked" and method_of(stack.config).masked is None:
        raise AdapterError(f"routed: {method_of(stack.config).name} has no masked form. Use how='gather' or 'sort'.")
    if how not in (None, "masked") and method_of(stack.config).couples:
        raise AdapterError(
            f"routed: the rows of {method_of(stack.config).name} act on each other, so how={how!r} would change the "
            "result. Use how='masked', or leave it out."
        )
    device = next(stack.tensors()).device
    if not isinstance(index, Tensor):
        if any(not isinstance(i, int) for i in index):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise AdapterError(f"routed: the index must hold integers, got {list(index)!r}.")
        index = torch.tensor(list(index), dtype=torch.long)
    if index.dtype == torch.bool or index.is_floating_point() or index.is_complex():
        raise AdapterError(f"routed: the index must hold integers, got {index.dtype}.")
    if index.ndim not in (1, 2):
        raise AdapterError(f"routed: the index must be (rows) or (rows, tokens), got shape {tuple(index.shape)}.")
    may_skip = True
    if not _torch.values_unknown() and index.numel():
        low, high = int(index.min()), int(index.max())
        if low < -1 or high >= n:
            raise AdapterError(
                f"routed: index {high if high >= n else low} is out of range for a stack of {n}; -1 is the base model."
            )
        may_skip = low < 0
    return Routed(stack, index.to(device=device, dtype=torch.long), how, may_skip)


def _grouped_children(value: Grouped) -> tuple[list[Any], tuple[Any, ...]]:
    return [value.stack], (value.seeds, value.expand)


def _grouped_from(children: Any, context: Any) -> Grouped:
    seeds, expand = context
    return Grouped(children[0], seeds, expand)


def _routed_children(value: Routed) -> tuple[list[Any], tuple[Any, ...]]:
    return [value.stack, value.index], (value.how,)


def _routed_from(children: Any, context: Any) -> Routed:
    return Routed(children[0], children[1], context[0])  # the index may be another one now, so it may hold -1


def _tuples(value: Any) -> Any:
    """What JSON made lists of."""
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value  # pyright: ignore


register_pytree(Grouped, ["stack"], _grouped_children, _grouped_from, list, _tuples)
register_pytree(Routed, ["stack", "index"], _routed_children, _routed_from, list, _tuples)
