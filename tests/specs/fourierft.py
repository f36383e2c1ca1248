"""FourierFT."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

import funcadapt as fa
from funcadapt.sites import Site
from specs import Dense, Parity, Spec, Variant, config


def fourierft(site: Site, p: Mapping[str, Tensor], weight: Tensor, bias: Tensor | None) -> Dense:
    """Wave by wave. The config's scaling is the same in all variants, and so is its seed."""
    c = p["fourierft_spectrum"]
    flat = weight.reshape(weight.shape[0], -1)
    out, inputs = flat.shape
    at = torch.randperm(out * inputs, generator=torch.Generator().manual_seed(7))[: len(c)].tolist()
    o, i = torch.arange(out).unsqueeze(1), torch.arange(inputs)
    delta = torch.zeros_like(flat)
    for value, place in zip(c, at, strict=True):
        turns = (place // inputs * o * inputs + place % inputs * i * out) % (out * inputs)  # in whole numbers: exact
        delta = delta + value * torch.cos(2 * math.pi / (out * inputs) * turns.to(c.dtype))
    return (flat + delta * (12 / (out * inputs))).reshape(weight.shape), bias


FIELDS = {"n_frequency": 7, "scaling": 12.0, "random_loc_seed": 7}
SPECS = {
    "fourierft": Spec(
        [
            Variant("plain", config(fa.FourierFTConfig, **FIELDS), identity=False),
            Variant("zeros", config(fa.FourierFTConfig, **FIELDS, init_weights=True)),
            # every frequency: more than in + out, so that the update is built
            Variant("all", config(fa.FourierFTConfig, **{**FIELDS, "n_frequency": 24}), identity=False),
        ],
        fourierft,
        {
            # PEFT computes in float32
            "plain": Parity({"n_frequency": 9}, ("linear", "linear_no_bias", "hf_conv1d"), tolerance=1e-5),
            "zeros": Parity({"n_frequency": 20, "init_weights": True, "scaling": 100.0}, tolerance=1e-5),
            "pattern": Parity({"n_frequency": 30, "n_frequency_pattern": {"mlp.up_proj": 50}, "random_loc_seed": 3,
                               "target_modules": ["q_proj", "up_proj"]}, ("llama",), tolerance=1e-5),
        },
    )
}  # fmt: skip
