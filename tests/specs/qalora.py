"""QA-LoRA."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

import funcadapt as fa
from funcadapt.sites import Site
from specs import EMBEDDINGS, GROUPED, PARAMETERS, WITHOUT_BIAS, Dense, Spec, Variant, config
from specs.lora import lora

SIZE = 2


def qalora(site: Site, p: Mapping[str, Tensor], weight: Tensor, bias: Tensor | None) -> Dense:
    name = "lora_A" if "lora_A" in p else "lora_embedding_A"
    groups = site.in_features // SIZE
    pool = torch.block_diag(*[torch.full((1, SIZE), groups / SIZE, dtype=weight.dtype)] * groups)
    return lora(site, {**p, name: torch.einsum("rg...,gi->ri...", p[name], pool)}, weight, bias)


SPECS = {
    "qalora": Spec(
        [
            Variant("plain", config(fa.LoraConfig, r=2, use_qalora=True, qalora_group_size=SIZE), GROUPED),
            Variant(
                "bias",
                config(fa.LoraConfig, r=2, use_qalora=True, qalora_group_size=SIZE, lora_bias=True),
                EMBEDDINGS | GROUPED,
                WITHOUT_BIAS,
                frozenset({"mha_no_bias"}),
            ),
            Variant(
                "dropout",
                config(fa.LoraConfig, r=2, use_qalora=True, qalora_group_size=SIZE, lora_dropout=0.5),
                PARAMETERS | GROUPED,
                training=False,
            ),
        ],
        qalora,
    )
}
