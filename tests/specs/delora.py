"""DeLoRA."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

import funcadapt as fa
from funcadapt.sites import Site
from specs import PARAMETERS, Dense, Parity, Spec, Variant, config


def delora(site: Site, p: Mapping[str, Tensor], weight: Tensor, bias: Tensor | None) -> Dense:
    a, b = p["delora_A"], p["delora_B"]
    delta = 0
    for i in range(a.shape[0]):
        direction = b[:, i, None] * a[None, i] / (a[i].norm() * b[:, i].norm())
        delta = delta + p["delora_lambda"] / a.shape[0] * direction
    return weight + (delta * p["delora_w_norm"]).reshape(weight.shape), bias


SPECS = {
    "delora": Spec(
        [
            Variant("plain", config(fa.DeloraConfig, r=2)),
            Variant("random", config(fa.DeloraConfig, r=2, init_weights=False), identity=False),
            Variant("dropout", config(fa.DeloraConfig, r=2, module_dropout=0.5), PARAMETERS, training=False),
        ],
        delora,
        {
            "plain": Parity(
                {"r": 3, "delora_lambda": 5}, ("linear", "linear_no_bias"), training={"module_dropout": 0.4}
            ),
            "random": Parity({"r": 2, "init_weights": False}),
        },
    )
}
