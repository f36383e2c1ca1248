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
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from funcadapt import targets
from funcadapt.layer import Layer, dropout
from funcadapt.method import Draw, Fresh, Leaf, Method, Shared, View, register
from funcadapt.parts.checks import check_leaves
from funcadapt.parts.forms import KINDS, refuse_dropout
from funcadapt.parts.lora_leaves import neutral
from funcadapt.parts.random_projections import (
    ProjectedConfig,
    add_scaled,
    dense,
    down,
    projections,
    rank_wise,
    restore,
    stored,
    up,
    vectors,
)
from funcadapt.sites import Site


@dataclasses.dataclass(frozen=True, kw_only=True)
class VeraConfig(ProjectedConfig):
    """Config of VeRA, with PEFT's fields: those of `ProjectedConfig`, and one more.

    Attributes:
        vera_dropout: dropout on the adapter's input, active when the layer is in training mode.

    Raises:
        ValueError: if the values contradict each other.
    """

    peft_type: str = "VERA"
    vera_dropout: float = 0.0

    target_table: ClassVar[targets.Targets] = {**targets.LORA, "phi": ("q_proj", "v_proj")}

    def rank(self, leaves: Mapping[str, Tensor]) -> int:
        """The rank of one site's leaves."""
        return leaves["vera_lambda_d"].shape[-1] if "vera_lambda_d" in leaves else 0


def init(site: Site, config: VeraConfig, draw: Draw, weight: Callable[[], Tensor]) -> Fresh:
    """The two vectors."""
    refuse_dropout(site, "vera_dropout", config.vera_dropout)
    strength, inner = vectors(site, config, draw, config.r)
    return Fresh({"vera_lambda_b": strength, "vera_lambda_d": inner}, {})


def share(sites: Sequence[Site], config: VeraConfig, draw: Draw, weight: Callable[[Site], Tensor]) -> Shared:
    """A and B, from the key."""
    a, b = projections(sites, draw, config.projection_prng_key, config.r, config.r)
    return Shared({}, {"vera_A": a, "vera_B": b}, {})


def after(layer: Layer, p: Leaf, x: Tensor, y: Tensor) -> Tensor:
    """Y + l_b * B (l_d * A drop(x))."""
    config: Any = layer.config
    if config.vera_dropout:
        x = dropout(layer, x, config.vera_dropout)
    a = p["vera_A"]
    h = down(layer, x, a) * rank_wise(layer, p["vera_lambda_d"], a)
    return add_scaled(layer, y, p["vera_lambda_b"], up(layer, h, p["vera_B"]))


def weight(layer: Layer, p: Leaf, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """W + (l_b * B)(l_d * A)."""
    update = dense(layer.site, p["vera_A"], p["vera_lambda_d"], p["vera_B"], p["vera_lambda_b"])
    return (weight + update).to(weight.dtype), bias


def check(config: VeraConfig, path: str, p: Leaf) -> None:
    """Both vectors, or both projections, of the config's rank."""
    r = config.r
    if path:
        check_leaves(path, p, {"vera_lambda_b": (None,), "vera_lambda_d": (r,)})
    elif config.save_projection:
        check_leaves(path, p, {"vera_A": (r, None), "vera_B": (None, r)}, lead=False)


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
        neutral=neutral,
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
