"""LoRA as PEFT's in-place module: which layers hold its leaves, and what PEFT draws while it makes them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from funcadapt.method import Draw, View
from funcadapt.parts import lora_inits

if TYPE_CHECKING:
    from funcadapt.methods.lora import LoraConfig
    from funcadapt.sites import Site

_CONV = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


def holder(site: Site, base: nn.Module, container: str, parts: Mapping[str, Tensor]) -> nn.Module | None:
    """The convolutions that hold A and B in the in-place view; None for linear layers."""
    if container not in ("lora_A", "lora_B") or site.kind in ("parameter", "experts"):
        return None
    weight = parts["weight"]
    if weight.ndim not in _CONV:
        return None
    conv: Any = _CONV[weight.ndim]
    like: Any = base
    options: dict[str, Any] = {"device": "meta", "bias": "bias" in parts}
    if container == "lora_A":
        made = conv(weight.shape[1], weight.shape[0], weight.shape[2:], like.stride, like.padding, **options)
    else:
        made = conv(weight.shape[1] * site.groups, weight.shape[0], weight.shape[2:], groups=site.groups, **options)
    for name, value in parts.items():
        setattr(made, name, nn.Parameter(value))
    return made


def warm(site: Site, config: LoraConfig, draw: Draw) -> None:
    """PEFT builds A and B as layers, which draw their own init, before it draws A again."""
    r, spatial, how = config.r, site.shape[2:], config.init_lora_weights
    if site.kind == "mha" and how in (True, False, "gaussian"):
        # it makes the layer of the out-projection first, and draws all of that again afterwards
        out: Any = dataclasses.replace(site, kind="linear", shape=(site.in_features, site.in_features))
        warm(out, config, draw)
        lora_inits.new(out, config, draw, lambda: draw.zeros(), 1.0)
    if how is False or (how == "eva" and site.kind != "embedding"):
        return  # they stay as they are, and `init` draws the same
    if site.kind == "embedding":
        draw.normal(r, site.in_features)
        draw.normal(site.out_features, r)
        return
    fan_in, rows = site.in_features * math.prod(spatial), r * max(1, site.experts)
    draw.uniform(rows, fan_in, bound=1.0)
    draw.uniform(site.out_features, rows // site.groups, bound=1.0)
    if config.lora_bias:
        draw.uniform(site.out_features, bound=1.0)


# what variants add to PEFT's `LoraModel`, by name: (tuner, ...) -> anything
TUNER: dict[str, Callable[..., Any]] = {}

VIEW = View(
    package="lora",
    name="Lora",
    prefix="lora_",
    containers=("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"),
    label="lora.",
    held={"lora_magnitude_vector": "lora_magnitude_vector.weight"},
    derived=("scaling",),
    dropout="lora_dropout",
    attributes={name: name for name in ("r", "lora_alpha", "use_dora", "use_rslora", "lora_bias")},
    entries={
        "lora_magnitude_vector": "lora.dora.DoraLinearLayer",
        # PEFT's classes that derive from that one put the prefix before themselves once more
        **{
            f"lora_magnitude_vector:{name.lower()}": f"lora.dora.lora.dora.Dora{name}Layer"
            for name in ("Embedding", "Conv1d", "Conv2d", "Conv3d")
        },
    },
    holder=holder,
    warm=warm,
    tuner=TUNER,
)
