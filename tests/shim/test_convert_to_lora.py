"""`convert_to_lora`, `save_as_lora` and `reduce_intruder_dimension` on PEFT and on the shim."""

from __future__ import annotations

import json
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from both import Observed, fill, same_error
from peft_tools import layer_model, peft_load, peft_save, tiny, tokens, wrap
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import funcadapt as fa
import funcadapt.peft as shim
from funcadapt.method import methods

EVERY: list[tuple[str, dict[str, Any]]] = [
    ("C3AConfig", {"block_size": 2}),
    ("DeloraConfig", {"r": 2}),
    ("FourierFTConfig", {"n_frequency": 5, "init_weights": True}),
    ("GraloraConfig", {"r": 4, "gralora_k": 2}),
    ("LoHaConfig", {"r": 2}),
    ("LoKrConfig", {"r": 2}),
    ("LoraConfig", {"r": 3, "lora_alpha": 5}),
    ("LoraConfig", {"r": 3, "use_rslora": True}),
    ("MissConfig", {"r": 2}),
    ("MissConfig", {"r": 2, "init_weights": "bat"}),
    ("MissConfig", {"r": 2, "init_weights": "mini", "mini_r": 2}),
    ("PsoftConfig", {"r": 2}),
    ("RandLoraConfig", {"r": 2}),
    ("TinyLoraConfig", {"r": 2}),
    ("UniLoraConfig", {"r": 2, "theta_d_length": 16}),
    ("VBLoRAConfig", {"r": 2, "num_vectors": 8, "vector_length": 2, "topk": 2}),
    ("VeraConfig", {"r": 2}),
    ("WaveFTConfig", {"n_frequency": 5}),
]
KNOWN = {method.config.__name__ for method in methods()}
TABLE = [(name, fields) for name, fields in EVERY if name in KNOWN]


class Mlp(nn.Module):
    """Two layers of even sizes, as some methods divide them into blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(torch.tanh(self.up(x))))


def mlp() -> Mlp:
    torch.manual_seed(0)
    return Mlp()


def pair(folder: Path, name: str, fields: dict[str, Any], base: Any = mlp, **more: Any) -> tuple[Any, Any]:
    """The same adapter in PEFT and in the shim, through a file."""
    fields = {"target_modules": ["up", "down"], **fields, **more}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = wrap(base(), getattr(peft, name)(**fields))
        peft_save(theirs, folder)
        return theirs, shim.PeftModel.from_pretrained(base(), folder).eval()


def converted(package: Any, model: Any, rank: Any) -> tuple[Any, dict[str, Tensor]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return package.convert_to_lora(model, rank=rank)


def products(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """B A, and everything else as it is."""
    found = {k: v for k, v in tensors.items() if "lora_" not in k}
    for key, a in tensors.items():
        if key.endswith("lora_A.weight"):
            found[key.removesuffix(".lora_A.weight")] = tensors[key.replace("lora_A", "lora_B")] @ a
    return found


def compare(theirs: tuple[Any, dict[str, Tensor]], ours: tuple[Any, dict[str, Tensor]], atol: float = 1e-5) -> None:
    for field in ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "exclude_modules"):
        assert getattr(theirs[0], field) == getattr(ours[0], field), field
    for field in ("layers_pattern", "layers_to_transform", "modules_to_save", "base_model_name_or_path", "bias"):
        assert getattr(theirs[0], field) == getattr(ours[0], field), field
    assert theirs[1].keys() == ours[1].keys()
    assert {k: (v.shape, v.dtype, v.is_contiguous()) for k, v in theirs[1].items()} == {
        k: (v.shape, v.dtype, v.is_contiguous()) for k, v in ours[1].items()
    }
    a, b = products(theirs[1]), products(ours[1])
    for key in a:
        torch.testing.assert_close(b[key], a[key], rtol=1e-4, atol=atol, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("rank", [2, 5, 0.5, 0.9])
@pytest.mark.parametrize(("name", "fields"), TABLE, ids=str)
def test_it_gives_what_peft_gives(tmp_path: Path, name: str, fields: dict[str, Any], rank: int | float) -> None:
    theirs, ours = pair(tmp_path, name, fields)
    assert ours.supports_lora_conversion()
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    compare(converted(peft, theirs, rank), converted(shim, ours, rank))
    assert all(torch.equal(v, before[k]) for k, v in ours.state_dict().items())


def test_nothing_to_convert_has_rank_1_as_in_peft() -> None:
    config = {"r": 2, "target_modules": ["up"]}
    theirs, ours = (p.get_peft_model(mlp(), p.LoraConfig(**config)) for p in (peft, shim))
    compare(converted(peft, theirs, 0.5), converted(shim, ours, 0.5))


def test_transformers_conv1d(tmp_path: Path) -> None:
    def base() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(Conv1D(6, 4), Conv1D(4, 6))

    theirs, ours = pair(tmp_path, "LoraConfig", {"r": 3, "fan_in_fan_out": True, "target_modules": ["0", "1"]}, base)
    a, b = converted(peft, theirs, 2), converted(shim, ours, 2)
    # PEFT writes B^T and A^T of the stored weight: the same product
    compare(a, b)


def test_targets_as_a_regular_expression_and_layers(tmp_path: Path) -> None:
    for i, (fields, rank) in enumerate(
        [
            ({"target_modules": "up|down"}, 2),
            ({"target_modules": "up|down"}, 0.6),
            ({"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}, 2),
        ]
    ):
        base = mlp if i < 2 else lambda: tiny("llama")
        theirs, ours = pair(tmp_path / str(i), "LoraConfig", {"r": 2, **fields}, base)
        compare(converted(peft, theirs, rank), converted(shim, ours, rank))


def test_modules_to_save(tmp_path: Path) -> None:
    theirs, ours = pair(tmp_path, "LoraConfig", {"r": 2}, modules_to_save=["head"])
    compare(converted(peft, theirs, 2), converted(shim, ours, 2))


def test_a_model_that_is_no_peft_model() -> None:
    found = []
    for package in (peft, shim):
        model = package.inject_adapter_in_model(package.LoraConfig(r=2, target_modules=["up", "down"]), mlp())
        found.append(converted(package, fill(model), 2))
    assert found[0][1].keys() == found[1][1].keys() == {f"{n}.lora_{x}.weight" for n in ("up", "down") for x in "AB"}
    for config, tensors in found:
        assert (config.r, config.target_modules) == (2, {"up", "down"})
    for key, value in products(found[0][1]).items():
        torch.testing.assert_close(products(found[1][1])[key], value)
    # ranks that differ: PEFT's config targets nothing then
    config, _ = converted(shim, model, 0.5)
    assert config.target_modules == {"up", "down"}


ERRORS = {
    "rank 0": (lambda p: p.convert_to_lora(lora(p), 0), "Passing a rank of 0 doesn't make sense"),
    "share 0": (lambda p: p.convert_to_lora(lora(p), 0.0), "must be between 0 and 1 but got 0.0"),
    "share 2": (lambda p: p.convert_to_lora(lora(p), 2.0), "must be between 0 and 1 but got 2.0"),
    "too large": (lambda p: p.convert_to_lora(lora(p), 7), "The chosen rank 7 is larger than the weight shape (6)"),
    "no adapter": (lambda p: p.convert_to_lora(mlp(), 2), "Could not detect any layer that supports LoRA conversion"),
    "biases": (lambda p: p.convert_to_lora(lora(p, bias="all"), 2), "The adapter's config sets bias=all"),
    "ia3": (
        lambda p: p.convert_to_lora(
            p.get_peft_model(mlp(), p.IA3Config(target_modules=["up"], feedforward_modules=[])), 2
        ),
        "Some module types on this model do not support LoRA conversion",
    ),
    "adalora": (
        lambda p: p.convert_to_lora(
            p.get_peft_model(mlp(), p.AdaLoraConfig(target_modules=["up"], total_step=10, tinit=1, tfinal=1)), 2
        ),
        "Some module types on this model do not support LoRA conversion",
    ),
    "conv": (
        lambda p: p.convert_to_lora(
            p.get_peft_model(layer_model("conv2d")[0], p.LoraConfig(target_modules=["layer"])), 2
        ),
        "Some module types on this model do not support LoRA conversion",
    ),
    "embedding": (
        lambda p: p.convert_to_lora(
            p.get_peft_model(layer_model("embedding")[0], p.LoraConfig(target_modules=["layer"])), 2
        ),
        "Some module types on this model do not support LoRA conversion",
    ),
}


def lora(package: Any, **fields: Any) -> Any:
    return package.get_peft_model(mlp(), package.LoraConfig(r=2, target_modules=["up", "down"], **fields))


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_peft_s(name: str) -> None:
    same_error(*ERRORS[name])


def test_supports_lora_conversion_is_peft_s() -> None:
    cases: list[tuple[str, str, dict[str, Any]]] = [
        ("LoraConfig", "linear", {}),
        ("LoraConfig", "hf_conv1d", {"fan_in_fan_out": True}),
        ("LoraConfig", "embedding", {}),
        ("LoraConfig", "conv2d", {}),
        ("LoraConfig", "linear", {"use_dora": True}),
        ("IA3Config", "linear", {"feedforward_modules": []}),
        ("AdaLoraConfig", "linear", {"total_step": 10, "tinit": 1, "tfinal": 1}),
    ]
    for name, kind, fields in cases:
        answers = []
        for package in (peft, shim):
            config = getattr(package, name)(target_modules=["layer"], **fields)
            answers.append(package.get_peft_model(layer_model(kind)[0], config, "other").supports_lora_conversion())
        assert answers[0] == answers[1], (name, kind)


def test_warnings_are_peft_s() -> None:
    for rank in (2, 0.5):
        theirs, ours = (Observed(lambda p=p, rank=rank: p.convert_to_lora(lora(p), rank)) for p in (peft, shim))
        assert [w[0] for w in theirs.warnings] == [w[0] for w in ours.warnings] == ["UserWarning"]
        assert theirs.warnings[0][1] == ours.warnings[0][1]


# -- where PEFT is wrong ----------------------------------------------------------------------------------


def check_outputs(model: Any, folder: Path, base: Any = mlp, rank: int = 6) -> None:
    """What is saved does what the adapter did."""
    x = torch.randn(5, 6)
    expected = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shim.save_as_lora(folder, model, rank=rank)
    for package in (peft, shim):
        loaded = package.PeftModel.from_pretrained(base(), folder).eval()
        torch.testing.assert_close(loaded(x), expected, rtol=1e-4, atol=1e-4)
    bare = base().eval()
    adapter = fa.load(folder, model=bare)
    torch.testing.assert_close(fa.functional_call(bare, adapter, (x,)), expected, rtol=1e-4, atol=1e-4)


def test_dora_s_magnitudes_are_converted(tmp_path: Path) -> None:
    check_outputs(fill(lora(shim, use_dora=True)).eval(), tmp_path)


def test_merged_adapters_are_converted(tmp_path: Path) -> None:
    model = fill(lora(shim, use_dora=True)).eval()
    tensors = products(converted(shim, model, 3)[1])
    model.merge_adapter()
    for key, value in products(converted(shim, model, 3)[1]).items():
        torch.testing.assert_close(value, tensors[key], rtol=1e-4, atol=1e-4)


def test_excluded_modules_stay_excluded(tmp_path: Path) -> None:
    config = shim.LoraConfig(r=2, target_modules="all-linear", exclude_modules=["up"])
    check_outputs(fill(shim.get_peft_model(mlp(), config)).eval(), tmp_path, rank=3)


def test_token_rows_and_buffers_are_kept(tmp_path: Path) -> None:
    model = fill(
        shim.get_peft_model(
            tiny("llama"), shim.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 5])
        )
    ).eval()
    expected = model(**tokens("llama")).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shim.save_as_lora(tmp_path, model, rank=2)
    for load in (peft_load, shim.PeftModel.from_pretrained):
        loaded = load(tiny("llama"), tmp_path).eval()
        torch.testing.assert_close(loaded(**tokens("llama")).logits, expected, rtol=1e-4, atol=1e-3)

    def base() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))

    config = shim.LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"])
    model = fill(shim.get_peft_model(base(), config))
    model(torch.randn(9, 6))  # its running mean moves
    check_outputs(model.eval(), tmp_path / "norm", base)


def test_what_has_no_dense_form_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise fa.SiteError("no dense form")

    monkeypatch.setattr("funcadapt.peft.lora_conversion.change_of", fail)
    with pytest.raises(TypeError, match=r"do not support LoRA conversion.*no dense form"):
        converted(shim, lora(shim), 2)


def test_one_of_two_adapters() -> None:
    model = lora(shim)
    model.add_adapter("other", shim.LoraConfig(r=2, target_modules=["head"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, tensors = shim.convert_to_lora(fill(model), 2, adapter_name="other")
    assert set(tensors) == {f"base_model.model.head.lora_{x}.weight" for x in "AB"}
    with pytest.raises(TypeError, match="Could not detect any layer"):
        shim.convert_to_lora(model, 2, adapter_name="nothing")


def test_what_lora_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="The adapter's config sets lora_bias=True, this is not supported"):
        converted(shim, lora(shim, lora_bias=True), 2)


# -- files ------------------------------------------------------------------------------------------------


def test_save_as_lora_writes_what_peft_writes(tmp_path: Path) -> None:
    for i, rank in enumerate((2, 0.6)):
        theirs, ours = pair(tmp_path / f"{i}", "LoraConfig", {"r": 3, "modules_to_save": ["head"]})
        configs = []
        for package, model in ((peft, theirs), (shim, ours)):
            folder = tmp_path / f"{i}{package.__name__}"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                package.save_as_lora(folder, model, rank=rank, progressbar=False)
            values = json.loads((folder / "adapter_config.json").read_text())
            values["target_modules"] = sorted(values["target_modules"])
            configs.append(values)
        assert configs[0] == configs[1]
    check_outputs(ours, tmp_path / "again")


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="should be a directory, not a file"):
            shim.save_as_lora(tmp_path / "file", lora(shim), 2)


# -- intruders --------------------------------------------------------------------------------------------


def intruding(package: Any, base: Any = mlp, **fields: Any) -> Any:
    model = package.get_peft_model(base(), package.LoraConfig(**{"r": 3, "target_modules": ["up", "down"], **fields}))
    return fill(model).eval()


@pytest.mark.parametrize("epsilon", [0.0, 0.7, 0.95])
def test_intruders_are_reduced_as_in_peft(epsilon: float) -> None:
    found = []
    for package in (peft, shim):
        reduce = import_module(f"{package.__name__}.tuners.lora.intruders").reduce_intruder_dimension
        model, said = intruding(package), []
        reduce(model, threshold_epsilon=epsilon, top_k=4, mitigation_lambda=0.5, logging_sink=said.append)
        tensors = products(package.get_peft_model_state_dict(model, adapter_name="intruder_reduced"))
        found.append((said, model.active_adapter, sorted(model.peft_config), tensors, model(torch.ones(1, 6))))
    assert found[0][:3] == found[1][:3]
    assert any("Intruders: " in line for line in found[0][0]) == (epsilon > 0)
    for key, value in found[0][3].items():
        torch.testing.assert_close(found[1][3][key], value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1][4], found[0][4], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["embedding", "hf_conv1d", "conv2d", "parameter", "experts"])
def test_intruders_of_other_layers(kind: str) -> None:
    """Factors fit, and make the mitigated weight where the rank allows."""
    base, x, target = layer_model(kind)
    target["fan_in_fan_out"] = kind == "hf_conv1d"
    model = fill(shim.get_peft_model(base, shim.LoraConfig(r=6, init_lora_weights=False, **target))).eval()
    old = model(x)
    shim.reduce_intruder_dimension(model, threshold_epsilon=1.1, mitigation_lambda=1.0, logging_sink=None)
    assert model.active_adapter == "intruder_reduced"
    torch.testing.assert_close(model(x), old, rtol=1e-3, atol=1e-3)  # nothing is taken away
    model.set_adapter("default")
    torch.testing.assert_close(model(x), old)
    shim.reduce_intruder_dimension(model, "default", "less", threshold_epsilon=1.1, logging_sink=None)
    assert (model(x) - old).abs().max() > 1e-3


def test_intruders_of_one_expert_and_one_adapter() -> None:
    base = nn.ModuleDict({"part": nn.Module(), "other": nn.Linear(4, 4)})
    base["part"].w = nn.Parameter(torch.randn(1, 5, 4))
    model = shim.get_peft_model(base, shim.LoraConfig(r=2, target_parameters=["part.w"], target_modules=[]))
    model.add_adapter("two", shim.LoraConfig(r=2, target_modules=["other"], init_lora_weights=False))
    said: list[str] = []
    shim.reduce_intruder_dimension(model, threshold_epsilon=1.1, logging_sink=said.append)
    assert said[0].startswith("base_model.model.part: Intruders: ")
    assert len(said) == 2
    shim.reduce_intruder_dimension(model, "two", "three", threshold_epsilon=1.1, logging_sink=None)
    assert model.active_adapter == "three"


def test_intruders_of_other_methods_and_groups() -> None:
    model = shim.get_peft_model(mlp(), shim.IA3Config(target_modules=["up"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="not using LoRA"):
        shim.reduce_intruder_dimension(model)
    base, _, target = layer_model("conv2d_grouped")
    model = shim.get_peft_model(base, shim.LoraConfig(r=2, **target))
    with pytest.raises(ValueError, match=r"grouped convolution 'inner\.layer' has no dense form"):
        shim.reduce_intruder_dimension(model)
    assert list(model.peft_config) == ["default"]


def test_a_transformer_with_intruders_removed_still_runs() -> None:
    model = fill(
        shim.get_peft_model(tiny("gpt2"), shim.LoraConfig(r=4, target_modules=["c_fc"], fan_in_fan_out=True))
    ).eval()
    shim.reduce_intruder_dimension(model, logging_sink=None)
    assert model(**tokens("gpt2")).logits.isfinite().all()
