"""Every private torch name that funcadapt uses, with the reason, so that a torch release breaks one file.

`tests/test_torch_names.py` fails loudly when one of them changes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree

# torch has no public way to register a node with key paths and a serialisable context.
register_pytree_node: Callable[..., None] = _pytree.register_pytree_node
GetAttrKey: Callable[[str], Any] = _pytree.GetAttrKey
# What `__torch_function__` is asked about when a model calls `F.grouped_mm`, which is a plain Python wrapper.
grouped_mm: Callable[..., Any] = torch._grouped_mm  # pyright: ignore


def is_compiling() -> bool:
    """Whether dynamo or export is tracing: then locks, caches and warnings are left out."""
    return torch.compiler.is_compiling()


def in_functorch() -> bool:
    """Whether a `torch.func` transform is active (there is no public query)."""
    return torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore


def in_reentrant_checkpoint() -> bool:
    """Whether the caller runs inside the forward pass of a reentrant `torch.utils.checkpoint`.

    There is nothing to query, so the stack is walked: only call this when something already looks wrong.
    """
    frame = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
    while frame is not None:
        code = frame.f_code
        if code.co_name == "forward" and code.co_filename == torch.utils.checkpoint.__file__:
            return True
        frame = frame.f_back
    return False
