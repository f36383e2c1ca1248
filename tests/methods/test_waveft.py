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
import funcadapt.peft as shim
from funcadapt.method import Draw
from funcadapt.methods.waveft import analysis, share, synthesis
from funcadapt.parts import wavelets
from funcadapt.parts.spectra import proportional
from funcadapt.sites import Site


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


def _numbers(adapter: fa.Adapter) -> dict[str, int]:
    return {path: p["waveft_spectrum"].shape[-1] for path, p in adapter.params.items()}


def test_proportional_numbers_of_every_layer(tmp_path: Path) -> None:
    """Those of PEFT, in the layers' dicts too; a file of another model's numbers is refused."""
    fields: dict[str, Any] = {"n_frequency": 10, "proportional_parameters": True, "target_modules": ["0", "1", "2"]}

    def make(width: int = 20) -> nn.Sequential:
        return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, width), nn.Linear(width, 1, bias=False))

    wrapped: Any = wrap(make(), peft.WaveFTConfig(**fields))
    layers = wrapped.base_model.model
    theirs = {str(i): layers[i].waveft_n_frequency["default"] for i in range(3)}
    adapter = fa.init(make(), fa.WaveFTConfig(**fields))
    assert _numbers(adapter) == theirs == {"0": 6, "1": 20, "2": 4}
    model: Any = fa.materialize(make(), adapter)
    assert {str(i): model[i].waveft_n_frequency["default"] for i in range(3)} == theirs
    injected: Any = shim.get_peft_model(make(), shim.WaveFTConfig(**fields)).base_model.model
    assert {str(i): injected[i].waveft_n_frequency["default"] for i in range(3)} == theirs

    random = fa.init(make(), fa.WaveFTConfig(**fields, init_weights=False))
    fa.save(random, tmp_path)
    model, before = make(), torch.get_rng_state()
    loaded = fa.load(tmp_path, model=model)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(p["waveft_spectrum"], loaded.params[k]["waveft_spectrum"]) for k, p in random.params.items())
    fa.save(adapter, tmp_path)
    assert _numbers(fa.load(tmp_path, model=make())) == theirs
    with pytest.raises(fa.AdapterError, match="Was this adapter made for another model"):
        fa.load(tmp_path, model=make(30))


def test_proportional_experts_are_layers() -> None:
    """Each expert as one layer of its size; a layer never has none."""
    sites = [
        Site("small", "linear", (1, 2), torch.float32, torch.device("cpu"), "small"),
        Site("experts", "experts", (40, 20), torch.float32, torch.device("cpu"), "", "experts", experts=3),
    ]
    assert [n for _, n in proportional(sites, 6)] == [1, 8]
    config = fa.WaveFTConfig(n_frequency=6, proportional_parameters=True, target_modules=["small"])
    draw = Draw(torch.Generator(), torch.float32, torch.device("cpu"))
    own = share(sites, config, draw, lambda site: torch.empty(0)).at["experts"]
    assert {name: tuple(leaf.shape) for name, leaf in own.items()} == {
        "waveft_spectrum": (3, 8),
        "places": (3, 2, 8),
        "filters": (3, 2, 2),
    }
