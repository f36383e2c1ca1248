"""`AdapterBank`: a stack of fixed capacity with names and free slots, for serving.

A bank is the one thing here that changes. Its stack is a value whose numbers are written in place, so that adapters
come and go without a new allocation and without a recompilation.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from funcadapt.adapter import Adapter
from funcadapt.bulk import Head, NoPlanError, Plans
from funcadapt.checkpoint import load
from funcadapt.config import AdapterConfig
from funcadapt.errors import AdapterError, did_you_mean
from funcadapt.init import init
from funcadapt.slots import Held, Slots


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
        first = next(model.parameters(), None)
        at = torch.device(device if device is not None else "cpu" if first is None else first.device)
        if at.type == "meta":
            raise AdapterError("A bank on the meta device holds nothing. Say where: AdapterBank(..., device='cpu').")
        self._slots = Slots(like if dtype is None else like.to(dtype), capacity, at)
        self._plans = Plans(self._slots)
        self._lock = threading.Lock()
        self._names: dict[str, int] = {}  # -> slot
        self._held: dict[int, Held] = {}
        self._free = list(reversed(range(capacity)))  # the last freed is used first: its memory is there already
        self._pins = [0] * capacity
        self._leaving: set[int] = set()  # removed, and still in use

    # -- looking ----------------------------------------------------------------------------------------

    @property
    def stack(self) -> Adapter:
        """All slots as a stack, for `fa.routed`. It is the same value for the bank's whole life."""
        return self._slots.stack

    @property
    def capacity(self) -> int:
        """How many slots there are."""
        return len(self._pins)

    @property
    def names(self) -> tuple[str, ...]:
        """The names, in the order in which they were added."""
        with self._lock:
            return tuple(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __repr__(self) -> str:
        """How full it is, method, sites, ranks and dtype in one line."""
        stack, sites = self.stack, sum(map(bool, self._slots.ranks))
        ranks = sorted({r for r in self._slots.ranks.values() if r})
        parts = [f"{len(self)} of {self.capacity} slots", stack.config.label(), f"{sites} site{'s' * (sites != 1)}"]
        if ranks:
            parts.append(f"r={ranks[0]}" if len(ranks) == 1 else f"r={ranks[0]}..{ranks[-1]}")
        parts += sorted({str(t.dtype).removeprefix("torch.") for t in stack.tensors() if t.is_floating_point()})
        parts += sorted({str(t.device) for t in stack.tensors()} - {"cpu"})
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
        with self.use([name]) as index:
            slot = int(index[0])
            if slot < 0:
                raise AdapterError("The bare base model has no adapter to get.")
            return self._slots.adapter(slot, self._held[slot])

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
        values, held = self._slots.fit(adapter)
        self._put(name, overwrite, held, lambda slot: self._slots.write(slot, values))

    def load(
        self,
        name: str,
        directory: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        model: nn.Module | None = None,
    ) -> None:
        """Read a PEFT checkpoint into a slot: `bank.add(name, fa.load(directory))`, and faster.

        How the bytes of a file go into a slot is worked out once for files of one layout (the same names, shapes and
        config). The next ones cost what it takes to read, check and copy them. If it raises, the bank is as it was.

        Args:
            name: the adapter's name.
            directory: the folder with `adapter_config.json` and `adapter_model.safetensors`.
            overwrite: as in `add`.
            model: the model, for methods of which a checkpoint does not hold all (FourierFT, VeRA), see `fa.load`.

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
        if self._slots.needs_model:
            self.add(name, load(folder, model=model), overwrite=overwrite)
            return
        head = Head.read(folder)
        try:
            with self._plans.reading(folder, head) as reading:
                self._put(name, overwrite, reading.held, reading.write)
        except NoPlanError:
            adapter = load(folder)
            self.add(name, adapter, overwrite=overwrite)
            self._plans.learn(folder, head, adapter)

    def remove(self, name: str) -> None:
        """Forget an adapter. Its slot is free at once, or when the last `use` of it ends.

        Args:
            name: its name.

        Raises:
            AdapterError: if the name is unknown; near matches are listed.
        """
        with self._lock:
            if name not in self._names:
                raise self._unknown(name)
            self._retire(self._names.pop(name))

    # -- slots (the lock is held, but for `_put`) -------------------------------------------------------

    def _unknown(self, name: Any) -> AdapterError:
        return AdapterError(f"The bank has no adapter {name!r}.{did_you_mean(str(name), self._names)}")

    def _find(self, names: Iterable[str | None]) -> list[int]:
        if isinstance(names, str):
            raise TypeError(f"Expected one name for each row, got the string {names!r}. Pass [{names!r}] * rows.")
        slots: list[int] = []
        for name in names:
            if name and name not in self._names:
                raise self._unknown(name)
            slots.append(self._names[name] if name else -1)
        return slots

    def _check_place(self, name: Any, overwrite: bool) -> None:
        if not isinstance(name, str) or not name:
            raise AdapterError(f"An adapter's name must be a string that is not empty, got {name!r}.")
        if name in self._names and not overwrite:
            raise AdapterError(f"The bank has an adapter {name!r} already. Pass overwrite=True to replace it.")
        if not self._free and (name not in self._names or self._pins[self._names[name]]):
            others = self.capacity - len(self._names)
            used = f", {others} of them held for running or unfinished calls" * bool(others)
            raise AdapterError(f"The bank is full: no free slot for {name!r} among {self.capacity}{used}. Remove one.")

    def _retire(self, slot: int) -> None:
        if self._pins[slot]:
            self._leaving.add(slot)
        else:
            self._free.append(slot)

    def _put(self, name: str, overwrite: bool, held: Held, write: Callable[[int], None]) -> None:
        """Write into a slot that nobody sees, then give it the name."""
        with self._lock:
            self._check_place(name, overwrite)
            if not self._free:  # over the old one, which is not in use, and cannot be while the lock is held
                slot = self._names[name]
                try:
                    write(slot)
                except BaseException:  # half written
                    self._retire(self._names.pop(name))
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
            if name in self._names and not overwrite:
                self._free.append(slot)
                self._check_place(name, overwrite)
            old = self._names.get(name)
            self._names[name], self._held[slot] = slot, held
            if old is not None:
                self._retire(old)
