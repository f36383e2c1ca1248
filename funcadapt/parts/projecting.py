"""Projected gradients: a tensor that stays as it is, and whose gradient loses the part in some directions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from funcadapt._torch import is_compiling


def projected(t: Tensor, basis: Tensor, outside: bool) -> Tensor:
    """`t`, with a projected gradient.

    Args:
        t: (n, k).
        basis: (n, m), orthonormal columns.
        outside: whether the gradient is projected on what is orthogonal to the basis, rather than on its span.

    Returns:
        The same values.

    Example:
        >>> t, basis = torch.ones(2, 1, requires_grad=True), torch.tensor([[1.0], [0.0]])
        >>> projected(t, basis, outside=True).sum().backward()
        >>> t.grad.flatten()
        tensor([0., 1.])
    """
    if is_compiling():  # dynamo takes no function with a forward mode of its own
        through = _project(t, basis, outside)
        return through + (t - through).detach()
    return _Projected.apply(t, basis, outside)  # pyright: ignore


def _project(t: Tensor, basis: Tensor, outside: bool) -> Tensor:
    """The columns of `t` on the span of those of `basis`, or on what is orthogonal to it."""
    on = basis @ (basis.mT @ t)
    return t - on if outside else on


class _Projected(torch.autograd.Function):
    """The identity, whose derivative is a projection: it costs nothing where nothing is differentiated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(t: Tensor, basis: Tensor, outside: bool) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return t.view_as(t)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        _, basis, ctx.outside = inputs
        ctx.save_for_backward(basis)
        ctx.save_for_forward(basis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _project(grad, ctx.saved_tensors[0], ctx.outside), None, None  # a projection is its own adjoint

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _project(tangent, ctx.saved_tensors[0], ctx.outside)
