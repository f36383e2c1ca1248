"""What single methods ask of the shim: leaves that no checkpoint holds, rows, whole modules, defaults and warnings."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from both import Observed, equal, files, fill, flags, on_both, same, same_error
from peft_tools import logits, tiny, tokens
from safetensors.torch import load_file, save_file
from torch import nn

import funcadapt as fa
import funcadapt.peft as shim

QV = ["q_proj", "v_proj"]

# config class, fields: checkpoints lack leaves that follow from the config and the model
RECOMPUTED: dict[str, tuple[str, dict[str, Any]]] = {
    "unilora": ("UniLoraConfig", {"theta_d_length": 32}),
    "tinylora": ("TinyLoraConfig", {"u": 4, "save_projection": False}),
    "frod": ("FrodConfig", {"progressbar": False, "save_projection": False}),
    "supertuning": ("SupertuningConfig", {"sparsity": 0.9, "save_precomputed_indices": False}),
    "vera": ("VeraConfig", {"r": 4, "save_projection": False}),
    "pvera": ("PveraConfig", {"r": 4, "save_projection": False}),
    "randlora": ("RandLoraConfig", {"r": 4, "save_projection": False}),
}


def output(model: nn.Module) -> torch.Tensor:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of the sparse matrices of PEFT's FRoD
        return logits(model.eval()(**tokens("llama"))).detach()


def quietly(run: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return run()


def made(package: Any, name: str, fields: dict[str, Any], base: str = "llama") -> Any:
    torch.manual_seed(3)
    return fill(package.get_peft_model(tiny(base), getattr(package, name)(**fields)))


def saved(package: Any, name: str, fields: dict[str, Any], folder: Path, base: str = "llama") -> torch.Tensor:
    model = quietly(lambda: made(package, name, fields, base))
    quietly(lambda: model.save_pretrained(folder, save_embedding_layers=False))
    return output(model)


# -- leaves that no checkpoint holds ----------------------------------------------------------------------


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("case", RECOMPUTED)
def test_what_is_computed_again_is_not_missing(case: str, low: bool, tmp_path: Path) -> None:
    """The same warnings as PEFT, and none of missing keys; the functions over any module read the file, too."""
    name, fields = RECOMPUTED[case]
    for package in (peft, shim):
        truth = saved(package, name, {**fields, "target_modules": QV}, tmp_path / package.__name__)
        folder = tmp_path / package.__name__

        def scenario(reader: Any, folder: Path = folder) -> Any:
            return output(reader.PeftModel.from_pretrained(tiny("llama"), folder, low_cpu_mem_usage=low))

        # PEFT leaves frozen tensors on the meta device where it reads some of these
        found = same(scenario) if not low else quietly(lambda folder=folder: scenario(shim, folder))
        equal(truth, found, 1e-4)
        plain = quietly(lambda: shim.functional.from_pretrained(tiny("llama"), folder, low_cpu_mem_usage=low))
        equal(truth, output(plain), 1e-4)


@pytest.mark.parametrize("case", ["unilora", "tinylora", "supertuning", "vblora"])
def test_what_a_checkpoint_must_hold_is_missed(case: str, tmp_path: Path) -> None:
    name, fields = {
        **RECOMPUTED,
        "vblora": ("VBLoRAConfig", {"num_vectors": 8, "vector_length": 4, "save_only_topk_weights": True}),
    }[case]
    saved(shim, name, {**fields, "target_modules": QV}, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    lost = next(key for key in tensors if "layers.1" in key or "theta" in key)
    stem = lost.rpartition("_topk")[0] or lost  # two keys are one leaf
    save_file({key: value for key, value in tensors.items() if not key.startswith(stem)}, file)
    model = tiny("llama")
    with pytest.raises(fa.AdapterFileError, match="lacks"):
        quietly(lambda: shim.functional.from_pretrained(model, tmp_path))
    seen = Observed(lambda: shim.PeftModel.from_pretrained(tiny("llama"), tmp_path))
    assert seen.error is None
    assert any(text.startswith("Found missing adapter keys") for _, text in seen.warnings)


# -- rows of embeddings, and modules that are trained whole -----------------------------------------------

OWN: dict[str, tuple[str, dict[str, Any]]] = {
    "tokens": ("TrainableTokensConfig", {"token_indices": [1, 5], "target_modules": ["embed_tokens"]}),
    "any tokens": ("TrainableTokensConfig", {"token_indices": [1, 5]}),
    "tokens by pattern": ("TrainableTokensConfig", {"token_indices": [1, 5], "target_modules": r".*embed_\w+"}),
    "norms": ("LNTuningConfig", {"target_modules": ["input_layernorm"]}),
}


@pytest.mark.parametrize("case", OWN)
def test_nothing_is_said_of_targets_that_are_there(case: str, tmp_path: Path) -> None:
    name, fields = OWN[case]
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        model = shim.get_peft_model(tiny("llama"), getattr(shim, name)(**fields))
        model.add_adapter("two", getattr(shim, name)(**fields))
        fill(model).save_pretrained(tmp_path, save_embedding_layers=False)
        read = shim.PeftModel.from_pretrained(tiny("llama"), tmp_path)
    equal(output(model), output(read))


@pytest.mark.parametrize("case", [case for case in OWN if "tokens" in case])
def test_rows_by_name_and_by_pattern(case: str, tmp_path: Path) -> None:
    """PEFT and the shim read each other's files, which are the same; so does `fa.load`."""
    name, fields = OWN[case]
    written: dict[str, Any] = {}
    for package in (peft, shim):
        folder = tmp_path / package.__name__
        model = quietly(lambda package=package: package.get_peft_model(tiny("llama"), getattr(package, name)(**fields)))
        with torch.no_grad():
            next(p for p in model.parameters() if p.requires_grad).add_(0.5)
        quietly(lambda model=model, folder=folder: model.save_pretrained(folder, save_embedding_layers=False))
        written[package.__name__] = files(folder)
        truth = output(model)
        for reader in (peft, shim):
            equal(truth, output(quietly(lambda reader=reader: reader.PeftModel.from_pretrained(tiny("llama"), folder))))
        base = tiny("llama")
        equal(truth, logits(fa.functional_call(base, fa.load(folder, model=base), (), tokens("llama"))).detach())
    theirs, ours = written.values()
    for found in (theirs, ours):
        found.pop("README.md")
    equal(theirs, ours)


@pytest.mark.parametrize("case", ["tokens", "norms"])
def test_two_of_them_are_switched_on(case: str) -> None:
    """As in PEFT: rows add up, of whole modules only one can be called."""
    name, fields = OWN[case]

    def scenario(package: Any) -> Any:
        model = package.get_peft_model(tiny("llama"), getattr(package, name)(**fields))
        other = {**fields, "token_indices": [2, 3]} if case == "tokens" else fields
        model.add_adapter("two", getattr(package, name)(**other))
        model.base_model.set_adapter(["default", "two"])
        seen = [model.active_adapters, flags(model)]
        return [*seen, output(fill(model))] if case == "tokens" else seen

    quietly(lambda: same(scenario, warn=False))


def test_a_pattern_that_matches_no_embedding() -> None:
    def scenario(package: Any) -> Any:
        config = package.TrainableTokensConfig(token_indices=[1], target_modules="embed_tokens")
        return package.get_peft_model(tiny("llama"), config)

    same_error(scenario)
    hint = r"target_modules names 'embed_tokens', which matches no module\. A string is a.*: \['embed_tokens'\]"
    with pytest.raises(fa.TargetError, match=hint):
        fa.init(tiny("llama"), fa.TrainableTokensConfig(token_indices=[1], target_modules="embed_tokens"))


# -- (IA)^3 on all linear layers --------------------------------------------------------------------------


@pytest.mark.parametrize("written", ["peft", "shim"])
def test_feedforward_layers_among_all_linear_ones(written: str, tmp_path: Path) -> None:
    """PEFT writes a file that it cannot read itself; ours it can."""
    package: Any = {"peft": peft, "shim": shim}[written]
    fields = {"target_modules": "all-linear", "feedforward_modules": ["down_proj"]}
    truth = saved(package, "IA3Config", fields, tmp_path)
    equal(truth, output(shim.PeftModel.from_pretrained(tiny("llama"), tmp_path)))
    base = tiny("llama")
    equal(truth, logits(fa.functional_call(base, fa.load(tmp_path, model=base), (), tokens("llama"))).detach())
    if package is shim:
        equal(truth, output(quietly(lambda: peft.PeftModel.from_pretrained(tiny("llama"), tmp_path))))


def test_feedforward_layers_are_found_as_in_peft() -> None:
    def scenario(package: Any) -> Any:
        fields = {"target_modules": "all-linear", "feedforward_modules": ["down_proj"]}
        model = made(package, "IA3Config", fields)
        return {name: tuple(p.shape) for name, p in model.named_parameters() if "ia3" in name}, output(model)

    same(scenario)


# -- leaves in common -------------------------------------------------------------------------------------


@pytest.mark.parametrize("low", [False, True])
def test_leaves_in_common_must_be_the_same(low: bool, tmp_path: Path) -> None:
    """As in `fa.load`; PEFT takes the last one."""
    saved(shim, "LilyConfig", {"r": 2, "target_modules": QV}, tmp_path)
    shim.PeftModel.from_pretrained(tiny("llama"), tmp_path, low_cpu_mem_usage=low)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if "layers.1" in key and "lily_B" in key)
    save_file({**tensors, key: tensors[key] + 1}, file)
    message = r"'model.layers.1.self_attn.\w+' and 'model.layers.0.self_attn.\w+' have 'lily_B' in common, but not the"
    with pytest.raises(fa.AdapterFileError, match=message):
        fa.load(tmp_path, model=tiny("llama"))
    base = tiny("llama")
    before = {name: value.clone() for name, value in base.state_dict().items()}
    with pytest.raises(fa.AdapterFileError, match=message):
        shim.functional.from_pretrained(base, tmp_path, low_cpu_mem_usage=low)
    equal(before, dict(base.state_dict()))
    with pytest.raises(fa.AdapterFileError, match=message):
        shim.PeftModel.from_pretrained(tiny("llama"), tmp_path, low_cpu_mem_usage=low)


# -- configs ----------------------------------------------------------------------------------------------

CONFIGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "delora": ("DeloraConfig", {"target_modules": QV}, "llama"),
    "delora, another": ("DeloraConfig", {"target_modules": QV, "delora_lambda": 2.5}, "llama"),
    "hira": ("HiraConfig", {"target_modules": ["c_attn"]}, "gpt2"),
    "hira, told": ("HiraConfig", {"target_modules": QV, "fan_in_fan_out": True}, "llama"),
    "supertuning": ("SupertuningConfig", {"target_modules": QV, "sparsity": 0.9, "r": 3}, "llama"),
    "supertuning, alpha": (
        "SupertuningConfig",
        {"target_modules": QV, "sparsity": 0.9, "r": 3, "lora_alpha": 5},
        "llama",
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_the_same_config_files(case: str, tmp_path: Path) -> None:
    name, fields, base = CONFIGS[case]

    def scenario(package: Any) -> Any:
        model = package.get_peft_model(tiny(base), getattr(package, name)(**fields))
        model.save_pretrained(tmp_path / package.__name__)
        return json.loads((tmp_path / package.__name__ / "adapter_config.json").read_text())

    theirs, ours = on_both(scenario)
    assert theirs.error is ours.error is None
    for value in (theirs.value, ours.value):  # PEFT's sets have no order
        value["target_modules"] = sorted(value["target_modules"])
    equal(theirs.value, ours.value)
    assert {k: type(v) for k, v in theirs.value.items()} == {k: type(v) for k, v in ours.value.items()}
    assert sorted({m[:40] for _, m in theirs.warnings}) == sorted({m[:40] for _, m in ours.warnings})
    fa.load(tmp_path / "funcadapt.peft", model=tiny(base))
