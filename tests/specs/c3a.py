"""C3A."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

import funcadapt as fa
from funcadapt.sites import Site
from specs import Dense, Parity, Spec, Variant, config


def c3a(site: Site, p: Mapping[str, Tensor], weight: Tensor, bias: Tensor | None) -> Dense:
    """Every row of a block is the one above it, one place to the right."""
    kernel = p["c3a_kernel"]
    blocks = [[torch.stack([c.roll(i) for i in range(len(c))]) for c in row] for row in kernel]
    dense = torch.cat([torch.cat(row, 1) for row in blocks])
    return weight + (dense / dense.shape[1]).reshape(weight.shape), bias


SPECS = {
    "c3a": Spec(
        [
            Variant("plain", config(fa.C3AConfig, block_size=2), identity=False),
            Variant("zeros", config(fa.C3AConfig, block_size=1, init_weights=True)),
        ],
        c3a,
        {
            # PEFT computes in float32, and its gradient to the input of an adapted layer is wrong
            "plain": Parity({"block_size": 4, "target_modules": ["q_proj", "up_proj"], "init_weights": "gaussian",
                             "block_size_pattern": {"mlp.up_proj": 8}}, ("llama",), gradients=False, tolerance=1e-5),
            "xavier": Parity({"block_size": 1}, tolerance=1e-5),
            "kaiming": Parity({"block_size": 1, "init_weights": "kaiming_uniform"}, tolerance=1e-5),
        },
    )
}  # fmt: skip
