"""PVeRA."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

import funcadapt as fa
from funcadapt.sites import Site
from specs import MHA, PARAMETERS, Dense, Parity, Spec, Variant, config


def pvera(site: Site, p: Mapping[str, Tensor], weight: Tensor, bias: Tensor | None) -> Dense:
    columns, r = weight[0].numel(), p["pvera_B"].shape[1]
    mean = torch.diag(p["pvera_lambda_d"][:r]) @ p["pvera_A"][:r, :columns]
    outer = torch.diag(p["pvera_lambda_b"]) @ p["pvera_B"][: len(weight)]
    return weight + (outer @ mean).reshape(weight.shape), bias


_WEIGHT_ONLY = PARAMETERS | MHA

# in training mode it draws, which has no dense form
SPECS = {
    "pvera": Spec(
        [
            Variant("plain", config(fa.PveraConfig, r=3), _WEIGHT_ONLY, training=False),
            Variant(
                "normal",
                config(fa.PveraConfig, r=2, init_weights=False, save_projection=False, pvera_dropout=0.5),
                _WEIGHT_ONLY,
                identity=False,
                training=False,
            ),
        ],
        pvera,
        {
            "plain": Parity({"r": 4}, ("linear", "linear_no_bias", "hf_conv1d"), training={"pvera_dropout": 0.4}),
            "seeded": Parity(
                {"r": 4, "init_weights": False, "save_projection": False, "projection_prng_key": 7},
                training={"generator_seed": 5},
            ),
            "model": Parity({"r": 3, "target_modules": ["q_proj", "down_proj", "o_proj"]}, ("llama",), training={}),
        },
    )
}
