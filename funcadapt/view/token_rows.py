"""Layers of which some rows of the weight are replaced, as pure functions.

Replaced rows are looked up instead of being written into a copy of the weight: the copy of a vocabulary costs more than
the layer itself.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def replaced(weight: Tensor, indices: Tensor, rows: Tensor) -> Tensor:
    """A weight with some rows replaced.

    Args:
        weight: (vocabulary, width).
        indices: (tokens), distinct.
        rows: (tokens, width).

    Returns:
        The new weight.
    """
    return weight.index_copy(0, indices, rows.to(weight))


def look_up(x: Tensor, y: Tensor, indices: Tensor, rows: Tensor) -> Tensor:
    """The output of an embedding whose rows at `indices` are others.

    Args:
        x: token ids.
        y: the output of the embedding as it is, (*x.shape, width).
        indices: (tokens), distinct.
        rows: (tokens, width).

    Returns:
        The output.
    """
    ordered, order = indices.to(x.dtype).sort()
    place = torch.searchsorted(ordered, x).clamp(max=len(ordered) - 1)
    hit = ordered[place] == x
    return torch.where(hit.unsqueeze(-1), F.embedding(order[place], rows.to(y)), y)


def project(x: Tensor, y: Tensor, indices: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
    """The output of a linear layer whose rows at `indices` are others.

    Args:
        x: (..., width).
        y: the output of the layer as it is, (..., vocabulary).
        indices: (tokens), distinct.
        rows: (tokens, width).
        bias: (vocabulary), or None.

    Returns:
        The output.
    """
    new = F.linear(x, rows, None if bias is None else bias[indices])
    return y.index_copy(-1, indices, new.to(y.dtype))
