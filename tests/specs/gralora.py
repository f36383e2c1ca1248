"""GraLoRA."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

import funcadapt as fa
from funcadapt.sites import Site
from specs import PARAMETERS, Dense, Parity, Spec, Variant, config


def gralora(site: Site, p: Mapping[str, Tensor], weight: Tensor, bias: Tensor | None) -> Dense:
    a, b = p["gralora_A"], p["gralora_B"]
    k, ranks = len(a), a.shape[2] // len(a)
    rows = [
        torch.cat(
            [
                (a[n][:, m * ranks : (m + 1) * ranks] @ b[m][n * ranks : (n + 1) * ranks]).t()  # block (m, n)
                for n in range(k)
            ],
            1,
        )
        for m in range(k)
    ]
    delta = torch.cat(rows)
    if "gralora_A_general" in p:
        delta = delta + p["gralora_B_general"] @ p["gralora_A_general"]
    return weight + (delta * p["scaling"]).reshape(weight.shape), bias


HYBRID = {"r": 4, "hybrid_r": 3, "alpha": 5, "gralora_k": 2}

SPECS = {
    "gralora": Spec(
        [
            Variant("plain", config(fa.GraloraConfig, r=4, alpha=5)),
            Variant("hybrid", config(fa.GraloraConfig, **HYBRID)),
            Variant(
                "random",
                config(fa.GraloraConfig, r=2, gralora_k=1, hybrid_r=1, alpha=3, init_weights=False),
                identity=False,
            ),
            Variant("dropout", config(fa.GraloraConfig, **HYBRID, gralora_dropout=0.5), PARAMETERS, training=False),
        ],
        gralora,
        {
            # the layers of `layer_model` have odd sizes
            "whole": Parity(
                {"r": 4, "gralora_k": 1, "hybrid_r": 2}, ("linear", "hf_conv1d"), training={"gralora_dropout": 0.4}
            ),
            "random": Parity({"r": 4, "gralora_k": 1, "hybrid_r": 2, "init_weights": False}),
            "plain": Parity({"r": 4, "alpha": 6, "target_modules": ["q_proj", "down_proj"]}, ("llama",)),
            "hybrid": Parity({**HYBRID, "target_modules": ["q_proj", "down_proj"]}, ("llama",)),
            "blocks": Parity({"r": 8, "gralora_k": 4, "target_modules": ["c_attn", "c_proj"]}, ("gpt2",)),
        },
    )
}
