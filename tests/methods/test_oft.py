"""OFT: what the laws cannot say."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from peft_tools import peft_save, wrap
from specs.oft import EPS, rotation
from torch import nn

import funcadapt as fa


def convolution() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1)).double(), torch.randn(2, 4, 7, 6).double()


def linear() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5)).double(), torch.randn(3, 6, dtype=torch.float64)


def test_convolutions_do_what_pefts_merged_weight_says(tmp_path: Any) -> None:
    """PEFT defect B3: its forward folds the patches in another order than it unfolds them, and sums those in common."""
    model, x = convolution()
    wrapped: Any = wrap(convolution()[0], peft.OFTConfig(oft_block_size=4, target_modules=["0"])).double()
    adapter = fa.load(peft_save(wrapped, tmp_path), model=model)
    unmerged = wrapped(x)
    merged = wrapped.merge_and_unload()(x)
    assert not torch.allclose(unmerged, merged, atol=0.1)
    torch.testing.assert_close(fa.functional_call(model, adapter, x), merged)


def test_two_adapters_nest_in_order(tmp_path: Any) -> None:
    """PEFT defect B4: it merges two adapters in the other order than it applies them."""
    model, x = linear()
    configs = [fa.OFTConfig(oft_block_size=6, init_weights=False, target_modules=["0"]) for _ in range(2)]
    both = {name: fa.init(model, config, seed=i) for i, (name, config) in enumerate(zip("ab", configs, strict=True))}
    r, s = (rotation(adapter.params["0"]["oft_R"], 6, exact=False) for adapter in both.values())
    expected = (x @ s @ r) @ model[0].weight.T + model[0].bias  # pyright: ignore  # a is the inner one
    torch.testing.assert_close(fa.functional_call(model, both, x), expected)
    merged = fa.merge(model, both)
    torch.testing.assert_close(torch.func.functional_call(model, merged, (x,)), expected)


def test_the_two_formulas_turn_in_opposite_directions() -> None:
    """PEFT defect B5, which files depend on: kept."""
    model, x = linear()
    fields: dict[str, Any] = {"oft_block_size": 3, "target_modules": ["0"]}
    adapter = fa.init(model, fa.OFTConfig(**fields, num_cayley_neumann_terms=40, init_weights=False))
    exact = fa.OFTConfig(**fields, use_cayley_neumann=False)
    there = fa.functional_call(model, adapter, x)
    back = adapter.replace(params={"0": {"oft_R": -adapter.params["0"]["oft_R"]}}).replace(config=exact)
    torch.testing.assert_close(fa.functional_call(model, back, x), there)


@pytest.mark.parametrize("exact", [False, True])
def test_the_constraint_is_differentiable_on_both_sides_and_leaves_the_adapter_alone(exact: bool) -> None:
    model, x = linear()
    config = fa.OFTConfig(oft_block_size=3, coft=True, eps=EPS, use_cayley_neumann=not exact, target_modules=["0"])
    adapter = fa.init(model, config)
    v = torch.tensor([[0.3, -0.5, 0.2], [0.01, 0.0, -0.02]], dtype=torch.float64)  # the first is too long
    at = adapter.replace(params={"0": {"oft_R": v.requires_grad_()}})
    out = fa.functional_call(model, at, x)
    r = rotation(v, 6, exact=exact, coft=True)
    torch.testing.assert_close(out, x @ r @ model[0].weight.T + model[0].bias)  # pyright: ignore
    (g,) = torch.autograd.grad((out * torch.arange(5.0)).sum(), v)
    assert (g[0] * v[0]).sum().abs() < 1e-12  # to be longer changes nothing
    assert g[0].norm() > 1e-3
    (g,) = torch.autograd.grad(fa.functional_call(model, adapter.map(lambda t: t.requires_grad_()), x).sum(),
                               adapter.params["0"]["oft_R"])  # fmt: skip
    assert g.isfinite().all()


def test_block_sizes_are_moved_to_the_nearest_divisor() -> None:
    model, _ = linear()
    for fields, shape in (({"oft_block_size": 4}, (2, 3)), ({"r": 5, "oft_block_size": 0}, (6, 0)),
                          ({"oft_block_size": 32}, (1, 15))):  # fmt: skip
        with pytest.warns(UserWarning, match="Invalid `.*Adjusted"):
            adapter = fa.init(model, fa.OFTConfig(**fields, target_modules=["0"]))  # pyright: ignore
        assert tuple(adapter.params["0"]["oft_R"].shape) == shape
        with pytest.warns(UserWarning, match="Invalid"):
            theirs: Any = peft.get_peft_model(linear()[0], peft.OFTConfig(**fields, target_modules=["0"]))  # pyright: ignore
        assert tuple(theirs.base_model.model[0].oft_R["default"].weight.shape) == shape


def test_one_term_is_the_identity() -> None:
    model, x = linear()
    config = fa.OFTConfig(oft_block_size=3, num_cayley_neumann_terms=1, init_weights=False, target_modules=["0"])
    torch.testing.assert_close(fa.functional_call(model, fa.init(model, config), x), model(x))


def test_autocast() -> None:
    model, x = linear()
    model, x = model.float(), x.float()
    adapter = fa.init(model, fa.OFTConfig(oft_block_size=3, use_cayley_neumann=False, target_modules=["0"]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(fa.functional_call(model, adapter, x), model(x), rtol=0, atol=0.05)


def test_errors() -> None:
    with pytest.raises(ValueError, match="must be non-zero"):
        fa.OFTConfig(oft_block_size=0)
    with pytest.raises(ValueError, match="but not both"):
        fa.OFTConfig(r=2)
    with pytest.raises(ValueError, match="must also be specified"):
        fa.OFTConfig(layers_pattern="h")
