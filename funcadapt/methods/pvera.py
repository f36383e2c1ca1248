"""PVeRA: VeRA whose inner activations are drawn from a distribution that the layer learns.

    (mu, log var) = l_d * (A drop(x)), cut in two        z = mu + sqrt(var) eps in training mode, else mu
    y = W x + b + l_b * (B z)

Leaves: `pvera_lambda_b` (out), `pvera_lambda_d` (2 r). Shared by all layers and frozen: `pvera_A` (2 r, widest input)
and `pvera_B` (widest output, r), of which each layer uses the first columns and rows; the base weight is a matrix (out,
columns) as in VeRA. eps is normal, one number for every rank and token (and group of a convolution).
Init: l_b zero, l_d `d_initial`: the identity. A and B kaiming-uniform from a generator of their own, seeded with
`projection_prng_key`: bit for bit PEFT's. `save_projection=False` as in VeRA.
Random numbers: eps comes from torch's own generator, as in PEFT (so `torch.func.vmap` wants a `randomness`), or from
one of each layer, seeded with `generator_seed`, that lives as long as the layer; the latter not in compiled graphs.
`sample_at_inference` draws in eval mode, too.
Cost: out + 2 r parameters a layer; 2 r (2 columns + out) flops a token in training, VeRA's in eval mode, where only the
half of A that gives the mean is used. Dense form: W + (l_b * B)(l_d * A) of the mean; what is drawn has none, so that
weights which are used without a call of their layer are refused.

Source: Fuller et al. 2025, arXiv:2512.07703. Differs from PEFT: also on embeddings and convolutions; adapters of one
model may have different keys.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from funcadapt import targets
from funcadapt.errors import SiteError
from funcadapt.layer import Layer, dropout
from funcadapt.method import Draw, Fresh, Leaf, Method, Shared, View, register
from funcadapt.parts.checks import check_leaves
from funcadapt.parts.forms import KINDS
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

_WEIGHT_ONLY = frozenset({"mha", "parameter", "experts"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class PveraConfig(ProjectedConfig):
    """Config of PVeRA, with PEFT's fields: those of `ProjectedConfig`, and some more.

    Attributes:
        pvera_dropout: dropout on the adapter's input, active when the layer is in training mode.
        sample_at_inference: whether to draw in eval mode, too.
        generator_seed: the seed of each layer's own generator, or None for torch's.

    Raises:
        ValueError: if the values contradict each other.
    """

    peft_type: str = "PVERA"
    pvera_dropout: float = 0.0
    sample_at_inference: bool = False
    generator_seed: int | None = None

    target_table: ClassVar[targets.Targets] = {
        **targets.LORA,
        "phi": ("q_proj", "v_proj"),
        "dinov2": ("query", "value"),
    }

    def rank(self, leaves: Mapping[str, Tensor]) -> int:
        """The rank of one site's leaves."""
        return leaves["pvera_lambda_d"].shape[-1] // 2 if "pvera_lambda_d" in leaves else 0


def init(site: Site, config: PveraConfig, draw: Draw, weight: Callable[[], Tensor]) -> Fresh:
    """The two vectors."""
    if site.kind in _WEIGHT_ONLY:
        raise SiteError(f"{site.path!r} is applied through its weight, and what PVeRA draws for every token has no "
                        "weight. Use VeRA there.")  # fmt: skip
    strength, inner = vectors(site, config, draw, 2 * config.r)
    return Fresh({"pvera_lambda_b": strength, "pvera_lambda_d": inner}, {})


def share(sites: Sequence[Site], config: PveraConfig, draw: Draw, weight: Callable[[Site], Tensor]) -> Shared:
    """A and B, from the key."""
    a, b = projections(sites, draw, config.projection_prng_key, 2 * config.r, config.r)
    return Shared({}, {"pvera_A": a, "pvera_B": b}, {})


_generators: weakref.WeakKeyDictionary[nn.Module, dict[int, torch.Generator]] = weakref.WeakKeyDictionary()


def noise(layer: Layer, like: Tensor) -> Tensor:
    """Normal numbers in the form of a tensor."""
    config: Any = layer.config
    seed: int | None = config.generator_seed
    if seed is None:
        return torch.randn_like(like)
    of_layer = _generators.setdefault(layer.module, {})
    if seed not in of_layer:
        of_layer[seed] = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(like.shape, dtype=like.dtype, generator=of_layer[seed]).to(like.device)


def mean(a: Tensor, d: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """The halves of A and l_d that give the mean."""
    return a.reshape(2, r, a.shape[1])[0], d.reshape(2, r)[0]


def after(layer: Layer, p: Leaf, x: Tensor, y: Tensor) -> Tensor:
    """Y + l_b * B z."""
    config: Any = layer.config
    if config.pvera_dropout:
        x = dropout(layer, x, config.pvera_dropout)
    a, b, d = p["pvera_A"], p["pvera_B"], p["pvera_lambda_d"]
    if layer.training or config.sample_at_inference:
        both = down(layer, x, a) * rank_wise(layer, d, a)
        mu, log_var = torch.chunk(both, 2, 1 - len(layer.site.shape))  # channels of a convolution precede its space
        std = torch.exp(0.5 * log_var)
        z = torch.addcmul(mu, noise(layer, std), std)
    else:
        a, d = mean(a, d, b.shape[1])
        z = down(layer, x, a) * rank_wise(layer, d, a)
    return add_scaled(layer, y, p["pvera_lambda_b"], up(layer, z, b))


def weight(layer: Layer, p: Leaf, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """W + (l_b * B)(l_d * A), of the mean."""
    b = p["pvera_B"]
    a, d = mean(p["pvera_A"], p["pvera_lambda_d"], b.shape[1])
    return (weight + dense(layer.site, a, d, b, p["pvera_lambda_b"])).to(weight.dtype), bias


def check(config: PveraConfig, path: str, p: Leaf) -> None:
    """Both vectors, or both projections, of the config's rank."""
    r = config.r
    if path:
        check_leaves(path, p, {"pvera_lambda_b": (None,), "pvera_lambda_d": (2 * r,)})
    elif config.save_projection:
        check_leaves(path, p, {"pvera_A": (2 * r, None), "pvera_B": (None, r)}, lead=False)


def warm(site: Site, config: Any, draw: Draw) -> None:
    """PEFT draws the inner vector before it sets it."""
    if config.init_weights:
        draw.normal(2 * config.r)


METHOD = register(
    Method(
        name="pvera",
        config=PveraConfig,
        kinds=KINDS - _WEIGHT_ONLY,
        keys={"pvera_lambda_b": "pvera_lambda_b", "pvera_lambda_d": "pvera_lambda_d"},
        shared={"pvera_A": "pvera_A", "pvera_B": "pvera_B"},
        constants=frozenset({"pvera_A", "pvera_B"}),
        init=init,
        share=share,
        complete=lambda config: config.save_projection,
        after=after,
        weight=weight,
        stored=stored,
        restore=restore,
        check=check,
        dropout=lambda config: config.pvera_dropout,
        reads=frozenset({"sample_at_inference", "generator_seed"}),
        neutral=neutral,
        view=View(
            package="pvera",
            name="Pvera",
            prefix="pvera_lambda_",
            label="pvera.",
            dropout="pvera_dropout",
            attributes={"r": "r", "sample_at_inference": "sample_at_inference"},
            warm=warm,
        ),
    )
)
