"""PEANuT: what the laws cannot say."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

import funcadapt as fa
from funcadapt.methods.peanut import _NOT_ZERO_AT_ZERO, ACTIVATIONS


def test_the_activations_are_those_of_transformers() -> None:
    assert set(ACTIVATIONS) == set(ACT2FN)
    x = torch.linspace(-12, 12, 97)
    for name, f in ACTIVATIONS.items():
        torch.testing.assert_close(f(x), ACT2FN[name](x).detach(), rtol=1e-5, atol=1e-6, msg=name)
        assert (f(torch.zeros(1)) != 0).item() == (name in _NOT_ZERO_AT_ZERO), name


@pytest.mark.parametrize("act_fn", ["relu", "sigmoid", "sqrtsoftplus"])
def test_a_padded_rank_changes_nothing_and_has_no_gradient(act_fn: str) -> None:
    model, x = nn.Sequential(nn.Linear(4, 6)).double(), torch.randn(3, 4, dtype=torch.float64)
    adapters = [
        fa.init(model, fa.PeanutConfig(r=r, depth=1, act_fn=act_fn, init_weights=False, target_modules=["0"]), seed=r)
        for r in (1, 3)
    ]
    stack = fa.stack(adapters)
    out = fa.functional_call(model, fa.grouped(stack), (torch.cat([x, x]),))
    expected = torch.cat([fa.functional_call(model, a, (x,)) for a in adapters])
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    grads = torch.func.grad(
        lambda p: fa.functional_call(model, fa.grouped(stack.replace(params=p)), (torch.cat([x, x]),)).pow(2).sum()
    )(stack.params)["0"]
    assert not grads["peanut_A"][0, 1:].any()
    assert not grads["peanut_B"][0, :, 1:].any()
    for name in ("peanut_encoders.0", "peanut_decoders.0"):
        grad = grads[name][0].clone()
        grad[0, 0] = 0
        assert not grad.any()


def test_errors() -> None:
    with pytest.raises(ValueError, match="positive integer, got 0"):
        fa.PeanutConfig(r=0)
    with pytest.raises(ValueError, match="non-negative"):
        fa.PeanutConfig(depth=-1)
    with pytest.raises(ValueError, match=r"'rellu'.* Did you mean 'relu'"):
        fa.PeanutConfig(act_fn="rellu")
    with pytest.raises(ValueError, match="must also be specified"):
        fa.PeanutConfig(layers_pattern="h")
