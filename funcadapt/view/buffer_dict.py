"""`BufferDict`: a dict of buffers as a module, which torch lacks beside `nn.ParameterDict`."""

from __future__ import annotations

from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from typing import Any

import torch
from torch import Tensor, nn


class BufferDict(nn.Module):
    """Buffers by name, in the order in which they came.

    Args:
        buffers: the first entries.
        persistent: whether they are in the state dict.

    Example:
        >>> import torch
        >>> held = BufferDict({"default": torch.zeros(2)}, persistent=True)
        >>> list(held), list(held.state_dict())
        (['default'], ['default'])
    """

    def __init__(
        self, buffers: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] | None = None, persistent: bool = False
    ) -> None:
        super().__init__()
        self.persistent = persistent
        if buffers is not None:
            self.update(buffers)

    def __getitem__(self, name: str) -> Tensor:
        found = self._buffers[name]
        assert found is not None
        return found

    def __setitem__(self, name: str, buffer: Tensor) -> None:
        self.register_buffer(name, buffer, persistent=self.persistent)

    def __delitem__(self, name: str) -> None:
        del self._buffers[name]

    def __len__(self) -> int:
        return len(self._buffers)

    def __iter__(self) -> Iterator[str]:
        return iter(self._buffers)

    def __contains__(self, name: object) -> bool:
        return name in self._buffers

    def clear(self) -> None:
        """Drop every entry."""
        self._buffers.clear()

    def pop(self, name: str) -> Tensor:
        """Drop one entry and return it."""
        found = self[name]
        del self[name]
        return found

    def keys(self) -> KeysView[str]:
        """The names."""
        return self._buffers.keys()

    def items(self) -> ItemsView[str, Tensor | None]:
        """The entries."""
        return self._buffers.items()

    def values(self) -> ValuesView[Tensor | None]:
        """The tensors."""
        return self._buffers.values()

    def update(self, buffers: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] | BufferDict) -> None:
        """Add or replace entries.

        Args:
            buffers: a mapping, or pairs of name and tensor.

        Raises:
            TypeError: if it is neither.
            ValueError: if an element is no pair.
        """
        if not isinstance(buffers, Iterable):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"BufferDict.update expects a mapping or pairs, got {type(buffers).__name__}.")
        given: Any = buffers
        for i, pair in enumerate(given.items() if isinstance(given, Mapping | BufferDict) else given):  # pyright: ignore
            if not isinstance(pair, Iterable):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise TypeError(f"BufferDict.update: element {i} must be a pair, got {type(pair).__name__}.")
            entry: list[Any] = list(pair)  # pyright: ignore[reportUnknownArgumentType]
            if len(entry) != 2:
                raise ValueError(f"BufferDict.update: element {i} must be a pair, got {len(entry)} values.")
            self[entry[0]] = entry[1]

    def extra_repr(self) -> str:
        """One line for each buffer, in the form of `nn.ParameterDict`."""
        lines: list[str] = []
        for name, buffer in self._buffers.items():
            assert buffer is not None
            size = "x".join(map(str, buffer.shape))
            device = "" if buffer.device.type == "cpu" else f" ({buffer.device.type.upper()} {buffer.get_device()})"
            lines.append(f"  ({name}): Buffer containing: [{torch.typename(buffer)} of size {size}{device}]")
        return "\n".join(lines)

    def __call__(self, *_: Any) -> Any:
        """A dict is no layer."""
        raise RuntimeError("BufferDict should not be called.")
