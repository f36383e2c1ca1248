"""HRA."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

import funcadapt as fa
from funcadapt.sites import Site
from specs import Dense, Parity, Spec, Variant, config

ORTHOGONAL = 3  # the rank that has apply_GS here: leaves do not say it


def reflection(vectors: Tensor, orthogonal: bool) -> Tensor:
    """H, one dense reflection after the other."""
    done: list[Tensor] = []
    h = torch.eye(len(vectors), dtype=vectors.dtype)
    for u in vectors.unbind(1):
        for other in done if orthogonal else ():
            u = u - (other @ u) * other
        done.append(u / u.norm())
        h = h @ (torch.eye(len(u), dtype=u.dtype) - 2 * torch.outer(done[-1], done[-1]))
    return h


def hra(site: Site, p: Mapping[str, Tensor], weight: Tensor, bias: Tensor | None) -> Dense:
    h = reflection(p["hra_u"], orthogonal=p["hra_u"].shape[1] == ORTHOGONAL)
    if site.kind == "embedding":
        return h @ weight, bias
    return (weight.flatten(1) @ h).reshape(weight.shape), bias


SPECS = {
    "hra": Spec(
        [
            Variant("plain", config(fa.HRAConfig, r=2)),
            Variant("random", config(fa.HRAConfig, r=2, init_weights=False), identity=False),
            Variant("gram_schmidt", config(fa.HRAConfig, r=ORTHOGONAL, apply_GS=True), identity=False),
        ],
        hra,
        {
            "plain": Parity({"r": 4}, ("linear", "linear_no_bias", "conv2d_1x1")),
            "odd": Parity({"r": 3, "init_weights": False}, ("linear", "conv2d_1x1")),
            "gram_schmidt": Parity({"r": 3, "init_weights": False, "apply_GS": True}, ("linear", "conv2d_1x1")),
        },
    )
}
