"""VeRA: random projections that all layers share, and two trained vectors a layer.

    y = W x + b + l_b * (B (l_d * (A drop(x))))

Leaves: `vera_lambda_b` (out), `vera_lambda_d` (r). Shared by all layers and frozen: `vera_A` (r, widest input) and
`vera_B` (widest output, r), of which each layer uses the first columns and rows. The base weight is a matrix (out,
columns) at every kind of layer: columns are inputs, at a convolution inputs of a group times kernel.
Init: l_b zero, l_d `d_initial`: the identity. A and B kaiming-uniform from a generator of their own, seeded with
`projection_prng_key`: bit for bit PEFT's. With `save_projection=False` no checkpoint holds them, and they are drawn
again: `fa.load(directory, model=model)`.
Cost: out + r parameters a layer; LoRA's 2 r (columns + out) flops a token forward and as many backward, as A and B
have no gradient. Dense form: W + (l_b * B)(l_d * A).

Source: Kopiczko et al. 2024, arXiv:2310.11454. Differs from PEFT: also on embeddings, convolutions (grouped ones too),
multi-head attention, plain parameters and experts; adapters of one model may have different keys.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from funcadapt import targets
from funcadapt.config import AdapterConfig
from funcadapt.errors import SiteError
from funcadapt.forms import KINDS, columns, refuse_dropout
from funcadapt.layer import Layer, dropout
from funcadapt.method import Draw, Fresh, Leaf, Method, Shared, View, register
from funcadapt.sites import Site


@dataclasses.dataclass(frozen=True, kw_only=True)
class VeraConfig(AdapterConfig):
    """Config of VeRA, with PEFT's fields.

    Attributes:
        r: the rank, larger than LoRA's would be.
        target_modules: names, a regular expression, "all-linear", or None for the model type's default.
        projection_prng_key: the seed of A and B.
        save_projection: whether checkpoints hold A and B.
        vera_dropout: dropout on the adapter's input, active when the layer is in training mode.
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

    peft_type: str = "VERA"
    r: int = 256
    target_modules: Sequence[str] | str | None = None
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    bias: str = "none"
    modules_to_save: Sequence[str] | None = None
    init_weights: bool = True
    layers_to_transform: Sequence[int] | int | None = None
    layers_pattern: Sequence[str] | str | None = None

    target_table: ClassVar[targets.Targets] = {**targets.LORA, "phi": ("q_proj", "v_proj")}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_config(self, self.vera_dropout)

    def rank(self, leaves: Mapping[str, Tensor]) -> int:
        """The rank of one site's leaves."""
        return leaves["vera_lambda_d"].shape[-1] if "vera_lambda_d" in leaves else 0


def check_config(config: Any, rate: float) -> None:
    """What the configs of methods with shared projections have in common.

    Args:
        config: the config.
        rate: its rate of dropout.

    Raises:
        ValueError: if the values contradict each other.
    """
    name = config.peft_type.lower()
    if config.r <= 0:
        raise ValueError(f"`r` should be a positive integer value but the value passed is {config.r}")
    if config.layers_pattern and config.layers_to_transform is None:
        raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified. ")
    if config.bias not in ("none", "all", f"{name}_only"):
        raise ValueError(f"`bias` must be 'none', 'all' or '{name}_only', got {config.bias!r}.")
    if not 0 <= rate < 1:
        raise ValueError(f"`{name}_dropout` must be in [0, 1), got {rate}.")


def widest(sites: Sequence[Site]) -> tuple[int, int]:
    """The most outputs and the most columns of any site."""
    return max(site.out_features for site in sites), max(map(columns, sites))


def kaiming(generator: torch.Generator, rows: int, fan_in: int) -> Tensor:
    """Uniform with variance 2 / fan_in, as PEFT draws it."""
    bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(fan_in))
    return torch.empty(rows, fan_in).uniform_(-bound, bound, generator=generator)


def init(site: Site, config: VeraConfig, draw: Draw, weight: Callable[[], Tensor]) -> Fresh:
    """The two vectors."""
    refuse_dropout(site, "vera_dropout", config.vera_dropout)
    out, r = site.out_features, config.r
    if config.init_weights:
        inner = draw.cast(torch.full((r,), config.d_initial))
        return Fresh({"vera_lambda_b": draw.zeros(out), "vera_lambda_d": inner}, {})
    return Fresh({"vera_lambda_b": draw.ones(out), "vera_lambda_d": draw.normal(r)}, {})


def share(sites: Sequence[Site], config: VeraConfig, draw: Draw, weight: Callable[[Site], Tensor]) -> Shared:
    """A and B, from the key."""
    (out, inputs), r = widest(sites), config.r
    if draw.abstract:
        return Shared({}, {"vera_A": draw.zeros(r, inputs), "vera_B": draw.zeros(out, r)}, {})
    generator = torch.Generator("cpu").manual_seed(config.projection_prng_key)
    a = kaiming(generator, r, inputs)
    return Shared({}, {"vera_A": draw.cast(a), "vera_B": draw.cast(kaiming(generator, out, r))}, {})


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


def after(layer: Layer, p: Leaf, x: Tensor, y: Tensor) -> Tensor:
    """Y + l_b * B (l_d * A drop(x))."""
    config: Any = layer.config
    if config.vera_dropout:
        x = dropout(layer, x, config.vera_dropout)
    a = p["vera_A"]
    h = down(layer, x, a) * rank_wise(layer, p["vera_lambda_d"], a)
    return add_scaled(layer, y, p["vera_lambda_b"], up(layer, h, p["vera_B"]))


def dense(site: Site, a: Tensor, d: Tensor, b: Tensor, strength: Tensor) -> Tensor:
    """(l_b * B)(l_d * A) in the shape of the weight."""
    a = a.narrow(1, 0, columns(site)) * d.reshape(a.shape[0], 1)
    b = b.narrow(0, 0, site.out_features) * strength.reshape(site.out_features, 1)
    return (b @ a).reshape(site.shape)


def weight(layer: Layer, p: Leaf, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """W + (l_b * B)(l_d * A)."""
    update = dense(layer.site, p["vera_A"], p["vera_lambda_d"], p["vera_B"], p["vera_lambda_b"])
    return (weight + update).to(weight.dtype), bias


def check_leaves(path: str, p: Leaf, expected: Mapping[str, tuple[int | None, ...]], lead: bool = True) -> None:
    """Exactly the leaves that there must be, in shapes of which None is any size.

    Args:
        path: the site's path, "" for what sites share.
        p: the leaves.
        expected: name -> shape.
        lead: whether experts may come first.

    Raises:
        SiteError: if one is missing, or of another shape.
    """
    where = f"The site {path!r}" if path else "The file"
    for name, shape in expected.items():
        if name not in p:
            raise SiteError(f"{where} lacks {name!r}.")
        got = tuple(p[name].shape)
        own = got[len(got) - len(shape) :] if lead and len(got) == len(shape) + 1 else got
        if len(own) != len(shape) or any(want not in (None, size) for want, size in zip(shape, own, strict=True)):
            sizes = ", ".join("any" if size is None else str(size) for size in shape)
            raise SiteError(f"{where} has {name} of shape {got}, expected ({sizes}) by its config.")


def check(config: VeraConfig, path: str, p: Leaf) -> None:
    """Both vectors, or both projections, of the config's rank."""
    r = config.r
    if path:
        check_leaves(path, p, {"vera_lambda_b": (None,), "vera_lambda_d": (r,)})
    elif config.save_projection:
        check_leaves(path, p, {"vera_A": (r, None), "vera_B": (None, r)}, lead=False)


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


def warm(site: Site, config: Any, draw: Draw) -> None:
    """PEFT draws the inner vector before it sets it."""
    if config.init_weights:
        draw.normal(config.r)


METHOD = register(
    Method(
        name="vera",
        config=VeraConfig,
        kinds=KINDS,
        keys={"vera_lambda_b": "vera_lambda_b", "vera_lambda_d": "vera_lambda_d"},
        shared={"vera_A": "vera_A", "vera_B": "vera_B"},
        constants=frozenset({"vera_A", "vera_B"}),
        init=init,
        share=share,
        complete=lambda config: config.save_projection,
        after=after,
        weight=weight,
        stored=stored,
        restore=restore,
        check=check,
        dropout=lambda config: config.vera_dropout,
        reads=frozenset(),
        neutral=lambda p: {name: torch.zeros_like(leaf) for name, leaf in p.items()},
        view=View(
            package="vera",
            name="Vera",
            prefix="vera_lambda_",
            label="vera.",
            dropout="vera_dropout",
            attributes={"r": "r"},
            warm=warm,
        ),
    )
)
