"""Merging into layers of bitsandbytes in the in-place view: as PEFT, and out again bit for bit."""

from __future__ import annotations

from typing import Any

import bitsandbytes
import peft
import pytest
import torch
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import funcadapt as fa
import funcadapt.peft as shim
from funcadapt.quantised import dequantised

KINDS = {
    "4bit": (bitsandbytes.nn.Linear4bit, {"quant_type": "nf4"}),
    "8bit": (bitsandbytes.nn.Linear8bitLt, {"has_fp16_weights": False}),
}


def _model(name: str) -> nn.Module:
    torch.manual_seed(0)
    kind, options = KINDS[name]
    model = nn.ModuleDict({"up": kind(64, 96, **options), "down": nn.Linear(96, 3)}).to("cpu").train()
    for bits in ("4bit", "8bit"):
        setattr(model, f"is_loaded_in_{bits}", bits == name)  # which PEFT goes by
    return model


def _fields(method: str) -> dict[str, Any]:
    fields = {"r": 4, "target_modules": ["up", "down"], "init_lora_weights": False, "use_dora": method == "dora"}
    return fields


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.filterwarnings("ignore:Merge lora module to:UserWarning")  # PEFT's
def test_merging(name: str, method: str) -> None:
    ours: Any = shim.inject_adapter_in_model(shim.LoraConfig(**_fields(method)), _model(name))
    theirs: Any = peft.inject_adapter_in_model(peft.LoraConfig(**_fields(method)), _model(name))
    theirs.load_state_dict(ours.state_dict(), strict=False)
    x, layer = torch.randn(5, 64), ours["up"]
    torch.testing.assert_close(layer(x), theirs["up"](x), rtol=0, atol=1e-5)
    plain, adapted, before = layer.get_base_layer()(x), layer(x), layer.get_base_layer().weight
    layer.merge()
    theirs["up"].merge()
    torch.testing.assert_close(
        dequantised(layer.get_base_layer()), dequantised(theirs["up"].get_base_layer()), rtol=1e-3, atol=1e-5
    )
    assert type(layer.get_base_layer().weight) is type(before)
    near = (layer(x) - adapted).norm() / (adapted - plain).norm()
    assert near < (0.25 if name == "4bit" else 0.02), near
    layer.unmerge()
    assert layer.get_base_layer().weight is before
    assert torch.equal(layer.get_base_layer()(x), plain)
    assert torch.equal(layer(x), adapted)


@pytest.mark.parametrize("name", KINDS)
def test_unloading(name: str) -> None:
    model: Any = shim.get_peft_model(_model(name), shim.LoraConfig(**_fields("lora")))  # type: ignore[arg-type]
    x = torch.randn(5, 64)
    adapted = model.base_model.model["up"](x)
    unloaded = model.merge_and_unload()
    assert type(unloaded["up"]) is KINDS[name][0]
    torch.testing.assert_close(unloaded["up"](x), adapted, rtol=0.2, atol=0.5)


def test_another_library_is_refused_and_nothing_is_merged() -> None:
    model: Any = nn.ModuleDict({"down": nn.Linear(64, 96), "up": nn.Linear(64, 96)})
    quantize_(model["up"], Int8WeightOnlyConfig())
    shim.inject_adapter_in_model(shim.LoraConfig(**_fields("lora")), model)
    before = {name: tensor.clone() for name, tensor in model["down"].state_dict().items()}
    with pytest.raises(fa.AdapterError, match="'up' is quantised and cannot be merged into"):
        fa.view.merging.merge(model)
    assert not model["up"].merged
    assert not model["down"].merged
    for name, tensor in model["down"].state_dict().items():
        assert torch.equal(tensor, before[name])
