"""PSOFT. PEFT refuses float64 weights, so that its comparison is in `tests/methods/test_psoft.py`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

import funcadapt as fa
from funcadapt.sites import Site
from specs import PARAMETERS, Dense, Spec, Variant, config

SERIES, EPS = 3, 0.4  # what the leaves do not say: rank 3 is a series of five terms, with a bound


def psoft(site: Site, p: Mapping[str, Tensor], weight: Tensor, bias: Tensor | None) -> Dense:
    numbers, r = p["psoft_R"], p["psoft_A"].shape[0]
    eye = torch.eye(r, dtype=numbers.dtype)
    if numbers.ndim == 2:
        matrix = numbers
    else:
        q, given = torch.zeros(r, r, dtype=numbers.dtype), iter(numbers)
        for i in range(r):
            for j in range(i + 1, r):
                one = torch.zeros(r, r, dtype=numbers.dtype)
                one[i, j], one[j, i] = 1, -1
                q = q + one * next(given)
        if r == SERIES:
            q = q * (EPS / q.norm()) if q.norm() > EPS else q
            matrix = eye + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q
        else:
            matrix = (eye + q) @ torch.linalg.inv(eye - q)
    if "psoft_vector_b" in p:
        matrix = torch.diag(p["psoft_vector_b"]) @ matrix
    if "psoft_vector_a" in p:
        matrix = matrix @ torch.diag(p["psoft_vector_a"])
    return weight + (p["psoft_B"] @ (matrix - eye) @ p["psoft_A"]).reshape(weight.shape), bias


SPECS = {
    "psoft": Spec(
        [
            Variant("plain", config(fa.PsoftConfig, r=2)),
            Variant("series", config(fa.PsoftConfig, r=SERIES, use_cayley_neumann=True, cayley_neumann_eps=EPS,
                                     psoft_mag_a=False)),
            Variant("free", config(fa.PsoftConfig, r=2, psoft_orth=False, ab_svd_init="pissa_init",
                                   init_weights=False, psoft_mag_b=False), identity=False),
            Variant("dropout", config(fa.PsoftConfig, r=2, psoft_dropout=0.5), PARAMETERS, training=False),
        ],
        psoft,
    )
}  # fmt: skip
