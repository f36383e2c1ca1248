"""SHiRA: what the laws cannot say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import funcadapt as fa


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30)).double()


def _random(model: nn.Module, seed: int = 0, **fields: Any) -> fa.Adapter:
    config = fa.ShiraConfig(**{"r": 1, "target_modules": ["0"], "init_weights": False, **fields})
    return fa.init(model, config, seed=seed)


@pytest.mark.parametrize("tokens", [(1,), (2, 2), (40,), (2, 40)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_few_and_many_tokens(tokens: tuple[int, ...], dtype: torch.dtype) -> None:
    """By gathering, and by a product with a matrix: values and gradients."""
    model = _model().to(dtype)
    adapter, x = _random(model), torch.randn(*tokens, 20, dtype=dtype)
    close = {"rtol": 0, "atol": 1e-12 if dtype == torch.float64 else 0.2}

    def loss(params: Any, *, dense: bool) -> Tensor:
        moved = adapter.replace(params=params)
        if dense:
            return torch.func.functional_call(model, fa.merge(model, moved), (x,)).sin().sum()
        return fa.functional_call(model, moved, x).sin().sum()

    out, expected = (torch.func.grad_and_value(loss)(adapter.params, dense=dense) for dense in (False, True))
    torch.testing.assert_close(out, expected, **close)


def test_adapters_with_different_places_are_grouped() -> None:
    model = _model()
    adapters = [_random(model, seed) for seed in range(3)]
    assert not torch.equal(adapters[0].buffers["0"]["shira_indices"], adapters[1].buffers["0"]["shira_indices"])
    for rows in (1, 40):
        x = torch.randn(3 * rows, 20, dtype=torch.float64)
        expected = torch.cat([fa.functional_call(model, a, x) for a, x in zip(adapters, x.split(rows), strict=True)])
        torch.testing.assert_close(fa.functional_call(model, fa.grouped(fa.stack(adapters)), x), expected)


def test_hooks_of_the_base_layer_run() -> None:
    """PEFT computes with its weight, and warns of that."""
    model, x = _model(), torch.randn(3, 20, dtype=torch.float64)
    adapter = _random(model)
    y = fa.functional_call(model, adapter, x)
    model[0].register_forward_hook(lambda module, args, out: out + 1)  # pyright: ignore
    torch.testing.assert_close(fa.functional_call(model, adapter, x), y + 1)


def test_places_of_ones_own(tmp_path: Path) -> None:
    model, x = _model(), torch.randn(3, 20, dtype=torch.float64)
    adapter = _random(model)
    mine = torch.tensor([[0, 5, 29], [19, 5, 0]], dtype=torch.int32)
    values = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    adapter = adapter.replace(params={"0": {"shira_weight": values}}, buffers={"0": {"shira_indices": mine}})
    dense = torch.zeros(30, 20, dtype=torch.float64)
    dense[0, 19], dense[5, 5], dense[29, 0] = 1, 2, 3
    torch.testing.assert_close(fa.functional_call(model, adapter, x), model(x) + x @ dense.T)
    fa.save(adapter, tmp_path)
    torch.testing.assert_close(fa.functional_call(model, fa.load(tmp_path), x), model(x) + x @ dense.T)


def test_places_outside_of_the_weight() -> None:
    """An adapter of a layer with inputs and outputs swapped has as many entries."""
    other = nn.Sequential(nn.Linear(30, 20)).double()
    adapter = _random(other)
    for rows in (1, 40):
        with pytest.raises((IndexError, RuntimeError), match="out of"):
            fa.functional_call(_model(), adapter, torch.randn(rows, 20, dtype=torch.float64))


def test_files_from_windows(tmp_path: Path) -> None:
    """PEFT writes the places as float32 there."""
    adapter = _random(_model())
    indices = adapter.buffers["0"]["shira_indices"]
    fa.save(adapter.replace(buffers={"0": {"shira_indices": indices.float()}}), tmp_path)
    loaded = fa.load(tmp_path).buffers["0"]["shira_indices"]
    assert loaded.dtype == torch.int32
    assert torch.equal(loaded, indices)


@pytest.mark.parametrize("wrong", ["twice", "negative", "less"])
def test_files_with_wrong_places(wrong: str, tmp_path: Path) -> None:
    adapter = _random(_model())
    indices = adapter.buffers["0"]["shira_indices"].clone()
    if wrong == "twice":
        indices[:, 1] = indices[:, 0]
    elif wrong == "negative":
        indices[0, 0] = -1
    else:
        indices = indices[:, 1:].contiguous()
    fa.save(adapter.replace(buffers={"0": {"shira_indices": indices}}), tmp_path)
    with pytest.raises(fa.AdapterError, match="'0' has"):
        fa.load(tmp_path)


def test_errors() -> None:
    with pytest.raises(ValueError, match="`r` should be a positive integer"):
        fa.ShiraConfig(r=0)
    with pytest.raises(fa.SiteError, match="r=13 trains 650 entries of the weight of '0', which has 600"):
        _random(_model(), r=13)
    with pytest.raises(fa.SiteError, match="mask_type='mine' says no places"):
        _random(_model(), mask_type="mine")
