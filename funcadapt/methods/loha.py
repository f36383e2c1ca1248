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
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from funcadapt.config import AdapterConfig
from funcadapt.drawing import _scrambled as scrambled  # pyright: ignore[reportPrivateUsage]
from funcadapt.errors import SiteError
from funcadapt.forms import KINDS, add_weight
from funcadapt.layer import Layer
from funcadapt.lora_leaves import describe as describe_lora
from funcadapt.lora_leaves import neutral, resized
from funcadapt.method import Draw, Fresh, Leaf, Method, View, register
from funcadapt.methods import lora
from funcadapt.sites import Site

HALVES = (("hada_w1_a", "hada_w1_b", "hada_t1"), ("hada_w2_a", "hada_w2_b", "hada_t2"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LycorisConfig(AdapterConfig):
    """The fields that LoHa and LoKr share, as in PEFT.

    Attributes:
        rank_pattern: rank by regular expression of the site path.
        alpha_pattern: alpha likewise.
        r: the rank.
        alpha: the scaling is alpha / r.
        rank_dropout: the rate at which outputs of the update are zeroed in training.
        module_dropout: the probability that a call in training leaves the update out.
        use_effective_conv2d: a core and two factors for kernels of more than one place.
        target_modules: names, a regular expression, "all-linear", or None for the model type's default.
        exclude_modules: names or a regular expression to leave out.
        layers_to_transform: indices of the layers to adapt.
        layers_pattern: the name of the layer list, with `layers_to_transform`.
        modules_to_save: modules that are trained in full and saved with the adapter.

    Raises:
        ValueError: if a value is out of range, or `layers_pattern` is alone.
    """

    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict[str, int])
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict[str, float])
    r: int = 8
    alpha: float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    target_modules: Sequence[str] | str | None = None
    exclude_modules: Sequence[str] | str | None = None
    layers_to_transform: Sequence[int] | int | None = None
    layers_pattern: Sequence[str] | str | None = None
    modules_to_save: Sequence[str] | None = None

    patterned: ClassVar[Mapping[str, str]] = {"r": "rank_pattern", "alpha": "alpha_pattern"}

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, r in {"r": self.r, **self.rank_pattern}.items():
            if r <= 0:
                raise ValueError(f"`r` should be a positive integer value but the value passed is {r} ({name!r}).")
        for name, alpha in {"alpha": self.alpha, **self.alpha_pattern}.items():
            if not -1e300 < alpha < 1e300:
                raise ValueError(f"`alpha` must be finite, got {alpha} ({name!r}).")
        if not 0 <= self.rank_dropout < 1 or not 0 <= self.module_dropout <= 1:
            raise ValueError(f"`rank_dropout` must be in [0, 1) and `module_dropout` in [0, 1], got {self.rank_dropout}"
                             f" and {self.module_dropout}.")  # fmt: skip
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")


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


def buffers(config: LycorisConfig) -> dict[str, Tensor]:
    """The scaling as a 0-d leaf: alpha / r."""
    return {"scaling": torch.tensor(config.alpha / config.r, dtype=torch.float64, device="cpu")}


def rate(config: LycorisConfig) -> float:
    """Whether there is dropout at all: the larger one of the two rates."""
    return max(config.rank_dropout, config.module_dropout)


def refuse_dropout(site: Site, config: LycorisConfig) -> None:
    """Raise where the update acts through a weight and cannot be dropped."""
    if rate(config) and site.kind in ("parameter", "experts"):
        raise SiteError(f"Dropout cannot act at the plain parameter {site.path!r}: it is applied through its weight. "
                        "Set rank_dropout=0 and module_dropout=0.")  # fmt: skip


def kaiming(draw: Draw, *shape: int) -> Tensor:
    """PEFT's `kaiming_uniform_(a=sqrt(5))`: uniform, bounded by one over the root of the inputs."""
    return draw.uniform(*shape, bound=1 / math.sqrt(math.prod(shape[1:])))


def has_core(site: Site, config: LycorisConfig) -> bool:
    """Whether a site's kernel gets a factor of its own."""
    return config.use_effective_conv2d and math.prod(site.shape[2:]) > 1


def core_shape(site: Site, r: int) -> tuple[int, ...]:
    """The shape of that factor: in one dimension there is a second one, as in PEFT."""
    kernel = site.shape[2:]
    return r, r, *kernel, *(1,) * (len(kernel) == 1)


def init(site: Site, config: LoHaConfig, draw: Draw, weight: Callable[[], Tensor]) -> Fresh:
    """Two pairs of factors, the last one zero unless `init_weights` is false."""
    refuse_dropout(site, config)
    r, out = config.r, site.out_features
    core = has_core(site, config)
    a, b = ((r, out), (r, site.shape[1])) if core else ((out, r), (r, math.prod(site.shape[1:])))
    params = {"hada_w1_a": kaiming(draw, *a), "hada_w1_b": kaiming(draw, *b), "hada_w2_a": kaiming(draw, *a)}
    params["hada_w2_b"] = draw.zeros(*b) if config.init_weights else kaiming(draw, *b)
    if core:
        params |= {name: kaiming(draw, *core_shape(site, r)) for name in ("hada_t1", "hada_t2")}
    return Fresh(params, {name: draw.cast(value) for name, value in buffers(config).items()})


def dropped(layer: Layer, scaling: Tensor) -> tuple[Tensor, Tensor | None]:
    """The dropout of one call in training.

    Args:
        layer: the layer, with the config of LoHa or LoKr.
        scaling: 0-d.

    Returns:
        The scaling, zero if the update is left out, and a factor for each output (None: all are 1).
    """
    config: Any = layer.config
    if not layer.training or not rate(config) or layer.site.kind == "embedding":
        return scaling, None
    # in the order and in the number in which PEFT draws them, so that a seed gives the same
    scaling = scaling * (_uniform(layer, 0, 1) > config.module_dropout).reshape(()).to(scaling)
    if not config.rank_dropout:
        return scaling, None
    kept = (_uniform(layer, 1, layer.site.out_features) > config.rank_dropout).to(scaling)
    scaled = getattr(config, "rank_dropout_scale", True)
    return scaling, kept / kept.mean().clamp_min(1 / kept.shape[0]) if scaled else kept


def _uniform(layer: Layer, start: int, n: int) -> Tensor:
    """Numbers in [0, 1): of torch's generator of the CPU or, for one of many adapters, of its own mask."""
    if layer.mask is None:
        return torch.rand(n)
    # The mask is for inputs, and here are none to drop: it is the seed, as what was drawn for this adapter alone.
    bits = (layer.mask.flatten()[:1024] != 0).long()
    seed = (bits * scrambled(torch.arange(1, len(bits) + 1, device=bits.device))).sum() & 0xFFFFFFFF
    count = torch.arange(start, start + n, device=bits.device)
    return (scrambled(scrambled(count) ^ seed) & 0xFFFFFF).float() / 2**24


def _product(site: Site, a: Tensor, b: Tensor, core: Tensor | None) -> Tensor:
    """A B as (out, in). Any other size raises."""
    if core is None:
        r = a.shape[1]
        return a.reshape(site.out_features, r) @ b.reshape(r, math.prod(site.shape[1:]))
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
    r, out, inputs = p["hada_w1_a"].shape[1], site.out_features, math.prod(site.shape[1:])
    a1, a2 = p["hada_w1_a"].reshape(out, r, 1), p["hada_w2_a"].reshape(out, 1, r)
    b1, b2 = p["hada_w1_b"].reshape(r, 1, inputs), p["hada_w2_b"].reshape(1, r, inputs)
    down, up = (b1 * b2).reshape(r * r, *site.shape[1:]), (a1 * a2).reshape(out, r * r, *(1,) * (len(site.shape) - 2))
    return {"lora_A": down, "lora_B": up, "scaling": p["scaling"]}


def after(layer: Layer, p: Leaf, x: Tensor, y: Tensor) -> Tensor:
    """Y + s * ((A1 B1) * (A2 B2)) x, in y's dtype."""
    site, r = layer.site, p["hada_w1_a"].shape[1]
    core = "hada_t1" in p
    scaling, kept = dropped(layer, p["scaling"])
    p = {**p, "scaling": scaling}
    if kept is not None:  # rows of the update are rows of one factor
        p["hada_w1_a"] = p["hada_w1_a"] * (kept if core else kept.unsqueeze(1))
    out, inputs = site.out_features, math.prod(site.shape[1:])
    if not core and site.groups == 1 and r * r * (out + inputs) < out * inputs:
        return lora.add_delta(layer, as_lora(site, p), x, y).to(y.dtype)
    return add_weight(layer, x, y, delta_weight(site, p))


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


def describe(config: Any, leaves: Mapping[str, Leaf]) -> Any:
    """The config that the leaves say: ranks from the shapes, alphas from the scalings, as LoRA's.

    Args:
        config: a config with `r`, `alpha` and their patterns.
        leaves: the leaves of each site, by path.

    Returns:
        The config.
    """
    like = lora.LoraConfig(r=config.r, lora_alpha=config.alpha, rank_pattern=config.rank_pattern,
                           alpha_pattern=config.alpha_pattern)  # fmt: skip
    said = {path: (config.rank(p) or config.at(path).r, p["scaling"]) for path, p in leaves.items() if "scaling" in p}
    found = describe_lora(
        like,
        {p: {"lora_A": torch.empty(r, 1), "lora_B": torch.empty(1, r), "scaling": s} for p, (r, s) in said.items()},
    )
    if found is like:
        return config
    return dataclasses.replace(config, r=found.r, alpha=found.lora_alpha, rank_pattern=found.rank_pattern,
                               alpha_pattern=found.alpha_pattern)  # fmt: skip


METHOD = register(
    Method(
        name="loha",
        config=LoHaConfig,
        kinds=KINDS,
        keys={name: name for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")},
        init=init,
        after=after,
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
