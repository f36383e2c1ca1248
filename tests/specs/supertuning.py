"""Super-Tuning and Supra."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

import funcadapt as fa
from funcadapt.sites import Site
from specs import PARAMETERS, Dense, Parity, Spec, Variant, config


def supertuning(site: Site, p: Mapping[str, Tensor], weight: Tensor, bias: Tensor | None) -> Dense:
    """Entry by entry; the variants with a LoRA have one rank and one alpha."""
    flat = list(weight.flatten().unbind())
    for value, place in zip(p["supertuning_values"], p["supertuning_indices"].tolist(), strict=True):
        flat[place] = flat[place] + value
    new = torch.stack(flat).reshape(weight.shape)
    if "supertuning_lora_A" in p:
        new = new + 3 / 2 * (p["supertuning_lora_B"] @ p["supertuning_lora_A"]).reshape(weight.shape)
    return new, bias


SUPRA = {"sparsity": 0.7, "r": 2, "lora_alpha": 3}
SPECS = {
    "supertuning": Spec(
        [
            Variant("plain", config(fa.SupertuningConfig, sparsity=0.5)),
            Variant("bottom", config(fa.SupertuningConfig, sparsity=0.75, select_top=False, init_weights=False,
                                     save_precomputed_indices=False), identity=False),
            Variant("supra", config(fa.SupertuningConfig, **SUPRA)),
            Variant("dropout", config(fa.SupertuningConfig, **SUPRA, lora_dropout=0.5), PARAMETERS, training=False),
        ],
        supertuning,
        {
            "plain": Parity({"sparsity": 0.5}, ("linear", "linear_no_bias")),
            "bottom": Parity({"sparsity": 0.9, "select_top": False, "init_weights": False}),
            "computed": Parity({"sparsity": 0.8, "save_precomputed_indices": False}),
            "supra": Parity({"sparsity": 0.8, "r": 3}, training={"lora_dropout": 0.4}),
            "model": Parity({"sparsity": 0.8, "r": 3, "lora_alpha": 4, "target_modules": ["q_proj", "up_proj"]},
                            ("llama",)),
        },
    )
}  # fmt: skip
