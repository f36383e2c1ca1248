"""The numbers of a bank: slots for adapters of one form, and what fits into them."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import mmap
import sys
from collections.abc import Generator, Mapping

import torch
from torch import Tensor

from funcadapt.adapter import Adapter
from funcadapt.config import AdapterConfig
from funcadapt.errors import AdapterError, SiteError, did_you_mean
from funcadapt.method import Leaf, method_of
from funcadapt.stacking import fields_in_common, pile, repeat

Values = dict[tuple[str, str], Tensor]  # (site path, leaf name) -> values, or the slots for them


@dataclasses.dataclass(frozen=True)
class Held:
    """What a slot holds: the config, and path -> rank of the sites that the adapter has."""

    config: AdapterConfig
    ranks: Mapping[str, int]


@contextlib.contextmanager
def writing() -> Generator[None, None, None]:
    """Leaves are written in any mode of the caller's: what is made here is never an inference tensor."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class Slots:
    """Slots for adapters of one form. Who may use which one, and when, is up to the caller.

    Attributes:
        stack: all of them as a stack.
        ranks: site path -> the largest rank that fits.
        device: where they are.
        leaves: (site path, leaf name) -> the leaf of all slots, a tensor of the stack.
        scalars: (keys, slots) of the 0-d leaves, those of a dtype together.
    """

    @writing()
    def __init__(self, like: Adapter, capacity: int, device: torch.device) -> None:
        self._like, self._method, self.device = like, method_of(like.config), device
        self.ranks = {path: like.config.rank(like.leaves(path)) for path in {**like.params, **like.buffers}}
        self.leaves: Values = {}
        self.scalars: list[tuple[list[tuple[str, str]], Tensor]] = []
        scalars: dict[torch.dtype, list[tuple[str, str]]] = {}
        for path in self.ranks:
            for name, leaf in like.leaves(path).items():
                if leaf.ndim:  # the memory layout is the one that `fa.stack` gives
                    flat = _zeros(capacity * leaf.numel(), leaf.dtype, device)
                    self.leaves[path, name] = flat.as_strided((capacity, *leaf.shape), pile([leaf, leaf]).stride())
                else:
                    scalars.setdefault(leaf.dtype, []).append((path, name))
        # scalings and the like are rows of one matrix, so that a slot's are written at once
        for dtype, keys in scalars.items():
            width = -(-capacity // 16) * 16  # each row is aligned
            rows = _zeros(len(keys) * width, dtype, device).view(len(keys), width)[:, :capacity]
            self.leaves.update(zip(keys, rows, strict=True))
            self.scalars.append((keys, rows.t()))
        params, buffers = (
            {path: {name: self.leaves[path, name] for name in leaves} for path, leaves in tree.items()}
            for tree in (like.params, like.buffers)
        )
        self.stack = repeat(like, capacity).replace(params=params, buffers=buffers)

    @writing()
    def write(self, slot: int, values: Values) -> None:
        """Copy what `fit` gave into a slot."""
        for key, leaf in self.leaves.items():
            leaf[slot].copy_(values[key])

    @writing()
    def adapter(self, slot: int, held: Held) -> Adapter:
        """A copy of the adapter in a slot, as it was before `fit`."""
        with_rank = self._method.with_rank
        trees: tuple[dict[str, Leaf], dict[str, Leaf]] = ({}, {})
        for path, rank in held.ranks.items():
            leaves: Leaf = {name: leaf[slot] for name, leaf in self.stack.leaves(path).items()}
            if with_rank is not None and rank < self.ranks[path]:
                leaves = with_rank(leaves, self.ranks[path], rank)
            leaves = self._method.layout({name: leaf.clone() for name, leaf in leaves.items()})
            for tree, like in zip(trees, (self._like.params, self._like.buffers), strict=True):
                if path in like:
                    tree[path] = {name: leaves[name] for name in like[path]}
        return Adapter(*trees, held.config)

    # -- what fits --------------------------------------------------------------------------------------

    @property
    def needs_model(self) -> bool:
        """Whether a checkpoint alone does not make an adapter."""
        return self._method.derive is not None or self._method.share is not None

    @writing()
    def fit(self, adapter: Adapter) -> tuple[Values, Held]:
        """The leaves of an adapter in the shapes of a slot: checked, padded, neutral where there are none."""
        if not isinstance(adapter, Adapter):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"Expected an Adapter, got {type(adapter).__name__}.")
        if adapter.members is not None:
            raise AdapterError("A slot holds one adapter, got a stack. Add each of fa.unstack(stack).")
        method, config, own = self._method, self._like.config, adapter.config
        if method_of(own) is not method:
            raise AdapterError(f"The bank is for {method.name}, the adapter is {method_of(own).name}.")
        for field in fields_in_common(config, method):
            a, b = getattr(config, field), getattr(own, field)
            if a != b:
                raise AdapterError(f"{field}={b!r} in the adapter and {a!r} in the bank: it must be the same in all.")
        for path in {**adapter.params, **adapter.buffers}:
            if path not in self.ranks:
                raise SiteError(f"The bank has no site {path!r}.{did_you_mean(path, self.ranks)}")
        values: Values = {}
        ranks: dict[str, int] = {}
        for path in self.ranks:
            leaves: Leaf = adapter.leaves(path)
            if leaves:
                leaves, ranks[path] = self._fit_site(path, leaves, own)
            else:
                leaves = self._neutral(path)
            values.update({(path, name): leaf for name, leaf in leaves.items()})
        self._check_finite(values)
        return values, Held(own, ranks)

    def _neutral(self, path: str) -> Leaf:
        method, like = self._method, self._like.leaves(path)
        if method.neutral is None or not {*method.keys, *method.buffers(self._like.config)} >= like.keys():
            raise SiteError(
                f"The adapter has nothing at {path!r}, and {method.name} has no neutral value for it. It must adapt "
                "every layer that the bank does."
            )
        return method.neutral({name: leaf[0] for name, leaf in self.stack.leaves(path).items()})

    def _fit_site(self, path: str, leaves: Leaf, config: AdapterConfig) -> tuple[Leaf, int]:
        like, most, with_rank = self._like.leaves(path), self.ranks[path], self._method.with_rank
        for name in like:
            if name not in leaves:
                raise SiteError(f"The adapter lacks {name!r} at {path!r}, which the bank has.")
        for name, leaf in leaves.items():
            if name not in like:
                raise SiteError(f"The adapter has {name!r} at {path!r}, which the bank does not.")
            if leaf.dtype != like[name].dtype and not (leaf.is_floating_point() and like[name].is_floating_point()):
                raise SiteError(f"{name!r} at {path!r} is of {leaf.dtype}, the bank's of {like[name].dtype}.")
            if leaf.is_meta:
                raise SiteError(f"{name!r} at {path!r} is on the meta device: it has no values.")
        same_form = all(leaf.ndim == like[name].ndim and leaf.numel() for name, leaf in leaves.items())
        rank = config.rank(leaves) if same_form else most
        if rank > most:
            raise SiteError(
                f"The adapter has rank {rank} at {path!r}, the bank's largest is {most}. Make the bank with r={rank}."
            )
        expected: Leaf = like
        if rank < most:
            if with_rank is None:
                raise SiteError(f"{self._method.name} has rank {rank} at {path!r}, and cannot be padded to {most}.")
            try:
                expected = with_rank(like, most, rank)
            except SiteError as error:
                raise SiteError(f"The adapter's rank {rank} cannot be padded to {most} at {path!r}: {error}") from error
        for name, leaf in leaves.items():
            if leaf.shape != expected[name].shape:
                raise SiteError(
                    f"{name!r} at {path!r} has shape {tuple(leaf.shape)}, the bank's has {tuple(expected[name].shape)} "
                    f"(at rank {rank}). Was this adapter made for another model?"
                )
        return with_rank(leaves, rank, most) if with_rank is not None and rank < most else leaves, rank

    def _check_finite(self, values: Values) -> None:
        for (path, name), value in values.items():
            dtype = self.leaves[path, name].dtype
            if not dtype.is_floating_point or math.isfinite(total(value, dtype)):
                continue
            if not value.to(dtype).isfinite().all():
                what = "numbers that are not finite" if not value.isfinite().all() else f"numbers too large for {dtype}"
                raise SiteError(f"{name!r} at {path!r} has {what}.")


def total(value: Tensor, dtype: torch.dtype) -> float:
    """The sum, in the given dtype or wider. If it is finite, so is every number; `isfinite` costs ten times as much."""
    return float(value.to(dtype).sum(dtype=torch.promote_types(dtype, torch.float32)))


def _zeros(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu" or sys.platform == "win32" or not count:
        return torch.zeros(count, dtype=dtype, device=device)
    # torch.zeros writes every page. These are zero by themselves, and take memory when they are first written.
    pages = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype)
