"""HiRA: the update is the base weight times, element by element, a low-rank matrix: it can have any rank.

    y = W x + b + (W * (B A)) drop(x)

Leaves: `hira_A` (r, in), `hira_B` (out, r). Embeddings: `hira_embedding_A` (r, vocabulary), `hira_embedding_B`
(width, r). Convolutions: `hira_A` (r, channels / groups, *kernel), `hira_B` (out, r, 1, ...).
Init: A kaiming-uniform ("gaussian": normal with deviation 1 / r), B zero; embeddings: A zero, B normal: the identity.
Cost: r (in + out) parameters a layer; 2 r in out flops a call forward, and twice that backward: the layer runs with the
dense form. With dropout or in 16 bits, 2 in out flops a token more. Embeddings: as LoRA, as W * (B A) looks up
y * (B A).
Dense form: W * (1 + B A).

Source: Huang et al. 2025, openreview.net/forum?id=TwJrTz9cRS.
Differs from PEFT: `rank_pattern` acts (there the first adapter of a layer gets the rank `r`); padding modes and groups
of convolutions are right, and 3-D kernels of (1, 1, n); embeddings with a scale or a padding index have the gradients
of the base layer; several adapters nest. Also on multi-head attention and plain parameters.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from funcadapt.config import AdapterConfig
from funcadapt.errors import SiteError
from funcadapt.layer import Layer, dropout
from funcadapt.method import Draw, Fresh, Leaf, Method, View, register
from funcadapt.parts.forms import KINDS, add_weight, refuse_dropout
from funcadapt.parts.lora_leaves import neutral, resized
from funcadapt.parts.lowrank import has_experts
from funcadapt.sites import Site


@dataclasses.dataclass(frozen=True, kw_only=True)
class HiraConfig(AdapterConfig):
    """Config of HiRA, with PEFT's fields.

    Attributes:
        r: the rank of the matrix that W is multiplied with.
        target_modules: names, a regular expression, "all-linear", or None for the model type's default.
        exclude_modules: names or a regular expression to leave out.
        hira_dropout: dropout on the adapter's input, active when the layer is in training mode.
        fan_in_fan_out: PEFT's bookkeeping; the layer's type decides.
        modules_to_save: modules that are trained in full and saved with the adapter.
        init_weights: True, "gaussian", or False or None for random numbers.
        layers_to_transform: indices of the layers to adapt.
        layers_pattern: the name of the layer list, with `layers_to_transform`.
        rank_pattern: rank by regular expression of the site path.

    Raises:
        ValueError: if the values contradict each other.
    """

    peft_type: str = "HIRA"
    r: int = 32
    target_modules: Sequence[str] | str | None = None
    exclude_modules: Sequence[str] | str | None = None
    hira_dropout: float = 0.0
    fan_in_fan_out: bool = False
    modules_to_save: Sequence[str] | None = None
    init_weights: bool | str | None = True
    layers_to_transform: Sequence[int] | int | None = None
    layers_pattern: Sequence[str] | str | None = None
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict[str, int])

    patterned: ClassVar[Mapping[str, str]] = {"r": "rank_pattern"}

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, r in {"r": self.r, **self.rank_pattern}.items():
            if r <= 0:
                raise ValueError(f"`r` should be a positive integer value but the value passed is {r} ({name!r}).")
        if not 0 <= self.hira_dropout < 1:
            raise ValueError(f"`hira_dropout` must be in [0, 1), got {self.hira_dropout}.")
        if self.init_weights not in (True, False, None, "gaussian"):
            raise ValueError(f"Unknown init_weights={self.init_weights!r}. It is True, False, None or 'gaussian'.")
        if isinstance(self.target_modules, str):
            for field in ("layers_to_transform", "layers_pattern"):
                if getattr(self, field) is not None:
                    raise ValueError(f"`{field}` cannot be used when `target_modules` is a str.")

    def rank(self, leaves: Mapping[str, Tensor]) -> int:
        """The rank of one site's leaves."""
        if "hira_embedding_B" in leaves:
            return leaves["hira_embedding_B"].shape[-1]
        if "hira_A" not in leaves or "hira_B" not in leaves:
            return 0
        a, b = leaves["hira_A"], leaves["hira_B"]
        return a.shape[1] if has_experts(a, b, a.shape[1]) else a.shape[0]


def _names(p: Leaf) -> tuple[str, str]:
    return ("hira_A", "hira_B") if "hira_A" in p else ("hira_embedding_A", "hira_embedding_B")


def _shapes(site: Site, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return (r, *site.shape[1:]), (site.out_features, r, *(1,) * (len(site.shape) - 2))


def init(site: Site, config: HiraConfig, draw: Draw, weight: Callable[[], Tensor]) -> Fresh:
    """A and B by `init_weights`."""
    refuse_dropout(site, "hira_dropout", config.hira_dropout)
    how = config.init_weights
    a, b = _shapes(site, config.r)
    if site.kind == "embedding":
        first = draw.normal(*a) if how is False else draw.zeros(*a)
        return Fresh({"hira_embedding_A": first, "hira_embedding_B": draw.normal(*b)}, {})
    if not how:
        return Fresh({"hira_A": draw.normal(*a), "hira_B": draw.normal(*b)}, {})
    if how == "gaussian" and len(b) == 2:
        return Fresh({"hira_A": draw.normal(*a, std=1 / config.r), "hira_B": draw.zeros(*b)}, {})
    return Fresh({"hira_A": draw.uniform(*a, bound=1 / math.sqrt(math.prod(a[1:]))), "hira_B": draw.zeros(*b)}, {})


def ratio(site: Site, p: Leaf) -> Tensor:
    """B A in the form of the weight: what the update is in units of it. Any other size raises."""
    a, b = (p[name] for name in _names(p))
    r = b.shape[1]
    return (b.reshape(site.out_features, r) @ a.reshape(r, math.prod(site.shape[1:]))).reshape(site.shape)


def after(layer: Layer, p: Leaf, x: Tensor, y: Tensor) -> Tensor:
    """Y + (W * (B A)) drop(x), in y's dtype."""
    site, config = layer.site, layer.config
    assert isinstance(config, HiraConfig)
    if site.kind == "embedding":
        a, b = p["hira_embedding_A"], p["hira_embedding_B"]
        r = b.shape[1]
        h = layer.linear(x, a.reshape(r, site.in_features))
        scale: Any = getattr(layer.module, "embed_scale", None)  # y has it already
        h = h if scale is None else h / scale
        return (y + y * (h @ b.reshape(site.out_features, r).t())).to(y.dtype)
    if config.hira_dropout:
        x = dropout(layer, x, config.hira_dropout)
    return add_weight(layer, x, y, layer.weight * ratio(site, p))


def folds(layer: Layer, p: Leaf, x: Tensor) -> bool:
    """Always: the update is as large as the weight."""
    return True


def weight(layer: Layer, p: Leaf, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """W * (1 + B A); the bias stays."""
    return (weight + weight * ratio(layer.site, p)).to(weight.dtype), bias


def with_rank(p: Leaf, old: int, r: int) -> Leaf:
    """A with zero rows and B with zero columns up to rank r, or both cut to it."""
    name_a, name_b = _names(p)
    a, b = p[name_a], p[name_b]
    axis = int(has_experts(a, b, old))
    return {**p, name_a: resized(a, axis, r), name_b: resized(b, axis + 1, r)}


def check(config: HiraConfig, path: str, p: Leaf) -> None:
    """Both factors, of one rank: with `rank_pattern`, PEFT's files have others than their config says."""
    names = _names(p)
    for name in names:
        if name not in p:
            raise SiteError(f"The site {path!r} lacks {name!r}.")
    a, b = (p[name].shape for name in names)
    experts = len(a) == len(b) == 3 and a[0] == b[0] and a[1] == b[2]
    if len(a) < 2 or len(a) != len(b) or not (experts or a[0] == b[1]) or len(p) > 2:
        raise SiteError(
            f"The site {path!r} has {names[0]} of shape {tuple(a)} and {names[1]} of shape {tuple(b)}: expected "
            "(r, in, ...) and (out, r, ...)."
        )


def describe(config: HiraConfig, leaves: Mapping[str, Leaf]) -> HiraConfig:
    """The config that the leaves say: the most frequent rank is `r`, the others are in `rank_pattern`."""
    ranks = {path: r for path, p in leaves.items() if (r := config.rank(p))}
    if all(config.at(path).r == r for path, r in ranks.items()):
        return config
    (common, _), *_ = Counter(ranks.values()).most_common(1)
    others = {re.escape(path): r for path, r in ranks.items() if r != common}
    return dataclasses.replace(config, r=common, rank_pattern=others)


def warm(site: Site, config: HiraConfig, draw: Draw) -> None:
    """PEFT draws both factors from a normal distribution first, and keeps them where `init_weights` is false."""
    if config.init_weights or (site.kind == "embedding" and config.init_weights is None):
        for shape in _shapes(site, config.r):
            draw.normal(*shape)


METHOD = register(
    Method(
        name="hira",
        config=HiraConfig,
        kinds=KINDS,
        keys={name: name for name in ("hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B")},
        init=init,
        after=after,
        folds=folds,
        weight=weight,
        describe=describe,
        check=check,
        dropout=lambda config: config.hira_dropout,
        reads=frozenset(),
        with_rank=with_rank,
        neutral=neutral,
        view=View(
            "hira",
            "Hira",
            "hira_",
            label="hira.",
            containers=("hira_dropout", "hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B"),
            dropout="hira_dropout",
            attributes={"r": "r"},
            warm=warm,
        ),
    )
)
