"""Orthogonal maps of a layer's inputs, of blocks and in butterflies: what OFT, BOFT, HRA and PSOFT have in common.

They act on what a layer gets or, at an embedding, on what it looks up; a convolution runs once more, with the change of
its weight.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from funcadapt._torch import linalg, unflatten
from funcadapt.layer import Layer
from funcadapt.parts.forms import autocasts, columns
from funcadapt.sites import Site


def size_of(site: Site) -> int:
    """How many numbers are turned: the inputs, those of a kernel, or the width of an embedding."""
    return site.out_features if site.kind == "embedding" else columns(site)


def turns_input(site: Site) -> bool:
    """Whether it is the input of the layer that is turned: not what it looks up, nor the weight of a convolution."""
    return site.kind != "embedding" and not site.kind.startswith("conv")


def skew(vectors: Tensor, side: int) -> Tensor:
    """The skew matrices (n, side, side) with the given numbers (n, side (side - 1) / 2) above their diagonals."""
    rows, columns = torch.triu_indices(side, side, 1, device=vectors.device).unbind(0)
    places = (rows * side + columns).expand(vectors.shape[0], -1)
    # contiguous matrices: products with others are several times slower on a CPU
    upper = vectors.new_zeros(vectors.shape[0], side * side).scatter(1, places, vectors)
    upper = unflatten(upper, 1, (side, side))
    return upper - upper.mT


def side_of(numbers: int) -> int:
    """The side of the skew matrices that have so many numbers above their diagonals."""
    side = 1
    while side * (side - 1) // 2 < numbers:  # dynamo knows no root of a size
        side += 1
    return side


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context without autocast on a device: a product in 16 bits would not be orthogonal."""
    if autocasts(device):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def cayley(q: Tensor, terms: int | None) -> Tensor:
    """Orthogonal matrices from skew ones.

    Args:
        q: skew matrices, (n, side, side).
        terms: None for (I - Q) (I + Q)^-1; otherwise the length of the series of (I + Q) (I - Q)^-1.

    Returns:
        As `q`.
    """
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    if terms is None:
        return linalg.solve_ex(eye + q, eye - q)[0]  # never singular, so no check, for which a GPU would wait
    if terms < 2:
        return eye + 0 * q
    if terms == 2:
        return eye + 2 * q
    last = max(3, terms - 1)
    partial = q + 2 * eye  # Horner: I + Q (2 I + Q (2 I + ... (2 I + Q)))
    for power in range(last - 1):
        partial = torch.baddbmm(eye, q, partial, beta=1 if power == last - 2 else 2)
    return partial


def rotated(x: Tensor, blocks: Tensor) -> Tensor:
    """X R, for the rows of x.

    Args:
        x: (*batch, n * side).
        blocks: (n, side, side), or (1, side, side) for all.

    Returns:
        Of x's shape.
    """
    side = blocks.shape[-1]
    if blocks.shape[0] == 1:
        return (x.reshape(-1, side) @ blocks[0]).reshape(x.shape)
    rows = x.reshape(-1, blocks.shape[0], side)
    return torch.bmm(rows.transpose(0, 1), blocks).transpose(0, 1).reshape(x.shape)


def butterfly(x: Tensor, blocks: Tensor, *, transposed: bool = False) -> Tensor:
    """X R, for the rows of x, or x R^T, where R is a product of factors.

    R = R_N ... R_1 with R_n = P_n blockdiag(Q_n1, ..., Q_nD) P_n^T. P_n pairs the half blocks that are 2^(n-1) half
    blocks apart, within segments of k 2^(n-1) numbers; it is a transposition of axes here.

    Args:
        x: (*batch, D * k).
        blocks: (N, D, k, k).
        transposed: whether it is R^T.

    Returns:
        Of x's shape.
    """
    factors, count, side = blocks.shape[:3]
    rows = x.reshape(-1, count * side)
    for n in range(factors) if transposed else reversed(range(factors)):
        q = blocks[n].mT if transposed else blocks[n]
        if n == 0:
            rows = torch.bmm(unflatten(rows, 1, (count, side)).transpose(0, 1), q).transpose(0, 1).flatten(1)
            continue
        # (rows, segments, 2, 2^n, k / 2) <-> (segments, 2^n, rows, 2, k / 2): the pairs of half blocks
        segments, half = count >> n, side // 2
        pairs = rows.reshape(-1, segments, 2, 1 << n, half).permute(1, 3, 0, 2, 4).reshape(count, -1, side)
        pairs = torch.bmm(pairs, q).reshape(segments, 1 << n, -1, 2, half)
        rows = pairs.permute(2, 0, 3, 1, 4).reshape(-1, count * side)
    return rows.reshape(x.shape)


def convolved(layer: Layer, x: Tensor, weight: Tensor) -> Tensor:
    """A weight in canonical form applied as a convolution's own, with its groups.

    Args:
        layer: the layer.
        x: its input.
        weight: (n, in / groups, *kernel), where the first n / groups outputs see the first group, and so on.

    Returns:
        The n outputs, without a bias.
    """
    site, outputs = layer.site, weight.shape[0]
    if site.groups > 1:  # zeros where an output does not see the input
        ones = (1,) * (weight.ndim - 1)
        eye = torch.eye(site.groups, dtype=weight.dtype, device=weight.device)
        weight = weight.reshape(site.groups, -1, 1, *weight.shape[1:]) * eye.reshape(site.groups, 1, site.groups, *ones)
        weight = weight.reshape(outputs, site.in_features, *site.shape[2:])
    return layer.linear(x.to(weight.dtype), weight)
