"""QA-LoRA: what the laws cannot say. PEFT has it for GPTQ layers only, so its own forward is called here."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft.tuners.lora.variants import QALoraLinearVariant
from torch import nn

import funcadapt as fa


@pytest.mark.parametrize("shape", [(5, 12), (2, 3, 12)])
def test_the_forward_is_that_of_peft(shape: tuple[int, ...]) -> None:
    model, x = nn.Sequential(nn.Linear(12, 6)).double(), torch.randn(shape, dtype=torch.float64)
    config = fa.LoraConfig(
        r=2, target_modules=["0"], use_qalora=True, qalora_group_size=3, init_lora_weights=False, lora_alpha=6
    )
    adapter = fa.init(model, config)
    p: Any = adapter.leaves("0")
    theirs = SimpleNamespace(
        lora_A={"default": SimpleNamespace(weight=p["lora_A"])},
        lora_B={"default": SimpleNamespace(weight=p["lora_B"])},
        lora_dropout={"default": nn.Identity()},
        scaling={"default": 3.0},
        qalora_group_size={"default": 3},
        in_features=12,
        training=False,
    )
    assert p["lora_A"].shape == (2, 4)
    expected = QALoraLinearVariant.forward(theirs, active_adapter="default", x=x, result=model(x))  # pyright: ignore
    torch.testing.assert_close(fa.functional_call(model, adapter, x), expected)


def test_errors() -> None:
    with pytest.raises(ValueError, match="`qalora_group_size` must be at least 1, got 0"):
        fa.LoraConfig(use_qalora=True, qalora_group_size=0)
    with pytest.raises(fa.SiteError, match=r"inputs of '0' \(4\) are divisible by `qalora_group_size` \(16\)"):
        fa.init(nn.Sequential(nn.Linear(4, 6)), fa.LoraConfig(target_modules=["0"], use_qalora=True))
