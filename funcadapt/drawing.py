"""Numbers from a seed, by counting and hashing: the same on every device, in a graph, and whatever else is drawn."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor


# Strings and hashes are no business of dynamo.
@torch.compiler.assume_constant_result  # pyright: ignore[reportUnknownMemberType, reportUntypedFunctionDecorator]
def _keys(seed: int, path: str) -> tuple[int, int]:
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def _scrambled(x: Tensor) -> Tensor:
    """A hash of 32-bit numbers, held in int64 so that no product overflows."""
    for _ in range(2):
        x = ((x >> 16) ^ x) * 0x45D9F3B & 0xFFFFFFFF
    return (x >> 16) ^ x


def uniform(seed: int, path: str, shape: Sequence[int], device: torch.device) -> Tensor:
    """Uniform numbers that depend on a seed and a path alone.

    Args:
        seed: the seed.
        path: the path of a site.
        shape: the shape.
        device: the device.

    Returns:
        Numbers in [0, 1), multiples of 2^-24, in float32.

    Example:
        >>> a, b = (uniform(seed, "layer", (1000,), torch.device("cpu")) for seed in (0, 1))
        >>> bool((a.mean() - 0.5).abs() < 0.03), bool(torch.corrcoef(torch.stack([a, b]))[0, 1].abs() < 0.1)
        (True, True)
    """
    first, second = _keys(seed, path)  # pyright: ignore[reportUnknownVariableType]
    count = torch.arange(math.prod(shape), device=device)
    bits = _scrambled(_scrambled(count ^ first) ^ second)  # pyright: ignore[reportUnknownArgumentType]
    return ((bits & 0xFFFFFF).to(torch.float32) / 2**24).view(*shape)
