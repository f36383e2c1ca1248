"""`Adapter`: an immutable pytree of named tensors with a static config."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from funcadapt import _torch
from funcadapt.config import AdapterConfig, config_from_dict, freeze
from funcadapt.pytrees import register_pytree

Leaves = Mapping[str, Tensor]
"""The named tensors at one site, e.g. `{"lora_A": (r, in), "lora_B": (out, r)}`."""

TensorTree = Mapping[str, Leaves]
"""Site path -> leaf name -> tensor."""


@dataclasses.dataclass(frozen=True)
class Members:
    """What a stack remembers of the adapters in it, so that `fa.unstack` gives them back.

    Attributes:
        configs: their configs.
        ranks: path -> the rank to which the leaves there are padded, and the rank of each adapter, where they differ; 0
            for an adapter that is not there.
        ndim: path -> number of axes that the first param and the first buffer there have in one adapter, -1 for none:
            inside `vmap` they have them, in the stack one more.
    """

    configs: tuple[AdapterConfig, ...]
    ranks: Mapping[str, tuple[int, tuple[int, ...]]]
    ndim: Mapping[str, tuple[int, int]]

    def to_dict(self) -> dict[str, Any]:
        """In JSON types."""
        return {
            "configs": [config.to_dict() for config in self.configs],
            "ranks": {path: [padded, list(ranks)] for path, (padded, ranks) in self.ranks.items()},
            "ndim": {path: list(ndim) for path, ndim in self.ndim.items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Members:
        """The inverse of `to_dict`."""
        configs = tuple(config_from_dict(config) for config in values["configs"])
        return cls(configs, freeze(values["ranks"]), freeze(values["ndim"]))


@dataclasses.dataclass(frozen=True, eq=False)
class Adapter:
    """One adapter: an immutable value, to be created, stacked, summed, differentiated, compiled and saved.

    It is registered as a pytree with torch (`torch.func`, `torch.compile`, `torch.export`) and with optree: its
    tensors are the children, its config is the static part. Differentiate with respect to `params`. Scalars
    that a sweep varies, such as LoRA's scaling, are 0-d tensors in `buffers`, so that a new value neither
    recompiles nor keeps adapters from being stacked.

    Attributes:
        params: the trainable tensors, site path -> leaf name -> tensor.
        buffers: the frozen tensors, in a tree of the same form.
        config: the static config (frozen and hashable).
        members: the adapters that a stack was made of, see `fa.stack`; None for a single adapter.

    Example:
        >>> import torch
        >>> import funcadapt as fa
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> adapter = fa.init(model, fa.LoraConfig(r=2, target_modules=["0"]))
        >>> adapter
        Adapter(lora, 1 site, r=2, 14 parameters, float32)
        >>> {name: tuple(leaf.shape) for name, leaf in adapter.params["0"].items()}
        {'lora_A': (2, 4), 'lora_B': (3, 2)}
    """

    params: TensorTree
    buffers: TensorTree
    config: AdapterConfig
    members: Members | None = None

    def replace(self, **changes: Any) -> Adapter:
        """A copy with `params`, `buffers` or `config` replaced.

        Args:
            **changes: the new values, by attribute name.

        Returns:
            The new adapter; this one is unchanged.

        Example:
            >>> import torch
            >>> import funcadapt as fa
            >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
            >>> adapter = fa.init(model, fa.LoraConfig(r=2, target_modules=["0"]))
            >>> doubled = adapter.replace(params=torch.utils._pytree.tree_map(lambda t: 2 * t, adapter.params))
            >>> torch.equal(doubled.params["0"]["lora_A"], 2 * adapter.params["0"]["lora_A"])
            True
        """
        return dataclasses.replace(self, **changes)

    def map(self, function: Callable[[Tensor], Tensor]) -> Adapter:
        """A copy with `function` applied to every tensor, params and buffers."""
        return Adapter(_map(function, self.params), _map(function, self.buffers), self.config, self.members)

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Adapter:
        """A copy on another device and in another floating dtype (integer leaves keep theirs).

        Args:
            dtype: the floating dtype, or None to keep it.
            device: the device, or None to keep it.

        Returns:
            The converted adapter. Tensors that already fit are shared, not copied.

        Raises:
            TypeError: if `dtype` is not a floating dtype.
        """
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"An adapter's dtype must be floating, got {dtype}.")

        def convert(leaf: Tensor) -> Tensor:
            return leaf.to(device=device, dtype=dtype if leaf.is_floating_point() else None)

        return self.map(convert)

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor, params first."""
        for tree in (self.params, self.buffers):
            for leaves in tree.values():
                yield from leaves.values()

    def num_parameters(self) -> int:
        """How many trainable numbers the adapter has."""
        return sum(leaf.numel() for leaves in self.params.values() for leaf in leaves.values())

    def leaves(self, path: str) -> dict[str, Tensor]:
        """Params and buffers of one site in one dict, as the hooks of a method see them."""
        return {**self.params.get(path, {}), **self.buffers.get(path, {})}

    def __repr__(self) -> str:
        """Method, sites, ranks, parameter count and dtype in one line."""
        tensors = [t for t in self.tensors() if isinstance(t, Tensor)]  # pyright: ignore[reportUnnecessaryIsInstance]
        if len(tensors) != sum(1 for _ in self.tensors()):
            return f"Adapter(params={self.params!r}, buffers={self.buffers!r})"  # a prefix tree, as in in_dims
        sites = len({*self.params, *self.buffers} - {""})  # less what they share
        single = self if self.members is None else self.map(lambda t: t[0] if t.ndim else t)
        ranks = sorted({r for path in self.params if (r := self.config.rank(single.leaves(path)))})
        parts = [self.config.label(), f"{sites} site{'s' * (sites != 1)}"]
        if ranks:
            parts.append(f"r={ranks[0]}" if len(ranks) == 1 else f"r={ranks[0]}..{ranks[-1]}")
        parts.append(f"{self.num_parameters():,} parameters")
        dtypes = Counter(str(t.dtype).removeprefix("torch.") for t in tensors if t.is_floating_point())
        parts.extend(name for name, _ in dtypes.most_common())
        devices = {str(t.device) for t in tensors} - {"cpu"}
        name = "Adapter" if self.members is None else f"Stack of {len(self.members.configs)}"
        return f"{name}({', '.join(parts + sorted(devices))})"


def _map(function: Callable[[Tensor], Tensor], tree: TensorTree) -> dict[str, dict[str, Tensor]]:
    return {path: {name: function(t) for name, t in leaves.items()} for path, leaves in tree.items()}


Context = tuple[AdapterConfig, Members | None]


def _flatten(adapter: Adapter) -> tuple[list[Any], Context]:
    return [adapter.params, adapter.buffers], (adapter.config, adapter.members)


def _unflatten(children: Any, context: Context) -> Adapter:
    params, buffers = children
    return Adapter(params, buffers, *context)


def _dump_context(context: Context) -> str:
    config, members = context
    return json.dumps([config.to_dict(), members and members.to_dict()], sort_keys=True)


def _load_context(text: str) -> Context:
    config, members = json.loads(text)
    return config_from_dict(config), members and Members.from_dict(members)


_torch.add_safe_globals([Members])
register_pytree(Adapter, ["params", "buffers"], _flatten, _unflatten, _dump_context, _load_context)
