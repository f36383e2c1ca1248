"""Uni-LoRA's indices are numpy's, with numpy and without."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch
from peft.tuners.unilora.model import UniLoraModel
from torch import nn

import funcadapt as fa
from funcadapt.parts.pcg64 import Stream, indices

SEEDS = (0, 1, 42, 2**31 - 1, 2**32, 2**64 + 12345, 2**130 + 7)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_stream_is_numpys(seed: int) -> None:
    """The same numbers, also where one draw after the other continues the stream."""
    # (20000, 5000) is numpy's other algorithm for choices
    for population, size, length in ((256, 17, 1000), (7, 3, 20), (20000, 5000, 100), (20000, 100, 10), (1, 1, 5)):
        rng, stream = numpy.random.default_rng(seed), Stream(seed)
        for _ in range(2):
            assert rng.choice(population, size=size, replace=False).tolist() == stream.choice(population, size)
            order, items = numpy.arange(length), list(range(length))
            rng.shuffle(order)
            stream.shuffle(items)
            assert order.tolist() == items


@pytest.mark.parametrize("total", [0, 1, 5, 7, 100, 1234])
@pytest.mark.parametrize("seed", [0, 42])
def test_the_indices_are_pefts(total: int, seed: int) -> None:
    expected = UniLoraModel.generate_index(total, 7, seed)
    assert torch.equal(indices(total, 7, seed), expected)
    assert torch.equal(indices(total, 7, seed, use_numpy=False), expected)
    counts = torch.bincount(expected, minlength=7)
    assert counts.max() - counts.min() <= 1


def test_the_norm_of_an_update_does_not_depend_on_how_often_a_number_is_used() -> None:
    """The map from theta to all A and B is an isometry: what the paper is about."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)).double()
    adapter = fa.init(model, fa.UniLoraConfig(r=2, theta_d_length=11, target_modules=["0", "1"]))
    theta = adapter.params[""]["unilora_theta_d"]
    total = torch.zeros((), dtype=torch.float64)
    for path in ("0", "1"):
        p = adapter.buffers[path]
        for which in "AB":
            total += (theta[p[f"unilora_indices_{which}"]] * p[f"unilora_scales_{which}"]).pow(2).sum()
    torch.testing.assert_close(total, theta.pow(2).sum(), rtol=1e-6, atol=0)


def test_a_checkpoint_is_only_complete_with_its_indices(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    for save in (True, False):
        config = fa.UniLoraConfig(r=2, theta_d_length=11, target_modules=["0", "1"], save_indices=save)
        adapter = fa.init(model, config)
        fa.save(adapter, tmp_path)
        x = torch.randn(5, 4)
        expected = fa.functional_call(model, adapter, x)
        assert torch.equal(fa.functional_call(model, fa.load(tmp_path, model=model), x), expected)
        if save:
            assert torch.equal(fa.functional_call(model, fa.load(tmp_path), x), expected)
        else:
            with pytest.raises(fa.AdapterFileError, match="Pass it"):
                fa.load(tmp_path)


@pytest.mark.parametrize("wrong", [-1, 11, 0.5])
def test_indices_out_of_range_are_refused(tmp_path: Path, wrong: float) -> None:
    model = nn.Sequential(nn.Linear(4, 6))
    config = fa.UniLoraConfig(r=2, theta_d_length=11, target_modules=["0"], save_indices=True)
    adapter = fa.init(model, config)
    own = dict(adapter.buffers["0"])
    own["unilora_indices_A"] = torch.full((2, 4), wrong)
    fa.save(adapter.replace(buffers={"0": own}), tmp_path)
    with pytest.raises(fa.AdapterFileError, match="no indices from 0 to 10"):
        fa.load(tmp_path)


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 0},
        {"theta_d_length": 0},
        {"proj_seed": -1},
        {"unilora_dropout": 1.0},
        {"init_theta_d_bound": 0.0},
        {"bias": "lora_only"},
        {"target_modules": "x", "layers_to_transform": [0]},
        {"target_modules": "x", "layers_pattern": "h"},
    ],
    ids=str,
)
def test_what_contradicts_itself_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(reversed(fields))):
        fa.UniLoraConfig(**fields)  # pyright: ignore[reportArgumentType]
