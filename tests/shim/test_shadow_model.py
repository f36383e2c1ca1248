"""`funcadapt.peft`'s Shadow beside PEFT's: the same code on both."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from both import PACKAGES
from peft_tools import config_file, peft_load, raw, same_tensors, tiny

import funcadapt as fa
import funcadapt.peft as shim
from funcadapt import shadow as sh

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

IDS = torch.randint(2, 32, (2, 6), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
KWARGS = {"input_ids": IDS, "attention_mask": MASK}
LM = {"task_type": "CAUSAL_LM", "r": 3, "shadow_alpha": 0.7, "shadow_dropout": 0.3}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LM),
    "narrow": ("llama", {**LM, "shadow_hidden_size": 8, "update_hidden_size": 5, "modules_to_save": ["lm_head"]}),
    "gpt2": ("gpt2", {**LM, "target_modules": ["h.1"], "init_weights": False, "shadow_dropout": 0.0}),
    "classes": ("llama_cls", {**LM, "task_type": "SEQ_CLS"}),
    "no_task": ("llama", {"r": 2}),
}


def made(package: Any, case: str, name: str = "default") -> Any:
    base, fields = CASES[case]
    model = tiny(base)
    torch.manual_seed(1)
    wrapped = package.get_peft_model(model, package.ShadowConfig(**fields), adapter_name=name)
    noise(wrapped)
    return wrapped.eval()


def noise(wrapped: Any) -> None:
    with torch.no_grad():
        for key, p in wrapped.named_parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(key))))


def close(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_it_is_peft_s(case: str, tmp_path: Path) -> None:
    """Names, numbers, outputs, losses, gradients, files and switches."""
    labels = torch.tensor([0, 1]) if case == "classes" else IDS
    found: list[dict[str, Any]] = []
    for key, package in PACKAGES.items():
        model = made(package, case)
        seen: dict[str, Any] = {"names": [(n, p.requires_grad) for n, p in model.named_parameters()]}
        seen["status"] = [dataclasses.asdict(status) for status in model.get_layer_status()]
        seen["model status"] = dataclasses.asdict(model.get_model_status())
        seen["state"] = peft.get_peft_model_state_dict(model) if package is peft else (
            shim.get_peft_model_state_dict(model))  # fmt: skip
        seen["logits"] = model(**KWARGS).logits
        out = model(**KWARGS, labels=labels)
        out.loss.backward()
        seen["loss"] = out.loss.detach()
        seen["own"] = None if case == "no_task" else model.base_model.last_shadow_loss
        assert (getattr(out, "shadow_loss", None) is None) == (case == "no_task")
        seen["grads"] = {n: p.grad for n, p in model.named_parameters()}
        torch.manual_seed(3)
        seen["training"] = model.train()(**KWARGS).logits.detach()
        model.eval()
        with model.disable_adapter():
            seen["disabled"] = model(**KWARGS).logits.detach()
        if case not in ("classes", "no_task"):
            settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": 99}
            seen["ids"] = model.generate(**KWARGS, **settings)
            seen["beams"] = model.generate(**KWARGS, **settings, num_beams=2)
        model.save_pretrained(tmp_path / key)
        seen["again"] = model(**KWARGS).logits
        found.append(seen)
    theirs, ours = found
    for name in ("names", "status", "model status"):
        assert ours[name] == theirs[name]
    same_tensors(ours["state"], theirs["state"])
    for name in ("loss", "own", "logits", "training", "disabled", "again", "ids", "beams"):
        if theirs.get(name) is not None:
            close(ours[name], theirs[name])
    for name, g in theirs["grads"].items():
        if g is None:
            assert ours["grads"][name] is None
        else:
            close(ours["grads"][name], g)
    same_tensors(raw(tmp_path / "shim"), raw(tmp_path / "peft"))
    assert config_file(tmp_path / "shim") == config_file(tmp_path / "peft")

    # files, each way
    base = CASES[case][0]
    again: Any = shim.PeftModel.from_pretrained(tiny(base), tmp_path / "peft").eval()
    close(again(**KWARGS).logits, theirs["logits"])
    assert not any(p.requires_grad for p in again.base_model.shadow_backbone.parameters())
    close(peft_load(tiny(base), tmp_path / "shim")(**KWARGS).logits, theirs["logits"])
    value = sh.load(tmp_path / "shim")
    close(sh.call(tiny(base), value, kwargs=KWARGS).logits, theirs["logits"])
    same_tensors(sh.to_tensors(again.base_model.value_of("default")), sh.to_tensors(value))


def test_several_adapters(tmp_path: Path) -> None:
    found: list[list[Any]] = []
    for package in PACKAGES.values():
        model = made(package, "llama", "one")
        outs = [model(**KWARGS).logits]
        torch.manual_seed(2)
        model.add_adapter("two", package.ShadowConfig(**{**CASES["llama"][1], "r": 2, "init_weights": False}))
        outs.append(model(**KWARGS).logits)
        if package is shim:
            assert not any(m.training for m in model.modules())
        model.eval()  # PEFT's new adapter is in training mode, its dropout acts
        model.set_adapter("two")
        outs.append(model(**KWARGS).logits)
        outs.append([n for n, p in model.named_parameters() if p.requires_grad])
        with pytest.raises(ValueError, match="exactly one active adapter, but got 2"):
            model.base_model.set_adapter(["one", "two"])
        model.save_pretrained(tmp_path / package.__name__)
        with pytest.warns(UserWarning, match="Adapter two was active which is now deleted"):
            model.delete_adapter("two")
        outs.append([n for n, _ in model.named_parameters()])
        model.set_adapter("one")
        outs.append(model(**KWARGS).logits)
        with pytest.raises(ValueError, match="does not support multiple adapters when any"):
            model.add_adapter("three", package.ShadowConfig(task_type="SEQ_CLS", r=2))
        for merge in (model.merge_and_unload, model.merge_adapter):
            with pytest.raises(NotImplementedError, match="ShadowPEFT cannot be merged"):
                merge()
        bare = model.unload()
        assert type(bare.model.layers[0]).__name__ == "LlamaDecoderLayer"
        outs.append(bare(**KWARGS).logits)
        found.append(outs)
    for theirs, ours in zip(*found, strict=True):
        if isinstance(theirs, list):
            assert ours == theirs
        else:
            close(ours, theirs)
    same_tensors(raw(tmp_path / "funcadapt.peft" / "two"), raw(tmp_path / "peft" / "two"))
    close(found[1][-1], tiny("llama")(**KWARGS).logits)


@pytest.mark.parametrize("case", ["llama", "narrow", "classes", "gpt2"])
@pytest.mark.parametrize("copy", [False, True])
def test_the_shadow_by_itself(case: str, copy: bool, tmp_path: Path) -> None:
    found: list[list[Any]] = []
    labels = torch.tensor([0, 1]) if case == "classes" else IDS
    for package in PACKAGES.values():
        model = made(package, case)
        alone = model.base_model.unload_shadow(copy=copy).eval()
        out = alone(**KWARGS, labels=labels)
        outs = [out.logits.detach(), out.loss.detach(), sorted(alone.state_dict())]
        assert alone.can_generate() == (case != "classes")
        if alone.can_generate():
            settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": 99}
            outs.append(alone.generate(**KWARGS, **settings))
        found.append(outs)
        if package is shim:
            value = model.base_model.value_of("default")
            with torch.no_grad():
                close(sh.detached(tiny(CASES[case][0]), value, kwargs=KWARGS), out.logits)
    if copy and case == "gpt2":  # PEFT puts the copied embeddings where GPT-2 does not look for them
        assert not torch.allclose(found[0][0], found[1][0], atol=1e-2)
        assert "backbone.embed_tokens.weight" in found[0][2]
        found[0] = found[1]
    for theirs, ours in zip(*found, strict=True):
        assert ours == theirs if isinstance(ours, list) else torch.allclose(ours, theirs, atol=1e-5)
    assert isinstance(alone, shim.tuners.shadow.DetachedShadowModel)


def test_what_is_refused() -> None:
    for package in PACKAGES.values():
        with pytest.raises(ValueError, match="does not support prompt learning, adaption prompt and shadow yet"):
            package.inject_adapter_in_model(package.ShadowConfig(), tiny("llama"))
    model = made(shim, "llama")
    with pytest.raises(fa.AdapterError, match="a filled DynamicCache without the shadow's own cache"):
        model(input_ids=IDS, past_key_values=model(**KWARGS).past_key_values.__dict__["base"])
    tensors = {key: t[:1] for key, t in shim.get_peft_model_state_dict(model).items()}
    with pytest.raises(RuntimeError, match="size mismatch for base_model"):
        shim.set_peft_model_state_dict(model, tensors)
    lacking = dict(list(shim.get_peft_model_state_dict(model).items())[1:])
    result = shim.set_peft_model_state_dict(model, {**lacking, "x": torch.zeros(1)})
    assert len(result.missing_keys) == 1
    assert result.unexpected_keys == ["x"]
    with pytest.raises(NotImplementedError, match="different adapters"):
        model(**KWARGS, adapter_names=["default", "__base__"])
    with pytest.raises(NotImplementedError, match="nothing to unmerge"):
        model.unmerge_adapter()
    with pytest.raises(NotImplementedError, match="cannot be combined"):
        model.add_weighted_adapter(["default"], [1.0], "x")
    assert not model.supports_lora_conversion()
    with pytest.raises(ValueError, match="No shadow backbone found"):
        model.base_model.unload_shadow("x")
