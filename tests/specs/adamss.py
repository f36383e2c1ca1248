"""AdaMSS."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

import funcadapt as fa
from funcadapt.sites import Site
from specs import EXPERTS, Dense, Parity, Spec, Variant, config


def adamss(site: Site, p: Mapping[str, Tensor], weight: Tensor, bias: Tensor | None) -> Dense:
    matrix = weight.flatten(1) if bias is None else torch.cat([weight.flatten(1), bias[:, None]], 1)
    rows = list(matrix.unbind())
    for i in range(sum(name.startswith("adamss_rows_") for name in p)):
        update = p[f"adamss_B.{i}"] @ p[f"adamss_A.{i}"] @ p["adamss_newB"]
        for row, change in zip(p[f"adamss_rows_{i}"].tolist(), update, strict=True):
            rows[row] = rows[row] + change
    new = torch.stack(rows)
    if bias is None:
        return new.reshape(weight.shape), None
    return new[:, :-1].reshape(weight.shape), new[:, -1]


_SMALL = {"r": 3, "num_subspaces": 2}
_DYNAMIC = {"r": 4, "num_subspaces": 2, "subspace_rank": 3, "use_dynamic_rank": True, "random_seed": 7}

SPECS = {
    "adamss": Spec(
        [
            Variant("plain", config(fa.AdamssConfig, **_SMALL), EXPERTS),
            Variant("dynamic", config(fa.AdamssConfig, **_DYNAMIC, init_weights=None), EXPERTS, identity=False),
        ],
        adamss,
        {"plain": Parity(_SMALL, ("linear", "linear_no_bias")), "dynamic": Parity(_DYNAMIC), "defaults": Parity({})},
    )
}
