"""`AdapterBank`: a stack of fixed capacity with names and free slots, for serving.

A bank is the one thing here that changes. Its stack is a value whose numbers are written in place, so that adapters
come and go without a new allocation and without a recompilation.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import mmap
import os
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from funcadapt.adapter import Adapter, Members
from funcadapt.checkpoint import _DTYPES, CONFIG, WEIGHTS, _names, load, read_config
from funcadapt.config import AdapterConfig, FrozenDict
from funcadapt.errors import AdapterError, SiteError, did_you_mean
from funcadapt.init import init
from funcadapt.keys import decode
from funcadapt.method import Leaf, Method, method_of
from funcadapt.stacking import _pile

_Key = tuple[str, str]  # site path, leaf name
_Values = dict[_Key, Tensor]
_V = TypeVar("_V")

_PLANS_KEPT, _CONFIGS_KEPT = 64, 1024
_MAX_HEADER, _MAX_NUMBERS = 2**24, 2**25  # larger files are read the plain way: there, moving the bytes is all it takes


@dataclasses.dataclass(frozen=True)
class _Held:
    """What a slot holds: the config, and path -> rank of the sites that the adapter has."""

    config: AdapterConfig
    ranks: Mapping[str, int]


class AdapterBank:
    """A fixed number of slots for adapters of one method on one model, with names.

    `bank.stack` is an ordinary stack (see `fa.stack`), always the same one: adding and removing write into it in place.
    Compiled code that takes it as an argument is never compiled again for that.

        with bank.use(["french", None, "legal"]) as index:
            out = fa.functional_call(model, fa.routed(bank.stack, index), (ids,))

    An adapter may have any rank up to the bank's, any alpha, and fewer sites: it is padded with exact zeros. Its values
    take the bank's dtype. Memory is taken when a slot is first written (on the CPU), not before.

    Threads: every method may be called from any thread. What `use` hands out stays valid inside its block: an adapter
    that is removed or replaced meanwhile keeps its slot until the block ends, and a block that starts later sees the
    new one. Nothing ever waits for a block; a slot in use is just not free. An index from `index` has no such
    guarantee: it is right until one of its names is removed or replaced. On a GPU, "until the block ends" is in the
    order of the stream; calls on other streams must be synchronised before their block ends.

    A bank is for inference: autograd may refuse a backward pass through a call that an `add` or `load` came after. The
    hooks read the bank's config, so dropout in an adapter's own config does not act.

    Args:
        model: the model. It is not changed, and not kept.
        config: the method, the targets and the largest rank.
        capacity: how many slots.
        dtype: dtype of the leaves; by default the one of the site's weight (float32 where that is quantised).
        device: device of the leaves; by default the one of the model's first parameter.

    Raises:
        AdapterError: if `capacity` is not positive, or the config does not fit the model.
        TypeError: if `dtype` is not a floating dtype, or `capacity` no integer.

    Example:
        >>> import torch
        >>> import funcadapt as fa
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> bank = fa.AdapterBank(model, fa.LoraConfig(r=4, target_modules=["0"]), capacity=8)
        >>> config = fa.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        >>> adapters = {name: fa.init(model, config, seed=i) for i, name in enumerate(["french", "legal"])}
        >>> for name, adapter in adapters.items():
        ...     bank.add(name, adapter)
        >>> bank
        AdapterBank(2 of 8 slots, lora, 1 site, r=4, float32)
        >>> x = torch.randn(3, 4)
        >>> with bank.use(["legal", None, "french"]) as index:
        ...     y = fa.functional_call(model, fa.routed(bank.stack, index), x)
        >>> torch.allclose(y[0], fa.functional_call(model, adapters["legal"], x)[0], atol=1e-6)
        True
        >>> bank.remove("legal")
        >>> bank.index(["legal"])
        Traceback (most recent call last):
        funcadapt.errors.AdapterError: The bank has no adapter 'legal'. There are: 'french'.
    """

    def __init__(
        self,
        model: nn.Module,
        config: AdapterConfig,
        capacity: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if not isinstance(capacity, int) or isinstance(capacity, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"capacity must be an integer, got {capacity!r}.")
        if capacity < 1:
            raise AdapterError(f"capacity must be positive, got {capacity}.")
        like = init(model, config, device="meta")
        self._like = like if dtype is None else like.to(dtype)
        self._method = method_of(like.config)
        self._ranks = {path: like.config.rank(like.leaves(path)) for path in {**like.params, **like.buffers}}
        self._device = torch.device(device) if device is not None else _device_of(model)
        if self._device.type == "meta":
            raise AdapterError("A bank on the meta device holds nothing. Say where: AdapterBank(..., device='cpu').")
        self._leaves: _Values = {}
        self._scalars: list[tuple[list[_Key], Tensor]] = []
        with torch.inference_mode(False):  # an inference tensor could not be written later on
            self._allocate(capacity)
        params, buffers = (
            {path: {name: self._leaves[path, name] for name in leaves} for path, leaves in tree.items()}
            for tree in (self._like.params, self._like.buffers)
        )
        ndim = {path: next(iter(leaves.values())).ndim for path, leaves in self._like.params.items()}
        members = Members((like.config,) * capacity, FrozenDict(), FrozenDict(ndim))
        self._stack = Adapter(params, buffers, like.config, members)
        self._lock = threading.Lock()
        self._slots: dict[str, int] = {}
        self._held: dict[int, _Held] = {}
        self._free = list(reversed(range(capacity)))  # the last freed is used first: its memory is there already
        self._pins = [0] * capacity
        self._leaving: set[int] = set()  # removed, and still in use
        self._plans: dict[tuple[bytes, AdapterConfig], _Plan | None] = {}
        self._configs: dict[bytes, tuple[AdapterConfig, AdapterConfig]] = {}  # as it is; without what is the user's own
        self._idle: list[_Staging] = []

    def _allocate(self, capacity: int) -> None:
        scalars: dict[torch.dtype, list[_Key]] = {}
        for tree in (self._like.params, self._like.buffers):
            for path, leaves in tree.items():
                for name, leaf in leaves.items():
                    if leaf.ndim:  # the memory layout is the one that `fa.stack` gives
                        flat = _zeros(capacity * leaf.numel(), leaf.dtype, self._device)
                        strides = _pile([leaf, leaf]).stride()
                        self._leaves[path, name] = flat.as_strided((capacity, *leaf.shape), strides)
                    else:
                        scalars.setdefault(leaf.dtype, []).append((path, name))
        # scalings and the like are rows of one matrix, so that a slot's are written at once
        for dtype, keys in scalars.items():
            width = -(-capacity // 16) * 16  # each row is aligned
            rows = _zeros(len(keys) * width, dtype, self._device).view(len(keys), width)[:, :capacity]
            self._leaves.update(zip(keys, rows, strict=True))
            self._scalars.append((keys, rows.t()))

    # -- looking ----------------------------------------------------------------------------------------

    @property
    def stack(self) -> Adapter:
        """All slots as a stack, for `fa.routed`. It is the same value for the bank's whole life."""
        return self._stack

    @property
    def capacity(self) -> int:
        """How many slots there are."""
        return len(self._pins)

    @property
    def names(self) -> tuple[str, ...]:
        """The names, in the order in which they were added."""
        with self._lock:
            return tuple(self._slots)

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, name: object) -> bool:
        return name in self._slots

    def __repr__(self) -> str:
        """How full it is, method, sites, ranks and dtype in one line."""
        ranks = sorted({r for r in self._ranks.values() if r})
        parts = [f"{len(self)} of {self.capacity} slots", self._like.config.label()]
        parts.append(f"{len(self._ranks)} site{'s' * (len(self._ranks) != 1)}")
        if ranks:
            parts.append(f"r={ranks[0]}" if len(ranks) == 1 else f"r={ranks[0]}..{ranks[-1]}")
        parts += sorted({str(t.dtype).removeprefix("torch.") for t in self._leaves.values() if t.is_floating_point()})
        parts += sorted({str(t.device) for t in self._leaves.values()} - {"cpu"})
        return f"AdapterBank({', '.join(parts)})"

    def index(self, names: Iterable[str | None]) -> Tensor:
        """Where adapters are now. Only `use` keeps them there.

        Args:
            names: one for each row; None or "" for the bare base model.

        Returns:
            The index for `fa.routed`, (rows), on the CPU; -1 for the bare base model.

        Raises:
            AdapterError: if a name is unknown; near matches are listed.
            TypeError: if `names` is a single string.

        Example:
            >>> import torch
            >>> import funcadapt as fa
            >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
            >>> config = fa.LoraConfig(r=2, target_modules=["0"])
            >>> bank = fa.AdapterBank(model, config, capacity=2)
            >>> bank.add("a", fa.init(model, config))
            >>> bank.index(["a", None, "a"])
            tensor([ 0, -1,  0])
        """
        with self._lock:
            return torch.tensor(self._find(names), dtype=torch.long)

    @contextlib.contextmanager
    def use(self, names: Iterable[str | None]) -> Generator[Tensor, None, None]:
        """Adapters that stay as they are for the duration of a `with` block.

        Args:
            names: as in `index`.

        Yields:
            The index for `fa.routed`, as from `index`.

        Raises:
            AdapterError: as in `index`.
            TypeError: as in `index`.
        """
        with self._lock:
            slots = self._find(names)
            pinned = {slot for slot in slots if slot >= 0}
            for slot in pinned:
                self._pins[slot] += 1
        try:
            yield torch.tensor(slots, dtype=torch.long)
        finally:
            with self._lock:
                for slot in pinned:
                    self._pins[slot] -= 1
                    if not self._pins[slot] and slot in self._leaving:
                        self._leaving.remove(slot)
                        self._free.append(slot)

    def get(self, name: str) -> Adapter:
        """A copy of an adapter, as it was added: its own config, ranks and sites, in the bank's dtype.

        Args:
            name: its name.

        Returns:
            The adapter.

        Raises:
            AdapterError: if the name is unknown; near matches are listed.
        """
        with self.use([name]) as index, _writing():
            slot = int(index[0])
            if slot < 0:
                raise AdapterError("The bare base model has no adapter to get.")
            held, with_rank = self._held[slot], self._method.with_rank
            params: dict[str, Leaf] = {}
            buffers: dict[str, Leaf] = {}
            for path, rank in held.ranks.items():
                leaves: Leaf = {name: leaf[slot] for name, leaf in self._stack.leaves(path).items()}
                if with_rank is not None and rank < self._ranks[path]:
                    leaves = with_rank(leaves, rank)
                leaves = self._method.layout({name: leaf.clone() for name, leaf in leaves.items()})
                for tree, like in ((params, self._like.params), (buffers, self._like.buffers)):
                    if path in like:
                        tree[path] = {name: leaves[name] for name in like[path]}
            return Adapter(params, buffers, held.config)

    # -- changing ---------------------------------------------------------------------------------------

    def add(self, name: str, adapter: Adapter, *, overwrite: bool = False) -> None:
        """Copy an adapter into a free slot. If it raises, the bank is as it was.

        Args:
            name: its name.
            adapter: the adapter.
            overwrite: whether it may replace the one of that name. Calls that run see the old one to their end, so this
                takes a free slot, too, unless the old one is not in use.

        Raises:
            AdapterError: if the name is taken, the bank is full, the method is another, a field that the method's
                hooks read has another value, or a number is not finite.
            SiteError: if the bank lacks a site of the adapter, a leaf has another shape or a larger rank, or the
                adapter lacks a site where the method has no neutral value; the message names the site.
            TypeError: if it is no adapter.
        """
        with self._lock:
            self._check_place(name, overwrite)
        with _writing():
            values, held = self._fit(adapter)
            self._check_finite(values)

            def write(slot: int) -> None:
                for key, leaf in self._leaves.items():
                    leaf[slot].copy_(values[key])

            self._put(name, held, overwrite, write)

    def load(self, name: str, directory: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Read a PEFT checkpoint into a slot: `bank.add(name, fa.load(directory))`, and faster.

        How the bytes of a file go into a slot is worked out once for files of one layout (the same names, shapes and
        config). The next ones cost what it takes to read, check and copy them. If it raises, the bank is as it was.

        Args:
            name: the adapter's name.
            directory: the folder with `adapter_config.json` and `adapter_model.safetensors`.
            overwrite: as in `add`.

        Raises:
            AdapterFileError: if a file is missing, truncated or malformed, as in `fa.load`.
            AdapterError: as in `add`.
            SiteError: as in `add`.
            NotImplementedError: if the config asks for a part of PEFT that funcadapt does not have.

        Example:
            >>> import tempfile
            >>> import torch
            >>> import funcadapt as fa
            >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
            >>> config = fa.LoraConfig(r=2, target_modules=["0"])
            >>> folder = tempfile.mkdtemp()
            >>> fa.save(fa.init(model, config), folder)
            >>> bank = fa.AdapterBank(model, config, capacity=2)
            >>> bank.load("a", folder)
            >>> bank.get("a")
            Adapter(lora, 1 site, r=2, 14 parameters, float32)
        """
        folder = Path(directory)
        with self._lock:
            self._check_place(name, overwrite)
        head = _Head.read(folder)
        if head is not None and self._load_by_plan(name, head, folder, overwrite):
            return
        adapter = load(folder)  # it also says what is wrong with a file
        self.add(name, adapter, overwrite=overwrite)
        if head is not None and head == _Head.read(folder):  # not changed meanwhile
            key = (head.header, _essence(adapter.config))
            try:
                plan = self._plan(head, adapter) if key not in self._plans else self._plans[key]
            except Exception:  # a method that cannot work on random numbers; the adapter itself is in its slot
                plan = None
            with self._lock:
                _keep(self._configs, head.config, (adapter.config, key[1]), _CONFIGS_KEPT)
                _keep(self._plans, key, plan, _PLANS_KEPT)

    def remove(self, name: str) -> None:
        """Forget an adapter. Its slot is free at once, or when the last `use` of it ends.

        Args:
            name: its name.

        Raises:
            AdapterError: if the name is unknown; near matches are listed.
        """
        with self._lock:
            if name not in self._slots:
                raise self._unknown(name)
            self._retire(self._slots.pop(name))

    # -- slots (the lock is held, but for `_put`) -------------------------------------------------------

    def _unknown(self, name: Any) -> AdapterError:
        return AdapterError(f"The bank has no adapter {name!r}.{did_you_mean(str(name), self._slots)}")

    def _find(self, names: Iterable[str | None]) -> list[int]:
        if isinstance(names, str):
            raise TypeError(f"Expected one name for each row, got the string {names!r}. Pass [{names!r}] * rows.")
        slots: list[int] = []
        for name in names:
            if name and name not in self._slots:
                raise self._unknown(name)
            slots.append(self._slots[name] if name else -1)
        return slots

    def _check_place(self, name: Any, overwrite: bool) -> None:
        if not isinstance(name, str) or not name:
            raise AdapterError(f"An adapter's name must be a string that is not empty, got {name!r}.")
        if name in self._slots and not overwrite:
            raise AdapterError(f"The bank has an adapter {name!r} already. Pass overwrite=True to replace it.")
        if not self._free and (name not in self._slots or self._pins[self._slots[name]]):
            others = self.capacity - len(self._slots)
            used = f", {others} of them held for running or unfinished calls" * bool(others)
            raise AdapterError(f"The bank is full: no free slot for {name!r} among {self.capacity}{used}. Remove one.")

    def _retire(self, slot: int) -> None:
        if self._pins[slot]:
            self._leaving.add(slot)
        else:
            self._free.append(slot)

    def _put(self, name: str, held: _Held, overwrite: bool, write: Callable[[int], None]) -> None:
        """Write into a slot that nobody sees, then give it the name."""
        with self._lock:
            self._check_place(name, overwrite)
            if not self._free:  # over the old one, which is not in use, and cannot be while the lock is held
                slot = self._slots[name]
                try:
                    write(slot)
                except BaseException:  # half written
                    self._retire(self._slots.pop(name))
                    raise
                self._held[slot] = held
                return
            slot = self._free.pop()
        try:
            write(slot)
        except BaseException:
            with self._lock:
                self._free.append(slot)
            raise
        with self._lock:
            if name in self._slots and not overwrite:
                self._free.append(slot)
                self._check_place(name, overwrite)
            old = self._slots.get(name)
            self._slots[name], self._held[slot] = slot, held
            if old is not None:
                self._retire(old)

    # -- adapters ---------------------------------------------------------------------------------------

    def _fit(self, adapter: Adapter) -> tuple[_Values, _Held]:
        """The leaves of an adapter in the shapes of a slot: checked, padded, neutral where there are none."""
        if not isinstance(adapter, Adapter):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"Expected an Adapter, got {type(adapter).__name__}.")
        if adapter.members is not None:
            raise AdapterError("A slot holds one adapter, got a stack. Add each of fa.unstack(stack).")
        method, config, own = self._method, self._like.config, adapter.config
        if method_of(own) is not method:
            raise AdapterError(f"The bank is for {method.name}, the adapter is {method_of(own).name}.")
        for field in _fields_in_common(config, method):
            a, b = getattr(config, field), getattr(own, field)
            if a != b:
                raise AdapterError(f"{field}={b!r} in the adapter and {a!r} in the bank: it must be the same in all.")
        for path in {**adapter.params, **adapter.buffers}:
            if path not in self._ranks:
                raise SiteError(f"The bank has no site {path!r}.{did_you_mean(path, self._ranks)}")
        values: _Values = {}
        ranks: dict[str, int] = {}
        for path in self._ranks:
            leaves: Leaf = adapter.leaves(path)
            if leaves:
                leaves, ranks[path] = self._fit_site(path, leaves, own)
            else:
                leaves = self._neutral(path)
            values.update({(path, name): leaf for name, leaf in leaves.items()})
        return values, _Held(own, ranks)

    def _neutral(self, path: str) -> Leaf:
        method, like = self._method, self._like.leaves(path)
        if method.neutral is None or not {*method.keys, *method.buffers(self._like.config)} >= like.keys():
            raise SiteError(
                f"The adapter has nothing at {path!r}, and {method.name} has no neutral value for it. It must adapt "
                "every layer that the bank does."
            )
        return method.neutral({name: leaf[0] for name, leaf in self._stack.leaves(path).items()})

    def _fit_site(self, path: str, leaves: Leaf, config: AdapterConfig) -> tuple[Leaf, int]:
        like, most = self._like.leaves(path), self._ranks[path]
        for name in like:
            if name not in leaves:
                raise SiteError(f"The adapter lacks {name!r} at {path!r}, which the bank has.")
        for name, leaf in leaves.items():
            if name not in like:
                raise SiteError(f"The adapter has {name!r} at {path!r}, which the bank does not.")
            alike = leaf.dtype == like[name].dtype or (leaf.is_floating_point() and like[name].is_floating_point())
            if not alike:
                raise SiteError(f"{name!r} at {path!r} is of {leaf.dtype}, the bank's of {like[name].dtype}.")
            if leaf.is_meta:
                raise SiteError(f"{name!r} at {path!r} is on the meta device: it has no values.")
        same_form = all(leaf.ndim == like[name].ndim and leaf.numel() for name, leaf in leaves.items())
        rank = config.rank(leaves) if same_form else most
        if rank > most:
            raise SiteError(
                f"The adapter has rank {rank} at {path!r}, the bank's largest is {most}. Make the bank with r={rank}."
            )
        if rank < most:
            if self._method.with_rank is None:
                raise SiteError(f"{self._method.name} has rank {rank} at {path!r}, and cannot be padded to {most}.")
            try:
                padded = self._method.with_rank(leaves, most)
                back = self._method.with_rank(padded, rank)
            except SiteError as error:
                raise SiteError(f"The adapter's rank {rank} cannot be padded to {most} at {path!r}: {error}") from error
            except (ArithmeticError, RuntimeError, IndexError):
                pass  # the shapes contradict each other, see below
            else:
                if all(back[name].shape == leaf.shape for name, leaf in leaves.items()):
                    leaves = padded
        for name, leaf in leaves.items():
            if leaf.shape != like[name].shape:
                raise SiteError(
                    f"{name!r} at {path!r} has shape {tuple(leaf.shape)}, the bank's has {tuple(like[name].shape)} (at "
                    f"rank {most}). Was this adapter made for another model?"
                )
        return leaves, rank

    def _check_finite(self, values: _Values) -> None:
        for (path, name), value in values.items():
            dtype = self._leaves[path, name].dtype
            if not dtype.is_floating_point or math.isfinite(_total(value, dtype)):
                continue
            if not value.to(dtype).isfinite().all():
                what = "numbers that are not finite" if not value.isfinite().all() else f"numbers too large for {dtype}"
                raise SiteError(f"{name!r} at {path!r} has {what}.")

    # -- files ------------------------------------------------------------------------------------------

    def _load_by_plan(self, name: str, head: _Head, folder: Path, overwrite: bool) -> bool:
        """Load a file of a layout that was met before. False if it is not that, or if anything is wrong with it."""
        configs = self._configs.get(head.config)
        if configs is None:
            try:
                config = read_config(folder)
                configs = (config, _essence(config))
            except (AdapterError, NotImplementedError):
                return False
            if _Head.read(folder) != head:
                return False
            with self._lock:
                _keep(self._configs, head.config, configs, _CONFIGS_KEPT)
        plan = self._plans.get((head.header, configs[1]))
        if plan is None:
            return False
        try:
            staging = self._idle.pop()
        except IndexError:
            staging = _Staging()
        try:
            with _writing():
                sources = staging.read(folder, head, plan)
                if sources is None:
                    return False

                def write(slot: int) -> None:
                    for leaf, source in zip(plan.into, sources, strict=True):
                        leaf.select(0, slot).copy_(source)
                    for rest in plan.padding:
                        rest.select(0, slot).zero_()

                self._put(name, _Held(configs[0], plan.ranks), overwrite, write)
        finally:
            self._idle.append(staging)
        return True

    def _plan(self, head: _Head, adapter: Adapter) -> _Plan | None:
        """How the bytes of a file become a slot; None if that is more than copying tensors to their places.

        Nothing is assumed of the method: random numbers take the file's way through `decode` and `_fit`, and the plan
        must explain every one that comes out.

        Args:
            head: the file's names and shapes.
            adapter: what `fa.load` made of it.

        Returns:
            The plan, or None.
        """
        layout = _Layout.parse(head)
        if layout is None:
            return None
        marks = torch.rand(layout.count, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 0.5
        tensors = {key: marks[start : start + math.prod(s)].view(s) for key, (start, s) in layout.tensors.items()}
        by_mark = {float(tensor.reshape(-1)[0]): key for key, tensor in tensors.items()}
        order, known = _names(layout.metadata, "target_parameters"), _names(layout.metadata, "buffers")
        params, buffers = decode(tensors, adapter.config, self._method, order, None, known or ())
        if buffers or len(by_mark) < len(tensors):
            return None
        values, held = self._fit(Adapter(params, adapter.buffers, adapter.config))
        plan = _Plan(layout.dtype, head.size, held.ranks, [], [], [], [], self._device, layout.dtype)
        used: set[str] = set()
        for (path, name), value in values.items():
            leaf = self._leaves[path, name]
            if name not in params.get(path, {}):  # it follows from the config
                if value.ndim:
                    first = value.reshape(-1)[0].clone()
                    value = first.expand(value.shape) if bool((value == first).all()) else value.clone()
                    plan.into.append(leaf)
                    plan.constants.append(value.to(plan.device))
                continue
            key = by_mark.get(float(value.reshape(-1)[0]), "")
            if key not in tensors or tensors[key].ndim != value.ndim or not value.ndim:
                return None
            source = tensors[key]
            box = tuple(slice(n) for n in source.shape)
            short = [d for d in range(value.ndim) if source.shape[d] < value.shape[d]]
            if len(short) > 1 or value.count_nonzero() != source.numel() or not torch.equal(value[box], source):
                return None
            used.add(key)
            plan.into.insert(len(plan.sources), leaf[(slice(None), *box)])
            plan.sources.append(layout.tensors[key])
            plan.padding += [leaf.narrow(1 + d, source.shape[d], value.shape[d] - source.shape[d]) for d in short]
            if torch.finfo(leaf.dtype).max < torch.finfo(plan.narrowest).max:
                plan.narrowest = leaf.dtype
        for keys, slots in self._scalars:
            plan.into.append(slots)
            plan.constants.append(torch.stack([values[key].to(plan.device, slots.dtype) for key in keys]))
        return plan if used == tensors.keys() else None


def _fields_in_common(config: AdapterConfig, method: Method) -> list[str]:
    """The fields that the hooks read, and that are no leaves: all adapters must have the same (as in `fa.stack`)."""
    names = [field.name for field in dataclasses.fields(config)]
    if method.reads is not None:
        return [name for name in names if name in method.reads]
    free = {f.name for f in dataclasses.fields(AdapterConfig)} | {*config.patterned, *config.patterned.values()}
    return [name for name in names if name not in free]


def _device_of(model: nn.Module) -> torch.device:
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


@contextlib.contextmanager
def _writing() -> Generator[None, None, None]:
    """Leaves are written in any mode of the caller's: views made here are never inference tensors."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _total(value: Tensor, dtype: torch.dtype) -> float:
    """The sum, in the given dtype or wider. If it is finite, so is every number; `isfinite` costs ten times as much."""
    return float(value.to(dtype).sum(dtype=torch.promote_types(dtype, torch.float32)))


def _zeros(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu" or sys.platform == "win32" or not count:
        return torch.zeros(count, dtype=dtype, device=device)
    # torch.zeros writes every page. These are zero by themselves, and take memory when they are first written.
    pages = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype)


def _essence(config: AdapterConfig) -> AdapterConfig:
    """What of a config can matter to a plan: not the fields that every config has, which no method reads.

    Nor the order of `target_modules`, which is another one in each file of PEFT's: it writes a set.

    Args:
        config: the config.

    Returns:
        A config that is equal for files that one plan is right for.
    """
    changes: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(AdapterConfig) if f.name != "peft_type"}
    names: Any = getattr(config, "target_modules", None)
    reads = _fields_in_common(config, method_of(config))
    if isinstance(names, tuple) and "target_modules" not in reads:
        changes["target_modules"] = tuple(sorted(names))  # pyright: ignore[reportUnknownArgumentType]
    return dataclasses.replace(config, **changes)


def _keep(cache: dict[Any, _V], key: Any, value: _V, most: int) -> None:
    while len(cache) >= most and key not in cache:
        cache.pop(next(iter(cache)))
    cache[key] = value


@dataclasses.dataclass(frozen=True)
class _Head:
    """What a checkpoint says about its numbers: the bytes of the config and of the header, and how many follow."""

    config: bytes
    header: bytes
    size: int

    @classmethod
    def read(cls, folder: Path) -> _Head | None:
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


@dataclasses.dataclass(frozen=True)
class _Layout:
    """A header that was read: where each tensor is, counted in numbers. All are of one dtype, with nothing between."""

    dtype: torch.dtype
    count: int
    tensors: Mapping[str, tuple[int, tuple[int, ...]]]
    metadata: Mapping[str, str]

    @classmethod
    def parse(cls, head: _Head) -> _Layout | None:
        """The layout, or None if the file is of another form."""
        entries: dict[str, Any] = json.loads(head.header)
        metadata: dict[str, str] = entries.pop("__metadata__", {})
        dtypes = {_DTYPES.get(entry["dtype"]) for entry in entries.values()}
        dtype = dtypes.pop() if len(dtypes) == 1 else None
        if dtype is None or not dtype.is_floating_point or not 0 < head.size // dtype.itemsize <= _MAX_NUMBERS:
            return None
        tensors: dict[str, tuple[int, tuple[int, ...]]] = {}
        end = 0
        for key, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"][0]):
            shape = tuple(entry["shape"])
            start, stop = entry["data_offsets"]
            if start != end or stop - start != math.prod(shape) * dtype.itemsize or start == stop:
                return None
            tensors[key], end = (start // dtype.itemsize, shape), stop
        return cls(dtype, end // dtype.itemsize, tensors, metadata) if end == head.size else None


@dataclasses.dataclass
class _Plan:
    """How the bytes of files of one layout become a slot.

    Attributes:
        dtype: of the numbers in the file.
        size: how many bytes there are after the header.
        ranks: what `_Held` remembers.
        into: the leaves of the bank, cut to what is written of them: first those for `sources`, then for `constants`.
        sources: (offset, shape) of tensors in the file.
        constants: values that follow from the config, such as scalings and neutral leaves.
        padding: the parts of leaves that are zeros.
        device: the device of the leaves.
        narrowest: of the file's and the leaves' dtypes, the one with the smallest range.
    """

    dtype: torch.dtype
    size: int
    ranks: Mapping[str, int]
    into: list[Tensor]
    sources: list[tuple[int, tuple[int, ...]]]
    constants: list[Tensor]
    padding: list[Tensor]
    device: torch.device
    narrowest: torch.dtype


class _Staging:
    """A buffer that files are read into, and its views for the plan that was used last."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._plan: _Plan | None = None
        self._file = self._moved = torch.empty(0)  # the numbers as read, and where the leaves are
        self._parts: list[tuple[memoryview, Tensor]] = []
        self._sources: Sequence[Tensor] = ()

    def read(self, folder: Path, head: _Head, plan: _Plan) -> Sequence[Tensor] | None:
        """The values for `plan.into`, or None unless the file is what the plan is for and its numbers are finite."""
        if self._plan is not plan:
            self._look(plan)
        try:
            with open(folder / WEIGHTS, "rb", buffering=0) as file:
                if file.read(8 + len(head.header))[8:] != head.header:
                    return None
                for bytes_, numbers in self._parts:
                    if file.readinto(bytes_) != len(bytes_) or not math.isfinite(_total(numbers, plan.narrowest)):
                        return None  # if the numbers are only too large for a sum, the plain way finds them good
                if file.read(1):
                    return None
        except OSError:
            return None
        if self._moved is not self._file:
            self._moved.copy_(self._file)
        return self._sources

    def _look(self, plan: _Plan) -> None:
        self._plan = None
        if len(self._buffer) < plan.size:
            self._buffer = bytearray(plan.size)
        width = plan.dtype.itemsize
        self._file = torch.frombuffer(self._buffer, dtype=plan.dtype, count=plan.size // width)
        whole = memoryview(self._buffer)
        step = 32_000  # still in the cache when they are summed; and torch sums as few in the calling thread
        self._parts = [
            (whole[i * width : min(i + step, len(self._file)) * width], self._file[i : i + step])
            for i in range(0, len(self._file), step)
        ]
        self._moved = self._file if plan.device.type == "cpu" else torch.empty_like(self._file, device=plan.device)
        views = [self._moved[start : start + math.prod(shape)].view(shape) for start, shape in plan.sources]
        self._plan, self._sources = plan, [*views, *plan.constants]
