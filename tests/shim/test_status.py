"""`get_layer_status`, `get_model_status` and the helpers beside PEFT's."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

import pytest
import torch
from both import equal, fill, on_both, same, same_error, status
from peft_tools import layer_model, logits, tiny, tokens
from test_peft_model import make, wrapped

import funcadapt.peft as shim


@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "saved", "bias"])
def test_status_through_a_life(name: str) -> None:
    def scenario(package: Any) -> Any:
        model = wrapped(package, name)
        seen = [status(model.get_layer_status()), status(model.get_model_status())]
        more = {"modules_to_save": ["lm_head"]} if name == "saved" else {"bias": "none"} if name == "bias" else {}
        model.add_adapter("second", make(package, name, target_modules=["k_proj", "q_proj"], **more))
        seen += [status(model.get_layer_status()), status(model.get_model_status())]
        model.base_model.disable_adapter_layers()
        seen.append(status(model.get_model_status()))
        model.base_model.enable_adapter_layers()
        model.set_adapter("second")
        seen.append(status(model.get_model_status()))
        model.merge_adapter()
        seen.append(status(model.get_model_status()))
        model.unmerge_adapter()
        return seen

    same(scenario, warn=False)


def test_irregular() -> None:
    def scenario(package: Any) -> Any:
        model = wrapped(package)
        model.add_adapter("second", make(package, "lora"))
        layer = model.model.model.layers[0].self_attn.q_proj
        layer.enable_adapters(False)
        layer.set_requires_grad("second", True)
        other = model.model.model.layers[1].self_attn.q_proj
        other.set_adapter("second")
        other.merge()
        with model.disable_adapter():
            pass
        layer.enable_adapters(False)
        return status(model.get_model_status())

    found = same(scenario)
    assert found["enabled"] == found["active_adapters"] == "irregular"


def test_status_of_injected_models() -> None:
    def scenario(package: Any) -> Any:
        model = package.inject_adapter_in_model(make(package, "lora"), tiny("llama"))
        net = package.inject_adapter_in_model(
            package.LoraConfig(r=2, target_modules=["layer"]), layer_model("conv2d")[0]
        )
        return [status(f(m)) for m in (model, net) for f in (package.get_model_status, package.get_layer_status)]

    same(scenario)
    same_error(lambda p: p.get_layer_status(tiny("llama")), "No adapter layers found")
    same_error(lambda p: p.get_model_status(tiny("llama")), "No adapter layers found")


def test_disable_adapter_nests() -> None:
    def scenario(package: Any) -> Any:
        model = fill(wrapped(package)).eval()
        batch = tokens("llama")
        seen = []
        with model.disable_adapter():
            with model.disable_adapter():
                seen.append(logits(model(**batch)).detach())
            seen.append(logits(model(**batch)).detach())
            seen.append(model.has_active_enabled_adapter)
        seen.append(logits(model(**batch)).detach())
        with pytest.raises(KeyError), model.disable_adapter():
            raise KeyError
        seen.append(logits(model(**batch)).detach())
        return seen

    same(scenario)


def test_rescaling() -> None:
    def scenario(package: Any) -> Any:
        helpers = import_module(f"{package.__name__}.helpers")
        model = fill(wrapped(package)).eval()
        batch, seen = tokens("llama"), []
        with helpers.rescale_adapter_scale(model, 0.5):
            seen.append(logits(model(**batch)).detach())
        with pytest.raises(KeyError), helpers.rescale_adapter_scale(model, 3):
            raise KeyError
        seen.append(logits(model(**batch)).detach())
        return seen

    same(scenario)
    for bad in ("2", None):
        same_error(lambda p, bad=bad: _rescaled(p, wrapped(p), bad), "multiplier should be")
    same_error(lambda p: _rescaled(p, wrapped(p, "ia3"), 2.0), "only supported for models with")


def _rescaled(package: Any, model: Any, multiplier: Any) -> None:
    with import_module(f"{package.__name__}.helpers").rescale_adapter_scale(model, multiplier):
        pass


def test_input_dtype_casting() -> None:
    def scenario(package: Any) -> Any:
        helpers = import_module(f"{package.__name__}.helpers")
        model, x, target = layer_model("linear")
        made = fill(package.get_peft_model(model, package.LoraConfig(r=2, **target))).eval()
        layer = made.base_model.model.inner["layer"]
        seen: list[Any] = [made(x).detach()]
        with helpers.disable_input_dtype_casting(made):
            seen += [layer.cast_input_dtype_enabled, made(x).detach()]
        with helpers.disable_input_dtype_casting(made, active=False):
            seen.append(layer.cast_input_dtype_enabled)
        return [*seen, layer.cast_input_dtype_enabled]

    same(scenario)


def test_is_it_a_peft_model(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    wrapped(shim).save_pretrained(tmp_path / "a")
    (tmp_path / "b").mkdir()

    def scenario(package: Any) -> Any:
        check = import_module(f"{package.__name__}.helpers").check_if_peft_model
        return check(str(tmp_path / "a")), check(str(tmp_path / "b"))

    assert same(scenario) == (True, False)


def test_signatures_are_this_models_alone() -> None:
    """PEFT changes the function of the class, so that every other model of it changes, too."""

    def bert(package: Any) -> Any:
        return package.get_peft_model(tiny("bert"), package.LoraConfig(r=2, target_modules=["query"]))

    def scenario(package: Any) -> Any:
        helpers = import_module(f"{package.__name__}.helpers")
        forward = package.PeftModel.forward
        before = dict(forward.__dict__), forward.__doc__
        try:
            model, other = wrapped(package), bert(package)
            helpers.update_forward_signature(model)
            own = list(inspect.signature(model.forward).parameters)
            output = logits(model(**tokens("llama"))).detach()
            return own, output, list(inspect.signature(other.forward).parameters)
        finally:
            forward.__dict__.clear()
            forward.__dict__.update(before[0])
            forward.__doc__ = before[1]

    theirs, ours = on_both(scenario)
    assert theirs.error is None, theirs.error
    assert ours.error is None, ours.error
    assert theirs.value[0] == ours.value[0]
    equal(theirs.value[1], ours.value[1])
    assert theirs.value[2] == theirs.value[0]
    assert ours.value[2] == ["args", "kwargs"]
    same_error(lambda p: import_module(f"{p.__name__}.helpers").update_signature(wrapped(p), "x"), "not supported")


def test_kappa() -> None:
    def scenario(package: Any) -> Any:
        helpers = import_module(f"{package.__name__}.helpers")
        model = tiny("mixtral")
        selector = helpers.KappaTuneSelector(model, show_progress=False)
        return (
            selector.get_best_targets(num_modules=3),
            selector.get_best_targets(top_p=0.3),
            selector.get_best_targets(threshold=30.0),
            selector.get_best_targets(),
            selector.get_best_target_parameters(),
            helpers.find_kappa_target_modules(model, show_progress=False),
            helpers.find_kappa_target_modules(tiny("llama"), show_progress=False),
            helpers.KappaTuneSelector(model, max_dim_size_to_analyze=20, show_progress=False).get_best_targets(),
        )

    same(scenario)


def test_counting() -> None:
    def scenario(package: Any) -> Any:
        model = wrapped(package, "saved")
        model.print_trainable_parameters()
        return model.get_nb_trainable_parameters()

    assert torch.tensor(same(scenario)).min() > 0
