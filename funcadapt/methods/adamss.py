"""AdaMSS: adaptive multi-subspaces. Outputs fall into clusters, and each has a small update of its own.

    [W, b] ~ U S V^T, the r largest        z = V^T [x; 1]        rows of U in K clusters, by k-means
    y = W x + b + B_i A_i z                for the outputs in cluster i

Leaves: `adamss_A.i` (k, r) and `adamss_B.i` (size of cluster i, k) with k = `subspace_rank`, at most that size; the
constant `adamss_newB` = V^T (r, columns), one column more where the layer has a bias. The base weight is a matrix
(out, columns) at every kind of layer: columns are inputs, at a convolution inputs of a group times kernel. Derived, in
no checkpoint: `adamss_rows_i`, the outputs in cluster i, and `adamss_order`, where each output is among them.
Init: A the main directions of the cluster's rows of U, B zero: the identity.
Cost: K k r + k out parameters; 2 K k (columns + out) flops a token forward, and A V^T once a call.
Dense form: rows of B_i A_i V^T added to W, its last column to b.

The clusters are those of PEFT, which takes scikit-learn's k-means; `parts/kmeans.py` is the same without it. So a
file of PEFT's means here what it meant there, up to ties. (Else the sizes do not fit, and the first call raises.) PEFT
derives them again from the base weight when it reads a file, too.

ASA, the adaptive allocation of subspaces, is pure functions over a state: `funcadapt.parts.subspace_allocation`.

Source: Zheng et al. 2025, AdaMSS (NeurIPS). Differs from PEFT: also on transformers' Conv1D, embeddings, convolutions,
multi-head attention and plain parameters, but not on experts, whose clusters would differ in size; ASA keeps as many
subspaces as its schedule says, where PEFT's strict comparison keeps one less.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from funcadapt import targets
from funcadapt.config import AdapterConfig
from funcadapt.errors import SiteError
from funcadapt.layer import Layer
from funcadapt.method import Draw, Fresh, Leaf, Method, View, register
from funcadapt.parts import svd
from funcadapt.parts.forms import KINDS, add_product, matrix
from funcadapt.parts.subspace_allocation import update_and_allocate
from funcadapt.parts.subspaces import count, directions, spaces
from funcadapt.sites import Site

_block_diag: Callable[..., Tensor] = torch.block_diag  # pyright: ignore (without types)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamssConfig(AdapterConfig):
    """Config of AdaMSS, with PEFT's fields.

    Attributes:
        r: how many singular directions of the weight are used, at most all.
        num_subspaces: how many clusters of outputs there are, at most one for each.
        subspace_rank: the rank of the update of a cluster.
        target_modules: names, a regular expression, "all-linear", or None for the model type's default.
        init_weights: "orthogonal": B is zero; None or False: B is random.
        modules_to_save: modules that are trained in full and saved with the adapter.
        layers_to_transform: indices of the layers to adapt.
        layers_pattern: the name of the layer list, with `layers_to_transform`.
        use_asa: whether subspaces are allocated in training. The other fields of ASA matter only then.
        asa_target_subspaces: how many subspaces are left in the end, in all layers together.
        init_warmup: the step at which the allocation begins.
        final_warmup: the step at which it ends.
        mask_interval: how many steps there are from one allocation to the next.
        asa_importance_beta: how slowly the mean of the importance moves.
        asa_uncertainty_beta: likewise, of its uncertainty.
        asa_schedule_exponent: how the number of subspaces falls: 1 is linear, more is faster at first.
        use_dynamic_rank: whether a cluster's rank is less where its rows have fewer large singular values.
        svd_threshold: what is large: more than this part of the largest.
        random_seed: the seed of the decomposition.

    Raises:
        ValueError: if a value is out of range.
    """

    peft_type: str = "ADAMSS"
    r: int = 100
    num_subspaces: int = 5
    subspace_rank: int = 1
    target_modules: Sequence[str] | str | None = None
    init_weights: str | bool | None = "orthogonal"
    modules_to_save: Sequence[str] | None = None
    layers_to_transform: Sequence[int] | int | None = None
    layers_pattern: Sequence[str] | str | None = None
    use_asa: bool = False
    asa_target_subspaces: int = 50
    init_warmup: int = 50
    final_warmup: int = 1000
    mask_interval: int = 100
    asa_importance_beta: float = 0.85
    asa_uncertainty_beta: float = 0.85
    asa_schedule_exponent: float = 3.0
    use_dynamic_rank: bool = False
    svd_threshold: float = 0.1
    random_seed: int = 0

    target_table: ClassVar[targets.Targets] = {**targets.LORA, "vit": ("query", "value")}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_weights is False:
            object.__setattr__(self, "init_weights", None)
        if self.init_weights not in ("orthogonal", None):
            raise ValueError(f"init_weights must be 'orthogonal' or None, got {self.init_weights}")
        for name in ("r", "num_subspaces", "subspace_rank"):
            if getattr(self, name) <= 0:
                raise ValueError(f"`{name}` must be a positive integer, got {getattr(self, name)}.")
        for name in ("mask_interval", "asa_target_subspaces", "asa_schedule_exponent") if self.use_asa else ():
            if getattr(self, name) <= 0:
                raise ValueError(f"`{name}` must be positive when `use_asa=True`, got {getattr(self, name)}.")
        if self.use_asa and self.init_warmup >= self.final_warmup:
            raise ValueError("`init_warmup` must be smaller than `final_warmup` when `use_asa=True`, got "
                             f"init_warmup={self.init_warmup} and final_warmup={self.final_warmup}.")  # fmt: skip


def init(site: Site, config: AdamssConfig, draw: Draw, weight: Callable[[], Tensor]) -> Fresh:
    """A: the main directions of each cluster; B zero. It reads the values of the base weight."""
    if site.stack:
        raise SiteError(f"AdaMSS cannot adapt the experts {site.path!r}: the clusters of each have other sizes.")
    u, v, found = spaces(site, config, weight)
    every: list[tuple[Tensor, Tensor]] = []
    seed = draw.generator.initial_seed() if draw.generator is not None else 0 if draw.abstract else None
    with svd.seeded(seed, u.device):
        for rows in found:  # PEFT draws for A and for B in turn
            a = draw.cast(directions(u[rows.to(u.device)], config))
            shape = (len(rows), len(a))
            every.append((a, draw.normal(*shape, std=0.01) if config.init_weights is None else draw.zeros(*shape)))
    params = {f"adamss_A.{i}": a for i, (a, _) in enumerate(every)}
    params |= {f"adamss_B.{i}": b for i, (_, b) in enumerate(every)}
    return Fresh(params, {"adamss_newB": draw.cast(v).contiguous()})


def derive(site: Site, config: AdamssConfig, draw: Draw, weight: Callable[[], Tensor]) -> dict[str, Tensor]:
    """The outputs in each cluster, and where each output is among them. Nothing if the weight is on the meta device."""
    if draw.abstract and weight().is_meta:
        return {}
    found = [rows.to(draw.device) for rows in spaces(site, config, weight).rows]
    leaves = {f"adamss_rows_{i}": rows for i, rows in enumerate(found)}
    return {**leaves, "adamss_order": torch.cat(found).argsort()}


def factors(layer: Layer, p: Leaf) -> tuple[Tensor, Tensor, Tensor | None]:
    """All A V^T (n, columns), the B as one matrix (out, n), and what A V^T makes of the 1 below x, if there is one."""
    site, n = layer.site, count(p)
    every = [(p[f"adamss_A.{i}"], p[f"adamss_B.{i}"]) for i in range(n)]
    for i, (a, b) in enumerate(every):
        rows = p.get(f"adamss_rows_{i}")
        if rows is None or f"adamss_rows_{n}" in p or b.shape != (rows.shape[0], a.shape[0]):
            raise SiteError(
                f"AdaMSS at {site.path!r}: adamss_B.{i} has shape {tuple(b.shape)}, and the base weight gives cluster "
                f"{i} {0 if rows is None else rows.shape[0]} outputs. Was the adapter made for another base weight?"
            )
    a, columns = torch.cat([a for a, _ in every]), matrix(site)[1]
    b = _block_diag(*(b for _, b in every)).reshape(site.out_features, a.shape[0])
    b = b.index_select(0, p["adamss_order"])
    v = p["adamss_newB"].reshape(a.shape[1], columns + bool(site.bias))
    shift = a @ v[:, columns] if site.bias else None
    return a @ v[:, :columns], b, shift


def after(layer: Layer, p: Leaf, x: Tensor, y: Tensor) -> Tensor:
    """Y + B A V^T [x; 1]."""
    return add_product(layer, x, y, *factors(layer, p))


def weight(layer: Layer, p: Leaf, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """W + B A V^T, and b + B A (the last column of V^T)."""
    a, b, shift = factors(layer, p)
    if bias is not None and shift is not None:
        bias = (bias + b @ shift).to(bias.dtype)
    return (weight + (b @ a).reshape(layer.site.shape)).to(weight.dtype), bias


def check(config: AdamssConfig, path: str, p: Leaf) -> None:
    """As many A as B, that fit each other and newB."""
    n = count(p)
    names = {"adamss_newB", *(f"adamss_{side}.{i}" for side in "AB" for i in range(n))}
    if not n or names != set(p):
        raise SiteError(f"The site {path!r} has {sorted(p)}, expected adamss_newB, and adamss_A.i and adamss_B.i for "
                        "every subspace i.")  # fmt: skip
    v = tuple(p["adamss_newB"].shape)
    for i in range(n):
        a, b = tuple(p[f"adamss_A.{i}"].shape), tuple(p[f"adamss_B.{i}"].shape)
        if not len(a) == len(b) == len(v) == 2 or a[1] != v[0] or a[0] != b[1]:
            raise SiteError(f"The site {path!r} has adamss_A.{i} {a}, adamss_B.{i} {b} and adamss_newB {v}; expected "
                            "(k, r), (size, k) and (r, columns).")  # fmt: skip


def shapes(site: Site, config: AdamssConfig, p: Leaf) -> dict[str, tuple[int, ...]]:
    """The shapes that leaves must have, which are not known without the clusters."""
    r, columns = p["adamss_newB"].shape[0], matrix(site)[1] + bool(site.bias)
    expected: dict[str, tuple[int, ...]] = {"adamss_newB": (r, columns)}
    for i in range(sum(name.startswith("adamss_rows_") for name in p)):
        k = p[f"adamss_A.{i}"].shape[0] if f"adamss_A.{i}" in p else 1
        expected |= {f"adamss_A.{i}": (k, r), f"adamss_B.{i}": (p[f"adamss_rows_{i}"].shape[0], k)}
    return expected


def neutral(p: Leaf) -> Leaf:
    """Zeros: no update. The clusters stay."""
    return {name: torch.zeros_like(leaf) if leaf.is_floating_point() else leaf for name, leaf in p.items()}


METHOD = register(
    Method(
        name="adamss",
        config=AdamssConfig,
        kinds=KINDS - {"experts"},
        keys={"adamss_A.*": "adamss_A.*", "adamss_B.*": "adamss_B.*", "adamss_newB": "adamss_newB"},
        constants=frozenset({"adamss_newB"}),
        init=init,
        inits_experts=True,
        derive=derive,
        after=after,
        weight=weight,
        check=check,
        shapes=shapes,
        reads=frozenset(),
        neutral=neutral,
        view=View(
            package="adamss",
            name="Adamss",
            prefix="adamss_",
            containers=("adamss_A", "adamss_B", "adamss_newB"),
            label="adamss.",
            tuner={"update_and_allocate": update_and_allocate},
        ),
    )
)
