"""FRoD."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

import funcadapt as fa
from funcadapt.sites import Site
from specs import PARAMETERS, Dense, Parity, Spec, Variant, config


def frod(site: Site, p: Mapping[str, Tensor], weight: Tensor, bias: Tensor | None) -> Dense:
    width = p["frod_lambda_l"].shape[0]
    (v,) = (leaf for name, leaf in p.items() if name.startswith("frod_V.") and _fits(name, site))
    ((rows, columns),) = (leaf for name, leaf in p.items() if name.startswith("frod_s_indices.") and _fits(name, site))
    middle = torch.diag(p["frod_lambda_l"] - p["frod_lambda_0"])
    for value, row, column in zip(p["frod_lambda_s_values"], rows, columns, strict=True):
        eye = torch.eye(width, dtype=value.dtype)
        middle = middle + value * torch.outer(eye[row], eye[column])
    delta = p["frod_U"] @ middle @ v.t()
    return weight + (delta.t() if site.kind == "embedding" else delta).reshape(weight.shape), bias


def _fits(name: str, site: Site) -> bool:
    return site.path.replace(".", "_").endswith(name.rpartition(".")[2])


LLAMA = {"target_modules": ["q_proj", "down_proj", "o_proj"]}
# PEFT rounds U and l to float32, also in a float64 model
ROUNDED = 1e-5

SPECS = {
    "frod": Spec(
        [
            Variant("plain", config(fa.FrodConfig, sparse_rate=0.2)),
            Variant("random", config(fa.FrodConfig, sparse_rate=0.01, init_weights=False, save_projection=False),
                    identity=False),
            Variant("dropout", config(fa.FrodConfig, frod_dropout=0.5), PARAMETERS, training=False),
        ],
        frod,
        {
            "plain": Parity({"sparse_rate": 0.2, "progressbar": False}, ("linear", "linear_no_bias", "hf_conv1d"),
                            tolerance=ROUNDED, training={"frod_dropout": 0.4}),
            "computed": Parity({"save_projection": False, "projection_prng_key": 5, "progressbar": False},
                               tolerance=ROUNDED),
            "model": Parity({**LLAMA, "sparse_rate": 0.1, "progressbar": False}, ("llama",), tolerance=ROUNDED),
        },
    )
}  # fmt: skip
