"""What the formulas of methods are made of: the weight as a matrix, and updates added to a layer's output.

An update is a product of two thin matrices (`add_product`), a matrix with few entries (`add_sparse`), or a weight like
the layer's own (`add_weight`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from funcadapt._torch import is_compiling, unflatten
from funcadapt.errors import SiteError
from funcadapt.layer import Layer
from funcadapt.method import Draw
from funcadapt.sites import Site

KINDS = frozenset({"linear", "hf_conv1d", "embedding", "conv1d", "conv2d", "conv3d", "mha", "parameter", "experts"})
"""Every kind of layer: for methods whose formula has a meaning at all of them."""


def matrix(site: Site) -> tuple[int, int]:
    """The sizes of the weight as a matrix, (out, in)."""
    return site.out_features, columns(site)


def columns(site: Site) -> int:
    """How many columns the base weight has as a matrix with a row for every output."""
    return math.prod(site.shape[1:])


def kaiming(draw: Draw, *shape: int) -> Tensor:
    """PEFT's `kaiming_uniform_(a=sqrt(5))`: uniform, bounded by one over the root of the inputs."""
    return draw.uniform(*shape, bound=1 / math.sqrt(math.prod(shape[1:])))


def refuse_dropout(site: Site, field: str, rate: float) -> None:
    """Raise SiteError where dropout cannot act."""
    if rate and site.kind in ("parameter", "experts"):
        raise SiteError(f"{field}={rate} cannot act at the plain parameter {site.path!r}: it is applied through its "
                        f"weight. Set {field}=0.")  # fmt: skip


def add_product(layer: Layer, x: Tensor, y: Tensor, a: Tensor, b: Tensor, shift: Tensor | None = None) -> Tensor:
    """Y + B (A x + shift) for factors of a layer's weight as a matrix, without that matrix.

    Args:
        layer: the layer.
        x: its input.
        y: its output.
        a: (n, columns): inputs, or inputs of a group times kernel.
        b: (out, n).
        shift: (n), where the bias changes too.

    Returns:
        Of y's shape and dtype.
    """
    site = layer.site
    if site.kind in ("linear", "hf_conv1d") and x.dim() > 1 and x.dtype == a.dtype:
        rows = x.reshape(-1, x.shape[-1])
        h = torch.mm(rows, a.t()) if shift is None else torch.addmm(shift, rows, a.t())
        if h.dtype == y.dtype:  # else the base layer answered in another dtype, or autocast is on
            return torch.addmm(y.reshape(-1, y.shape[-1]), h, b.t()).view(y.shape)  # the view: it would broadcast y
        return (y + F.linear(h, b).view(y.shape)).to(y.dtype)
    if x.is_floating_point() and x.dtype != a.dtype:
        x = x.to(a.dtype)
    spatial, n = site.shape[2:], a.shape[0]
    a, b = a.reshape(n, *site.shape[1:]), b.reshape(site.out_features, b.shape[1], *(1,) * len(spatial))
    lead = x.shape[: -len(spatial) - 1]
    if site.groups > 1:  # every group has the same A: groups become rows, and then channels again
        x = x.reshape(-1, site.in_features // site.groups, *x.shape[-len(spatial) :])
    h = layer.linear(x, a)
    if shift is not None:
        h = h + shift.reshape(n, *(1,) * len(spatial))
    if site.groups > 1:
        h = h.reshape(*lead, site.groups * n, *h.shape[2:])
    return (y + layer.pointwise(h, b)).to(y.dtype)


def add_products(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Any:
    """Y + (B A) x for N adapters at once at a linear layer, without a temporary of the output's size.

    Args:
        x: (N * rows, ..., in).
        y: (N * rows, ..., out).
        a: (N, r, in).
        b: (N, out, r).

    Returns:
        Of y's shape; NotImplemented if the dtypes differ.
    """
    same = a.dtype == b.dtype == x.dtype == y.dtype and not autocasts(x.device)
    if not same:
        return NotImplemented
    n, width = a.shape[0], x.shape[-1]
    h = torch.bmm(x.reshape(n, -1 if x.numel() else 0, width), a.transpose(1, 2))
    return torch.baddbmm(y.reshape(n, h.shape[1], y.shape[-1]), h, b.transpose(1, 2)).view(y.shape)


def add_weight(layer: Layer, x: Tensor, y: Tensor, delta: Tensor) -> Tensor:
    """The output of the base layer plus that of another weight of its shape, in groups if it has some.

    Args:
        layer: the layer.
        x: its input.
        y: its output.
        delta: canonical, (out, in / groups, *kernel).

    Returns:
        The sum, in y's dtype.
    """
    site = layer.site
    if x.is_floating_point() and x.dtype != delta.dtype:
        x = x.to(delta.dtype)
    if site.kind in ("linear", "hf_conv1d") and x.dim() > 1 and x.dtype == y.dtype:
        # one fused product: no temporary of the output's size
        return torch.addmm(y.reshape(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), delta.t()).view(y.shape)
    if site.groups == 1:
        return (y + layer.linear(x, delta)).to(y.dtype)
    channels = x.dim() - len(site.shape) + 1
    rows, parts = unflatten(delta, 0, (site.groups, -1)), unflatten(x, channels, (site.groups, -1))
    out = torch.func.vmap(layer.linear, (channels, 0), channels)(parts, rows)
    return (y + out.flatten(channels, channels + 1)).to(y.dtype)


def sparse(sizes: tuple[int, int], at: Tensor, values: Tensor) -> Tensor:
    """A matrix with values (n) at places (2, n), and zeros."""
    return add_entries(values.new_zeros(sizes), flat(sizes, at), values)


def flat(sizes: tuple[int, int], at: Tensor) -> Tensor:
    """Places (2, n) of a matrix (out, in) as numbers; what is in no column becomes a place outside of the matrix."""
    out, inputs = sizes
    rows, columns = at
    return torch.where(columns < inputs, rows * inputs + columns, out * inputs)


def add_entries(weight: Tensor, places: Tensor, values: Tensor) -> Tensor:
    """A weight with values (n) added at places (n) of all its numbers. A place outside of it raises."""
    wide = torch.promote_types(weight.dtype, values.dtype)
    return weight.to(wide).reshape(-1).scatter_add(0, places, values.to(wide)).reshape(weight.shape)


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for a device; the meta device has none."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def product(a: Tensor, b: Tensor) -> Tensor:
    """A B in the dtype that promotes both, (n, k) times (k, m)."""
    wide = torch.promote_types(a.dtype, b.dtype)
    return a.to(wide) @ b.to(wide)


def certain(condition: Any) -> bool:
    """Whether a condition on sizes holds; False where a compiler that does not know the sizes would have to guess.

    For a choice between forms that give the same: with a guard on the size there would be a graph for each of them, and
    `torch.export` takes none.

    Args:
        condition: a bool, or what dynamo or export has in its place.

    Returns:
        The condition, or False.
    """
    if not is_compiling() and type(condition) is bool:
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # loads sympy

    return statically_known_true(condition)


def is_dense(layer: Layer, n: int, x: Tensor, gain: int = 1) -> bool:
    """Whether an update of n entries is better made as a matrix than entry by entry for each token of an input.

    Args:
        layer: the layer.
        n: how many entries.
        x: its input. Of embeddings and convolutions there is only the matrix.
        gain: how much longer the matrix takes than to put the entries into one.

    Returns:
        The answer; False for as many tokens as a compiler does not know.
    """
    site = layer.site
    if site.kind == "embedding" or len(site.shape) > 2:
        return True
    out, inputs = matrix(site)
    return certain(2 * n * (x.numel() // max(1, inputs)) >= gain * out * inputs)


def add_sparse(y: Tensor, x: Tensor, at: Tensor, values: Tensor) -> Tensor:
    """Y + S x without the matrix S, in 32 bits at least: the sums have many terms, and are made one by one."""
    wide = torch.promote_types(torch.promote_types(values.dtype, y.dtype), torch.float32)
    terms = x.index_select(-1, at[1]).to(wide) * values.to(wide)
    return y.to(wide).scatter_add(-1, at[0].expand(terms.shape), terms)  # several times faster than index_add
