"""C3A: what the laws cannot say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_tools import peft_save, wrap
from torch import nn

import funcadapt as fa


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8)).double()


@pytest.mark.parametrize("block_size", [1, 2, 3, 5, 8, 16])
def test_blocks_of_any_size(block_size: int) -> None:
    """An odd size has no place at half the frequency of sampling."""
    model = nn.Sequential(nn.Linear(3 * block_size, 2 * block_size)).double()
    x = torch.randn(4, 5, 3 * block_size, dtype=torch.float64)
    adapter = fa.init(model, fa.C3AConfig(block_size=block_size, target_modules=["0"], init_weights="gaussian"))
    dense = torch.func.functional_call(model, fa.merge(model, adapter), (x,))
    torch.testing.assert_close(fa.functional_call(model, adapter, x), dense, rtol=0, atol=1e-12)


def test_the_gradient_to_the_input(tmp_path: Path) -> None:
    """PEFT's is wrong, the kernel's own is right."""
    config: dict[str, Any] = {"block_size": 4, "target_modules": ["0"]}
    wrapped: Any = wrap(_model(), peft.C3AConfig(**config)).double()
    model, adapter = _model(), fa.load(peft_save(wrapped, tmp_path))
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    kernel = adapter.params["0"]["c3a_kernel"].double().requires_grad_()
    adapter = adapter.replace(params={"0": {"c3a_kernel": kernel}})
    own = wrapped.base_model.model[0].c3a_kernel["default"]
    ours = torch.autograd.grad(fa.functional_call(model, adapter, x).pow(2).sum(), (x, kernel))
    theirs = torch.autograd.grad(wrapped(x).pow(2).sum(), (x, own))
    torch.testing.assert_close(ours[1], theirs[1], rtol=0, atol=1e-5)
    assert not torch.allclose(ours[0], theirs[0], rtol=0, atol=1e-2)
    step = 1e-6 * torch.randn_like(x)
    before, after = (fa.functional_call(model, adapter, at).pow(2).sum() for at in (x, x + step))
    torch.testing.assert_close((ours[0] * step).sum(), after - before, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_size": 0}, "`block_size` should be a positive integer"),
        ({"block_size_pattern": {"a": -1}}, "`block_size` should be a positive integer"),
        ({"init_weights": "normal"}, "Unknown init_weights"),
        ({"init_weights": None}, "Unknown init_weights"),
        ({"target_modules": "x", "layers_pattern": "h"}, "cannot be used when `target_modules` is a str"),
    ],
)
def test_configs_that_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fa.C3AConfig(**fields)


def test_blocks_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(fa.SiteError, match=r"must divide the 8 inputs and the 12 outputs of '0'.* divisor is 4"):
        fa.init(_model(), fa.C3AConfig(block_size=8, target_modules=["0"]))
    adapter = fa.init(_model(), fa.C3AConfig(block_size=4, target_modules=["0"]))
    fa.save(adapter.replace(config=fa.C3AConfig(block_size=2, target_modules=["0"])), tmp_path)
    with pytest.raises(fa.AdapterError, match="c3a_kernel of shape"):
        fa.load(tmp_path)
