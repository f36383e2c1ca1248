"""FourierFT: what the laws cannot say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import funcadapt as fa


def _adapter(model: nn.Module, n: int, **fields: Any) -> fa.Adapter:
    return fa.init(model, fa.FourierFTConfig(n_frequency=n, target_modules=["0"], **fields))


@pytest.mark.parametrize("inputs", [1, 2, 3, 8, 9])
@pytest.mark.parametrize("outputs", [1, 2, 5, 6])
def test_every_frequency_of_even_and_odd_sizes(inputs: int, outputs: int) -> None:
    """Without a matrix, one wave after the other, as in the transform of the matrix."""
    model = nn.Sequential(nn.Linear(inputs, outputs)).double()
    x = torch.randn(2, 3, inputs, dtype=torch.float64)
    adapter = _adapter(model, inputs * outputs)
    buffers = adapter.buffers["0"]
    for j in range(inputs * outputs):
        one = {name: leaf[:, j : j + 1] for name, leaf in buffers.items()}
        spectrum = adapter.params["0"]["fourierft_spectrum"][j : j + 1]
        wave = adapter.replace(params={"0": {"fourierft_spectrum": spectrum}}, buffers={"0": one})
        dense = torch.func.functional_call(model, fa.merge(model, wave), (x,))
        torch.testing.assert_close(fa.functional_call(model, wave, x), dense, rtol=0, atol=1e-11)


def test_no_matrix_of_the_size_of_the_weight() -> None:
    """Neither forward nor backward, where the frequencies are few."""
    model, sizes = nn.Sequential(nn.Linear(512, 512)), set[int]()
    base = model.get_parameter("0.weight").data_ptr()
    adapter = _adapter(model, 10)
    params = {"0": {"fourierft_spectrum": adapter.params["0"]["fourierft_spectrum"].requires_grad_()}}

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            made = out if isinstance(out, tuple | list) else [out]
            sizes.update(t.numel() for t in made if isinstance(t, torch.Tensor) and t.data_ptr() != base)
            return out

    model.requires_grad_(False)
    with Watch():
        fa.functional_call(model, adapter.replace(params=params), torch.randn(3, 512)).sum().backward()
    assert max(sizes) < 512 * 512 / 8
    assert params["0"]["fourierft_spectrum"].grad is not None


def test_the_places_are_those_of_the_seed(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(6, 5)).double(), torch.randn(2, 6, dtype=torch.float64)
    first, second = _adapter(model, 4), _adapter(model, 4, random_loc_seed=1)
    assert not torch.equal(first.buffers["0"]["places"], second.buffers["0"]["places"])
    for adapter in (first, second):
        fa.save(adapter, tmp_path)
        loaded = fa.load(tmp_path, model=model)
        assert torch.equal(fa.functional_call(model, loaded, x), fa.functional_call(model, adapter, x))
    with pytest.raises(fa.AdapterFileError, match="Pass it"):
        fa.load(tmp_path)
    fa.save(first.replace(config=fa.FourierFTConfig(n_frequency=5, target_modules=["0"])), tmp_path)
    with pytest.raises(fa.AdapterError, match=r"its config says \(5,\)"):
        fa.load(tmp_path, model=model)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_frequency": 0}, "`n_frequency` should be a positive integer"),
        ({"n_frequency_pattern": {"a": 0}}, "`n_frequency` should be a positive integer"),
        ({"random_loc_seed": None}, "`random_loc_seed` must be a number"),
        ({"layers_pattern": ["h"]}, "`layers_to_transform` must also be specified"),
        ({"target_modules": "x", "layers_to_transform": 1}, "cannot be used when `target_modules` is a str"),
    ],
)
def test_configs_that_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fa.FourierFTConfig(**fields)


def test_more_frequencies_than_entries() -> None:
    with pytest.raises(fa.SiteError, match="n_frequency=31 is more than the 30 entries of the weight of '0'"):
        _adapter(nn.Sequential(nn.Linear(6, 5)), 31)
