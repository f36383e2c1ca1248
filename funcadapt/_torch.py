"""Every private torch name that funcadapt uses, with the reason, so that a torch release breaks one file.

`tests/test_torch_names.py` fails loudly when one of them changes.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree
from torch.utils import checkpoint as _checkpoint

# Activation checkpointing is public, but untyped.
checkpoint: Any = _checkpoint.checkpoint  # pyright: ignore

# torch.load, and with it torch.export.load, opens no class that was not named to it. Public, but untyped.
add_safe_globals: Callable[[list[Any]], None] = torch.serialization.add_safe_globals  # pyright: ignore

# torch.linalg is a C extension without types.
linalg: Any = torch.linalg
fork_rng: Any = torch.random.fork_rng  # pyright: ignore

# Every nested argument and output of a model, Hugging Face's output classes too; optree does not know those.
pytree: Any = _pytree

# torch has no public way to register a node with key paths and a serialisable context.
register_pytree_node: Callable[..., None] = _pytree.register_pytree_node
GetAttrKey: Callable[[str], Any] = _pytree.GetAttrKey
# What `__torch_function__` is asked about when a model calls `F.grouped_mm`, which is a plain Python wrapper.
grouped_mm: Callable[..., Any] = torch._grouped_mm  # pyright: ignore


def is_compiling() -> bool:
    """Whether dynamo or export is tracing: then locks, caches and warnings are left out."""
    return torch.compiler.is_compiling()


def is_recording() -> bool:
    """Whether what is computed now becomes part of a graph, also one of `torch.jit.trace`: it must not be cached."""
    return is_compiling() or torch.jit.is_tracing()  # pyright: ignore


def unflatten(t: torch.Tensor, axis: int, sizes: tuple[int, ...]) -> torch.Tensor:
    """`t.unflatten(axis, sizes)`, which torch leaves untyped."""
    return t.unflatten(axis, sizes)  # pyright: ignore


def named_modules(model: nn.Module, *, remove_duplicate: bool = True) -> list[tuple[str, nn.Module]]:
    """`model.named_modules()`, which torch leaves untyped."""
    return list(model.named_modules(remove_duplicate=remove_duplicate))  # pyright: ignore


def in_functorch() -> bool:
    """Whether a `torch.func` transform is active (there is no public query)."""
    return torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore


def outside_functorch() -> contextlib.AbstractContextManager[Any]:
    """A block that no `torch.func` transform sees: for constants, by kernels that none of them goes through."""
    if is_compiling() or not in_functorch():
        return contextlib.nullcontext()
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    return temporarily_clear_interpreter_stack()


def values_unknown() -> bool:
    """Whether tensors may hide their values: while dynamo traces, and under `torch.func`."""
    return is_compiling() or in_functorch()


def in_reentrant_checkpoint() -> bool:
    """Whether the caller runs inside the forward pass of a reentrant `torch.utils.checkpoint`.

    There is nothing to query, so the stack is walked: only call this when something already looks wrong.

    Returns:
        Whether a frame of that forward pass is on the stack.
    """
    frame = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
    while frame is not None:
        code = frame.f_code
        if code.co_name == "forward" and code.co_filename == _checkpoint.__file__:
            return True
        frame = frame.f_back
    return False
