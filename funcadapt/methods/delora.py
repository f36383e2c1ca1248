"""DeLoRA: a low-rank update whose strength is a number of its own, apart from its directions.

    y = W x + b + B diag(lambda / (r |A_i| |B_i|)) A (n * drop(x))        |A_i| rows of A, |B_i| columns of B

Leaves: `delora_A` (r, columns), `delora_B` (out, r), `delora_lambda` (1); the constant `delora_w_norm` (columns) is n,
the norms of the columns of the base weight when the adapter was made, and checkpoints hold it. The base weight is a
matrix (out, columns) at every kind of layer: columns are inputs, at a convolution inputs of a group times kernel.
Init: A kaiming-uniform, B zero, lambda `delora_lambda`: the identity. Norms are at least 1e-4.
Cost: r (columns + out) + 1 parameters; LoRA's 2 r (columns + out) flops a token forward and twice that backward, and
one scaled copy of A a call. Dense form: W + B diag(...) A diag(n).
A padded rank would change lambda / r, so adapters of different ranks do not stack.

Source: Bini et al. 2025, arXiv:2503.18225. Differs from PEFT: also on embeddings, convolutions (grouped ones too),
multi-head attention, plain parameters and experts; n scales A, and no copy of the input is made.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from funcadapt._torch import linalg
from funcadapt.config import AdapterConfig
from funcadapt.errors import SiteError
from funcadapt.layer import Layer, dropout
from funcadapt.method import Draw, Fresh, Leaf, Method, View, register
from funcadapt.parts.forms import KINDS, add_product, refuse_dropout
from funcadapt.sites import Site

_SMALLEST = 1e-4


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeloraConfig(AdapterConfig):
    """Config of DeLoRA, with PEFT's fields.

    Attributes:
        r: the rank.
        delora_lambda: where lambda starts: a bound of the update's Frobenius norm, in norms of the weight's columns.
        module_dropout: dropout on the adapter's input, active when the layer is in training mode.
        target_modules: names, a regular expression, "all-linear", or None for the model type's default.
        exclude_modules: names or a regular expression to leave out.
        bias: "none", "all" (train every bias of the model) or "delora_only" (those of the adapted layers).
        init_weights: whether B starts at zero.
        layers_to_transform: indices of the layers to adapt.
        layers_pattern: the name of the layer list, with `layers_to_transform`.
        rank_pattern: rank by regular expression of the site path.
        lambda_pattern: lambda likewise.
        modules_to_save: modules that are trained in full and saved with the adapter.

    Raises:
        ValueError: if the values contradict each other.
    """

    peft_type: str = "DELORA"
    r: int = 8
    delora_lambda: float = 15
    module_dropout: float = 0.0
    target_modules: Sequence[str] | str | None = None
    exclude_modules: Sequence[str] | str | None = None
    bias: str = "none"
    init_weights: bool = True
    layers_to_transform: Sequence[int] | int | None = None
    layers_pattern: Sequence[str] | str | None = None
    rank_pattern: Mapping[str, int] | None = dataclasses.field(default_factory=dict[str, int])
    lambda_pattern: Mapping[str, float] | None = dataclasses.field(default_factory=dict[str, float])
    modules_to_save: Sequence[str] | None = None

    patterned: ClassVar[Mapping[str, str]] = {"r": "rank_pattern", "delora_lambda": "lambda_pattern"}

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, r in {"r": self.r, **(self.rank_pattern or {})}.items():
            if r <= 0:
                raise ValueError(f"`r` must be a positive integer; got {r} ({name!r}).")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("`layers_to_transform` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")
        if self.bias not in ("none", "all", "delora_only"):
            raise ValueError(f"`bias` must be 'none', 'all' or 'delora_only', got {self.bias!r}.")
        if not 0 <= self.module_dropout < 1:
            raise ValueError(f"`module_dropout` must be in [0, 1), got {self.module_dropout}.")

    def rank(self, leaves: Mapping[str, Tensor]) -> int:
        """The rank of one site's leaves."""
        return leaves["delora_B"].shape[-1] if "delora_B" in leaves else 0


def init(site: Site, config: DeloraConfig, draw: Draw, weight: Callable[[], Tensor]) -> Fresh:
    """A kaiming-uniform, B zero, lambda as the config says, and the norms of W's columns."""
    refuse_dropout(site, "module_dropout", config.module_dropout)
    r, columns, rows = config.r, math.prod(site.shape[1:]), site.out_features
    a = draw.uniform(r, columns, bound=1 / math.sqrt(columns))
    b = draw.zeros(rows, r) if config.init_weights else draw.uniform(rows, r, bound=1 / math.sqrt(r))
    norm: Tensor = draw.ones(columns) if draw.abstract else linalg.vector_norm(weight().flatten(1), dim=0)
    params = {"delora_A": a, "delora_B": b, "delora_lambda": draw.ones(1) * config.delora_lambda}
    return Fresh(params, {"delora_w_norm": draw.cast(norm)})


def factors(p: Leaf) -> tuple[Tensor, Tensor]:
    """A with everything that scales it, and B, so that the update is their product."""
    a, b = p["delora_A"], p["delora_B"]
    r, columns = a.shape
    wide = torch.promote_types(a.dtype, torch.float32)
    norms: Tensor = linalg.vector_norm(a, dim=1, dtype=wide).clamp_min(_SMALLEST)
    norms = norms * linalg.vector_norm(b, dim=0, dtype=wide).clamp_min(_SMALLEST)
    scale = p["delora_lambda"].reshape(()) / r / norms
    return (a * scale.reshape(r, 1) * p["delora_w_norm"].reshape(columns)).to(a.dtype), b


def after(layer: Layer, p: Leaf, x: Tensor, y: Tensor) -> Tensor:
    """Y + B A x, scaled."""
    config: Any = layer.config
    if config.module_dropout:
        x = dropout(layer, x, config.module_dropout)
    return add_product(layer, x, y, *factors(p))


def weight(layer: Layer, p: Leaf, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """W + B A, scaled."""
    a, b = factors(p)
    return (weight + (b @ a).reshape(layer.site.shape)).to(weight.dtype), bias


def check(config: DeloraConfig, path: str, p: Leaf) -> None:
    """All leaves, of one rank."""
    for name in METHOD.keys:
        if name not in p:
            raise SiteError(f"The site {path!r} lacks {name!r}.")
    shapes = [tuple(p[name].shape) for name in METHOD.keys]
    a, b, strength, norm = shapes
    lead = a[:-2]
    expected = [(*lead, config.r, *a[-1:]), (*lead, *b[-2:-1], config.r), (*lead, 1), (*lead, *a[-1:])]
    if shapes != expected or len(lead) > 1:
        raise SiteError(
            f"The site {path!r} has delora_A {a}, delora_B {b}, delora_lambda {strength} and delora_w_norm {norm}; its "
            f"config says rank {config.r}: expected ({config.r}, in), (out, {config.r}), (1,) and (in,)."
        )


METHOD = register(
    Method(
        name="delora",
        config=DeloraConfig,
        kinds=KINDS,
        keys={name: name for name in ("delora_A", "delora_B", "delora_lambda", "delora_w_norm")},
        constants=frozenset({"delora_w_norm"}),
        init=init,
        after=after,
        weight=weight,
        check=check,
        dropout=lambda config: config.module_dropout,
        reads=frozenset(),
        neutral=lambda p: {name: torch.zeros_like(leaf) for name, leaf in p.items()},
        view=View(
            package="delora",
            name="Delora",
            prefix="delora_",
            classes={"linear": "DeloraLinear"},
            label="delora.",
            buffers=frozenset({"delora_w_norm"}),
            dropout="module_dropout",
            attributes={"r": "r"},
        ),
    )
)
