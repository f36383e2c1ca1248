"""`IncrementalPCA` against PEFT's, and against one decomposition of all the data."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from peft.utils.incremental_pca import IncrementalPCA as PeftPCA

from funcadapt.peft.utils.incremental_pca import IncrementalPCA

RESULTS = (
    "components_",
    "singular_values_",
    "explained_variance_",
    "explained_variance_ratio_",
    "noise_variance_",
    "mean_",
    "var_",
    "n_samples_seen_",
)
F64 = torch.float64


def data(samples: int, features: int = 6, dtype: torch.dtype = F64) -> torch.Tensor:
    """Data with well separated variances and a large mean."""
    mix = torch.linalg.qr(torch.randn(features, features, dtype=F64))[0]
    return (torch.randn(samples, features, dtype=F64) @ (mix.T * 2.0 ** torch.arange(features)[:, None]) + 9).to(dtype)


def assert_same(ours: IncrementalPCA, theirs: PeftPCA, rtol: float, atol: float) -> None:
    for name in RESULTS:
        got, want = getattr(ours, name), getattr(theirs, name)
        torch.testing.assert_close(got, want, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")
    assert (ours.n_components, ours.n_features_, ours.batch_size) == (
        theirs.n_components,
        theirs.n_features_,
        theirs.batch_size,
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-11), (torch.float32, 1e-4), (torch.bfloat16, 1e-4)])
@pytest.mark.parametrize("components", [None, 1, 3, 6])
def test_batches_give_what_peft_gives(dtype: torch.dtype, tolerance: float, components: int | None) -> None:
    ours, theirs = IncrementalPCA(components), PeftPCA(components)
    x = data(60, dtype=dtype)
    for batch in x.split([20, 9, 24, 7]):
        before = batch.clone()
        ours.partial_fit(batch)
        theirs.partial_fit(batch)
        assert_same(ours, theirs, tolerance, tolerance)
        assert torch.equal(batch, before)
    torch.testing.assert_close(ours.transform(x), theirs.transform(x), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("options", [{}, {"batch_size": 7}, {"n_components": 2, "batch_size": 5}, {"n_components": 4}])
def test_fit_gives_what_peft_gives(options: dict[str, Any]) -> None:
    x = data(43)
    assert_same(IncrementalPCA(**options).fit(x), PeftPCA(**options).fit(x), 1e-11, 1e-11)


def test_lowrank_gives_what_peft_gives() -> None:
    options = {"n_components": 2, "lowrank": True, "lowrank_seed": 3, "batch_size": 11}
    x = data(40)
    state = torch.get_rng_state()
    ours, theirs = IncrementalPCA(**options).fit(x), PeftPCA(**options).fit(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert ours.lowrank_q == theirs.lowrank_q == 4
    assert_same(ours, theirs, 1e-9, 1e-9)


def test_lists_are_data() -> None:
    rows = data(20, 3).tolist()
    assert_same(IncrementalPCA(2).fit(rows), PeftPCA(2).fit(rows), 1e-5, 1e-5)


@pytest.mark.parametrize("sizes", [[50], [20, 30], [10, 10, 10, 10, 10], [7, 43]])
def test_with_all_components_it_is_exact(sizes: list[int]) -> None:
    """The same as one decomposition of all the data, in whatever batches they come."""
    x = data(50)
    pca = IncrementalPCA()
    for batch in x.split(sizes):
        pca.partial_fit(batch)
    mean = x.mean(0)
    _, values, vectors = torch.linalg.svd(x - mean, full_matrices=False)
    torch.testing.assert_close(pca.mean_, mean)
    torch.testing.assert_close(pca.var_, x.var(0, correction=0))
    torch.testing.assert_close(pca.singular_values_, values)
    torch.testing.assert_close(pca.explained_variance_, values**2 / 49)
    torch.testing.assert_close(pca.explained_variance_ratio_.sum(), torch.tensor(1.0, dtype=F64))
    torch.testing.assert_close((pca.components_ * vectors).sum(1).abs(), torch.ones(6, dtype=F64))
    torch.testing.assert_close(pca.transform(x) @ pca.components_ + mean, x)
    assert (pca.components_.gather(1, pca.components_.abs().argmax(1, keepdim=True)) > 0).all()


def test_the_first_components_are_found_in_batches() -> None:
    x = data(600, 12)
    pca = IncrementalPCA(3, batch_size=50).fit(x)
    _, _, vectors = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    assert ((pca.components_ * vectors[:3]).sum(1).abs() > 0.99).all()


def test_one_batch_of_float32_can_be_transformed() -> None:
    """PEFT multiplies float64 by float32 there, and fails; ours is the projection."""
    x = data(30, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="dtype"):
        PeftPCA(2).fit(x).transform(x)
    pca = IncrementalPCA(2).fit(x)
    torch.testing.assert_close(pca.transform(x), (x.double() - x.double().mean(0)) @ pca.components_.double().T)


def test_slices() -> None:
    for n, size, smallest in itertools.product(range(20), range(1, 8), range(9)):
        want = list(PeftPCA.gen_batches(n, size, smallest))
        assert list(IncrementalPCA.gen_batches(n, size, smallest)) == want


@pytest.mark.parametrize("cls", [IncrementalPCA, PeftPCA])
def test_bad_arguments(cls: Any) -> None:
    with pytest.raises(ValueError, match="n_components must be specified"):
        cls(lowrank=True)
    with pytest.raises(ValueError, match="lowrank_q must be greater"):
        cls(3, lowrank=True, lowrank_q=2)
    with pytest.raises(ValueError, match="n_features=6"):
        cls(7).partial_fit(data(9))
    with pytest.raises(ValueError, match="number of samples 3"):
        cls(5).partial_fit(data(3))
    with pytest.raises(ValueError, match="Number of features"):
        cls(2).partial_fit(data(9)).partial_fit(data(9, 5))
