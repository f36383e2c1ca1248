"""KaSA: what the laws cannot say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_tools import Net, layer_model, peft_save, wrap
from torch import nn

import funcadapt as fa
import funcadapt.peft as shim
from funcadapt.methods import kasa

FIELDS: Any = {"r": 2, "target_modules": ["layer"], "kasa_config": {"beta": 0.3, "gamma": 0.7}}


def test_the_smallest_singular_values_are_left_out() -> None:
    model, x = nn.Sequential(nn.Linear(6, 5, bias=False)).double(), torch.randn(3, 6, dtype=torch.float64)
    before = model[0].weight.detach().clone()
    adapter = fa.init(model, fa.LoraConfig(**{**FIELDS, "target_modules": ["0"]}))
    u, s, vh = torch.linalg.svd(before, full_matrices=False)
    truncated = (u[:, :3] * s[:3]) @ vh[:3]
    torch.testing.assert_close(fa.merge(model, adapter)["0.weight"], truncated)
    torch.testing.assert_close(fa.functional_call(model, adapter, x), x @ truncated.T)
    assert torch.equal(model[0].weight, before)


def test_the_penalty_is_that_of_peft(tmp_path: Path) -> None:
    model, _, _ = layer_model("linear")
    wrapped: Any = wrap(layer_model("linear")[0], peft.LoraConfig(**FIELDS))
    folder = peft_save(wrapped, tmp_path)
    with pytest.raises(fa.AdapterFileError, match="Pass it"):
        fa.load(folder)
    adapter = fa.load(folder, model=model)
    expected = wrapped.base_model._get_kasa_loss()
    torch.testing.assert_close(kasa.penalty(adapter), expected)
    ours: Any = shim.PeftModel.from_pretrained(model, folder, is_trainable=True)
    loss = ours.base_model._get_kasa_loss()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert ours.base_model.model.inner["layer"].lora_diag["default"].grad is not None
    assert ours.base_model._get_kasa_loss("none") == 0.0


def test_the_penalty_of_experts_is_the_sum_over_them() -> None:
    model = nn.Sequential(Net(nn.Linear(4, 6)))
    model.w = nn.Parameter(torch.randn(3, 6, 4))
    adapter = fa.init(model, fa.LoraConfig(r=2, target_parameters=["w"], kasa_config=FIELDS["kasa_config"]))
    p = adapter.leaves("w")
    every = [kasa.site_penalty(adapter.config, {k: v[e] if v.ndim else v for k, v in p.items()}) for e in range(3)]
    torch.testing.assert_close(kasa.penalty(adapter), torch.stack(every).sum())


def test_a_plain_lora_has_no_dict_of_diagonals() -> None:
    """PEFT's layers have `lora_diag` where there is one."""
    first: Any = shim.get_peft_model(layer_model("linear")[0], shim.LoraConfig(r=2, target_modules=["layer"]))
    layer = first.base_model.model.inner["layer"]
    assert "lora_diag" not in dict(layer.named_children())
    first.add_adapter("other", shim.LoraConfig(**FIELDS))
    assert layer.adapter_layer_names[-1] == "lora_diag"
    assert list(layer.lora_diag) == ["other"]
    assert "lora_diag" not in type(layer).adapter_layer_names


def test_errors() -> None:
    with pytest.raises(ValueError, match="`beta` must be non-negative, got -1"):
        fa.LoraConfig(kasa_config={"beta": -1})
    with pytest.raises(fa.SiteError, match=r"smaller than min\(in_features, out_features\) \(5\) at 'inner.layer'"):
        fa.init(layer_model("linear")[0], fa.LoraConfig(**{**FIELDS, "r": 5}))
