"""Rows of one batch that use different adapters of a live model."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from funcadapt.adapter import Adapter, TensorTree
from funcadapt.binding import Entry
from funcadapt.call import applied
from funcadapt.errors import AdapterError
from funcadapt.many import routed
from funcadapt.method import method_of
from funcadapt.sharing import SHARED
from funcadapt.stacking import stack
from funcadapt.tying import untied_trees
from funcadapt.view.state import check_names
from funcadapt.view.values import adapter_of
from funcadapt.view.walking import layers, root_of, unwrapped

BASE = "__base__"


@contextlib.contextmanager
def mixed_batch(
    model: nn.Module,
    adapter_names: Sequence[str],
    within: Mapping[str, Sequence[str]] | None = None,
    inputs: Mapping[str, Tensor] | None = None,
) -> Generator[nn.Module, None, None]:
    """Row i of every call in the block uses the adapter `adapter_names[i]`, whatever is active.

    For every method: the adapters become values, are stacked, and rows are routed to them by `fa.routed`. (PEFT's
    `adapter_names` is implemented for a few methods, and ignored without a word by the others.)

    Args:
        model: the model.
        adapter_names: a name for each row; "__base__" for the bare model.
        within: path of a module -> the names for the rows that it sees, where they are others: in beam search an
            encoder sees each row once.
        inputs: what the adapters need of every call, as `fa.functional_call` takes them.

    Yields:
        The model.

    Raises:
        AdapterError: if a name is unknown, or adapters are merged.
    """
    check_names(model, (name for name in adapter_names if name != BASE))
    root = root_of(model)
    if any(layer.merged for _, layer in layers(root)):
        raise AdapterError("Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter`.")
    values = {name: _untied(adapter_of(root, name)) for name in dict.fromkeys(adapter_names) if name != BASE}
    entries: dict[str, Entry] = {}
    for below, there, parts in _by_owners(values, tuple(within or ())):
        names = (within or {}).get(below, adapter_names)
        for group, stacked in _stacks(parts):
            place = {name: i for i, name in enumerate(group)}
            index = torch.tensor([place.get(name, -1) for name in names])
            entries[f"{group[0]} at {there[0]}"] = routed(stacked, index)
    read = frozenset[str]().union(*(method_of(value.config).inputs for value in values.values()))
    own = {name: value for name, value in (inputs or {}).items() if name in read}
    with unwrapped(root), applied(root, entries, inputs=own):
        yield model


def _by_owners(
    values: Mapping[str, Adapter], within: Sequence[str]
) -> Iterator[tuple[str, list[str], dict[str, Adapter]]]:
    """The paths that the same adapters are at, and those adapters there: a stack has all of its adapters everywhere."""
    owners: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for path in dict.fromkeys(path for adapter in values.values() for path in (*adapter.params, *adapter.buffers)):
        below = next((prefix for prefix in within if f"{path}.".startswith(f"{prefix}.")), "")
        names = tuple(name for name, a in values.items() if path in a.params or path in a.buffers)
        owners.setdefault((below, names), []).append(path)
    for (below, names), paths in owners.items():
        parts = {name: values[name] for name in names}
        yield (
            below,
            paths,
            {n: a.replace(params=_at(paths, a.params), buffers=_at(paths, a.buffers)) for n, a in parts.items()},
        )


def _untied(adapter: Adapter) -> Adapter:
    """The adapter with all that a site needs at that site: sites are taken apart below."""
    method = method_of(adapter.config)
    if not method.tied or method.rows:  # rows are no site's
        return adapter
    params, buffers = untied_trees(adapter.params, adapter.buffers, copy=False)
    return adapter.replace(params=params, buffers=buffers)


def _at(paths: Sequence[str], tree: TensorTree) -> TensorTree:
    return {path: tree[path] for path in dict.fromkeys((SHARED, *paths)) if path in tree}


def _stacks(values: dict[str, Adapter]) -> list[tuple[list[str], Adapter]]:
    """The adapters in as few stacks as can be, with their names."""
    try:
        return [(list(values), stack(list(values.values())))]  # nearly always: every tensor is copied once
    except AdapterError:
        groups = _stackable(values)
    return [(group, stack([values[name] for name in group])) for group in groups]


def _stackable(values: dict[str, Adapter]) -> list[list[str]]:
    """Groups of adapters that can be one stack each, those that need the base weight first: they go innermost."""
    groups: list[list[str]] = []
    for name, adapter in values.items():
        for group in groups:
            try:
                stack([values[group[0]], adapter])
            except AdapterError:
                continue
            group.append(name)
            break
        else:
            groups.append([name])
    return sorted(groups, key=lambda group: not method_of(values[group[0]].config).constant_in_gradient)
