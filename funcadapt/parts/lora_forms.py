"""LoRA's product in the forms that its variants and methods like it share: for one adapter, for many, and dense."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from funcadapt.errors import SiteError
from funcadapt.layer import Layer, dropout
from funcadapt.method import Leaf
from funcadapt.parts.forms import autocasts
from funcadapt.parts.lowrank import factors

PRODUCTS = frozenset({"linear", "hf_conv1d"})
"""Kinds whose forward is one product, over rows of any number."""


def add_delta(layer: Layer, p: Leaf, x: Tensor, y: Tensor) -> Tensor:
    """The output with the update, y + s * B A x, in the dtype that promotes both; `x` has had its dropout."""
    a, dims = p.get("lora_A"), x.dim()
    if a is not None and dims > 1 and a.dtype == x.dtype and layer.site.kind in PRODUCTS and "lora_B_bias" not in p:
        b = p["lora_B"]
        h = torch.mm(x if dims == 2 else x.reshape(-1, x.shape[-1]), a.t()) * p["scaling"]
        if h.dtype != y.dtype:  # the base layer answered in another dtype, or autocast is on
            return y + F.linear(h, b).view(y.shape)
        # one fused product: no temporary of the output's size. It would broadcast y: the view says no.
        return torch.addmm(y if dims == 2 else y.reshape(-1, y.shape[-1]), h, b.t()).view(y.shape)
    a, b, scaling = factors(p)
    if x.is_floating_point() and x.dtype != a.dtype:
        x = x.to(a.dtype)
    delta = layer.pointwise(layer.linear(x, a) * scaling, b)
    if "lora_B_bias" in p:
        delta = delta + layer.per_output(p["lora_B_bias"] * scaling)
    return y + delta


def _batchable(layer: Layer, p: Leaf, x: Tensor, y: Tensor) -> bool:
    """Whether the layer is a plain product in one dtype, for the hand-written forms below."""
    a = p.get("lora_A")
    if a is None or "lora_B_bias" in p or layer.site.kind not in PRODUCTS:
        return False
    return a.dtype == x.dtype == y.dtype and not autocasts(x.device)


def grouped(layer: Layer, p: Leaf, x: Tensor, y: Tensor) -> Any:
    """`after` for N adapters at once: two batched products, no temporary of the output's size.

    Args:
        layer: the layer.
        p: the leaves, `lora_A` (N, r, in), `lora_B` (N, out, r), `scaling` (N).
        x: (N * rows, ..., in).
        y: (N * rows, ..., out).

    Returns:
        Of y's shape; NotImplemented where the layer is no plain product, or the dtypes differ.
    """
    if not _batchable(layer, p, x, y):
        return NotImplemented
    config: Any = layer.config
    if config.lora_dropout:
        x = dropout(layer, x, config.lora_dropout)
    a, b = p["lora_A"], p["lora_B"]
    n = a.shape[0]
    tokens = x.numel() // (n * x.shape[-1]) if x.shape[-1] else 0
    # h (N, r, tokens): in this order the gradients of A and of a column-major B come out as the leaves are stored
    h = torch.bmm(a, x.reshape(n, tokens, x.shape[-1]).transpose(1, 2)) * p["scaling"].view(n, 1, 1)
    return torch.baddbmm(y.reshape(n, tokens, y.shape[-1]), h.transpose(1, 2), b.transpose(1, 2)).view(y.shape)


def masked(layer: Layer, p: Leaf, x: Tensor, y: Tensor, choice: Tensor) -> Any:
    """`after` for groups of rows that choose among N adapters: one product with all of them, all but one masked.

    Args:
        layer: the layer.
        p: the leaves, as in `grouped`.
        x: (groups * rows, ..., in).
        y: (groups * rows, ..., out).
        choice: (groups, N), how much of each acts there.

    Returns:
        Of y's shape; NotImplemented as in `grouped`.
    """
    if not _batchable(layer, p, x, y):
        return NotImplemented
    config: Any = layer.config
    if config.lora_dropout:
        x = dropout(layer, x, config.lora_dropout)
    a, b = p["lora_A"], p["lora_B"]
    n, r = a.shape[:2]
    h = torch.mm(x.reshape(-1, x.shape[-1]), a.reshape(n * r, a.shape[2]).t())
    h = h.view(choice.shape[0], -1, n, r) * (choice * p["scaling"]).view(-1, 1, n, 1)
    all_b = b.transpose(1, 2).reshape(n * b.shape[2], b.shape[1])
    return torch.addmm(y.reshape(-1, y.shape[-1]), h.view(-1, n * r), all_b).view(y.shape)


def delta_weight(layer: Layer, p: Leaf) -> Tensor:
    """S * B A in canonical form."""
    a, b, scaling = factors(p)
    if layer.site.groups > 1:
        raise SiteError(
            f"LoRA on the grouped convolution {layer.site.path!r} has no dense form: lora_A reads every input channel, "
            "the base weight only those of its group. Keep the adapter unmerged."
        )
    kernel = a.shape[2:]
    return (b.flatten(1) * scaling @ a.flatten(1)).reshape(b.shape[0], a.shape[1], *kernel)
