"""VB-LoRA."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

import funcadapt as fa
from funcadapt.sites import Site
from specs import PARAMETERS, Dense, Parity, Spec, Variant, config


def vblora(site: Site, p: Mapping[str, Tensor], weight: Tensor, bias: Tensor | None) -> Dense:
    bank, k = p["vblora_vector_bank"], 3 if p["vblora_vector_bank"].shape[0] == 7 else 2  # as in the configs below

    def piece(logits: Tensor) -> Tensor:
        chosen = logits.argsort(descending=True)[:k]
        shares = torch.exp(logits[chosen]) / torch.exp(logits[chosen]).sum()
        return sum(share * bank[i] for share, i in zip(shares, chosen.tolist(), strict=True))  # pyright: ignore

    a, b = p["vblora_logits_A"], p["vblora_logits_B"]
    rows = torch.stack([torch.cat([piece(logits) for logits in row]) for row in a])
    columns = torch.stack([torch.cat([piece(b[j, i]) for j in range(len(b))]) for i in range(len(a))], 1)
    return weight + (columns @ rows).reshape(weight.shape), bias


_SMALL = {"r": 2, "num_vectors": 5, "vector_length": 2, "init_vector_bank_bound": 0.5, "init_logits_std": 1.0}

SPECS = {
    "vblora": Spec(
        [
            Variant("plain", config(fa.VBLoRAConfig, **_SMALL), identity=False),
            Variant("three", config(fa.VBLoRAConfig, **{**_SMALL, "num_vectors": 7, "topk": 3}), identity=False),
            Variant(
                "dropout",
                config(fa.VBLoRAConfig, **_SMALL, vblora_dropout=0.5),
                PARAMETERS,
                identity=False,
                training=False,
            ),
        ],
        vblora,
        {
            "plain": Parity(
                {"r": 3, "num_vectors": 9, "vector_length": 4, "topk": 3, "target_modules": ["q_proj", "up_proj"]},
                ("llama",),
                training={"vblora_dropout": 0.4},
            ),
        },
    )
}
