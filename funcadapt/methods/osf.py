"""OSF: orthogonal subspace fine-tuning. The small singular directions of a weight are trained, the large ones kept.

    W = U_high S_high V_high + U_0 S_0 V_0        the singular value decomposition, the largest `effective_rank` first
    y = W x + b + U S V x - U_0 S_0 V_0 x

Leaves: `osf_U_low` (out, k), `osf_S_low` (k), `osf_V_low` (k, columns); k is min(out, columns) less effective_rank. The
base weight is a matrix (out, columns) at all kinds of layers: columns are inputs, at a convolution inputs of a group
times kernel. Derived, in no checkpoint: the initial ones, `osf_*_low_init`, and U_high or V_high, whichever is not
square. Init: the decomposition, in float32: the identity.
The gradients of U and V are projected, so that a step leaves U_high and V_high alone:

    dU <- dU - U_high U_high^T dU        dV <- dV - dV V_high^T V_high        where square: dU <- U_0 U_0^T dU, ...

They are no derivatives by design (`constant_in_gradient`); S has the full one. In eager mode the projection costs
nothing forward and 4 k^2 (out + columns) flops or less backward; in a compiled graph as much forward, too.
Cost: k (out + columns + 1) parameters, and 4 k (out + columns) flops a token forward.
Dense form: W + U S V - U_0 S_0 V_0.
A checkpoint acts as it did if the product U_0 S_0 V_0 is the same: signs of singular vectors do not matter.

Source: Nayak et al. 2025, arXiv:2504.07097. Differs from PEFT: several adapters add up (PEFT applies the first and
merges all, B6), merging can be undone, transformers' Conv1D and other layers are adapted, not skipped in silence.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from funcadapt import targets
from funcadapt._torch import linalg
from funcadapt.config import AdapterConfig
from funcadapt.errors import SiteError
from funcadapt.layer import Layer
from funcadapt.method import Draw, Fresh, Leaf, Method, View, register
from funcadapt.parts.forms import KINDS, add_product, certain, matrix
from funcadapt.parts.projecting import projected
from funcadapt.sites import Site

_LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj")
TARGETS: targets.Targets = {
    **dict.fromkeys(
        ("llama", "llama4", "mistral", "mixtral", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3", "phi"), _LLAMA
    ),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), ("c_attn", "c_proj")),
    **dict.fromkeys(("bloom", "gpt_neox", "falcon"), ("query_key_value", "dense_4h_to_h")),
    "opt": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    "gptj": ("q_proj", "v_proj", "k_proj", "out_proj", "fc_in", "fc_out"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class OSFConfig(AdapterConfig):
    """Config of OSF, with PEFT's fields.

    Attributes:
        effective_rank: how many singular directions are kept: a number, a fraction of the smaller side of each weight
            (a float in (0, 1]), or None for half of it.
        target_modules: names, a regular expression, "all-linear", or None for the model type's default, which is
            "all-linear" for unknown types.
        rank_pattern: `effective_rank` by regular expression, searched for anywhere in the site path.
        init_weights: whether the leaves start as the decomposition; else they are random.
        modules_to_save: modules that are trained in full and saved with the adapter.
        target_svd_config: ignored, as in PEFT.

    Raises:
        ValueError: if a pattern is no regular expression.
    """

    peft_type: str = "OSF"
    effective_rank: int | float | None = None
    target_modules: Sequence[str] | str | None = None
    rank_pattern: Mapping[str, int | float] | None = None
    init_weights: bool | None = True
    modules_to_save: Sequence[str] | None = None
    target_svd_config: Mapping[str, int] | None = None

    target_table: ClassVar[targets.Targets] = TARGETS

    def __post_init__(self) -> None:
        super().__post_init__()
        for pattern in self.rank_pattern or ():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"`rank_pattern` has {pattern!r}, which is no regular expression: {error}") from error

    def at(self, path: str) -> Self:
        """This config for one site. PEFT's rule for OSF: the first pattern that is found anywhere in the path wins."""
        for pattern, rank in (self.rank_pattern or {}).items():
            if re.search(pattern, path):
                return dataclasses.replace(self, effective_rank=rank)
        return self

    def for_model(self, model_type: str | None) -> Self:
        """This config with the model type's defaults filled in."""
        if self.target_modules is None and model_type not in TARGETS:
            return dataclasses.replace(self, target_modules="all-linear")
        return super().for_model(model_type)

    def rank(self, leaves: Mapping[str, Tensor]) -> int:
        """The trained rank of one site's leaves."""
        return leaves["osf_S_low"].shape[-1] if "osf_S_low" in leaves else 0


def kept(site: Site, config: OSFConfig) -> int:
    """How many singular directions of a site's weight are kept.

    Args:
        site: the site.
        config: the config at it.

    Returns:
        The number.

    Raises:
        SiteError: if nothing would be kept.
    """
    out, columns = matrix(site)
    rank, size = config.effective_rank, min(out, columns)
    if rank is None:
        rank = size // 2
    elif isinstance(rank, float) and 0 < rank <= 1:
        rank = int(size * rank)
    rank = min(size, int(rank))
    if rank <= 0:
        raise SiteError(f"`effective_rank` should be positive, got {config.effective_rank} at {site.path!r}, whose "
                        f"weight is ({out}, {columns}).")  # fmt: skip
    return rank


def _decomposed(
    site: Site, config: OSFConfig, draw: Draw, weight: Callable[[], Tensor]
) -> tuple[Tensor, Tensor, Tensor, int]:
    """U, S and V of the weight, and how many of them are kept."""
    (out, columns), high = matrix(site), kept(site, config)
    size = min(out, columns)
    if draw.abstract:
        return draw.zeros(out, size), draw.zeros(size), draw.zeros(size, columns), high
    u, s, v = linalg.svd(weight().flatten(1).to(torch.float32), full_matrices=False)
    return draw.cast(u).contiguous(), draw.cast(s), draw.cast(v).contiguous(), high


def init(site: Site, config: OSFConfig, draw: Draw, weight: Callable[[], Tensor]) -> Fresh:
    """The small singular directions, or normal numbers if `init_weights` is false."""
    if config.init_weights is False:
        (out, columns), high = matrix(site), kept(site, config)
        k = min(out, columns) - high
        low = draw.normal(out, k), draw.normal(k), draw.normal(k, columns)
    else:
        u, s, v, high = _decomposed(site, config, draw, weight)
        low = u[:, high:].contiguous(), s[high:].clone(), v[high:].clone()
    return Fresh(dict(zip(("osf_U_low", "osf_S_low", "osf_V_low"), low, strict=True)), {})


def derive(site: Site, config: OSFConfig, draw: Draw, weight: Callable[[], Tensor]) -> dict[str, Tensor]:
    """The decomposition as it was: its small directions, and the large ones on the longer side."""
    u, s, v, high = _decomposed(site, config, draw, weight)
    leaves = {"osf_U_low_init": u[:, high:], "osf_S_low_init": s[high:], "osf_V_low_init": v[high:]}
    out, columns = matrix(site)
    if out > columns:
        leaves["osf_U_high"] = u[:, :high]
    if columns > out:
        leaves["osf_V_high"] = v[:high]
    return {name: leaf.clone(memory_format=torch.contiguous_format) for name, leaf in leaves.items()}


def parts(p: Leaf) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """U, S and V, whose gradients are projected, and U_0, S_0 and V_0."""
    u0, s0, v0 = p["osf_U_low_init"], p["osf_S_low_init"], p["osf_V_low_init"]
    u_high, v_high = p.get("osf_U_high"), p.get("osf_V_high")
    u = projected(p["osf_U_low"], u0 if u_high is None else u_high, u_high is not None)
    v = projected(p["osf_V_low"].mT, v0.mT if v_high is None else v_high.mT, v_high is not None).mT
    return (u, p["osf_S_low"], v), (u0, s0, v0)


def after(layer: Layer, p: Leaf, x: Tensor, y: Tensor) -> Tensor:
    """Y + U S V x - U_0 S_0 V_0 x."""
    (u, s, v), (u0, s0, v0) = parts(p)
    if layer.site.kind in ("linear", "hf_conv1d") and x.dim() > 1 and x.dtype == u.dtype == y.dtype:
        # no joined matrices, which are larger than x and y where k is large
        rows, out = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        out = torch.addmm(out, torch.mm(rows, v.t()) * s, u.t())
        return torch.addmm(out, torch.mm(rows, v0.t()) * s0, u0.t(), alpha=-1).view(y.shape).to(y.dtype)
    return add_product(layer, x, y, torch.cat([v, v0]), torch.cat([u * s, -(u0 * s0)], 1))


def folds(layer: Layer, p: Leaf, x: Tensor) -> bool:
    """Whether there are so many tokens that U S V is better made once."""
    (out, columns), tokens = matrix(layer.site), x.numel() // layer.site.in_features
    # of both, as min() would compare them
    return all(certain(n * (out + columns) > out * columns) for n in (tokens, 4 * p["osf_S_low"].shape[-1]))


def weight(layer: Layer, p: Leaf, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """W + U S V - U_0 S_0 V_0."""
    (u, s, v), (u0, s0, v0) = parts(p)
    return (weight + ((u * s) @ v - (u0 * s0) @ v0).reshape(layer.site.shape)).to(weight.dtype), bias


def check(config: OSFConfig, path: str, p: Leaf) -> None:
    """All three leaves, of one rank."""
    for name in METHOD.keys:
        if name not in p:
            raise SiteError(f"The site {path!r} lacks {name!r}.")
    u, s, v = (tuple(p[name].shape) for name in METHOD.keys)
    if len(s) not in (1, 2) or (*u[:-2], *u[-1:]) != s or v[:-1] != s or len(v) != len(s) + 1:
        raise SiteError(f"The site {path!r} has osf_U_low {u}, osf_S_low {s} and osf_V_low {v}; expected (out, k), "
                        "(k,) and (k, in).")  # fmt: skip


def _parameter_dict(site: Site, base: nn.Module, container: str, parts: Mapping[str, Tensor]) -> nn.Module:
    """What PEFT holds the trained leaves in."""
    return nn.ParameterDict({name: nn.Parameter(value) for name, value in parts.items()})


_FROZEN = ("osf_U_low_init", "osf_S_low_init", "osf_V_low_init", "osf_U_high", "osf_V_high")

METHOD = register(
    Method(
        name="osf",
        config=OSFConfig,
        kinds=KINDS,
        keys={f"osf_{name}": f"osf_svd_params.{name}" for name in ("U_low", "S_low", "V_low")},
        init=init,
        derive=derive,
        after=after,
        folds=folds,
        weight=weight,
        check=check,
        reads=frozenset(),
        constant_in_gradient=frozenset({"osf_U_low", "osf_V_low"}),
        view=View(
            package="osf",
            name="OSF",
            prefix="osf_",
            label="osf.",
            attributes={"effective_rank": "effective_rank"},
            containers=("osf_svd_params", *(f"_{name}" for name in _FROZEN)),
            holder=_parameter_dict,
            held={name: f"_{name}" for name in _FROZEN},
            buffers=frozenset(_FROZEN),
        ),
    )
)
