"""PEANuT."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

import funcadapt as fa
from funcadapt.sites import Site
from specs import Dense, Parity, Spec, Variant, config


def peanut(site: Site, p: Mapping[str, Tensor], weight: Tensor, bias: Tensor | None) -> Dense:
    # the configs below: f = relu, s = 1, depth 0; or f = tanh, s = 0.5, depth 2
    deep = "peanut_encoders.0" in p
    f, s = (torch.tanh, 0.5) if deep else (torch.relu, 1.0)
    columns = [f(p["peanut_A"] @ column) for column in weight.flatten(1).unbind(1)]
    if deep:
        columns = [_deep(p, column) for column in columns]
    return weight + s * torch.stack([p["peanut_B"] @ h for h in columns], 1).reshape(weight.shape), bias


def _deep(p: Mapping[str, Tensor], h: Tensor) -> Tensor:
    first = torch.tanh(p["peanut_encoders.0"] @ h)
    second = torch.tanh(p["peanut_encoders.1"] @ first)
    up = torch.tanh(p["peanut_decoders.0"] @ second) + first
    return torch.tanh(p["peanut_decoders.1"] @ up) + h


_DEEP = {"depth": 2, "act_fn": "tanh", "scaling": 0.5, "init_weights": False}

SPECS = {
    "peanut": Spec(
        [
            Variant("plain", config(fa.PeanutConfig, r=2)),
            Variant("deep", config(fa.PeanutConfig, r=2, **_DEEP), identity=False),
        ],
        peanut,
        {
            "plain": Parity({"r": 3}, ("linear", "linear_no_bias")),
            "deep": Parity({"r": 3, **_DEEP}),
            "sigmoid": Parity({"r": 2, "depth": 1, "act_fn": "sigmoid"}),
        },
    )
}
