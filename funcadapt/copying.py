"""Structural copies: the same tensors under new modules, for parallel threads."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import nn

from funcadapt.binding import state_of
from funcadapt.recompute import as_it_was

_M = TypeVar("_M", bound=nn.Module)


def structural_copy(model: _M) -> _M:
    """A copy of a model's modules that shares every parameter and buffer with it.

    Calls on one model wait for each other; calls on structural copies run in parallel. The copy costs no memory for
    weights, and an in-place change of a weight is seen by all.

    Args:
        model: the model.

    Returns:
        The copy.

    Example:
        >>> import torch
        >>> import funcadapt as fa
        >>> model = torch.nn.Linear(4, 2)
        >>> twin = fa.structural_copy(model)
        >>> twin is model, twin.weight is model.weight
        (False, True)
    """
    state = state_of(model)
    with state.lock, as_it_was(state, ()):  # inside a block that this thread holds, the bare model is copied
        memo: dict[int, Any] = {}
        for module in model.modules():
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                memo[id(tensor)] = tensor
        return copy.deepcopy(model, memo)
