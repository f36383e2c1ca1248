"""VeLoRA. In training its gradient is an approximation by design, so the laws see it in eval mode."""

from __future__ import annotations

from typing import Any

import funcadapt as fa
from specs import EMBEDDINGS, GROUPED, MHA, PARAMETERS, Parity, Spec, Variant, config
from specs.lora import lora

REFUSED = EMBEDDINGS | MHA | PARAMETERS


def fields(init_type: str, groups: int = 2, **more: Any) -> dict[str, Any]:
    return {"velora_config": {"num_groups": groups, "scale": 0.7, "init_type": init_type}, **more}


def variant(name: str, **more: Any) -> Variant:
    return Variant(name, config(fa.LoraConfig, r=2, **fields(name, **more)), REFUSED, GROUPED, training=False)


SPECS = {
    "velora": Spec(
        [variant("batch_average"), variant("random", groups=64), variant("batch_average_once", lora_dropout=0.5)],
        lora,
        {
            "average": Parity(
                {"r": 3, "lora_alpha": 6, **fields("batch_average")},
                ("linear", "hf_conv1d"),
                training={"lora_dropout": 0.4},
            ),
            "random": Parity({"r": 3, "lora_alpha": 6, **fields("random", groups=4)}),
        },
    )
}
