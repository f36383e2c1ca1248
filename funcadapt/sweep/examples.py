"""The examples of a sweep: a pytree of tensors with the examples as the first axis."""

from __future__ import annotations

import inspect
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optree
import torch
from torch import Tensor, nn

from funcadapt.errors import AdapterError

Tree = Any
"""A pytree of tensors."""

Inputs = Callable[[Any], tuple[tuple[Any, ...], dict[str, Any]]]
"""The batch -> the model's positional and keyword arguments."""


def checked(data: Tree, what: str, least: int) -> Tree:
    """The data, if they are at least so many examples."""
    if isinstance(data, Mapping):
        data = dict(typing.cast("Mapping[str, Any]", data))  # a tokenizer's output is no dict
    leaves: list[Any] = optree.tree_leaves(data)  # pyright: ignore
    if not leaves or not all(isinstance(t, Tensor) and t.ndim for t in leaves):
        raise AdapterError(f"{what} must be a tensor, or a dict or tuple of tensors, with the examples as first axis.")
    sizes = {len(t) for t in leaves}
    if len(sizes) > 1:
        raise AdapterError(f"{what} has tensors of {' and '.join(map(str, sorted(sizes)))} examples.")
    if min(sizes) < least:
        raise AdapterError(f"{what} has too few examples: {min(sizes)}, and {least} are needed for one batch.")
    return data


def size(data: Tree) -> int:
    """How many examples there are."""
    leaves: list[Tensor] = optree.tree_leaves(data)  # pyright: ignore
    return len(leaves[0])


def take(data: Tree, rows: Tensor, device: torch.device) -> Tree:
    """Some of the examples, on a device."""
    return optree.tree_map(lambda t: t[rows.to(t.device)].to(device), data)  # pyright: ignore


def order(examples: int, count: int, seed: int) -> Tensor:
    """Which example comes when: one permutation of all after another, (count,)."""
    generator = torch.Generator().manual_seed(seed)
    epochs = math.ceil(count / examples)
    return torch.cat([torch.randperm(examples, generator=generator) for _ in range(epochs)])[:count]


def default_inputs(model: nn.Module) -> Inputs:
    """A tensor is the only argument, a dict are keyword arguments, and of a tuple the first entry is the argument."""
    takes_cache = "use_cache" in inspect.signature(model.forward).parameters
    extra: dict[str, Any] = {"use_cache": False} if takes_cache else {}

    def inputs(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if isinstance(batch, Mapping):
            fields = typing.cast("Mapping[str, Any]", batch)
            return (), {**{k: v for k, v in fields.items() if k != "labels"}, **extra}
        if isinstance(batch, tuple | list):
            return (typing.cast("Sequence[Any]", batch)[0],), dict(extra)
        return (batch,), dict(extra)

    return inputs
