"""KaSA."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

import funcadapt as fa
from funcadapt.sites import Site
from specs import EMBEDDINGS, GROUPED, PARAMETERS, WITHOUT_BIAS, Dense, Parity, Spec, Variant, config
from specs.lora import lora

KASA = {"beta": 1e-4, "gamma": 1e-3}


def kasa(site: Site, p: Mapping[str, Tensor], weight: Tensor, bias: Tensor | None) -> Dense:
    name = "lora_B" if "lora_B" in p else "lora_embedding_B"
    b, d = p[name], p["lora_diag"]
    weight, bias = lora(site, {**p, name: torch.einsum("or...,r->or...", b, d)}, weight, bias)
    part = torch.einsum("or,rc->oc", p["noise_B"].flatten(1), p["noise_A"].flatten(1))
    return weight - part.reshape(weight.shape), bias


SPECS = {
    "kasa": Spec(
        [
            Variant("plain", config(fa.LoraConfig, r=2, kasa_config=KASA), GROUPED, identity=False),
            Variant(
                "bias",
                config(fa.LoraConfig, r=2, kasa_config=KASA, lora_bias=True),
                EMBEDDINGS | GROUPED,
                WITHOUT_BIAS,
                frozenset({"mha_no_bias"}),
                identity=False,
            ),
            Variant(
                "dropout",
                config(fa.LoraConfig, r=2, kasa_config=KASA, lora_dropout=0.5),
                PARAMETERS | GROUPED,
                identity=False,
                training=False,
            ),
        ],
        kasa,
        # PEFT takes the SVD in float32
        {
            "plain": Parity(
                {"r": 3, "lora_alpha": 6, "kasa_config": KASA}, tolerance=1e-5, training={"lora_dropout": 0.4}
            )
        },
    )
}
