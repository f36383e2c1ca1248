"""LoRA and DoRA."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

import funcadapt as fa
from funcadapt.sites import Site
from specs import EMBEDDINGS, GROUPED, PARAMETERS, WITHOUT_BIAS, Dense, Parity, Spec, Variant, config


def delta(site: Site, p: Mapping[str, Tensor]) -> Tensor:
    a = p["lora_A"] if "lora_A" in p else p["lora_embedding_A"]
    b = p["lora_B"] if "lora_B" in p else p["lora_embedding_B"]
    b = b.reshape(*b.shape[:2], *(1,) * (a.ndim - 2)).expand(*b.shape[:2], *a.shape[2:])
    return torch.einsum("or...,ri...->oi...", b, a) * p["scaling"]


def lora(site: Site, p: Mapping[str, Tensor], weight: Tensor, bias: Tensor | None) -> Dense:
    if "lora_B_bias" in p:
        assert bias is not None
        bias = bias + p["lora_B_bias"] * p["scaling"]
    return weight + delta(site, p), bias


def dora(site: Site, p: Mapping[str, Tensor], weight: Tensor, bias: Tensor | None) -> Dense:
    new = weight + delta(site, p)
    # Section 4.3 of the paper: the norm is a constant for the gradient.
    norm = new.detach().flatten(1).norm(dim=1)
    ratio = p["lora_magnitude_vector"].flatten() / norm
    return new * ratio.reshape(-1, *(1,) * (new.ndim - 1)), bias


SPECS = {
    "lora": Spec(
        [
            Variant("plain", config(fa.LoraConfig, r=2), no_dense=GROUPED),
            Variant(
                "rslora",
                config(fa.LoraConfig, r=2, use_rslora=True, init_lora_weights=False),
                no_dense=GROUPED,
                identity=False,
            ),
            Variant(
                "bias",
                config(fa.LoraConfig, r=2, lora_bias=True),
                EMBEDDINGS,
                GROUPED | WITHOUT_BIAS,
                frozenset({"mha_no_bias"}),
            ),
            Variant("dropout", config(fa.LoraConfig, r=2, lora_dropout=0.5), PARAMETERS, GROUPED, training=False),
        ],
        lora,
        {"plain": Parity({"r": 4, "lora_alpha": 6}, ("linear", "hf_conv1d"), training={"lora_dropout": 0.4})},
        reference=True,
    ),
    "dora": Spec([Variant("plain", config(fa.LoraConfig, r=2, use_dora=True), refused=GROUPED)], dora),
}
