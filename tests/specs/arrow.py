"""Arrow."""

from __future__ import annotations

import funcadapt as fa
from specs import EVERY, LINEAR, Spec, Variant, config

SPECS = {
    "arrow": Spec(
        [
            Variant(
                "plain",
                config(fa.LoraConfig, r=2, arrow_config={"task_adapter_names": ["a", "b"], "top_k": 2}),
                refused=EVERY - LINEAR,
                no_dense=LINEAR,
            ),
            Variant(
                "top",
                config(
                    fa.LoraConfig,
                    r=1,
                    init_lora_weights=False,
                    arrow_config={
                        "task_adapter_names": ["a", "b", "c"],
                        "top_k": 2,
                        "router_temperature": 2.0,
                        "rng_seed": 1,
                    },
                ),
                refused=EVERY - LINEAR,
                no_dense=LINEAR,
                identity=False,
            ),
        ]
    )
}
