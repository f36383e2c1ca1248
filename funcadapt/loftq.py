"""LoftQ: a weight as one of few bits and one of low rank, W = Q + B A, fitted to each other in turns.

    Q = quantised(W - B A),   B A = the best approximation of W - Q of rank r          `iterations` times, B A = 0 first

Source: Li et al. 2023, arXiv:2310.08659; NF4: Dettmers et al. 2023, arXiv:2305.14314. PEFT needs a GPU for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from funcadapt._torch import linalg

# the 16 numbers of NF4: quantiles of the normal distribution, scaled to [-1, 1]
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_BLOCK = 64  # numbers that share a scale in NF4


def quantised(weight: Tensor, bits: int) -> Tensor:
    """The nearest weight of few bits: NF4 in blocks of 64 numbers, or 8-bit integers times a scale for each row.

    Args:
        weight: (out, in), in at least float32.
        bits: 4 or 8.

    Returns:
        The weight after rounding, in the dtype of the given one.

    Raises:
        ValueError: if the number of bits is another one.

    Example:
        >>> import torch
        >>> quantised(torch.tensor([[1.0, 0.1, -0.5]]), 4)
        tensor([[ 1.0000,  0.0796, -0.5251]])
    """
    if bits == 8:
        scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
        return (weight / scale).round() * scale
    if bits != 4:
        raise ValueError(f"Only nf4 and int8 quantization is supported: 4 or 8 bits, got {bits}.")
    flat = weight.reshape(-1)
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % _BLOCK)).reshape(-1, _BLOCK)
    table = torch.tensor(_NF4, dtype=weight.dtype, device=weight.device)
    scale = blocks.abs().amax(1, keepdim=True)
    unit = blocks / torch.where(scale == 0, 1.0, scale)
    nearest = torch.bucketize(unit, (table[1:] + table[:-1]) / 2)
    return (table[nearest] * scale).reshape(-1)[: flat.numel()].reshape(weight.shape)


def factors(rest: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """The best approximation of rank r, as a product with the singular values shared out between both factors.

    Args:
        rest: (out, in): what was rounded away.
        r: the rank.

    Returns:
        A (r, in) and B (out, r), of a smaller rank where the matrix is smaller.

    Example:
        >>> import torch
        >>> a, b = factors(torch.diag(torch.tensor([4.0, 1.0])), 1)
        >>> b @ a
        tensor([[4., 0.],
                [0., 0.]])
    """
    u, s, vh = linalg.svd(rest, full_matrices=False)
    root = s[:r].sqrt()
    return root[:, None] * vh[:r], u[:, :r] * root


def decomposed(weight: Tensor, bits: int, r: int, iterations: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """LoftQ of one weight.

    Args:
        weight: (out, in).
        bits: 4 or 8.
        r: the rank.
        iterations: how often both parts are fitted.

    Returns:
        Q (out, in), A (r, in) and B (out, r), in at least float32.

    Raises:
        ValueError: if the number of bits or of iterations cannot be.
    """
    if iterations < 1:
        raise ValueError("Number of iterations must be greater than 0")
    w = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    rest = w
    for _ in range(iterations):
        q = quantised(rest, bits)
        a, b = factors(w - q, r)
        rest = w - b @ a
    return q, a, b  # pyright: ignore[reportPossiblyUnboundVariable]
