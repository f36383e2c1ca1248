"""Taking an adapter out of a live model with its config, and undoing what went wrong."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from typing import Any

from torch import nn

from funcadapt.view import dematerialize, state
from funcadapt.view.walking import root_of, view_state


def delete(model: nn.Module, adapter_name: str) -> None:
    """Take an adapter out of a model, its config too. With the last one the model becomes what it was before the first.

    Args:
        model: any model with adapters in it.
        adapter_name: the adapter's name.

    Raises:
        ValueError: if there is no such adapter.
    """
    root = root_of(model)
    configs: Any = getattr(root, "peft_config", None)
    if list(view_state(root).configs) == [adapter_name]:
        dematerialize(root)
    else:
        state.delete_adapter(root, adapter_name)
    if configs is not None:
        configs.pop(adapter_name, None)


def _switches(parts: Sequence[Any]) -> Callable[[], None]:
    """A function that gives layers and wrappers the active adapters and gradients that they have now."""
    before = [
        (part, part.__dict__.get("_active_adapter"), [(p, p.requires_grad) for p in part.parameters()])
        for part in parts
    ]

    def restore() -> None:
        for part, active, flags in before:
            if active is not None:
                part._active_adapter = active
            for parameter, flag in flags:
                parameter.requires_grad_(flag)

    return restore


@contextlib.contextmanager
def as_they_are(parts: Sequence[Any]) -> Generator[None, None, None]:
    """Layers and wrappers have the same active adapters and gradients after the block as before it."""
    restore = _switches(parts)
    try:
        yield
    finally:
        restore()


@contextlib.contextmanager
def undone_on_failure(model: nn.Module, adapter_name: str) -> Generator[None, None, None]:
    """An adapter that is put into a model in the block is not there if the block raises."""
    restore = _switches(state.parts(model))
    known = adapter_name in view_state(model).configs
    try:
        yield
    except BaseException:
        if not known and adapter_name in view_state(model).configs:
            delete(model, adapter_name)
        restore()
        raise
