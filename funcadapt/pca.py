"""Principal components of data that comes in batches.

Each batch is reduced, together with the components so far, by one singular value decomposition of

    [ diag(s) C ]            s, C: singular values and components so far
    [ X - mean(X) ]          X: the batch
    [ sqrt(n m / (n + m)) (mean so far - mean(X)) ]          n, m: how many samples so far, and in the batch

whose right singular vectors are the new components. With no component dropped this is exact.

Source: Ross et al. 2008, "Incremental Learning for Robust Visual Tracking", as scikit-learn's `IncrementalPCA` has it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Self

import torch
from torch import Tensor

from funcadapt._torch import fork_rng, linalg


class IncrementalPCA:
    """Principal component analysis in batches, with PEFT's arguments and results.

    Args:
        n_components: how many components to keep; None: as many as the first batch has samples or features.
        copy: PEFT overwrites the data if this is False. Here data is never changed.
        batch_size: the size of the batches of `fit`; None: 5 times the number of features.
        svd_driver: cuSOLVER's method for `torch.linalg.svd`, on CUDA only.
        lowrank: whether to use `torch.svd_lowrank`, which is faster and approximate.
        lowrank_q: its number of vectors; None: `2 * n_components`.
        lowrank_niter: its number of iterations.
        lowrank_seed: its seed.

    Attributes:
        components_: (n_components, features), the directions of the largest variance.
        singular_values_: of the centred data, one for each component.
        explained_variance_: the variance along each component.
        explained_variance_ratio_: the same, as a share of the total.
        mean_: (features,), in float64.
        var_: (features,), in float64, with the number of samples as denominator.
        noise_variance_: the mean variance along the components that were dropped.
        n_samples_seen_: a tensor of shape (1,).
        n_features_: the number of features; None before the first batch.

    Raises:
        ValueError: if the number of vectors of `lowrank` is missing or too small.

    Example:
        >>> import torch
        >>> from funcadapt.pca import IncrementalPCA
        >>> x = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
        >>> pca = IncrementalPCA(n_components=1).fit(x)
        >>> pca.components_
        tensor([[1., 0.]])
        >>> pca.transform(x).flatten()
        tensor([ 3., -3.,  0.,  0.], dtype=torch.float64)
    """

    components_: Tensor
    singular_values_: Tensor
    explained_variance_: Tensor
    explained_variance_ratio_: Tensor
    noise_variance_: Tensor
    mean_: Tensor
    var_: Tensor
    n_samples_seen_: Tensor

    def __init__(
        self,
        n_components: int | None = None,
        copy: bool | None = True,
        batch_size: int | None = None,
        svd_driver: str | None = None,
        lowrank: bool = False,
        lowrank_q: int | None = None,
        lowrank_niter: int = 4,
        lowrank_seed: int | None = None,
    ) -> None:
        self.n_components = n_components
        self.copy = copy
        self.batch_size = batch_size
        self.svd_driver = svd_driver
        self.lowrank = lowrank
        self.lowrank_q = lowrank_q
        self.lowrank_niter = lowrank_niter
        self.lowrank_seed = lowrank_seed
        self.n_features_: int | None = None
        if lowrank and lowrank_q is None:
            if n_components is None:
                raise ValueError("n_components must be specified when using lowrank mode with lowrank_q=None.")
            self.lowrank_q = n_components * 2
        elif lowrank and n_components is not None and lowrank_q is not None and lowrank_q < n_components:
            raise ValueError(
                f"lowrank_q must be greater than or equal to n_components, got {lowrank_q} and {n_components}."
            )

    def fit(self, X: Any, check_input: bool = True) -> Self:  # noqa: N803 - PEFT's name, which may be a keyword
        """Take in data, in batches of `batch_size`, beside what was taken in before.

        Args:
            X: (samples, features).
            check_input: whether to check and convert it.

        Returns:
            This object.
        """
        x = self._checked(X) if check_input else X
        if self.batch_size is None:
            self.batch_size = 5 * x.shape[1]
        for rows in self.gen_batches(x.shape[0], self.batch_size, min_batch_size=self.n_components or 0):
            self.partial_fit(x[rows], check_input=False)
        return self

    def partial_fit(self, X: Any, check_input: bool = True) -> Self:  # noqa: N803
        """Take in one batch.

        Args:
            X: (samples, features).
            check_input: whether to check and convert it.

        Returns:
            This object.

        Raises:
            ValueError: if the batch has another number of features than those before, or fewer samples or features
                than there are components.
        """
        x: Tensor = self._checked(X) if check_input else X
        samples, features = x.shape
        first = self.n_features_ is None
        if first:
            self.n_features_ = features
            self.n_components = self.n_components or min(samples, features)
        elif features != self.n_features_:
            raise ValueError(
                f"Number of features of the new batch does not match the number of features of the first batch: got "
                f"{features}, expected {self.n_features_}."
            )
        count = torch.tensor([samples], device=x.device)
        # the mean is taken in float64, and what is left of it in the centred batch counts, too
        mean = x.sum(dim=0, dtype=torch.float64) / count
        centred = x - mean
        squares = centred.square().sum(dim=0) - centred.sum(dim=0).square() / count
        if first:
            stacked, total, new_mean = centred.to(x.dtype), count, mean
        else:
            seen = self.n_samples_seen_
            total, shift = seen + count, self.mean_ - mean
            weight = seen.double() * count / total
            stacked = torch.vstack((self.singular_values_[:, None] * self.components_, centred, weight.sqrt() * shift))
            new_mean = (self.mean_ * seen + mean * count) / total
            squares = squares + self.var_ * seen + weight * shift.square()
        values, vectors = self._decompose(stacked)
        kept = self.n_components
        assert kept is not None
        variance = values.square() / (total - 1)
        self.mean_, self.var_, self.n_samples_seen_ = new_mean, squares / total, total
        self.components_, self.singular_values_ = vectors[:kept], values[:kept]
        self.explained_variance_ = variance[:kept]
        self.explained_variance_ratio_ = values[:kept].square() / squares.sum()
        self.noise_variance_ = (
            torch.tensor(0.0, device=x.device) if kept in (samples, features) else variance[kept:].mean()
        )
        return self

    def transform(self, X: Tensor) -> Tensor:  # noqa: N803
        """Data in the coordinates of the components.

        Args:
            X: (samples, features).

        Returns:
            (samples, n_components), in float64.
        """
        return (X - self.mean_) @ self.components_.to(self.mean_.dtype).T

    @staticmethod
    def gen_batches(n: int, batch_size: int, min_batch_size: int = 0) -> Iterator[slice]:
        """Slices of `batch_size` that together are `range(n)`; the last is larger, if the rest would be too small.

        Args:
            n: how many there are.
            batch_size: the size of a slice.
            min_batch_size: the smallest size of the last slice.

        Yields:
            The slices.

        Example:
            >>> from funcadapt.pca import IncrementalPCA
            >>> list(IncrementalPCA.gen_batches(7, 3, min_batch_size=2))
            [slice(0, 3, None), slice(3, 7, None)]
        """
        start = 0
        while start + batch_size + min_batch_size <= n and start + batch_size <= n:
            yield slice(start, start + batch_size)
            start += batch_size
        if start < n:
            yield slice(start, n)

    def _checked(self, data: Any) -> Tensor:
        x = data if isinstance(data, Tensor) else torch.tensor(data, dtype=torch.float32)
        samples, features = x.shape
        if self.n_components is not None and self.n_components > features:
            raise ValueError(
                f"n_components={self.n_components} invalid for n_features={features}, need more rows than columns for "
                "IncrementalPCA processing."
            )
        if self.n_components is not None and self.n_components > samples:
            raise ValueError(
                f"n_components={self.n_components} must be less or equal to the batch number of samples {samples}"
            )
        return x if x.dtype in (torch.float32, torch.float64) else x.to(torch.float32)

    def _decompose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Singular values, and right singular vectors as rows; the largest entry of each vector is positive."""
        if self.lowrank:
            with fork_rng(enabled=self.lowrank_seed is not None):
                if self.lowrank_seed is not None:
                    torch.manual_seed(self.lowrank_seed)  # pyright: ignore
                _, values, columns = torch.svd_lowrank(x, q=self.lowrank_q, niter=self.lowrank_niter)  # pyright: ignore
                vectors = columns.mH
        else:
            _, values, vectors = linalg.svd(x, full_matrices=False, driver=self.svd_driver)
        largest = vectors.abs().argmax(dim=1, keepdim=True)
        return values, vectors * vectors.gather(1, largest).sign()
