"""The change that an adapter makes at one site, and its best approximation by LoRA's factors.

With D = W' - W as a matrix (out, in * kernel):

    D = U S V^T        s B A = U_r S_r V_r^T,    A = V_r^T (r, in),    B = U_r S_r / s (out, r)

Experts and the groups of a convolution are blocks, matrices of their own. D is computed in float64, as it is small
beside W, and decomposed in at least float32.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from funcadapt._torch import linalg
from funcadapt.compose import Level, dense_levels
from funcadapt.errors import AdapterError, SiteError
from funcadapt.init import _draw
from funcadapt.layer import Layer
from funcadapt.merge import _join
from funcadapt.methods import lora
from funcadapt.methods.lora import LoraConfig
from funcadapt.parts import lora_leaves, lowrank
from funcadapt.sites import Site

_ROUNDING = 2.0**-50  # of W' - W in float64, relative to W'


class Change(NamedTuple):
    """What changes at one site.

    Attributes:
        left: (blocks, out, columns), or (blocks, out, r) if there is a `right`. Blocks are experts, or groups.
        right: (blocks, r, columns); the change of the weight is scale * left @ right. None where it is `left`.
        scale: a factor, for LoRA's own factors, which are not touched by it.
        bias: (out), or (experts, out): the change of the bias. None if it stays.
        noise: singular values up to this are roundings.
        dtype: that of the new leaves.
    """

    left: Tensor
    right: Tensor | None
    scale: float
    bias: Tensor | None
    noise: float
    dtype: torch.dtype


def change_of(
    level: Level, site: Site, module: nn.Module, below: Mapping[str, Tensor], *, with_bias: bool = False
) -> Change:
    """What an adapter changes at one site.

    Args:
        level: the adapter.
        site: the site.
        module: its module.
        below: weights and biases that are others than the module's, by name.
        with_bias: whether a change of the bias can be held although the layer has none.

    Returns:
        The change: LoRA's factors, or the difference of the dense weights.

    Raises:
        SiteError: if the method has no dense form there, or the base weight is quantised.
    """
    p = level.p
    dtypes = [leaf.dtype for leaf in p.values() if leaf.is_floating_point() and leaf.ndim]
    dtype = functools.reduce(torch.promote_types, dtypes) if dtypes else site.dtype
    if level.method is lora.METHOD:
        left, right, scaling = _factors(site, p, torch.promote_types(dtype, torch.float32))
        shift = p[lowrank.BIAS].double() * scaling.double() if lowrank.BIAS in p else None
        shift = shift if shift is None or shift.any() else None
        return Change(left, right, float(scaling), shift, 0.0 if scaling else math.inf, dtype)
    layer = Layer(site, module, level.config)
    stored, bias = below.get(site.weight_name), layer.bias
    weight = widened(layer.weight if stored is None else layer.canonical(stored), site)
    if site.bias:
        bias = below.get(_join(site.owner, site.bias), bias)
    if bias is None and with_bias and site.kind != "embedding":
        bias = weight.new_zeros(site.out_features)  # LoRA has one where the layer has none
    bias = None if bias is None else bias.double()
    wide = {name: leaf.double() if leaf.is_floating_point() else leaf for name, leaf in p.items()}
    new, new_bias = dense_levels([dataclasses.replace(level, p=wide)], site, module, weight, bias)
    noise = _ROUNDING * float(new.square().sum().sqrt())
    return Change(blocks_of(site, new - weight), None, 1.0, shift_of(bias, new_bias), noise, dtype)


def shift_of(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    """The change of a bias; None if there is none, but for roundings."""
    if new is None or new is old:
        return None
    if old is None:
        return new
    return None if torch.allclose(old, new, rtol=_ROUNDING, atol=0) else new - old


def widened(weight: Tensor, site: Site) -> Tensor:
    """A weight in float64. Raises SiteError if it is quantised."""
    if not weight.is_floating_point():
        raise SiteError(f"The weight at {site.path!r} is quantised ({weight.dtype}): it has no dense form to convert.")
    return weight.double()


def blocks_of(site: Site, weight: Tensor) -> Tensor:
    """A canonical weight as (blocks, out, columns)."""
    if site.stack:
        return weight
    return weight.reshape(site.groups, site.out_features // site.groups, -1)


def _factors(site: Site, p: Mapping[str, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """LoRA's B and A in blocks, (blocks, out, r) and (blocks, r, columns), and the scaling."""
    a, b, scaling = (leaf.to(dtype) for leaf in lowrank.factors(p))
    if not site.stack:
        b = b.reshape(site.groups, site.out_features // site.groups, -1)
        a = a.reshape(site.groups, b.shape[2], -1)
    return b, a, scaling


# -- the factors ------------------------------------------------------------------------------------------


def singular(change: Change) -> tuple[Tensor, Tensor, Tensor]:
    """The singular value decomposition of a change, thin and in at least float32.

    Args:
        change: the change.

    Returns:
        U (blocks, out, n), S (blocks, n) and V^T (blocks, n, columns).
    """
    left, right = change.left, change.right
    wide = torch.promote_types(change.dtype, torch.float32)
    if right is None:
        return linalg.svd(left.to(wide), full_matrices=False)
    if left.shape[2] >= min(left.shape[1], right.shape[2]):
        return linalg.svd(left @ right, full_matrices=False)
    (q_left, r_left), (q_right, r_right) = linalg.qr(left), linalg.qr(right.mT)
    u, s, vh = linalg.svd(r_left @ r_right.mT, full_matrices=False)
    return q_left @ u, s, vh @ q_right.mT


def rank_for(s: Tensor, energy: float, noise: float = 0.0) -> int:
    """The smallest rank whose singular values hold a share of the energy.

    Args:
        s: (blocks, n), in descending order.
        energy: the share of the sum of their squares.
        noise: singular values up to this are none.

    Returns:
        The rank; 0 if there is nothing but roundings.

    Example:
        >>> s = torch.tensor([[3.0, 2.0, 1.0]])  # 9 + 4 + 1
        >>> rank_for(s, 0.6), rank_for(s, 0.9), rank_for(s, 1.0), rank_for(0 * s, 0.9)
        (1, 2, 3, 0)
    """
    power = torch.where(s > noise, s, torch.zeros_like(s)).double().square().sum(0)
    held = power.cumsum(0)
    return int((held < energy * held[-1]).sum()) + 1 if power.any() else 0


def new_leaves(site: Site, change: Change | None, at: LoraConfig, energy: float | None) -> dict[str, Tensor] | None:
    """LoRA's leaves for a change.

    Rows of A and columns of B beyond the rank of the change are those of a new LoRA: they do nothing, and can be
    trained.

    Args:
        site: the site.
        change: the change; None for none.
        at: the config at the site.
        energy: the share of the energy to hold, instead of the config's rank.

    Returns:
        The leaves and the scaling; None if there is no change, and so no rank to hold its energy.

    Raises:
        AdapterError: if there is no scaling that the factors could make up for, or the change is not finite.
        SiteError: if LoRA cannot be there with this config.
    """
    dtype, device = (site.dtype, site.device) if change is None else (change.dtype, change.left.device)
    scaling = lora_leaves.buffers(at)["scaling"].to(dtype=dtype, device=device)
    if not scaling:
        raise AdapterError(f"lora_alpha={at.lora_alpha} makes the scaling 0 at {site.path!r}: no LoRA does anything.")
    if change is not None and not (
        change.left.isfinite().all() and (change.right is None or change.right.isfinite().all())
    ):
        raise AdapterError(f"What is changed at {site.path!r} is not finite.")
    found: tuple[Tensor, Tensor, Tensor] | None = None
    if energy is not None:
        rank = 0
        if change is not None:
            found = singular(change)
            s = found[1]
            roundings = float(s.max()) * torch.finfo(s.dtype).eps * max(found[0].shape[1], found[2].shape[2])
            rank = rank_for(s, energy, max(change.noise, roundings)) * site.groups
        if not rank:
            return None
        at = dataclasses.replace(at, r=rank, rank_pattern={}, alpha_pattern={})
    at = dataclasses.replace(at, init_lora_weights=True)
    fresh = lora.init(site, at, _draw(site, 0, dtype, device), _no_weight)
    params: dict[str, Tensor] = {**fresh.params, "scaling": scaling}
    if change is None:
        return params
    name_a, name_b = lowrank.factor_names(params)
    b, a, s = _factors(site, params, torch.promote_types(dtype, torch.float32))
    left, right = _cut(change, found, a.shape[1])
    left, right = left.to(b) * (change.scale / float(s)), _all_channels(site, right.to(a))
    k = right.shape[1]
    params[name_a] = torch.cat([right, a[:, k:]], 1).reshape(params[name_a].shape).to(dtype)
    params[name_b] = torch.cat([left, b[:, :, k:]], 2).reshape(params[name_b].shape).to(dtype)
    return params


def _no_weight() -> Tensor:
    raise NotImplementedError("a plain init does not look at the weight")


def _cut(change: Change, found: tuple[Tensor, Tensor, Tensor] | None, rank: int) -> tuple[Tensor, Tensor]:
    """The best factors of at most a rank (in each block)."""
    left, right = change.left, change.right
    if right is not None and right.shape[1] <= rank:
        return left, right
    u, s, vh = singular(change) if found is None else found
    return u[:, :, :rank] * s[:, None, :rank], vh[:, :rank]


def _all_channels(site: Site, right: Tensor) -> Tensor:
    """A's rows over all input channels; the dense weight of a group has those of the group only."""
    if site.groups == 1 or right.shape[2] == math.prod(site.shape[1:]) * site.groups:
        return right
    wide = right.new_zeros(site.groups, right.shape[1], site.groups, right.shape[2])
    for group in range(site.groups):
        wide[group, :, group] = right[group]
    return wide.flatten(2)
