"""Stacks: N adapters as one value, with a leading adapter axis on every leaf."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from funcadapt import _torch
from funcadapt.adapter import Adapter, Members, TensorTree
from funcadapt.config import AdapterConfig, FrozenDict
from funcadapt.errors import AdapterError, did_you_mean
from funcadapt.method import Leaf, Method, method_of

Site = dict[str, Tensor]


def stack(adapters: Iterable[Adapter]) -> Adapter:
    """N adapters as one: every leaf has a leading axis N.

    The result is an `Adapter` for `torch.func.vmap` (over `fa.functional_call`), `fa.grouped` and `fa.routed`. Ranks
    and alphas may differ: leaves are padded with zeros to the largest rank, which changes nothing, and scalings are
    leaves. So may dropout (in `fa.grouped` and `fa.routed`), and the adapted layers where the method can be neutral.
    Frozen buffers that all have in common are shared, not copied: their adapter axis has stride 0.

    Args:
        adapters: adapters of one method for one model.

    Returns:
        The stack; `members` holds what `unstack` needs to give the adapters back.

    Raises:
        AdapterError: if there are none, or they do not go together: the message names the place.
        TypeError: if something is no adapter.

    Example:
        >>> import torch
        >>> import funcadapt as fa
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> ranks = [1, 2]
        >>> s = fa.stack(fa.init(model, fa.LoraConfig(r=r, lora_alpha=2 * r, target_modules=["0"])) for r in ranks)
        >>> s
        Stack of 2(lora, 1 site, r=2, 28 parameters, float32)
        >>> {name: tuple(leaf.shape) for name, leaf in s.leaves("0").items()}
        {'lora_A': (2, 2, 4), 'lora_B': (2, 3, 2), 'scaling': (2,)}
        >>> [a.config.r for a in fa.unstack(s)]
        [1, 2]
        >>> x = torch.randn(5, 4)
        >>> torch.func.vmap(lambda a: fa.functional_call(model, a, x))(s).shape
        torch.Size([2, 5, 3])
    """
    members = list(adapters)
    if not members:
        raise AdapterError("stack needs at least one adapter.")
    for i, adapter in enumerate(members):
        if not isinstance(adapter, Adapter):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"stack: adapters[{i}] is a {type(adapter).__name__}, expected an Adapter.")
        if adapter.members is not None:
            raise AdapterError(f"stack: adapters[{i}] is a stack already. Use fa.unstack first.")
    method = _one_method(members)
    paths = list(dict.fromkeys(path for adapter in members for path in adapter.params))
    frozen = list(dict.fromkeys(path for adapter in members for path in adapter.buffers))
    params: dict[str, Site] = {}
    buffers: dict[str, Site] = {}
    ranks: dict[str, tuple[int, tuple[int, ...]]] = {}
    for path in dict.fromkeys((*paths, *frozen)):
        leaves, found = _aligned(members, method, path)
        if len(set(found)) > 1:
            ranks[path] = max(found), found
        trainable = {name for adapter in members for name in adapter.params.get(path, ())}
        for name in leaves[0]:
            row = [p[name] for p in leaves]
            if name in trainable:
                params.setdefault(path, {})[name] = pile(row)
            else:
                buffers.setdefault(path, {})[name] = pile(row, share=True)
    configs = tuple(a.config for a in members)
    return Adapter(
        params, buffers, _drops_most(configs), Members(configs, FrozenDict(ranks), _axes(params, buffers, 1))
    )


def unstack(stacked: Adapter) -> list[Adapter]:
    """The adapters that a stack was made of, with their configs, ranks and sites.

    Args:
        stacked: a stack.

    Returns:
        The adapters. Their tensors are views of the stack's.

    Raises:
        AdapterError: if it is no stack.

    Example:
        >>> import torch
        >>> import funcadapt as fa
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> adapters = [fa.init(model, fa.LoraConfig(r=r, target_modules=["0"])) for r in (1, 2)]
        >>> fa.unstack(fa.stack(adapters))
        [Adapter(lora, 1 site, r=1, 7 parameters, float32), Adapter(lora, 1 site, r=2, 14 parameters, float32)]
    """
    return [_member(stacked, i) for i in range(size(stacked))]


def select(stacked: Adapter, index: int | slice | Sequence[int] | Tensor) -> Adapter:
    """One adapter of a stack, or a smaller stack.

    Args:
        stacked: a stack.
        index: a position, for one adapter as `unstack` gives it; a slice, positions or a 1-D tensor of them, for a
            stack. Negative positions count from the end.

    Returns:
        The adapter or the stack.

    Raises:
        AdapterError: if it is no stack, or a position is out of range.

    Example:
        >>> import torch
        >>> import funcadapt as fa
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> s = fa.stack(fa.init(model, fa.LoraConfig(r=2, target_modules=["0"]), seed=i) for i in range(3))
        >>> fa.select(s, 1)
        Adapter(lora, 1 site, r=2, 14 parameters, float32)
        >>> fa.select(s, [2, 0])
        Stack of 2(lora, 1 site, r=2, 28 parameters, float32)
    """
    n = size(stacked)
    assert stacked.members is not None
    if isinstance(index, slice):
        chosen = list(range(*index.indices(n)))
    elif isinstance(index, Tensor) and index.ndim == 0:
        return select(stacked, int(index))
    else:
        chosen = [index] if isinstance(index, int) else [int(i) for i in index]
    for i in chosen:
        if not -n <= i < n:
            raise AdapterError(f"select: position {i} is out of range for a stack of {n}.")
    chosen = [i % n for i in chosen]
    if isinstance(index, int):
        return _member(stacked, chosen[0])
    if not chosen:
        raise AdapterError("select: a stack needs at least one adapter.")

    def pick(leaf: Tensor) -> Tensor:
        if leaf.stride(0) == 0:  # shared, and still shared
            return leaf[:1].expand(len(chosen), *leaf.shape[1:])
        if isinstance(index, slice) and chosen[-1] >= chosen[0]:
            return leaf[index]  # a view
        return pile([leaf[i] for i in chosen])

    members = stacked.members
    ranks = {path: (padded, tuple(r[i] for i in chosen)) for path, (padded, r) in members.ranks.items()}
    configs = tuple(members.configs[i] for i in chosen)
    smaller = stacked.map(pick)
    return smaller.replace(config=_drops_most(configs), members=Members(configs, FrozenDict(ranks), members.ndim))


def repeat(adapter: Adapter, n: int) -> Adapter:
    """A stack of n times the same adapter, without a copy: its adapter axis has stride 0.

    Args:
        adapter: a single adapter.
        n: how many.

    Returns:
        The stack.
    """
    ndim = _axes(adapter.params, adapter.buffers, 0)
    stacked = adapter.map(lambda leaf: leaf.expand(n, *leaf.shape))
    return stacked.replace(members=Members((adapter.config,) * n, FrozenDict(), ndim))


def size(stacked: Adapter) -> int:
    """How many adapters a stack has.

    Args:
        stacked: a stack.

    Returns:
        The length of the adapter axis.

    Raises:
        TypeError: if it is no adapter.
        AdapterError: if it is no stack, or its leaves do not have the adapter axis.
    """
    if not isinstance(stacked, Adapter):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"Expected a stack of adapters, got {type(stacked).__name__}. Use fa.stack([...]).")
    members = stacked.members
    if members is None:
        raise AdapterError("Expected a stack of adapters, got a single one. Use fa.stack([adapter, ...]).")
    if is_single(stacked):
        raise AdapterError("Expected a stack, got one adapter of it: torch.func.vmap took the adapter axis away.")
    n = len(members.configs)
    for tree in (stacked.params, stacked.buffers):
        for path, leaves in tree.items():
            for name, leaf in leaves.items():
                if not leaf.ndim or leaf.shape[0] != n:
                    raise AdapterError(
                        f"A stack of {n} has {name!r} of shape {tuple(leaf.shape)} at {path!r}, expected a leading "
                        f"axis of {n}. Change its size with fa.select and fa.stack."
                    )
    return n


def is_single(adapter: Adapter) -> bool:
    """Whether this is one adapter: also one of a stack, as `torch.func.vmap` hands it out.

    Args:
        adapter: an adapter or a stack.

    Returns:
        Whether its leaves lack the adapter axis.

    Raises:
        AdapterError: if some of them have it and some do not.
    """
    if adapter.members is None:
        return True
    if set(adapter.params) | set(adapter.buffers) != set(adapter.members.ndim):
        raise AdapterError("The sites of this stack were changed since fa.stack made it. Use fa.unstack and fa.stack.")
    extra: set[int] = set()
    for path, (of_params, of_buffers) in adapter.members.ndim.items():
        for tree, ndim in ((adapter.params, of_params), (adapter.buffers, of_buffers)):
            if ndim >= 0:
                extra.add(next(iter(tree[path].values())).ndim - ndim)
    if len(extra) > 1 or not extra <= {0, 1}:
        raise AdapterError(
            "Some leaves of this stack have the adapter axis and some do not. torch.func.vmap must map over all of it, "
            "buffers too: vmap(lambda a: fa.functional_call(model, a, ...))(stack)."
        )
    return extra == {0}


def _axes(params: TensorTree, buffers: TensorTree, extra: int) -> Mapping[str, tuple[int, int]]:
    """How many axes the first param and the first buffer of each site have in one adapter; -1 if there is none."""

    def first(leaves: Leaf | None) -> int:
        return next(iter(leaves.values())).ndim - extra if leaves else -1

    paths = dict.fromkeys((*params, *buffers))
    return FrozenDict({path: (first(params.get(path)), first(buffers.get(path))) for path in paths})


def _drops_most(configs: Sequence[AdapterConfig]) -> AdapterConfig:
    """The config that the hooks of a stack read: it says that there is dropout if any adapter has some."""
    most, method = configs[0], method_of(configs[0])
    for config in configs[1:]:
        if method.dropout(config) > method.dropout(most):
            most = config
    return most


def _one_method(members: Sequence[Adapter]) -> Method:
    """The method, which must be one; and so must be what its hooks read from the configs."""
    first, method = members[0].config, method_of(members[0].config)
    fields = fields_in_common(first, method)
    for i, adapter in enumerate(members[1:], 1):
        other = method_of(adapter.config)
        if other is not method:
            raise AdapterError(f"stack: adapters[0] is {method.name}, adapters[{i}] is {other.name}. Stack one method.")
        for name in fields:
            a, b = getattr(first, name), getattr(adapter.config, name)
            if a != b:
                raise AdapterError(
                    f"stack: {name}={a!r} in adapters[0] and {b!r} in adapters[{i}], but it is not a tensor: it must "
                    "be the same in all of them."
                )
    return method


def fields_in_common(config: AdapterConfig, method: Method) -> list[str]:
    """The fields of a config that the hooks read and that are no leaves: adapters side by side must have the same."""
    names = [f.name for f in dataclasses.fields(config)]
    if method.reads is not None:
        return [name for name in names if name in method.reads]
    free = {f.name for f in dataclasses.fields(AdapterConfig)} | {*config.patterned, *config.patterned.values()}
    return [name for name in names if name not in free]


def _aligned(members: Sequence[Adapter], method: Method, path: str) -> tuple[list[Leaf], tuple[int, ...]]:
    """The leaves of each adapter at one site, brought to one form; and their ranks before that."""
    leaves: list[Leaf] = [adapter.leaves(path) for adapter in members]
    present = next(p for p in leaves if p)
    own = any(name in method.keys for name in present)
    ranks = tuple(a.config.rank(p) if p and own else int(bool(p)) for a, p in zip(members, leaves, strict=True))
    if own and min(ranks) < max(ranks):
        if method.with_rank is not None:
            with_rank, rank = method.with_rank, max(ranks)
            leaves = [
                method.layout(with_rank(p, r, rank)) if p and r < rank else p
                for p, r in zip(leaves, ranks, strict=True)
            ]
        elif min(r for r in ranks if r) < max(ranks):
            raise AdapterError(f"stack: {method.name} has ranks {ranks} at {path!r}, and cannot be padded to one rank.")
    present = next(p for p in leaves if p)
    for i, p in enumerate(leaves):
        if p:
            _check_alike(path, i, present, p)
    missing = [i for i, p in enumerate(leaves) if not p]
    if missing:
        known = {*method.keys, *method.buffers(members[0].config)}
        if method.neutral is None or not own or not known >= present.keys():
            raise AdapterError(
                f"stack: adapters[{missing[0]}] has nothing at {path!r}, and {method.name} has no neutral value for "
                "it. Stack adapters of the same layers."
            )
        ranks = tuple(0 if i in missing else max(r, 1) for i, r in enumerate(ranks))
        neutral = method.neutral(present)
        leaves = [p or neutral for p in leaves]
    return leaves, ranks


def _check_alike(path: str, i: int, first: Leaf, p: Leaf) -> None:
    for name in first:
        if name not in p:
            raise AdapterError(f"stack: adapters[{i}] lacks {name!r} at {path!r}.{did_you_mean(name, p)}")
    for name, leaf in p.items():
        if name not in first:
            raise AdapterError(f"stack: adapters[{i}] has {name!r} at {path!r}, the others do not.")
        like = first[name]
        for what in ("shape", "dtype", "device"):
            a, b = getattr(like, what), getattr(leaf, what)
            if a != b:
                raise AdapterError(
                    f"stack: {name!r} at {path!r} has {what} {_short(b)} in adapters[{i}], and {_short(a)} before. "
                    "Were the adapters made for one model, and in one dtype? Adapter.to converts them."
                )


def _short(value: Any) -> str:
    return str(tuple(value)) if isinstance(value, torch.Size) else str(value)


def pile(row: Sequence[Tensor], share: bool = False) -> Tensor:
    """`torch.stack` that keeps the memory layout; tensors that are the same one are not copied, if `share`."""
    first = row[0]
    if share and first.ndim and all(_same(first, other) for other in row[1:]):
        return first.expand(len(row), *first.shape)
    if first.ndim < 2 or first.is_contiguous():
        return torch.stack([*row])
    order = sorted(range(first.ndim), key=lambda axis: -first.stride(axis))  # e.g. lora_B, stored column by column
    piled = torch.stack([leaf.permute(order) for leaf in row])
    back = [0, *(1 + order.index(axis) for axis in range(first.ndim))]
    return piled.permute(back)


def _same(a: Tensor, b: Tensor) -> bool:
    if a is b:
        return True
    if _torch.values_unknown():
        return False
    return a.shape == b.shape and torch.equal(a, b)


def _member(stacked: Adapter, i: int) -> Adapter:
    members = stacked.members
    assert members is not None
    config = members.configs[i]
    method = method_of(config)
    trees: tuple[dict[str, Site], dict[str, Site]] = ({}, {})
    for path in dict.fromkeys((*stacked.params, *stacked.buffers)):
        whole: Leaf = {name: leaf[i] for name, leaf in stacked.leaves(path).items()}
        if path in members.ranks:
            padded, ranks = members.ranks[path]
            if not ranks[i]:
                continue
            if ranks[i] < padded and method.with_rank is not None:
                whole = {**whole, **method.with_rank(whole, padded, ranks[i])}
        for tree, like in zip(trees, (stacked.params, stacked.buffers), strict=True):
            if path in like:
                tree[path] = {name: whole[name] for name in like[path]}
    return Adapter(*trees, config)
