"""DEFT and PaRa."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

import funcadapt as fa
from funcadapt.sites import Site
from specs import GROUPED, PARAMETERS, Dense, Parity, Spec, Variant, config

QR, ALPHA = 3, 5.0  # what the leaves do not say: rank 3 is decomposed, and scaled


def deft(site: Site, p: Mapping[str, Tensor], weight: Tensor, bias: Tensor | None) -> Dense:
    q = n = p["deft_P"]
    flat, r = weight.flatten(1), q.shape[1]
    if r == QR:
        q = n = torch.linalg.qr(q).Q
    else:
        n = n.clamp_min(0)
    new = flat - q @ n.T @ flat
    if "deft_R" in p:
        new = new + q @ p["deft_R"] * (ALPHA / r if r == QR else 1)
    return new.reshape(weight.shape), bias


TOLERANCE = 1e-5  # PEFT computes in float32
SPECS = {
    "deft": Spec(
        [
            Variant("relu", config(fa.DeftConfig, r=2), GROUPED),
            Variant("qr", config(fa.DeftConfig, r=QR, decomposition_method="qr", alpha=ALPHA), GROUPED),
            Variant("para", config(fa.DeftConfig, r=2, para=True), GROUPED, identity=False),
            Variant("random", config(fa.DeftConfig, r=1, init_weights=False), GROUPED, identity=False),
            Variant("dropout", config(fa.DeftConfig, r=2, deft_dropout=0.5), GROUPED | PARAMETERS, training=False),
        ],
        deft,
        {
            "relu": Parity({"r": 3}, ("linear", "linear_no_bias"), tolerance=TOLERANCE, training={"deft_dropout": 0.5}),
            "alpha": Parity({"r": 8, "alpha": 3}, ("linear",), tolerance=TOLERANCE),
            "gpt2": Parity(
                {"r": 3, "alpha": 6, "target_modules": ["c_attn"], "fan_in_fan_out": True},
                ("gpt2",),
                tolerance=TOLERANCE,
            ),
            "qr": Parity({"r": 3, "decomposition_method": "qr"}, ("linear",), tolerance=TOLERANCE),
            "para": Parity({"r": 3, "para": True, "decomposition_method": "qr"}, ("linear",), tolerance=TOLERANCE),
            "random": Parity({"r": 3, "init_weights": False, "init_scale": 3.0}, ("linear",), tolerance=TOLERANCE),
        },
    )
}
