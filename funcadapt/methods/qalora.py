"""QA-LoRA: LoRA on inputs that are averaged in groups, so that its update only shifts the zero points of a quantised W.

    y = W x + b + s * B A ((in / g) mean_g(drop(x)))        mean_g: the mean of each g consecutive inputs

Leaves: `lora_A` (r, in / g), `lora_B` (out, r), at embeddings `lora_embedding_A` (r, vocabulary / g); g is
`qalora_group_size`. Convolutions: groups of channels.
Init: as LoRA's, for in / g inputs: A kaiming-uniform, B zero: the identity.
Cost: r (in / g + out) parameters a layer; as many flops a token, twice, and in additions.
Dense form: W + s * (in / g^2) B [A_1 ... A_1, A_2 ... A_2, ...], each column of A g times.

Source: Xu et al. 2023, arXiv:2309.14717. Differs from PEFT, which has it for GPTQ layers only, and no dense form: here
on every kind of layer but grouped convolutions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor

from funcadapt.errors import SiteError
from funcadapt.layer import Layer, dropout
from funcadapt.method import Draw, Fresh, Leaf, Method, register
from funcadapt.methods import lora
from funcadapt.parts import lora_forms, lowrank
from funcadapt.parts.forms import KINDS
from funcadapt.parts.lora_variants import asks, check_init
from funcadapt.sites import Site


def _check_config(config: lora.LoraConfig) -> None:
    if config.qalora_group_size < 1:
        raise ValueError(f"`qalora_group_size` must be at least 1, got {config.qalora_group_size}.")
    check_init(config)


def init(site: Site, config: lora.LoraConfig, draw: Draw, weight: Callable[[], Tensor]) -> Fresh:
    """LoRA's leaves for in / g inputs."""
    size = config.qalora_group_size
    if site.groups > 1:
        raise SiteError(f"QA-LoRA cannot adapt the grouped convolution {site.path!r}. Exclude it.")
    if site.in_features % size:
        raise SiteError(
            f"`use_qalora=True` requires that the inputs of {site.path!r} ({site.in_features}) are divisible by "
            f"`qalora_group_size` ({size})."
        )
    pooled = (site.out_features, site.in_features // size, *site.shape[2:])
    return lora.init(dataclasses.replace(site, shape=pooled), config, draw, weight)


def as_lora(layer: Layer, p: Leaf) -> Leaf:
    """The leaves of the LoRA that it is."""
    config: Any = layer.config
    size, site = config.qalora_group_size, layer.site
    name = lowrank.factor_names(p)[0]
    groups = site.in_features // size
    a = (p[name] * (groups / size)).reshape(-1, groups, 1, *site.shape[2:])
    return {**p, name: a.expand(-1, -1, size, *site.shape[2:]).reshape(-1, site.in_features, *site.shape[2:])}


def after(layer: Layer, p: Leaf, x: Tensor, y: Tensor) -> Tensor:
    """Y + s * B A ((in / g) mean_g(drop(x)))."""
    config: Any = layer.config
    x = dropout(layer, x, config.lora_dropout)
    if layer.site.kind not in lora_forms.PRODUCTS:
        return lora_forms.add_delta(layer, as_lora(layer, p), x, y).to(y.dtype)
    size = config.qalora_group_size
    groups = layer.site.in_features // size
    if p["lora_A"].shape[-1] != groups:  # the product would take it
        raise SiteError(f"lora_A at {layer.site.path!r} must have {groups} columns, not {p['lora_A'].shape[-1]}.")
    pooled = x.reshape(*x.shape[:-1], groups, size).sum(-1) * (groups / size)
    return lora_forms.add_delta(layer, p, pooled, y).to(y.dtype)


def weight(layer: Layer, p: Leaf, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """W + s * (in / g^2) B A, each column of A g times."""
    return lora.weight(layer, as_lora(layer, p), weight, bias)


METHOD = register(
    Method(
        name="qalora",
        config=lora.LoraConfig,
        when=asks("use_qalora", check=_check_config),
        kinds=KINDS,
        keys=lora.METHOD.keys,
        init=init,
        inits_experts=True,
        after=after,
        weight=weight,
        buffers=lora.buffers,
        describe=lora.describe,
        check=lora.check,
        layout=lora.layout,
        pack=lora.pack,
        unpack=lora.unpack,
        dropout=lora.METHOD.dropout,
        reads=frozenset({"qalora_group_size"}),
        with_rank=lora.with_rank,
        neutral=lora.neutral,
        view=lora.VIEW,
    )
)
