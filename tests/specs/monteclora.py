"""MonteCLoRA. In training it draws, so the laws see it in eval mode."""

from __future__ import annotations

from typing import Any

import funcadapt as fa
from specs import GROUPED, MHA, PARAMETERS, Parity, Spec, Variant, config
from specs.lora import lora

FIELDS: dict[str, Any] = {"monteclora_config": {"num_samples": 3, "buffer_size": 2}}

SPECS = {
    "monteclora": Spec(
        [
            Variant(
                "plain",
                config(fa.LoraConfig, r=2, **FIELDS),
                MHA | PARAMETERS,
                GROUPED,
                training=False,
                idle=frozenset({"std_prior", "expert_weights_prior"}),
            )
        ],
        lora,
        {"plain": Parity({"r": 3, "lora_alpha": 6, **FIELDS}, ("linear", "hf_conv1d"))},
    )
}
