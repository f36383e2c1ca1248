"""MiCA."""

from __future__ import annotations

import funcadapt as fa
from specs import GROUPED, PARAMETERS, Spec, Variant, config
from specs.lora import lora

SPECS = {
    "mica": Spec(
        [
            Variant("plain", config(fa.LoraConfig, r=2, init_lora_weights="mica"), no_dense=GROUPED),
            Variant(
                "dropout",
                config(fa.LoraConfig, r=2, init_lora_weights="mica", lora_dropout=0.5),
                PARAMETERS,
                GROUPED,
                training=False,
            ),
        ],
        lora,
    )
}
