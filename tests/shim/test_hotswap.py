"""Hot-swapping beside PEFT's: plain, with other ranks and patterns, padded, compiled; and what it refuses."""

from __future__ import annotations

import copy
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from both import equal, files, fill, on_both, same, same_error, state
from peft_tools import layer_model
from torch import nn

import funcadapt.peft as shim

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::RuntimeWarning")  # PEFT's advice


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


def hotswap(package: Any) -> Any:
    return import_module(f"{package.__name__}.utils.hotswap")


def make(package: Any, seed: int = 5, net: nn.Module | None = None, **fields: Any) -> Any:
    values = {"r": 2, "lora_alpha": 4, "target_modules": ["up", "down"], **fields}
    model = package.get_peft_model(net or Two(), package.LoraConfig(**copy.deepcopy(values)))
    return fill(model, seed).eval()


def saved(folder: Path, seed: int = 9, net: nn.Module | None = None, **fields: Any) -> torch.Tensor:
    """An adapter in a folder, and its true output."""
    model = make(shim, seed, net, **fields)
    model.save_pretrained(folder)
    return model(X).detach() if net is None else torch.zeros(())


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"lora_alpha": 7},
        {"r": 1},
        {"r": 4, "lora_alpha": 3},
        {"target_modules": ["up"]},
    ],
)
def test_swapped(fields: dict[str, Any], tmp_path: Path) -> None:
    truth = saved(tmp_path, **fields)

    def scenario(package: Any) -> Any:
        model = make(package)
        hotswap(package).hotswap_adapter(model, str(tmp_path), "default", "cpu")
        return model(X).detach(), state(model)

    equal(truth, same(scenario, warn=False)[0])


@pytest.mark.parametrize("fields", [{"rank_pattern": {"up": 1}}, {"alpha_pattern": {"down": 9}}])
def test_patterns_are_honoured(fields: dict[str, Any], tmp_path: Path) -> None:
    """PEFT matches them against names that never fit (defect B8): its output is not the adapter's."""
    truth = saved(tmp_path, **fields)
    alphas = {"alpha_pattern": fields.get("alpha_pattern", {})}

    def scenario(package: Any) -> Any:
        model = make(package, **alphas)
        hotswap(package).hotswap_adapter(model, str(tmp_path), "default", "cpu")
        return model(X).detach()

    theirs, ours = on_both(scenario)
    equal(truth, ours.value)
    assert not torch.allclose(truth, theirs.value, atol=1e-3)


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize(
    "fields", [{}, {"lora_alpha": 7}, {"r": 1}, {"r": 4, "lora_alpha": 3, "rank_pattern": {"up": 3}}]
)
def test_what_is_saved_afterwards_is_the_new_adapter(fields: Any, prepared: bool, tmp_path: Path) -> None:
    """PEFT leaves the old rank and alpha in the config, and writes them beside the new weights."""
    truth = saved(tmp_path / "new", **fields)

    def scenario(package: Any) -> Any:
        model = make(package)
        if prepared:
            hotswap(package).prepare_model_for_compiled_hotswap(model, target_rank=5, config=model.peft_config)
        hotswap(package).hotswap_adapter(model, str(tmp_path / "new"), "default", "cpu")
        model.save_pretrained(tmp_path / package.__name__)
        return package.PeftModel.from_pretrained(Two(), tmp_path / package.__name__)(X).detach()

    theirs, ours = on_both(scenario)
    assert ours.error is None, ours.error
    equal(truth, ours.value)
    if fields:
        assert theirs.error is not None or not torch.allclose(truth, theirs.value, atol=1e-3)


def test_swapped_twice_and_scaled(tmp_path: Path) -> None:
    truth = saved(tmp_path / "a", r=4), saved(tmp_path / "b", r=1, lora_alpha=9, seed=3)
    model = make(shim)
    for name, expected in (("a", truth[0]), ("b", truth[1]), ("a", truth[0])):
        hotswap(shim).hotswap_adapter(model, str(tmp_path / name), "default", "cpu")
        equal(expected, model(X).detach())
    layer = model.base_model.model.up
    layer.scale_layer(3.0)
    layer.unscale_layer()
    equal(truth[0], model(X).detach())
    model.merge_adapter()
    equal(truth[0], model(X).detach())


def test_dora(tmp_path: Path) -> None:
    """PEFT cannot: it looks for the magnitude under a name that it does not have. A layer left out gets its norm."""
    truth = saved(tmp_path, use_dora=True, r=1, lora_alpha=3)
    part = saved(tmp_path / "part", use_dora=True, target_modules=["up"])

    def scenario(package: Any) -> Any:
        model = make(package, use_dora=True)
        hotswap(package).hotswap_adapter(model, str(tmp_path), "default", "cpu")
        full = model(X).detach()
        hotswap(package).hotswap_adapter(model, str(tmp_path / "part"), "default", "cpu")
        return full, model(X).detach()

    theirs, ours = on_both(scenario)
    assert theirs.error is not None
    assert ours.error is None, ours.error
    equal((truth, part), ours.value)


@pytest.mark.parametrize("kind", ["linear", "conv2d", "conv2d_grouped"])
def test_prepared(kind: str, tmp_path: Path) -> None:
    net, x, where = layer_model(kind)
    new = make(shim, 9, copy.deepcopy(net), **where, r=2, lora_alpha=5)
    new.save_pretrained(tmp_path)

    def scenario(package: Any) -> Any:
        model = make(package, 5, copy.deepcopy(net), **where, r=4)
        before = model(x).detach()
        hotswap(package).prepare_model_for_compiled_hotswap(model, target_rank=8, config=model.peft_config["default"])
        padded = model(x).detach()
        equal(before, padded)
        rank = model.peft_config["default"].r
        shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        hotswap(package).hotswap_adapter(model, str(tmp_path), "default", "cpu")
        return padded, rank, shapes, model(x).detach(), state(model)

    equal(new(x).detach(), same(scenario, warn=False)[3])


def test_compiled_once(tmp_path: Path) -> None:
    """After preparation, swapping neither changes a shape nor a constant: nothing is compiled again."""
    truth = {r: saved(tmp_path / str(r), r=r, lora_alpha=3 * r + 1, seed=r) for r in (1, 2, 4)}

    def scenario(package: Any) -> Any:
        torch._dynamo.reset()
        model = make(package)
        hotswap(package).prepare_model_for_compiled_hotswap(model, target_rank=4)
        compiled = torch.compile(model, backend="eager")
        seen = []
        with torch._dynamo.config.patch(error_on_recompile=True), torch.inference_mode():
            compiled(X)
            for r in truth:
                hotswap(package).hotswap_adapter(compiled, str(tmp_path / str(r)), "default", "cpu")
                seen.append(compiled(X).clone())
        return seen

    equal(list(truth.values()), same(scenario, warn=False))
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("text", "fields", "prepare"),
    [
        ("use_rslora", {"use_rslora": True}, None),
        ("lora_dropout", {"lora_dropout": 0.5}, None),
        ("use_dora", {"use_dora": True}, None),
        ("alpha_pattern", {"alpha_pattern": {"up": 3}}, None),
        ("unexpected keys", {"target_modules": ["up", "down", "more"]}, None),
        ("unmerge", {}, lambda p, m: m.merge_adapter()),
    ],
)
def test_errors(text: str, fields: Any, prepare: Any, tmp_path: Path) -> None:
    class Three(Two):
        def __init__(self) -> None:
            super().__init__()
            self.more = nn.Linear(2, 2)

    make(shim, 9, Three(), **fields).save_pretrained(tmp_path)

    def scenario(package: Any) -> Any:
        model = make(package, 5, Three())
        if prepare is not None:
            prepare(package, model)
        hotswap(package).hotswap_adapter(model, str(tmp_path), "default", "cpu")

    same_error(scenario, text)


def test_errors_of_preparation() -> None:
    def prepare(package: Any, model: nn.Module, **options: Any) -> None:
        hotswap(package).prepare_model_for_compiled_hotswap(model, **options)

    same_error(lambda p: prepare(p, Two()), "No adapter layers found")
    same_error(lambda p: prepare(p, make(p, r=4), target_rank=2), "original rank is larger")
    same_error(lambda p: prepare(p, torch.compile(make(p), backend="eager")), "*before* compiling")
    same_error(lambda p: prepare(p, torch.compile(make(p), backend="eager"), check_compiled="x"), "one of 'error'")
    same(lambda p: prepare(p, torch.compile(make(p), backend="eager"), check_compiled="warn"))
    same(lambda p: prepare(p, torch.compile(make(p), backend="eager"), check_compiled="ignore"))


def test_ia3_is_not_supported(tmp_path: Path) -> None:
    config = shim.IA3Config(target_modules=["up"], feedforward_modules=[])
    shim.get_peft_model(Two(), config).save_pretrained(tmp_path)

    def scenario(package: Any) -> Any:
        model = package.get_peft_model(Two(), package.IA3Config(target_modules=["up"], feedforward_modules=[]))
        hotswap(package).hotswap_adapter(model, str(tmp_path), "default", "cpu")

    same_error(scenario, "only supports")


def test_a_refused_swap_changes_nothing(tmp_path: Path) -> None:
    model = make(shim)
    before, x = state(model), model(X).detach()
    tensors = {"base_model.model.up.lora_A.default.weight": torch.zeros(2, 99)}
    with pytest.raises(RuntimeError, match="missing"):
        hotswap(shim).hotswap_adapter_from_state_dict(model, tensors, "default", model.peft_config["default"])
    tensors["base_model.model.up.lora_B.default.weight"] = torch.zeros(8, 2)
    with pytest.raises(ValueError, match="Incompatible shapes"):
        hotswap(shim).hotswap_adapter_from_state_dict(model, tensors, "default", model.peft_config["default"])
    equal(before, state(model), 0)
    equal(x, model(X).detach(), 0)


def test_from_a_state_dict(tmp_path: Path) -> None:
    truth = saved(tmp_path)
    tensors = files(tmp_path)["adapter_model.safetensors"]

    def scenario(package: Any) -> Any:
        model = make(package)
        named = {key.replace(".weight", ".default.weight"): value for key, value in tensors.items()}
        hotswap(package).hotswap_adapter_from_state_dict(model, named, "default", model.peft_config["default"])
        return model(X).detach()

    equal(truth, same(scenario, warn=False))
