"""PSOFT: what the laws cannot say, and PEFT, which refuses float64 weights."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from peft_tools import config_file, peft_load, peft_save, raw, same_tensors, wrap
from torch import nn

import funcadapt as fa
import funcadapt.peft as shim


def linear() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(9, 7)).eval(), torch.randn(4, 9)


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4},
    "alpha": {"r": 3, "psoft_alpha": 7},
    "pissa": {"r": 3, "ab_svd_init": "pissa_init"},
    "lowrank": {"r": 3, "psoft_svd": "lowrank", "psoft_svd_lowrank_niter": 4, "random_seed": 3},
    "free": {"r": 3, "psoft_orth": False, "init_weights": False},
    "random": {"r": 7, "init_weights": False},
    "bare": {"r": 3, "psoft_mag_a": False, "psoft_mag_b": False},
    "series": {"r": 4, "use_cayley_neumann": True, "num_cayley_neumann_terms": 6},
    "bounded": {"r": 4, "use_cayley_neumann": True, "cayley_neumann_eps": 0.2},
    "one": {"r": 1},
}
CLOSE: dict[str, float] = {"rtol": 0, "atol": 1e-5}


@pytest.mark.parametrize("name", CONFIGS)
def test_peft(name: str, tmp_path: Any) -> None:
    """Outputs, gradients, merged weights, files and the view."""
    model, x = linear()
    fields = {**CONFIGS[name], "target_modules": ["0"]}
    wrapped: Any = wrap(linear()[0], peft.PsoftConfig(**fields))
    adapter = fa.load(peft_save(wrapped, tmp_path / "theirs"), model=model)
    params = {"0": {k: v.clone().requires_grad_() for k, v in adapter.params["0"].items()}}
    out = fa.functional_call(model, adapter.replace(params=params), x)
    theirs = wrapped(x)
    assert (theirs - model(x)).abs().max() > 1e-3
    torch.testing.assert_close(out, theirs, **CLOSE)
    grads = torch.autograd.grad(out.pow(2).sum(), [*params["0"].values()])
    theirs.pow(2).sum().backward()
    held = wrapped.base_model.model[0].psoft_R["default"]
    for leaf, g in zip(params["0"], grads, strict=True):
        torch.testing.assert_close(g, getattr(held, leaf.removeprefix("psoft_").replace("R", "weight")).grad, **CLOSE)
    layer = wrapped.base_model.model[0]
    a, b = layer._psoft_A_cache["default"], layer._psoft_B_cache["default"]
    p = adapter.leaves("0")
    torch.testing.assert_close(p["psoft_B"] @ p["psoft_A"], b @ a * layer.scaling["default"], **CLOSE)

    fa.save(adapter, tmp_path / "ours")
    same_tensors(raw(tmp_path / "ours"), raw(tmp_path / "theirs"))
    assert config_file(tmp_path / "ours") == config_file(tmp_path / "theirs")
    torch.testing.assert_close(peft_load(linear()[0], tmp_path / "ours")(x), theirs, **CLOSE)
    merged = torch.func.functional_call(model, fa.merge(model, adapter), (x,))
    torch.testing.assert_close(merged, wrapped.merge_and_unload()(x), **CLOSE)

    states, outs = [], []
    for package, config in ((peft, peft.PsoftConfig(**fields)), (shim, shim.PsoftConfig(**fields))):
        torch.manual_seed(11)
        made: Any = package.get_peft_model(linear()[0], config).eval()
        states.append(package.get_peft_model_state_dict(made))
        outs.append(made(x))
    assert sorted(states[0]) == sorted(states[1])
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value)
    torch.testing.assert_close(outs[1], outs[0], **CLOSE)


def test_dropout_draws_as_peft_does(tmp_path: Any) -> None:
    model, x = linear()
    wrapped = wrap(linear()[0], peft.PsoftConfig(r=4, psoft_dropout=0.5, target_modules=["0"])).train()
    adapter = fa.load(peft_save(wrapped, tmp_path), model=model)
    torch.manual_seed(3)
    expected = wrapped(x)
    torch.manual_seed(3)
    torch.testing.assert_close(fa.functional_call(model.train(), adapter, x), expected, **CLOSE)


def test_only_the_principal_subspace_turns() -> None:
    """Full rank without magnitudes is W V R V^T: the geometry of the inputs stays."""
    model, _ = linear()
    config = fa.PsoftConfig(r=7, psoft_mag_a=False, psoft_mag_b=False, init_weights=False, target_modules=["0"])
    weight = fa.merge(model, fa.init(model, config))["0.weight"]
    base: Any = model[0]  # pyright: ignore
    assert not torch.allclose(weight, base.weight, atol=0.01)
    spectra = [torch.linalg.svdvals(w) for w in (weight, base.weight)]
    torch.testing.assert_close(*spectra)
    small = fa.merge(model, fa.init(model, fa.PsoftConfig(r=2, init_weights=False, target_modules=["0"])))["0.weight"]
    u, _, vh = torch.linalg.svd(base.weight)
    torch.testing.assert_close((u.T @ small @ vh.T)[2:, 2:], (u.T @ base.weight @ vh.T)[2:, 2:], **CLOSE)


def test_alpha_has_no_effect_there_and_here() -> None:
    model, x = linear()
    outs = []
    for alpha in (1, 64):
        torch.manual_seed(0)
        fields: dict[str, Any] = {"r": 3, "psoft_alpha": alpha, "init_weights": False, "target_modules": ["0"]}
        outs.append(peft.get_peft_model(linear()[0], peft.PsoftConfig(**fields))(x))
        outs.append(fa.functional_call(model, fa.init(model, fa.PsoftConfig(**fields)), x))
    torch.testing.assert_close(outs[2], outs[0], **CLOSE)
    assert torch.equal(outs[3], outs[1])


def test_autocast() -> None:
    model, x = linear()
    adapter = fa.init(model, fa.PsoftConfig(r=4, target_modules=["0"]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(fa.functional_call(model, adapter, x), model(x), rtol=0, atol=0.05)


def test_errors() -> None:
    for fields, words in (
        ({"r": 0}, "`r` must be a positive integer"),
        ({"ab_svd_init": "other"}, "`ab_svd_init` must be one of"),
        ({"psoft_svd": "other"}, "`psoft_svd` must be one of"),
        ({"use_cayley_neumann": True, "num_cayley_neumann_terms": 0}, "must be a positive integer"),
        ({"use_cayley_neumann": True, "cayley_neumann_eps": 1.5}, r"must be in \(0, 1\)"),
        ({"psoft_dropout": 1.0}, "`psoft_dropout` must be in"),
        ({"target_modules": "0", "layers_to_transform": [0]}, "when `target_modules` is a str"),
        ({"target_modules": "0", "layers_pattern": "h"}, "when `target_modules` is a str"),
        ({"layers_pattern": "h"}, "must also be specified"),
    ):
        with pytest.raises(ValueError, match=words):
            fa.PsoftConfig(**fields)  # pyright: ignore
    with pytest.raises(fa.SiteError, match=r"`r` \(8\) must be at most 7"):
        fa.init(linear()[0], fa.PsoftConfig(r=8, target_modules=["0"]))
