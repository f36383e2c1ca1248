"""Super-Tuning: what the laws cannot say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import funcadapt as fa


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30)).double()


def _random(model: nn.Module, **fields: Any) -> fa.Adapter:
    return fa.init(model, fa.SupertuningConfig(**{"target_modules": ["0"], "init_weights": False, **fields}))


@pytest.mark.parametrize("top", [True, False])
def test_the_largest_or_smallest_entries_change(top: bool) -> None:
    model = _model()
    merged = fa.merge(model, _random(model, sparsity=0.75, select_top=top))["0.weight"]
    weight: Any = model[0].weight
    changed = merged != weight
    assert changed.sum() == 150
    least, most = weight[changed].abs(), weight[~changed].abs()
    assert (least.min() >= most.max()) if top else (least.max() <= most.min())


@pytest.mark.parametrize("tokens", [(1,), (2, 2), (40,)])
@pytest.mark.parametrize("r", [None, 2])
def test_few_and_many_tokens(tokens: tuple[int, ...], r: int | None) -> None:
    model, x = _model(), torch.randn(*tokens, 20, dtype=torch.float64)
    adapter = _random(model, sparsity=0.9, r=r)
    dense = torch.func.functional_call(model, fa.merge(model, adapter), (x,))
    torch.testing.assert_close(fa.functional_call(model, adapter, x), dense)


def test_files_without_places(tmp_path: Path) -> None:
    model, x = _model(), torch.randn(3, 20, dtype=torch.float64)
    adapter = _random(model, sparsity=0.9, save_precomputed_indices=False)
    fa.save(adapter, tmp_path)
    with pytest.raises(fa.AdapterFileError, match="Pass it"):
        fa.load(tmp_path)
    loaded = fa.load(tmp_path, model=model)
    assert torch.equal(fa.functional_call(model, loaded, x), fa.functional_call(model, adapter, x))
    with_places = _random(model, sparsity=0.9)
    fa.save(with_places, tmp_path)
    assert torch.equal(fa.functional_call(model, fa.load(tmp_path), x), fa.functional_call(model, with_places, x))


@pytest.mark.parametrize("wrong", ["twice", "negative", "less", "rank"])
def test_files_that_do_not_fit(wrong: str, tmp_path: Path) -> None:
    adapter = _random(_model(), sparsity=0.9, r=2)
    indices = adapter.buffers["0"]["supertuning_indices"].clone()
    if wrong == "twice":
        indices[1] = indices[0]
    elif wrong == "negative":
        indices[0] = -1
    elif wrong == "less":
        indices = indices[1:].contiguous()
    else:
        adapter = adapter.replace(config=fa.SupertuningConfig(sparsity=0.9, r=3, target_modules=["0"]))
    fa.save(adapter.replace(buffers={"0": {"supertuning_indices": indices}}), tmp_path)
    with pytest.raises(fa.AdapterError, match="'0' has"):
        fa.load(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity must be in \[0.0, 1.0\)"),
        ({"lora_dropout": 1.0}, r"must be in \[0, 1\)"),
        ({"lora_alpha": 2.0}, "lora_alpha is set but r is None"),
        ({"r": 0}, "r must be a positive integer or None"),
    ],
)
def test_configs_that_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fa.SupertuningConfig(**fields)


def test_alpha_is_twice_the_rank_by_default() -> None:
    assert fa.SupertuningConfig(r=3).lora_alpha == 6
    assert fa.SupertuningConfig().lora_alpha is None


def test_a_layer_that_is_too_small() -> None:
    with pytest.raises(fa.SiteError, match=r"sparsity=0\.999 trains 0 of the 600 entries of the weight of '0'"):
        _random(_model(), sparsity=0.999)
