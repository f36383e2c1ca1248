"""Registering a value as a pytree, with torch and with optree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import optree

from funcadapt import _torch


def register_pytree(
    cls: type[Any],
    names: Sequence[str],
    flatten: Callable[[Any], tuple[list[Any], Any]],
    unflatten: Callable[[Any, Any], Any],
    dump: Callable[[Any], Any],
    load: Callable[[Any], Any],
) -> None:
    """Make a class a node of pytrees: for `torch.func`, `torch.compile`, `torch.export` and optree.

    Args:
        cls: the class.
        names: the attributes that are its children.
        flatten: value -> (children, static context).
        unflatten: (children, context) -> value.
        dump: context -> JSON types, for a saved `torch.export` program.
        load: the inverse of `dump`.
    """

    def flatten_with_keys(value: Any) -> Any:
        children, context = flatten(value)
        return [(_torch.GetAttrKey(name), child) for name, child in zip(names, children, strict=True)], context

    def flatten_with_entries(value: Any) -> Any:
        return *flatten(value), tuple(names)

    def from_optree(context: Any, children: Any) -> Any:
        return unflatten(children, context)

    _torch.add_safe_globals([cls])  # `torch.export.load` reads an exported program's example inputs
    _torch.register_pytree_node(
        cls,
        flatten,
        unflatten,
        serialized_type_name=f"funcadapt.{cls.__name__}",
        to_dumpable_context=dump,
        from_dumpable_context=load,
        flatten_with_keys_fn=flatten_with_keys,
    )
    registry: Any = optree  # its types want a Collection
    registry.register_pytree_node(
        cls,
        flatten_with_entries,
        from_optree,
        path_entry_type=optree.GetAttrEntry,
        namespace=registry.registry.__GLOBAL_NAMESPACE,
    )
