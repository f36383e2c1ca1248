"""DEFT and PaRa: a subspace of a layer's output is removed, and another map put in its place.

    y = W x + b - Q N^T W x + c Q R drop(x)        c = alpha / r, or 1 without alpha

Q = P and N = relu(P) ("relu"), or Q = N = the orthonormal factor of P = Q U ("qr"): then Q Q^T is a projector. With
`para` the last term is absent. W x is taken from the output, less the bias: there is no second product with W.
Leaves: `deft_P` (out, r) and, without `para`, `deft_R` (r, in); convolutions (r, in * kernel). r is at most out.
Init: P normal with 0.02, R = N^T W / c, which makes a new adapter the identity, unless it is PaRa; with
`init_weights=False` R is normal with 0.02 init_scale.
Cost: r (in + out) parameters a layer; 2 r (in + 2 out) flops a token forward and twice that backward.
Dense form: W' = W + Q (c R - N^T W) on W as a matrix (out, in * kernel); b' = b.

Source: PEFT 0.21.2's DEFT, whose `para` is PaRa, Chen et al. 2024, arXiv:2406.05641. Differs from PEFT: also on
embeddings, convolutions without groups, multi-head attention, plain parameters and experts; computes in the dtype of
its leaves and input, and decomposes in at least float32 (PEFT: all in float32, of a float64 model, too); several
adapters nest, each removing from the output of those before it (PEFT: each from the base's).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from funcadapt._torch import linalg
from funcadapt.config import AdapterConfig
from funcadapt.errors import SiteError
from funcadapt.layer import Layer, dropout
from funcadapt.method import Draw, Fresh, Leaf, Method, View, register
from funcadapt.parts.forms import KINDS, refuse_dropout
from funcadapt.sites import Site


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeftConfig(AdapterConfig):
    """Config of DEFT, with PEFT's fields.

    Attributes:
        r: the rank of what is removed and put in its place; at most the number of outputs.
        target_modules: names, a regular expression, "all-linear", or None for the model type's default.
        exclude_modules: names or a regular expression to leave out.
        decomposition_method: "relu" or "qr".
        init_scale: the scale of a random R.
        alpha: R is scaled by alpha / r; None for not at all.
        para: whether there is no R (PaRa).
        fan_in_fan_out: PEFT's bookkeeping; the layer's type decides.
        deft_dropout: dropout on the input of R, active when the layer is in training mode.
        init_weights: whether a new adapter is the identity; otherwise R is random.
        layers_to_transform: indices of the layers to adapt.
        layers_pattern: the name of the layer list, with `layers_to_transform`.
        bias: "none", "all" (train every bias of the model) or "deft_only" (those of the adapted layers).
        modules_to_save: modules that are trained in full and saved with the adapter.

    Raises:
        ValueError: if `r` is not positive, `decomposition_method` is unknown, or the values contradict each other.
    """

    peft_type: str = "DEFT"
    r: int = 8
    target_modules: Sequence[str] | str | None = None
    exclude_modules: Sequence[str] | str | None = None
    decomposition_method: str = "relu"
    init_scale: float = 1.0
    alpha: float | None = None
    para: bool = False
    fan_in_fan_out: bool = False
    deft_dropout: float = 0.0
    init_weights: bool = True
    layers_to_transform: Sequence[int] | int | None = None
    layers_pattern: Sequence[str] | str | None = None
    bias: str = "none"
    modules_to_save: Sequence[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r <= 0:
            raise ValueError(f"`r` should be a positive integer value but the value passed is {self.r}")
        if self.decomposition_method not in ("qr", "relu"):
            raise ValueError(
                f"Unknown decomposition_method '{self.decomposition_method}', must be one of ['qr', 'relu']."
            )
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("`layers_to_transform` cannot be used when `target_modules` is a str.")
        if isinstance(self.target_modules, str) and self.layers_pattern is not None:
            raise ValueError("`layers_pattern` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified. ")
        if not 0 <= self.deft_dropout < 1:
            raise ValueError(f"`deft_dropout` must be in [0, 1), got {self.deft_dropout}.")

    def injection(self, r: int) -> float:
        """The scale of R at a site of rank r."""
        return self.alpha / r if self.alpha else 1.0


def init(site: Site, config: DeftConfig, draw: Draw, weight: Callable[[], Tensor]) -> Fresh:
    """P random, R so that nothing changes, or random."""
    refuse_dropout(site, "deft_dropout", config.deft_dropout)
    if site.groups > 1:
        raise SiteError(f"DEFT on the grouped convolution {site.path!r} would mix outputs that read different inputs.")
    r, columns = min(config.r, site.out_features), math.prod(site.shape[1:])
    p = draw.normal(site.out_features, r, std=0.02)
    if config.para:
        return Fresh({"deft_P": p}, {})
    if not config.init_weights:
        return Fresh({"deft_P": p, "deft_R": draw.normal(r, columns, std=0.02 * config.init_scale)}, {})
    if draw.abstract:
        return Fresh({"deft_P": p, "deft_R": draw.zeros(r, columns)}, {})
    n = projection(config, p)[1]
    removed = n.t() @ weight().detach().flatten(1).to(device=n.device, dtype=n.dtype)
    return Fresh({"deft_P": p, "deft_R": draw.cast(removed / config.injection(r))}, {})


def projection(config: DeftConfig, p: Tensor) -> tuple[Tensor, Tensor]:
    """Q and N, both (out, r); in at least float32 where P is decomposed."""
    if config.decomposition_method == "relu":
        return p, p.relu()
    q = linalg.qr(p.to(torch.promote_types(p.dtype, torch.float32))).Q
    return q, q


def after(layer: Layer, p: Leaf, x: Tensor, y: Tensor) -> Tensor:
    """Y + Q (c R drop(x) - N^T (y - b))."""
    site, config, given = layer.site, layer.config, p["deft_P"]
    assert isinstance(config, DeftConfig)
    dtype = torch.promote_types(y.dtype, given.dtype)
    q, n = (t.to(dtype) for t in projection(config, given))
    r, ones = given.shape[1], (1,) * (len(site.shape) - 2)
    out = y.to(dtype)
    removed = layer.pointwise(out, n.t().reshape(r, site.out_features, *ones))
    if site.bias and (bias := layer.bias) is not None:
        removed = removed - (bias.to(dtype) @ n).reshape(r, *ones)
    if config.para:
        h = -removed
    else:
        if config.deft_dropout:
            x = dropout(layer, x, config.deft_dropout)
        inner = p["deft_R"].to(dtype).reshape(r, *site.shape[1:])
        put = layer.linear(x.to(dtype) if x.is_floating_point() else x, inner)
        h = torch.sub(put * config.injection(r), removed)
    if ones:
        return (out + layer.pointwise(h, q.reshape(site.out_features, r, *ones))).to(y.dtype)
    return torch.addmm(out.reshape(-1, out.shape[-1]), h.reshape(-1, r), q.t()).view(y.shape).to(y.dtype)


def weight(layer: Layer, p: Leaf, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """W + Q (c R - N^T W)."""
    config = layer.config
    assert isinstance(config, DeftConfig)
    q, n = projection(config, p["deft_P"])
    flat = weight.flatten(1).to(torch.promote_types(weight.dtype, q.dtype))
    q, n = q.to(flat.dtype), n.to(flat.dtype)
    inner = -(n.t() @ flat)
    if not config.para:
        r = q.shape[1]
        inner = inner + p["deft_R"].to(flat.dtype).reshape(r, flat.shape[1]) * config.injection(r)
    return (flat + q @ inner).reshape(weight.shape).to(weight.dtype), bias


def check(config: DeftConfig, path: str, p: Leaf) -> None:
    """P, and R with the same rank unless the config says PaRa."""
    shapes = {name: tuple(p[name].shape) for name in ("deft_P", "deft_R") if name in p}
    right = "deft_P" in p and ("deft_R" in p) != config.para and {len(s) for s in shapes.values()} <= {2, 3}
    if not right or (not config.para and p["deft_P"].shape[-1] != p["deft_R"].shape[-2]):
        raise SiteError(f"The site {path!r} has the leaves {shapes}, expected deft_P (out, r)"
                        f"{'' if config.para else ' and deft_R (r, in)'}.")  # fmt: skip


METHOD = register(
    Method(
        name="deft",
        config=DeftConfig,
        kinds=KINDS,
        keys={"deft_P": "deft_P", "deft_R": "deft_R"},
        init=init,
        after=after,
        weight=weight,
        check=check,
        dropout=lambda config: config.deft_dropout,
        reads=frozenset({"decomposition_method", "alpha", "para"}),
        rank_field="",  # a decomposition cannot be padded
        view=View(
            "deft",
            "Deft",
            "deft_",
            classes={"linear": "DeftLinear", "hf_conv1d": "DeftLinear"},
            label="deft.",
            dropout="deft_dropout",
            attributes={"deft_decomposition": "decomposition_method", "deft_init_scale": "init_scale"},
        ),
    )
)
