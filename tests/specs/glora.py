"""GLoRA."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

import funcadapt as fa
from funcadapt.sites import Site
from specs import Dense, Parity, Spec, Variant, config


def part(p: Mapping[str, Tensor], name: str, *size: int) -> Tensor:
    if f"glora_{name}.Xd" in p:
        return p[f"glora_{name}.Xd"] @ p[f"glora_{name}.Xu"]
    return p.get(f"glora_{name}.X", torch.zeros(1)).expand(*size)


def glora(site: Site, p: Mapping[str, Tensor], weight: Tensor, bias: Tensor | None) -> Dense:
    matrix = weight.flatten(1)
    new = matrix + matrix * part(p, "A", *matrix.shape) + part(p, "B", *matrix.shape)
    if bias is not None and any(f"glora_{name}.{leaf}" in p for name in "CDE" for leaf in ("Xd", "X")):
        c = part(p, "C", matrix.shape[1], 1).to(matrix)
        bias = bias + bias * part(p, "D", len(bias)) + part(p, "E", len(bias)) + (matrix @ c).flatten()
    return new.reshape(weight.shape), bias


SPECS = {
    "glora": Spec(
        [
            Variant("plain", config(fa.GloraConfig, r=2)),
            Variant(
                "vectors",
                config(fa.GloraConfig, config_A_B="vector", config_C="vector", config_D_E="vector", init_weights=False),
                identity=False,
            ),
            Variant("constants", config(fa.GloraConfig, config_A_B="constant", config_C="none")),
            Variant("no_bias", config(fa.GloraConfig, r=1, config_C="none", config_D_E="none")),
        ],
        glora,
        {
            "plain": Parity({"r": 4}, ("linear", "linear_no_bias")),
            "random": Parity({"r": 4, "init_weights": False}, ("linear", "linear_no_bias")),
            "vectors": Parity(
                {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"}, ("linear", "linear_no_bias")
            ),
            "random_vectors": Parity(
                {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector", "init_weights": False}
            ),
            "constants": Parity({"config_A_B": "constant", "config_C": "none"}, ("linear", "linear_no_bias")),
            "random_constants": Parity({"config_A_B": "constant", "config_C": "none", "init_weights": False}),
            "weight": Parity({"r": 2, "config_C": "none", "config_D_E": "none"}),
            "bias": Parity({"r": 2, "config_A_B": "none", "config_D_E": "vector"}),
        },
    )
}
