"""From a seed, the shim draws what PEFT draws: the numbers of every layer, and those that come next."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import nn

import funcadapt.peft as shim

TARGETS = ["0", "1"]
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "adalora": ("AdaLoraConfig", {"total_step": 9}),
    "adalora_random": ("AdaLoraConfig", {"total_step": 9, "init_lora_weights": False}),
    "adamss_random": ("AdamssConfig", {"r": 6, "num_subspaces": 3, "init_weights": None}),
    "eva": ("LoraConfig", {"r": 4, "init_lora_weights": "eva"}),
    "lora": ("LoraConfig", {"r": 4, "lora_bias": True}),
    "lora_random": ("LoraConfig", {"r": 4, "init_lora_weights": False}),
    "supertuning": ("SupertuningConfig", {"sparsity": 0.9, "r": 2}),
    "supertuning_random": ("SupertuningConfig", {"sparsity": 0.7, "r": 2, "init_weights": False}),
    "unilora": ("UniLoraConfig", {"r": 2, "theta_d_length": 20}),
    "unilora_random": ("UniLoraConfig", {"r": 2, "theta_d_length": 20, "init_weights": False}),
    "vblora": ("VBLoRAConfig", {"r": 2, "num_vectors": 6, "vector_length": 4}),
}


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 12))


@pytest.mark.filterwarnings("ignore:.*eva:UserWarning")
@pytest.mark.parametrize("case", CONFIGS)
def test_a_seed_gives_what_it_gives_in_peft(case: str) -> None:
    name, fields = CONFIGS[case]
    states: list[dict[str, torch.Tensor]] = []
    following: list[torch.Tensor] = []
    for package in (peft, shim):
        base = _net()
        torch.manual_seed(7)
        model: Any = package.get_peft_model(base, getattr(package, name)(target_modules=TARGETS, **fields))
        following.append(torch.rand(3))
        states.append({key: p.detach() for key, p in model.named_parameters() if p.requires_grad})
    assert sorted(states[0]) == sorted(states[1])
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-5, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")
    assert torch.equal(following[1], following[0])
