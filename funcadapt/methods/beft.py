"""BEFT: bias-efficient fine-tuning, a trained bias and nothing else.

    y = W x + b + beft_bias

Leaves: `beft_bias` (1, out). Init: zeros, the identity. Cost: `out` parameters a layer, one addition.
Dense form: b + beft_bias. A layer without a bias has none: it can be adapted, but `fa.merge` refuses it. An embedding
has no bias but a dense form, beft_bias added to the vector of every token.

Source: Huang et al. 2025, arXiv:2509.15974 (biases of the value projections, the default targets). Differs from PEFT:
also on transformers' Conv1D, embeddings, convolutions, multi-head attention with biases, plain parameters and experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from funcadapt import targets
from funcadapt.config import AdapterConfig
from funcadapt.errors import SiteError
from funcadapt.layer import Layer
from funcadapt.method import Draw, Fresh, Leaf, Method, View, register
from funcadapt.parts.forms import KINDS
from funcadapt.sites import Site

TARGETS: targets.Targets = {
    **dict.fromkeys(("t5", "mt5"), ("v",)),
    **dict.fromkeys(("bert", "roberta"), ("value",)),
    "deberta-v2": ("value_proj",),
    **dict.fromkeys(
        ("opt", "gptj", "gpt_neo", "bart", "llama", "llama4", "mistral", "mixtral", "phi", "gemma", "gemma2",
         "gemma3_text", "qwen2", "qwen3"),
        ("v_proj",),
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class BeftConfig(AdapterConfig):
    """Config of BEFT, with PEFT's fields.

    Attributes:
        target_modules: names, a regular expression, "all-linear", or None for the model type's default.
        modules_to_save: modules that are trained in full and saved with the adapter.
        init_weights: whether the biases start at zero.
    """

    peft_type: str = "BEFT"
    target_modules: Sequence[str] | str | None = None
    modules_to_save: Sequence[str] | None = None
    init_weights: bool = True

    target_table: ClassVar[targets.Targets] = TARGETS


def init(site: Site, config: BeftConfig, draw: Draw, weight: Callable[[], Tensor]) -> Fresh:
    """Zeros, or normal numbers if `init_weights` is false."""
    if site.kind == "mha" and not site.bias:
        raise SiteError(f"{site.path!r} is applied through its weight, and has no bias that BEFT could change.")
    shape = (1, site.out_features)
    return Fresh({"beft_bias": draw.zeros(*shape) if config.init_weights else draw.normal(*shape)}, {})


def after(layer: Layer, p: Leaf, x: Tensor, y: Tensor) -> Tensor:
    """Y + bias."""
    return (y + layer.per_output(p["beft_bias"])).to(y.dtype)


def weight(layer: Layer, p: Leaf, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """B + bias; at an embedding W + bias."""
    site = layer.site
    if site.kind == "embedding":
        scale: Any = getattr(layer.module, "embed_scale", None)  # of what is looked up; the hook adds after that
        shift = layer.rows(p["beft_bias"])
        return (weight + (shift if scale is None else shift / scale)).to(weight.dtype), bias
    if bias is None:
        raise SiteError(f"BEFT cannot be merged at {site.path!r}: the layer has no bias to hold it.")
    return weight, (bias + p["beft_bias"].reshape(site.out_features)).to(bias.dtype)


def check(config: BeftConfig, path: str, p: Leaf) -> None:
    """One vector (for each expert)."""
    shape = tuple(p["beft_bias"].shape)
    if len(shape) not in (2, 3) or shape[-2] != 1:
        raise SiteError(f"The site {path!r} has beft_bias of shape {shape}, expected (1, out).")


def warm(site: Site, config: BeftConfig, draw: Draw) -> None:
    """PEFT draws the biases before it sets them to zero."""
    if config.init_weights:
        draw.normal(1, site.out_features)


METHOD = register(
    Method(
        name="beft",
        config=BeftConfig,
        kinds=KINDS,
        keys={"beft_bias": "beft_bias"},
        init=init,
        after=after,
        weight=weight,
        check=check,
        reads=frozenset(),
        neutral=lambda p: {name: torch.zeros_like(leaf) for name, leaf in p.items()},
        view=View("beft", "Beft", "beft_", warm=warm),
    )
)
