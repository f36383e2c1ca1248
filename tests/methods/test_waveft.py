"""WaveFT: what the laws cannot say."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_tools import peft_save, wrap
from torch import nn

import funcadapt as fa
from funcadapt.methods.waveft import analysis, synthesis
from funcadapt.parts import wavelets


def _model(inputs: int, outputs: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, outputs))


@pytest.mark.parametrize("name", wavelets.NAMES)
def test_filters_are_orthogonal(name: str) -> None:
    """All but PEFT's coif4, which is kept for the files that have it."""
    low, high = (torch.tensor(f, dtype=torch.float64) for f in wavelets.filters(name))
    shifts = torch.stack([f.roll(2 * k) for k in range(len(low) // 2) for f in (low, high)])
    error = (shifts @ shifts.T - torch.eye(len(low))).abs().max().item()
    at = torch.linspace(-1, 1, len(low), dtype=torch.float64)
    moments = [(high.flip(0) * at**m).sum() for m in range(len(low) // (3 if name[0] == "c" else 2))]
    worst = max(error, abs(low.sum().item() - math.sqrt(2)), *(abs(m.item()) for m in moments))
    assert (worst < 1e-10) == (name != "coif4")


@pytest.mark.parametrize("size", [1, 2, 7, 10])
@pytest.mark.parametrize("name", ["db1", "db4", "sym3", "coif5"])
def test_the_transform_and_its_transpose(name: str, size: int) -> None:
    filters = torch.tensor(wavelets.filters(name), dtype=torch.float64)
    forward = analysis(torch.eye(size, dtype=torch.float64), filters)
    back = synthesis(torch.eye(forward.shape[1], dtype=torch.float64), filters, size)
    torch.testing.assert_close(forward, back.T)
    torch.testing.assert_close(forward @ back, torch.eye(size, dtype=torch.float64))  # nothing is lost at the ends


@pytest.mark.parametrize("name", [name for name in wavelets.NAMES if name != "coif5"])
@pytest.mark.parametrize(("inputs", "outputs"), [(6, 5), (5, 8)])
def test_every_family_is_peft_s(name: str, inputs: int, outputs: int, tmp_path: Path) -> None:
    config: dict[str, Any] = {"n_frequency": 12, "wavelet_family": name, "target_modules": ["0"]}
    wrapped: Any = wrap(_model(inputs, outputs).double(), peft.WaveFTConfig(**config)).double()
    model = _model(inputs, outputs).double()
    adapter = fa.load(peft_save(wrapped, tmp_path), model=model)
    x = torch.randn(3, inputs, dtype=torch.float64)
    torch.testing.assert_close(fa.functional_call(model, adapter, x), wrapped(x), rtol=0, atol=1e-9)


def test_coif5_works() -> None:
    """PEFT's filter has another length than it makes room for."""
    config: dict[str, Any] = {"n_frequency": 12, "wavelet_family": "coif5", "target_modules": ["0"],
                              "init_weights": False}  # fmt: skip
    model, x = _model(40, 50), torch.randn(3, 40)
    with pytest.raises(RuntimeError):
        wrap(_model(40, 50), peft.WaveFTConfig(**config))(x)
    adapter = fa.init(model, fa.WaveFTConfig(**config))
    merged = fa.merge(model, adapter)
    torch.testing.assert_close(fa.functional_call(model, adapter, x), torch.func.functional_call(model, merged, (x,)))
    delta = (merged["0.weight"] - model[0].weight) / 25  # pyright: ignore
    norm = adapter.params["0"]["waveft_spectrum"].norm()
    assert 0.3 * norm < delta.norm() < 1.001 * norm  # orthogonal, but for what is cut off at the ends


@pytest.mark.parametrize("n", [12, 200])
@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("family", ["db2", None])
def test_few_and_many_coefficients_and_tokens(family: str | None, tokens: int, n: int) -> None:
    model, x = _model(20, 30).double(), torch.randn(tokens, 20, dtype=torch.float64)
    fields: dict[str, Any] = {"use_idwt": False} if family is None else {"wavelet_family": family}
    adapter = fa.init(model, fa.WaveFTConfig(n_frequency=n, target_modules=["0"], init_weights=False, **fields))
    dense = torch.func.functional_call(model, fa.merge(model, adapter), (x,))
    torch.testing.assert_close(fa.functional_call(model, adapter, x), dense)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_frequency": 0}, "`n_frequency` should be a positive integer"),
        ({"n_frequency_pattern": {"a": 0}}, "`n_frequency` should be a positive integer"),
        ({"wavelet_family": "db11"}, "Wavelet family db11 not supported. Did you mean 'db1'"),
        ({"layers_pattern": ["h"]}, "`layers_to_transform` must also be specified"),
        ({"target_modules": "x", "layers_to_transform": 1}, "cannot be used when `target_modules` is a str"),
    ],
)
def test_configs_that_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fa.WaveFTConfig(**fields)


def test_sizes_that_do_not_fit(tmp_path: Path) -> None:
    model = _model(6, 5)
    with pytest.raises(fa.SiteError, match="n_frequency=31 is more than the 30 entries of the weight of '0'"):
        fa.init(model, fa.WaveFTConfig(n_frequency=31, target_modules=["0"]))
    adapter = fa.init(model, fa.WaveFTConfig(n_frequency=4, target_modules=["0"]))
    fa.save(adapter.replace(config=fa.WaveFTConfig(n_frequency=5, target_modules=["0"])), tmp_path)
    with pytest.raises(fa.AdapterError, match=r"its config says \(5,\)"):
        fa.load(tmp_path, model=model)
