"""RandLoRA: an update of full rank, a weighted sum of many random low-rank products that all layers share.

    y = W x + b + s D drop(x)        D = U V where the layer has at least as many outputs as columns, else (U V)^T
    V = (lambda_kj A_k gamma_j) (r n, small)        U = B (large, n r)        s = randlora_alpha / r

Leaves: `randlora_lambda` (r, n), `randlora_gamma` (n, small). Shared by all layers and frozen: `randlora_A`
(r, 1, smallest) and `randlora_B` (largest, most n, r), of which each layer uses the first entries. The base weight is a
matrix (out, columns) at every kind of layer: columns are inputs, at a convolution inputs of a group times kernel; large
and small are the larger and the smaller of the two, and n = ceil(small / r): a smaller r is more parameters.
Init: lambda zero, gamma 1 / max(n, small): the identity. A and B kaiming-uniform in bfloat16 over their standard
deviations, from a generator of their own, seeded with `projection_prng_key`: bit for bit PEFT's. `sparse` and
`very_sparse` make them of -1, 0 and 1. With `save_projection=False` no checkpoint holds them, and they are drawn again:
`fa.load(directory, model=model)`. Otherwise a checkpoint holds them for each layer and once more for all, as PEFT's.
Cost: n (r + small) parameters a layer; 2 small (columns + out) flops a token forward and as many backward, and V anew
in each call, of which autograd keeps nothing. Dense form: W + s D.

Source: Albert et al. 2025, arXiv:2502.00987. Differs from PEFT: also on embeddings, convolutions (grouped ones too),
multi-head attention, plain parameters and experts; forward mode and `torch.func` work; adapters of one model may have
different keys; bases that are all zero are refused (PEFT divides by their deviation).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from funcadapt.config import AdapterConfig
from funcadapt.errors import SiteError
from funcadapt.layer import Layer, dropout
from funcadapt.method import Draw, Fresh, Leaf, Method, Shared, View, register
from funcadapt.parts.checks import check_common, check_leaves
from funcadapt.parts.forms import KINDS, add_product, columns, refuse_dropout
from funcadapt.parts.random_projections import restore, widest
from funcadapt.sites import Site

BASES = ("randlora_A", "randlora_B")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandLoraConfig(AdapterConfig):
    """Config of RandLoRA, with PEFT's fields.

    Attributes:
        r: the rank of each of the bases, of which there are fewer the larger it is.
        target_modules: names, a regular expression, "all-linear", or None for the model type's default.
        projection_prng_key: the seed of A and B.
        save_projection: whether checkpoints hold A and B.
        sparse: whether A and B are of -1, 0 and 1, a third of them not zero.
        very_sparse: likewise, one in the square root of the smallest width not zero.
        randlora_dropout: dropout on the adapter's input, active when the layer is in training mode.
        fan_in_fan_out: PEFT's bookkeeping; the layer's type decides.
        randlora_alpha: the scaling is randlora_alpha / r.
        bias: "none", "all" (train every bias of the model) or "randlora_only" (those of the adapted layers).
        modules_to_save: modules that are trained in full and saved with the adapter.
        init_weights: whether the adapter starts as the identity; otherwise lambda is normal.
        layers_to_transform: indices of the layers to adapt.
        layers_pattern: the name of the layer list, with `layers_to_transform`.

    Raises:
        ValueError: if the values contradict each other.
    """

    peft_type: str = "RANDLORA"
    r: int = 32
    target_modules: Sequence[str] | str | None = None
    projection_prng_key: int = 0
    save_projection: bool = True
    sparse: bool = False
    very_sparse: bool = False
    randlora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    randlora_alpha: float = 640
    bias: str = "none"
    modules_to_save: Sequence[str] | None = None
    init_weights: bool = True
    layers_to_transform: Sequence[int] | int | None = None
    layers_pattern: Sequence[str] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_common(self)

    def rank(self, leaves: Mapping[str, Tensor]) -> int:
        """The rank of one site's leaves."""
        return leaves["randlora_lambda"].shape[-2] if "randlora_lambda" in leaves else 0


def _sizes(site: Site) -> tuple[int, int]:
    return min(site.out_features, columns(site)), max(site.out_features, columns(site))


def init(site: Site, config: RandLoraConfig, draw: Draw, weight: Callable[[], Tensor]) -> Fresh:
    """Lambda and gamma."""
    refuse_dropout(site, "randlora_dropout", config.randlora_dropout)
    (small, large), r = _sizes(site), config.r
    n = math.ceil(small / r)
    if config.init_weights:
        scales, entry = draw.zeros(r, n), 1 / max(n, small)
    else:
        scales, entry = draw.normal(r, n), 1 / large
    return Fresh({"randlora_lambda": scales, "randlora_gamma": draw.cast(torch.full((n, small), entry))}, {})


def share(sites: Sequence[Site], config: RandLoraConfig, draw: Draw, weight: Callable[[Site], Tensor]) -> Shared:
    """A and B, from the key."""
    outputs, inputs = widest(sites)
    small, large, r = min(outputs, inputs), max(outputs, inputs), config.r
    n = math.ceil(small / r)
    if draw.abstract:
        return Shared({}, {"randlora_A": draw.zeros(r, 1, small), "randlora_B": draw.zeros(large, n, r)}, {})
    generator = torch.Generator("cpu").manual_seed(config.projection_prng_key)
    if config.sparse or config.very_sparse:
        sparsity = math.sqrt(small) if config.very_sparse else 3
        drawn = [ternary(generator, sparsity, r, 1, small), ternary(generator, sparsity, large, n, r)]
    else:
        drawn = [_kaiming(generator, r, 1, small)]
        drawn.append(torch.cat([_kaiming(generator, large, 1, r) for _ in range(n)], dim=1))
    made = {name: draw.cast(base / base.std()) for name, base in zip(BASES, drawn, strict=True)}
    if not all(base.isfinite().all() for base in made.values()):
        raise SiteError(
            f"The random bases from {sites[0].path!r} on are so small that they are constant. Choose another "
            "projection_prng_key, a larger r, or no sparse ones."
        )
    return Shared({}, made, {})


def _kaiming(generator: torch.Generator, *shape: int) -> Tensor:
    return nn.init.kaiming_uniform_(torch.empty(shape, dtype=torch.bfloat16), a=math.sqrt(5), generator=generator)


def ternary(generator: torch.Generator, sparsity: float, *shape: int) -> Tensor:
    """-1 and 1 with a probability of 1 / (2 sparsity) each, else 0."""
    drawn = torch.rand(shape, generator=generator)
    return (drawn > 1 - 1 / (2 * sparsity)).float() - (drawn < 1 / (2 * sparsity)).float()


def factors(layer: Layer, p: Leaf) -> tuple[Tensor, Tensor]:
    """Two matrices (r n, columns) and (out, r n) whose product is s D."""
    config: Any = layer.config
    site, scales, entries = layer.site, p["randlora_lambda"], p["randlora_gamma"]
    (small, large), (r, n) = _sizes(site), scales.shape
    scaling = config.randlora_alpha / r
    a = p["randlora_A"].narrow(2, 0, small).reshape(r, 1, small)
    # A comes last and is frozen, so that autograd keeps no product
    inner = ((scales * scaling).unsqueeze(-1) * entries.reshape(1, n, small) * a).reshape(r * n, small)
    outer = p["randlora_B"].narrow(0, 0, large).narrow(1, 0, n).reshape(large, n * r)
    return (inner, outer) if small == columns(site) else (outer.t(), inner.t())


def after(layer: Layer, p: Leaf, x: Tensor, y: Tensor) -> Tensor:
    """Y + s D drop(x)."""
    config: Any = layer.config
    if config.randlora_dropout:
        x = dropout(layer, x, config.randlora_dropout)
    return add_product(layer, x, y, *factors(layer, p))


def weight(layer: Layer, p: Leaf, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """W + s D."""
    a, b = factors(layer, p)
    return (weight + (b @ a).reshape(layer.site.shape)).to(weight.dtype), bias


def check(config: RandLoraConfig, path: str, p: Leaf) -> None:
    """Lambda and gamma, or both bases, that fit each other."""
    r = config.r
    if path:
        n = p["randlora_gamma"].shape[-2] if "randlora_gamma" in p and p["randlora_gamma"].ndim > 1 else None
        check_leaves(path, p, {"randlora_lambda": (r, n), "randlora_gamma": (n, None)})
    elif config.save_projection:
        check_leaves(path, p, {"randlora_A": (r, 1, None), "randlora_B": (None, None, r)}, lead=False)


def stored(config: RandLoraConfig, path: str, p: Leaf) -> Mapping[str, Tensor | None]:
    """No bases where the config says so."""
    return {} if config.save_projection else {name: None for name in BASES if name in p}


def warm(site: Site, config: RandLoraConfig, draw: Draw) -> None:
    """PEFT draws lambda before it sets it to zero."""
    if config.init_weights:
        draw.normal(config.r, math.ceil(_sizes(site)[0] / config.r))


METHOD = register(
    Method(
        name="randlora",
        config=RandLoraConfig,
        kinds=KINDS,
        keys={"randlora_lambda": "randlora_lambda", "randlora_gamma": "randlora_gamma"},
        shared={name: name for name in BASES},
        repeated=True,
        constants=frozenset(BASES),
        init=init,
        share=share,
        complete=lambda config: config.save_projection,
        after=after,
        weight=weight,
        stored=stored,
        restore=restore,
        check=check,
        dropout=lambda config: config.randlora_dropout,
        reads=frozenset({"randlora_alpha"}),
        neutral=lambda p: {name: torch.zeros_like(leaf) for name, leaf in p.items()},
        view=View(
            package="randlora",
            name="RandLora",
            prefix="randlora_",
            label="randlora.",
            dropout="randlora_dropout",
            attributes={"r": "r"},
            warm=warm,
        ),
    )
)
