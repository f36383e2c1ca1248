"""aLoRA. Invoked so early that it acts on all tokens; `tests/methods/test_alora.py` has the others."""

from __future__ import annotations

import torch

import funcadapt as fa
from specs import EMBEDDINGS, EVERY, LINEAR, Spec, Variant, config

HERE = LINEAR | EMBEDDINGS
ALL = {"alora_offsets": torch.tensor([1000])}
TOKENS = [3, 1]
SPECS = {
    "alora": Spec(
        [
            Variant(
                "plain",
                config(fa.LoraConfig, r=2, alora_invocation_tokens=TOKENS),
                refused=EVERY - HERE,
                no_dense=HERE,
                inputs=ALL,
            ),
            Variant(
                "bias",
                config(fa.LoraConfig, r=2, alora_invocation_tokens=TOKENS, lora_bias=True),
                refused=EVERY - LINEAR,
                no_dense=HERE,
                inputs=ALL,
            ),
        ]
    )
}
