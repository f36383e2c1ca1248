"""Sparse sums of tensors: pruning, TIES, DARE, task arithmetic. Pure functions, with PEFT's names and meanings.

A task tensor is what one adapter adds somewhere. `fa.combine` applies these functions at each site, to LoRA's factors
or to whole updates; they hold on any tensors.

Source: TIES arXiv:2306.01708, DARE arXiv:2311.03099, task arithmetic arXiv:2212.04089. Differs from PEFT: nothing is
done in place, so that everything runs under `torch.func`; the random masks may be given; dropping every value and
rescaling by 1 / 0 is an error, not NaN.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

SIGNS = ("total", "frequency")
PRUNINGS = ("magnitude", "random")


def reshape_weight_task_tensors(task_tensors: Tensor, weights: Tensor) -> Tensor:
    """Weights with trailing axes of size 1, so that they multiply stacked task tensors.

    Args:
        task_tensors: (n, ...).
        weights: (n).

    Returns:
        (n, 1, ...).
    """
    return weights.reshape(weights.shape + (1,) * (task_tensors.dim() - weights.dim()))


def magnitude_based_pruning(tensor: Tensor, density: float) -> Tensor:
    """The values of largest magnitude, zeros elsewhere.

    Args:
        tensor: the tensor.
        density: the fraction of values to keep, rounded down to whole values.

    Returns:
        The pruned tensor.

    Example:
        >>> magnitude_based_pruning(torch.tensor([1.0, -4.0, 3.0, 2.0]), 0.5)
        tensor([ 0., -4.,  3.,  0.])
    """
    flat = tensor.reshape(-1)
    kept = torch.topk(flat.abs(), k=int(density * flat.numel())).indices
    return tensor * torch.zeros_like(flat).scatter(0, kept, 1.0).reshape(tensor.shape)


def random_pruning(tensor: Tensor, density: float, rescale: bool, mask: Tensor | None = None) -> Tensor:
    """Random values, zeros elsewhere.

    Args:
        tensor: the tensor.
        density: the probability of keeping a value.
        rescale: whether to divide by the density, which keeps the expectation.
        mask: what is kept, of the tensor's shape; by default drawn from torch's global generator.

    Returns:
        The pruned tensor.
    """
    if mask is None:
        mask = torch.bernoulli(torch.full_like(tensor, density))
    kept = tensor * mask.to(tensor.dtype)
    return kept / density if rescale else kept


def prune(tensor: Tensor, density: float, method: str, rescale: bool = False, mask: Tensor | None = None) -> Tensor:
    """A tensor with a part of its values set to zero.

    Args:
        tensor: the tensor.
        density: the fraction of values to keep, in [0, 1]. From 1 on, nothing is pruned and a warning says so.
        method: "magnitude" keeps the largest values, "random" any.
        rescale: whether random pruning divides by the density.
        mask: as in `random_pruning`.

    Returns:
        The pruned tensor.

    Raises:
        ValueError: if the density is negative, or 0 where the result would be divided by it, or the method is unknown.
    """
    if density >= 1:
        warnings.warn(
            f"The density {density} is greater than or equal to 1, no pruning will be performed.", stacklevel=2
        )
        return tensor
    if density < 0:
        raise ValueError(f"Density should be >= 0, got {density}")
    if method == "magnitude":
        return magnitude_based_pruning(tensor, density)
    if method == "random":
        if rescale and density == 0:
            raise ValueError("A density of 0 drops every value, and the rest cannot be rescaled by 1 / 0.")
        return random_pruning(tensor, density, rescale, mask)
    raise ValueError(f"Unknown method {method!r}. It is one of {', '.join(map(repr, PRUNINGS))}.")


def calculate_majority_sign_mask(tensor: Tensor, method: str = "total") -> Tensor:
    """Which values have the sign that most of the task tensors have at that place.

    Args:
        tensor: the stacked task tensors, (n, ...).
        method: "total" takes the sign of the sum, "frequency" the sign that occurs most often. Ties are positive.

    Returns:
        Of the tensor's shape, boolean. False where a value is zero.

    Raises:
        RuntimeError: if the method is unknown.

    Example:
        >>> calculate_majority_sign_mask(torch.tensor([[1.0, -1.0], [-3.0, -1.0], [1.0, 0.0]]), "frequency")
        tensor([[ True,  True],
                [False,  True],
                [ True, False]])
    """
    sign = tensor.sign()
    if method == "total":
        majority = tensor.sum(dim=0)
    elif method == "frequency":
        majority = sign.sum(dim=0)
    else:
        raise RuntimeError(f"Unimplemented mask method {method!r}. It is one of {', '.join(map(repr, SIGNS))}.")
    return sign == torch.where(majority >= 0, 1, -1)


def disjoint_merge(task_tensors: Tensor, majority_sign_mask: Tensor) -> Tensor:
    """The mean of the values that a mask keeps, place by place; 0 where it keeps none.

    Args:
        task_tensors: (n, ...).
        majority_sign_mask: of the same shape, see `calculate_majority_sign_mask`.

    Returns:
        The merged tensor, without the first axis.
    """
    return (task_tensors * majority_sign_mask).sum(dim=0) / majority_sign_mask.sum(dim=0).clamp(min=1)


def task_arithmetic(task_tensors: Sequence[Tensor], weights: Tensor) -> Tensor:
    """The weighted sum.

    Args:
        task_tensors: n tensors of one shape.
        weights: (n).

    Returns:
        The sum.
    """
    stacked = torch.stack([*task_tensors])
    return (stacked * reshape_weight_task_tensors(stacked, weights)).sum(dim=0)


def magnitude_prune(task_tensors: Sequence[Tensor], weights: Tensor, density: float) -> Tensor:
    """The weighted sum of the largest values of each.

    Args:
        task_tensors: n tensors of one shape.
        weights: (n).
        density: the fraction of each that is kept.

    Returns:
        The sum.
    """
    return task_arithmetic([prune(tensor, density, "magnitude") for tensor in task_tensors], weights)


def ties(
    task_tensors: Sequence[Tensor], weights: Tensor, density: float, majority_sign_method: str = "total"
) -> Tensor:
    """TIES: trim to the largest values, elect a sign at each place, average the values of that sign.

    Args:
        task_tensors: n tensors of one shape.
        weights: (n), applied after the election.
        density: the fraction of each that is kept.
        majority_sign_method: as in `calculate_majority_sign_mask`.

    Returns:
        The merged tensor.

    Example:
        >>> ties([torch.tensor([3.0, 1.0]), torch.tensor([-1.0, 1.0])], torch.ones(2), density=0.99)
        tensor([3., 0.])
    """
    return _elected([prune(tensor, density, "magnitude") for tensor in task_tensors], weights, majority_sign_method)


def dare_linear(
    task_tensors: Sequence[Tensor], weights: Tensor, density: float, masks: Sequence[Tensor] | None = None
) -> Tensor:
    """DARE: drop values at random, rescale the rest, take the weighted sum.

    Args:
        task_tensors: n tensors of one shape.
        weights: (n).
        density: the probability of keeping a value.
        masks: what is kept of each; by default drawn from torch's global generator.

    Returns:
        The sum. Its expectation over the masks is that of `task_arithmetic`.
    """
    return task_arithmetic(_dropped(task_tensors, density, masks), weights)


def dare_ties(
    task_tensors: Sequence[Tensor],
    weights: Tensor,
    density: float,
    majority_sign_method: str = "total",
    masks: Sequence[Tensor] | None = None,
) -> Tensor:
    """DARE's pruning, then the election and the mean of TIES.

    Args:
        task_tensors: n tensors of one shape.
        weights: (n).
        density: the probability of keeping a value.
        majority_sign_method: as in `calculate_majority_sign_mask`.
        masks: as in `dare_linear`.

    Returns:
        The merged tensor.
    """
    return _elected(_dropped(task_tensors, density, masks), weights, majority_sign_method)


def _dropped(task_tensors: Sequence[Tensor], density: float, masks: Sequence[Tensor] | None) -> list[Tensor]:
    given: Sequence[Tensor | None] = [None] * len(task_tensors) if masks is None else masks
    return [prune(t, density, "random", True, mask) for t, mask in zip(task_tensors, given, strict=True)]


def _elected(task_tensors: Sequence[Tensor], weights: Tensor, majority_sign_method: str) -> Tensor:
    stacked = torch.stack([*task_tensors])
    mask = calculate_majority_sign_mask(stacked, majority_sign_method)
    return disjoint_merge(stacked * reshape_weight_task_tensors(stacked, weights), mask)
