"""BD-LoRA: LoRA with one factor block-diagonal, so that tensor-parallel servers need no communication between them.

    y = W x + b + s * B A drop(x)        A = diag(A_1 ... A_n), or B = diag(B_1 ... B_n)        s as in LoRA

Which factor it is depends on the site: `use_bdlora` lists parts of paths for each, and n (`nblocks`). A layer that is
split by columns has its B in blocks, one that is split by rows its A.

Leaves: `lora_A` (r, in / n) and `lora_B` (out, r), or `lora_A` (r, in) and `lora_B` (out, r / n): the blocks lie below
each other. Convolutions, embeddings and experts: as LoRA's, with inputs or ranks divided by n.
Init: A uniform, B zero: the identity.
Cost: r (in / n + out), or r (in + out / n), parameters a layer; as many flops a token, twice.
Dense form: W + s * B A, with zeros outside the blocks.

Source: Wang et al. 2025, arXiv:2510.23346. Differs from PEFT: also on transformers' Conv1D (PEFT: AttributeError),
embeddings, convolutions without groups, attention and parameters; `init_lora_weights=False` draws B, in blocks too.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcadapt.errors import SiteError
from funcadapt.layer import Layer, dropout
from funcadapt.method import Draw, Fresh, Leaf, Method, register
from funcadapt.methods import lora
from funcadapt.parts import lora_forms, lora_inits, lowrank
from funcadapt.parts.forms import KINDS
from funcadapt.parts.lora_variants import asks, check_init, settings
from funcadapt.sites import Site


@dataclasses.dataclass(frozen=True)
class Settings:
    """What `use_bdlora` holds."""

    target_modules_bd_a: Sequence[str] | None = None
    target_modules_bd_b: Sequence[str] | None = None
    nblocks: int = 1
    match_strict: bool = True

    def __post_init__(self) -> None:
        both = set(self.target_modules_bd_a or ()) & set(self.target_modules_bd_b or ())
        if both:
            raise ValueError(f"Found overlapping modules in target_modules_bd lists: {sorted(both)}.")
        if self.nblocks < 1:
            raise ValueError(f"`nblocks` must be at least 1, got {self.nblocks}.")


class Blocks(NamedTuple):
    """How many blocks each factor has."""

    a: int
    b: int


def _check_config(config: lora.LoraConfig) -> None:
    settings(Settings, config.use_bdlora or {}, "use_bdlora")
    check_init(config)


def _blocks(config: Any, path: str) -> Blocks:
    given = config.use_bdlora  # the values were checked; dynamo reads the plain dict
    in_a = any(name in path for name in given.get("target_modules_bd_a") or ())
    in_b = any(name in path for name in given.get("target_modules_bd_b") or ())
    if in_a and in_b:
        raise SiteError(f"{path!r} matches both target_modules_bd_a and target_modules_bd_b of use_bdlora.")
    if given.get("match_strict", True) and not (in_a or in_b):
        raise SiteError(
            f"{path!r} matches neither target_modules_bd_a nor target_modules_bd_b of use_bdlora. If that is "
            "intended, set match_strict=False."
        )
    n = given.get("nblocks", 1)
    return Blocks(n if in_a else 1, n if in_b else 1)


def init(site: Site, config: lora.LoraConfig, draw: Draw, weight: Callable[[], Tensor]) -> Fresh:
    """LoRA's leaves, of which one keeps the width of a block; a new A in blocks is drawn for that width."""
    if site.groups > 1:
        raise SiteError(f"BD-LoRA cannot adapt the grouped convolution {site.path!r}. Exclude it.")
    blocks, r = _blocks(config, site.path), config.r
    for name, n, sizes in (("A", blocks.a, (r, site.in_features)), ("B", blocks.b, (site.out_features, r))):
        if any(size % n for size in sizes):
            raise SiteError(f"{site.path!r} cannot have {name} of shape {sizes} in {n} blocks: they must divide both.")
    params, buffers = lora.init(site, config, draw, weight)
    name_a, name_b = lowrank.factor_names(params)
    if blocks.a > 1:
        shape = (r, site.in_features // blocks.a, *site.shape[2:])
        if site.kind == "embedding":
            params[name_a] = draw.zeros(*shape) if config.init_lora_weights else draw.normal(*shape)
        elif config.init_lora_weights == "gaussian":
            params[name_a] = draw.normal(*shape, std=1 / r)
        else:
            bound = math.sqrt(6 / math.prod(shape[1:]))
            params[name_a] = lora_inits.like_base(site, draw, *shape, bound=bound)
    params[name_b] = params[name_b][:, : r // blocks.b].contiguous()
    return Fresh(params, buffers)


def _spread(t: Tensor, n: int) -> Tensor:
    """(rows, columns, ...) in n blocks below each other -> (rows, n * columns, ...) with the blocks on the diagonal."""
    if n == 1:
        return t
    blocks = t.reshape(n, t.shape[0] // n, 1, *t.shape[1:])
    on = torch.eye(n, dtype=t.dtype, device=t.device).reshape(n, 1, n, *(1,) * (t.ndim - 1))
    return (blocks * on).reshape(t.shape[0], n * t.shape[1], *t.shape[2:])


def as_lora(layer: Layer, p: Leaf) -> Leaf:
    """The leaves of the LoRA that it is."""
    blocks, site = _blocks(layer.config, layer.site.path), layer.site
    name_a, name_b = lowrank.factor_names(p)
    a, b = _spread(p[name_a], blocks.a), _spread(p[name_b], blocks.b)
    if a.shape[1:] != (site.in_features, *site.shape[2:]) or b.shape[:2] != (site.out_features, a.shape[0]):
        raise SiteError(f"The leaves at {site.path!r}, {tuple(p[name_a].shape)} and {tuple(p[name_b].shape)}, misfit.")
    return {**p, name_a: a, name_b: b}


def _product(x: Tensor, weight: Tensor, n: int) -> Tensor:
    """X W^T, W in n blocks."""
    if n == 1:
        return x @ weight.t()
    parts = x.reshape(x.shape[0], n, x.shape[1] // n)
    blocks = weight.reshape(n, weight.shape[0] // n, parts.shape[2])
    return torch.einsum("tni,noi->tno", parts, blocks).reshape(x.shape[0], weight.shape[0])


def after(layer: Layer, p: Leaf, x: Tensor, y: Tensor) -> Tensor:
    """Y + s * B A drop(x), block by block at linear layers."""
    config: Any = layer.config
    if layer.site.kind not in lora_forms.PRODUCTS:
        return lora.after(layer, as_lora(layer, p), x, y)
    x = dropout(layer, x, config.lora_dropout)
    blocks, a, b = _blocks(config, layer.site.path), p["lora_A"], p["lora_B"]
    h = _product(x.to(a.dtype).reshape(-1, layer.site.in_features), a, blocks.a) * p["scaling"]
    delta = _product(h, b, blocks.b)
    if "lora_B_bias" in p:
        delta = delta + layer.per_output(p["lora_B_bias"] * p["scaling"])
    return (y + delta.view(y.shape)).to(y.dtype)


def weight(layer: Layer, p: Leaf, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """W + s * B A, with zeros outside the blocks."""
    return lora.weight(layer, as_lora(layer, p), weight, bias)


def check(config: lora.LoraConfig, path: str, p: Leaf) -> None:
    """As LoRA's, but for the blocks: r rows in A, and r columns in B with its blocks side by side."""
    blocks = _blocks(config, path)
    name_a, name_b = lowrank.factor_names(p)
    for name in [name_a, name_b] + ["lora_B_bias"] * config.lora_bias:
        if name not in p:
            raise SiteError(f"The site {path!r} lacks {name!r}.")
    a, b, r = p[name_a].shape, p[name_b].shape, config.r
    experts = len(a) == len(b) == 3 and a[:2] == (b[0], r) and b[2] * blocks.b == r
    rows, columns = (a[1], b[2]) if experts else (a[0], b[1]) if len(a) > 1 < len(b) else (0, 0)
    if len(a) != len(b) or rows != r or columns * blocks.b != r:
        raise SiteError(
            f"The site {path!r} has {name_a} of shape {tuple(a)} and {name_b} of shape {tuple(b)}; its config says "
            f"rank {r} and {blocks.b} blocks in B: expected ({r}, ...) and (out, {r // blocks.b}, ...)."
        )


METHOD = register(
    Method(
        name="bdlora",
        config=lora.LoraConfig,
        when=asks("use_bdlora", check=_check_config),
        kinds=KINDS,
        keys=lora.METHOD.keys,
        init=init,
        after=after,
        weight=weight,
        buffers=lora.buffers,
        describe=lora.describe,
        check=check,
        dropout=lora.METHOD.dropout,
        reads=frozenset({"use_bdlora"}),
        neutral=lora.neutral,
        view=lora.VIEW,
    )
)
