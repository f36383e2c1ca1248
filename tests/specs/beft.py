"""BEFT."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

import funcadapt as fa
from funcadapt.sites import Site
from specs import EMBEDDINGS, WITHOUT_BIAS, Dense, Parity, Spec, Variant, config

_REFUSED = frozenset({"mha_no_bias"})
_NO_DENSE = WITHOUT_BIAS - EMBEDDINGS - _REFUSED


def beft(site: Site, p: Mapping[str, Tensor], weight: Tensor, bias: Tensor | None) -> Dense:
    if site.kind == "embedding":
        return weight + p["beft_bias"].reshape(-1, 1), bias
    assert bias is not None
    return weight, bias + p["beft_bias"].reshape(-1)


SPECS = {
    "beft": Spec(
        [
            Variant("plain", config(fa.BeftConfig), _REFUSED, _NO_DENSE),
            Variant("random", config(fa.BeftConfig, init_weights=False), _REFUSED, _NO_DENSE, identity=False),
        ],
        beft,
        {
            "plain": Parity({}),
            "random": Parity({"init_weights": False}),
            "no_bias": Parity({}, ("linear_no_bias",), merged=False),
        },
    )
}
