"""LoKr: the update is the Kronecker product of a small matrix and a matrix that may be low-rank.

    y = W x + b + s * (W1 kron W2) x        s = alpha / r

Out and in are factored, out = l k and in = m n (see `factorization`); W1 is (l, m), W2 (k, n):
y[l, k] += s * sum_m W1[l, m] sum_n W2[k, n] x[m, n].
Leaves: `lokr_w1` (l, m) or, with `decompose_both` and r < max(l, m) / 2, `lokr_w1_a` (l, r) and `lokr_w1_b` (r, m);
`lokr_w2` (k, n) or, where r < max(k, n) / 2, `lokr_w2_a` (k, r) and `lokr_w2_b` (r, n); the buffer `scaling` (0-d).
Convolutions factor in = channels / groups: `lokr_w2` (k, n, *kernel), `lokr_w2_b` (r, n * kernel); or, with
`use_effective_conv2d` and a kernel of more than one place, a core `lokr_t2` (r, r, *kernel) between `lokr_w2_a` (r, k)
and `lokr_w2_b` (r, n). The core of a 1-D convolution is (r, r, kernel, 1), as in PEFT.
Init: W1 is zero (of two factors the first one), the others are kaiming-uniform: the identity. "lycoris": W2 is zero.
Cost: l m + k n parameters a layer, or with r: l m + r (k + n); 2 r (in + l m + out) flops a token forward if W2 has two
factors, else 2 (n l m + out n). Twice that backward. No matrix of the size of W is built, but for embeddings and
convolutions in groups.
Dense form: W + s * kron(W1, W2).

In training, `rank_dropout` zeroes outputs of the update (with `rank_dropout_scale` it divides the others by the share
that is left), and `module_dropout` leaves the whole update out, as in `loha`.

Source: Yeh et al. 2023 (LyCORIS), arXiv:2309.14859; Hyeon-Woo et al. 2021, arXiv:2108.06098.
As in PEFT, so that files mean the same: where a 1-D convolution has a whole `lokr_w2` (k, n, kernel), the update is
torch.kron(W1, W2) of shape (k, l n, m kernel) read row by row as (out, in, kernel), in which the order is another one.
Differs from PEFT: `use_effective_conv2d` works in one dimension, too; padding modes of convolutions are right; a rank
dropout that hits every output gives no update rather than NaN. Also on transformers' Conv1D, embeddings, Conv3d,
multi-head attention and plain parameters.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from funcadapt.errors import SiteError
from funcadapt.layer import Layer
from funcadapt.method import Draw, Fresh, Leaf, Method, View, register
from funcadapt.parts import lycoris
from funcadapt.parts.forms import KINDS, add_weight, kaiming
from funcadapt.parts.lora_leaves import neutral
from funcadapt.parts.scalings import describe
from funcadapt.sites import Site


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoKrConfig(lycoris.LycorisConfig):
    """Config of LoKr, with PEFT's fields: those of `LycorisConfig`, and some more.

    Attributes:
        decompose_both: two factors for W1, too, if r is small enough.
        decompose_factor: the size of W1 to aim at; -1: as near to a square as can be.
        rank_dropout_scale: whether `rank_dropout` scales up what it leaves.
        init_weights: True, False (all random) or "lycoris" (W2 is zero rather than W1).

    Raises:
        ValueError: as in `LycorisConfig`, or if `init_weights` is another word.
    """

    peft_type: str = "LOKR"
    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False
    init_weights: bool | str = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_weights not in (True, False, "lycoris"):
            raise ValueError(f"`init_weights` must be True, False or 'lycoris', got {self.init_weights!r}.")

    def rank(self, leaves: Mapping[str, Tensor]) -> int:
        """The rank of one site's leaves; 0 if both matrices are whole."""
        return next((leaves[name].shape[-2] for name in ("lokr_w2_b", "lokr_w1_b") if name in leaves), 0)


def init(site: Site, config: LoKrConfig, draw: Draw, weight: Callable[[], Tensor]) -> Fresh:
    """W1 and W2, whole or in factors; one of them zero unless `init_weights` is false."""
    lycoris.refuse_dropout(site, config)
    r, how, kernel = config.r, config.init_weights, site.shape[2:]
    (l, k), (m, n) = (lycoris.factorization(size, config.decompose_factor) for size in site.shape[:2])  # noqa: E741
    shapes: dict[str, tuple[int, ...]] = {}
    if config.decompose_both and r < max(l, m) / 2:
        shapes |= {"lokr_w1_a": (l, r), "lokr_w1_b": (r, m)}
    else:
        shapes["lokr_w1"] = (l, m)
    if r >= max(k, n) / 2:
        shapes["lokr_w2"] = (k, n, *kernel)
    elif lycoris.has_core(site, config):
        shapes |= {"lokr_w2_a": (r, k), "lokr_w2_b": (r, n), "lokr_t2": lycoris.core_shape(site, r)}
    else:
        shapes |= {"lokr_w2_a": (k, r), "lokr_w2_b": (r, n * math.prod(kernel))}
    zero = ("lokr_w2", "lokr_w2_b") if how == "lycoris" else ("lokr_w1", "lokr_w1_a") if how else ()
    params = {name: draw.zeros(*shape) if name in zero else kaiming(draw, *shape) for name, shape in shapes.items()}
    return Fresh(params, {name: draw.cast(value) for name, value in lycoris.buffers(config).items()})


def _left(p: Leaf) -> Tensor:
    """S * W1, (l, m)."""
    w1 = p["lokr_w1"] if "lokr_w1" in p else p["lokr_w1_a"] @ p["lokr_w1_b"]
    return w1 * p["scaling"]


def _right(site: Site, p: Leaf, n: int) -> Tensor:
    """W2, (k, n, *kernel)."""
    kernel = site.shape[2:]
    if "lokr_w2" in p:
        w2 = p["lokr_w2"]
    elif "lokr_t2" in p:
        r = p["lokr_t2"].shape[1]
        core = p["lokr_t2"].reshape(r, r, *kernel)
        w2 = torch.einsum("ij...,jn,ik->kn...", core, p["lokr_w2_b"].reshape(r, n), p["lokr_w2_a"])
    else:
        w2 = p["lokr_w2_a"] @ p["lokr_w2_b"]
    return w2.reshape(w2.shape[0], n, *kernel)


def _reordered(site: Site, p: Leaf) -> bool:
    return site.kind == "conv1d" and "lokr_w2" in p


def delta_weight(site: Site, p: Leaf) -> Tensor:
    """S * kron(W1, W2) in canonical form. Any other size raises."""
    w1 = _left(p)
    m = w1.shape[1]
    w2 = _right(site, p, site.shape[1] // m)
    w1 = w1.reshape(site.out_features // w2.shape[0], m)
    order = "klnms" if _reordered(site, p) else "lkmns"
    return torch.einsum(f"lm,kns->{order}", w1, w2.flatten(2) if w2.ndim > 2 else w2.unsqueeze(2)).reshape(site.shape)


def folds(layer: Layer, p: Leaf, x: Tensor) -> bool:
    """Whether the Kronecker product is made."""
    return layer.site.groups > 1 or _reordered(layer.site, p)


def after(layer: Layer, p: Leaf, x: Tensor, y: Tensor) -> Tensor:
    """Y + s * (W1 kron W2) x, in y's dtype."""
    site = layer.site
    scaling, kept = lycoris.dropped(layer, p["scaling"])
    p = {**p, "scaling": scaling}
    if site.kind == "embedding" or folds(layer, p, x):
        delta = delta_weight(site, p)
        return add_weight(layer, x, y, delta if kept is None else delta * layer.rows(kept))
    w1 = _left(p)
    m = w1.shape[1]
    if x.dtype != w1.dtype:
        x = x.to(w1.dtype)
    if len(site.shape) > 2:
        return _convolved(layer, p, w1, x, y, kept)
    z = x.reshape(*x.shape[:-1], m, site.in_features // m)
    if "lokr_w2" in p:
        up = p["lokr_w2"]
    else:
        z, up = F.linear(z, p["lokr_w2_b"]), p["lokr_w2_a"]
    z = torch.einsum("...mr,lm->...lr", z, w1)
    k = up.shape[0]
    if kept is None and x.dim() > 1 and z.dtype == y.dtype == up.dtype:
        # one fused product: no temporary of the output's size. It would broadcast y: the view says no.
        return torch.addmm(y.reshape(-1, k), z.reshape(-1, up.shape[1]), up.t()).view(y.shape)
    delta = F.linear(z, up).reshape(y.shape)
    return (y + (delta if kept is None else delta * kept)).to(y.dtype)


def _convolved(layer: Layer, p: Leaf, w1: Tensor, x: Tensor, y: Tensor, kept: Tensor | None) -> Tensor:
    """`after` at a convolution: W2 convolves every block of n channels, W1 mixes the blocks."""
    site, m = layer.site, w1.shape[1]
    n = site.in_features // m
    channels = x.dim() - len(site.shape) + 1
    lead, spatial = x.shape[:channels], x.shape[channels + 1 :]
    z = layer.linear(x.reshape(math.prod(lead) * m, n, *spatial), _right(site, p, n))
    delta = torch.einsum("bm...,lm->bl...", z.reshape(math.prod(lead), m, *z.shape[1:]), w1).reshape(y.shape)
    return (y + (delta if kept is None else delta * layer.per_output(kept))).to(y.dtype)


def weight(layer: Layer, p: Leaf, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """W + s * kron(W1, W2); the bias stays."""
    return (weight + delta_weight(layer.site, p)).to(weight.dtype), bias


def check(config: LoKrConfig, path: str, p: Leaf) -> None:
    """Each matrix whole or in both factors, which have the config's rank."""
    for name in ("lokr_w1", "lokr_w2"):
        factors, core = [f"{name}_a", f"{name}_b"], name == "lokr_w2" and "lokr_t2" in p
        found = [part for part in (*factors, "lokr_t2") if part in p and (part != "lokr_t2" or core)]
        if (name in p) == bool(found) or (found and found[:2] != factors):
            raise SiteError(f"The site {path!r} must have {name!r} or else {factors}, got {sorted(p)}.")
        if not found:
            continue
        a, b = (p[part].shape for part in factors)
        ranks = {b[-2] if len(b) > 1 else 0, a[0 if core else -1] if len(a) > 1 else 0}
        ranks |= set(p["lokr_t2"].shape[:2]) if core else set()
        if ranks != {config.r}:
            raise SiteError(
                f"The site {path!r} has {name} in factors of shapes {tuple(a)} and {tuple(b)}; its config says rank "
                f"{config.r}."
            )


METHOD = register(
    Method(
        name="lokr",
        config=LoKrConfig,
        kinds=KINDS,
        keys={
            name: name for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
        },
        init=init,
        after=after,
        folds=folds,
        weight=weight,
        buffers=lycoris.buffers,
        describe=describe,
        check=check,
        dropout=lycoris.rate,
        reads=frozenset({"rank_dropout", "module_dropout", "rank_dropout_scale"}),
        # no `with_rank`: of another rank, the leaves can be others
        neutral=neutral,
        view=View(
            "lokr",
            "LoKr",
            "lokr_",
            label="lokr.",
            derived=("scaling",),
            attributes={name: name for name in ("r", "alpha", "rank_dropout", "rank_dropout_scale", "module_dropout")},
        ),
    )
)
