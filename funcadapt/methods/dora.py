"""DoRA: weight-decomposed LoRA, a magnitude and a direction per output.

    y = (m / n) * (W + s B A) x + b        n = norm of each row of W + s B A, a constant for the gradient

Leaves: LoRA's, and `lora_magnitude_vector` (out), at convolutions (1, out, 1, ...). Init: m = n, the identity.
The norm is computed from W, A and B without building the (out, in) product:

    n^2 = |W|^2 + 2 s <W A^T, B> + s^2 <B (A A^T), B>        row by row

Cost: LoRA's, and a pass over W and 2 r in out flops per call, whatever the number of tokens.
In training with dropout, x' = drop(x) feeds both terms, as in PEFT: y + (m/n - 1) W x' + (m/n) s B A x'.

Source: Liu et al. 2024, arXiv:2402.09353. Leaving the norm out of the gradient is section 4.3 of the paper.
Differs from PEFT: also on plain parameters, experts and `nn.MultiheadAttention`; several adapters nest, so that the
result equals the dense form. Grouped convolutions are refused, as LoRA has no dense form there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from funcadapt import _torch
from funcadapt._torch import linalg
from funcadapt.combining import Algebra, Recipe, Spot, sums_to_one
from funcadapt.errors import SiteError
from funcadapt.layer import Layer, dropout
from funcadapt.method import Draw, Fresh, Leaf, Method, register
from funcadapt.methods import lora
from funcadapt.parts import lora_forms, lowrank
from funcadapt.parts.forms import KINDS
from funcadapt.parts.lora_variants import asks
from funcadapt.sites import Site


def row_norm(weight: Tensor, a: Tensor, b: Tensor, scaling: Tensor) -> Tensor:
    """The norm of each row of W + s B A, without that matrix.

    Args:
        weight: (out, in, *kernel).
        a: (r, in, *kernel).
        b: (out, r, ...).
        scaling: 0-d.

    Returns:
        (out), in at least float32, detached.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    w, a, b = (t.detach().flatten(1).to(wide) for t in (weight, a, b))
    b = b * scaling.detach().to(wide)
    vecdot: Any = linalg.vecdot
    square: Tensor = vecdot(w, w) + 2 * vecdot(w @ a.t(), b) + vecdot(b @ (a @ a.t()), b)
    return square.clamp_min(0).sqrt()


def init(site: Site, config: lora.LoraConfig, draw: Draw, weight: Callable[[], Tensor]) -> Fresh:
    """LoRA's leaves, and the norm of the rows as the magnitude."""
    if site.groups > 1:
        raise SiteError(f"DoRA cannot adapt the grouped convolution {site.path!r} ({site.groups} groups). Exclude it.")
    params, buffers = lora.init(site, config, draw, weight)
    if draw.abstract:
        norm = draw.zeros(*site.stack, site.out_features)
    else:
        a, b, scaling = lowrank.factors({**params, **buffers})
        base = lora.residual(config, {**params, **buffers}, weight)
        w = weight() if base is None else base
        norms = torch.func.vmap(row_norm, (0, 0, 0, None)) if site.stack else row_norm
        norm = draw.cast(norms(w, a, b, scaling))
    spatial = len(site.shape) - 2
    if spatial:
        norm = norm.reshape(1, -1, *(1,) * spatial)
    return Fresh({**params, "lora_magnitude_vector": norm}, buffers)


def ratio(layer: Layer, p: Leaf, weight: Tensor) -> Tensor:
    """M / n, shape (out)."""
    a, b, scaling = lowrank.factors(p)
    m = p["lora_magnitude_vector"].reshape(layer.site.out_features)
    return m / row_norm(weight, a, b, scaling).to(m.dtype)


def after(layer: Layer, p: Leaf, x: Tensor, y: Tensor) -> Tensor:
    """(m / n) * (y - b + s B A x) + b."""
    config: Any = layer.config
    base_weight, bias = layer.weight, layer.bias
    scale = layer.per_output(ratio(layer, p, base_weight))
    if config.lora_dropout and layer.training and layer.site.kind != "embedding":
        dropped = dropout(layer, x, config.lora_dropout)
        product = layer.linear(dropped.to(base_weight.dtype), base_weight.detach())
        zero = torch.zeros_like(product)
        return (y + (scale - 1) * product + scale * lora_forms.add_delta(layer, p, dropped, zero)).to(y.dtype)
    if bias is None:
        return (scale * lora_forms.add_delta(layer, p, x, y)).to(y.dtype)
    shift = layer.per_output(bias)
    return (scale * lora_forms.add_delta(layer, p, x, y - shift) + shift).to(y.dtype)


def weight(layer: Layer, p: Leaf, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(m / n) * (W + s B A); the bias stays."""
    merged = layer.rows(ratio(layer, p, weight)) * (weight + lora_forms.delta_weight(layer, p))
    return merged.to(weight.dtype), bias


def combine(recipe: Recipe, spot: Spot) -> Fresh:
    """DoRA's part of `fa.combine`.

    With c_i = m_i / n_i, a weighted sum of what adapters change is a DoRA again, whose rank is the sum of the ranks:

        W + sum w_i (W'_i - W) = g (W + sum w_i (c_i / g) s_i B_i A_i),    g = 1 + sum w_i (c_i - 1),    row by row

    which is what "cat", "svd" and the recipes that end in svd make; they need W. The others combine the factors as
    LoRA's, and the magnitudes as |W| + sum w_i (m_i - |W|), an approximation, for which W is needed unless the weights
    sum to one. PEFT gives the new adapter the magnitude |W|, whatever the adapters have: even a copy of one is wrong.

    Args:
        recipe: how.
        spot: the site.

    Returns:
        The leaves.

    Raises:
        SiteError: if the weighted sum has no base weight left in some row (g = 0).
    """
    found = lowrank.updates(spot)
    vectors = [m.p["lora_magnitude_vector"] for m in spot.members]
    magnitudes = [v.to(u.b).reshape(u.b.shape[:2]) for v, u in zip(vectors, found, strict=True)]
    norms = torch.func.vmap(row_norm, (0, 0, 0, None))
    if recipe.exact:
        base = _base(spot, found[0])
        ratios = [m / norms(base, u.a, u.b, u.s).to(m.dtype) for m, u in zip(magnitudes, found, strict=True)]
        gain = 1 + sum((u.w * (c - 1) for c, u in zip(ratios, found, strict=True)), torch.zeros_like(ratios[0]))
        if not _torch.values_unknown() and (gain == 0).any():
            raise SiteError(f"The weights cancel the base weight of a row at {spot.path!r}, which DoRA cannot express.")
        found = [u._replace(b=u.b * (c / gain).unsqueeze(2)) for c, u in zip(ratios, found, strict=True)]
        a, b = lowrank.combined(recipe, spot, found)
        magnitude = gain * norms(base, a, b, torch.ones_like(found[0].s)).to(gain.dtype)
    else:
        a, b = lowrank.combined(recipe, spot, found)
        weights = spot.weights(found[0].b)
        magnitude = (weights[:, None, None] * torch.stack(magnitudes)).sum(0)
        if not sums_to_one([m.w for m in spot.members]):
            norm: Tensor = linalg.vector_norm(_base(spot, found[0]), dim=2)
            magnitude = magnitude + (1 - weights.sum()) * norm.to(magnitude.dtype)
    params = lowrank.leaves(spot, a, b)
    params["lora_magnitude_vector"] = magnitude.reshape(vectors[0].shape).to(lowrank.dtype_of(spot))
    return Fresh(params, lowrank.one(spot))


def _base(spot: Spot, like: lowrank.Update) -> Tensor:
    """The base weight in block form, (blocks, out, columns), in at least float32."""
    weight = spot.base()
    wide = torch.promote_types(weight.dtype, torch.float32)
    return weight.to(wide).reshape(*like.b.shape[:2], like.a.shape[2])


METHOD = register(
    Method(
        name="dora",
        config=lora.LoraConfig,
        when=asks("use_dora"),
        kinds=KINDS,
        keys={**lora.METHOD.keys, "lora_magnitude_vector": "lora_magnitude_vector"},
        init=init,
        inits_experts=True,
        after=after,
        weight=weight,
        buffers=lora.buffers,
        describe=lora.describe,
        check=lora.check,
        layout=lora.layout,
        pack=lora.pack,
        unpack=lora.unpack,
        residual=lora.residual,
        dropout=lora.METHOD.dropout,
        reads=lora.METHOD.reads,
        with_rank=lora.with_rank,
        algebra=Algebra(combine, lowrank.config),
        view=lora.VIEW,
        constant_in_gradient=frozenset({"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"}),
    )
)
