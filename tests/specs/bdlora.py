"""BD-LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import funcadapt as fa
from funcadapt.sites import Site
from specs import EMBEDDINGS, GROUPED, WITHOUT_BIAS, Dense, Parity, Spec, Variant, config
from specs.lora import lora

N = 2


def blocks(side: str, **fields: Any) -> dict[str, Any]:
    return {"r": 2, "use_bdlora": {f"target_modules_bd_{side}": ["0"], "nblocks": N}, **fields}


def diagonal(t: Tensor) -> Tensor:
    flat = t.reshape(*t.shape[:2], -1).unbind(-1)
    return torch.stack([torch.block_diag(*part.chunk(N)) for part in flat], -1).reshape(
        t.shape[0], N * t.shape[1], *t.shape[2:]
    )


def bdlora(site: Site, p: Mapping[str, Tensor], weight: Tensor, bias: Tensor | None) -> Dense:
    name_a, name_b = ("lora_A", "lora_B") if "lora_A" in p else ("lora_embedding_A", "lora_embedding_B")
    a, b = p[name_a], p[name_b]
    if a.shape[1] != site.in_features:
        a = diagonal(a)
    if b.shape[1] != a.shape[0]:
        b = diagonal(b)
    return lora(site, {**p, name_a: a, name_b: b}, weight, bias)


SPECS = {
    "bdlora": Spec(
        [
            Variant("a", config(fa.LoraConfig, **blocks("a")), GROUPED),
            Variant("b", config(fa.LoraConfig, **blocks("b", init_lora_weights=False)), GROUPED, identity=False),
            Variant(
                "bias",
                config(fa.LoraConfig, **blocks("b", lora_bias=True)),
                EMBEDDINGS | GROUPED,
                WITHOUT_BIAS,
                frozenset({"mha_no_bias"}),
            ),
        ],
        bdlora,
        {
            "a": Parity(
                {"r": 4, "lora_alpha": 6, "use_bdlora": {"target_modules_bd_a": ["layer"], "nblocks": N}},
                training={"lora_dropout": 0.4},
            )
        },
    )
}
