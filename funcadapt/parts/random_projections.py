"""Two frozen random matrices that all layers of an adapter share, and vectors of each layer: VeRA, PVeRA and others.

A is (r, widest input), B (widest output, r), and a layer uses the first columns and rows that it needs. The base weight
is a matrix (out, columns) at every kind of layer: columns are inputs, at a convolution inputs of a group times kernel.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from funcadapt.config import AdapterConfig
from funcadapt.layer import Layer
from funcadapt.method import Draw, Leaf
from funcadapt.parts.checks import check_common
from funcadapt.parts.forms import columns
from funcadapt.sites import Site


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProjectedConfig(AdapterConfig):
    """The fields that VeRA and PVeRA share, as in PEFT.

    Attributes:
        r: the rank, larger than LoRA's would be.
        target_modules: names, a regular expression, "all-linear", or None for the model type's default.
        projection_prng_key: the seed of A and B.
        save_projection: whether checkpoints hold A and B.
        d_initial: where the vector inside starts.
        fan_in_fan_out: PEFT's bookkeeping; the layer's type decides.
        bias: "none", "all" (train every bias of the model) or "vera_only" (those of the adapted layers).
        modules_to_save: modules that are trained in full and saved with the adapter.
        init_weights: whether the adapter starts as the identity; otherwise l_b is one and l_d normal.
        layers_to_transform: indices of the layers to adapt.
        layers_pattern: the name of the layer list, with `layers_to_transform`.

    Raises:
        ValueError: if the values contradict each other.
    """

    r: int = 256
    target_modules: Sequence[str] | str | None = None
    projection_prng_key: int = 0
    save_projection: bool = True
    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    bias: str = "none"
    modules_to_save: Sequence[str] | None = None
    init_weights: bool = True
    layers_to_transform: Sequence[int] | int | None = None
    layers_pattern: Sequence[str] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_common(self)


def widest(sites: Sequence[Site]) -> tuple[int, int]:
    """The most outputs and the most columns of any site."""
    return max(site.out_features for site in sites), max(map(columns, sites))


def projections(sites: Sequence[Site], draw: Draw, key: int, rows: int, r: int) -> tuple[Tensor, Tensor]:
    """A (rows, widest input) and B (widest output, r), kaiming-uniform from a generator of their own.

    Args:
        sites: the sites that share them.
        draw: makes them of the right dtype and device.
        key: the seed: bit for bit what PEFT draws.
        rows: of A.
        r: columns of B.

    Returns:
        Both.
    """
    outputs, inputs = widest(sites)
    if draw.abstract:
        return draw.zeros(rows, inputs), draw.zeros(outputs, r)
    generator = torch.Generator("cpu").manual_seed(key)
    a, b = (_kaiming(generator, *shape) for shape in ((rows, inputs), (outputs, r)))
    return draw.cast(a), draw.cast(b)


def _kaiming(generator: torch.Generator, rows: int, fan_in: int) -> Tensor:
    """Uniform with variance 2 / fan_in, as PEFT draws it."""
    bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(fan_in))
    return torch.empty(rows, fan_in).uniform_(-bound, bound, generator=generator)


def vectors(site: Site, config: ProjectedConfig, draw: Draw, r: int) -> tuple[Tensor, Tensor]:
    """L_b (out) and l_d (r): zero and `d_initial`, or one and normal numbers."""
    if config.init_weights:
        return draw.zeros(site.out_features), draw.cast(torch.full((r,), config.d_initial))
    return draw.ones(site.out_features), draw.normal(r)


def down(layer: Layer, x: Tensor, a: Tensor) -> Tensor:
    """The input through the first columns of a shared projection (r, widest input).

    Args:
        layer: the layer.
        x: its input.
        a: the projection.

    Returns:
        (*batch, r), or (batch * groups, r, *spatial): every group of a convolution has the same projection.
    """
    site = layer.site
    if x.is_floating_point() and x.dtype != a.dtype:
        x = x.to(a.dtype)
    if len(site.shape) == 2:  # narrow: unlike a slice, it raises where there are too few columns
        return layer.linear(x, a.narrow(1, 0, site.shape[1]))
    if site.groups > 1:
        x = x.reshape(-1, site.shape[1], *x.shape[2 - len(site.shape) :])
    return layer.linear(x, a.narrow(1, 0, columns(site)).reshape(-1, *site.shape[1:]))


def up(layer: Layer, h: Tensor, b: Tensor) -> Tensor:
    """What `down` gave through the first rows of a shared projection (widest output, r).

    Args:
        layer: the layer.
        h: what `down` gave, scaled.
        b: the projection.

    Returns:
        (*batch, out) or (batch, out, *spatial).
    """
    site = layer.site
    spatial = (1,) * (len(site.shape) - 2)
    if site.groups > 1:
        h = h.reshape(-1, site.groups * h.shape[1], *h.shape[2:])
    b = b.narrow(0, 0, site.out_features)
    return layer.pointwise(h, b.reshape(*b.shape, *spatial))


def rank_wise(layer: Layer, vector: Tensor, a: Tensor) -> Tensor:
    """A vector of one number per row of a projection, shaped to multiply what `down` gives."""
    return vector.reshape(a.shape[0], *(1,) * (len(layer.site.shape) - 2))


def add_scaled(layer: Layer, y: Tensor, strength: Tensor, update: Tensor) -> Tensor:
    """Y + strength * update, in y's dtype."""
    strength = layer.per_output(strength)
    if y.dtype == update.dtype == strength.dtype and y.shape == update.shape:
        return torch.addcmul(y, strength, update)
    return (y + (strength * update).reshape(y.shape)).to(y.dtype)


def dense(site: Site, a: Tensor, d: Tensor, b: Tensor, strength: Tensor) -> Tensor:
    """(l_b * B)(l_d * A) in the shape of the weight."""
    a = a.narrow(1, 0, columns(site)) * d.reshape(a.shape[0], 1)
    b = b.narrow(0, 0, site.out_features) * strength.reshape(site.out_features, 1)
    return (b @ a).reshape(site.shape)


def stored(config: Any, path: str, p: Leaf) -> Mapping[str, Tensor | None]:
    """No projections where the config says so."""
    return dict.fromkeys(p) if not path and not config.save_projection else {}


def restore(config: Any, path: str, p: Leaf) -> Leaf:
    """As PEFT: without the projections where the config says that they are drawn again, even if they are there."""
    if path or config.save_projection:
        return p
    warnings.warn(
        f"The checkpoint holds {', '.join(map(repr, p))}, but save_projection=False says to draw them again from "
        "projection_prng_key. Set save_projection=True to use them.",
        stacklevel=2,
    )
    return {}
