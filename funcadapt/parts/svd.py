"""The largest singular directions of a matrix: exact, or by torch's randomised method from a seed."""

from __future__ import annotations

import contextlib
from collections.abc import Generator

import torch
from torch import Tensor

from funcadapt._torch import fork_rng, linalg


@contextlib.contextmanager
def seeded(seed: int | None, device: torch.device) -> Generator[None]:
    """Torch's own generator from a seed, and then as it was before: `torch.svd_lowrank` takes no other one.

    Args:
        seed: the seed; None leaves the generator alone, so that it goes on.
        device: where numbers are drawn.
    """
    if seed is None:
        yield
        return
    with fork_rng(devices=[] if device.type == "cpu" else [device], device_type=device.type):
        torch.manual_seed(seed)  # pyright: ignore[reportUnknownMemberType]
        yield


def largest(matrix: Tensor, r: int, niter: int | None = None, seed: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """U, S and V^T of a matrix, cut to its r largest singular values.

    Args:
        matrix: (out, columns).
        r: how many, at most all.
        niter: power iterations of the randomised method; None computes them exactly.
        seed: the seed of the randomised method; None draws from torch's own generator.

    Returns:
        (out, r), (r) and (r, columns).

    Example:
        >>> w = torch.arange(6.0).reshape(3, 2)
        >>> [tuple(part.shape) for part in largest(w, 1)]
        [(3, 1), (1,), (1, 2)]
        >>> all(torch.equal(a, b) for a, b in zip(largest(w, 1, 2, seed=0), largest(w, 1, 2, seed=0)))
        True
    """
    if niter is None:
        u, s, vh = linalg.svd(matrix, full_matrices=False)
    else:
        with seeded(seed, matrix.device):
            u, s, v = torch.svd_lowrank(matrix, r, niter=niter)
        vh = v.t()
    return u[:, :r], s[:r], vh[:r]
