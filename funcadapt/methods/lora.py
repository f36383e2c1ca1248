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
out-projection of `nn.MultiheadAttention` is adapted once, not twice (B1); PiSSA and OLoRA never change the model:
`fa.init_with_base` returns the corrected weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funcadapt import lowrank
from funcadapt._torch import fork_rng, linalg, unflatten
from funcadapt.config import AdapterConfig
from funcadapt.errors import SiteError
from funcadapt.layer import Layer, dropout
from funcadapt.lowrank import factor_names, factors, has_experts
from funcadapt.method import Draw, Fresh, Leaf, Method, View, register
from funcadapt.sites import Site

KINDS = frozenset({"linear", "hf_conv1d", "embedding", "conv1d", "conv2d", "conv3d", "mha", "parameter", "experts"})


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
        init_lora_weights: True, False, "gaussian", "orthogonal", "pissa", "pissa_niter_N" or "olora".
        layers_to_transform: indices of the layers to adapt.
        layers_pattern: the name of the layer list, with `layers_to_transform`.
        rank_pattern: rank by regular expression of the site path.
        alpha_pattern: alpha likewise.
        trainable_token_indices: rows of the input embedding to train, or rows by embedding name.
        use_dora: weight-decomposed LoRA.
        lora_bias: a bias in B.
        target_parameters: names of plain parameters to adapt.

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
    unsupported: ClassVar[frozenset[str]] = frozenset(
        [
            "megatron_config",
            "loftq_config",
            "eva_config",
            "corda_config",
            "lora_ga_config",
            "velora_config",
            "alora_invocation_tokens",
            "use_qalora",
            "monteclora_config",
            "layer_replication",
            "use_bdlora",
            "arrow_config",
            "kasa_config",
            "ensure_weight_tying",
        ]
    )

    def __post_init__(self) -> None:
        if isinstance(self.target_parameters, str):
            raise TypeError("`target_parameters` must be a list of strings or None.")
        super().__post_init__()
        for name, r in {"r": self.r, **self.rank_pattern}.items():
            if not isinstance(r, int) or r <= 0:  # pyright: ignore[reportUnnecessaryIsInstance]
                raise ValueError(f"`r` should be a positive integer value but the value passed is {r} ({name!r}).")
        if isinstance(self.target_modules, str):
            for field in ("layers_to_transform", "layers_pattern"):
                if getattr(self, field) is not None:
                    raise ValueError(f"`{field}` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")
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
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"`lora_dropout` must be in [0, 1), got {self.lora_dropout}.")

    def label(self) -> str:
        """The variant's name: "lora" or "dora"."""
        return "dora" if self.use_dora else "lora"

    def rank(self, leaves: Mapping[str, Tensor]) -> int:
        """The rank of one site's leaves."""
        if "lora_embedding_B" in leaves:
            return leaves["lora_embedding_B"].shape[-1]
        if "lora_A" not in leaves or "lora_B" not in leaves:
            return 0
        a, b = leaves["lora_A"].shape, leaves["lora_B"].shape
        experts = len(a) == len(b) == 3 and a[0] == b[0] and a[1] == b[2]
        if experts and a[1] == 1 and 1 not in (said := (self.r, *self.rank_pattern.values())) and a[0] in said:
            return a[0]  # a convolution of one channel with as many outputs as ranks
        return a[1] if experts else a[0]


def buffers(config: LoraConfig) -> dict[str, Tensor]:
    """The scaling as a 0-d leaf: lora_alpha / r, or lora_alpha / sqrt(r)."""
    s = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    return {"scaling": torch.tensor(s, dtype=torch.float64, device="cpu")}  # for leaves of any dtype and device


def init(site: Site, config: LoraConfig, draw: Draw, weight: Callable[[], Tensor]) -> Fresh:
    """A and B by `init_lora_weights`; `config` holds for this site."""
    r, kind, how = config.r, site.kind, config.init_lora_weights
    if config.lora_dropout and kind in ("parameter", "experts"):
        raise SiteError(f"lora_dropout={config.lora_dropout} cannot act at the plain parameter {site.path!r}: "
                        "it is applied through its weight. Set lora_dropout=0.")  # fmt: skip
    if r % site.groups:
        raise SiteError(f"{site.path!r} has {site.groups} groups, which must divide the rank, got r={r}.")
    experts = site.stack
    scaling = {k: draw.cast(v) for k, v in buffers(config).items()}
    if kind == "embedding":
        if config.lora_bias:
            raise SiteError(f"lora_bias=True is not supported for the embedding {site.path!r}.")
        name_a, name_b = "lora_embedding_A", "lora_embedding_B"
    else:
        name_a, name_b = "lora_A", "lora_B"
    kernel = site.shape[2:]
    shape_a = (*experts, r, site.in_features, *kernel)
    shape_b = (*experts, site.out_features, r // site.groups, *(1,) * len(kernel))
    fan_in = site.in_features * math.prod(kernel)

    if isinstance(how, str) and how != "gaussian" and not draw.abstract:
        if len(shape_a) != 2:
            raise SiteError(f"init_lora_weights={how!r} needs a 2-D weight; {site.path!r} is of kind {kind!r}.")
        a, b = _factors(how, config, weight, draw, float(scaling["scaling"]))
    elif kind == "embedding":
        a = draw.zeros(*shape_a) if how is not False else draw.normal(*shape_a)
        b = draw.normal(*shape_b)
    else:
        gaussian = how == "gaussian"
        a = draw.normal(*shape_a, std=1 / r) if gaussian else draw.uniform(*shape_a, bound=1 / math.sqrt(fan_in))
        if how is not False:
            b = draw.zeros(*shape_b)
        elif experts:  # one layer for all of them, in the order of `pack`
            b = draw.uniform(site.out_features, r, *experts, bound=1 / math.sqrt(r * site.experts))
            b = b.movedim(-1, 0).contiguous()
        else:
            b = draw.uniform(*shape_b, bound=math.sqrt(site.groups / r))
    params = {name_a: a, name_b: b}
    if config.lora_bias and kind == "mha" and not site.bias:
        raise SiteError(f"lora_bias=True needs a bias at {site.path!r}, which is applied through its weight.")
    if config.lora_bias:
        shape = (*experts, site.out_features)
        params["lora_B_bias"] = (
            draw.uniform(*shape, bound=math.sqrt(site.groups / r)) if how is False else draw.zeros(*shape)
        )
    return Fresh(params, scaling)


def _factors(
    how: str, config: LoraConfig, weight: Callable[[], Tensor], draw: Draw, scaling: float
) -> tuple[Tensor, Tensor]:
    """The inits that look at the weight, or at each other: (A, B)."""
    r = config.r
    if how == "orthogonal":
        if r % 2:
            raise ValueError(f"init_lora_weights='orthogonal' needs an even rank, got r={r}.")
        rows, columns = weight().shape
        q = linalg.qr(torch.randn(r, r, generator=draw.generator)).Q
        a = (torch.randn(columns, r // 2, generator=draw.generator) @ q[0::2]).T / 10
        b = (torch.randn(r // 2, rows, generator=draw.generator).T @ q[1::2]) / 10
        return draw.cast(a.contiguous()), draw.cast(b.contiguous())
    w = weight().detach().to(torch.promote_types(weight().dtype, torch.float32))
    if r > min(w.shape):
        raise ValueError(f"init_lora_weights={how!r} needs r <= min(in, out) = {min(w.shape)}, got r={r}.")
    if how == "olora":
        q, upper = linalg.qr(w)
        # PEFT draws no scaling into the factors, and takes s * B A out of the weight
        return draw.cast(upper[:r].contiguous()), draw.cast(q[:, :r].contiguous())
    if how == "pissa":
        u, s, vh = linalg.svd(w, full_matrices=False)
    elif match := re.fullmatch(r"pissa_niter_(\d+)", how):
        with contextlib.nullcontext() if draw.generator is None else fork_rng(devices=[]):
            if draw.generator is not None:  # svd_lowrank takes no generator, only torch's own
                torch.manual_seed(draw.generator.initial_seed())  # pyright: ignore[reportUnknownMemberType]
            u, s, v = torch.svd_lowrank(w, r, niter=int(match.group(1)))
        vh = v.T
    else:
        raise ValueError(
            f"Unknown init_lora_weights={how!r}. It is True, False, 'gaussian', 'orthogonal', 'pissa', "
            "'pissa_niter_N' or 'olora'."
        )
    root = torch.sqrt(s[:r] / scaling)
    return draw.cast(root[:, None] * vh[:r]), draw.cast(u[:, :r] * root)


_PRODUCTS = frozenset({"linear", "hf_conv1d"})  # kinds whose forward is one product, over rows of any number


def add_delta(layer: Layer, p: Leaf, x: Tensor, y: Tensor) -> Tensor:
    """The output with the update, y + s * B A x, in the dtype that promotes both; `x` has had its dropout."""
    a, dims = p.get("lora_A"), x.dim()
    if a is not None and dims > 1 and a.dtype == x.dtype and layer.site.kind in _PRODUCTS and "lora_B_bias" not in p:
        b = p["lora_B"]
        h = torch.mm(x if dims == 2 else x.reshape(-1, x.shape[-1]), a.t()) * p["scaling"]
        if h.dtype != y.dtype:  # the base layer answered in another dtype, or autocast is on
            return y + F.linear(h, b).view(y.shape)
        # one fused product: no temporary of the output's size. It would broadcast y: the view says no.
        return torch.addmm(y if dims == 2 else y.reshape(-1, y.shape[-1]), h, b.t()).view(y.shape)
    a, b, scaling = factors(p)
    if x.is_floating_point() and x.dtype != a.dtype:
        x = x.to(a.dtype)
    delta = layer.pointwise(layer.linear(x, a) * scaling, b)
    if "lora_B_bias" in p:
        delta = delta + layer.per_output(p["lora_B_bias"] * scaling)
    return y + delta


def after(layer: Layer, p: Leaf, x: Tensor, y: Tensor) -> Tensor:
    """Y + s * B A drop(x), in y's dtype."""
    config: Any = layer.config
    if config.lora_dropout:
        x = dropout(layer, x, config.lora_dropout)
    out = add_delta(layer, p, x, y)
    return out if out.dtype == y.dtype else out.to(y.dtype)


def _batchable(layer: Layer, p: Leaf, x: Tensor, y: Tensor) -> bool:
    """Whether the layer is a plain product in one dtype, for the hand-written forms below."""
    a = p.get("lora_A")
    if a is None or "lora_B_bias" in p or layer.site.kind not in _PRODUCTS:
        return False
    return a.dtype == x.dtype == y.dtype and not torch.is_autocast_enabled(x.device.type)


def grouped(layer: Layer, p: Leaf, x: Tensor, y: Tensor) -> Any:
    """`after` for N adapters at once: two batched products, no temporary of the output's size.

    Args:
        layer: the layer.
        p: the leaves, `lora_A` (N, r, in), `lora_B` (N, out, r), `scaling` (N).
        x: (N * rows, ..., in).
        y: (N * rows, ..., out).

    Returns:
        Of y's shape; NotImplemented where the layer is no plain product, or the dtypes differ.
    """
    if not _batchable(layer, p, x, y):
        return NotImplemented
    config: Any = layer.config
    if config.lora_dropout:
        x = dropout(layer, x, config.lora_dropout)
    a, b = p["lora_A"], p["lora_B"]
    n = a.shape[0]
    tokens = x.numel() // (n * x.shape[-1]) if x.shape[-1] else 0
    # h (N, r, tokens): in this order the gradients of A and of a column-major B come out as the leaves are stored
    h = torch.bmm(a, x.reshape(n, tokens, x.shape[-1]).transpose(1, 2)) * p["scaling"].view(n, 1, 1)
    return torch.baddbmm(y.reshape(n, tokens, y.shape[-1]), h.transpose(1, 2), b.transpose(1, 2)).view(y.shape)


def masked(layer: Layer, p: Leaf, x: Tensor, y: Tensor, choice: Tensor) -> Any:
    """`after` for groups of rows that choose among N adapters: one product with all of them, all but one masked.

    Args:
        layer: the layer.
        p: the leaves, as in `grouped`.
        x: (groups * rows, ..., in).
        y: (groups * rows, ..., out).
        choice: (groups, N), at most one 1 in each.

    Returns:
        Of y's shape; NotImplemented as in `grouped`.
    """
    if not _batchable(layer, p, x, y):
        return NotImplemented
    config: Any = layer.config
    if config.lora_dropout:
        x = dropout(layer, x, config.lora_dropout)
    a, b = p["lora_A"], p["lora_B"]
    n, r = a.shape[:2]
    h = torch.mm(x.reshape(-1, x.shape[-1]), a.reshape(n * r, a.shape[2]).t())
    h = h.view(choice.shape[0], -1, n, r) * (choice * p["scaling"]).view(-1, 1, n, 1)
    all_b = b.transpose(1, 2).reshape(n * b.shape[2], b.shape[1])
    return torch.addmm(y.reshape(-1, y.shape[-1]), h.view(-1, n * r), all_b).view(y.shape)


def delta_weight(layer: Layer, p: Leaf) -> Tensor:
    """S * B A in canonical form."""
    a, b, scaling = factors(p)
    if layer.site.groups > 1:
        raise SiteError(
            f"LoRA on the grouped convolution {layer.site.path!r} has no dense form: lora_A reads every input channel, "
            "the base weight only those of its group. Keep the adapter unmerged."
        )
    kernel = a.shape[2:]
    return (b.flatten(1) * scaling @ a.flatten(1)).reshape(b.shape[0], a.shape[1], *kernel)


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


def residual(config: LoraConfig, p: Leaf, weight: Tensor) -> Tensor | None:
    """The base weight less s * B A, for PiSSA and OLoRA; None for the inits that leave the base alone."""
    how = config.init_lora_weights
    if not isinstance(how, str) or how in ("gaussian", "orthogonal"):
        return None
    a, b, scaling = factors(p)
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(wide) - (b.to(wide) * scaling.to(wide)) @ a.to(wide)).to(weight.dtype)


def layout(p: Leaf) -> Leaf:
    """B stored column by column, the same values: autograd then takes its gradient as (h^T g)^T.

    That is several times faster than g^T h, which it takes for a row-major B and whose inner dimension is the long one.

    Args:
        p: the leaves.

    Returns:
        The leaves, `lora_B` copied if it is 2-D.
    """
    b = p.get("lora_B")
    if b is None or b.ndim != 2:
        return p
    # a clone, and no `contiguous`: the strides are to be the same for every rank, 1 too
    return {**p, "lora_B": b.t().clone(memory_format=torch.contiguous_format).t()}


def with_rank(p: Leaf, old: int, r: int) -> Leaf:
    """A with zero rows and B with zero columns up to rank r, or both cut to it; in each group of a convolution."""
    name_a, name_b = factor_names(p)
    a, b = p[name_a], p[name_b]
    axis = int(has_experts(a, b, old))  # experts come first
    groups = a.shape[axis] // b.shape[axis + 1]
    if r % groups:
        raise SiteError(f"A convolution of {groups} groups cannot have rank {r}.")
    rows = _resized(unflatten(a, axis, (groups, -1)), axis + 1, r // groups).flatten(axis, axis + 1)
    return {**p, name_a: rows, name_b: _resized(b, axis + 1, r // groups)}


def _resized(t: Tensor, axis: int, size: int) -> Tensor:
    if size <= t.shape[axis]:
        return t.narrow(axis, 0, size)
    shape = list(t.shape)
    shape[axis] = size - t.shape[axis]
    return torch.cat([t, t.new_zeros(shape)], axis)


def neutral(p: Leaf) -> Leaf:
    """Zeros: no update."""
    return {name: torch.zeros_like(leaf) for name, leaf in p.items()}


def pack(p: Leaf) -> Leaf:
    """PEFT stores experts as A (r * experts, in), expert by expert, and B (out, r * experts), rank by rank."""
    if (
        "lora_A" not in p
        or p["lora_A"].ndim != 3
        or p["lora_A"].shape[:2] != (p["lora_B"].shape[0], p["lora_B"].shape[2])
    ):
        return p
    a, b = p["lora_A"], p["lora_B"]
    return {**p, "lora_A": a.flatten(0, 1), "lora_B": b.permute(1, 2, 0).flatten(1)}


def unpack(config: LoraConfig, p: Leaf) -> Leaf:
    """The inverse of `pack`: (experts, r, in) and (experts, out, r); one expert stays 2-D."""
    return unpacked(config.r, p)


def unpacked(r: int, p: Leaf) -> Leaf:
    """`unpack`, given the rank."""
    a, b = p["lora_A"], p["lora_B"]
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] == r:
        return p
    per_expert = torch.einsum("ore->eor", b.reshape(b.shape[0], r, -1)).contiguous()
    return {**p, "lora_A": a.reshape(-1, r, a.shape[1]), "lora_B": per_expert}


def check(config: LoraConfig, path: str, p: Leaf) -> None:
    """Both factors, with the config's rank, and the leaves that the config asks for."""
    embedding = "lora_embedding_A" in p or "lora_embedding_B" in p
    names = ["lora_embedding_A", "lora_embedding_B"] if embedding else ["lora_A", "lora_B"]
    names += ["lora_B_bias"] * config.lora_bias + ["lora_magnitude_vector"] * config.use_dora
    for name in names:
        if name not in p:
            raise SiteError(f"The site {path!r} lacks {name!r}.")
    for name in p:
        if name not in names:
            raise SiteError(f"The site {path!r} has {name!r}, which the config does not ask for.")
    a, b, _ = factors({**p, "scaling": p[names[0]]})
    experts = a.ndim == 3 and b.ndim == 3 and a.shape[0] == b.shape[0] and a.shape[1] == b.shape[2] == config.r
    rows = a.shape[1] if experts else a.shape[0] if a.ndim else 0
    columns = b.shape[-1] if experts else b.shape[1] if b.ndim > 1 else 0
    if a.ndim < 2 or b.ndim != a.ndim or rows != config.r or not columns or config.r % columns:
        raise SiteError(
            f"The site {path!r} has {names[0]} of shape {tuple(a.shape)} and {names[1]} of shape {tuple(b.shape)}; its "
            f"config says rank {config.r}: expected ({config.r}, in, ...) and (out, {config.r}, ...)."
        )
    for name, size in (
        ("lora_B_bias", b.shape[-2 if experts else 0]),
        ("lora_magnitude_vector", b.shape[-2 if experts else 0]),
    ):
        if name in p and p[name].numel() != size * (a.shape[0] if experts else 1):
            raise SiteError(f"The site {path!r} has {name} of shape {tuple(p[name].shape)}, expected {size} numbers.")


def _alpha(config: LoraConfig, r: int, scaling: Tensor) -> float:
    """The shortest alpha that gives a scaling back, bit for bit."""
    exact = float(scaling) * (math.sqrt(r) if config.use_rslora else r)
    near = (exact, math.nextafter(exact, -math.inf), math.nextafter(exact, math.inf))
    for alpha in (*(round(exact, digits) for digits in range(10)), *near):
        config = dataclasses.replace(config, r=r, lora_alpha=alpha)
        if torch.equal(buffers(config)["scaling"].to(scaling.dtype), scaling.cpu()):
            return alpha
    return exact


def describe(config: LoraConfig, leaves: Mapping[str, Leaf]) -> LoraConfig:
    """The config that the leaves say: ranks from the shapes, alphas from the scalings.

    The config stays as it is where it says the same. Otherwise the most frequent rank and alpha become `r` and
    `lora_alpha`, and the other sites go into the patterns under their full paths.

    Args:
        config: the config.
        leaves: the leaves of each site, by path.

    Returns:
        A config whose `r`, `lora_alpha` and patterns give exactly these leaves.
    """
    said: dict[str, tuple[int, float]] = {}
    alphas_of: dict[tuple[int, float, torch.dtype], float] = {}
    same = True
    for path, p in leaves.items():
        if "scaling" not in p or p["scaling"].is_meta:  # without values, the config has the last word
            continue
        r = config.rank(p)
        at = config.at(path)
        expected = buffers(at)["scaling"].to(p["scaling"].dtype)
        if r == at.r and torch.equal(p["scaling"].cpu(), expected):
            said[path] = (r, float(at.lora_alpha))
        else:
            same = False
            key = (r, float(p["scaling"]), p["scaling"].dtype)
            if key not in alphas_of:  # a config costs milliseconds to make, and sites mostly agree
                alphas_of[key] = _alpha(config, r, p["scaling"])
            said[path] = (r, alphas_of[key])
    if same:
        return config
    (r, alpha), _ = Counter(said.values()).most_common(1)[0]
    ranks = {re.escape(path): s[0] for path, s in said.items() if s[0] != r}
    alphas = {re.escape(path): s[1] for path, s in said.items() if s[1] != alpha}
    return dataclasses.replace(config, r=r, lora_alpha=alpha, rank_pattern=ranks, alpha_pattern=alphas)


_CONV = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


def holder(site: Site, base: nn.Module, container: str, parts: Mapping[str, Tensor]) -> nn.Module | None:
    """The convolutions that hold A and B in the in-place view; None for linear layers."""
    weight = parts["weight"]
    if weight.ndim not in _CONV or container == "lora_magnitude_vector":
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
        init(out, config, draw, lambda: draw.zeros())
    if how is False:
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
)

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
