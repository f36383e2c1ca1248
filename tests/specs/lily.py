"""Lily: no dense form, as its routers look at the input."""

from __future__ import annotations

import funcadapt as fa
from specs import CONVS, EMBEDDINGS, MHA, PARAMETERS, Parity, Spec, Variant, config

EVERY = CONVS | EMBEDDINGS | PARAMETERS | {"linear", "linear_no_bias", "hf_conv1d"}
LLAMA = {"r": 3, "target_modules": ["q_proj", "down_proj", "o_proj"]}

SPECS = {
    "lily": Spec(
        [
            Variant("plain", config(fa.LilyConfig, r=2), MHA, EVERY),
            Variant("random", config(fa.LilyConfig, r=3, num_B=4, scaling=0.5, init_weights=False), MHA, EVERY,
                    identity=False),
        ],
        parity={
            "plain": Parity({"r": 4, "num_B": 3, "scaling": 2.0}, ("linear", "linear_no_bias"), merged=False),
            "model": Parity({**LLAMA, "init_weights": False}, ("llama",), merged=False),
            "stride": Parity({**LLAMA, "stride_A": 2}, ("llama",), merged=False),
        },
    )
}  # fmt: skip
