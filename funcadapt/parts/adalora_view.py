"""AdaLoRA as PEFT's in-place module: what holds its leaves, what PEFT draws first, and the allocation of ranks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from funcadapt.method import Draw, View
from funcadapt.parts import lora_view

if TYPE_CHECKING:
    from funcadapt.methods.adalora import AdaLoraConfig
    from funcadapt.sites import Site


def warm(site: Site, config: AdaLoraConfig, draw: Draw) -> None:
    """PEFT draws all leaves, `ranknum` too, before it draws A and B again."""
    if config.init_lora_weights:
        r = config.init_r
        for shape in ((r, math.prod(site.shape[1:])), (r, 1), (site.out_features, r)):
            draw.normal(*site.stack, *shape)
        draw.normal(1)


def update_and_allocate(tuner: Any, global_step: int) -> None:
    """One step of the allocation of ranks on a live model, see `funcadapt.view.allocating`."""
    from funcadapt.view import allocating  # it builds on the method

    allocating.update_and_allocate(tuner, global_step)


def loss(model: nn.Module, name: str) -> Tensor | None:
    """What keeps A and B of a live model near the factors of an SVD; None if it has no AdaLoRA of that name."""
    from funcadapt.view import allocating

    return allocating.live_orthogonality(model, name)


_PLAIN = ("lora_alpha", "use_dora", "use_rslora", "lora_bias")

VIEW = View(
    package="adalora",
    name="AdaLora",
    prefix="lora_",
    extends="lora",
    containers=(*lora_view.VIEW.containers, "lora_E", "ranknum"),
    empty={
        "lora_embedding_A": nn.ParameterDict,
        "lora_embedding_B": nn.ParameterDict,
        "lora_magnitude_vector": nn.ModuleDict,
    },
    classes={"linear": "SVDLinear", "hf_conv1d": "SVDLinear", "conv2d": "SVDConv2d"},
    label="adalora.",
    frozen=frozenset({"ranknum"}),
    derived=("scaling",),
    dropout="lora_dropout",
    attributes={"r": "init_r", **{name: name for name in _PLAIN}},
    warm=warm,
    tuner={"update_and_allocate": update_and_allocate},
    loss=loss,
)
