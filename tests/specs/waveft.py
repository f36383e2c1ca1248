"""WaveFT."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

import funcadapt as fa
from funcadapt.sites import Site
from specs import Dense, Parity, Spec, Variant, config


def waveft(site: Site, p: Mapping[str, Tensor], weight: Tensor, bias: Tensor | None) -> Dense:
    """Coefficient by coefficient, each with its wavelet. All variants have one scaling and one seed."""
    c = p["waveft_spectrum"]
    flat = weight.reshape(weight.shape[0], -1)
    sizes = flat.shape
    delta = torch.zeros_like(flat)
    at = torch.randperm(flat.numel(), generator=torch.Generator().manual_seed(7))[: len(c)].tolist()
    for value, place in zip(c, at, strict=True):
        k = divmod(place, sizes[1])
        if "filters" not in p:
            rows, columns = (torch.eye(size, dtype=c.dtype)[k[i]] for i, size in enumerate(sizes))
        else:
            length = p["filters"].shape[1]
            # after padding to the middle: which half, and where in it
            padded = [size + length - 2 + size % 2 for size in sizes]
            halves = [divmod(k[i] + (padded[i] - size) // 2, padded[i] // 2) for i, size in enumerate(sizes)]
            shifted = []
            for i, size in enumerate(sizes):
                wave = torch.zeros(2 * size + 4 * length, dtype=c.dtype)
                # PEFT's order: rows are details where columns are in the second half, and the other way round
                wave[2 * halves[i][1] : 2 * halves[i][1] + length] = p["filters"][halves[1 - i][0]]
                shifted.append(wave[length - 2 : length - 2 + size])
            rows, columns = shifted
        delta = delta + value * torch.outer(rows, columns)
    return (flat + delta * 3).reshape(weight.shape), bias


FIELDS = {"n_frequency": 7, "scaling": 3.0, "random_loc_seed": 7}
SPECS = {
    "waveft": Spec(
        [
            Variant("plain", config(fa.WaveFTConfig, **FIELDS)),
            Variant("db3", config(fa.WaveFTConfig, **FIELDS, wavelet_family="db3", init_weights=False), identity=False),
            Variant("proportional", config(fa.WaveFTConfig, **FIELDS, proportional_parameters=True)),
            Variant("entries", config(fa.WaveFTConfig, **FIELDS, use_idwt=False)),
            # every coefficient: more than in + out
            Variant("all", config(fa.WaveFTConfig, **{**FIELDS, "n_frequency": 24}, wavelet_family="sym4")),
        ],
        waveft,
        {
            "plain": Parity({"n_frequency": 9}, ("linear", "linear_no_bias", "hf_conv1d")),
            "entries": Parity({"n_frequency": 9, "use_idwt": False}),
            "random": Parity({"n_frequency": 20, "wavelet_family": "coif2", "init_weights": False}),
            "proportional": Parity({"n_frequency": 5, "proportional_parameters": True}, ("linear", "hf_conv1d")),
            "proportional_layers": Parity({"n_frequency": 30, "proportional_parameters": True, "init_weights": False,
                                           "n_frequency_pattern": {"mlp.up_proj": 50}, "wavelet_family": "sym2",
                                           "target_modules": ["q_proj", "k_proj", "up_proj"]}, ("llama",)),
            "pattern": Parity({"n_frequency": 30, "n_frequency_pattern": {"mlp.up_proj": 50}, "random_loc_seed": 3,
                               "wavelet_family": "sym5", "target_modules": ["q_proj", "up_proj"]}, ("llama",)),
        },
    )
}  # fmt: skip
