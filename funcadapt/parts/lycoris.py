"""What LoHa and LoKr have in common: their config, their scaling, dropout and sizes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from funcadapt.config import AdapterConfig
from funcadapt.drawing import _scrambled as scrambled  # pyright: ignore[reportPrivateUsage]
from funcadapt.errors import SiteError
from funcadapt.layer import Layer
from funcadapt.parts.checks import check_layers, check_positive
from funcadapt.sites import Site


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
        check_positive(self, "r")
        check_layers(self)
        for name, alpha in {"alpha": self.alpha, **self.alpha_pattern}.items():
            if not -1e300 < alpha < 1e300:
                raise ValueError(f"`alpha` must be finite, got {alpha} ({name!r}).")
        if not 0 <= self.rank_dropout < 1 or not 0 <= self.module_dropout <= 1:
            raise ValueError(f"`rank_dropout` must be in [0, 1) and `module_dropout` in [0, 1], got {self.rank_dropout}"
                             f" and {self.module_dropout}.")  # fmt: skip


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


def has_core(site: Site, config: LycorisConfig) -> bool:
    """Whether a site's kernel gets a factor of its own."""
    return config.use_effective_conv2d and math.prod(site.shape[2:]) > 1


def core_shape(site: Site, r: int) -> tuple[int, ...]:
    """The shape of that factor: in one dimension there is a second one, as in PEFT."""
    kernel = site.shape[2:]
    return r, r, *kernel, *(1,) * (len(kernel) == 1)


def factorization(dimension: int, factor: int = -1) -> tuple[int, int]:
    """Two numbers whose product is a third one, as in PEFT and LyCORIS.

    Args:
        dimension: the product.
        factor: one of the two, if it divides; otherwise what the smaller one may not exceed. -1: both near the root.

    Returns:
        The numbers; the smaller one first, unless the factor divides.

    Example:
        >>> factorization(128), factorization(127), factorization(128, 4), factorization(250, 6)
        ((8, 16), (1, 127), (4, 32), (5, 50))
    """
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    limit = dimension if factor == -1 else factor
    m, n = 1, dimension
    while m < n:
        larger = next(d for d in range(m + 1, dimension + 1) if dimension % d == 0)
        if larger + dimension // larger > dimension + 1 or larger > limit:
            break
        m, n = larger, dimension // larger
    return min(m, n), max(m, n)


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
