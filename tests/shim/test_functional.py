"""The functions over a live model: PEFT's, beside PEFT, and those that PEFT lacks."""

from __future__ import annotations

import copy
import shutil
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from both import Observed, equal, fill, flags, on_both, same, same_error, state
from peft_tools import configs, layer_model, logits, peft_load, raw, same_tensors, tiny, tokens
from safetensors.torch import save_file
from torch import nn

import funcadapt as fa
import funcadapt.peft as shim
from funcadapt.peft import functional

PREFIX = "base_model.model."
QV = {"target_modules": ["q_proj", "v_proj"], "r": 2}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", QV),
    "all linear": ("LoraConfig", {"target_modules": "all-linear", "r": 2}),
    "defaults": ("LoraConfig", {}),
    "dora": ("LoraConfig", {**QV, "use_dora": True}),
    "random": ("LoraConfig", {**QV, "init_lora_weights": False}),
    "saved": ("LoraConfig", {**QV, "modules_to_save": ["lm_head"]}),
    "tokens": ("LoraConfig", {**QV, "trainable_token_indices": [1, 3]}),
    "embedding": ("LoraConfig", {"target_modules": ["embed_tokens"], "r": 2}),
    "inference": ("LoraConfig", {**QV, "inference_mode": True}),
    "pattern": ("LoraConfig", {**QV, "rank_pattern": {"layers.0.*q_proj": 3}, "alpha_pattern": {"v_proj": 5}}),
    "adalora": ("AdaLoraConfig", {"target_modules": ["q_proj", "v_proj"], "init_r": 3, "target_r": 2, "total_step": 9}),
    "ia3": ("IA3Config", {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
}


def config(package: Any, case: str, **more: Any) -> Any:
    name, fields = CASES[case]
    return getattr(package, name)(**{**copy.deepcopy(fields), **more})


def injected(package: Any, case: str = "lora", name: str = "default", **more: Any) -> nn.Module:
    return package.inject_adapter_in_model(config(package, case, **more), tiny("llama"), name)


def output(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return logits(model.eval()(**tokens("llama"))).detach().clone()


def fields(held: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(held).items() if name not in ("runtime_config", "peft_version")}


# -- injection --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_injection(case: str) -> None:
    def scenario(package: Any) -> Any:
        base = tiny("llama")
        model = package.inject_adapter_in_model(config(package, case), base, "default")
        assert model is base
        assert isinstance(model.peft_config["default"], getattr(package, CASES[case][0]))
        held = fields(model.peft_config["default"])
        return repr(model), state(model), flags(model), held, output(fill(model)), type(model).__name__

    same(scenario)


@pytest.mark.parametrize(
    "cases",
    [
        ("lora", "lora"),
        ("lora", "ia3"),
        ("saved", "lora"),
        ("lora", "tokens"),
    ],
)
def test_several_adapters_by_repeated_calls(cases: tuple[str, str]) -> None:
    def scenario(package: Any) -> Any:
        model = injected(package, cases[0], "a")
        package.inject_adapter_in_model(config(package, cases[1]), model, "b")
        seen = [repr(model), sorted(model.state_dict()), flags(model), list(model.peft_config)]
        return [*seen, output(fill(model))]

    same(scenario)


@pytest.mark.parametrize("case", ["saved", "tokens"])
def test_a_second_adapter_that_trains_the_same_module_acts(case: str) -> None:
    """PEFT leaves the module as it was in the base model: it neither acts nor is trained until `set_adapter`."""
    for package in (peft, shim):
        model = injected(package, case, "a")
        with pytest.warns(UserWarning, match="Already found"):
            package.inject_adapter_in_model(config(package, case), model, "b")
        wrapper = model.lm_head if case == "saved" else model.model.embed_tokens
        assert wrapper.active_adapters == (["b"] if package is shim else [])
        assert any(p.requires_grad and ".b" in n for n, p in wrapper.named_parameters()) is (package is shim)


@pytest.mark.parametrize("low", [False, True])
def test_injection_from_the_keys_of_a_checkpoint(low: bool) -> None:
    def scenario(package: Any) -> Any:
        saved = package.get_peft_model_state_dict(injected(package, target_modules=["q_proj", "layers.1.mlp.up_proj"]))
        given = package.LoraConfig(r=2)
        model = package.inject_adapter_in_model(given, tiny("llama"), state_dict=saved, low_cpu_mem_usage=low)
        kinds = {name: (p.shape, p.is_meta, p.requires_grad) for name, p in model.named_parameters()}
        result = package.set_peft_model_state_dict(
            model, {k: torch.full_like(v, 0.1) for k, v in saved.items()}, low_cpu_mem_usage=low
        )
        return kinds, sorted(result.missing_keys), result.unexpected_keys, output(model)

    same(scenario, warn=False)


def test_config_and_keys_that_disagree() -> None:
    def scenario(package: Any) -> Any:
        saved = package.get_peft_model_state_dict(injected(package))
        saved = {key: value for key, value in saved.items() if "layers.1" not in key}
        model = package.inject_adapter_in_model(config(package, "lora"), tiny("llama"), state_dict=saved)
        return sorted(model.state_dict())

    same(scenario)
    theirs, ours = on_both(scenario)
    assert any(kind == "RuntimeWarning" and "inconsistency" in text for kind, text in ours.warnings)
    equal(theirs.warnings, ours.warnings)


BAD: dict[str, Any] = {
    "no match": lambda p: config(p, "lora", target_modules=["nowhere"]),
    "all excluded": lambda p: config(p, "lora", exclude_modules=r".*_proj"),
    "a name with a dot": (lambda p: config(p, "lora"), {"adapter_name": "a.b"}),
    "parameters from keys": (
        lambda p: p.LoraConfig(target_parameters=["q_proj.weight"], target_modules=[]),
        {"state_dict": {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 16)}},
    ),
    "unsupported layer": lambda p: config(p, "lora", target_modules=["norm"]),
    "saved and rows": lambda p: config(
        p, "tokens", modules_to_save=["embed_tokens"], trainable_token_indices={"embed_tokens": [1]}
    ),
    "rows of nothing": lambda p: config(p, "tokens", trainable_token_indices={"nowhere": [1]}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_injections_leave_no_trace(case: str) -> None:
    make, arguments = BAD[case] if isinstance(BAD[case], tuple) else (BAD[case], {})
    same_error(lambda package: package.inject_adapter_in_model(make(package), tiny("llama"), **arguments))
    for second in (False, True):
        model = tiny("llama")
        if second:
            shim.inject_adapter_in_model(config(shim, "saved"), model, "first")
        before = repr(model), state(model), flags(model), sorted(vars(model)), list(getattr(model, "peft_config", {}))
        assert isinstance(
            Observed(lambda m=model: shim.inject_adapter_in_model(make(shim), m, **arguments)).error,
            ValueError | KeyError,
        )
        after = repr(model), state(model), flags(model), sorted(vars(model)), list(getattr(model, "peft_config", {}))
        equal(before, after)


def test_configs_that_are_refused() -> None:
    model = tiny("llama")
    with pytest.raises(TypeError, match="Expected a PeftConfig such as LoraConfig"):
        shim.inject_adapter_in_model(fa.LoraConfig(), model)
    for cls in (peft.PromptTuningConfig, shim.PromptLearningConfig):
        package = peft if cls is peft.PromptTuningConfig else shim
        with pytest.raises(ValueError, match="`create_and_replace` does not support prompt learning"):
            package.inject_adapter_in_model(cls(), model)
    for package in (peft, shim):
        with pytest.raises(ValueError, match="`inject_adapter_in_model` does not support"):
            package.inject_adapter_in_model(
                package.PeftConfig(peft_type="PROMPT_TUNING" if package is shim else "NONE"), model
            )
    assert not hasattr(model, "peft_config")


def test_a_name_that_is_taken() -> None:
    """PEFT draws the adapter's weights anew, and its training is lost without a word but for the usual warning."""
    for package in (peft, shim):
        model = fill(injected(package))
        before = state(model)
        if package is peft:
            with pytest.warns(UserWarning, match="Already found a `peft_config`"):
                package.inject_adapter_in_model(config(package, "lora"), model)
            assert not torch.equal(state(model)["model.layers.0.self_attn.q_proj.lora_B.default.weight"],
                                   before["model.layers.0.self_attn.q_proj.lora_B.default.weight"])  # fmt: skip
            continue
        seen = Observed(lambda m=model: shim.inject_adapter_in_model(config(shim, "lora"), m))
        assert isinstance(seen.error, ValueError)
        assert "has an adapter 'default' already" in str(seen.error)
        same_tensors(state(model), before)


# -- state dicts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_state_dicts(case: str, wrapped: bool) -> None:
    def scenario(package: Any) -> Any:
        make = package.get_peft_model if wrapped else lambda m, c: package.inject_adapter_in_model(c, m)
        model = fill(make(tiny("llama"), config(package, case)))
        saved = package.get_peft_model_state_dict(model)
        twin = make(tiny("llama"), config(package, case))
        result = package.set_peft_model_state_dict(twin, {**saved, "zz": torch.ones(1)})
        return saved, sorted(result.missing_keys), result.unexpected_keys, output(twin)

    same(scenario)


def test_a_peft_model_takes_no_keys_without_prefix() -> None:
    def scenario(package: Any) -> Any:
        model = package.get_peft_model(tiny("llama"), config(package, "lora"))
        saved = package.get_peft_model_state_dict(model)
        short = {key.removeprefix(PREFIX): value + 1 for key, value in saved.items()}
        result = package.set_peft_model_state_dict(model, short)
        return result.unexpected_keys, sorted(result.missing_keys), state(model)

    same(scenario)


@pytest.mark.parametrize("call", ["get", "set"])
def test_unknown_adapters_and_types(call: str) -> None:
    def scenario(package: Any, change: Any = None, name: str = "default") -> Any:
        model = injected(package)
        if change is not None:
            model.peft_config["default"].peft_type = change
        if call == "get":
            return package.get_peft_model_state_dict(model, adapter_name=name)
        return package.set_peft_model_state_dict(model, {}, adapter_name=name)

    same_error(lambda package: scenario(package, name="zz"), "zz")
    same_error(lambda package: scenario(package, change="zz"), "Unknown PEFT type passed: zz")


def test_unsharded_tensors_are_warned_of() -> None:
    def scenario(package: Any) -> Any:
        model = injected(package)
        model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.data = torch.empty(0)
        return sorted(package.get_peft_model_state_dict(model))

    same(scenario)
    _, ours = on_both(scenario)
    assert [kind for kind, _ in ours.warnings] == ["PeftWarning"]
    assert "1 LoRA tensor(s) have invalid shape: model.layers.0" in ours.warnings[0][1]


def test_mismatched_sizes() -> None:
    def scenario(package: Any) -> Any:
        saved = package.get_peft_model_state_dict(fill(injected(package, r=3)))
        model = injected(package, rank_pattern={"q_proj": 3})
        package.set_peft_model_state_dict(model, saved, ignore_mismatched_sizes=True)
        return state(model)

    same(scenario)
    same_error(
        lambda p: p.set_peft_model_state_dict(injected(p), p.get_peft_model_state_dict(injected(p, r=3))),
        "size mismatch for model.layers.0.self_attn.q_proj.lora_A.default.weight",
    )


# -- the other functions ----------------------------------------------------------------------------------


def functions(package: Any) -> Any:
    return package.functional if package is shim else __import__("peft.functional", fromlist=["x"])


@pytest.mark.parametrize("case", ["lora", "saved", "tokens", "ia3"])
def test_switching_freezing_deleting(case: str) -> None:
    prefix = "ia3_" if case == "ia3" else "lora_"

    def scenario(package: Any) -> Any:
        f, log = functions(package), []
        model = fill(injected(package, case, "a"))
        package.inject_adapter_in_model(config(package, case), model, "b")
        f.set_requires_grad(model, ["a", "b"])
        fill(model, 6)
        f.set_adapter(model, "a")
        f.set_adapter(model, "b")
        log += [flags(model), output(model)]
        f.set_adapter(model, "a")
        log += [flags(model), output(model)]
        f.set_requires_grad(model, "b")
        log.append(flags(model))
        f.set_requires_grad(model, ["a", "b"], requires_grad=False)
        log.append(flags(model))
        f.set_adapter(model, "b", inference_mode=True)
        log += [flags(model), output(model)]
        log.append(f.delete_adapter(model, "b", prefix=prefix))
        log += [flags(model), output(model), list(model.state_dict())]
        log.append(f.delete_adapter(model, "a", prefix=prefix))
        return [*log, output(model)]

    same(scenario, warn=case != "tokens")


def test_several_active_adapters() -> None:
    def scenario(package: Any) -> Any:
        model = injected(package, "lora", "a")
        package.inject_adapter_in_model(config(package, "lora", target_modules=["k_proj", "q_proj"]), model, "b")
        functions(package).set_adapter(fill(model), ["b", "a"])
        return flags(model), output(model)

    same(scenario)
    same_error(lambda p: functions(p).set_adapter(_two_saved(p), ["a", "b"]), "Only one adapter can be set at a time")


def _two_saved(package: Any) -> nn.Module:
    model = injected(package, "saved", "a")
    return package.inject_adapter_in_model(config(package, "saved"), model, "b")


def test_only_layers_of_a_class_are_switched() -> None:
    def scenario(package: Any) -> Any:
        model = injected(package, "lora", "a")
        package.inject_adapter_in_model(config(package, "ia3"), model, "b")
        cls = package.tuners.lora.LoraLayer
        functions(package).set_adapter(fill(model), "a", layer_cls=cls)
        return flags(model), output(model)

    same(scenario)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casting(dtype: torch.dtype) -> None:
    def scenario(package: Any) -> Any:
        model = package.inject_adapter_in_model(config(package, "dora"), tiny("llama").to(dtype), "a")
        package.inject_adapter_in_model(config(package, "lora"), model, "b")
        functions(package).cast_adapter_dtype(model, "a", autocast_adapter_dtype=False)
        before = {n: (p.dtype, p.requires_grad) for n, p in model.named_parameters()}
        functions(package).cast_adapter_dtype(model, "a")
        return before, {n: (p.dtype, p.requires_grad) for n, p in model.named_parameters()}

    same(scenario)


def test_unknown_names_are_errors() -> None:
    """PEFT takes them: the model is the base model then."""
    model = injected(shim)
    before = flags(model), output(model)
    for call in (functional.set_adapter, functional.set_requires_grad, functional.delete_adapter, functional.delete):
        with pytest.raises(ValueError, match=r"Adapter defualt not found\. Did you mean 'default'"):
            call(model, "defualt")
    equal(before, (flags(model), output(model)))


def test_blocks_whose_name_has_the_prefix() -> None:
    """B12: PEFT leaves the adapters of a block called "my_lora_block"."""
    found = {}
    for package in (peft, shim):
        model = nn.ModuleDict({"my_lora_block": nn.Linear(4, 4), "other": nn.Linear(4, 4)})
        package.inject_adapter_in_model(package.LoraConfig(target_modules=list(model), r=2), model, "a")
        functions(package).delete_adapter(model, "a", prefix="lora_")
        found[package] = [key for key in model.state_dict() if ".a." in key]
    assert found[shim] == []
    assert found[peft] == ["my_lora_block.lora_A.a.weight", "my_lora_block.lora_B.a.weight"]


def test_adapters_that_are_called_like_modules() -> None:
    """B11."""
    found = {}
    for package in (peft, shim):
        model = injected(package)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            package.inject_adapter_in_model(config(package, "lora"), model, "q_proj")
        found[package] = package.get_peft_model_state_dict(model)
    assert sum("q_proj" in key for key in found[peft]) == 0
    assert sum("q_proj" in key for key in found[shim]) == 4


def test_ranks_without_a_peft_model(tmp_path: Path) -> None:
    """B22: PEFT looks for methods of its tuner on the model."""
    for package in (peft, shim):
        model = fill(injected(package, "adalora", "x"))
        names = [f"model.layers.{i}.self_attn.{part}.lora_E" for i in range(2) for part in ("q_proj", "v_proj")]
        model.peft_config["x"].rank_pattern = {f"{name}.x": [True, False, True] for name in names}
        if package is peft:
            with pytest.raises(AttributeError, match="resize_state_dict_by_rank_pattern"):
                package.get_peft_model_state_dict(model, adapter_name="x")
            continue
        saved = package.get_peft_model_state_dict(model, adapter_name="x")
        assert {value.shape[0] for key, value in saved.items() if key.endswith("lora_E")} == {2}
        assert list(model.peft_config["x"].rank_pattern) == names
        functional.save_pretrained(model, tmp_path, "x")
    again = functional.from_pretrained(tiny("llama"), tmp_path)
    same_tensors(package.get_peft_model_state_dict(again), saved)
    torch.testing.assert_close(output(again), output(peft_load(tiny("llama"), tmp_path)), rtol=1e-4, atol=1e-4)


# -- reading weights --------------------------------------------------------------------------------------


def write(folder: Path) -> Path:
    folder.mkdir(parents=True)
    save_file({f"{PREFIX}model.lin.lora_A.weight": torch.ones(2, 2), "base_model.x": torch.zeros(1)},
              folder / "adapter_model.safetensors")  # fmt: skip
    return folder


@pytest.mark.parametrize("mapping", [None, {}, {r"^model\.": "", "lin": "zz"}, {"lin": "zz", "model": "yy"}])
def test_weights_from_a_folder(mapping: Any, tmp_path: Path) -> None:
    write(tmp_path / "a" / "b")
    same(lambda p: p.load_peft_weights(str(tmp_path / "a" / "b"), key_mapping=mapping))
    same(lambda p: p.load_peft_weights(str(tmp_path / "a"), device="cpu", subfolder="b", key_mapping=mapping))


def test_keys_that_cannot_be_renamed(tmp_path: Path) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    same_error(lambda p: p.load_peft_weights(str(tmp_path), key_mapping={"x": "y"}))
    save_file({f"{PREFIX}{k}": torch.ones(1) for k in "xy"}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"renames two keys to 'base_model\.model\.z'"):
        shim.load_peft_weights(tmp_path, key_mapping={"[xy]": "z"})  # PEFT drops one of them


def test_pickles_are_not_opened(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return exec, ("raise SystemExit",)

    torch.save({"x": Bomb()}, tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model.bin and no .* That is a pickle"):
        shim.load_peft_weights(tmp_path)


class Hub:
    """huggingface_hub with one repository, which is a folder."""

    def __init__(self, monkeypatch: Any, folder: Path) -> None:
        import huggingface_hub
        import peft.utils.save_and_load as theirs

        self.folder, self.asked = folder, []
        for module in (huggingface_hub, theirs):
            monkeypatch.setattr(module, "hf_hub_download", self.download)
            monkeypatch.setattr(module, "file_exists", self.exists)

    def _path(self, filename: str, subfolder: str | None = None) -> Path:
        return self.folder / (subfolder or "") / filename

    def exists(self, repo_id: str, filename: str, **options: Any) -> bool:
        return self._path(filename).exists()

    def download(self, repo_id: str, filename: str, subfolder: str | None = None, **options: Any) -> str:
        from huggingface_hub.errors import EntryNotFoundError

        self.asked.append((repo_id, filename, subfolder, options.get("revision"), options.get("token")))
        if not self._path(filename, subfolder).exists():
            raise EntryNotFoundError("no such file")
        return str(self._path(filename, subfolder))


def test_weights_from_the_hub(tmp_path: Path, monkeypatch: Any) -> None:
    hub = Hub(monkeypatch, write(tmp_path / "repo" / "sub").parent)

    def scenario(package: Any) -> Any:
        hub.asked.clear()
        found = package.load_peft_weights("some/repo", subfolder="sub", revision="main", token="t", device="cpu")
        return found, list(hub.asked)

    same(scenario)
    same_error(lambda p: p.load_peft_weights("some/repo"), "Can't find weights for some/repo")
    shutil.move(tmp_path / "repo/sub/adapter_model.safetensors", tmp_path / "repo/sub/adapter_model.bin")
    with pytest.raises(ValueError, match=r"some/repo has adapter_model.bin and no"):
        shim.load_peft_weights("some/repo", subfolder="sub", use_auth_token="t")
    assert hub.asked[-1][-1] == "t"


def test_the_size_of_a_vocabulary_from_the_hub(tmp_path: Path, monkeypatch: Any) -> None:
    tiny("llama").save_pretrained(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def scenario(package: Any) -> Any:
        model = injected(package, base_model_name_or_path="some/where")
        return sorted(package.get_peft_model_state_dict(model))

    same(scenario)
    _, ours = on_both(scenario)
    assert ours.warnings[0][1].startswith("Could not find a config file in some/where")

    def resized(package: Any) -> Any:
        model = tiny("llama")
        model.resize_token_embeddings(40)
        given = config(package, "lora", base_model_name_or_path=str(tmp_path))
        return sorted(package.get_peft_model_state_dict(package.inject_adapter_in_model(given, model)))

    assert "lm_head.weight" in same(resized)


# -- the base model ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["lora", "saved", "tokens", "embedding", "dora", "ia3"])
def test_state_dicts_of_the_base(case: str) -> None:
    def scenario(package: Any) -> Any:
        model = fill(package.get_peft_model(tiny("llama"), config(package, case)))
        found = package.get_base_model_state_dict(model)
        result = package.set_base_model_state_dict(model, {k: v * 0.9 for k, v in found.items()})
        some = dict(list(found.items())[:3])
        partial = package.set_base_model_state_dict(model, {**some, "zz": torch.ones(1)}, strict=False)
        return found, tuple(result), tuple(partial), state(model), result._fields

    found = same(scenario)[0]
    assert list(found) == list(tiny("llama").state_dict())


def test_bad_state_dicts_of_the_base() -> None:
    def call(package: Any, change: Any) -> Any:
        model = package.get_peft_model(tiny("llama"), config(package, "lora"))
        return package.set_base_model_state_dict(model, change(package.get_base_model_state_dict(model)))

    same_error(lambda p: call(p, lambda s: {**s, "zz": torch.ones(1)}), "Unexpected key(s) in state_dict: ['zz']")
    same_error(lambda p: call(p, lambda s: {}), "Missing key(s) in state_dict: ['model.embed_tokens.weight'")
    same_error(lambda p: call(p, lambda s: {k: v[:1] for k, v in s.items()}), "size mismatch")
    model = injected(shim)  # not only for a PeftModel
    assert list(shim.get_base_model_state_dict(model)) == list(tiny("llama").state_dict())


# -- what PEFT lacks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_saving_and_reading_without_a_peft_model(case: str, tmp_path: Path) -> None:
    model = tiny("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of embeddings
        functional.inject_adapter_in_model(config(shim, case), model, "x")
        fill(model)
        functional.save_pretrained(model, tmp_path / "ours", "x")
        truth = output(model)
        twin = functional.from_pretrained(tiny("llama"), tmp_path / "ours", low_cpu_mem_usage=case == "lora")
        wrapped = shim.PeftModel.from_pretrained(tiny("llama"), tmp_path / "ours")
        wrapped.save_pretrained(tmp_path / "theirs")
    torch.testing.assert_close(output(twin), truth)
    torch.testing.assert_close(output(peft_load(tiny("llama"), tmp_path / "ours")), truth, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output(wrapped), truth)
    same_tensors(raw(tmp_path / "theirs"), raw(tmp_path / "ours"))
    assert not any(p.requires_grad for n, p in twin.named_parameters() if "lora_" in n or "ia3_" in n)
    value = fa.load(tmp_path / "ours", model=None if case == "embedding" else tiny("llama"))
    with torch.no_grad():
        y = logits(fa.functional_call(tiny("llama"), value, (), tokens("llama")))
    torch.testing.assert_close(y, truth)


@pytest.mark.parametrize("kind", ["linear", "conv2d", "mha", "experts", "embedding"])
def test_any_module(kind: str, tmp_path: Path) -> None:
    model, x, target = layer_model(kind)
    _, given = configs("lora", **target, r=2, init_lora_weights=False)
    fa.materialize(model, fa.init(model, given))  # no PEFT config was ever there
    functional.save_pretrained(model, tmp_path)
    again = functional.from_pretrained(layer_model(kind)[0], tmp_path, is_trainable=True)
    torch.testing.assert_close(again(x), model(x))
    bare = layer_model(kind)[0]
    with functional.disable_adapters(again):
        torch.testing.assert_close(again(x), bare(x))
    y = again(x)
    functional.merge_adapters(again, safe_merge=True)
    torch.testing.assert_close(again(x), y, rtol=1e-4, atol=1e-5)
    functional.unmerge_adapters(again)
    same_tensors(shim.get_base_model_state_dict(again), dict(bare.state_dict()))
    merged = functional.merge_and_unload(again)
    assert merged is again
    assert repr(merged) == repr(bare)
    torch.testing.assert_close(merged(x), y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_and_saved_modules(bias: str, tmp_path: Path) -> None:
    model = tiny("bert_cls")
    given = shim.LoraConfig(target_modules=["query"], r=2, bias=bias, modules_to_save=["classifier"])
    fill(functional.inject_adapter_in_model(given, model))
    functional.save_pretrained(model, tmp_path)
    x = tokens("bert")
    again = functional.from_pretrained(tiny("bert_cls"), tmp_path)
    torch.testing.assert_close(logits(again(**x)), logits(model(**x)))
    tensors = raw(tmp_path)
    del tensors[f"{PREFIX}bert.encoder.layer.0.attention.self.query.base_layer.bias"]
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"lacks 'bert.encoder.layer.0.attention.self.query.base_layer.bias'"):
        functional.from_pretrained(tiny("bert_cls"), tmp_path)


def broken(folder: Path, how: str) -> None:
    tensors = raw(folder)
    first = sorted(tensors)[0]
    if how == "missing":
        del tensors[first]
    elif how == "unknown":
        tensors[f"{PREFIX}zz.lora_A.weight"] = torch.ones(1)
    elif how == "shape":
        tensors[first] = tensors[first][:, :3].contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    if how == "no weights":
        (folder / "adapter_model.safetensors").unlink()
    if how == "no config":
        (folder / "adapter_config.json").unlink()
    if how == "truncated":
        (folder / "adapter_model.safetensors").write_bytes(b"\x10" * 20)


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("how", ["missing", "unknown", "shape", "no weights", "no config", "truncated"])
def test_reading_fails_without_a_trace(how: str, second: bool, tmp_path: Path, monkeypatch: Any) -> None:
    Hub(monkeypatch, tmp_path / "nowhere")
    functional.save_pretrained(fill(injected(shim)), tmp_path)
    broken(tmp_path, how)
    model = injected(shim, "saved", "first") if second else tiny("llama").requires_grad_(True)
    before = repr(model), state(model), flags(model), sorted(vars(model)), output(model)
    error = Observed(lambda: functional.from_pretrained(model, tmp_path)).error
    assert isinstance(error, ValueError | RuntimeError) or type(error).__name__ == "SafetensorError"
    after = repr(model), state(model), flags(model), sorted(vars(model)), output(model)
    if second:  # layers stay where the second adapter was, as after any deletion in PEFT
        assert list(model.peft_config) == ["first"]
        equal(before[4], after[4])
        equal({k: v for k, v in flags(model).items() if k in before[2]}, before[2])
        assert {key for key in after[1] if "default" in key} == set()
    else:
        equal(before, after)


def test_files_are_written_whole(tmp_path: Path, monkeypatch: Any) -> None:
    model = fill(injected(shim))
    functional.save_pretrained(model, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert sorted(before) == ["adapter_config.json", "adapter_model.safetensors"]
    fill(model, 7)

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        functional.save_pretrained(model, tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    with pytest.raises(ValueError, match="should be a directory, not a file"):
        functional.save_pretrained(model, tmp_path / "adapter_config.json")


@pytest.mark.parametrize("how", ["linear", "cat", "svd", "ties"])
def test_weighted_adapters(how: str) -> None:
    options = {"density": 0.5} if how == "ties" else {}

    def scenario(package: Any) -> Any:
        if package is peft:
            model = package.get_peft_model(tiny("llama"), config(package, "lora"), adapter_name="a")
            model.add_adapter("b", config(package, "lora"))
            fill(model).add_weighted_adapter(["a", "b"], [0.7, 0.4], "sum", combination_type=how, **options)
            active = model.active_adapters
            model.base_model.set_adapter("sum")
            return active, output(model)
        model = injected(package, "lora", "a")
        package.inject_adapter_in_model(config(package, "lora"), model, "b")
        functional.set_adapter(model, "a")
        by_name = {f"{PREFIX}{n}": p for n, p in model.named_parameters()}
        fill(Renamed(by_name))
        functional.add_weighted_adapter(model, ["a", "b"], [0.7, 0.4], "sum", how, **options)
        active = model.model.layers[0].self_attn.q_proj.active_adapters
        assert not any(p.requires_grad for n, p in model.named_parameters() if ".sum." in n)
        functional.set_adapter(model, "sum")
        assert model.peft_config["sum"].r == model.model.layers[0].self_attn.q_proj.r["sum"]
        return active, output(model)

    same(scenario, tolerance=1e-3, warn=False)


class Renamed(nn.Module):
    """Parameters under the names that they have in a `PeftModel`."""

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self.held = parameters

    def named_parameters(self, *_: Any, **__: Any) -> Any:
        return iter(self.held.items())


def test_weighted_adapters_are_refused() -> None:
    model = injected(shim, "lora", "a")
    with pytest.raises(ValueError, match="Adapter zz not found"):
        functional.add_weighted_adapter(model, ["zz"], [1.0], "new")
    with pytest.raises(ValueError, match="has an adapter 'a' already"):
        functional.add_weighted_adapter(model, ["a"], [1.0], "a")
    functional.merge_adapters(model)
    with pytest.raises(ValueError, match="unmerge_adapters"):
        functional.add_weighted_adapter(model, ["a"], [1.0], "new")
    with pytest.raises(ValueError, match="Adapter zz not found"):
        functional.merge_and_unload(model, ["zz"])
    assert list(model.peft_config) == ["a"]


def test_deleting_to_the_last() -> None:
    model, bare = injected(shim, "saved", "a"), tiny("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shim.inject_adapter_in_model(config(shim, "lora"), model, "b")
        functional.delete(model, "b")
    assert list(model.peft_config) == ["a"]
    functional.delete(model, "a")
    assert repr(model) == repr(bare)
    assert not hasattr(model, "peft_config")
    equal(flags(model), flags(bare))
    same_tensors(state(model), state(bare))


def test_unloading_without_merging() -> None:
    model, bare = fill(injected(shim)), tiny("llama")
    assert repr(functional.unload(model)) == repr(bare)
    torch.testing.assert_close(output(model), output(bare))


def test_names_are_pefts() -> None:
    import peft.functional as theirs

    assert set(theirs.__all__) <= set(functional.__all__)
    assert all(hasattr(functional, name) for name in functional.__all__)
    assert Observed(lambda: functional.nonsense).error is not None
