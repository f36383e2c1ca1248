"""Uni-LoRA."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

import funcadapt as fa
from funcadapt.sites import Site
from specs import PARAMETERS, Dense, Parity, Spec, Variant, config


def unilora(site: Site, p: Mapping[str, Tensor], weight: Tensor, bias: Tensor | None) -> Dense:
    a = p["unilora_theta_d"][p["unilora_indices_A"]] * p["unilora_scales_A"]
    b = p["unilora_theta_d"][p["unilora_indices_B"]] * p["unilora_scales_B"]
    return weight + (b @ a).reshape(weight.shape), bias


LLAMA = {"target_modules": ["q_proj", "down_proj", "o_proj"]}

SPECS = {
    "unilora": Spec(
        [
            Variant("plain", config(fa.UniLoraConfig, r=2, theta_d_length=7, init_theta_d_bound=2.0), identity=False),
            Variant("normal", config(fa.UniLoraConfig, r=3, theta_d_length=50, init_weights=False, save_indices=True),
                    identity=False),
            Variant("dropout", config(fa.UniLoraConfig, r=2, theta_d_length=7, unilora_dropout=0.5), PARAMETERS,
                    identity=False, training=False),
        ],
        unilora,
        {
            "plain": Parity({"r": 3, "theta_d_length": 7}, ("linear", "linear_no_bias", "hf_conv1d"),
                            training={"unilora_dropout": 0.4}),
            "saved": Parity({"theta_d_length": 99, "init_weights": False, "save_indices": True, "proj_seed": 7}),
            "model": Parity({"theta_d_length": 10, **LLAMA}, ("llama",)),
        },
    )
}  # fmt: skip
