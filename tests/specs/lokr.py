"""LoKr."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

import funcadapt as fa
from funcadapt.sites import Site
from specs import PARAMETERS, Dense, Parity, Spec, Variant, config


def lokr(site: Site, p: Mapping[str, Tensor], weight: Tensor, bias: Tensor | None) -> Dense:
    w1 = p["lokr_w1"] if "lokr_w1" in p else p["lokr_w1_a"] @ p["lokr_w1_b"]
    n = weight.shape[1] // w1.shape[1]
    if "lokr_w2" in p:
        w2 = p["lokr_w2"]
    elif "lokr_t2" in p:
        core = p["lokr_t2"].reshape(*p["lokr_t2"].shape[:2], *weight.shape[2:])
        w2 = torch.einsum("ij...,jn,ik->kn...", core, p["lokr_w2_b"], p["lokr_w2_a"])
    else:
        w2 = (p["lokr_w2_a"] @ p["lokr_w2_b"]).reshape(-1, n, *weight.shape[2:])
    if site.kind != "conv1d" or "lokr_w2" not in p:  # in one dimension PEFT takes the product of a matrix and a cube
        w1 = w1.reshape(*w1.shape, *(1,) * (w2.ndim - 2))
    return weight + torch.kron(w1, w2.contiguous()).reshape(weight.shape) * p["scaling"], bias


CONVOLUTIONS = ("conv1d", "conv2d", "conv2d_1x1", "conv2d_grouped")

SPECS = {
    "lokr": Spec(
        [
            Variant("plain", config(fa.LoKrConfig, r=1)),
            Variant("whole", config(fa.LoKrConfig, r=8)),
            Variant(
                "both",
                config(fa.LoKrConfig, r=1, decompose_both=True, decompose_factor=4, init_weights=False),
                identity=False,
            ),
            Variant("effective", config(fa.LoKrConfig, r=1, use_effective_conv2d=True, init_weights="lycoris")),
            Variant("dropout", config(fa.LoKrConfig, r=1, rank_dropout=0.5), PARAMETERS, training=False),
        ],
        lokr,
        {
            "plain": Parity({"r": 1, "alpha": 3}, ("linear", *CONVOLUTIONS), training={"rank_dropout": 0.4}),
            "whole": Parity({"r": 4, "alpha": 6}, ("linear", *CONVOLUTIONS)),
            "both": Parity({"r": 1, "decompose_both": True, "decompose_factor": 5}, ("linear", "conv2d")),
            "factor": Parity({"r": 1, "decompose_factor": 2}),
            # in one dimension PEFT fails: torch.kron does not take the strides of its einsum
            "effective": Parity({"r": 1, "use_effective_conv2d": True}, ("conv2d", "conv2d_1x1", "conv2d_grouped")),
            "lycoris": Parity({"r": 1, "init_weights": "lycoris"}, ("linear", "conv1d")),
            "lycoris_whole": Parity({"r": 4, "init_weights": "lycoris"}),
            "random": Parity({"r": 1, "init_weights": False, "rank_pattern": {"layer": 2}}),
            # PEFT scales in float32
            "scaled": Parity({"r": 4}, tolerance=1e-7, training={"rank_dropout": 0.4, "rank_dropout_scale": True}),
        },
    )
}
