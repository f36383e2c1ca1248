"""Files beside PEFT's: the same folders, tensors, configs and cards, read by either; inits that changed the base."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from both import equal, files, fill, flags, on_both, same, same_error
from peft_tools import logits, tiny, tokens
from safetensors.torch import save_file
from test_peft_model import CONFIGS, make, wrapped
from torch import nn

import funcadapt.peft as shim


def output(model: nn.Module, name: str = "llama") -> torch.Tensor:
    with torch.no_grad():
        return logits(model.eval()(**tokens(name))).detach()


def quietly(run: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return run()


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
# one adapter with biases is all that PEFT takes
@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ("pissa", "olora", "bias")])
def test_the_same_files(name: str, task: str | None, tmp_path: Path) -> None:
    def scenario(package: Any) -> Any:
        folder = tmp_path / package.__name__
        model = wrapped(package, name, task_type=task)
        model.add_adapter(
            "second", make(package, name, target_modules=["o_proj"], task_type=task, modules_to_save=None)
        )
        fill(model).save_pretrained(folder)
        model.save_pretrained(folder / "part", selected_adapters=["second"])
        assert model.peft_config["default"].inference_mode is False
        return files(folder)

    found = same(scenario)
    assert {"adapter_model.safetensors", "second/adapter_config.json", "README.md"} <= set(found)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ("pissa", "olora")])
def test_either_reads_either(name: str, low: bool, trainable: bool, tmp_path: Path) -> None:
    """Written by one, read by the other: the same outputs, flags and modes."""
    truth: dict[str, torch.Tensor] = {}
    for package in (peft, shim):
        model = fill(quietly(lambda package=package: wrapped(package, name)))
        truth[package.__name__] = output(model)
        quietly(lambda model=model, package=package: model.save_pretrained(tmp_path / package.__name__))

    for written in (peft, shim):

        def scenario(package: Any, written: Any = written) -> Any:
            model = package.PeftModel.from_pretrained(
                tiny("llama"), tmp_path / written.__name__, is_trainable=trainable, low_cpu_mem_usage=low
            )
            return model.training, flags(model), type(model).__name__, output(model)

        found = same(scenario)
        equal(truth[written.__name__], found[-1], 1e-4)


def test_task_decides_the_class(tmp_path: Path) -> None:
    wrapped(shim, task_type="CAUSAL_LM").save_pretrained(tmp_path)
    assert type(shim.PeftModel.from_pretrained(tiny("llama"), tmp_path)) is shim.PeftModelForCausalLM


def test_several_adapters_from_folders(tmp_path: Path) -> None:
    model = quietly(lambda: wrapped(peft))
    quietly(lambda: model.add_adapter("second", make(peft, "rslora", target_modules=["up_proj"])))
    quietly(lambda: fill(model).save_pretrained(tmp_path))

    def scenario(package: Any) -> Any:
        model = package.PeftModel.from_pretrained(tiny("llama"), tmp_path, adapter_name="one")
        result = model.load_adapter(tmp_path / "second", adapter_name="two", is_trainable=True)
        seen: list[Any] = [list(result.missing_keys), list(result.unexpected_keys), flags(model), model.active_adapters]
        again = model.load_adapter(tmp_path, "three", subfolder="second")
        for name in ("one", "two", "three"):
            model.set_adapter(name)
            seen.append(output(model))
        return seen, list(again.missing_keys), flags(model), list(model.peft_config)

    same(scenario)


def test_loading_over_an_adapter_replaces_its_values(tmp_path: Path) -> None:
    quietly(lambda: fill(wrapped(peft), seed=9).save_pretrained(tmp_path))

    def scenario(package: Any) -> Any:
        model = fill(wrapped(package))
        model.load_adapter(tmp_path, "default", is_trainable=True)
        return output(model), flags(model)

    same(scenario)


def test_missing_and_unexpected_keys(tmp_path: Path) -> None:
    quietly(lambda: fill(wrapped(peft)).save_pretrained(tmp_path))
    tensors = files(tmp_path)["adapter_model.safetensors"]
    first = sorted(tensors)[0]
    changed = {key: value for key, value in tensors.items() if key != first}
    changed["base_model.model.typo.lora_A.weight"] = torch.zeros(4, 2)
    save_file(changed, tmp_path / "adapter_model.safetensors")

    def scenario(package: Any) -> Any:
        model = package.PeftModel.from_pretrained(tiny("llama"), tmp_path)
        result = model.load_adapter(tmp_path, "second")
        return list(result.missing_keys), list(result.unexpected_keys)

    missing, unexpected = same(scenario)
    assert len(missing) == 1
    assert unexpected == ["base_model.model.typo.lora_A.weight"]


def test_a_failed_load_leaves_no_trace(tmp_path: Path) -> None:
    """PEFT keeps the adapter, with random weights."""
    quietly(lambda: fill(wrapped(peft)).save_pretrained(tmp_path))
    tensors = files(tmp_path)["adapter_model.safetensors"]
    save_file({key: torch.zeros(3, 3) for key in tensors}, tmp_path / "adapter_model.safetensors")

    def scenario(package: Any) -> Any:
        model = fill(wrapped(package))
        before = output(model)
        with pytest.raises(RuntimeError):
            model.load_adapter(tmp_path, "second")
        equal(before, output(model))
        return list(model.peft_config)

    theirs, ours = on_both(scenario)
    assert theirs.value == ["default", "second"]
    assert ours.error is None, ours.error
    assert ours.value == ["default"]


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("should be a directory", lambda p, m, t: (t.joinpath("file").write_text("x"), m.save_pretrained(t / "file"))),
        ("selected_adapters", lambda p, m, t: m.save_pretrained(t, selected_adapters=["typo"])),
        ("Can't find", lambda p, m, t: m.load_adapter(t / "none", "x")),
        ("Can't find", lambda p, m, t: p.PeftModel.from_pretrained(tiny("llama"), t / "none")),
        ("must be a PeftConfig", lambda p, m, t: p.PeftModel.from_pretrained(tiny("llama"), t, config={"r": 1})),
    ],
)
def test_errors(text: str, action: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def scenario(package: Any) -> Any:
        folder = tmp_path / package.__name__
        folder.mkdir()
        return action(package, wrapped(package), folder)

    same_error(scenario, text)


def test_pickles_are_refused(tmp_path: Path) -> None:
    model = wrapped(shim)
    with pytest.raises(ValueError, match="pickle"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    assert not list(tmp_path.iterdir())
    quietly(lambda: wrapped(peft).save_pretrained(tmp_path, safe_serialization=False))
    with pytest.raises(ValueError, match="pickle"):
        shim.PeftModel.from_pretrained(tiny("llama"), tmp_path)


def test_not_on_the_main_process_nothing_is_written(tmp_path: Path) -> None:
    wrapped(shim).save_pretrained(tmp_path, is_main_process=False)
    assert not list(tmp_path.rglob("adapter*"))


def test_key_mapping(tmp_path: Path) -> None:
    quietly(lambda: fill(wrapped(peft)).save_pretrained(tmp_path))
    tensors = files(tmp_path)["adapter_model.safetensors"]
    renamed = {key.replace("self_attn", "attention"): value for key, value in tensors.items()}
    save_file(renamed, tmp_path / "adapter_model.safetensors")

    def scenario(package: Any) -> Any:
        return output(
            package.PeftModel.from_pretrained(tiny("llama"), tmp_path, key_mapping={"attention": "self_attn"})
        )

    same(scenario)

    def by_model(package: Any) -> Any:
        base = tiny("llama")
        base._checkpoint_conversion_mapping = {"attention": "self_attn"}
        return output(package.PeftModel.from_pretrained(base, tmp_path))

    same(by_model)


def test_a_given_config(tmp_path: Path) -> None:
    quietly(lambda: fill(wrapped(peft)).save_pretrained(tmp_path))

    def scenario(package: Any) -> Any:
        config = package.PeftConfig.from_pretrained(tmp_path)
        config.lora_alpha = 40
        model = package.PeftModel.from_pretrained(tiny("llama"), tmp_path, config=config)
        return output(model), config.inference_mode

    same(scenario)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_mutated_base_as_a_lora(init: str, rslora: bool, tmp_path: Path) -> None:
    """The file for the original base weights: twice the rank, and the outputs of the trained model."""

    def scenario(package: Any) -> Any:
        folder = tmp_path / package.__name__
        model = wrapped(package, init, use_rslora=rslora, lora_alpha=3)
        model.save_pretrained(folder / "init")
        before = output(model)
        fill(model)
        after = output(model)
        model.save_pretrained(folder / "lora", path_initial_model_for_weight_conversion=str(folder / "init"))
        loaded = package.PeftModel.from_pretrained(tiny("llama"), folder / "lora")
        equal(after, output(loaded), 2e-3)
        found = files(folder / "lora")
        assert not torch.allclose(before, after, atol=1e-2)
        return found, list(model.peft_config), model.peft_config["default"].r, after

    found, *_ = same(scenario, tolerance=2e-3, warn=False)
    assert found["adapter_config.json"]["r"] == 4


def test_a_mutated_base_keeps_what_else_was_trained(tmp_path: Path) -> None:
    """PEFT drops the factors of embeddings and the modules that were trained in full, without a word."""
    fields = {"target_modules": ["embed_tokens", "q_proj"], "modules_to_save": ["norm"], "init_lora_weights": True}

    def scenario(package: Any) -> Any:
        folder = tmp_path / package.__name__
        model = fill(wrapped(package, "lora", **fields))
        model.save_pretrained(folder / "init", save_embedding_layers=False)
        fill(model, seed=8)
        model.save_pretrained(
            folder / "lora",
            path_initial_model_for_weight_conversion=str(folder / "init"),
            save_embedding_layers=False,
        )
        return sorted(files(folder / "lora")["adapter_model.safetensors"])

    theirs, ours = on_both(scenario)
    lost = set(ours.value) - set(theirs.value)
    assert {key.split(".")[-1] for key in lost} >= {"lora_embedding_A", "lora_embedding_B"}
    assert any("norm" in key for key in lost)


def test_what_cannot_be_converted_says_so(tmp_path: Path) -> None:
    for name in ("ia3", "dora"):
        model = fill(wrapped(shim, name))
        model.save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match="not supported"):
            model.save_pretrained(tmp_path / "x", path_initial_model_for_weight_conversion=tmp_path / name)
    both = {"use_rslora": True, "rank_pattern": {"q_proj": 2}}
    model = fill(wrapped(shim, "lora", **both))
    model.save_pretrained(tmp_path / "rs")
    with pytest.raises(ValueError, match="use_rslora"):
        model.save_pretrained(tmp_path / "x", path_initial_model_for_weight_conversion=tmp_path / "rs")


def test_warning_when_a_mutated_base_gets_another_adapter(tmp_path: Path) -> None:
    quietly(lambda: wrapped(peft).save_pretrained(tmp_path))

    def scenario(package: Any) -> Any:
        model = wrapped(package, "pissa")
        model.load_adapter(tmp_path, "second")
        return list(model.peft_config)

    same(scenario)


def test_model_card() -> None:
    def scenario(package: Any, folder: Path) -> Any:
        model = wrapped(package, task_type="CAUSAL_LM")
        model.model.config._name_or_path = "some/model"
        model.model.model_tags = ["mine"]
        model.create_or_update_model_card(folder)
        (folder / "README.md").write_text((folder / "README.md").read_text() + "\nmy own words")
        model.create_or_update_model_card(folder)
        return (folder / "README.md").read_text()

    import tempfile

    same(lambda package: scenario(package, Path(tempfile.mkdtemp())))


def test_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Down: a repository's files are asked for by name. Up: a folder with both files and the card."""
    import huggingface_hub

    source = tmp_path / "source"
    model = fill(wrapped(shim)).eval()
    model.save_pretrained(source / "deep")
    asked: list[tuple[Any, ...]] = []

    def download(
        repo_id: str,
        filename: str,
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        token: str | None = None,
        user_agent: str | None = None,
    ) -> str:
        asked.append((repo_id, filename, subfolder, revision, token))
        return str(source / (subfolder or "") / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    loaded = shim.PeftModel.from_pretrained(
        tiny("llama"), "someone/adapter", subfolder="deep", revision="v2", token="secret"
    )
    equal(output(model), output(loaded))
    assert {a[1] for a in asked} == {"adapter_config.json", "adapter_model.safetensors"}
    assert {(a[0], *a[2:]) for a in asked} == {("someone/adapter", "deep", "v2", "secret")}

    sent: dict[str, Any] = {}

    class Api:
        def __init__(self, token: Any = None) -> None:
            sent["token"] = token

        def create_repo(self, repo_id: str, **kwargs: Any) -> Any:
            return type("Url", (), {"repo_id": repo_id})()

        def upload_folder(self, *, repo_id: str, folder_path: str, **kwargs: Any) -> str:
            sent.update(kwargs, repo_id=repo_id, files=sorted(p.name for p in Path(folder_path).iterdir()))
            return "url"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert model.push_to_hub("me/adapter", token="mine", commit_message="hello", private=True) == "url"
    assert sent["files"] == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert (sent["repo_id"], sent["token"], sent["commit_message"]) == ("me/adapter", "mine", "hello")


def test_auto_model(tmp_path: Path) -> None:
    base = tiny("llama")
    base.save_pretrained(tmp_path / "base")
    for task, folder in (("CAUSAL_LM", "lm"), (None, "none")):
        config = shim.LoraConfig(r=2, target_modules=["q_proj"], task_type=task, init_lora_weights=False)
        model = shim.get_peft_model(copy.deepcopy(base), config)
        model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
        model.save_pretrained(tmp_path / folder)
        truth = output(model)
        if task is not None:

            def scenario(package: Any) -> Any:
                found = package.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lm")
                return type(found).__name__, output(found)

            equal(truth, same(scenario)[1], 1e-4)
            same_error(lambda p: p.AutoPeftModel.from_pretrained(tmp_path / "lm"), "task type")
            same_error(lambda p: p.AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "lm"), "Expected target")
        else:
            equal(truth, same(lambda p: output(p.AutoPeftModel.from_pretrained(tmp_path / "none"))), 1e-4)
    values = json.loads((tmp_path / "none" / "adapter_config.json").read_text())
    values["auto_mapping"]["parent_library"] = "os"
    shutil.copytree(tmp_path / "none", tmp_path / "bad")
    (tmp_path / "bad" / "adapter_config.json").write_text(json.dumps(values))
    same_error(lambda p: p.AutoPeftModel.from_pretrained(tmp_path / "bad"), "allowlist")
    same_error(lambda p: p.AutoPeftModel(), "designed to be instantiated")
