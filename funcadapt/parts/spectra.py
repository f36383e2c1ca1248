"""Few trained numbers at random places of a matrix, a transform of the update: what FourierFT and WaveFT share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from funcadapt import targets
from funcadapt.config import AdapterConfig
from funcadapt.errors import SiteError
from funcadapt.layer import Layer
from funcadapt.method import Draw, Leaf
from funcadapt.parts.checks import check_layers, check_positive
from funcadapt.parts.forms import matrix
from funcadapt.sites import Site

FOURIER: targets.Targets = {**targets.LORA, "gpt2": ("mlp.c_proj",), "gpt_bigcode": ("mlp.c_proj",)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpectralConfig(AdapterConfig):
    """The fields that FourierFT and WaveFT share, as in PEFT.

    Attributes:
        fan_in_fan_out: PEFT's bookkeeping; the layer's type decides.
        target_modules: names, a regular expression, "all-linear", or None for the model type's default.
        exclude_modules: names or a regular expression to leave out.
        bias: "none", "all" (train every bias of the model) or one that ends in "_only" (those of the adapted layers).
        modules_to_save: modules that are trained in full and saved with the adapter.
        layers_to_transform: indices of the layers to adapt.
        layers_pattern: the name of the layer list, with `layers_to_transform`.
        n_frequency_pattern: how many numbers, by regular expression of the site path.

    Raises:
        ValueError: if the values contradict each other.
    """

    fan_in_fan_out: bool = False
    target_modules: Sequence[str] | str | None = None
    exclude_modules: Sequence[str] | str | None = None
    bias: str = "none"
    modules_to_save: Sequence[str] | None = None
    layers_to_transform: Sequence[int] | int | None = None
    layers_pattern: Sequence[str] | str | None = None
    n_frequency_pattern: Mapping[str, int] | None = dataclasses.field(default_factory=dict[str, int])

    patterned: ClassVar[Mapping[str, str]] = {"n_frequency": "n_frequency_pattern"}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "n_frequency")
        check_layers(self, of_names=True)


def check_number(site: Site, n: int) -> None:
    """Raise SiteError if a site's weight has fewer entries than n."""
    out, inputs = matrix(site)
    if n > out * inputs:
        raise SiteError(f"n_frequency={n} is more than the {out * inputs} entries of the weight of {site.path!r}.")


def proportional(sites: Sequence[Site], n: int) -> list[tuple[Site, int]]:
    """How many numbers each site has of n for each on average, in proportion to the entries of its weight.

    Args:
        sites: the sites. Every expert counts as one.
        n: the mean.

    Returns:
        Sites and numbers, rounded as PEFT rounds them, at least one; for experts that of each.
    """
    sizes = [math.prod(matrix(site)) for site in sites]
    counts = [max(1, site.experts) for site in sites]
    total = sum(size * count for size, count in zip(sizes, counts, strict=True))
    return [(site, max(1, round(size / total * (n * sum(counts))))) for site, size in zip(sites, sizes, strict=True)]


def check_spectrum(path: str, p: Leaf, name: str, n: int | None) -> None:
    """Raise SiteError unless a leaf has n numbers (None: any number), for each expert if there are some."""
    shape = tuple(p[name].shape) if name in p else ()
    if len(shape) not in (1, 2) or (n is not None and shape[-1:] != (n,)):
        expected = "one number or more" if n is None else f"({n},)"
        raise SiteError(f"The site {path!r} has {name} of shape {shape}, its config says {expected}.")


def places(site: Site, n: int, seed: int, draw: Draw) -> Tensor:
    """Rows and columns (2, n) of a random subset of the weight's entries, as PEFT draws it.

    Args:
        site: the site.
        n: how many.
        seed: the seed.
        draw: says the device.

    Returns:
        The places.
    """
    check_number(site, n)
    if draw.abstract:
        return torch.zeros(2, n, dtype=torch.long, device=draw.device)
    out, inputs = matrix(site)
    flat = torch.randperm(out * inputs, generator=torch.Generator().manual_seed(seed))[:n]
    return torch.stack([flat // inputs, flat % inputs]).to(draw.device)


def scaled(layer: Layer, p: Leaf, name: str) -> Tensor:
    """The numbers of a leaf times `scaling`, in 32 bits at least, as many as places."""
    config: Any = layer.config
    c = p[name].reshape(p["places"].shape[1:])
    return c.to(torch.promote_types(c.dtype, torch.float32)) * config.scaling
