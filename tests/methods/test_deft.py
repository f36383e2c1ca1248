"""DEFT and PaRa: what the laws cannot say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import funcadapt as fa


def linear() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5)).double().eval(), torch.randn(3, 6, dtype=torch.float64)


def test_para_removes_a_subspace() -> None:
    model, x = linear()
    adapter = fa.init(model, fa.DeftConfig(r=2, para=True, decomposition_method="qr", target_modules=["0"]))
    p = adapter.params["0"]["deft_P"]
    base: Any = model[0]  # pyright: ignore
    left = fa.functional_call(model, adapter, x) - base.bias
    torch.testing.assert_close(left @ p, torch.zeros(3, 2, dtype=p.dtype), rtol=0, atol=1e-12)
    again = fa.functional_call(model, {"a": adapter, "b": adapter}, x) - base.bias  # nothing is left to remove
    torch.testing.assert_close(again, left)


@pytest.mark.parametrize("how", ["relu", "qr"])
@pytest.mark.parametrize("alpha", [None, 3.0])
def test_a_new_adapter_changes_nothing_at_small_layers(how: str, alpha: float | None) -> None:
    """The rank is at most the number of outputs."""
    model, x = linear()
    adapter = fa.init(model, fa.DeftConfig(r=64, alpha=alpha, decomposition_method=how, target_modules=["0"]))
    assert adapter.params["0"]["deft_P"].shape == (5, 5)
    torch.testing.assert_close(fa.functional_call(model, adapter, x), model(x))


def test_errors() -> None:
    for fields, words in (
        ({"r": 0}, "`r` should be a positive integer"),
        ({"decomposition_method": "svd"}, "Unknown decomposition_method 'svd'"),
        ({"deft_dropout": 1.0}, "`deft_dropout` must be in"),
        ({"target_modules": "0", "layers_to_transform": [0]}, "when `target_modules` is a str"),
        ({"target_modules": "0", "layers_pattern": "h"}, "when `target_modules` is a str"),
        ({"layers_pattern": "h"}, "must also be specified"),
    ):
        with pytest.raises(ValueError, match=words):
            fa.DeftConfig(**fields)  # pyright: ignore
