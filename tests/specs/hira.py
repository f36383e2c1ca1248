"""HiRA."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

import funcadapt as fa
from funcadapt.sites import Site
from specs import PARAMETERS, Dense, Parity, Spec, Variant, config


def hira(site: Site, p: Mapping[str, Tensor], weight: Tensor, bias: Tensor | None) -> Dense:
    a, b = (p["hira_A"], p["hira_B"]) if "hira_A" in p else (p["hira_embedding_A"], p["hira_embedding_B"])
    b = b.reshape(*b.shape[:2], *(1,) * (a.ndim - 2)).expand(*b.shape[:2], *a.shape[2:])
    return weight * (1 + torch.einsum("or...,ri...->oi...", b, a)), bias


CONVOLUTIONS = ("conv1d", "conv2d", "conv2d_1x1", "conv3d")

SPECS = {
    "hira": Spec(
        [
            Variant("plain", config(fa.HiraConfig, r=2)),
            Variant("random", config(fa.HiraConfig, r=1, init_weights=False), identity=False),
            Variant("dropout", config(fa.HiraConfig, r=2, hira_dropout=0.5), PARAMETERS, training=False),
        ],
        hira,
        {
            "plain": Parity({"r": 4}, ("linear", "hf_conv1d", *CONVOLUTIONS), training={"hira_dropout": 0.4}),
            # PEFT has a gradient at the padding index
            "embedding": Parity({"r": 4}, ("embedding",), gradients=False),
            "gaussian": Parity({"r": 3, "init_weights": "gaussian"}, ("linear", "conv2d")),
            "random": Parity({"r": 3, "init_weights": False}, ("linear", "conv1d")),
            "random_embedding": Parity({"r": 3, "init_weights": False}, ("embedding",), gradients=False),
            "none": Parity({"r": 3, "init_weights": None}),
            "none_embedding": Parity({"r": 3, "init_weights": None}, ("embedding",), gradients=False),
        },
    )
}
