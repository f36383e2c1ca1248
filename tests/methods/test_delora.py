"""DeLoRA: what the laws cannot say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_tools import config_file, logits, peft_save, raw, same_tensors, tiny, tokens, wrap
from safetensors.torch import save_file
from torch import nn

import funcadapt as fa


def test_the_patterns_reach_the_leaves(tmp_path: Path) -> None:
    fields: Any = {
        "r": 3,
        "delora_lambda": 2,
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 2},
        "lambda_pattern": {"v_proj": 7},
    }
    model = tiny("llama")
    adapter = fa.init(model, fa.DeloraConfig(**fields))
    found = {path.removeprefix("model.layers."): p for path, p in adapter.params.items()}
    assert {path: (len(p["delora_A"]), p["delora_lambda"].item()) for path, p in found.items()} == {
        "0.self_attn.q_proj": (3, 2.0),
        "0.self_attn.v_proj": (3, 7.0),
        "1.self_attn.q_proj": (2, 2.0),
        "1.self_attn.v_proj": (3, 7.0),
    }
    wrapped: Any = wrap(tiny("llama").double(), peft.DeloraConfig(**fields)).double()
    folder, model = peft_save(wrapped, tmp_path / "theirs"), tiny("llama").double()
    adapter = fa.load(folder, model=model)
    out = logits(fa.functional_call(model, adapter, (), tokens("llama")))
    torch.testing.assert_close(out, logits(wrapped(**tokens("llama"))), rtol=1e-9, atol=1e-9)
    fa.save(adapter, tmp_path / "ours")
    same_tensors(raw(tmp_path / "ours"), raw(folder))
    assert config_file(tmp_path / "ours") == config_file(folder)


def test_lambda_bounds_the_update() -> None:
    """In units of the norms of the weight's columns, whatever A and B are."""
    model = nn.Sequential(nn.Linear(6, 5)).double()
    adapter = fa.init(model, fa.DeloraConfig(r=3, delora_lambda=0.5, target_modules=["0"], init_weights=False))
    grown = adapter.replace(params={"0": {**adapter.params["0"], "delora_A": 100 * adapter.params["0"]["delora_A"]}})
    for each in (adapter, grown):
        change = fa.merge(model, each)["0.weight"] - model[0].weight
        assert (change / model[0].weight.norm(dim=0)).norm() <= 0.5


def test_biases_are_trained_and_saved(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for bias, paths in (("none", set[str]()), ("delora_only", {"0"}), ("all", {"0", "1"})):
        adapter = fa.init(model, fa.DeloraConfig(r=2, target_modules=["0"], bias=bias))
        assert {path for path, p in adapter.params.items() if "bias" in p} == paths
        fa.save(adapter, tmp_path)
        again = fa.load(tmp_path, model=model)
        assert {path: set(p) for path, p in again.params.items()} == {
            path: set(p) for path, p in adapter.params.items()
        }


def test_a_file_that_lacks_a_leaf_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    fa.save(fa.init(model, fa.DeloraConfig(r=2, target_modules=["0"])), tmp_path)
    tensors = raw(tmp_path)
    for wrong, message in (
        ({k: t for k, t in tensors.items() if "w_norm" not in k}, "lacks 'delora_w_norm'"),
        ({k: t[:1] if k.endswith("delora_A") else t for k, t in tensors.items()}, "its config says rank 2"),
    ):
        save_file({k: t.contiguous() for k, t in wrong.items()}, tmp_path / "adapter_model.safetensors")
        with pytest.raises(fa.AdapterFileError, match=message):
            fa.load(tmp_path)


def test_errors() -> None:
    with pytest.raises(ValueError, match="positive integer; got 0"):
        fa.DeloraConfig(r=0)
    with pytest.raises(ValueError, match="'x'"):
        fa.DeloraConfig(rank_pattern={"x": -1})
    with pytest.raises(ValueError, match="delora_only"):
        fa.DeloraConfig(bias="lora_only")
    with pytest.raises(ValueError, match="module_dropout"):
        fa.DeloraConfig(module_dropout=1.0)
    with pytest.raises(ValueError, match="cannot be used when `target_modules` is a str"):
        fa.DeloraConfig(target_modules="x", layers_to_transform=[1])
    with pytest.raises(ValueError, match="must also be specified"):
        fa.DeloraConfig(layers_pattern="h")
