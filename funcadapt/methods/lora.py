"""LoRA: a low-rank update of the weight.

    y = W x + b + s * B A drop(x)        s = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora

Leaves: `lora_A` (r, in), `lora_B` (out, r), with `lora_bias` also `lora_B_bias` (out); the buffer `scaling` (0-d),
multiplied into the r-wide intermediate. Embeddings: `lora_embedding_A` (r, vocabulary), `lora_embedding_B` (width, r).
Convolutions: `lora_A` (r, in channels, *kernel) runs with the base's stride, padding and dilation, `lora_B`
(out, r / groups, 1, ...) with its groups. Experts: a leading axis on both.
Init: A kaiming-uniform, B zero (embeddings: A zero, B normal): the identity. `init_lora_weights` selects others.
Cost: r (in + out) parameters a layer; 2 r (in + out) flops a token forward and twice that backward.

Source: Hu et al. 2021, arXiv:2106.09685; rsLoRA arXiv:2312.03732; PiSSA arXiv:2404.02948; OLoRA arXiv:2406.01775.
Differs from PEFT: dilated convolutions and padding modes are right; OLoRA on transformers' Conv1D is (PEFT B15); the
out-projection of `nn.MultiheadAttention` is adapted once, not twice (B1); PiSSA, OLoRA and LoftQ never change the
model: `fa.init_with_base` returns the corrected weights; LoftQ reckons with the scaling, and needs no GPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from funcadapt.config import AdapterConfig
from funcadapt.errors import SiteError
from funcadapt.layer import Layer, dropout
from funcadapt.method import Draw, Fresh, Leaf, Method, method_of, register
from funcadapt.parts import lora_inits, lowrank
from funcadapt.parts.checks import check_layers, check_positive, check_rates
from funcadapt.parts.forms import KINDS, refuse_dropout
from funcadapt.parts.lora_forms import add_delta, delta_weight, grouped, masked
from funcadapt.parts.lora_inits import residual
from funcadapt.parts.lora_leaves import buffers, check, describe, layout, neutral, pack, rank_of, unpack, with_rank
from funcadapt.parts.lora_variants import Unclaimed, check_variant
from funcadapt.parts.lora_view import VIEW
from funcadapt.sites import Site


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig(AdapterConfig):
    """Config of LoRA and its variants, with PEFT's fields, defaults and meanings.

    Attributes:
        r: the rank.
        target_modules: names, a regular expression, "all-linear", or None for the model type's default.
        exclude_modules: names or a regular expression to leave out.
        lora_alpha: the scaling is lora_alpha / r.
        lora_dropout: dropout on the adapter's input, active when the layer is in training mode.
        fan_in_fan_out: PEFT's bookkeeping; the layer's type decides.
        bias: "none", "all" (train every bias of the model) or "lora_only" (those of the adapted layers).
        use_rslora: the scaling is lora_alpha / sqrt(r).
        modules_to_save: modules that are trained in full and saved with the adapter.
        init_lora_weights: True, False, "gaussian", "orthogonal", "pissa", "pissa_niter_N", "olora", "loftq" or "mica";
            "eva", "corda" or "lora_ga", which need data: see `funcadapt.recipes.inits`.
        layers_to_transform: indices of the layers to adapt.
        layers_pattern: the name of the layer list, with `layers_to_transform`.
        rank_pattern: rank by regular expression of the site path.
        alpha_pattern: alpha likewise.
        trainable_token_indices: rows of the input embedding to train, or rows by embedding name.
        use_dora: weight-decomposed LoRA.
        lora_bias: a bias in B.
        target_parameters: names of plain parameters to adapt.
        use_bdlora: BD-LoRA's settings, a dict; this and the next each ask for a variant, see its file.
        kasa_config: KaSA's.
        velora_config: VeLoRA's.
        monteclora_config: MonteCLoRA's.
        use_qalora: QA-LoRA.
        qalora_group_size: how many inputs QA-LoRA averages.
        loftq_config: bits and iterations of the init "loftq", a dict.
        eva_config: settings of `funcadapt.recipes.inits.eva`, a dict.
        corda_config: of `corda`.
        lora_ga_config: of `lora_ga`.

    Raises:
        ValueError: if the values contradict each other.
        TypeError: if `target_parameters` is a string.
        NotImplementedError: if a field asks for a part of PEFT that is not implemented.
    """

    peft_type: str = "LORA"
    r: int = 8
    target_modules: Sequence[str] | str | None = None
    exclude_modules: Sequence[str] | str | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: Sequence[str] | None = None
    init_lora_weights: bool | str | None = True
    layers_to_transform: Sequence[int] | int | None = None
    layers_pattern: Sequence[str] | str | None = None
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict[str, int])
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict[str, float])
    megatron_config: Mapping[str, Any] | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: Sequence[int] | Mapping[str, Sequence[int]] | None = None
    loftq_config: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    eva_config: Mapping[str, Any] | None = None
    corda_config: Mapping[str, Any] | None = None
    lora_ga_config: Mapping[str, Any] | None = None
    use_dora: bool = False
    velora_config: Mapping[str, Any] | None = None
    alora_invocation_tokens: Sequence[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: Mapping[str, Any] | None = None
    layer_replication: Sequence[Sequence[int]] | None = None
    lora_bias: bool = False
    target_parameters: Sequence[str] | None = None
    use_bdlora: Mapping[str, Any] | None = None
    arrow_config: Mapping[str, Any] | None = None
    kasa_config: Mapping[str, Any] | None = None
    ensure_weight_tying: bool = False

    patterned: ClassVar[Mapping[str, str]] = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}
    # fields that mean something only where a method is registered that asks for them
    unsupported: ClassVar[Any] = Unclaimed(
        "megatron_config",
        "velora_config",
        "alora_invocation_tokens",
        "use_qalora",
        "monteclora_config",
        "layer_replication",
        "use_bdlora",
        "arrow_config",
        "kasa_config",
        "ensure_weight_tying",
    )

    def __post_init__(self) -> None:
        if isinstance(self.target_parameters, str):
            raise TypeError("`target_parameters` must be a list of strings or None.")
        super().__post_init__()
        check_positive(self, "r")
        check_layers(self, of_names=True)
        if self.bias not in ("none", "all", "lora_only"):
            raise ValueError(f"`bias` must be 'none', 'all' or 'lora_only', got {self.bias!r}.")
        for name, alpha in {"lora_alpha": self.lora_alpha, **self.alpha_pattern}.items():
            if not -1e300 < alpha < 1e300:
                raise ValueError(f"`lora_alpha` must be finite, got {alpha} ({name!r} in alpha_pattern).")
        if self.lora_bias and not isinstance(self.init_lora_weights, bool):
            raise ValueError("The argument lora_bias=True is only supported with init_lora_weights=True or False, got "
                             f"init_lora_weights={self.init_lora_weights!r} instead.")  # fmt: skip
        if self.lora_bias and self.use_dora:
            raise ValueError("The argument lora_bias=True is not supported for DoRA, please pass use_dora=False.")
        check_rates(self, "lora_dropout")
        check_variant(self)

    def label(self) -> str:
        """The variant's name, "lora" or "dora" and so on."""
        return method_of(self).name

    def rank(self, leaves: Mapping[str, Tensor]) -> int:
        """The rank of one site's leaves."""
        return rank_of(self, leaves)


def init(site: Site, config: LoraConfig, draw: Draw, weight: Callable[[], Tensor]) -> Fresh:
    """A and B by `init_lora_weights`; `config` holds for this site."""
    refuse_dropout(site, "lora_dropout", config.lora_dropout)
    if config.r % site.groups:
        raise SiteError(f"{site.path!r} has {site.groups} groups, which must divide the rank, got r={config.r}.")
    if config.lora_bias and site.kind == "embedding":
        raise SiteError(f"lora_bias=True is not supported for the embedding {site.path!r}.")
    scaling = {k: draw.cast(v) for k, v in buffers(config).items()}
    if config.lora_bias and site.kind == "mha" and not site.bias:
        raise SiteError(f"lora_bias=True needs a bias at {site.path!r}, which is applied through its weight.")
    number = 0.0 if draw.abstract else float(scaling["scaling"])
    return Fresh(lora_inits.new(site, config, draw, weight, number), scaling)


def after(layer: Layer, p: Leaf, x: Tensor, y: Tensor) -> Tensor:
    """Y + s * B A drop(x), in y's dtype."""
    config: Any = layer.config
    if config.lora_dropout:
        x = dropout(layer, x, config.lora_dropout)
    out = add_delta(layer, p, x, y)
    return out if out.dtype == y.dtype else out.to(y.dtype)


def weight(layer: Layer, p: Leaf, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """W + s * B A, and b + s * the bias of B."""
    merged = (weight + delta_weight(layer, p)).to(weight.dtype)
    if "lora_B_bias" in p:
        if bias is None:
            raise SiteError(
                f"lora_bias=True cannot be merged at {layer.site.path!r}: the layer has no bias to hold it."
            )
        bias = (bias + p["lora_B_bias"] * p["scaling"]).to(bias.dtype)
    return merged, bias


METHOD = register(
    Method(
        name="lora",
        config=LoraConfig,
        kinds=KINDS,
        keys={
            "lora_A": "lora_A.weight",
            "lora_B": "lora_B.weight",
            "lora_B_bias": "lora_B.bias",
            "lora_embedding_A": "lora_embedding_A",
            "lora_embedding_B": "lora_embedding_B",
        },
        init=init,
        inits_experts=True,
        after=after,
        weight=weight,
        buffers=buffers,
        describe=describe,
        check=check,
        layout=layout,
        pack=pack,
        unpack=unpack,
        residual=residual,
        dropout=lambda config: config.lora_dropout,
        reads=frozenset(),
        with_rank=with_rank,
        neutral=neutral,
        grouped=grouped,
        masked=masked,
        algebra=lowrank.ALGEBRA,
        view=VIEW,
    )
)
