"""PEFT and `funcadapt.peft` beside each other: the same model, config and seed, and then all that is done with it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_tools import attention_truth, config_file, logits, same_tensors
from safetensors.torch import load_file
from torch import Tensor, nn
from view_pairs import (
    ADALORA,
    DORA,
    IA3,
    INITS,
    LAYERS,
    LIBRARIES,
    LORA,
    PAIRS,
    PARAMETERS,
    QV,
    WHOLE,
    WHOLE_IA3,
    WITH_BIAS,
    Pair,
    Twins,
    config_of,
    flags,
    fresh,
    ordered_flags,
    original,
    seed,
    state,
    surface,
)

import funcadapt as fa
import funcadapt.peft as shim
from funcadapt.view import merging
from funcadapt.view.values import adapter_of
from funcadapt.view.walking import layers

# what PEFT and the shim say while they work is compared in tests/shim
pytestmark = pytest.mark.filterwarnings("ignore")

# -- the checks -------------------------------------------------------------------------------------------


def same_model(twins: Twins) -> None:
    """Names, order, dtypes and bits of all tensors, what is trained, what is printed, what layers say."""
    theirs, ours = twins.both(state)
    assert list(theirs) == list(ours)
    for key, value in theirs.items():
        assert value.dtype == ours[key].dtype, key
        if any(part in key for part in twins.pair.rounded):
            torch.testing.assert_close(ours[key], value, msg=key)
        else:
            assert torch.equal(ours[key], value), key
    for view in (flags, repr, surface):
        theirs, ours = twins.both(view)
        assert theirs == ours


def same_numbers(twins: Twins) -> None:
    """Output and gradients in training mode: dropout draws the same in both."""
    twins.randomise()

    def gradients(model: nn.Module) -> dict[str, Tensor | None]:
        seed(11)
        model.train()
        out = twins.run(model)
        slope = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out.dtype)
        (out * slope).sum().backward()
        return {"": out.detach()} | {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    theirs, ours = twins.both(gradients)
    assert list(theirs) == list(ours)
    assert any(g is not None and name and g.abs().max() > 1e-3 for name, g in ours.items())
    for name, grad in theirs.items():
        assert (grad is None) == (ours[name] is None), name
        if grad is not None:
            twins.close(grad, ours[name])


def same_training(twins: Twins) -> None:
    """Three steps of AdamW or SGD."""

    def trained(model: Any) -> dict[str, Tensor]:
        model.train()
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if twins.pair.method == "ia3":
            optimiser = torch.optim.SGD(parameters.values(), lr=0.01, momentum=0.9)
        else:  # with its own epsilon a gradient of nothing but rounding errors would become a full step
            optimiser = torch.optim.AdamW(parameters.values(), lr=0.01, eps=1e-3)
        for step in range(3):
            seed(step)
            optimiser.zero_grad()
            twins.run(model).pow(2).mean().backward()
            optimiser.step()
            if twins.pair.method == "adalora":
                model.base_model.update_and_allocate(step)
        return {name: p.detach() for name, p in parameters.items()}

    before = state(twins.ours)
    theirs, ours = twins.both(trained)
    assert any(not torch.equal(before[name], p) for name, p in ours.items())
    for name, value in theirs.items():
        twins.close(value, ours[name])


def same_checkpoint(twins: Twins, folder: Path) -> None:
    """The same config and the same tensors under the same keys, and each reads what the other wrote."""
    twins.ours.load_state_dict(twins.theirs.state_dict())  # training has rounded
    before = state(twins.theirs)
    theirs, ours = twins.saved()
    same_tensors(theirs, ours)
    twins.randomise(9)
    first = peft.set_peft_model_state_dict(twins.theirs, ours)
    second = shim.set_peft_model_state_dict(twins.ours, theirs)
    assert sorted(first.missing_keys) == sorted(second.missing_keys)
    assert first.unexpected_keys == second.unexpected_keys == []
    same_tensors(*twins.both(state))
    if twins.pair.method != "adalora":  # what it has pruned is not in a checkpoint
        same_tensors(state(twins.ours), before)
    twins.theirs.peft_config["default"].save_pretrained(folder / "theirs")
    twins.ours.peft_config["default"].save_pretrained(folder / "ours")
    files = [config_file(folder / name) for name in ("theirs", "ours")]
    for values in files:
        values["target_parameters"] = values.get("target_parameters") or None  # PEFT writes [] for a Mixtral
    assert files[0] == files[1]


def same_switches(twins: Twins) -> None:
    """Disabled, merged, and merged no more."""
    twins.both(lambda model: model.eval())
    active = twins.run(twins.ours)
    twins.close(twins.run(twins.theirs), active)
    with twins.theirs.disable_adapter(), twins.ours.disable_adapter():
        twins.close(*twins.both())
    kept, trained = state(twins.ours), flags(twins.ours)
    try:
        twins.theirs.merge_adapter()
    except (NotImplementedError, RuntimeError):  # no dense form
        with pytest.raises(fa.SiteError):
            twins.ours.merge_adapter()
    else:
        twins.ours.merge_adapter()
        assert any(not torch.equal(kept[key], value) for key, value in state(twins.ours).items())
        merged = twins.run(twins.ours)
        twins.close(active, merged)
        if any(layer.tied for _, layer in layers(twins.ours)):
            # PEFT changes the tied weight for both modules, ours for the adapted one alone
            with pytest.raises(AssertionError):
                twins.close(twins.run(twins.theirs), merged)
        else:
            twins.close(twins.run(twins.theirs), merged)
            twins.close(*twins.both(state))
        twins.both(lambda model: model.unmerge_adapter())  # PEFT rounds, and divides by l + 1e-8 in IA3
    assert torch.equal(twins.run(twins.ours), active)
    same_tensors(state(twins.ours), kept)
    assert flags(twins.ours) == trained


def same_without(twins: Twins) -> None:
    """After the adapter was deleted, the layers are as empty as PEFT's, and the model computes what it did without."""
    twins.both(lambda model: model.delete_adapter("default"))
    for view in (lambda model: sorted(model.state_dict()), ordered_flags, repr):
        theirs, ours = twins.both(view)
        assert theirs == ours
    # PEFT leaves trained biases in the model, and the rounding errors of unmerging
    assert torch.equal(twins.run(twins.ours), twins.bare)


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_pair(pair: Pair, tmp_path: Path) -> None:
    twins = Twins(pair)
    same_model(twins)
    twins.widen()
    same_numbers(twins)
    same_training(twins)
    same_checkpoint(twins, tmp_path)
    same_switches(twins)
    same_without(twins)


# -- what both refuse -------------------------------------------------------------------------------------

REFUSED: list[tuple[str, str, dict[str, Any]]] = [
    ("embedding", "lora", {"lora_bias": True}),
    ("embedding", "ia3", {"feedforward_modules": ["layer"]}),
    *((kind, "lora", fields) for kind in ("conv1d", "conv2d", "conv3d", "experts") for fields in INITS.values()),
    *((kind, "lora", {"lora_dropout": 0.1}) for kind in PARAMETERS),
    *(("linear", "lora", {"r": r}) for r in (0, -1)),
    ("linear", "lora", {"lora_bias": True, "init_lora_weights": "pissa"}),
    ("linear", "dora", {"lora_bias": True}),
    ("linear", "lora", {"init_lora_weights": "no_such_init"}),
    ("linear", "lora", {"r": 3, "init_lora_weights": "orthogonal"}),
    ("linear", "lora", {"target_modules": ["no_such_layer"]}),
    ("linear", "lora", {"target_modules": r"no\.such.*"}),
    ("linear", "lora", {"exclude_modules": ["layer"]}),
    ("linear", "lora", {"target_modules": None}),
    ("linear", "lora", {"target_modules": "layer", "layers_to_transform": [0]}),
    ("linear", "lora", {"layers_pattern": "layers"}),
    ("linear", "lora", {"target_modules": ["inner"]}),
    ("linear", "lora", {"trainable_token_indices": {"no_such": [1]}}),
    ("linear", "ia3", {"feedforward_modules": ["no_such"]}),
    ("llama", "lora", {"target_modules": ["norm"]}),
    ("llama", "lora", {"modules_to_save": ["embed_tokens"], "trainable_token_indices": {"embed_tokens": [1]}}),
    ("llama", "ia3", {"target_modules": ["q_proj"], "feedforward_modules": ["k_proj"]}),
]


@pytest.mark.parametrize(("model", "method", "fields"), REFUSED)
def test_refused(model: str, method: str, fields: dict[str, Any]) -> None:
    """With PEFT's type of exception, and without a trace in the model."""
    target = original(model)[2]
    errors: list[Any] = []
    for library in LIBRARIES:
        copied = fresh(model)
        before = (state(copied), flags(copied), [*copied.modules()], copied.__dict__.keys() - {"peft_config"})
        with pytest.raises((ValueError, AttributeError)) as error:
            library.get_peft_model(copied, config_of(library, method, {**target, **fields}))
        errors.append(error.value)
    same_tensors(state(copied), before[0])
    assert (flags(copied), [*copied.modules()]) == before[1:3]
    assert copied.__dict__.keys() == before[3]
    kind = type(errors[0])
    if kind is AttributeError:  # PEFT looks for a weight that is not there
        kind = ValueError
    assert isinstance(errors[1], getattr(shim.utils, kind.__name__) if kind.__module__.startswith("peft.") else kind)


# -- several adapters -------------------------------------------------------------------------------------

SEVERAL: list[tuple[str, tuple[str, dict[str, Any]], tuple[str, dict[str, Any]]]] = [
    *((kind, ("lora", LORA["plain"]), ("lora", LORA["rslora"])) for kind in (*LAYERS, *PARAMETERS)),
    ("linear", ("lora", LORA["dropout"]), ("lora", WITH_BIAS["b"])),
    ("linear", ("lora", LORA["bias_all"]), ("lora", LORA["alpha"])),
    ("linear", ("lora", LORA["plain"]), ("dora", DORA["plain"])),
    ("conv2d", ("dora", DORA["plain"]), ("lora", LORA["alpha"])),
    ("linear", ("dora", DORA["plain"]), ("dora", DORA["dropout"])),
    *((kind, ("ia3", IA3[name]), ("ia3", IA3[name])) for kind in ("linear", "conv2d") for name in ("output", "input")),
    ("llama", ("lora", {"r": 2, "target_modules": QV}), ("lora", {"r": 3, "target_modules": ["k_proj", "q_proj"]})),
    ("llama", ("lora", {"r": 2, "target_modules": ["q_proj"]}), ("lora", {"r": 2, "target_modules": ["down_proj"]})),
    ("llama", ("lora", WHOLE["llama"]["saved_head"]), ("lora", {"r": 2, "target_modules": QV})),
    ("llama", ("lora", {"r": 2, "target_modules": QV}), ("lora", WHOLE["llama"]["saved_head"])),
    ("llama", ("lora", WHOLE["llama"]["saved_head"]), ("lora", WHOLE["llama"]["saved_two"])),
    ("llama", ("lora", WHOLE["llama"]["tokens"]), ("lora", {"r": 2, "trainable_token_indices": [5, 7]})),
    ("llama_tied", ("lora", WHOLE["llama_tied"]["tokens"]), ("lora", {"r": 2, "trainable_token_indices": [5]})),
    ("llama", ("ia3", {}), ("ia3", WHOLE_IA3["llama"]["named"])),
    ("gpt2", ("lora", WHOLE["gpt2"]["all_linear"]), ("lora", WHOLE["gpt2"]["fan"])),
    ("mixtral", ("lora", WHOLE["mixtral"]["parameters"]), ("lora", {**WHOLE["mixtral"]["parameters"], "r": 3})),
]


@pytest.mark.parametrize(("model", "first", "second"), SEVERAL)
def test_two_adapters(model: str, first: tuple[str, Any], second: tuple[str, Any]) -> None:
    twins = Twins(Pair(model, "first", *first))
    nests = second[0] == "dora"  # in ours, around the first, so that the forward equals the merged layer

    def add(which: int) -> None:
        seed(4)
        config = config_of(LIBRARIES[which], second[0], {**twins.target, **second[1]})
        (twins.theirs, twins.ours)[which].add_adapter("other", config)

    add(0), add(1)
    twins.pair = dataclasses.replace(twins.pair, method="dora" if "dora" in (first[0], second[0]) else first[0])
    same_model(twins)
    twins.widen()
    twins.randomise()
    twins.both(lambda m: m.eval())
    outputs: dict[str, Tensor] = {}
    for name, active in (("default", "default"), ("other", "other"), ("both", ["default", "other"])):
        if name == "both" and _exclude_each_other(first[1], second[1]):
            for m in (twins.theirs, twins.ours):
                with pytest.raises(ValueError, match="Only one adapter can be set at a time"):
                    m.base_model.set_adapter(active)
            return
        twins.both(lambda m, active=active: m.base_model.set_adapter(active))
        for view in (ordered_flags, surface, lambda m: m.active_adapters):
            theirs, ours = twins.both(view)
            assert theirs == ours
        theirs, outputs[name] = twins.both()
        if name != "both" or not nests:
            twins.close(theirs, outputs[name])
    kept = state(twins.ours)
    for names, truth in ((None, "both"), (["other"], "other"), (["default"], "default")):
        try:
            twins.theirs.merge_adapter(adapter_names=names)
        except NotImplementedError:  # grouped
            with pytest.raises(fa.SiteError):
                twins.ours.merge_adapter(adapter_names=names)
            break
        twins.ours.merge_adapter(adapter_names=names)
        if names is None or model in LAYERS:  # elsewhere one that is not merged goes on acting where the other is not
            twins.close(outputs[truth], twins.run(twins.ours))
        if not nests:
            twins.close(*twins.both())
        assert twins.both(surface)[0] == twins.both(surface)[1]
        twins.both(lambda m: m.unmerge_adapter())
        same_tensors(state(twins.ours), kept)
        twins.theirs.load_state_dict(kept)
    for name in ("default", "other"):
        same_tensors(*twins.saved(adapter_name=name))
    twins.both(lambda m: m.delete_adapter("default"))
    for view in (ordered_flags, repr, surface, lambda m: m.active_adapters):
        theirs, ours = twins.both(view)
        assert theirs == ours
    if "bias" not in first[1]:  # PEFT leaves trained biases behind
        same_tensors(*twins.both(state))
        twins.close(*twins.both())
        assert torch.equal(twins.run(twins.ours), outputs["other"])


def _exclude_each_other(*fields: dict[str, Any]) -> bool:
    return all(f.get("trainable_token_indices") for f in fields) or all(
        "lm_head" in f.get("modules_to_save", ()) for f in fields
    )


@pytest.mark.parametrize("kind", ["linear", "hf_conv1d", "llama"])
def test_one_kind_of_adapter_over_another(kind: str) -> None:
    """(IA)^3 over LoRA: both act. PEFT's merged weight is l W + B A, as it merges the outer layer first."""
    _, inputs, target = original(kind)
    fields = target or {"target_modules": QV}
    models: list[Any] = []
    for library in LIBRARIES:
        model = fresh(kind, torch.float64)
        seed(3)
        library.inject_adapter_in_model(config_of(library, "lora", {"r": 2, **fields}), model, "low")
        library.inject_adapter_in_model(
            config_of(library, "ia3", {"feedforward_modules": [], **fields}), model, "scale"
        )
        models.append(model)
    theirs, ours = models
    same_tensors(state(theirs), state(ours))
    assert flags(theirs) == flags(ours)
    assert repr(theirs) == repr(ours)
    assert surface(theirs) == surface(ours)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator))
    theirs.load_state_dict(ours.state_dict())
    twice = {key: x.double() if x.is_floating_point() else x for key, x in inputs.items()}
    outputs = [logits(model(**twice)) for model in models]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-10 * outputs[0].abs().max().item())
    for model, out in zip(models, outputs, strict=True):
        out.sum().backward()
    for one, other in zip(theirs.parameters(), ours.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None:
            torch.testing.assert_close(other.grad, one.grad, rtol=1e-9, atol=1e-9)
    active = logits(ours(**twice)).detach()
    merging.merge(ours)
    torch.testing.assert_close(logits(ours(**twice)), active)
    merging.unmerge(ours)
    assert torch.equal(logits(ours(**twice)), active)
    for name in ("low", "scale"):
        saved = [lib.get_peft_model_state_dict(m, adapter_name=name) for lib, m in zip(LIBRARIES, models, strict=True)]
        same_tensors(*saved)


@pytest.mark.parametrize("alpha", [-1, 3])
def test_adalora_keeps_its_scaling_when_ranks_are_cut(alpha: float) -> None:
    """With `lora_alpha <= 0` the scaling is the initial rank. PEFT's becomes the rank that is left."""
    twins = Twins(Pair("linear", "cut", "adalora", {"init_r": 4, "target_r": 1, "total_step": 9, "lora_alpha": alpha}))
    twins.widen()
    twins.randomise()
    for model in (twins.theirs, twins.ours):
        next(p for name, p in model.named_parameters() if "lora_E" in name).data[1::2] = 0
    before = twins.both()
    twins.close(*before)
    for library, model in zip(LIBRARIES, (twins.theirs, twins.ours), strict=True):
        model.peft_config["default"].rank_pattern = {"inner.layer.lora_E": [True, False, True, False]}
        library.set_peft_model_state_dict(model, library.get_peft_model_state_dict(model))
    theirs, ours = twins.both()
    twins.close(before[1], ours)
    assert torch.allclose(theirs, before[0]) == (alpha > 0)


@pytest.mark.parametrize("kind", ["linear", "linear_no_bias", "hf_conv1d"])
def test_mixed_model(kind: str) -> None:
    """LoRA and AdaLoRA, both active."""
    _, inputs, target = original(kind)
    models: list[Any] = []
    for library in LIBRARIES:
        seed(3)
        config = config_of(library, "lora", {**LORA["plain"], **target})
        model = library.get_peft_model(fresh(kind), config, mixed=True)
        model.add_adapter("other", config_of(library, "adalora", {**ADALORA["random"], **target}))
        model.set_adapter(["default", "other"])
        models.append(model.double().eval())
    theirs, ours = models
    same_tensors(state(theirs), state(ours))
    for view in (flags, repr, surface):
        assert view(theirs) == view(ours)
    for model in models:
        generator = torch.Generator().manual_seed(5)
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    x = inputs["x"].double()
    active = ours(x)
    torch.testing.assert_close(theirs(x), active)
    for model in models:
        model.set_adapter("other")
    torch.testing.assert_close(theirs(x), ours(x))
    for model in models:
        model.set_adapter(["default", "other"])
    assert flags(theirs) == flags(ours)
    torch.testing.assert_close(ours.merge_and_unload()(x), active)
    torch.testing.assert_close(theirs.merge_and_unload()(x), active)


# -- files ------------------------------------------------------------------------------------------------

FILES = (
    *("linear-lora-b", "conv2d-dora-plain", "linear-ia3-input", "linear-adalora-plain", "experts-lora-rslora"),
    *("llama-lora-saved_two", "llama-lora-tokens", "llama-lora-patterns", "gpt2-lora-bias_all"),
    *("mixtral-lora-parameters", "embedding-lora-bf16"),
)


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if str(pair) in FILES], ids=str)
def test_files(pair: Pair, tmp_path: Path) -> None:
    """A folder that one has written makes the same model in the other."""
    twins = Twins(pair)
    twins.randomise()
    twins.theirs.eval(), twins.ours.eval()
    for writer, model in (("theirs", twins.theirs), ("ours", twins.ours)):
        model.save_pretrained(tmp_path / writer)
        expected = twins.run(model)
        for library in LIBRARIES:
            read = library.PeftModel.from_pretrained(
                fresh(pair.model, pair.dtype), tmp_path / writer, autocast_adapter_dtype=pair.autocast
            )
            torch.testing.assert_close(twins.run(read.eval()), expected)
            same_tensors(state(read), state(model))
    saved = [load_file(tmp_path / writer / "adapter_model.safetensors") for writer in ("theirs", "ours")]
    same_tensors(*saved)
    assert config_file(tmp_path / "theirs") == config_file(tmp_path / "ours")


# -- attention --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "rslora", "random", "gaussian", "bias_all"])
def test_attention(name: str) -> None:
    """The same keys and draws as PEFT, and the numbers that PEFT does not have right (its defect B1)."""
    twins = Twins(Pair("mha", name, "lora", LORA[name]))
    theirs, ours = twins.both(state)
    same_tensors(theirs, ours)
    assert repr(twins.theirs) == repr(twins.ours)
    twins.widen()
    twins.randomise()
    twins.theirs.load_state_dict(twins.ours.state_dict())
    bare = fresh("mha", torch.float64)
    for key, value in state(twins.ours).items():
        if key.endswith("bias"):  # maybe it was trained
            where = key.removeprefix("base_model.model.").replace("base_layer.", "")
            bare.get_parameter(where).data = value
    x = twins.inputs["x"].double()
    truth = attention_truth(bare, adapter_of(twins.ours, "default"), x)
    torch.testing.assert_close(twins.run(twins.ours), truth)
    assert not torch.allclose(twins.run(twins.theirs), truth)
    twins.ours.merge_adapter()
    torch.testing.assert_close(twins.run(twins.ours), truth)
    twins.ours.unmerge_adapter()
    same_tensors(*twins.saved())


def test_there_are_enough() -> None:
    assert len({str(pair) for pair in PAIRS}) == len(PAIRS) >= 300
