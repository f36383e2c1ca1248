"""HRA: what the laws cannot say."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from peft_tools import wrap
from specs.hra import reflection
from torch import nn

import funcadapt as fa


def linear() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5)).double(), torch.randn(3, 6, dtype=torch.float64)


def test_a_new_adapter_of_peft_with_gram_schmidt_is_noise_and_ours_is_not() -> None:
    """PEFT's columns come in pairs, whose difference is nothing but rounding."""
    model, x = linear()
    fields: dict[str, Any] = {"r": 4, "apply_GS": True, "target_modules": ["0"]}
    wrapped = wrap(linear()[0], peft.HRAConfig(**fields))  # with noise on the columns, all is well
    u = wrapped.get_submodule("base_model.model.0").hra_u["default"].detach().double()
    torch.testing.assert_close(wrapped.double()(x), model[0](x @ reflection(u, True).T), rtol=0, atol=1e-6)  # pyright: ignore
    fresh: Any = peft.get_peft_model(linear()[0], peft.HRAConfig(**fields)).double()
    u = fresh.base_model.model[0].hra_u["default"].detach()
    assert torch.equal(u[:, 0], u[:, 1])
    moved = reflection(u + 1e-9 * torch.randn_like(u), True)
    assert not torch.allclose(moved, reflection(u + 1e-9 * torch.randn_like(u), True), atol=0.1)

    ours = fa.init(model, fa.HRAConfig(**fields)).params["0"]["hra_u"]
    moved = reflection(ours + 1e-9 * torch.randn_like(ours), True)
    torch.testing.assert_close(moved, reflection(ours, True), rtol=0, atol=1e-6)


@pytest.mark.parametrize("orthogonal", [False, True])
def test_vectors_that_are_nearly_dependent(orthogonal: bool) -> None:
    model, x = linear()
    model, x = model.float(), x.float()
    config = fa.HRAConfig(r=4, apply_GS=orthogonal, target_modules=["0"])
    u = torch.randn(6, 2).repeat_interleave(2, 1)
    u = u + 1e-3 * torch.randn(6, 4)
    out = fa.functional_call(model, fa.init(model, config).replace(params={"0": {"hra_u": u}}), x)
    expected = model.double()[0](x.double() @ reflection(u.double(), orthogonal).T)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("orthogonal", [False, True])
def test_a_zero_column_is_no_reflection_and_stays_one(orthogonal: bool) -> None:
    model, x = linear()
    adapter = fa.init(model, fa.HRAConfig(r=3, apply_GS=orthogonal, init_weights=False, target_modules=["0"]))
    u = adapter.params["0"]["hra_u"] * torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    u.requires_grad_()
    out = fa.functional_call(model, adapter.replace(params={"0": {"hra_u": u}}), x)
    torch.testing.assert_close(out, model[0](x @ reflection(u[:, [0, 2]], orthogonal).T))  # pyright: ignore
    (g,) = torch.autograd.grad(out.pow(3).sum(), u)
    assert g[:, 1].eq(0).all()
    assert g[:, [0, 2]].abs().min() > 0


def test_autocast() -> None:
    model, x = linear()
    model, x = model.float(), x.float()
    adapter = fa.init(model, fa.HRAConfig(r=4, target_modules=["0"]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(fa.functional_call(model, adapter, x), model(x), rtol=0, atol=0.05)


def test_errors() -> None:
    with pytest.raises(ValueError, match="positive integer"):
        fa.HRAConfig(r=0)
    with pytest.raises(ValueError, match="cannot be used when `target_modules` is a str"):
        fa.HRAConfig(target_modules="0", layers_to_transform=[0])
    with pytest.raises(ValueError, match="cannot be used when `target_modules` is a str"):
        fa.HRAConfig(target_modules="0", layers_pattern="h")
    with pytest.raises(ValueError, match="must also be specified"):
        fa.HRAConfig(target_modules=["0"], layers_pattern="h")
    with pytest.raises(fa.SiteError, match="apply_GS=True needs r <= 6"):
        fa.init(linear()[0], fa.HRAConfig(r=7, apply_GS=True, target_modules=["0"]))
