"""LoHa: the update is the elementwise product of two low-rank matrices.

    y = W x + b + s * ((A1 B1) * (A2 B2)) x        s = alpha / r

Leaves: `hada_w1_a`, `hada_w2_a` (out, r) and `hada_w1_b`, `hada_w2_b` (r, in); the buffer `scaling` (0-d). For
convolutions in = channels / groups * kernel; or, with `use_effective_conv2d` and a kernel of more than one place, there
are cores `hada_t1`, `hada_t2` (r, r, *kernel) between A (r, out) and B (r, channels / groups):
(A B)[o, c, k] = sum_ij A[i, o] T[i, j, k] B[j, c]. Kernels of 1-D convolutions are (k, 1), as in PEFT.
Init: kaiming-uniform but for `hada_w2_b`, which is zero: the identity.
Cost: 2 r (in + out) parameters a layer, for an update of rank r^2. It is that of a LoRA of rank r^2, whose factors are
the rows of B1 times those of B2 and the columns of A1 times those of A2, all with all: 2 r^2 (in + out) flops a token
forward, and no matrix of the size of W. Where r^2 (in + out) is not below in * out, the matrix is built: 2 in out flops
a token and 4 r in out flops a call. Twice that backward.
Dense form: W + s * (A1 B1) * (A2 B2). Embeddings: in is the vocabulary.

In training, `rank_dropout` zeroes outputs of the update and divides the others by the share that is left, and
`module_dropout` leaves the whole update out. They draw from torch's generator of the CPU. Neither acts at embeddings.

Source: Hyeon-Woo et al. 2021 (FedPara), arXiv:2108.06098; LyCORIS, arXiv:2309.14859.
Differs from PEFT: the gradients of `use_effective_conv2d` are right (B2); padding modes of convolutions are; the
scaling is not rounded to float32; a rank dropout that hits every output gives no update rather than NaN; a call that
leaves the update out still draws the mask of `rank_dropout`. Also on transformers' Conv1D, embeddings, Conv3d,
multi-head attention and plain parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from funcadapt.errors import SiteError
from funcadapt.layer import Layer
from funcadapt.method import Draw, Fresh, Leaf, Method, View, register
from funcadapt.parts import lora_forms
from funcadapt.parts.forms import KINDS, add_weight, columns, kaiming, matrix
from funcadapt.parts.lora_leaves import neutral, resized
from funcadapt.parts.lycoris import LycorisConfig, buffers, core_shape, dropped, has_core, rate, refuse_dropout
from funcadapt.parts.scalings import describe
from funcadapt.sites import Site

HALVES = (("hada_w1_a", "hada_w1_b", "hada_t1"), ("hada_w2_a", "hada_w2_b", "hada_t2"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoHaConfig(LycorisConfig):
    """Config of LoHa, with PEFT's fields: those of `LycorisConfig`, and one more.

    Attributes:
        init_weights: whether the update starts at zero; otherwise all factors are random.

    Raises:
        ValueError: as in `LycorisConfig`.
    """

    peft_type: str = "LOHA"
    init_weights: bool = True

    def rank(self, leaves: Mapping[str, Tensor]) -> int:
        """The rank of one site's leaves."""
        return leaves["hada_w1_b"].shape[-2] if "hada_w1_b" in leaves else 0


def init(site: Site, config: LoHaConfig, draw: Draw, weight: Callable[[], Tensor]) -> Fresh:
    """Two pairs of factors, the last one zero unless `init_weights` is false."""
    refuse_dropout(site, config)
    r, out = config.r, site.out_features
    core = has_core(site, config)
    a, b = ((r, out), (r, site.shape[1])) if core else ((out, r), (r, columns(site)))
    params = {"hada_w1_a": kaiming(draw, *a), "hada_w1_b": kaiming(draw, *b), "hada_w2_a": kaiming(draw, *a)}
    params["hada_w2_b"] = draw.zeros(*b) if config.init_weights else kaiming(draw, *b)
    if core:
        params |= {name: kaiming(draw, *core_shape(site, r)) for name in ("hada_t1", "hada_t2")}
    return Fresh(params, {name: draw.cast(value) for name, value in buffers(config).items()})


def _product(site: Site, a: Tensor, b: Tensor, core: Tensor | None) -> Tensor:
    """A B as (out, in). Any other size raises."""
    if core is None:
        r = a.shape[1]
        return a.reshape(site.out_features, r) @ b.reshape(r, columns(site))
    r = core.shape[1]
    core = core.reshape(r, r, *site.shape[2:])
    a, b = a.reshape(r, site.out_features), b.reshape(r, site.shape[1])
    return torch.einsum("ij...,jc,io->oc...", core, b, a).flatten(1)


def delta_weight(site: Site, p: Leaf) -> Tensor:
    """S * (A1 B1) * (A2 B2) in canonical form."""
    scaled = {**p, "hada_w1_a": p["hada_w1_a"] * p["scaling"]}
    first, second = (_product(site, scaled[a], scaled[b], scaled.get(core)) for a, b, core in HALVES)
    return (first * second).reshape(site.shape)


def as_lora(site: Site, p: Leaf) -> dict[str, Tensor]:
    """The leaves of a LoRA of rank r^2 that does the same, if there are no cores."""
    r, (out, inputs) = p["hada_w1_a"].shape[1], matrix(site)
    a1, a2 = p["hada_w1_a"].reshape(out, r, 1), p["hada_w2_a"].reshape(out, 1, r)
    b1, b2 = p["hada_w1_b"].reshape(r, 1, inputs), p["hada_w2_b"].reshape(1, r, inputs)
    down, up = (b1 * b2).reshape(r * r, *site.shape[1:]), (a1 * a2).reshape(out, r * r, *(1,) * (len(site.shape) - 2))
    return {"lora_A": down, "lora_B": up, "scaling": p["scaling"]}


def folds(layer: Layer, p: Leaf, x: Tensor) -> bool:
    """Whether the update is made as a weight: it is, unless the ranks are so small that a LoRA of rank r^2 is less."""
    site, r, (out, inputs) = layer.site, p["hada_w1_a"].shape[1], matrix(layer.site)
    return "hada_t1" in p or site.groups > 1 or r * r * (out + inputs) >= out * inputs


def after(layer: Layer, p: Leaf, x: Tensor, y: Tensor) -> Tensor:
    """Y + s * ((A1 B1) * (A2 B2)) x, in y's dtype."""
    site, core = layer.site, "hada_t1" in p
    scaling, kept = dropped(layer, p["scaling"])
    p = {**p, "scaling": scaling}
    if kept is not None:  # rows of the update are rows of one factor
        p["hada_w1_a"] = p["hada_w1_a"] * (kept if core else kept.unsqueeze(1))
    if folds(layer, p, x):
        return add_weight(layer, x, y, delta_weight(site, p))
    return lora_forms.add_delta(layer, as_lora(site, p), x, y).to(y.dtype)


def weight(layer: Layer, p: Leaf, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """W + s * (A1 B1) * (A2 B2); the bias stays."""
    return (weight + delta_weight(layer.site, p)).to(weight.dtype), bias


def with_rank(p: Leaf, old: int, r: int) -> Leaf:
    """All factors with zeros up to rank r, or cut to it."""
    new = dict(p)
    for a, b, core in HALVES:
        if core in p:
            new[core] = resized(resized(p[core], 0, r), 1, r)
        new[a] = resized(p[a], p[a].ndim - (2 if core in p else 1), r)
        new[b] = resized(p[b], p[b].ndim - 2, r)
    return new


def check(config: LoHaConfig, path: str, p: Leaf) -> None:
    """Both pairs, of one shape and with the config's rank, and either both cores or none."""
    cores = [core for _, _, core in HALVES if core in p]
    if cores and not config.use_effective_conv2d:
        raise SiteError(f"The site {path!r} has {cores[0]!r}, which the config does not ask for.")
    names = [name for half in HALVES for name in half[: 3 if cores else 2]]
    for name in names:
        if name not in p:
            raise SiteError(f"The site {path!r} lacks {name!r}.")
    shapes = [tuple(p[name].shape) for name in names]
    a, b = shapes[0], shapes[1]
    fits = shapes[: len(names) // 2] == shapes[len(names) // 2 :] and len(a) == len(b) > 1 and b[-2] == config.r
    if cores:
        fits = fits and len(a) == 2 and a[0] == config.r == shapes[2][0] == shapes[2][1]
    if not fits or (not cores and (a[-1] != config.r or a[:-2] != b[:-2])):
        raise SiteError(
            f"The site {path!r} has leaves of shapes {dict(zip(names, shapes, strict=True))}; its config says rank "
            f"{config.r}: expected (out, {config.r}) and ({config.r}, in), or with cores ({config.r}, out), "
            f"({config.r}, channels) and ({config.r}, {config.r}, *kernel), twice the same."
        )


METHOD = register(
    Method(
        name="loha",
        config=LoHaConfig,
        kinds=KINDS,
        keys={name: name for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")},
        init=init,
        after=after,
        folds=folds,
        weight=weight,
        buffers=buffers,
        describe=describe,
        check=check,
        dropout=rate,
        reads=frozenset({"rank_dropout", "module_dropout"}),
        with_rank=with_rank,
        neutral=neutral,
        view=View(
            "loha",
            "LoHa",
            "hada_",
            label="loha.",
            derived=("scaling",),
            attributes={name: name for name in ("r", "alpha", "rank_dropout", "module_dropout")},
        ),
    )
)
