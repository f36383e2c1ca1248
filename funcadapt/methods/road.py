"""RoAd: 2D rotations and scalings of a layer's output.

    y = R (W x + b),    R made of 2x2 blocks [c_j, -s_j; s_j', c_j'] on the pairs (j, j' = j + group_size / 2)

within each group of `group_size` outputs. c = alpha cos(theta) and s = alpha sin(theta): one angle and one scale for a
pair (road_1), for each output (road_2), or separate ones for c and for s (road_4).
Leaves: `road_theta` and `road_alpha`, 1-D of out / 2 (road_1), out (road_2) or 2 out numbers (road_4); the latter are,
group by group, those of c and then those of s.
Init: theta zero, alpha one: the identity. `init_weights=False`: normal numbers around them.
Cost: out to 4 out parameters a layer, 4 out flops a token forward, three passes over the output; backward the same and
a reduction over the tokens.
Dense form: W' = R W, b' = R b.

Source: Liao et al. 2024, arXiv:2409.00119. Differs from PEFT: also on transformers' Conv1D, embeddings, convolutions
(the channels), multi-head attention, plain parameters and experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from funcadapt._torch import unflatten
from funcadapt.config import AdapterConfig
from funcadapt.errors import SiteError
from funcadapt.layer import Layer
from funcadapt.method import Draw, Fresh, Leaf, Method, View, register
from funcadapt.parts.forms import KINDS
from funcadapt.sites import Site

_PER_PAIR = {"road_1": 1, "road_2": 2, "road_4": 4}  # angles


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoadConfig(AdapterConfig):
    """Config of RoAd, with PEFT's fields.

    Attributes:
        variant: "road_1", "road_2" or "road_4": how many angles and scales a pair of outputs has.
        group_size: outputs are paired within groups of this size, which divides the number of outputs.
        init_weights: whether a new adapter is the identity; otherwise it is random.
        target_modules: names, a regular expression, "all-linear", or None for the model type's default.
        modules_to_save: modules that are trained in full and saved with the adapter.

    Raises:
        ValueError: if `variant` is unknown, or `group_size` is not positive and even.
    """

    peft_type: str = "ROAD"
    variant: str = "road_1"
    group_size: int = 64
    init_weights: bool = True
    target_modules: Sequence[str] | str | None = None
    modules_to_save: Sequence[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in _PER_PAIR:
            raise ValueError(f"Invalid variant {self.variant} specified. Please choose from road_1, road_2 or road_4")
        if self.group_size <= 0 or self.group_size % 2:
            raise ValueError(f"The group_size must be divisible by 2 when using RoadLayer, but got {self.group_size}.")


def init(site: Site, config: RoadConfig, draw: Draw, weight: Callable[[], Tensor]) -> Fresh:
    """Theta zero and alpha one, or normal numbers around them if `init_weights` is false."""
    outputs = site.out_features // site.groups  # pairs across the groups of a convolution would have no dense form
    if outputs % config.group_size:
        where = "outputs" if site.groups == 1 else f"outputs in each of {site.groups} groups"
        raise SiteError(
            f"{site.path!r} has {outputs} {where}, which must be divisible by group_size={config.group_size}."
        )
    shape = (*site.stack, site.out_features // 2 * _PER_PAIR[config.variant])
    if config.init_weights:
        return Fresh({"road_theta": draw.zeros(*shape), "road_alpha": draw.ones(*shape)}, {})
    theta = draw.normal(*shape, std=0.5)
    return Fresh({"road_theta": theta, "road_alpha": draw.cast(1 + draw.normal(*shape, std=0.5).float())}, {})


def rotated(layer: Layer, p: Leaf, y: Tensor, axis: int) -> Tensor:
    """R y, where `axis` of `y` is the one of the outputs.

    Args:
        layer: the layer.
        p: the leaves.
        y: the value, with the layer's outputs along `axis`.
        axis: the axis, negative.

    Returns:
        Of y's shape, in the dtype that promotes y and the leaves.
    """
    config, theta = layer.config, p["road_theta"]
    assert isinstance(config, RoadConfig)
    half = config.group_size // 2
    groups = layer.site.out_features // config.group_size
    # (groups, c and s, the two halves of a group, pairs), of which one angle serves all that it is expanded over
    shape = (groups, *{"road_1": (1, 1), "road_2": (1, 2), "road_4": (2, 2)}[config.variant], half)
    wide = torch.promote_types(theta.dtype, torch.float32)
    theta, alpha = theta.to(wide).reshape(shape), p["road_alpha"].to(wide).reshape(shape)
    c = (alpha[:, 0] * theta[:, 0].cos()).to(p["road_theta"].dtype)
    s = (alpha[:, -1] * theta[:, -1].sin()).to(p["road_theta"].dtype)
    s = torch.cat([-s[:, :1], s[:, -1:]], 1)
    # a number for every output: the gradient of one for a pair would be a sum over two axes, which is slow
    c, s = (t.expand(groups, 2, half).reshape(-1, *(1,) * (-1 - axis)) for t in (c, s))
    other = unflatten(y, axis, (groups, 2, half)).flip(axis - 1).reshape(y.shape)
    return torch.addcmul(y * c, other, s)


def after(layer: Layer, p: Leaf, x: Tensor, y: Tensor) -> Tensor:
    """R y."""
    return rotated(layer, p, y, 1 - len(layer.site.shape) if layer.site.kind.startswith("conv") else -1).to(y.dtype)


def weight(layer: Layer, p: Leaf, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """R W and R b."""
    new = bias if bias is None else rotated(layer, p, bias, -1).to(bias.dtype)
    return rotated(layer, p, weight, -len(layer.site.shape)).to(weight.dtype), new


def neutral(p: Leaf) -> Leaf:
    """Angles zero, scales one."""
    return {k: torch.zeros_like(v) if k == "road_theta" else torch.ones_like(v) for k, v in p.items()}


def check(config: RoadConfig, path: str, p: Leaf) -> None:
    """As many angles as scales, for whole groups of outputs."""
    shapes = {name: tuple(p[name].shape) if name in p else None for name in ("road_theta", "road_alpha")}
    theta, alpha = shapes.values()
    if theta != alpha or not theta or theta[-1] % (config.group_size // 2 * _PER_PAIR[config.variant]):
        raise SiteError(f"The site {path!r} has the leaves {shapes}, which are no {config.variant} of whole groups of "
                        f"{config.group_size} outputs.")  # fmt: skip


METHOD = register(
    Method(
        name="road",
        config=RoadConfig,
        kinds=KINDS,
        keys={"road_theta": "road_theta", "road_alpha": "road_alpha"},
        init=init,
        inits_experts=True,
        after=after,
        weight=weight,
        check=check,
        reads=frozenset({"variant", "group_size"}),
        neutral=neutral,
        view=View(
            "road", "Road", "road_", label="road.", attributes={"variant": "variant", "group_size": "group_size"}
        ),
    )
)
