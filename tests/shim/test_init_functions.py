"""PEFT's functions for EVA, CorDA and LoRA-GA, and LoftQ, in the shim and in PEFT."""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_tools import layer_model, logits, tiny, tokens
from torch import Tensor

import funcadapt.peft as shim
from funcadapt import loftq

TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
BOTH = ("peft", "funcadapt.peft")


def batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    found: list[dict[str, Tensor]] = []
    for _ in range(4):
        ids = torch.randint(2, 32, (4, 12), generator=generator)
        mask = torch.ones_like(ids)
        mask[:, -3:] = 0
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


def function(package: str, name: str) -> Any:
    return getattr(importlib.import_module(f"{package}.tuners.lora.{name.partition('.')[0]}"), name.partition(".")[2])


@pytest.fixture
def attr(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's defect B18: a dependency that it does not declare."""
    if "attr" not in sys.modules:
        import dataclasses

        module: Any = types.ModuleType("attr")
        module.dataclass = dataclasses.dataclass
        monkeypatch.setitem(sys.modules, "attr", module)


@pytest.mark.filterwarnings("ignore:lora with eva initialization:UserWarning", "ignore::FutureWarning")
def test_eva() -> None:
    states: list[dict[str, Tensor]] = []
    models: list[Any] = []
    for package in BOTH:
        lib: Any = importlib.import_module(package)
        torch.manual_seed(0)
        config = lib.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights="eva", eva_config=lib.EvaConfig(rho=2.0))
        model = lib.get_peft_model(tiny("llama"), config)
        lib.initialize_lora_eva_weights(model, batches(), show_progress_bar=False)
        models.append(model)
        states.append(lib.get_peft_model_state_dict(model))
    theirs, ours = models
    assert sorted(states[0]) == sorted(states[1])
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=0, atol=1e-4, msg=key)
    assert ours.peft_config["default"].rank_pattern.keys() == theirs.peft_config["default"].rank_pattern.keys()
    torch.testing.assert_close(logits(ours(**tokens("llama"))), logits(theirs(**tokens("llama"))))
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == {
        n for n, p in theirs.named_parameters() if p.requires_grad
    }


def test_eva_from_a_state_dict_and_other_functions() -> None:
    config = shim.LoraConfig(r=2, target_modules=["layer"], init_lora_weights="eva", eva_config=shim.EvaConfig(rho=1.0))
    model: Any = shim.get_peft_model(layer_model("linear")[0], config)
    x = torch.randn(30, 6) * torch.tensor([3.0, 19.0, 1.0, 0.1, 8.0, 0.2])
    found = shim.get_eva_state_dict(
        model,
        [x],
        forward_fn=lambda model, inputs: model(inputs),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn={"base_model.model.inner.layer": lambda layer_input, *_: layer_input[:20]},
    )
    assert list(found) == ["base_model.model.inner.layer"]
    _, _, vh = torch.linalg.svd(x[:20] - x[:20].mean(0))
    torch.testing.assert_close(
        found["base_model.model.inner.layer"].abs(), vh[:2].abs(), rtol=0, atol=1e-3, check_dtype=False
    )
    shim.initialize_lora_eva_weights(model, eva_state_dict=found)
    layer = model.base_model.model.inner["layer"]
    given = found["base_model.model.inner.layer"].float()
    torch.testing.assert_close(layer.lora_A["default"].weight.detach(), given)
    assert layer.lora_A["default"].weight.requires_grad
    with pytest.raises(ValueError, match="dataloader is required"):
        shim.initialize_lora_eva_weights(model)
    with pytest.raises(ValueError, match="not found in the model"):
        shim.get_eva_state_dict(model, [x], prepare_layer_inputs_fn={"nothing": None})
    with pytest.raises(ValueError, match="dataloader is empty"):
        shim.get_eva_state_dict(model, [])


@pytest.mark.usefixtures("attr")
def test_corda(tmp_path: Path) -> None:
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    x[0, 0] = 9.0
    weights: list[Tensor] = []
    for package in BOTH:
        lib: Any = importlib.import_module(package)
        given = importlib.import_module(f"{package}.tuners.lora.config").CordaConfig(
            cache_file=str(tmp_path / package / "cache.pt")
        )
        config = lib.LoraConfig(
            r=2, lora_alpha=6, target_modules=["layer"], init_lora_weights="corda", corda_config=given
        )
        for _ in range(2):  # from data, and from the file
            model = layer_model("linear")[0]
            before = model(x)
            function(package, "corda.preprocess_corda")(model, config, lambda model=model: model(x))
            assert model.inner["layer"].eigens.S_WC.shape == (2,)  # pyright: ignore
            wrapped: Any = lib.get_peft_model(model, config)
            layer = wrapped.base_model.model.inner["layer"]
            assert not hasattr(layer.base_layer, "eigens")
            torch.testing.assert_close(wrapped(x), before, rtol=0, atol=1e-4)
            weights.append(layer.base_layer.weight.detach())
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
def test_lora_ga(tmp_path: Path) -> None:
    x = torch.randn(12, 6, generator=torch.Generator().manual_seed(1))
    found: list[tuple[Tensor, Tensor]] = []
    for package in BOTH:
        lib: Any = importlib.import_module(package)
        config = lib.LoraConfig(
            r=2, lora_alpha=6, target_modules=["layer"], init_lora_weights="lora_ga", lora_ga_config=lib.LoraGAConfig()
        )
        model = layer_model("linear")[0].eval()
        before = model(x)

        def step(model: Any = model) -> None:
            for _ in range(2):
                model(x).square().sum().backward()

        file = str(tmp_path / package / "cache.pt")
        function(package, "loraga.preprocess_loraga")(model, config, step, cache_file=file)
        assert not model.training
        assert model.inner["layer"].weight.requires_grad  # pyright: ignore
        wrapped: Any = lib.get_peft_model(model, config)
        layer = wrapped.base_model.model.inner["layer"]
        assert not hasattr(layer.base_layer, "_peft_loraga_grad")
        torch.testing.assert_close(wrapped(x), before, rtol=0, atol=1e-4)
        found.append((layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()))
    for ours, theirs in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours.abs(), theirs.abs(), rtol=1e-2, atol=1e-3)  # the signs are the SVD's own


def test_without_what_was_seen() -> None:
    config = shim.LoraConfig(
        r=2,
        target_modules=["layer"],
        init_lora_weights="corda",
        corda_config=importlib.import_module("funcadapt.peft.tuners.lora.config").CordaConfig(),
    )
    with pytest.raises(ValueError, match="preprocess_corda"):
        shim.get_peft_model(layer_model("linear")[0], config)
    with pytest.raises(ValueError, match="run_model must be specified"):
        function("funcadapt.peft", "corda.preprocess_corda")(layer_model("linear")[0], config)
    states: list[Any] = []
    for lib in (peft, shim):  # as with True
        torch.manual_seed(3)
        fallback: Any = lib.LoraConfig(
            r=2, target_modules=["layer"], init_lora_weights="lora_ga", lora_ga_config=lib.LoraGAConfig()
        )
        states.append(lib.get_peft_model_state_dict(lib.get_peft_model(layer_model("linear")[0], fallback)))
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value)


def test_loftq() -> None:
    config = shim.LoraConfig(
        r=2,
        target_modules=["layer"],
        init_lora_weights="loftq",
        loftq_config=shim.LoftQConfig(loftq_bits=4, loftq_iter=3),
    )
    model = layer_model("linear")[0]
    weight = model.inner["layer"].weight.detach().clone()  # pyright: ignore
    layer: Any = shim.get_peft_model(model, config).base_model.model.inner["layer"]
    loftq_init = importlib.import_module("funcadapt.peft.utils.loftq_utils").loftq_init
    q, a, b = loftq_init(weight, 4, 2, 3)
    torch.testing.assert_close(layer.base_layer.weight.detach(), q)
    scaling = layer.scaling["default"]
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * scaling
    torch.testing.assert_close(product, b @ a)
    torch.testing.assert_close(loftq.quantised(q, 4), q)
