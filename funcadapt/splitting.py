"""Splitting: modules that read a weight themselves run once for each adapter, on that adapter's rows.

The hooks of many adapters need a layer that is called. Attention's packed projections, plain parameters, experts and
modules that an adapter holds in full are not: there the module that owns the weight is run adapter by adapter. The
work of the base model stays the same, as each row goes through once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from funcadapt import _torch
from funcadapt._torch import pytree
from funcadapt.errors import AdapterError
from funcadapt.method import method_of
from funcadapt.rows import Rows
from funcadapt.swapping import Swaps

Assignment = tuple[int, ...]
"""The adapter of each entry, -1 for none."""

Part = tuple[Assignment, slice | Tensor]

_PLAIN = (bool, int, float, complex, str, torch.dtype, torch.device, torch.Size, type(None))
_FIRST = (
    *("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds", "pixel_values", "input_values"),
    *("input_features", "hidden_states", "attention_mask", "x", "input"),
)


class Split:
    """The forward of a module that runs once for each adapter.

    Attributes:
        base: the forward below.
        path: the module's path.
        module: the module.
        rows: the entries.
        swaps: makes the weights for an assignment.
        sites: paths of the sites that this forward serves.
        ran: where it notes that they ran.
    """

    __slots__ = ("base", "module", "path", "ran", "rows", "sites", "swaps")

    def __init__(
        self,
        base: Callable[..., Any],
        path: str,
        module: nn.Module,
        rows: Sequence[Rows],
        swaps: Callable[[Assignment], Swaps],
        sites: Sequence[str],
        ran: set[str],
    ) -> None:
        self.base, self.path, self.module, self.rows, self.swaps = base, path, module, rows, swaps
        self.sites, self.ran = sites, ran

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs of all rows, in their order."""
        self.ran.update(self.sites)
        now = tuple(rows.current for rows in self.rows)
        if None not in now:  # a module inside another one that is split already
            return self._run(tuple(i for i in now if i is not None), args, kwargs)
        first = leading(args, kwargs)
        if first is None:
            raise AdapterError(f"{self.path!r} has grouped or routed adapters, but was called without a tensor.")
        _check_plain(self.path, (args, kwargs))
        count = first.shape[0]
        if all(rows.index is None for rows in self.rows) or not _torch.values_unknown():
            parts, order = self._parts(count)
            _check_unambiguous(self.path, self.module, first, (args, kwargs))
            taken = [_take(self.module, count, part, args, kwargs) for _, part in parts]
            outs = [self._run(assignment, *call) for (assignment, _), call in zip(parts, taken, strict=True)]
            return self._join(outs, [_size(part) for _, part in parts], order)
        if len(self.rows) > 1:
            raise AdapterError(
                f"{self.path!r} is run adapter by adapter, which with several grouped or routed entries needs the "
                "values of the index. Do not compile this call."
            )
        if any(method_of(rows.configs[0]).couples for rows in self.rows):
            raise AdapterError(
                f"{self.path!r} is run adapter by adapter, and the rows of its adapters act on each other: that needs "
                "the values of the index. Do not compile or transform this call."
            )
        return self._all(count, args, kwargs)

    def _run(self, assignment: Assignment, args: Any, kwargs: Mapping[str, Any]) -> Any:
        before = [rows.current for rows in self.rows]
        swaps = self.swaps(assignment)
        for rows, adapter in zip(self.rows, assignment, strict=True):
            rows.current = adapter
        swaps.enter()
        try:
            return self.base(*args, **kwargs)
        finally:
            swaps.exit()
            for rows, adapter in zip(self.rows, before, strict=True):
                rows.current = adapter

    def _adapters(self, rows: Rows, count: int) -> list[int]:
        """The adapter of each row that this module sees."""
        index = range(rows.n) if rows.index is None else rows.values()
        if (count % len(index)) if len(index) else count:
            raise AdapterError(
                f"{self.path!r} got {count} rows, but the grouped or routed adapters are for {len(index)} "
                f"{'groups' if rows.index is None else 'rows' if rows.index.ndim == 1 else 'tokens'}."
            )
        each = count // max(1, len(index))
        return [adapter for adapter in index for _ in range(each)]

    def _parts(self, count: int) -> tuple[list[Part], Tensor | None]:
        """Which rows each assignment gets, and the order that puts them back (None: they are in order)."""
        n = self.rows[0].n
        if all(rows.index is None and rows.n == n for rows in self.rows):
            if count % n:
                raise AdapterError(
                    f"{self.path!r} got {count} rows, which do not fall into {n} equal groups, one for each adapter of "
                    "the stack."
                )
            each = count // n
            return [((i,) * len(self.rows), slice(i * each, (i + 1) * each)) for i in range(n)], None
        found: dict[Assignment, list[int]] = {}
        for row, assignment in enumerate(zip(*(self._adapters(rows, count) for rows in self.rows), strict=True)):
            found.setdefault(assignment, []).append(row)
        if not found:
            return [((-1,) * len(self.rows), slice(0, 0))], None
        device = next((rows.index.device for rows in self.rows if rows.index is not None), None)
        parts: list[Part] = [(a, torch.tensor(members, device=device)) for a, members in found.items()]
        order = torch.argsort(torch.tensor([*itertools.chain(*found.values())], device=device))
        return parts, order

    def _all(self, count: int, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """Where values are not known: every adapter on all rows, and a choice among the outputs."""
        rows = self.rows[0]
        assert rows.index is not None
        index = rows.index.flatten()
        if not index.shape[0] or count % index.shape[0]:
            raise AdapterError(f"{self.path!r} got {count} rows, but the index is for {index.shape[0]}.")
        index = index.repeat_interleave(count // index.shape[0])
        flat, spec = pytree.tree_flatten(self._run((-1,), args, kwargs))
        for adapter in range(rows.n):
            other = pytree.tree_leaves(self._run((adapter,), args, kwargs))
            for i, (a, b) in enumerate(zip(flat, other, strict=True)):
                if isinstance(a, Tensor):
                    self._check_rows(a, count)
                    flat[i] = torch.where((index == adapter).view(-1, *(1,) * (a.ndim - 1)), b, a)
        return pytree.tree_unflatten(flat, spec)

    def _join(self, outs: Sequence[Any], sizes: Sequence[int], order: Tensor | None) -> Any:
        flat = [pytree.tree_flatten(out) for out in outs]
        spec = flat[0][1]
        joined: list[Any] = []
        for pieces in zip(*(leaves for leaves, _ in flat), strict=True):
            if not isinstance(pieces[0], Tensor):
                joined.append(pieces[0])
                continue
            for piece, size in zip(pieces, sizes, strict=True):
                self._check_rows(piece, size)
            whole = torch.cat(pieces)
            joined.append(whole if order is None else whole.index_select(0, order))
        return pytree.tree_unflatten(joined, spec)

    def _check_rows(self, out: Tensor, rows: int) -> None:
        if not out.ndim or out.shape[0] != rows:
            raise AdapterError(
                f"{self.path!r} is run adapter by adapter, and for {rows} rows it returned a tensor of shape "
                f"{tuple(out.shape)}: outputs without the axis of rows cannot be put together."
            )


def _size(part: slice | Tensor) -> int:
    return part.stop - part.start if isinstance(part, slice) else part.shape[0]


def leading(args: Any, kwargs: Mapping[str, Any]) -> Tensor | None:
    """The tensor whose first axis are a call's rows: the first one, or the one under a usual name."""
    for value in (*args, *(kwargs.get(name) for name in _FIRST), *kwargs.values()):
        for leaf in pytree.tree_leaves(value):
            if isinstance(leaf, Tensor) and leaf.ndim:
                return leaf
    return None


def _check_plain(path: str, call: Any) -> None:
    for leaf in pytree.tree_leaves(call):
        if not isinstance(leaf, (Tensor, *_PLAIN)) and not callable(leaf):
            raise AdapterError(
                f"{path!r} must run adapter by adapter, but was called with a {type(leaf).__name__}, which cannot be "
                "split into rows. Adapt the layers inside it rather than a parameter of its own."
            )


def _check_unambiguous(path: str, module: nn.Module, first: Tensor, call: Any) -> None:
    """Where there are as many tokens as rows, another argument of that length could be either."""
    count = first.shape[0]
    if first.ndim < 3 or first.shape[1] != count or isinstance(module, nn.MultiheadAttention):
        return
    others = [leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, Tensor) and leaf is not first]
    if any(leaf.ndim and leaf.shape[0] == count for leaf in others):
        raise AdapterError(
            f"{path!r} must run adapter by adapter, on inputs of {count} rows and {count} tokens: it is unknown "
            f"whether another argument of length {count} goes by row or by token. Pad the batch or the texts."
        )


def _take(
    module: nn.Module, count: int, part: slice | Tensor, args: Any, kwargs: Mapping[str, Any]
) -> tuple[Any, Mapping[str, Any]]:
    """The rows of one adapter in every argument that has rows."""

    def pick(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.ndim or value.shape[0] != count:
            return value
        return value[part] if isinstance(part, slice) else value.index_select(0, part)

    if not isinstance(module, nn.MultiheadAttention):
        return pytree.tree_map(pick, (args, kwargs))
    # its masks have other axes: (tokens, tokens), or (rows * heads, tokens, tokens)
    names = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask")
    named = {**dict(zip(names, args, strict=False)), **kwargs}
    heads = named.get("attn_mask")
    if isinstance(heads, Tensor) and heads.ndim == 3:
        by_row = _torch.unflatten(heads, 0, (count, -1))
        named["attn_mask"] = pick(by_row).flatten(0, 1)
    return args[len(names) :], {k: v if k == "attn_mask" else pick(v) for k, v in named.items()}


class Root:
    """The forward of the whole model: notes how many rows its inputs have, and repeats them if all groups share them.

    Attributes:
        base: the forward below.
        rows: the entries.
    """

    __slots__ = ("base", "rows")

    def __init__(self, base: Callable[..., Any], rows: Sequence[Rows]) -> None:
        self.base, self.rows = base, rows

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own outputs."""
        first = leading(args, kwargs)
        inputs: list[Tensor] = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        count = None if first is None else first.shape[0]
        n = max([0, *(rows.n for rows in self.rows if rows.expand)])
        if n and count is not None:

            def repeat(value: Any) -> Any:
                if not isinstance(value, Tensor) or not value.ndim or value.shape[0] != count:
                    return value
                return value.unsqueeze(0).expand(n, *value.shape).flatten(0, 1)

            args, kwargs = pytree.tree_map(repeat, (args, kwargs))
            inputs = [repeat(leaf) for leaf in inputs]
            count *= n
        for rows in self.rows:
            rows.begin(count, [leaf for leaf in inputs if leaf.ndim and not leaf.is_floating_point()])
        try:
            return self.base(*args, **kwargs)
        finally:
            for rows in self.rows:  # a part of the model may be called by itself, with other rows: an encoder
                rows.begin(None)
