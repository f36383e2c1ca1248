"""Rows of one batch that use different adapters of a live model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence

import torch
from torch import nn

from funcadapt.adapter import Adapter
from funcadapt.binding import Entry
from funcadapt.call import applied
from funcadapt.errors import AdapterError
from funcadapt.many import routed
from funcadapt.method import method_of
from funcadapt.stacking import stack
from funcadapt.view.state import check_names
from funcadapt.view.values import adapter_of
from funcadapt.view.walking import layers, root_of, unwrapped

BASE = "__base__"


@contextlib.contextmanager
def mixed_batch(
    model: nn.Module, adapter_names: Sequence[str], keep: Callable[[str], bool] | None = None
) -> Generator[nn.Module, None, None]:
    """Row i of every call in the block uses the adapter `adapter_names[i]`, whatever is active.

    For every method: the adapters become values, are stacked, and rows are routed to them by `fa.routed`. (PEFT's
    `adapter_names` is implemented for a few methods, and ignored without a word by the others.)

    Args:
        model: the model.
        adapter_names: a name for each row; "__base__" for the bare model.
        keep: the paths at which this holds, if not everywhere: an encoder may see other rows than its decoder.

    Yields:
        The model.

    Raises:
        AdapterError: if a name is unknown, or adapters are merged.
    """
    check_names(model, (name for name in adapter_names if name != BASE))
    root = root_of(model)
    if any(layer.merged for _, layer in layers(root)):
        raise AdapterError("Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter`.")
    names = [name for name in dict.fromkeys(adapter_names) if name != BASE]
    values = {name: _kept(adapter_of(root, name), keep) for name in names}
    entries: dict[str, Entry] = {}
    for group in _stackable(values):
        place = {name: i for i, name in enumerate(group)}
        index = torch.tensor([place.get(name, -1) for name in adapter_names])
        entries[group[0]] = routed(stack([values[name] for name in group]), index)
    with unwrapped(root), applied(root, entries):
        yield model


def _kept(adapter: Adapter, keep: Callable[[str], bool] | None) -> Adapter:
    if keep is None:
        return adapter
    trees = (
        {path: leaves for path, leaves in tree.items() if keep(path)} for tree in (adapter.params, adapter.buffers)
    )
    return Adapter(*trees, adapter.config)


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
