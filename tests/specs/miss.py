"""MiSS."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

import funcadapt as fa
from funcadapt.sites import Site
from specs import PARAMETERS, Dense, Parity, Spec, Variant, config


def miss(site: Site, p: Mapping[str, Tensor], weight: Tensor, bias: Tensor | None) -> Dense:
    """Row by row, from the paper: every shard of the inputs gets the same block, cut off at the end."""
    block = p["miss_block"]
    flat = weight.reshape(weight.shape[0], -1)
    out, inputs = flat.shape
    if block.ndim == 3:
        r = block.shape[-1]
        rows = []
        for o, d in enumerate(block):
            tiles = flat[o * r : (o + 1) * r].split(r, 1)
            rows.append(torch.cat([tile + tile @ d + d for tile in tiles], 1))
        return torch.cat(rows).reshape(weight.shape), bias
    r, width = block.shape
    delta = torch.cat([block.t()] * (-(-inputs // r)), 1)[:, :inputs]
    return (flat + torch.cat([delta] * (out // width))).reshape(weight.shape), bias


SPECS = {
    "miss": Spec(
        [
            Variant("plain", config(fa.MissConfig, r=2)),
            Variant("remainder", config(fa.MissConfig, r=3, init_weights=False), identity=False),
            Variant("mini", config(fa.MissConfig, r=2, mini_r=2, init_weights="mini")),
            Variant("bat", config(fa.MissConfig, r=2, init_weights="bat")),
            Variant("dropout", config(fa.MissConfig, r=2, miss_dropout=0.5), PARAMETERS, training=False),
        ],
        miss,
        {
            "plain": Parity({"r": 2}, ("linear", "linear_no_bias"), training={"miss_dropout": 0.4}),
            "remainder": Parity({"r": 4, "init_weights": False}),
            "mini": Parity({"r": 3, "mini_r": 5, "init_weights": "mini"}),
            "bat": Parity({"r": 4, "init_weights": "bat", "target_modules": ["q_proj", "up_proj"]}, ("llama",)),
        },
    )
}
