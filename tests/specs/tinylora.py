"""TinyLoRA."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

import funcadapt as fa
from funcadapt.sites import Site
from specs import PARAMETERS, Dense, Parity, Spec, Variant, config


def tinylora(site: Site, p: Mapping[str, Tensor], weight: Tensor, bias: Tensor | None) -> Dense:
    group = next(name.removeprefix("tinylora_group_") for name in p if name.startswith("tinylora_group_"))
    middle = sum(v * m for v, m in zip(p[f"tinylora_v.{group}"], p["tinylora_P"], strict=True))
    assert isinstance(middle, Tensor)
    delta = torch.einsum("or,rs,si->oi", p["tinylora_B"], middle, p["tinylora_A"])
    return weight + (delta.t() if site.kind == "embedding" else delta).reshape(weight.shape), bias


LLAMA = ["q_proj", "down_proj", "o_proj"]

SPECS = {
    "tinylora": Spec(
        [
            Variant("plain", config(fa.TinyLoraConfig, u=3)),
            Variant("uniform", config(fa.TinyLoraConfig, r=3, u=5, init_weights="uniform", init_v_bound=0.5,
                                      save_projection=False), identity=False),
            Variant("dropout", config(fa.TinyLoraConfig, u=3, tinylora_dropout=0.5), PARAMETERS, training=False),
        ],
        tinylora,
        {
            "plain": Parity({"r": 4, "u": 5}, ("linear", "linear_no_bias", "hf_conv1d", "embedding")),
            "dropout": Parity({"r": 4, "u": 5}, training={"tinylora_dropout": 0.4}),
            "drawn": Parity({"u": 7, "init_weights": "uniform", "save_projection": False, "projection_seed": 3}),
            "tied": Parity({"u": 3, "weight_tying": 0.5, "target_modules": LLAMA}, ("llama",)),
            "one": Parity({"u": 3, "weight_tying": 1.0, "target_modules": LLAMA}, ("llama",)),
            "model": Parity({"u": 3, "target_modules": LLAMA}, ("llama",)),
        },
    )
}  # fmt: skip
