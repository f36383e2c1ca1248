"""How LoRA's factors start: `init_lora_weights`, but for the inits that need data (`funcadapt.recipes`).

True        A kaiming-uniform, B zero (embeddings: A zero, B normal)
False       both random
gaussian    A normal with deviation 1 / r
orthogonal  rows of an orthogonal matrix times normal numbers: the ranges of A and of B are orthogonal
pissa       the r largest singular values: s B A is taken out of the base weight
olora       the first r of Q R: likewise
loftq       W = Q + s B A with Q of few bits, in turns: Q becomes the base weight
eva, corda, lora_ga   as True, until a recipe that has seen data replaces them
"""

from __future__ import annotations

import math
import re
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from funcadapt import loftq
from funcadapt._torch import linalg
from funcadapt.errors import SiteError
from funcadapt.method import Draw, Leaf
from funcadapt.parts import svd
from funcadapt.parts.lowrank import factors

if TYPE_CHECKING:
    from funcadapt.methods.lora import LoraConfig
    from funcadapt.sites import Site

KNOWN = "True, False, 'gaussian', 'orthogonal', 'pissa', 'pissa_niter_N', 'olora', 'loftq', 'eva', 'corda' or 'lora_ga'"
# they leave the base weight alone; True and False do, too
_BESIDE = ("gaussian", "orthogonal", "eva")
# until a recipe has replaced it, the adapter starts as with True
_LIKE_TRUE = ("gaussian", "eva", "lora_ga")


def new(site: Site, config: LoraConfig, draw: Draw, weight: Callable[[], Tensor], scaling: float) -> dict[str, Tensor]:
    """A and B of a site, and the bias of B if there is one, by `init_lora_weights`.

    Args:
        site: the site.
        config: its config.
        draw: where numbers come from.
        weight: gives the base weight.
        scaling: the scaling.

    Returns:
        The leaves.

    Raises:
        SiteError: if the init needs another kind of layer.
        ValueError: if there is no such init, or it needs another rank.
    """
    r, kind, how, experts = config.r, site.kind, config.init_lora_weights, site.stack
    name_a, name_b = ("lora_embedding_A", "lora_embedding_B") if kind == "embedding" else ("lora_A", "lora_B")
    kernel = site.shape[2:]
    shape_a = (*experts, r, site.in_features, *kernel)
    shape_b = (*experts, site.out_features, r // site.groups, *(1,) * len(kernel))
    fan_in = site.in_features * math.prod(kernel)

    given = None if draw.abstract or how not in ("corda", "lora_ga") else _prepared(weight())
    if given is not None:
        a, b = map(draw.cast, given(config, scaling))
    elif isinstance(how, str) and how not in _LIKE_TRUE and not draw.abstract:
        if len(shape_a) != 2:
            raise SiteError(f"init_lora_weights={how!r} needs a 2-D weight; {site.path!r} is of kind {kind!r}.")
        a, b = _of_weight(how, config, weight, draw, scaling)
    elif kind == "embedding":
        a = draw.zeros(*shape_a) if how is not False else draw.normal(*shape_a)
        b = draw.normal(*shape_b)
    else:
        gaussian = how == "gaussian"
        a = draw.normal(*shape_a, std=1 / r) if gaussian else draw.uniform(*shape_a, bound=1 / math.sqrt(fan_in))
        if how is not False:
            b = draw.zeros(*shape_b)
            if how == "eva" and draw.generator is None:  # torch's own: PEFT keeps A as its layer drew it, before B's
                draw.uniform(*shape_b, bound=1.0)
                if config.lora_bias:
                    draw.uniform(site.out_features, bound=1.0)
        elif experts:  # one layer for all of them, in the order of `pack`
            b = draw.uniform(site.out_features, r, *experts, bound=1 / math.sqrt(r * site.experts))
            b = b.movedim(-1, 0).contiguous()
        else:
            b = draw.uniform(*shape_b, bound=math.sqrt(site.groups / r))
    params = {name_a: a, name_b: b}
    if config.lora_bias:
        shape, bound = (*experts, site.out_features), math.sqrt(site.groups / r)
        params["lora_B_bias"] = draw.uniform(*shape, bound=bound) if how is False else draw.zeros(*shape)
    return params


# storage of a weight -> the weight, and its factors by config and scaling
_waiting: dict[int, tuple[weakref.ref[Tensor], Callable[[Any, float], tuple[Tensor, Tensor]]]] = {}


def prepare(weight: Tensor, factors_of: Callable[[Any, float], tuple[Tensor, Tensor]]) -> None:
    """Note what the next init of a weight by "corda" or "lora_ga" gives, where PEFT's functions see data before it.

    Args:
        weight: the live parameter.
        factors_of: (config, scaling) -> A and B.
    """
    for key in [key for key, (held, _) in _waiting.items() if held() is None]:
        del _waiting[key]
    _waiting[weight.untyped_storage().data_ptr()] = weakref.ref(weight), factors_of


def _prepared(weight: Tensor) -> Callable[[Any, float], tuple[Tensor, Tensor]] | None:
    held, factors_of = _waiting.pop(weight.untyped_storage().data_ptr(), (None, None))
    alive = held() if held is not None else None
    return factors_of if alive is not None and alive.data_ptr() == weight.data_ptr() else None


def like_base(site: Site, draw: Draw, *shape: int, bound: float | None = None) -> Tensor:
    """Uniform or normal numbers, drawn in float64 for a layer in float64: where PEFT draws in the layer's dtype."""
    if draw.abstract:
        return draw.zeros(*shape)
    dtype = torch.promote_types(site.dtype, torch.float32) if site.dtype.is_floating_point else torch.float32
    if bound is None:
        return draw.cast(torch.randn(shape, generator=draw.generator, dtype=dtype))
    return draw.cast((torch.rand(shape, generator=draw.generator, dtype=dtype) * 2 - 1) * bound)


def _of_weight(
    how: str, config: LoraConfig, weight: Callable[[], Tensor], draw: Draw, scaling: float
) -> tuple[Tensor, Tensor]:
    """The inits that look at the weight, or at each other: (A, B)."""
    r = config.r
    if how == "orthogonal":
        if r % 2:
            raise ValueError(f"init_lora_weights='orthogonal' needs an even rank, got r={r}.")
        rows, columns = weight().shape
        q = linalg.qr(torch.randn(r, r, generator=draw.generator)).Q
        a = (torch.randn(columns, r // 2, generator=draw.generator) @ q[0::2]).T / 10
        b = (torch.randn(r // 2, rows, generator=draw.generator).T @ q[1::2]) / 10
        return draw.cast(a.contiguous()), draw.cast(b.contiguous())
    w = weight().detach().to(torch.promote_types(weight().dtype, torch.float32))
    if r > min(w.shape):
        raise ValueError(f"init_lora_weights={how!r} needs r <= min(in, out) = {min(w.shape)}, got r={r}.")
    if how == "olora":
        q, upper = linalg.qr(w)
        # PEFT draws no scaling into the factors, and takes s * B A out of the weight
        return draw.cast(upper[:r].contiguous()), draw.cast(q[:, :r].contiguous())
    if how == "loftq":
        bits, iterations = _loftq(config)
        _, a, b = loftq.decomposed(w, bits, r, iterations)
        return draw.cast(a / math.sqrt(scaling)), draw.cast(b / math.sqrt(scaling))
    if how == "corda":
        raise ValueError(
            "init_lora_weights='corda' needs data: use funcadapt.recipes.inits.corda(model, config, batches), or "
            "`preprocess_corda` of funcadapt.peft before get_peft_model."
        )
    match = re.fullmatch(r"pissa(?:_niter_(\d+))?", how)
    if match is None:
        raise ValueError(f"Unknown init_lora_weights={how!r}. It is {KNOWN}.")
    seed = None if draw.generator is None else draw.generator.initial_seed()
    u, s, vh = svd.largest(w, r, int(match[1]) if match[1] else None, seed)
    root = torch.sqrt(s / scaling)
    return draw.cast(root[:, None] * vh), draw.cast(u * root)


def _loftq(config: LoraConfig) -> tuple[int, int]:
    """Bits and iterations."""
    given = config.loftq_config
    return given.get("loftq_bits", 4), given.get("loftq_iter", 1)


def residual(config: LoraConfig, p: Leaf, weight: Callable[[], Tensor]) -> Tensor | None:
    """The base weight less s * B A, for PiSSA and its like; None for the inits that leave the base alone."""
    how = config.init_lora_weights
    if not isinstance(how, str) or how in _BESIDE:
        return None
    a, b, scaling = factors(p)
    if how == "lora_ga" and not b.any():
        return None  # no recipe has seen data
    base = weight()
    wide = torch.promote_types(base.dtype, torch.float32)
    if how == "loftq":
        bits, iterations = _loftq(config)
        return loftq.decomposed(base, bits, config.r, iterations)[0].to(base.dtype)
    return (base.to(wide) - (b.to(wide) * scaling.to(wide)) @ a.to(wide)).to(base.dtype)
