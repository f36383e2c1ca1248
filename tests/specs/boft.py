"""BOFT."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

import funcadapt as fa
from funcadapt.sites import Site
from specs import EMBEDDINGS, PARAMETERS, Dense, Parity, Spec, Variant, config


def permutation(size: int, segment: int, half: int) -> Tensor:
    """P of the paper's code: within each segment, first the even chunks of `half` numbers, then the odd ones."""
    matrix = torch.zeros(size, size, dtype=torch.float64)
    for start in range(0, size, segment):
        chunks = list(range(start, start + segment, half))
        order = [number for chunk in chunks[::2] + chunks[1::2] for number in range(chunk, chunk + half)]
        for row, column in enumerate(order, start):
            matrix[row, column] = 1
    return matrix


def rotation(factors: Tensor) -> Tensor:
    """R, from dense permutations and dense block-diagonal matrices."""
    n, blocks, side, _ = factors.shape
    size = blocks * side
    product = torch.eye(size, dtype=factors.dtype)
    for i in range(n):
        p = torch.eye(size) if n == 1 else permutation(size, side * 2**i, side // 2)
        p, eye = p.to(factors.dtype), torch.eye(side, dtype=factors.dtype)
        skews = [(a - a.T) / 2 for a in factors[i]]
        diagonal = torch.block_diag(*[(eye - k) @ torch.linalg.inv(eye + k) for k in skews])
        product = p @ diagonal @ p.T @ product
    return product


def boft(site: Site, p: Mapping[str, Tensor], weight: Tensor, bias: Tensor | None) -> Dense:
    r, s = rotation(p["boft_R"]), p["boft_s"].flatten()
    new = r.T @ weight if site.kind == "embedding" else (weight.flatten(1) @ r.T).reshape(weight.shape)
    return new * s.reshape(-1, *(1,) * (weight.ndim - 1)), bias


ODD = frozenset({"conv2d_grouped", *EMBEDDINGS})  # 18 inputs and 6: no even number of blocks of an even size

SPECS = {
    "boft": Spec(
        [
            Variant("plain", config(fa.BOFTConfig, boft_block_size=2)),
            Variant("butterfly", config(fa.BOFTConfig, boft_block_size=2, boft_n_butterfly_factor=2), refused=ODD),
            Variant("random", config(fa.BOFTConfig, boft_block_size=0, boft_block_num=2, init_weights=False),
                    identity=False),
            Variant("dropout", config(fa.BOFTConfig, boft_block_size=2, boft_dropout=0.5), PARAMETERS, training=False),
        ],
        boft,
        {
            "plain": Parity({"boft_block_size": 3}, ("linear", "linear_no_bias")),
            "thin": Parity({"boft_block_size": 2}, ("linear",), training={"boft_dropout": 0.6}),
            "conv": Parity({"boft_block_size": 2}, ("conv2d_1x1",)),
            "random": Parity(
                {"boft_block_size": 0, "boft_block_num": 1, "init_weights": False}, ("linear",), tolerance=1e-6
            ),
        },
    )
}  # fmt: skip
