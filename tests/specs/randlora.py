"""RandLoRA."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

import funcadapt as fa
from funcadapt.sites import Site
from specs import PARAMETERS, Dense, Parity, Spec, Variant, config


def randlora(site: Site, p: Mapping[str, Tensor], weight: Tensor, bias: Tensor | None) -> Dense:
    scales, entries, a, b = (p[f"randlora_{name}"] for name in ("lambda", "gamma", "A", "B"))
    (r, n), small, large = scales.shape, min(weight.flatten(1).shape), max(weight.flatten(1).shape)
    assert entries.shape == (n, small)
    rows = [scales[k, j] * a[k, 0, :small] * entries[j] for k in range(r) for j in range(n)]
    columns = [b[:large, j, k] for j in range(n) for k in range(r)]  # in the other order, as in PEFT
    update = sum(torch.outer(column, row) for column, row in zip(columns, rows, strict=True))
    assert isinstance(update, Tensor)
    update = update if update.shape == weight.flatten(1).shape else update.t()
    return weight + 2 * update.reshape(weight.shape), bias


# alpha is 2 r here, so that the oracle knows the scaling
SPECS = {
    "randlora": Spec(
        [
            Variant("plain", config(fa.RandLoraConfig, r=3, randlora_alpha=6)),
            Variant(
                "normal",
                config(fa.RandLoraConfig, r=2, randlora_alpha=4, init_weights=False, save_projection=False),
                identity=False,
            ),
            Variant("sparse", config(fa.RandLoraConfig, r=4, randlora_alpha=8, sparse=True)),
            Variant(
                "dropout",
                config(fa.RandLoraConfig, r=2, randlora_alpha=4, randlora_dropout=0.5),
                PARAMETERS,
                training=False,
            ),
        ],
        randlora,
        {
            "plain": Parity(
                {"r": 4, "randlora_alpha": 2},
                ("linear", "linear_no_bias", "hf_conv1d"),
                training={"randlora_dropout": 0.4},
            ),
            "drawn": Parity(
                {"r": 3, "randlora_alpha": 1, "init_weights": False, "save_projection": False, "projection_prng_key": 7}
            ),
            "sparse": Parity({"r": 3, "sparse": True, "randlora_alpha": 2}),
            "very_sparse": Parity({"r": 4, "very_sparse": True, "target_modules": ["q_proj", "up_proj"]}, ("llama",)),
            "model": Parity({"r": 5, "target_modules": ["k_proj", "down_proj", "o_proj"]}, ("llama",)),
        },
    )
}
