"""Checkpoints of one layout, read straight into the slots of a bank."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import threading
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from funcadapt.adapter import Adapter
from funcadapt.checkpoint import CONFIG, DTYPES, WEIGHTS, names_in, read_config
from funcadapt.config import AdapterConfig
from funcadapt.errors import AdapterError
from funcadapt.keys import decode
from funcadapt.method import method_of
from funcadapt.slots import Held, Slots, total, writing
from funcadapt.stacking import fields_in_common

_PLANS_KEPT, _CONFIGS_KEPT = 64, 1024
_MAX_HEADER, _MAX_NUMBERS = 2**24, 2**25  # larger files are read the plain way: there, moving the bytes is all it takes
_PART = 32_000  # numbers that are read at a time: they stay in the cache, and torch sums as few in the calling thread

_Place = tuple[int, tuple[int, ...]]  # where a tensor starts in the file, in numbers, and its shape


class NoPlanError(Exception):
    """The file must be read the plain way, which also says what is wrong with it."""


@dataclasses.dataclass(frozen=True)
class Head:
    """What a checkpoint says about its numbers: the bytes of the config and of the header, and how many follow."""

    config: bytes
    header: bytes
    size: int

    @classmethod
    def read(cls, folder: Path) -> Head | None:
        """The head of a checkpoint, or None if the plain way must look at it."""
        try:
            with open(folder / CONFIG, "rb", buffering=0) as file:
                config = file.read(_MAX_HEADER)
            with open(folder / WEIGHTS, "rb", buffering=0) as file:
                size = int.from_bytes(file.read(8), "little")
                header = file.read(size) if size < _MAX_HEADER else b""
                rest = os.fstat(file.fileno()).st_size - 8 - size
        except OSError:
            return None
        return cls(config, header, rest) if len(header) == size and rest > 0 and len(config) < _MAX_HEADER else None


@dataclasses.dataclass(frozen=True, eq=False)
class _Plan:
    """How the bytes of files of one layout become a slot.

    Attributes:
        dtype: of the numbers in the file.
        ranks: what `Held` remembers.
        copies: (slots, place in the file) of the tensors; of a leaf, what is not padding.
        constants: (slots, value) for what follows from the config, such as scalings.
        zeros: slots that are zero: padding, and neutral leaves.
        narrowest: of the file's and the leaves' dtypes, the one with the smallest range.
    """

    dtype: torch.dtype
    ranks: Mapping[str, int]
    copies: list[tuple[Tensor, _Place]]
    constants: list[tuple[Tensor, Tensor]]
    zeros: list[Tensor]
    narrowest: torch.dtype


def _plan(slots: Slots, head: Head, adapter: Adapter) -> _Plan | None:
    """The plan for files like one that was read the plain way; None if more is to be done than copying tensors.

    Nothing is assumed of the method: random numbers take the file's way through `decode` and `fit`, and the plan must
    explain every one that comes out.

    Args:
        slots: where they go.
        head: the file's names and shapes.
        adapter: what `fa.load` made of it.

    Returns:
        The plan, or None.
    """
    entries: dict[str, Any] = json.loads(head.header)
    metadata: dict[str, str] = entries.pop("__metadata__", {})
    places = _places(entries, head.size)
    if places is None:
        return None
    dtype, tensors = places
    marks = torch.rand(head.size // dtype.itemsize, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    marked = {key: (marks[start : start + math.prod(s)] - 0.5).view(s) for key, (start, s) in tensors.items()}
    by_mark = {float(tensor.reshape(-1)[0]): key for key, tensor in marked.items()}
    order, known = names_in(metadata, "target_parameters"), names_in(metadata, "buffers")
    params, buffers = decode(marked, adapter.config, method_of(adapter.config), order, None, known or ())
    if buffers or len(by_mark) < len(marked):
        return None
    values, held = slots.fit(Adapter(params, adapter.buffers, adapter.config))
    copies: list[tuple[Tensor, _Place]] = []
    constants: list[tuple[Tensor, Tensor]] = []
    zeros: list[Tensor] = []
    narrowest = dtype
    for (path, name), value in values.items():
        leaf = slots.leaves[path, name]
        if name not in params.get(path, {}):  # it follows from the config
            if value.ndim and not value.any():
                zeros.append(leaf)
            elif value.ndim:
                constants.append((leaf, value.to(slots.device)))
            continue
        key = by_mark.pop(float(value.reshape(-1)[0]), "")
        if key not in marked or marked[key].ndim != value.ndim or not value.ndim:
            return None
        source = marked[key]
        box = tuple(slice(n) for n in source.shape)
        short = [d for d in range(value.ndim) if source.shape[d] < value.shape[d]]
        if len(short) > 1 or value.count_nonzero() != source.numel() or not torch.equal(value[box], source):
            return None
        copies.append((leaf[(slice(None), *box)], tensors[key]))
        zeros += [leaf.narrow(1 + d, source.shape[d], value.shape[d] - source.shape[d]) for d in short]
        narrowest = min(narrowest, leaf.dtype, key=lambda dtype: torch.finfo(dtype).max)
    for keys, rows in slots.scalars:
        constants.append((rows, torch.stack([values[key].to(slots.device, rows.dtype) for key in keys])))
    return None if by_mark else _Plan(dtype, held.ranks, copies, constants, zeros, narrowest)


def _places(entries: Mapping[str, Any], size: int) -> tuple[torch.dtype, dict[str, _Place]] | None:
    """The dtype of a file, and where each tensor is; None if there are several dtypes, or gaps."""
    dtypes = {DTYPES.get(entry["dtype"]) for entry in entries.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else None
    if dtype is None or not dtype.is_floating_point or not 0 < size // dtype.itemsize <= _MAX_NUMBERS:
        return None
    tensors: dict[str, _Place] = {}
    end = 0
    for key, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"][0]):
        shape = tuple(entry["shape"])
        start, stop = entry["data_offsets"]
        if start != end or stop - start != math.prod(shape) * dtype.itemsize or start == stop:
            return None
        tensors[key], end = (start // dtype.itemsize, shape), stop
    return (dtype, tensors) if end == size else None


class Reading:
    """A file that was read and checked, in a buffer that can be used again for the next one."""

    held: Held

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._plan: _Plan | None = None
        self._here = self._there = torch.empty(0)  # the numbers as read, and where the slots are
        self._parts: list[tuple[memoryview, Tensor]] = []
        self._tensors: list[tuple[Tensor, Tensor]] = []  # slots, tensor of the file

    @writing()
    def read(self, folder: Path, head: Head, plan: _Plan, held: Held) -> None:
        """Read another file; it must be what the plan is for, and its numbers finite."""
        if self._plan is not plan:
            self._plan = None
            self._divide(plan, head.size)
            self._plan = plan
        self.held = held
        try:
            with open(folder / WEIGHTS, "rb", buffering=0) as file:
                if file.read(8 + len(head.header))[8:] != head.header:
                    raise NoPlanError
                for content, numbers in self._parts:
                    if file.readinto(content) != len(content) or not math.isfinite(total(numbers, plan.narrowest)):
                        raise NoPlanError  # if they are only too large for a sum, the plain way finds them good
                if file.read(1):
                    raise NoPlanError
        except OSError as error:
            raise NoPlanError from error
        if self._there is not self._here:
            self._there.copy_(self._here)

    @writing()
    def write(self, slot: int) -> None:
        """Copy it into a slot."""
        assert self._plan is not None
        for leaf, value in (*self._tensors, *self._plan.constants):
            leaf.select(0, slot).copy_(value)
        for rest in self._plan.zeros:
            rest.select(0, slot).zero_()

    def _divide(self, plan: _Plan, size: int) -> None:
        if len(self._buffer) < size:
            self._buffer = bytearray(size)
        width, whole = plan.dtype.itemsize, memoryview(self._buffer)[:size]
        self._here = torch.frombuffer(whole, dtype=plan.dtype)
        self._there = self._here.to(plan.copies[0][0].device)
        self._parts = [
            (whole[i * width : (i + _PART) * width], self._here[i : i + _PART])
            for i in range(0, len(self._here), _PART)
        ]
        self._tensors = [
            (leaf, self._there[start : start + math.prod(shape)].view(shape)) for leaf, (start, shape) in plan.copies
        ]


class Plans:
    """How files become slots, worked out once for files of one layout: the same names, shapes and config."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._lock = threading.Lock()
        self._plans: dict[tuple[bytes, AdapterConfig], _Plan | None] = {}
        self._configs: dict[bytes, tuple[AdapterConfig, AdapterConfig]] = {}  # as it is, and its essence
        self._idle: list[Reading] = []

    @contextlib.contextmanager
    def reading(self, folder: Path, head: Head | None) -> Generator[Reading, None, None]:
        """Read a file of a layout that was met before.

        Args:
            folder: the checkpoint's folder.
            head: its head.

        Yields:
            The file, ready to `write`.

        Raises:
            NoPlanError: if the layout is new, or anything is wrong with the file.
        """
        if head is None:
            raise NoPlanError
        config, essence = self._config(folder, head)
        plan = self._plans.get((head.header, essence))
        if plan is None:
            raise NoPlanError
        try:
            reading = self._idle.pop()
        except IndexError:
            reading = Reading()
        try:
            reading.read(folder, head, plan, Held(config, plan.ranks))
            yield reading
        finally:
            self._idle.append(reading)

    def _config(self, folder: Path, head: Head) -> tuple[AdapterConfig, AdapterConfig]:
        configs = self._configs.get(head.config)
        if configs is None:
            try:
                config = read_config(folder)
            except (AdapterError, NotImplementedError) as error:
                raise NoPlanError from error
            if Head.read(folder) != head:
                raise NoPlanError
            configs = (config, _essence(config))
            with self._lock:
                _keep(self._configs, head.config, configs, _CONFIGS_KEPT)
        return configs

    def learn(self, folder: Path, head: Head | None, adapter: Adapter) -> None:
        """Make a plan for more files like one that was read the plain way.

        Args:
            folder: the checkpoint's folder.
            head: its head before it was read.
            adapter: what `fa.load` made of it; it fits into the slots.
        """
        if head is None or head != Head.read(folder):  # it changed meanwhile
            return
        key = (head.header, _essence(adapter.config))
        try:
            plan = self._plans[key] if key in self._plans else _plan(self._slots, head, adapter)
        except Exception:  # a method that cannot work on random numbers; the adapter itself is in its slot
            plan = None
        with self._lock:
            _keep(self._configs, head.config, (adapter.config, key[1]), _CONFIGS_KEPT)
            _keep(self._plans, key, plan, _PLANS_KEPT)


def _keep(cache: dict[Any, Any], key: Any, value: Any, most: int) -> None:
    while len(cache) >= most and key not in cache:
        cache.pop(next(iter(cache)))
    cache[key] = value


def _essence(config: AdapterConfig) -> AdapterConfig:
    """A config that is equal for files that one plan is right for."""
    # the fields that every config has are read by no method
    changes: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(AdapterConfig) if f.name != "peft_type"}
    names: Any = getattr(config, "target_modules", None)
    if isinstance(names, tuple) and "target_modules" not in fields_in_common(config, method_of(config)):
        # PEFT writes a set, in another order each time
        changes["target_modules"] = tuple(sorted(names))  # pyright: ignore[reportUnknownArgumentType]
    return dataclasses.replace(config, **changes)
