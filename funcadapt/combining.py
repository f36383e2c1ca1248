"""The contract between `fa.combine` and a method: what a method is told about one site, and what it answers.

`fa.combine` knows no method. It goes through the union of the adapters' sites, and asks the method for the leaves of
the new adapter at each: `Method.algebra.combine(recipe, spot)`. A method without `algebra` combines nothing.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from funcadapt import _torch, sparsify
from funcadapt.drawing import uniform
from funcadapt.errors import AdapterError
from funcadapt.method import Fresh, Leaf

SPARSE = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
COMBINATIONS = ("linear", "cat", "svd", *SPARSE, *(f"{name}_svd" for name in SPARSE))


class Member(NamedTuple):
    """One of the adapters, at one site.

    Attributes:
        config: its config.
        p: its leaves there, params and buffers.
        w: its weight, a number or a 0-d tensor.
    """

    config: Any
    p: Leaf
    w: float | Tensor


class Spot(NamedTuple):
    """One site.

    Attributes:
        path: the site's path.
        members: the adapters that have something there, at least one.
        absent: the weights of the others.
        config: the config of the new adapter, ranks and alphas aside.
        base: gives the base weight in canonical form, (out, in, *kernel), experts first. Raises AdapterError if
            `fa.combine` was given no model.
    """

    path: str
    members: Sequence[Member]
    absent: Sequence[float | Tensor]
    config: Any
    base: Callable[[], Tensor]

    @property
    def alone(self) -> bool:
        """Whether one adapter is all there is."""
        return len(self.members) == 1 and not self.absent

    def weights(self, like: Tensor) -> Tensor:
        """The weights of the members, (n), in a dtype and on a device."""
        return torch.stack([as_scalar(member.w, like) for member in self.members])


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to combine, the same at every site. See `fa.combine` for the fields.

    Attributes:
        name: one of `COMBINATIONS`.
        rank: the largest rank among the adapters: that of an SVD where `svd_rank` does not say another.
        svd_rank: the rank that was asked for, or None.
        svd_clamp: as in `fa.combine`.
        svd_full_matrices: as in `fa.combine`.
        svd_driver: as in `fa.combine`.
        density: as in `fa.combine`.
        majority_sign_method: as in `fa.combine`.
        seed: as in `fa.combine`.
    """

    name: str
    rank: int
    svd_rank: int | None = None
    svd_clamp: float | None = None
    svd_full_matrices: bool = True
    svd_driver: str | None = None
    density: float | None = None
    majority_sign_method: str = "total"
    seed: int | None = 0

    @property
    def is_svd(self) -> bool:
        """Whether the sum is taken of whole updates, and cut to a rank."""
        return self.name.endswith("svd")

    @property
    def exact(self) -> bool:
        """Whether the new adapter must do what the sum does, a cut rank aside."""
        return self.name == "cat" or self.is_svd

    def merge(self, tensors: Sequence[Tensor], weights: Tensor, where: str, *, each: bool = False) -> Tensor:
        """The sum of task tensors, sparse if the recipe says so.

        Args:
            tensors: n tensors of one shape.
            weights: (n).
            where: what they are: the random masks depend on it and on the seed.
            each: whether the first axis counts tensors of their own (experts), which are sorted and elected apart.

        Returns:
            The merged tensor.
        """
        step = self.name.removesuffix("_svd")
        if step not in SPARSE:
            return sparsify.task_arithmetic(tensors, weights)
        density = self.density
        assert density is not None  # `fa.combine` checks it
        function: Callable[..., Tensor] = getattr(sparsify, step)
        options: dict[str, Any] = {"density": density}
        if step.endswith("ties"):
            options["majority_sign_method"] = self.majority_sign_method
        arguments = (list(tensors),)
        if step.startswith("dare"):
            function = functools.partial(_masked, function)
            arguments = (list(tensors), [self._mask(t, density, f"{where}:{i}") for i, t in enumerate(tensors)])
        call = functools.partial(function, weights=weights, **options)
        return torch.func.vmap(call)(*arguments) if each else call(*arguments)

    def _mask(self, tensor: Tensor, density: float, where: str) -> Tensor:
        if self.seed is None:
            return torch.bernoulli(torch.full_like(tensor, density))
        return uniform(self.seed, where, tensor.shape, tensor.device) < density


def _masked(function: Callable[..., Tensor], tensors: list[Tensor], masks: list[Tensor], **options: Any) -> Tensor:
    return function(tensors, masks=masks, **options)


class CombineFn(Protocol):
    """`combine`: the leaves of several adapters at one site -> those of the new one."""

    def __call__(self, recipe: Recipe, spot: Spot) -> Fresh:
        """Return the leaves.

        Must hold: "cat" and "svd" at full rank give the sum of what the weighted members change, exactly; one adapter
        with weight 1 gives the same effect under every recipe. What cannot be is an AdapterError that says why.

        Args:
            recipe: how.
            spot: the site and the adapters there.
        """
        ...


def _unchanged(configs: Sequence[Any], merged: Any) -> Any:
    return merged


@dataclasses.dataclass(frozen=True)
class Algebra:
    """How adapters of a method are combined.

    Attributes:
        combine: the leaves of the new adapter at one site.
        config: (configs of the adapters, the first with targets united) -> the config of the new adapter, for fields
            that only this method has. Raises AdapterError if they do not go together. Ranks and alphas come from
            `Method.describe`.
    """

    combine: CombineFn
    config: Callable[[Sequence[Any], Any], Any] = _unchanged


def as_scalar(w: float | Tensor, like: Tensor) -> Tensor:
    """A weight as a 0-d tensor in the dtype and on the device of another tensor."""
    if isinstance(w, Tensor):
        return w.to(like)
    return torch.full((), w, dtype=like.dtype, device=like.device)


def sums_to_one(weights: Sequence[float | Tensor]) -> bool:
    """Whether weights are known to sum to one: numbers, or tensors whose value is there and is no variable."""
    tensors = [w for w in weights if isinstance(w, Tensor)]
    if tensors and (_torch.values_unknown() or any(w.requires_grad for w in tensors)):
        return False
    return abs(sum(float(w) for w in weights) - 1) < 1e-6


def united(values: Sequence[Any], field: str) -> Any:
    """The union of what several configs name: PEFT's rule.

    Args:
        values: lists of names (tuples, as configs hold them), regular expressions, or None.
        field: the field, for the error message.

    Returns:
        The names in order, or one regular expression for all.

    Raises:
        AdapterError: if some are lists and some are regular expressions.

    Example:
        >>> united([("q", "v"), None, ("v", "up")], "target_modules"), united(["a.*", "b"], "target_modules")
        (('q', 'v', 'up'), '(a.*)|(b)')
    """
    values = list(dict.fromkeys(values))
    if len(values) == 1:
        return values[0]
    given = [value for value in values if value is not None]
    if all(isinstance(value, str) for value in given):
        return "|".join(f"({value})" for value in given) if len(given) > 1 else given[0]
    if any(isinstance(value, str) for value in given):
        raise AdapterError(
            f"all adapter configs should follow the same target modules type. Combining adapters with `{field}` type "
            f"being a mix of list/set and string is not supported, got {' and '.join(map(repr, given))}."
        )
    return tuple(dict.fromkeys(name for names in given for name in names))


def same_shapes(path: str, shapes: Sequence[Mapping[str, tuple[int, ...]]]) -> None:
    """Refuse members whose leaves were made for different layers.

    Args:
        path: the site.
        shapes: for each adapter there, leaf name -> the part of its shape that must agree.

    Raises:
        AdapterError: if they differ.
    """
    for other in shapes[1:]:
        if other != shapes[0]:
            raise AdapterError(
                f"The adapters do not fit each other at {path!r}: {_shown(shapes[0])} in one, {_shown(other)} in "
                "another. Were they made for one model?"
            )


def _shown(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in shapes.items())
