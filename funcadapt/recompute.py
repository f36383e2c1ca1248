"""Activation checkpointing: the recomputation in the backward pass sees the adapters of the forward pass."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Generator, Sequence
from typing import Any, Protocol

from funcadapt.binding import ModelState

_thread = threading.local()


class Installable(Protocol):
    """What can be put in place and taken away again: `engine.Installation`."""

    def enter(self) -> None:
        """Put it in place."""
        ...

    def exit(self) -> None:
        """Take it away."""
        ...

    def mark(self) -> Any:
        """Where the call stands."""
        ...

    def restore(self, marks: Any) -> None:
        """Stand there again."""
        ...


def _states() -> list[ModelState]:
    states: list[ModelState] = _thread.__dict__.setdefault("states", [])
    return states


@contextlib.contextmanager
def calling(state: ModelState) -> Generator[None, None, None]:
    """Note that this thread is running a model with adapters, so that `checkpoint_context` finds it."""
    _states().append(state)
    try:
        yield
    finally:
        _states().pop()


def checkpoint_context() -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
    """The `context_fn` of non-reentrant activation checkpointing: the recomputation sees the adapters, too.

    Hugging Face models get it by themselves. Elsewhere it is one argument:
    `torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False, context_fn=fa.checkpoint_context)`.

    Returns:
        A context for the forward pass, and one for the recomputation in the backward pass.

    Example:
        >>> import torch
        >>> import funcadapt as fa
        >>> class Checkpointed(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.block = torch.nn.Linear(4, 4)
        ...     def forward(self, x):
        ...         return torch.utils.checkpoint.checkpoint(
        ...             self.block, x, use_reentrant=False, context_fn=fa.checkpoint_context)
        >>> model = Checkpointed().requires_grad_(False)
        >>> adapter = fa.init(model, fa.LoraConfig(r=2, target_modules=["block"])).map(torch.Tensor.requires_grad_)
        >>> fa.functional_call(model, adapter, torch.randn(3, 4)).sum().backward()
        >>> adapter.params["block"]["lora_B"].grad is not None
        True
    """
    states = _states()
    if not states:
        return contextlib.nullcontext(), contextlib.nullcontext()
    state = states[-1]
    return contextlib.nullcontext(), as_it_was(state, tuple(state.active), [i.mark() for i in state.active])


@contextlib.contextmanager
def as_it_was(
    state: ModelState, then: tuple[Installable, ...], marks: Sequence[Any] | None = None
) -> Generator[None, None, None]:
    """The installations that were active when a checkpoint ran forward, and no others, where they stood then."""
    if tuple(state.active) == then:
        with _standing(then, marks):
            yield
        return
    if not state.lock.acquire(timeout=60):
        raise RuntimeError(
            "An activation checkpoint waits for the model, which another thread holds. Call backward outside of "
            "`with fa.applied(...)` blocks for other adapters."
        )
    try:
        now: list[Installable] = list(state.active)
        for installed in reversed(now):
            installed.exit()
        for installed in then:
            installed.enter()
        try:
            with calling(state), _standing(then, marks):
                yield
        finally:
            for installed in reversed(then):
                installed.exit()
            for installed in now:
                installed.enter()
    finally:
        state.lock.release()


@contextlib.contextmanager
def _standing(then: Sequence[Installable], marks: Sequence[Any] | None) -> Generator[None, None, None]:
    if marks is None:
        yield
        return
    now = [installed.mark() for installed in then]
    for installed, mark in zip(then, marks, strict=True):
        installed.restore(mark)
    try:
        yield
    finally:
        for installed, mark in zip(then, now, strict=True):
            installed.restore(mark)
