"""LoHa."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

import funcadapt as fa
from funcadapt.sites import Site
from specs import PARAMETERS, Dense, Parity, Spec, Variant, config


def half(p: Mapping[str, Tensor], i: int) -> Tensor:
    a, b = p[f"hada_w{i}_a"], p[f"hada_w{i}_b"]
    if f"hada_t{i}" not in p:
        return a @ b
    core = p[f"hada_t{i}"]
    r = len(core)
    terms = [
        a[m].reshape(-1, 1, *(1,) * (core.ndim - 2)) * core[m, n] * b[n].reshape(1, -1, *(1,) * (core.ndim - 2))
        for m in range(r)
        for n in range(r)
    ]
    return torch.stack(terms).sum(0)


def loha(site: Site, p: Mapping[str, Tensor], weight: Tensor, bias: Tensor | None) -> Dense:
    return weight + (half(p, 1) * half(p, 2) * p["scaling"]).reshape(weight.shape), bias


CONVOLUTIONS = ("conv1d", "conv2d", "conv2d_1x1", "conv2d_grouped")

SPECS = {
    "loha": Spec(
        [
            Variant("plain", config(fa.LoHaConfig, r=2, alpha=3)),
            # of so low a rank that the factored form is used
            Variant("rank1", config(fa.LoHaConfig, r=1, init_weights=False), identity=False),
            Variant("effective", config(fa.LoHaConfig, r=2, use_effective_conv2d=True)),
            Variant("dropout", config(fa.LoHaConfig, r=2, rank_dropout=0.5), PARAMETERS, training=False),
        ],
        loha,
        {
            "plain": Parity({"r": 4, "alpha": 6}, ("linear", *CONVOLUTIONS), training={"rank_dropout": 0.4}),
            "rank1": Parity({"r": 1}, ("linear", "conv2d"), training={"rank_dropout": 0.4}),
            "random": Parity({"r": 4, "alpha": 6, "init_weights": False}),
            "patterns": Parity({"r": 4, "alpha": 6, "rank_pattern": {"layer": 3}, "alpha_pattern": {"layer": 4.5}}),
            # PEFT's gradients are wrong (B2)
            "effective": Parity({"r": 4, "use_effective_conv2d": True}, CONVOLUTIONS, gradients=False),
            "llama": Parity({"r": 2, "target_modules": ["q_proj", "down_proj"]}, ("llama",)),
        },
    )
}
