"""`get_peft_model` and `PeftModel` beside PEFT's: the same outputs, gradients, flags, warnings and errors."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from both import equal, fill, flags, on_both, same, same_error, state
from peft_tools import layer_model, logits, tiny, tokens
from torch import nn

import funcadapt.peft as shim

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {"r": 4, "lora_alpha": 6}),
    "lora_dropout": ("LoraConfig", {"r": 4, "lora_dropout": 0.3}),
    "rslora": ("LoraConfig", {"r": 4, "use_rslora": True}),
    "patterns": ("LoraConfig", {"r": 4, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}),
    "dora": ("LoraConfig", {"r": 4, "use_dora": True}),
    "bias": ("LoraConfig", {"r": 2, "bias": "lora_only"}),
    "saved": ("LoraConfig", {"r": 2, "modules_to_save": ["norm"]}),
    "pissa": ("LoraConfig", {"r": 2, "init_lora_weights": "pissa"}),
    "olora": ("LoraConfig", {"r": 2, "init_lora_weights": "olora"}),
    "gaussian": ("LoraConfig", {"r": 2, "init_lora_weights": "gaussian"}),
    "ia3": ("IA3Config", {"feedforward_modules": []}),
}


def make(package: Any, name: str, **more: Any) -> Any:
    kind, fields = CONFIGS[name]
    return getattr(package, kind)(**copy.deepcopy({"target_modules": ["q_proj", "v_proj"], **fields, **more}))


def wrapped(package: Any, name: str = "lora", model: str = "llama", **more: Any) -> Any:
    return package.get_peft_model(tiny(model), make(package, name, **more))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_new_model(name: str) -> None:
    def scenario(package: Any) -> Any:
        model = wrapped(package, name)
        model.print_trainable_parameters()
        first = logits(model(**tokens("llama"))).detach()
        return first, state(model), flags(model), model.get_nb_trainable_parameters(), repr(type(model)).split(".")[-1]

    same(scenario)


@pytest.mark.parametrize("name", CONFIGS)
def test_its_life(name: str) -> None:
    """Outputs and gradients in training, in eval, disabled, merged, unmerged, and of the model that is left."""

    def scenario(package: Any) -> Any:
        model = fill(wrapped(package, name))
        batch = tokens("llama")
        seen: dict[str, Any] = {"eval": logits(model.eval()(**batch)).detach()}
        torch.manual_seed(3)
        model.train()(**batch, labels=batch["input_ids"]).loss.backward()
        seen["grads"] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        model.eval()
        with model.disable_adapter():
            seen["disabled"] = logits(model(**batch)).detach()
        seen["enabled"] = logits(model(**batch)).detach()
        seen["flags"] = flags(model)
        model.merge_adapter()
        seen["merged"] = logits(model(**batch)).detach()
        model.unmerge_adapter()
        seen["unmerged"] = logits(model(**batch)).detach()
        seen["state"] = state(model)
        bare = model.merge_and_unload(safe_merge=True)
        seen["unloaded"] = logits(bare(**batch)).detach()
        seen["left"] = sorted(bare.state_dict())
        seen["config"] = hasattr(bare, "peft_config")
        return seen

    same(scenario, tolerance=3e-4, warn=name != "ia3")  # PEFT warns that its unmerging is inexact


def test_unload_gives_the_base_model_back() -> None:
    base = tiny("llama")
    before = state(base)
    model = fill(shim.get_peft_model(base, make(shim, "lora")))
    bare = model.unload()
    assert bare is base
    equal(before, state(bare), 0)
    assert type(bare.model.layers[0].self_attn.q_proj) is nn.Linear


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "saved"])
def test_several_adapters(name: str, inference: bool) -> None:
    def scenario(package: Any) -> Any:
        model = wrapped(package, name)
        other = {"modules_to_save": ["lm_head"]} if name == "saved" else {}
        model.add_adapter("second", make(package, name, target_modules=["k_proj", "q_proj"], **other))
        fill(model)
        batch = tokens("llama")
        seen: dict[str, Any] = {"names": list(model.peft_config), "flags": flags(model), "saved": model.modules_to_save}
        seen["first"] = logits(model.eval()(**batch)).detach()
        model.set_adapter("second", inference_mode=inference)
        seen["active"] = model.active_adapter, model.active_adapters, model.active_peft_config.r if name != "ia3" else 0
        seen["second"], seen["second flags"] = logits(model(**batch)).detach(), flags(model)
        if name not in ("saved", "dora"):  # PEFT refuses the former, and its sum of the latter is no layer's weight
            model.base_model.set_adapter(["default", "second"])
            seen["both"], seen["both flags"] = logits(model(**batch)).detach(), flags(model)
        model.set_requires_grad("default", requires_grad=False)
        seen["frozen"] = flags(model)
        model.set_adapter("second")
        model.delete_adapter("second")
        seen["deleted"] = logits(model(**batch)).detach(), sorted(model.peft_config), model.active_adapters
        return seen

    same(scenario, tolerance=1e-4)


def test_adapter_keys_after_deleting() -> None:
    """Of another adapter's layers nothing is left but the wrapper. PEFT keeps empty wrappers, which change no key."""

    def scenario(package: Any) -> Any:
        model = wrapped(package)
        model.add_adapter("second", make(package, "lora"))
        model.delete_adapter("second")
        return state(model)

    same(scenario, warn=False)


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("already exists", lambda p, m: m.add_adapter("default", make(p, "lora"))),
        ("different peft types", lambda p, m: m.add_adapter("x", make(p, "ia3"))),
        ("not found", lambda p, m: m.set_adapter("typo")),
        ("does not exist", lambda p, m: m.delete_adapter("typo")),
        ("", lambda p, m: m.add_adapter("a.b", make(p, "lora"))),
        ("not found in the base model", lambda p, m: m.add_adapter("x", make(p, "lora", target_modules=["typo"]))),
        ("", lambda p, m: m.set_adapter(["default"])),
        ("merged", lambda p, m: (m.merge_adapter(), m.delete_adapter("default"))),
        ("", lambda p, m: m.merge_adapter("default")),
        (
            "only 1 adapter with bias",
            lambda p, m: (m.add_adapter("x", make(p, "bias")), m.add_adapter("y", make(p, "bias"))),
        ),
        ("", lambda p, m: m.no_such_attribute),
    ],
)
def test_errors(text: str, action: Any) -> None:
    def scenario(package: Any) -> Any:
        return action(package, wrapped(package))

    same_error(scenario, text)


def test_a_failed_injection_leaves_no_trace() -> None:
    """PEFT keeps the config of the failed adapter (defect B17), and half of its layers."""

    def scenario(package: Any) -> Any:
        net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        with pytest.raises(ValueError, match=r"not supported|cannot adapt"):
            package.get_peft_model(net, package.LoraConfig(r=2, target_modules=["0", "1"]))
        return sorted(net.state_dict()), hasattr(net, "peft_config")

    theirs, ours = on_both(scenario)
    assert ours.value == (["0.bias", "0.weight", "1.bias", "1.weight"], False)
    assert theirs.value != ours.value

    def again(package: Any) -> Any:
        model = wrapped(package)
        with pytest.raises(ValueError, match="not found"):
            model.add_adapter("x", make(package, "lora", target_modules=["typo"]))
        return list(model.peft_config)

    same(again)


def test_a_name_that_does_not_exist_is_an_error() -> None:
    """PEFT takes any name in the tuner, and the model silently is the base model."""

    def scenario(package: Any) -> Any:
        model = fill(wrapped(package)).eval()
        model.base_model.set_adapter("typo")
        with torch.no_grad():
            return logits(model(**tokens("llama")))

    theirs, ours = on_both(scenario)
    equal(theirs.value, logits(tiny("llama")(**tokens("llama"))).detach())
    assert isinstance(ours.error, ValueError)
    assert "typo" in str(ours.error)


def test_without_any_adapter_it_is_the_base_model() -> None:
    """PEFT's fails with a KeyError after the last adapter is gone."""

    def scenario(package: Any) -> Any:
        model = wrapped(package).eval()
        model.delete_adapter("default")
        return logits(model(**tokens("llama"))).detach()

    theirs, ours = on_both(scenario)
    assert isinstance(theirs.error, KeyError)
    equal(ours.value, logits(tiny("llama")(**tokens("llama"))).detach())


def test_warnings_of_get_peft_model() -> None:
    def second_time(package: Any) -> Any:
        model = tiny("llama")
        package.get_peft_model(model, make(package, "lora"))
        again = package.get_peft_model(model, make(package, "lora"), adapter_name="again")
        return list(again.peft_config), again.active_adapters, flags(again)

    same(second_time)

    def prefix(package: Any) -> Any:
        return list(package.get_peft_model(tiny("llama"), make(package, "lora"), adapter_name="lora").peft_config)

    same(prefix)

    def renamed(package: Any) -> Any:
        config = make(package, "lora")
        config.base_model_name_or_path, config.revision = "other", "old"
        model = package.get_peft_model(tiny("llama"), config, revision="new")
        return model.peft_config["default"].base_model_name_or_path, model.peft_config["default"].revision

    same(renamed)


def test_prompt_learning_is_refused() -> None:
    with pytest.raises(TypeError, match="Expected a PeftConfig"):
        shim.get_peft_model(tiny("llama"), "config")
    with pytest.raises(Exception, match="scope"):
        shim.get_peft_model(tiny("llama"), shim.PromptTuningConfig(num_virtual_tokens=3))


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_adapter_dtypes(dtype: torch.dtype, autocast: bool) -> None:
    def scenario(package: Any) -> Any:
        model = package.get_peft_model(tiny("llama").to(dtype), make(package, "lora"), autocast_adapter_dtype=autocast)
        model.add_adapter("second", make(package, "lora"), autocast_adapter_dtype=not autocast)
        return {name: str(p.dtype) for name, p in model.named_parameters()}

    same(scenario)


def test_low_cpu_mem_usage() -> None:
    def scenario(package: Any) -> Any:
        model = package.get_peft_model(tiny("llama"), make(package, "lora"), low_cpu_mem_usage=True)
        return {name: p.device.type for name, p in model.named_parameters()}

    same(scenario)


def test_gradient_checkpointing_gets_gradients() -> None:
    def scenario(package: Any) -> Any:
        base = tiny("llama").train()
        base.gradient_checkpointing_enable({"use_reentrant": True})
        model = fill(package.get_peft_model(base, make(package, "lora")))
        batch = tokens("llama")
        model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    found = same(scenario, tolerance=1e-4, warn=False)
    assert len(found) == 8


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_a_tied_weight_is_untied_by_merging(target: str, tmp_path: Any) -> None:
    """PEFT adds the update to the one weight, and so to the other layer, too."""

    def scenario(package: Any) -> Any:
        config = package.LoraConfig(r=2, target_modules=[target])
        model = fill(package.get_peft_model(tiny("llama_tied"), config)).eval()
        before = logits(model(**tokens("llama"))).detach()
        merged = model.merge_and_unload()
        merged.save_pretrained(tmp_path / package.__name__)
        again = type(merged).from_pretrained(tmp_path / package.__name__).eval()
        return before, logits(merged(**tokens("llama"))).detach(), logits(again(**tokens("llama"))).detach()

    theirs, ours = on_both(scenario)
    assert ours.error is None, ours.error
    equal(theirs.value[0], ours.value[0])
    equal(ours.value[0], ours.value[1], 1e-4)
    equal(ours.value[0], ours.value[2], 1e-4)
    assert not torch.allclose(theirs.value[0], theirs.value[1], atol=1e-2)


def test_names_that_look_like_parts_of_adapters() -> None:
    """PEFT passes by every layer below a module that is called like its prefix (defect B12): the adapter stays."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.my_lora_block = nn.ModuleDict({"lin": nn.Linear(4, 4)})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.my_lora_block["lin"](x)

    def scenario(package: Any) -> Any:
        torch.manual_seed(0)
        model = package.get_peft_model(Net(), package.LoraConfig(r=2, target_modules=["lin"]))
        model.add_adapter("second", package.LoraConfig(r=2, target_modules=["lin"]))
        fill(model)
        model.delete_adapter("default")
        return sorted(key for key in model.state_dict() if ".default." in key)

    theirs, ours = on_both(scenario)
    assert len(theirs.value) == 2
    assert ours.value == []


def test_any_module() -> None:
    for kind in ("linear", "conv2d", "embedding", "mha"):
        model, x, target = layer_model(kind)

        def scenario(package: Any, model: nn.Module = model, x: Any = x, target: Any = target) -> Any:
            made = package.get_peft_model(copy.deepcopy(model), package.LoraConfig(r=2, **copy.deepcopy(target)))
            return made(x).detach(), state(made), made.targeted_module_names

        same(scenario)


def test_attributes_pass_through() -> None:
    def scenario(package: Any) -> Any:
        model = wrapped(package)
        inner = model.base_model.model
        assert model.get_base_model() is inner
        assert model.config is inner.config
        assert model.model.model.layers is inner.model.layers
        return (
            model.dtype,
            str(model.device),
            model.base_model_torch_dtype,
            model.peft_type.value,
            type(model.base_model).__name__,
            model.base_model.prefix,
            sorted(model.base_model.targeted_module_names),
            model.base_model.active_adapters,
            model.modules_to_save,
            sorted(model.peft_config["default"].target_modules),
            inner.peft_config is model.peft_config,
            model.supports_lora_conversion(),
        )

    same(scenario)


def test_all_linear_and_defaults_are_settled_in_the_config() -> None:
    for target in ("all-linear", None):

        def scenario(package: Any, target: Any = target) -> Any:
            found = []
            for name in ("llama", "gpt2", "bert_cls", "t5"):
                model = package.get_peft_model(tiny(name), package.LoraConfig(r=2, target_modules=target))
                config = model.peft_config["default"]
                found.append((sorted(config.target_modules), config.fan_in_fan_out))
            return found

        same(scenario)


def test_a_model_can_be_copied() -> None:
    model = fill(wrapped(shim)).eval()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        equal(logits(model(**tokens("llama"))), logits(twin(**tokens("llama"))))
        next(p for n, p in twin.named_parameters() if "lora_B" in n).add_(1.0)
        assert not torch.equal(logits(model(**tokens("llama"))), logits(twin(**tokens("llama"))))
    twin.delete_adapter("default")
    assert list(model.peft_config) == ["default"]


def test_tuner_without_a_peft_model() -> None:
    def scenario(package: Any) -> Any:
        from importlib import import_module

        lora = import_module(f"{package.__name__}.tuners.lora")
        tuner = fill(lora.LoraModel(tiny("llama"), make(package, "lora"), "default")).eval()
        return logits(tuner(**tokens("llama"))).detach(), flags(tuner), tuner.active_adapters

    same(scenario)


def test_isinstance_of_what_libraries_check() -> None:
    from funcadapt.peft.tuners.lora import LoraLayer
    from funcadapt.peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

    model = wrapped(shim)
    assert isinstance(model, shim.PeftModel)
    assert isinstance(model.base_model, BaseTuner)
    layer = model.model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, BaseTunerLayer)
    assert isinstance(layer, LoraLayer)
    assert not isinstance(model, peft.PeftModel)
