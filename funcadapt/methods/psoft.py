"""PSOFT: a rotation within the principal subspace of the base weight.

    y = W x + b + B (R - I) A drop(x),    R = diag(b) (I + Q) (I - Q)^-1 diag(a)    (Cayley)

A (r, in) and B (out, r) come from the SVD of W = U S V^T, cut to rank r: A = V^T and B = U S ("psoft_init"), or both
with the root of S ("pissa_init"). They are frozen, computed anew from the base weight and in no checkpoint. PEFT's
alpha cancels: it divides B by alpha / r, and multiplies the update by it.
Q is the skew matrix with the numbers of a leaf above its diagonal. With `use_cayley_neumann` the inverse is a series,
as in OFT, after Q is scaled to a Frobenius norm of at most `cayley_neumann_eps`, if that is given. Without
`psoft_orth`, (I + Q) (I - Q)^-1 is any matrix.
Leaves: `psoft_R` (r (r - 1) / 2), or (r, r) without `psoft_orth`; `psoft_vector_b` and `psoft_vector_a` (r), unless
`psoft_mag_b` or `psoft_mag_a` is false; the frozen `psoft_A` and `psoft_B`, at convolutions (r, in / groups * kernel).
Init: Q zero, the vectors one: the identity. `init_weights=False`: small normal numbers in Q.
Cost: r (r + 3) / 2 trained and r (in + out) frozen numbers a layer; 2 r (in + out + r) flops a token and about 3 r^3 a
call forward; backward the same again, as A and B have no gradient. One SVD of each weight at the start.
Dense form: W' = W + B (R - I) A on W as a matrix.

Source: PEFT 0.21.2, openreview FSHrinMArK. Differs from PEFT: also on transformers' Conv1D, embeddings, convolutions,
multi-head attention, plain parameters, experts and float64 weights. The SVD is of the weight in float32, on its device,
as in PEFT: the signs of singular vectors are the library's choice, so that a checkpoint depends on it, there and here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from funcadapt.config import AdapterConfig
from funcadapt.errors import SiteError
from funcadapt.layer import Layer, dropout
from funcadapt.method import Draw, Fresh, Leaf, Method, View, register
from funcadapt.parts import svd
from funcadapt.parts.checks import check_layers, check_rates
from funcadapt.parts.forms import KINDS, add_product, matrix, refuse_dropout
from funcadapt.parts.holders import holder
from funcadapt.parts.orthogonal import cayley, skew, without_autocast
from funcadapt.sites import Site


@dataclasses.dataclass(frozen=True, kw_only=True)
class PsoftConfig(AdapterConfig):
    """Config of PSOFT, with PEFT's fields.

    Attributes:
        r: the rank of the subspace.
        target_modules: names, a regular expression, "all-linear", or None for the model type's default.
        exclude_modules: names or a regular expression to leave out.
        psoft_alpha: has no effect, in PEFT neither: it cancels.
        psoft_dropout: dropout on the adapter's input, active when the layer is in training mode.
        fan_in_fan_out: PEFT's bookkeeping; the layer's type decides.
        ab_svd_init: "psoft_init" (orthonormal A) or "pissa_init" (the singular values in both).
        psoft_svd: "full" or "lowrank" (randomised).
        psoft_svd_lowrank_niter: power iterations of the latter.
        random_seed: its seed.
        psoft_orth: whether R is a rotation; otherwise any matrix.
        psoft_mag_b: whether the outputs of R are scaled.
        psoft_mag_a: whether its inputs are.
        use_cayley_neumann: a series instead of a solve.
        num_cayley_neumann_terms: how long the series is.
        cayley_neumann_eps: a bound on the norm of Q for the series.
        modules_to_save: modules that are trained in full and saved with the adapter.
        init_weights: whether a new adapter is the identity; otherwise it is random.
        layers_to_transform: indices of the layers to adapt.
        layers_pattern: the name of the layer list, with `layers_to_transform`.

    Raises:
        ValueError: if a value is unknown or out of range, or the values contradict each other.
    """

    peft_type: str = "PSOFT"
    r: int = 32
    target_modules: Sequence[str] | str | None = None
    exclude_modules: Sequence[str] | str | None = None
    psoft_alpha: float = 32
    psoft_dropout: float = 0.0
    fan_in_fan_out: bool = False
    ab_svd_init: str = "psoft_init"
    psoft_svd: str = "full"
    psoft_svd_lowrank_niter: int = 10
    random_seed: int = 0
    psoft_orth: bool = True
    psoft_mag_b: bool = True
    psoft_mag_a: bool = True
    use_cayley_neumann: bool = False
    num_cayley_neumann_terms: int = 5
    cayley_neumann_eps: float | None = None
    modules_to_save: Sequence[str] | None = None
    init_weights: bool = True
    layers_to_transform: Sequence[int] | int | None = None
    layers_pattern: Sequence[str] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layers(self, of_names=True)
        for name in ("r", "num_cayley_neumann_terms") if self.use_cayley_neumann else ("r",):
            if getattr(self, name) <= 0:
                raise ValueError(f"`{name}` must be a positive integer; got {getattr(self, name)}.")
        for name, allowed in (("ab_svd_init", ["pissa_init", "psoft_init"]), ("psoft_svd", ["full", "lowrank"])):
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {allowed}; got {getattr(self, name)!r}.")
        eps = self.cayley_neumann_eps
        if self.use_cayley_neumann and eps is not None and not 0 < eps < 1:
            raise ValueError(f"`cayley_neumann_eps` must be in (0, 1) when set; got {eps}.")
        check_rates(self, "psoft_dropout")


def init(site: Site, config: PsoftConfig, draw: Draw, weight: Callable[[], Tensor]) -> Fresh:
    """Q zero, or small normal numbers if `init_weights` is false; any matrix near the identity."""
    r, most = config.r, min(matrix(site))
    refuse_dropout(site, "psoft_dropout", config.psoft_dropout)
    if r > most:
        raise SiteError(f"`r` ({r}) must be at most {most} at {site.path!r}, whose weight has shape {site.shape}.")
    shape = (r * (r - 1) // 2,) if config.psoft_orth else (r, r)
    rotation = draw.zeros(*shape) if config.init_weights else draw.normal(*shape, std=0.1)
    if not config.psoft_orth:
        rotation = draw.cast(rotation.float() + torch.eye(r, device=rotation.device))
    given = {"psoft_vector_b": config.psoft_mag_b, "psoft_vector_a": config.psoft_mag_a}
    return Fresh({"psoft_R": rotation, **{name: draw.ones(r) for name, wanted in given.items() if wanted}}, {})


def derive(site: Site, config: PsoftConfig, draw: Draw, weight: Callable[[], Tensor]) -> dict[str, Tensor]:
    """A and B, from the SVD of the base weight."""
    (out, columns), r = matrix(site), config.r
    if draw.abstract:
        return {"psoft_A": draw.zeros(r, columns), "psoft_B": draw.zeros(out, r)}
    niter = config.psoft_svd_lowrank_niter if config.psoft_svd == "lowrank" else None
    u, s, vh = svd.largest(weight().detach().flatten(1).float(), r, niter, config.random_seed)
    if config.ab_svd_init == "psoft_init":
        return {"psoft_A": draw.cast(vh.contiguous()), "psoft_B": draw.cast((u * s).contiguous())}
    return {"psoft_A": draw.cast(s.sqrt()[:, None] * vh), "psoft_B": draw.cast(u * s.sqrt())}


def turn(config: Any, p: Leaf) -> Tensor:
    """R - I, (r, r), in at least float32."""
    r, wide = p["psoft_A"].shape[0], torch.promote_types(p["psoft_R"].dtype, torch.float32)
    numbers = p["psoft_R"].to(wide)
    if config.psoft_orth:
        numbers = numbers.reshape(1, r * (r - 1) // 2)
        if config.use_cayley_neumann and config.cayley_neumann_eps is not None:
            limit = config.cayley_neumann_eps**2
            numbers = numbers * (limit / (2 * numbers.square().sum()).clamp_min(limit)).sqrt()
        terms = config.num_cayley_neumann_terms if config.use_cayley_neumann else None
        q = skew(numbers, r)  # the series is of (I + Q) (I - Q)^-1, the solve of (I - Q) (I + Q)^-1
        with without_autocast(q.device):
            numbers = cayley(-q if terms is None else q, terms)
    rotation = numbers.reshape(r, r)
    if "psoft_vector_b" in p:
        rotation = p["psoft_vector_b"].to(wide).reshape(r, 1) * rotation
    if "psoft_vector_a" in p:
        rotation = rotation * p["psoft_vector_a"].to(wide).reshape(1, r)
    return rotation - torch.eye(r, dtype=wide, device=rotation.device)


def after(layer: Layer, p: Leaf, x: Tensor, y: Tensor) -> Tensor:
    """Y + B (R - I) A drop(x)."""
    config: Any = layer.config
    site, r, dtype = layer.site, p["psoft_A"].shape[0], torch.promote_types(y.dtype, p["psoft_A"].dtype)
    change, a, b = turn(config, p), p["psoft_A"].to(dtype), p["psoft_B"].reshape(site.out_features, r)
    if config.psoft_dropout:
        x = dropout(layer, x, config.psoft_dropout)
    if site.kind.startswith("conv"):
        return add_product(layer, x, y, a, (b.to(change.dtype) @ change).to(dtype))
    x = x.to(dtype) if x.is_floating_point() else x
    h = layer.linear(x, a.reshape(r, *site.shape[1:])).reshape(-1, r) @ change.to(dtype).t()
    return torch.addmm(y.to(dtype).reshape(-1, site.out_features), h, b.to(dtype).t()).view(y.shape).to(y.dtype)


def weight(layer: Layer, p: Leaf, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """W + B (R - I) A."""
    change = turn(layer.config, p)
    delta = p["psoft_B"].to(change.dtype) @ change @ p["psoft_A"].to(change.dtype)
    return (weight + delta.reshape(weight.shape)).to(weight.dtype), bias


def check(config: PsoftConfig, path: str, p: Leaf) -> None:
    """The leaves that the config asks for, with its rank."""
    r = config.r
    expected: dict[str, tuple[int, ...]] = {"psoft_R": (r * (r - 1) // 2,) if config.psoft_orth else (r, r)}
    expected |= {"psoft_vector_b": (r,)} if config.psoft_mag_b else {}
    expected |= {"psoft_vector_a": (r,)} if config.psoft_mag_a else {}
    found = {name: tuple(leaf.shape) for name, leaf in p.items() if name in METHOD.keys}
    ends = {name: shape[len(shape) - len(expected.get(name, ())) :] for name, shape in found.items()}
    if ends != expected:
        raise SiteError(f"The site {path!r} has the leaves {found}, its config says {expected}.")


METHOD = register(
    Method(
        name="psoft",
        config=PsoftConfig,
        kinds=KINDS,
        keys={
            "psoft_R": "psoft_R.weight",
            "psoft_vector_b": "psoft_R.vector_b",
            "psoft_vector_a": "psoft_R.vector_a",
        },
        init=init,
        derive=derive,
        after=after,
        weight=weight,
        check=check,
        dropout=lambda config: config.psoft_dropout,
        reads=frozenset({"psoft_orth", "use_cayley_neumann", "num_cayley_neumann_terms", "cayley_neumann_eps"}),
        rank_field="",  # a larger subspace is another one
        neutral=lambda p: {name: torch.zeros_like(leaf) for name, leaf in p.items()},  # B is zero
        view=View(
            "psoft",
            "Psoft",
            "psoft_",
            label="psoft.",
            dropout="psoft_dropout",
            attributes={
                name: name for name in ("r", "psoft_alpha", "psoft_svd", "psoft_svd_lowrank_niter", "random_seed")
            },
            holder=holder("OrthLayer"),
        ),
    )
)
