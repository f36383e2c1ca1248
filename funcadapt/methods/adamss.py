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

The clusters are those of scikit-learn's KMeans(init="random", n_init=1, max_iter=10, random_state=123456789), without
scikit-learn: `clusters` computes them in float64 from the same seed, so a file of PEFT's means here what it meant
there. (scikit-learn's are float32: an output that is equally near to two centers may go to the other one. Then the
sizes do not fit, and the first call raises.) PEFT derives them again from the base weight when it reads a file, too.

ASA, the adaptive allocation of subspaces, is pure functions over a state: `start`, `update`, `keep`.

Source: Zheng et al. 2025, AdaMSS (NeurIPS). Differs from PEFT: also on transformers' Conv1D, embeddings, convolutions,
multi-head attention and plain parameters, but not on experts, whose clusters would differ in size; ASA keeps as many
subspaces as its schedule says, where PEFT's strict comparison keeps one less.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from funcadapt import targets
from funcadapt._torch import fork_rng, linalg
from funcadapt.adapter import TensorTree
from funcadapt.config import AdapterConfig
from funcadapt.errors import SiteError
from funcadapt.forms import KINDS, add_product
from funcadapt.layer import Layer
from funcadapt.method import Draw, Fresh, Leaf, Method, View, register
from funcadapt.sites import Site

_SEED, _ROUNDS, _TOLERANCE = 123456789, 10, 1e-4  # PEFT's arguments of KMeans, and its default


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


# -- clusters ---------------------------------------------------------------------------------------------


def _uniform(seed: int) -> Callable[[], float]:
    """Numpy's `RandomState(seed).rand`: the Mersenne twister of the standard library, seeded as numpy does."""
    words = [seed]
    for i in range(1, 624):
        words.append((1812433253 * (words[-1] ^ (words[-1] >> 30)) + i) & 0xFFFFFFFF)
    source = random.Random()
    source.setstate((3, (*words, 624), None))
    return source.random


def _choice(n: int, k: int) -> list[int]:
    """Numpy's `RandomState(seed).choice(n, k, replace=False, p=[1 / n] * n)`."""
    draw, p, found = _uniform(_SEED), [1.0] * n, list[int]()
    p = [float(torch.tensor(1.0) / n)] * n  # in float32, as scikit-learn has it
    while len(found) < k:
        numbers = [draw() for _ in range(k - len(found))]
        for i in found:
            p[i] = 0.0
        total = list(itertools.accumulate(p))
        found += dict.fromkeys(bisect.bisect_right(total, x * total[-1]) for x in numbers)
    return found


def clusters(rows: Tensor, k: int) -> Tensor:
    """Lloyd's k-means, with scikit-learn's rules for the start, the end and empty clusters.

    Args:
        rows: (n, d).
        k: how many clusters, at most n.

    Returns:
        (n), which one each row is in.
    """
    x = rows.detach().cpu().to(torch.float64)
    limit = x.var(0, correction=0).mean() * _TOLERANCE
    x = x - x.mean(0)
    centers, labels = x[torch.tensor(_choice(len(x), k))], torch.full((len(x),), -1)

    def nearest() -> Tensor:
        return (centers.square().sum(1) - 2 * (x @ centers.T)).argmin(1)

    for _ in range(_ROUNDS):
        before, labels = labels, nearest()
        counts = torch.bincount(labels, minlength=k).to(x.dtype)
        sums = torch.zeros_like(centers).index_add(0, labels, x)
        empty, far = (counts == 0).nonzero().flatten().tolist(), (x - centers[labels]).square().sum(1)  # pyright: ignore
        if empty and far.any():  # each gets the row that is farthest from its center
            for e, i in zip(empty, far.argsort(descending=True).tolist(), strict=False):  # pyright: ignore
                sums[labels[i]] -= x[i]
                counts[labels[i]] -= 1
                sums[e], counts[e] = x[i], 1
        means = sums / counts.clamp_min(1).unsqueeze(1)
        old, centers = centers, torch.where(counts.unsqueeze(1) > 0, means, means[counts.argmax()])
        if torch.equal(labels, before):
            return labels
        if (centers - old).square().sum() <= limit:
            break
    return nearest()


class _Spaces(NamedTuple):
    """The decomposition of one weight: U (out, r), V^T (r, columns), and the outputs in each cluster."""

    u: Tensor
    v: Tensor
    rows: list[Tensor]


def _spaces(site: Site, config: AdamssConfig, weight: Callable[[], Tensor]) -> _Spaces:
    matrix, bias = weight().flatten(1), getattr(weight, "bias", None)
    if site.bias:
        if bias is None:
            raise SiteError(f"AdaMSS decomposes the weight of {site.path!r} with its bias, which is not at hand.")
        matrix = torch.cat([matrix, bias.reshape(-1, 1).to(matrix)], 1)
    matrix = matrix.to(torch.float32)
    on = matrix.device
    forked: dict[str, Any] = {"devices": []} if on.type == "cpu" else {"devices": [on], "device_type": on.type}
    with fork_rng(**forked):  # svd_lowrank takes no generator, only torch's own
        torch.manual_seed(config.random_seed)  # pyright: ignore[reportUnknownMemberType]
        u, _, v = torch.svd_lowrank(matrix, min(config.r, *matrix.shape), niter=2)
    labels = clusters(u, min(config.num_subspaces, len(u)))
    found = [(labels == i).nonzero().flatten() for i in range(int(labels.max()) + 1)]
    return _Spaces(u, v.T, [rows for rows in found if len(rows)])


# -- the method -------------------------------------------------------------------------------------------


def init(site: Site, config: AdamssConfig, draw: Draw, weight: Callable[[], Tensor]) -> Fresh:
    """A: the main directions of each cluster; B zero. On the meta device the sizes of clusters are unknown."""
    if site.stack:
        raise SiteError(f"AdaMSS cannot adapt the experts {site.path!r}: the clusters of each have other sizes.")
    if draw.abstract:
        columns = torch.Size(site.shape[1:]).numel() + bool(site.bias)
        return Fresh({}, {"adamss_newB": draw.zeros(min(config.r, columns, site.out_features), columns)})
    spaces = _spaces(site, config, weight)
    seeded = contextlib.nullcontext() if draw.generator is None else fork_rng(devices=[])
    with seeded:
        if draw.generator is not None:
            torch.manual_seed(draw.generator.initial_seed())  # pyright: ignore[reportUnknownMemberType]
        every = [draw.cast(_directions(spaces.u[rows.to(spaces.u.device)], config)) for rows in spaces.rows]
    params = {f"adamss_A.{i}": a for i, a in enumerate(every)}
    for i, (a, rows) in enumerate(zip(every, spaces.rows, strict=True)):
        shape = (len(rows), len(a))
        params[f"adamss_B.{i}"] = draw.normal(*shape, std=0.01) if config.init_weights is None else draw.zeros(*shape)
    return Fresh(params, {"adamss_newB": draw.cast(spaces.v).contiguous()})


def _directions(rows: Tensor, config: AdamssConfig) -> Tensor:
    """The main directions of the rows of a cluster, (k, r), orthonormal: as PEFT computes them, draw by draw."""
    gram = rows @ rows.T
    rank = min(len(rows), config.subspace_rank)
    if config.use_dynamic_rank:
        s = torch.svd_lowrank(gram, len(rows), niter=2)[1]
        rank = max(1, min(rank, int((s > config.svd_threshold * s[0]).sum())))
    main = torch.svd_lowrank(gram, rank, niter=2)[0]
    return linalg.qr(rows.T @ main).Q.T.contiguous()


def derive(site: Site, config: AdamssConfig, draw: Draw, weight: Callable[[], Tensor]) -> dict[str, Tensor]:
    """The outputs in each cluster, and where each output is among them. Nothing on the meta device."""
    if draw.abstract:
        return {}
    found = [rows.to(draw.device) for rows in _spaces(site, config, weight).rows]
    leaves = {f"adamss_rows_{i}": rows for i, rows in enumerate(found)}
    return {**leaves, "adamss_order": torch.cat(found).argsort()}


def _count(p: Leaf) -> int:
    return sum(name.startswith("adamss_A.") for name in p)


def factors(layer: Layer, p: Leaf) -> tuple[Tensor, Tensor, Tensor | None]:
    """All A V^T (n, columns), the B as one matrix (out, n), and what A V^T makes of the 1 below x, if there is one."""
    site, n = layer.site, _count(p)
    every = [(p[f"adamss_A.{i}"], p[f"adamss_B.{i}"]) for i in range(n)]
    for i, (a, b) in enumerate(every):
        rows = p.get(f"adamss_rows_{i}")
        if rows is None or f"adamss_rows_{n}" in p or b.shape != (rows.shape[0], a.shape[0]):
            raise SiteError(
                f"AdaMSS at {site.path!r}: adamss_B.{i} has shape {tuple(b.shape)}, and the base weight gives cluster "
                f"{i} {0 if rows is None else rows.shape[0]} outputs. Was the adapter made for another base weight?"
            )
    total = sum(a.shape[0] for a, _ in every)
    starts = itertools.accumulate((a.shape[0] for a, _ in every), initial=0)
    padded = [F.pad(b, (s, total - s - b.shape[1])) for s, (_, b) in zip(starts, every, strict=False)]
    b = torch.cat(padded).reshape(site.out_features, total).index_select(0, p["adamss_order"])
    a, v = torch.cat([a for a, _ in every]), p["adamss_newB"]
    columns = torch.Size(site.shape[1:]).numel()
    v = v.reshape(a.shape[1], columns + bool(site.bias))
    return a @ v[:, :columns], b, a @ v[:, columns] if site.bias else None


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
    n = _count(p)
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
    r, columns = p["adamss_newB"].shape[0], torch.Size(site.shape[1:]).numel() + bool(site.bias)
    expected: dict[str, tuple[int, ...]] = {"adamss_newB": (r, columns)}
    for i in range(sum(name.startswith("adamss_rows_") for name in p)):
        k = p[f"adamss_A.{i}"].shape[0] if f"adamss_A.{i}" in p else 1
        expected |= {f"adamss_A.{i}": (k, r), f"adamss_B.{i}": (p[f"adamss_rows_{i}"].shape[0], k)}
    return expected


def neutral(p: Leaf) -> Leaf:
    """Zeros: no update. The clusters stay."""
    return {name: torch.zeros_like(leaf) if leaf.is_floating_point() else leaf for name, leaf in p.items()}


# -- ASA --------------------------------------------------------------------------------------------------


class SubspaceState(NamedTuple):
    """What `update` remembers, a pytree.

    Attributes:
        importance: moving means of |parameter * gradient|, path -> leaf -> tensor.
        uncertainty: moving means of how far it is from its mean.
        active: path -> which subspaces are trained, (K).
    """

    importance: TensorTree
    uncertainty: TensorTree
    active: Mapping[str, Tensor]


def _own(params: TensorTree) -> dict[str, dict[str, Tensor]]:
    own = {path: {k: t for k, t in p.items() if k.startswith("adamss_")} for path, p in params.items()}
    return {path: p for path, p in own.items() if p}


def _zeros(params: TensorTree) -> TensorTree:
    return {path: {name: torch.zeros_like(t) for name, t in p.items()} for path, p in _own(params).items()}


def start(params: TensorTree) -> SubspaceState:
    """The state before the first step: all subspaces are trained.

    Args:
        params: the trainable leaves of each site.

    Returns:
        The state.
    """
    active = {
        path: torch.ones(_count(p), dtype=torch.bool, device=next(iter(p.values())).device)
        for path, p in _own(params).items()
    }
    return SubspaceState(_zeros(params), _zeros(params), active)


def budget(config: AdamssConfig, step: int, total: int) -> int:
    """How many subspaces are to be trained after a step.

        target + (total - target) (1 - (step - init_warmup) / (final_warmup - init_warmup)) ^ exponent

    Args:
        config: the config.
        step: the step, between `init_warmup` and `final_warmup`.
        total: how many there are in all layers.

    Returns:
        The number.

    Example:
        >>> import funcadapt as fa
        >>> config = fa.AdamssConfig(use_asa=True, asa_target_subspaces=4, init_warmup=0, final_warmup=10)
        >>> [budget(config, step, 20) for step in (0, 5, 10)]
        [20, 6, 4]
    """
    left = 1 - (step - config.init_warmup) / (config.final_warmup - config.init_warmup)
    return int(config.asa_target_subspaces + (total - config.asa_target_subspaces) * left**config.asa_schedule_exponent)


def update(
    config: AdamssConfig,
    state: SubspaceState,
    params: TensorTree,
    grads: Mapping[str, Mapping[str, Tensor | None]],
    step: int,
) -> SubspaceState:
    """One step of the allocation of subspaces. Call it in each training step, after the optimiser's.

        U <- beta2 U + (1 - beta2) ||p g| - I|        I <- beta1 I + (1 - beta1) |p g|

    From `init_warmup` to `final_warmup`. Every `mask_interval` steps those subspaces stay whose mean of I U, over A and
    over B, is largest; I and U begin anew. A subspace that is left out never comes back.

    Args:
        config: the config.
        state: the state.
        params: the trainable leaves of each site.
        grads: their gradients; None, or nothing, is zero.
        step: the step.

    Returns:
        The new state.
    """
    if not config.use_asa or not config.init_warmup <= step <= config.final_warmup:
        return state
    beta1, beta2 = config.asa_importance_beta, config.asa_uncertainty_beta
    importance: dict[str, dict[str, Tensor]] = {}
    uncertainty: dict[str, dict[str, Tensor]] = {}
    for path, p in _own(params).items():
        i, u = importance.setdefault(path, {}), uncertainty.setdefault(path, {})
        for name, leaf in p.items():
            g, mean = grads.get(path, {}).get(name), state.importance[path][name]
            here = torch.zeros_like(mean) if g is None else (leaf * g).abs().detach()
            u[name] = beta2 * state.uncertainty[path][name] + (1 - beta2) * (here - mean).abs()
            i[name] = beta1 * mean + (1 - beta1) * here
    state = SubspaceState(importance, uncertainty, state.active)
    if step % config.mask_interval:
        return state
    found = {path: torch.where(on, _scores(state, path, len(on)), -torch.inf) for path, on in state.active.items()}
    every = torch.cat([*found.values()])
    limit = every.topk(min(budget(config, step, len(every)), len(every))).values[-1]
    active = {path: on & (found[path] >= limit) for path, on in state.active.items()}
    return SubspaceState(_zeros(params), _zeros(params), active)


def _scores(state: SubspaceState, path: str, n: int) -> Tensor:
    both = {name: t * state.uncertainty[path][name] for name, t in state.importance[path].items()}
    return torch.stack([both[f"adamss_A.{i}"].mean() + both[f"adamss_B.{i}"].mean() for i in range(n)])


def keep(state: SubspaceState, before: TensorTree, after: TensorTree) -> dict[str, dict[str, Tensor]]:
    """The leaves after a step of the optimiser, but those of subspaces that are not trained as they were before it.

    Args:
        state: the state.
        before: the trainable leaves before the step.
        after: and after it.

    Returns:
        The leaves.
    """
    new = {path: dict(p) for path, p in after.items()}
    for path, on in state.active.items():
        for i, name in itertools.product(range(len(on)), ("adamss_A", "adamss_B")):
            leaf = f"{name}.{i}"
            new[path][leaf] = torch.where(on[i], after[path][leaf], before[path][leaf])
    return new


def _update_and_allocate(tuner: Any, global_step: int) -> None:
    """PEFT's `AdamssModel.update_and_allocate`: the same on the modules of a live model, by `requires_grad`."""
    from funcadapt.view.values import adapter_of  # it builds on the methods
    from funcadapt.view.walking import view_state

    states: dict[str, SubspaceState] = tuner.__dict__.setdefault("subspace_states", {})
    for name in tuner.active_adapters:
        config = view_state(tuner.model).configs.get(name)
        if not isinstance(config, AdamssConfig) or not config.use_asa:
            continue
        params = adapter_of(tuner.model, name).params
        grads = {path: {leaf: t.grad for leaf, t in p.items()} for path, p in _own(params).items()}
        with torch.no_grad():
            states[name] = update(config, states.get(name) or start(params), params, grads, global_step)
        for path, active in states[name].active.items():
            for i, on in enumerate(active.tolist()):  # pyright: ignore
                for leaf in (params[path][f"adamss_A.{i}"], params[path][f"adamss_B.{i}"]):
                    if not on:
                        leaf.requires_grad_(False).grad = None


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
            tuner={"update_and_allocate": _update_and_allocate},
        ),
    )
)
