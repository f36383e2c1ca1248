"""OSF."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

import funcadapt as fa
from funcadapt.sites import Site
from specs import Dense, Parity, Spec, Variant, config


def osf(site: Site, p: Mapping[str, Tensor], weight: Tensor, bias: Tensor | None) -> Dense:
    u, v, u0, v0 = p["osf_U_low"], p["osf_V_low"], p["osf_U_low_init"], p["osf_V_low_init"]
    out, columns = weight.flatten(1).shape
    # the gradient has no part in the large directions; PEFT writes their complement in two ways
    p_u = torch.eye(out, dtype=u.dtype) - p["osf_U_high"] @ p["osf_U_high"].T if out > columns else u0 @ u0.T
    p_v = torch.eye(columns, dtype=v.dtype) - p["osf_V_high"].T @ p["osf_V_high"] if columns > out else v0.T @ v0
    u = (u - p_u @ u).detach() + p_u @ u
    v = (v - v @ p_v).detach() + v @ p_v
    change = u @ p["osf_S_low"].diag() @ v - u0 @ p["osf_S_low_init"].diag() @ v0
    return weight + change.reshape(weight.shape), bias


SPECS = {
    "osf": Spec(
        [
            Variant("plain", config(fa.OSFConfig)),
            Variant("random", config(fa.OSFConfig, effective_rank=0.7, init_weights=False), identity=False),
        ],
        osf,
        {
            "plain": Parity({}, ("linear", "linear_no_bias")),
            "rank": Parity({"effective_rank": 2, "rank_pattern": {"lay": 0.3}}),
        },
    )
}
