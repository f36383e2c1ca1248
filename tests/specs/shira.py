"""SHiRA."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

import funcadapt as fa
from funcadapt.sites import Site
from specs import Dense, Parity, Spec, Variant, config


def shira(site: Site, p: Mapping[str, Tensor], weight: Tensor, bias: Tensor | None) -> Dense:
    """Entry by entry."""
    flat = list(weight.flatten().unbind())
    columns = len(flat) // weight.shape[0]
    for value, row, column in zip(p["shira_weight"], *p["shira_indices"].tolist(), strict=True):
        flat[row * columns + column] = flat[row * columns + column] + value
    return torch.stack(flat).reshape(weight.shape), bias


SPECS = {
    "shira": Spec(
        [
            Variant("plain", config(fa.ShiraConfig, r=1)),
            Variant("normal", config(fa.ShiraConfig, r=1, random_seed=3, init_weights=False), identity=False),
        ],
        shira,
        {
            "plain": Parity({"r": 2}, ("linear", "linear_no_bias")),
            "normal": Parity({"r": 1, "random_seed": 3, "init_weights": False, "target_modules": ["q_proj", "up_proj"]},
                             ("llama",)),
        },
    )
}  # fmt: skip
