"""MiSS: what the laws cannot say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import funcadapt as fa


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6)).double()


def _random(model: nn.Module, **fields: Any) -> fa.Adapter:
    new = fa.init(model, fa.MissConfig(target_modules=["0"], **fields))
    return new.map(lambda leaf: leaf + torch.randn_like(leaf))


def test_variants_compose() -> None:
    """PEFT takes the formula of the first adapter for all of them."""
    model, x = _model(), torch.randn(3, 8, dtype=torch.float64)
    both = {"a": _random(model, r=3), "b": _random(model, r=2, init_weights="bat")}
    weights = fa.merge(model, both)
    torch.testing.assert_close(fa.functional_call(model, both, x), torch.func.functional_call(model, weights, (x,)))


def test_the_dropout_of_bat_does_nothing() -> None:
    model, x = _model().train(), torch.randn(3, 8, dtype=torch.float64)
    adapter = _random(model, r=2, init_weights="bat", miss_dropout=0.5)
    y = fa.functional_call(model, adapter, x)
    torch.testing.assert_close(y, torch.func.functional_call(model, fa.merge(model, adapter), (x,)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "`r` should be a positive integer"),
        ({"mini_r": 0}, "`mini_r` should be a positive integer"),
        ({"init_weights": "bath"}, "`init_weights` must be"),
        ({"miss_dropout": 1.0}, "`miss_dropout` must be in"),
        ({"target_modules": "x", "layers_to_transform": [0]}, "cannot be used when `target_modules` is a str"),
    ],
)
def test_configs_that_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fa.MissConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 9}, "at most the 8 inputs of '0'"),
        ({"r": 4, "init_weights": "bat"}, "r must divide its 8 inputs and its 6 outputs"),
        ({"r": 3, "init_weights": "bat"}, "r must divide"),
        ({"r": 2, "init_weights": "mini", "mini_r": 4}, "must divide the 6 outputs"),
    ],
)
def test_layers_that_do_not_fit(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(fa.SiteError, match=message):
        fa.init(_model(), fa.MissConfig(target_modules=["0"], **fields))


def test_a_file_of_another_config(tmp_path: Path) -> None:
    adapter = _random(_model(), r=2)
    for fields in ({"r": 4}, {"r": 2, "init_weights": "mini"}, {"r": 2, "init_weights": "bat"}):
        fa.save(adapter.replace(config=fa.MissConfig(target_modules=["0"], **fields)), tmp_path)
        with pytest.raises(fa.AdapterError, match="miss_block"):
            fa.load(tmp_path)
