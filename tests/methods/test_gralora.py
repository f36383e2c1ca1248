"""GraLoRA: sizes that do not divide, scalings that differ between sites, and files that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import funcadapt as fa


def random(model: nn.Module, config: fa.AdapterConfig) -> fa.Adapter:
    return fa.init(model, config).map(lambda t: torch.randn_like(t) if t.ndim else t)


def test_one_block_is_lora() -> None:
    model, x = nn.Sequential(nn.Linear(4, 6)).double(), torch.randn(3, 4).double()
    adapter = random(model, fa.GraloraConfig(r=2, alpha=3, gralora_k=1, target_modules=["0"]))
    p = adapter.params["0"]
    lora = fa.init(model, fa.LoraConfig(r=2, lora_alpha=3, target_modules=["0"]))
    lora = lora.replace(params={"0": {"lora_A": p["gralora_A"][0].t(), "lora_B": p["gralora_B"][0].t()}})
    torch.testing.assert_close(fa.functional_call(model, adapter, (x,)), fa.functional_call(model, lora, (x,)))


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8), (2, 2, 3, 8)], ids=str)
def test_inputs_of_any_number_of_axes(shape: tuple[int, ...]) -> None:
    model, x = nn.Sequential(nn.Linear(8, 12)).double(), torch.randn(shape).double()
    adapter = random(model, fa.GraloraConfig(r=4, hybrid_r=2, gralora_k=4, target_modules=["0"]))
    expected = torch.func.functional_call(model, fa.merge(model, adapter), (x,))
    torch.testing.assert_close(fa.functional_call(model, adapter, (x,)), expected)


@pytest.mark.parametrize(("layer", "side"), [(nn.Linear(5, 6), "in"), (nn.Linear(6, 5), "out")], ids=str)
def test_sizes_that_do_not_divide(layer: nn.Module, side: str) -> None:
    with pytest.raises(fa.SiteError, match=f"{side}_features should be divisible"):
        fa.init(nn.Sequential(layer), fa.GraloraConfig(r=4, target_modules=["0"]))


def test_a_scaling_of_its_own_is_saved_in_b(tmp_path: Path) -> None:
    """There is one alpha for all sites: of the others, the files have another B."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 4)).double()
    x = torch.randn(2, 4).double()
    adapter = random(model, fa.GraloraConfig(r=2, hybrid_r=1, alpha=6, target_modules=["0", "1", "2"]))
    scaled = {**adapter.buffers, "1": {"scaling": adapter.buffers["1"]["scaling"] * 1.7}}
    moved = adapter.replace(buffers=scaled)
    fa.save(moved, tmp_path)
    read = fa.load(tmp_path, model=model)
    assert read.config == adapter.config
    assert torch.equal(read.params["0"]["gralora_B"], adapter.params["0"]["gralora_B"])
    torch.testing.assert_close(fa.functional_call(model, read, (x,)), fa.functional_call(model, moved, (x,)))
    none = fa.init(model, fa.GraloraConfig(r=2, alpha=0, target_modules=["0", "1", "2"]))
    with pytest.raises(fa.SiteError, match="alpha=0"):
        fa.save(none.replace(buffers={**none.buffers, "1": {"scaling": torch.tensor(1.0).double()}}), tmp_path)


def test_adapters_with_other_alphas_stack() -> None:
    model, x = nn.Sequential(nn.Linear(4, 6)).double(), torch.randn(3, 4).double()
    adapters = [random(model, fa.GraloraConfig(r=2, alpha=alpha, target_modules=["0"])) for alpha in (1, 2, 3)]
    out = fa.functional_call(model, fa.grouped(fa.stack(adapters)), (x,))
    expected = torch.cat([fa.functional_call(model, a, (x[i : i + 1],)) for i, a in enumerate(adapters)])
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(
    "fields",
    [{"r": 0}, {"gralora_k": 0}, {"r": 5}, {"hybrid_r": -1}, {"gralora_dropout": 1.0}, {"alpha": float("nan")},
     {"bias": "lora_only"}],
    ids=str,
)  # fmt: skip
def test_values_that_make_no_config(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        fa.GraloraConfig(**fields)


@pytest.mark.parametrize("change", [
    lambda p: {k: v for k, v in p.items() if k != "gralora_B_general"},
    lambda p: {k: torch.cat([v, v]) for k, v in p.items()},
    lambda p: {**p, "gralora_A_general": torch.zeros(1, 6)},
    lambda p: {**p, "gralora_B": torch.zeros(2, 4, 3)},
])  # fmt: skip
def test_leaves_that_do_not_fit_the_config_are_refused(change: Any, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 6))
    adapter = fa.init(model, fa.GraloraConfig(target_modules=["0"], r=2, hybrid_r=1))
    fa.save(adapter.replace(params={"0": change(adapter.params["0"])}), tmp_path)
    with pytest.raises(fa.AdapterFileError, match="0"):
        fa.load(tmp_path)
