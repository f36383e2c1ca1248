"""BD-LoRA: what the laws cannot say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_tools import logits, peft_save, raw, same_tensors, tiny, tokens, wrap
from torch import nn

import funcadapt as fa

SIDES = {
    "target_modules_bd_a": ["down_proj", "o_proj"],
    "target_modules_bd_b": ["q_proj"],
    "nblocks": 2,
    "match_strict": False,
}


def test_both_sides_in_one_model(tmp_path: Path) -> None:
    fields: Any = {"r": 4, "target_modules": ["q_proj", "o_proj", "up_proj", "down_proj"], "use_bdlora": SIDES}
    wrapped: Any = wrap(tiny("llama").double(), peft.LoraConfig(**fields)).double()
    folder, model = peft_save(wrapped, tmp_path / "theirs"), tiny("llama").double()
    adapter = fa.load(folder, model=model)
    shapes = {path.rpartition(".")[2]: (p["lora_A"].shape, p["lora_B"].shape) for path, p in adapter.params.items()}
    assert shapes == {
        "q_proj": ((4, 16), (16, 2)),
        "o_proj": ((4, 8), (16, 4)),
        "up_proj": ((4, 16), (24, 4)),
        "down_proj": ((4, 12), (16, 4)),
    }
    out = fa.functional_call(model, adapter, (), tokens("llama"))
    torch.testing.assert_close(logits(out), logits(wrapped(**tokens("llama"))), rtol=1e-9, atol=1e-9)
    fa.save(adapter, tmp_path / "ours")
    same_tensors(raw(tmp_path / "ours"), raw(folder))


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"overlapping modules .*\['q'\]"):
        fa.LoraConfig(use_bdlora={"target_modules_bd_a": ["q"], "target_modules_bd_b": ["q"]})
    with pytest.raises(ValueError, match=r"no field 'nblock'\. Did you mean 'nblocks'"):
        fa.LoraConfig(use_bdlora={"nblock": 2})
    with pytest.raises(ValueError, match="variant combination"):
        fa.LoraConfig(use_bdlora={"nblocks": 2}, use_dora=True)
    with pytest.raises(ValueError, match="'pissa' does not go with 'use_bdlora'"):
        fa.LoraConfig(use_bdlora={"nblocks": 2}, init_lora_weights="pissa")
    model = nn.Sequential(nn.Linear(4, 6))
    for sides, message in (
        ({"target_modules_bd_a": ["1"]}, "matches neither"),
        ({"target_modules_bd_a": ["0"], "nblocks": 3}, r"A of shape \(3, 4\) in 3 blocks"),
    ):
        with pytest.raises(fa.SiteError, match=message):
            fa.init(model, fa.LoraConfig(r=3, target_modules=["0"], use_bdlora=sides))


def test_a_file_with_other_blocks_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 6))
    sides: Any = {"target_modules_bd_b": ["0"], "nblocks": 2}
    adapter = fa.init(model, fa.LoraConfig(r=2, target_modules=["0"], use_bdlora=sides))
    changed = adapter.map(lambda t: t.repeat(1, 2) if t.shape == (6, 1) else t)
    fa.save(changed, tmp_path)
    with pytest.raises(fa.AdapterFileError, match="2 blocks in B"):
        fa.load(tmp_path)
