"""Algebra of low-rank updates: LoRA's part of `fa.combine`, in one form for every kind of layer.

At a site the update is s * B A. Here both factors have a leading axis of blocks, A (blocks, r, columns) and
B (blocks, out, r): the experts of a parameter, or the groups of a convolution, each of which maps its own inputs with
its own ranks; one block otherwise. Columns are inputs times kernel. So a convolution in any number of dimensions and
a stack of experts are nothing special below.

With v_i = w_i s_i, weight times scaling, the new factors (their scaling is 1) are

    linear   A = sum sign(v_i) sqrt|v_i| A_i,  B = sum sqrt|v_i| B_i     as in PEFT; the product has cross terms
    ties, dare_linear, dare_ties, magnitude_prune                        likewise, with sparse sums
    cat      A = [v_i A_i],  B = [B_i]                                   the exact sum, of rank sum r_i
    svd      the best approximation of sum v_i B_i A_i of a rank
    ..._svd  the same of a sparse sum of the s_i B_i A_i

Cost: of cat and linear that of reading the factors; of svd two QRs of (out, R) and (columns, R) and an SVD of (R, R),
R = sum r_i, where PEFT takes the SVD of (out, columns): measured on one core, 0.02 s and 11 s at width 2048, R = 32.
The sparse ones that end in svd have no factors to work on, and cost what PEFT's do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcadapt._torch import linalg
from funcadapt.combining import Algebra, Recipe, Spot, as_scalar, same_shapes
from funcadapt.errors import AdapterError, SiteError
from funcadapt.method import Fresh, Leaf

BIAS = "lora_B_bias"


class Update(NamedTuple):
    """One adapter's update at one site, in at least float32.

    Attributes:
        a: (blocks, r, columns).
        b: (blocks, out, r).
        s: the scaling, 0-d.
        w: the weight, 0-d.
    """

    a: Tensor
    b: Tensor
    s: Tensor
    w: Tensor

    @property
    def v(self) -> Tensor:
        """Weight times scaling."""
        return self.w * self.s


def factor_names(p: Leaf) -> tuple[str, str]:
    """The names of A and B: an embedding has others."""
    return ("lora_A", "lora_B") if "lora_A" in p else ("lora_embedding_A", "lora_embedding_B")


def factors(p: Leaf) -> tuple[Tensor, Tensor, Tensor]:
    """A, B and the scaling."""
    name_a, name_b = factor_names(p)
    return p[name_a], p[name_b], p["scaling"]


def has_experts(a: Tensor, b: Tensor, r: int) -> bool:
    """Whether factors of rank r have a leading axis of experts, rather than that of a 1-D convolution's kernel."""
    return a.ndim == 3 and a.shape[:2] == (b.shape[0], b.shape[2]) and a.shape[1] == r


def updates(spot: Spot) -> list[Update]:
    """The members of a spot in block form.

    Args:
        spot: the site.

    Returns:
        Their updates.

    Raises:
        AdapterError: if they were made for different layers.
    """
    found: list[Update] = []
    shapes: list[dict[str, tuple[int, ...]]] = []
    for config, p, w in spot.members:
        a, b, s = factors(p)
        r = config.rank(p)
        if has_experts(a, b, r):
            inner, outer = (a.shape[0], *a.shape[2:]), tuple(b.shape[:2])
            blocks = a.shape[0]
        else:
            inner, outer = tuple(a.shape[1:]), (b.shape[0],)
            blocks = r // b.shape[1]
        shapes.append(dict(zip(factor_names(p), (inner, (*outer, blocks)), strict=True)))
        wide = torch.promote_types(a.dtype, torch.float32)
        a = a.to(wide).reshape(blocks, r if has_experts(a, b, r) else r // blocks, -1)
        b = b.to(wide).reshape(blocks, -1, a.shape[1])
        found.append(Update(a, b, s.to(b), as_scalar(w, b)))
    same_shapes(spot.path, shapes)
    return found


def leaves(spot: Spot, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """New factors as the leaves of the site.

    Args:
        spot: the site.
        a: (blocks, r, columns).
        b: (blocks, out, r).

    Returns:
        The two leaves, of the shapes that the site has.
    """
    config, p, _ = spot.members[0]
    old_a, old_b, _ = factors(p)
    name_a, name_b = factor_names(p)
    dtype = dtype_of(spot)
    if has_experts(old_a, old_b, config.rank(p)):
        shape_a, shape_b = a.shape, b.shape
    else:
        shape_a = (a.shape[0] * a.shape[1], *old_a.shape[1:])
        shape_b = (old_b.shape[0], b.shape[2], *old_b.shape[2:])
    return {name_a: a.reshape(shape_a).to(dtype), name_b: b.reshape(shape_b).to(dtype)}


def dtype_of(spot: Spot) -> torch.dtype:
    """The dtype that holds the factors of all members."""
    dtypes = [factors(member.p)[0].dtype for member in spot.members]
    wide = dtypes[0]
    for dtype in dtypes[1:]:
        wide = torch.promote_types(wide, dtype)
    return wide


def combined(recipe: Recipe, spot: Spot, found: Sequence[Update]) -> tuple[Tensor, Tensor]:
    """The factors of the new update, in block form; their scaling is 1.

    Args:
        recipe: how.
        spot: the site.
        found: the updates there.

    Returns:
        A (blocks, r, columns) and B (blocks, out, r).

    Raises:
        AdapterError: if the ranks differ where factors are added.
        SiteError: if the rank of an SVD is no multiple of a convolution's groups.
    """
    if recipe.name == "cat":
        return _side_by_side(found)
    if recipe.is_svd:
        return _cut(recipe, spot, found)
    ranks = [update.a.shape[1] for update in found]
    if len(set(ranks)) > 1:
        raise AdapterError(
            "All adapters must have the same r value when using combination_type linear, ties, dare_ties or "
            f"dare_linear; at {spot.path!r} they have ranks {ranks}. Use 'cat', or one that ends in 'svd'."
        )
    v = torch.stack([update.v for update in found])
    root = v.abs().sqrt()
    experts = _experts(spot)
    a = recipe.merge([u.a for u in found], torch.where(v >= 0, root, -root), f"{spot.path}:A", each=experts)
    return a, recipe.merge([u.b for u in found], root, f"{spot.path}:B", each=experts)


def _experts(spot: Spot) -> bool:
    config, p, _ = spot.members[0]
    a, b, _ = factors(p)
    return has_experts(a, b, config.rank(p))


def _side_by_side(found: Sequence[Update]) -> tuple[Tensor, Tensor]:
    return torch.cat([u.a * u.v for u in found], 1), torch.cat([u.b for u in found], 2)


def _cut(recipe: Recipe, spot: Spot, found: Sequence[Update]) -> tuple[Tensor, Tensor]:
    experts, (blocks, outputs), columns = _experts(spot), found[0].b.shape[:2], found[0].a.shape[2]
    groups = 1 if experts else blocks
    if recipe.svd_rank is not None and recipe.svd_rank % groups:
        raise SiteError(f"{spot.path!r} has {groups} groups, which must divide the rank: svd_rank={recipe.svd_rank}.")
    rank = min(-(-(recipe.svd_rank or recipe.rank) // groups), outputs, columns)
    total = sum(u.a.shape[1] for u in found)
    if recipe.name == "svd" and recipe.svd_clamp is None and rank <= total < min(outputs, columns):
        a, b = _side_by_side(found)
        q_a, r_a = linalg.qr(a.mT)
        q_b, r_b = linalg.qr(b)
        u, s, vh = linalg.svd(r_b @ r_a.mT, full_matrices=False, driver=recipe.svd_driver)
        return vh[:, :rank] @ q_a.mT, q_b @ (u[..., :rank] * s[:, None, :rank])
    deltas = [u.b @ u.a * u.s for u in found]
    delta = recipe.merge(deltas, torch.stack([u.w for u in found]), f"{spot.path}:delta", each=experts)
    # singular vectors beyond the smaller side are never kept; but which signs the others get may depend on them, and
    # with the signs PEFT's clamping
    full = recipe.svd_full_matrices and recipe.svd_clamp is not None
    u, s, vh = linalg.svd(delta, full_matrices=full, driver=recipe.svd_driver)
    b, a = u[..., :rank] * s[:, None, :rank], vh[:, :rank]
    if recipe.svd_clamp is None:
        return a, b
    high = torch.quantile(torch.cat([b.flatten(1), a.flatten(1)], 1), recipe.svd_clamp, dim=1)[:, None, None]
    return a.clamp(-high, high), b.clamp(-high, high)


def bias(recipe: Recipe, spot: Spot, found: Sequence[Update]) -> dict[str, Tensor]:
    """The new bias of B, its scaling being 1; nothing if the new adapter has none. PEFT leaves it at zero.

    Args:
        recipe: how.
        spot: the site.
        found: the updates there.

    Returns:
        The leaf, if there is one.

    Raises:
        SiteError: if one adapter has biases, and another an embedding, which cannot.
    """
    if not spot.config.lora_bias:
        return {}
    first = spot.members[0]
    if "lora_A" not in first.p:
        raise SiteError(
            f"lora_bias=True is not supported for the embedding {spot.path!r}, but another adapter has it. Combine "
            "adapters that agree."
        )
    experts = _experts(spot)
    shape = found[0].b.shape[:2] if experts else (found[0].b.shape[:2].numel(),)
    each = [
        m.p[BIAS].to(u.b) if BIAS in m.p else u.b.new_zeros(shape) for m, u in zip(spot.members, found, strict=True)
    ]
    same_shapes(spot.path, [{BIAS: tuple(leaf.shape)} for leaf in each])
    v = torch.stack([u.v for u in found])
    return {BIAS: recipe.merge(each, v, f"{spot.path}:bias", each=experts).to(dtype_of(spot))}


def combine(recipe: Recipe, spot: Spot) -> Fresh:
    """LoRA's part of `fa.combine`. One adapter that is scaled keeps its factors.

    Args:
        recipe: how.
        spot: the site.

    Returns:
        The leaves.
    """
    if recipe.name == "cat" and spot.alone:
        _, p, w = spot.members[0]
        params = {name: leaf for name, leaf in p.items() if name != "scaling"}
        return Fresh(params, {"scaling": p["scaling"] * as_scalar(w, p["scaling"])})
    found = updates(spot)
    params = leaves(spot, *combined(recipe, spot, found))
    return Fresh({**params, **bias(recipe, spot, found)}, one(spot))


def one(spot: Spot) -> dict[str, Tensor]:
    """A scaling of 1."""
    return {"scaling": torch.ones((), dtype=dtype_of(spot), device=factors(spot.members[0].p)[0].device)}


def config(configs: Sequence[Any], merged: Any) -> Any:
    """The new adapter has biases in B if any has, and nothing is taken out of the base weights for it.

    What an adapter with the init of PiSSA or OLoRA changes, it changes in base weights that were corrected for it. So
    does a sum of them. `fa.combine([trained, initial], [1, -1], "cat")` makes a LoRA for the original weights.

    Args:
        configs: the configs of the adapters.
        merged: the first of them, targets united.

    Returns:
        The config.
    """
    how = merged.init_lora_weights
    if isinstance(how, str) and how not in ("gaussian", "orthogonal"):
        how = True
    return dataclasses.replace(merged, lora_bias=any(c.lora_bias for c in configs), init_lora_weights=how)


ALGEBRA = Algebra(combine, config)
