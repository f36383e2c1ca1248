"""Rows: which row of a call belongs to which adapter, and how a method's hooks run for all adapters at once.

The base layer runs once on all rows. Around it, a hook runs with an adapter axis: `torch.func.vmap` of the method's own
pure function, or a hand-written batched form where the method has one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from funcadapt import _torch
from funcadapt.drawing import uniform
from funcadapt.errors import AdapterError
from funcadapt.layer import Layer
from funcadapt.method import Leaf
from funcadapt.sites import Site

if TYPE_CHECKING:
    from funcadapt.compose import Level

HOW = ("gather", "sort", "masked")

BY_ROW = "row by row: "
"""What the names of a call's inputs begin with where adapters are routed: they belong to rows, not to adapters."""

Hook = Callable[..., Tensor]


def choose(groups: int, size: int, n: int, numbers: int, width: int, *, masked: bool, static: bool) -> str:
    """The cheapest way to route: a function of shapes alone, so that a compiled graph holds one path.

    Costs are in float operations: moving a number from or to memory costs as much as 40 of them, calling an operation
    as much as 100,000, and the masked products reach half the speed. Measured on two CPU cores; a GPU has other
    constants, but the same order for the shapes that matter.

    Args:
        groups: how many rows (or tokens, where each chooses for itself) there are.
        size: how many tokens each has.
        n: how many adapters there are.
        numbers: how many numbers one adapter has at this site.
        width: how many numbers a token has going in and coming out.
        masked: whether the method has a masked form.
        static: whether nothing may depend on values, as while compiling.

    Returns:
        "gather": copy each row's leaves and run them as groups of one row. "sort": bring the rows of an adapter
        together, and run groups of equal size. "masked": one product with all adapters, all but one masked.
    """
    tokens, move, call = groups * size, 40, 100_000
    costs = {"gather": 3 * move * groups * numbers + 2 * tokens * numbers + 4 * call}
    if not static:
        leaves = move * groups * numbers * 3 if n > groups else move * n * numbers
        costs["sort"] = 3 * move * tokens * width + leaves + 2 * tokens * numbers + 6 * call
    if masked:
        costs["masked"] = move * n * numbers + 4 * tokens * n * numbers + 4 * call
    return min(costs, key=lambda how: costs[how])


class Buckets(NamedTuple):
    """Rows brought together by adapter, each adapter's padded to as many as any has.

    Attributes:
        adapters: how many buckets there are.
        used: the adapter of each, or None for all in order.
        take: the row in each place of the buckets, or None for all in order.
        back: the place of each row, or None for all in order.
        skipped: which rows have no adapter, or None for no row.
    """

    adapters: int
    used: Tensor | None
    take: Tensor | None
    back: Tensor | None
    skipped: Tensor | None


class Rows:
    """One grouped or routed entry, in one call.

    Attributes:
        n: how many adapters there are.
        index: None for equal groups; else the adapter of each row, (rows), or token, (rows, tokens); -1 for none.
        how: the execution by name, or None for the cheapest.
        may_skip: whether the index may hold -1.
        configs: the config of each adapter.
        seeds: of each adapter's dropout, or None for torch's global generator.
        total: how many rows the model's own inputs have, once it runs.
        compiling: whether dynamo is tracing.
        current: the adapter that acts alone while a module is run adapter by adapter, else None.
    """

    __slots__ = (
        "_cache",
        "_forms",
        "_ids",
        "compiling",
        "configs",
        "current",
        "expand",
        "how",
        "index",
        "may_skip",
        "n",
        "seeds",
        "total",
    )

    def __init__(
        self,
        n: int,
        configs: Sequence[Any],
        *,
        index: Tensor | None = None,
        how: str | None = None,
        may_skip: bool = False,
        seeds: Sequence[int] | None = None,
        expand: bool = False,
    ) -> None:
        self.n, self.configs, self.index, self.how, self.may_skip = n, configs, index, how, may_skip
        self.seeds, self.expand = seeds, expand
        self.total: int | None = None
        self.compiling = False
        self._ids: Sequence[Tensor] = ()
        self.current: int | None = None
        self._cache: dict[Any, Any] = {}
        self._forms: dict[tuple[torch.Size, str], tuple[int, bool]] = {}

    # -- one adapter alone ------------------------------------------------------------------------------

    def alone(self, level: Level, adapter: int) -> Level | None:
        """The level with one of its adapters; None for the bare layer."""
        if adapter < 0:
            return None
        if level.method.inputs:
            raise AdapterError(
                f"{level.method.name} needs inputs for every row, and cannot act in a module that is run adapter by "
                "adapter. Exclude it (exclude_modules)."
            )
        p = {name: leaf[adapter] for name, leaf in level.p.items()}
        return type(level)(level.method, self.configs[adapter], p, level.w)

    # -- all of them ------------------------------------------------------------------------------------

    def all_rows(self, x: Tensor, site: Site) -> Tensor:
        """The input with all rows: one that all rows share, such as positions, is repeated. Its form is checked."""
        total = self.total
        if total is not None and total > 1 and x.ndim and x.shape[0] == 1:
            x = x.expand(total, *x.shape[1:])
        self._form_of(x, site)
        if site.kind == "embedding" and self.total:
            self._check_ids(x, site)
        return x

    def _check_ids(self, x: Tensor, site: Site) -> None:
        """Positions and the like are looked up without an axis of rows, and may be as many as there are rows."""
        square = x.ndim > 1 and x.shape[0] == x.shape[1]
        if x.ndim > 1 and not square:
            return
        alike = [t for t in self._ids if t.numel() == x.numel() and t.shape[0] == self.total]
        if square and not _torch.values_unknown():
            alike = [t for t in alike if torch.equal(t.reshape(x.shape), x)]
        if not alike:
            raise AdapterError(
                f"{site.path!r} looked up ids of shape {tuple(x.shape)}, which are none of the model's inputs, so it "
                f"is unknown whether their first axis are the {self.total} rows. Exclude this layer (exclude_modules), "
                "or use another number of rows than of tokens."
            )

    def begin(self, total: int | None, ids: Sequence[Tensor] = ()) -> None:
        """The model runs, on so many rows, and with such integer inputs."""
        if total != self.total:
            self.total = total
            self._forms.clear()
        self._ids = ids

    def mark(self) -> tuple[Any, ...]:
        """Where this call stands, for a part of it that is run again later."""
        return self.total, self.current, self._ids

    def restore(self, mark: tuple[Any, ...]) -> None:
        """Stand there again."""
        total, self.current, ids = mark
        self.begin(total, ids)

    def _form_of(self, x: Tensor, site: Site) -> tuple[int, bool]:
        if self.compiling:  # sizes may be symbols, which are no keys
            return self._form(x, site)
        key = x.shape, site.kind
        form = self._forms.get(key)
        if form is None:
            form = self._forms[key] = self._form(x, site)
        return form

    def _form(self, x: Tensor, site: Site) -> tuple[int, bool]:
        """Into how many groups an input falls, and whether rows and tokens are two axes of it."""
        least = {"conv1d": 3, "conv2d": 4, "conv3d": 5, "embedding": 1}.get(site.kind, 2)
        got = f"{site.path!r} got an input of shape {tuple(x.shape)}"
        if x.ndim < least:
            raise AdapterError(f"{got}, which has no axis of rows. Grouped and routed adapters need batched inputs.")
        if self.total and x.shape[0] % self.total:
            raise AdapterError(
                f"{got}, but the model's inputs have {self.total} rows, so it is unknown which adapter each row of it "
                "belongs to. Grouped and routed adapters need the rows on the first axis of every adapted layer. "
                "Exclude this layer (exclude_modules)."
            )
        rows = x.shape[0]
        if self.index is None:
            if rows % self.n:
                raise AdapterError(
                    f"{got}: {rows} rows do not fall into {self.n} equal groups, one for each adapter of the stack."
                )
            return self.n, False
        if self.index.ndim == 2:
            if x.shape[:2] == self.index.shape and (x.ndim > 2 or site.kind == "embedding"):
                if site.kind.startswith("conv"):
                    raise AdapterError(f"An index per token cannot act at the convolution {site.path!r}.")
                return self.index.numel(), True
            if rows == self.index.numel():
                return rows, False
            raise AdapterError(
                f"{got}, but the index is for {self.index.shape[0]} rows of {self.index.shape[1]} tokens."
            )
        entries = self.index.shape[0]
        if (rows % entries) if entries else rows:
            raise AdapterError(
                f"{got}, but the index has {entries} entries: expected as many rows, or a multiple (beams, return "
                "sequences), where each entry is for consecutive rows."
            )
        return entries, False

    def run(self, hook: Hook, level: Level, layer: Layer, *tensors: Tensor) -> Tensor:
        """A hook on all rows.

        Args:
            hook: the method's `before` or `after`.
            level: the adapters, leaves (N, ...).
            layer: the layer; its mask, if any, is of the form of x.
            *tensors: x, or x and y; as the layer gets and gives them, and as `all_rows` checked them.

        Returns:
            What the hook returns, rows in the same order.

        Raises:
            AdapterError: if the execution that was asked for is not to be had.
        """
        x = tensors[0]
        count, by_token = self._form_of(x, layer.site)
        if self.index is None:
            return _batched(hook, level, layer, level.p, count, by_token, tensors)
        if not count:
            return tensors[-1]
        how, method = self.how, level.method
        if method.inputs:
            if how == "sort":
                self.values()  # as elsewhere, an error where they are unknown
            how = "gather"  # inputs belong to rows as they come
        if method.couples:
            how = "masked"
        if how is None:
            masked = method.masked is not None and hook is method.after
            static = _torch.values_unknown()
            numbers = sum(leaf.numel() for leaf in level.p.values()) // self.n
            width = layer.site.in_features + layer.site.out_features
            size = tensors[-1].numel() // (count * (layer.site.out_features if len(tensors) == 2 else x.shape[-1]) or 1)
            how = choose(count, size, self.n, numbers, width, masked=masked, static=static)
            if how == "sort" and (take := self.buckets(1).take) is not None and len(take) > 2 * count:
                how = "gather"  # one adapter has most rows, and the others would be padded to as many
        if how == "masked":
            if method.masked is None:
                raise AdapterError(f"{method.name} has no masked form. Use how='gather' or 'sort'.")
            if hook is method.after:
                result: Any = method.masked(layer, level.p, x, tensors[1], self._choice(x.dtype))
                if result is not NotImplemented:
                    return result
            how = "gather"
        if how == "sort":
            return self._sorted(hook, level, layer, count, by_token, tensors)
        p = level.p
        if not self._in_order():
            chosen = self.chosen()
            p = {k: leaf if k.startswith(BY_ROW) else _pick(leaf, chosen) for k, leaf in p.items()}
        if method.inputs:
            given = {k: leaf for k, leaf in p.items() if k.startswith(BY_ROW)}
            p = {k: leaf for k, leaf in p.items() if k not in given}
            p |= {k.removeprefix(BY_ROW): _fold_input(leaf, count) for k, leaf in given.items()}
        out = _batched(hook, level, layer, p, count, by_token, tensors)
        if not self.may_skip:
            return out
        valid = self._kept("valid", lambda index: index >= 0)
        each = out.shape[0] * (out.shape[1] if by_token else 1) // count
        rows = valid if each == 1 else valid.repeat_interleave(each)
        ones = (1,) * (out.ndim - 1 - by_token)
        return torch.where(rows.view(*(out.shape[:2] if by_token else out.shape[:1]), *ones), out, tensors[-1])

    def _choice(self, dtype: torch.dtype) -> Tensor:
        """(groups, N): a 1 where a group has an adapter."""
        if dtype not in self._cache:
            index = self._kept("flat", lambda index: index)
            self._cache[dtype] = F.one_hot(index + 1, self.n + 1)[:, 1:].to(dtype)
        return self._cache[dtype]

    def _sorted(
        self, hook: Hook, level: Level, layer: Layer, count: int, by_token: bool, tensors: Sequence[Tensor]
    ) -> Tensor:
        """Rows brought together by adapter, each adapter's padded to as many as any has."""
        x = tensors[0]
        flat = [t.flatten(0, 1) for t in tensors] if by_token else tensors
        buckets = self.buckets(flat[0].shape[0] // count)
        if not buckets.adapters:
            return tensors[-1]
        p, mask = level.p, layer.mask
        if buckets.used is not None:
            p = {name: _pick(leaf, buckets.used) for name, leaf in p.items()}
        moved = flat if buckets.take is None else [t.index_select(0, buckets.take) for t in flat]
        if mask is not None:
            mask = mask.flatten(0, 1) if by_token else mask
            layer = with_mask(layer, mask if buckets.take is None else mask.index_select(0, buckets.take))
        out = _batched(hook, level, layer, p, buckets.adapters, False, moved)
        if buckets.back is not None:
            out = out.index_select(0, buckets.back)
        if buckets.skipped is not None:
            out = torch.where(buckets.skipped.view(-1, *(1,) * (out.ndim - 1)), flat[-1], out)
        return _torch.unflatten(out, 0, x.shape[:2]) if by_token else out

    # -- what follows from the index, once a call -------------------------------------------------------

    def _kept(self, name: str, make: Callable[[Tensor], Tensor]) -> Tensor:
        if name not in self._cache:
            assert self.index is not None
            self._cache[name] = make(self.index.flatten())
        return self._cache[name]

    def chosen(self) -> Tensor:
        """The adapter of each row; any adapter where there is none."""
        return self._kept("chosen", lambda index: index.clamp(min=0))

    def values(self) -> list[int]:
        """The index as numbers."""
        assert self.index is not None
        if _torch.values_unknown():
            raise AdapterError(
                "how='sort' looks at the values of the index, which torch.compile and torch.func do not know. Use "
                "how='gather' or 'masked' there, or leave how out."
            )
        if "values" not in self._cache:
            self._cache["values"] = [int(i) for i in self.index.flatten().tolist()]  # pyright: ignore
        values: list[int] = self._cache["values"]
        return values

    def _in_order(self) -> bool:
        """Whether row i uses adapter i, of as many: then nothing has to be gathered."""
        if _torch.values_unknown():
            return False
        values = self.values()
        return len(values) == self.n and values == list(range(self.n))

    def buckets(self, size: int) -> Buckets:
        """The rows of each adapter, padded to equal numbers, where each entry of the index is for `size` rows."""
        if ("buckets", size) in self._cache:
            return self._cache["buckets", size]
        values = [adapter for adapter in self.values() for _ in range(size)]
        rows: dict[int, list[int]] = {}
        for row, adapter in enumerate(values):
            if adapter >= 0:
                rows.setdefault(adapter, []).append(row)
        adapters = [*range(self.n)] if 2 * len(rows) > self.n else sorted(rows)  # most of them: all, uncopied
        width = max((len(members) for members in rows.values()), default=0)
        take: list[int] = []
        back = [0] * len(values)
        for adapter in adapters:
            members = rows.get(adapter, [])
            for place, row in enumerate(members):
                back[row] = len(take) + place
            take += members + [0] * (width - len(members))  # padding computes something, and nobody looks
        assert self.index is not None
        device = self.index.device

        def unless_in_order(wanted: list[int], count: int) -> Tensor | None:
            return None if wanted == list(range(count)) else torch.tensor(wanted, device=device)

        self._cache["buckets", size] = made = Buckets(
            len(adapters) if rows else 0,
            unless_in_order(adapters, self.n),
            unless_in_order(take, len(values)),
            unless_in_order(back, len(take)),
            torch.tensor([v < 0 for v in values], device=device) if min(values, default=0) < 0 else None,
        )
        return made

    # -- dropout ----------------------------------------------------------------------------------------

    def mask(self, level: Level, layer: Layer, x: Tensor) -> Tensor | None:
        """The dropout of one call of a site, drawn for each adapter by itself.

        Args:
            level: the adapters.
            layer: the layer, in training mode.
            x: its input.

        Returns:
            Zeros and 1 / (1 - rate), in the form of `x`; None if nothing is dropped.
        """
        if layer.site.kind == "embedding":
            return None
        rates = [level.method.dropout(config) for config in self.configs]
        if not any(rates):
            return None
        count, by_token = self._form_of(x, layer.site)
        view = _fold(x, count, by_token)
        rate = torch.tensor(rates, dtype=torch.float32, device=x.device)
        if self.index is not None:
            rate = rate.index_select(0, self.chosen())
        rate = rate.view(-1, *(1,) * (view.ndim - 1))
        if self.seeds is None or self.index is not None:
            drawn = torch.rand(view.shape, device=x.device)
        else:
            drawn = torch.stack([uniform(seed, layer.site.path, view.shape[1:], x.device) for seed in self.seeds])
        return ((drawn >= rate) / (1 - rate)).to(x.dtype).reshape(x.shape)

    def mask_alone(self, level: Level, layer: Layer, x: Tensor) -> Tensor | None:
        """The same for the adapter that acts alone, if its dropout has a seed; otherwise torch draws as usual."""
        assert self.current is not None
        rate = level.method.dropout(self.configs[self.current])
        if self.seeds is None or not rate or layer.site.kind == "embedding":
            return None
        drawn = uniform(self.seeds[self.current], layer.site.path, x.shape, x.device)
        return ((drawn >= rate) / (1 - rate)).to(x.dtype)


def _pick(leaf: Tensor, index: Tensor) -> Tensor:
    """The leaves of chosen adapters; one that all of them share is not copied."""
    if leaf.stride(0) == 0 and leaf.shape[0]:
        return leaf[:1].expand(index.shape[0], *leaf.shape[1:])
    return leaf.index_select(0, index)


def _fold_input(t: Tensor, count: int) -> Tensor:
    return t.reshape(count, t.shape[0] // count if count else 0, *t.shape[1:])


def _fold(t: Tensor, count: int, by_token: bool) -> Tensor:
    """(rows, ...) as (groups, rows of each, ...)."""
    if by_token:
        return t.flatten(0, 1).unsqueeze(1)
    return t.reshape(count, t.shape[0] // count if count else 0, *t.shape[1:])


def _unfold(out: Tensor, x: Tensor, by_token: bool) -> Tensor:
    out = out.flatten(0, 1)
    return _torch.unflatten(out, 0, x.shape[:2]) if by_token else out


def _fold_mask(layer: Layer, count: int, by_token: bool) -> Tensor | None:
    return None if layer.mask is None else _fold(layer.mask, count, by_token)


def with_mask(layer: Layer, mask: Tensor | None) -> Layer:
    """The layer with the dropout of this call."""
    at = Layer(layer.site, layer.module, layer.config, layer.below)
    at.mask = mask
    return at


def _batched(
    hook: Hook, level: Level, layer: Layer, p: Leaf, count: int, by_token: bool, tensors: Sequence[Tensor]
) -> Tensor:
    """A hook with an adapter axis on the leaves, and rows in as many equal groups as that is long."""
    method = level.method
    if method.grouped is not None and hook is method.after:
        out: Any = method.grouped(layer, p, *tensors)
        if out is not NotImplemented:
            return out

    def one(p: Leaf, mask: Tensor | None, *tensors: Tensor) -> Tensor:
        return hook(layer if mask is None else with_mask(layer, mask), p, *tensors)

    mask = _fold_mask(layer, count, by_token)
    views = [_fold(t, count, by_token) for t in tensors]
    axes = (dict.fromkeys(p, 0), None if mask is None else 0, *(0 for _ in views))
    out = torch.func.vmap(one, in_dims=axes, randomness="different")(dict(p), mask, *views)
    return _unfold(out, tensors[0], by_token)
