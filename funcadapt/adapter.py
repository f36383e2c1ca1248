"""`Adapter`: an immutable pytree of named tensors with a static config."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import optree
import torch
from torch import Tensor

from funcadapt import _torch
from funcadapt.config import AdapterConfig, config_from_dict

Leaves = Mapping[str, Tensor]
"""The named tensors at one site, e.g. `{"lora_A": (r, in), "lora_B": (out, r)}`."""

TensorTree = Mapping[str, Leaves]
"""Site path -> leaf name -> tensor."""


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
        return Adapter(_map(function, self.params), _map(function, self.buffers), self.config)

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
        sites = len({*self.params, *self.buffers})
        ranks = sorted({r for path in self.params if (r := self.config.rank(self.leaves(path)))})
        parts = [self.config.label(), f"{sites} site{'s' * (sites != 1)}"]
        if ranks:
            parts.append(f"r={ranks[0]}" if len(ranks) == 1 else f"r={ranks[0]}..{ranks[-1]}")
        parts.append(f"{self.num_parameters():,} parameters")
        dtypes = Counter(str(t.dtype).removeprefix("torch.") for t in tensors if t.is_floating_point())
        parts.extend(name for name, _ in dtypes.most_common())
        devices = {str(t.device) for t in tensors} - {"cpu"}
        return f"Adapter({', '.join(parts + sorted(devices))})"


def _map(function: Callable[[Tensor], Tensor], tree: TensorTree) -> dict[str, dict[str, Tensor]]:
    return {path: {name: function(t) for name, t in leaves.items()} for path, leaves in tree.items()}


def _flatten(adapter: Adapter) -> tuple[list[Any], AdapterConfig]:
    return [adapter.params, adapter.buffers], adapter.config


def _flatten_with_keys(adapter: Adapter) -> tuple[list[tuple[Any, Any]], AdapterConfig]:
    keys = [_torch.GetAttrKey("params"), _torch.GetAttrKey("buffers")]
    return list(zip(keys, _flatten(adapter)[0], strict=True)), adapter.config


def _unflatten(children: Any, config: AdapterConfig) -> Adapter:
    params, buffers = children
    return Adapter(params, buffers, config)


def _flatten_with_entries(adapter: Adapter) -> tuple[list[Any], AdapterConfig, tuple[str, str]]:
    return *_flatten(adapter), ("params", "buffers")


def _unflatten_optree(config: AdapterConfig, children: Any) -> Adapter:
    return _unflatten(children, config)


def _dump_config(config: AdapterConfig) -> str:
    return json.dumps(config.to_dict(), sort_keys=True)


def _load_config(text: str) -> AdapterConfig:
    return config_from_dict(json.loads(text))


_torch.add_safe_globals([Adapter])  # `torch.export.load` reads an exported program's example inputs
_torch.register_pytree_node(
    Adapter,
    _flatten,
    _unflatten,
    serialized_type_name="funcadapt.Adapter",
    to_dumpable_context=_dump_config,
    from_dumpable_context=_load_config,
    flatten_with_keys_fn=_flatten_with_keys,
)
_optree: Any = optree  # its types want a Collection
_optree.register_pytree_node(
    Adapter,
    _flatten_with_entries,
    _unflatten_optree,
    path_entry_type=optree.GetAttrEntry,
    namespace=_optree.registry.__GLOBAL_NAMESPACE,
)
