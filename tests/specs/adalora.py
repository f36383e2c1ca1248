"""AdaLoRA."""

from __future__ import annotations

from funcadapt.methods.adalora import AdaLoraConfig
from specs import PARAMETERS, Spec, Variant, config

SPECS = {
    "adalora": Spec(
        [
            Variant("plain", config(AdaLoraConfig, init_r=2, target_r=1, total_step=10)),
            Variant(
                "random",
                config(AdaLoraConfig, init_r=2, target_r=1, total_step=10, lora_alpha=-1, init_lora_weights=False),
                identity=False,
            ),
            Variant(
                "dropout",
                config(AdaLoraConfig, init_r=2, target_r=1, total_step=10, lora_dropout=0.5),
                PARAMETERS,
                training=False,
            ),
        ]
    )
}
