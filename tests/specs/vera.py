"""VeRA."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

import funcadapt as fa
from funcadapt.sites import Site
from specs import PARAMETERS, Dense, Parity, Spec, Variant, config


def vera(site: Site, p: Mapping[str, Tensor], weight: Tensor, bias: Tensor | None) -> Dense:
    columns = weight[0].numel()
    inner = torch.diag(p["vera_lambda_d"]) @ p["vera_A"][:, :columns]
    outer = torch.diag(p["vera_lambda_b"]) @ p["vera_B"][: len(weight)]
    return weight + (outer @ inner).reshape(weight.shape), bias


SPECS = {
    "vera": Spec(
        [
            Variant("plain", config(fa.VeraConfig, r=3)),
            Variant("normal", config(fa.VeraConfig, r=2, init_weights=False, save_projection=False), identity=False),
            Variant("dropout", config(fa.VeraConfig, r=2, vera_dropout=0.5), PARAMETERS, training=False),
        ],
        vera,
        {
            "plain": Parity({"r": 4}, ("linear", "linear_no_bias", "hf_conv1d"), training={"vera_dropout": 0.4}),
            "drawn": Parity({"r": 3, "init_weights": False, "save_projection": False, "projection_prng_key": 7}),
            "model": Parity({"r": 3, "target_modules": ["q_proj", "down_proj", "o_proj"]}, ("llama",)),
        },
    )
}
