"""LoKr: how sizes are factored, and what PEFT gets wrong or refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft.tuners.lokr.layer as theirs
import pytest
import torch
from torch import Tensor, nn

import funcadapt as fa
from funcadapt.parts.lycoris import factorization


def random(model: nn.Module, config: fa.AdapterConfig) -> fa.Adapter:
    return fa.init(model, config).map(lambda t: torch.randn_like(t) if t.ndim else t)


def test_factorization_is_pefts() -> None:
    for factor in (-1, 1, 2, 3, 4, 8, 16, 1000):
        for dimension in range(1, 200):
            assert factorization(dimension, factor) == theirs.factorization(dimension, factor)


@pytest.mark.parametrize("r", [3, 40])
@pytest.mark.parametrize("layer", [nn.Linear(48, 60), nn.Conv2d(12, 60, 3, padding=1, padding_mode="reflect"),
                                   nn.Conv1d(12, 60, 3)], ids=str)  # fmt: skip
def test_the_factored_form_is_the_dense_one(layer: nn.Module, r: int) -> None:
    model = nn.Sequential(layer).double()
    shape = {nn.Linear: (2, 3, 48), nn.Conv2d: (2, 12, 5, 5), nn.Conv1d: (2, 12, 5)}[type(layer)]  # pyright: ignore
    x = torch.randn(shape).double()
    for both in (False, True):
        adapter = random(model, fa.LoKrConfig(r=r, alpha=2, target_modules=["0"], decompose_both=both))
        expected = torch.func.functional_call(model, fa.merge(model, adapter), (x,))
        torch.testing.assert_close(fa.functional_call(model, adapter, (x,)), expected)
        one = fa.functional_call(model, adapter, (x[0],)) if layer.weight.ndim == 2 else None  # pyright: ignore
        assert one is None or torch.allclose(one, expected[0])


def test_no_dense_matrix_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(nn.Linear(48, 60)), torch.randn(2, 48)
    adapter = random(model, fa.LoKrConfig(r=2, target_modules=["0"]))
    monkeypatch.setattr("funcadapt.methods.lokr.delta_weight", lambda *_: pytest.fail("built the dense form"))
    fa.functional_call(model, adapter, (x,))


def test_pefts_failure_on_effective_convolutions_in_one_dimension_is_not_ours() -> None:
    conv = nn.Conv1d(4, 6, 3)
    model, x = nn.Sequential(conv).double(), torch.randn(2, 4, 7).double()
    adapter = random(model, fa.LoKrConfig(r=1, use_effective_conv2d=True, target_modules=["0"]))
    p = adapter.params["0"]
    assert p["lokr_t2"].shape == (1, 1, 3, 1)
    with pytest.raises(RuntimeError, match="view size"):
        theirs.make_kron(p["lokr_w1"], theirs.make_weight_cp(p["lokr_t2"], p["lokr_w2_a"], p["lokr_w2_b"]))
    w2 = torch.einsum("ijs,jn,ik->kns", p["lokr_t2"].squeeze(3), p["lokr_w2_b"], p["lokr_w2_a"])
    delta = 8 * torch.stack([torch.kron(p["lokr_w1"], w2[..., s].contiguous()) for s in range(3)], -1)
    expected = torch.nn.functional.conv1d(x, conv.weight + delta, conv.bias)
    torch.testing.assert_close(fa.functional_call(model, adapter, (x,)), expected)


@pytest.mark.parametrize("layer", [nn.Linear(4, 50), nn.Conv2d(4, 50, 1), nn.Conv2d(4, 50, 1, groups=2)], ids=str)
@pytest.mark.parametrize("scaled", [False, True])
def test_rank_dropout(layer: nn.Module, scaled: bool) -> None:
    model = nn.Sequential(layer).double().train()
    x = torch.randn((3, 4) if isinstance(layer, nn.Linear) else (3, 4, 1, 1)).double()
    config = fa.LoKrConfig(target_modules=["0"], r=1, rank_dropout=0.3, rank_dropout_scale=scaled)
    adapter = random(model, config)
    whole = fa.functional_call(model.eval(), adapter, (x,)) - model(x)
    ratio = ((fa.functional_call(model.train(), adapter, (x,)) - model(x)) / whole).flatten(1)
    kept = (ratio.abs() > 1e-6).double()
    assert 0.4 < kept.mean() < 0.95
    torch.testing.assert_close(ratio, kept / kept.mean() if scaled else kept)


def test_other_ranks_do_not_stack() -> None:
    model = nn.Sequential(nn.Linear(48, 60))
    adapters = [random(model, fa.LoKrConfig(r=r, alpha=r, target_modules=["0"])) for r in (2, 2, 3, 10)]
    fa.stack(adapters[:2])
    with pytest.raises(fa.AdapterError, match="rank"):
        fa.stack(adapters[1:3])
    with pytest.raises(fa.AdapterError, match="lokr_w2"):
        fa.stack(adapters[2:])


@pytest.mark.parametrize("change", [
    lambda p: {k: v for k, v in p.items() if k != "lokr_w1"},
    lambda p: {k: v for k, v in p.items() if k != "lokr_w2_a"},
    lambda p: {**p, "lokr_w2": torch.zeros(3, 2)},
    lambda p: {**p, "lokr_w1_a": torch.zeros(2, 1)},
    lambda p: {**p, "lokr_w2_b": torch.zeros(2, 2)},
    lambda p: {**p, "lokr_t2": torch.zeros(2, 1, 3, 3)},
])  # fmt: skip
def test_leaves_that_do_not_fit_the_config_are_refused(change: Any, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 6))
    adapter = fa.init(model, fa.LoKrConfig(target_modules=["0"], r=1))
    fa.save(adapter.replace(params={"0": change(adapter.params["0"])}), tmp_path)
    with pytest.raises(fa.AdapterFileError, match="0"):
        fa.load(tmp_path)


def test_an_unknown_init() -> None:
    with pytest.raises(ValueError, match="lycoris"):
        fa.LoKrConfig(init_weights="gaussian")


def test_the_order_in_a_one_dimensional_convolution_with_a_whole_matrix_is_pefts() -> None:
    model = nn.Sequential(nn.Conv1d(4, 6, 3)).double()
    adapter = random(model, fa.LoKrConfig(r=4, target_modules=["0"]))
    p = adapter.params["0"]
    merged: Tensor = fa.merge(model, adapter)["0.weight"]
    expected = theirs.make_kron(p["lokr_w1"], p["lokr_w2"], 2.0).reshape(6, 4, 3)
    torch.testing.assert_close(merged - model[0].weight, expected)
