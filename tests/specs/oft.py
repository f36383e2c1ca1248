"""OFT."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

import funcadapt as fa
from funcadapt.sites import Site
from specs import Dense, Parity, Spec, Variant, config

EPS = 0.2


def rotation(vectors: Tensor, size: int, *, exact: bool, coft: bool = False) -> Tensor:
    """R, number by number and power by power; five terms."""
    side = next(k for k in range(1, 99) if k * (k - 1) // 2 == vectors.shape[1])
    blocks: list[Tensor] = []
    for vector in vectors:
        q, numbers = torch.zeros(side, side, dtype=vector.dtype), iter(vector)
        for i in range(side):
            for j in range(i + 1, side):
                one = torch.zeros(side, side, dtype=vector.dtype)
                one[i, j], one[j, i] = 1, -1
                q = q + one * next(numbers)
        if coft and q.norm() > EPS / len(vectors) ** 0.5:
            q = q * (EPS / len(vectors) ** 0.5 / q.norm())
        eye = torch.eye(side, dtype=vector.dtype)
        series = eye + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q
        blocks.append((eye - q) @ torch.linalg.inv(eye + q) if exact else series)
    return torch.block_diag(*blocks * (size // side if len(blocks) == 1 else 1))


def oft(site: Site, p: Mapping[str, Tensor], weight: Tensor, bias: Tensor | None) -> Dense:
    # what the leaves do not say, here they do: one block is exact, and one number for all blocks is constrained
    (vectors,) = p.values()
    size = site.out_features if site.kind == "embedding" else weight[0].numel()
    r = rotation(vectors, size, exact=vectors.shape == (1, size * (size - 1) // 2), coft=vectors.shape == (1, 1))
    if site.kind == "embedding":
        return r.T @ weight, bias
    return (weight.flatten(1) @ r.T).reshape(weight.shape), bias


SPECS = {
    "oft": Spec(
        [
            Variant("plain", config(fa.OFTConfig, oft_block_size=2)),
            Variant("exact", config(fa.OFTConfig, r=1, oft_block_size=0, use_cayley_neumann=False)),
            Variant("coft", config(fa.OFTConfig, oft_block_size=2, block_share=True, coft=True, eps=EPS)),
            Variant("random", config(fa.OFTConfig, r=2, oft_block_size=0, init_weights=False), identity=False),
        ],
        oft,
        {
            "plain": Parity({"oft_block_size": 3}, ("linear", "linear_no_bias", "embedding")),
            "conv": Parity({"oft_block_size": 2}, ("conv2d_1x1",)),
            "exact": Parity({"oft_block_size": 3, "use_cayley_neumann": False}, ("linear", "embedding")),
            "shared": Parity({"r": 2, "oft_block_size": 0, "block_share": True}, ("linear", "embedding")),
            "random": Parity({"oft_block_size": 6, "init_weights": False}, ("linear",)),
            # PEFT projects the numbers without a gradient
            "coft": Parity(
                {"oft_block_size": 3, "coft": True, "eps": EPS},
                ("linear", "embedding"),
                gradients=False,
                tolerance=1e-6,  # eps in float32
            ),
            **{
                f"terms_{n}": Parity({"oft_block_size": 3, "num_cayley_neumann_terms": n}, ("linear",))
                for n in (2, 3, 4, 7)
            },
        },
    )
}
