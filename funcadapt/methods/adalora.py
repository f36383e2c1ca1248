"""AdaLoRA: a low-rank update in the form of an SVD, whose rank is given to the layers that need it while it trains.

    y = W x + b + s / (n + 1e-5) * B (E * A) drop(x)        s = lora_alpha if that is positive, else r

Leaves: `lora_A` (r, in), `lora_E` (r, 1), `lora_B` (out, r); 0-d buffers `scaling` (s) and `ranknum` (n = init_r, also
where rows were pruned). Convolutions: `lora_A` (r, in channels / groups * kernel). Experts: a leading axis on each.
Init: A and B normal with deviation 0.02, E zero: the identity.
Cost: r (in + out + 1) parameters a layer; LoRA's flops, and r in for E * A.

One row of A, one number of E and one column of B are a triplet. In training, `allocate` after each step keeps the
triplets that matter most within a budget that falls from init_r to target_r a layer on average, and puts zero into E
at the others. `prune` takes them out at the end. Add `orthogonality` to the loss.

    from funcadapt.methods import adalora

    state = adalora.start(adapter.config, adapter.params)
    for step in range(adapter.config.total_step):
        grads = grad(lambda p: loss(p) + adalora.orthogonality(adapter.config, p))(adapter.params)
        ...                                                                 # the optimiser's step
        adapter, state = adalora.allocate(adapter, grads, state, step)
    adapter = adalora.prune(adapter, adalora.rank_pattern(state.mask))

Source: Zhang et al. 2023, arXiv:2303.10512. Differs from PEFT: every kind of layer; padding modes and groups of
convolutions are right; `ranknum` is never trained (in PEFT it is where the base is not float32, and is not saved);
without an alpha, a pruned adapter keeps its scaling when it is read; a `target_r` that equals `init_r` masks nothing,
where PEFT raises; a layer that got no gradient counts as unimportant. PEFT adds the penalty to the loss of models with
a task type only.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from funcadapt import targets
from funcadapt._torch import linalg, values_unknown
from funcadapt.adapter import Adapter, TensorTree
from funcadapt.config import freeze
from funcadapt.errors import AdapterError, SiteError, did_you_mean
from funcadapt.layer import Layer, dropout
from funcadapt.method import Draw, Fresh, Leaf, Method, register
from funcadapt.methods import lora
from funcadapt.sites import Site

_LEAVES = ("lora_A", "lora_E", "lora_B")
_EPS = 1e-5  # PEFT's, beside ranknum

Mask = tuple[bool, ...]
"""Which triplets of a layer there are, of the init_r that it began with; expert by expert."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaLoraConfig(lora.LoraConfig):
    """Config of AdaLoRA, with PEFT's fields, defaults and meanings.

    LoRA's fields say what is adapted. `r`, `use_rslora`, `lora_bias` and `alpha_pattern` are not used, as in PEFT.

    Attributes:
        target_r: the average rank at the end.
        init_r: the rank of each layer at the start.
        tinit: steps before the budget falls.
        tfinal: steps at the end in which the ranks stay.
        deltaT: steps from one allocation to the next.
        beta1: how fast the mean of the sensitivities forgets.
        beta2: how fast the mean of their deviations forgets.
        orth_reg_weight: the weight of `orthogonality`.
        total_step: all steps. It must be given.
        rank_pattern: site path and ".lora_E" -> which of the first init_r triplets are left; `prune` sets it.

    Raises:
        ValueError: if the values contradict each other, `total_step` is missing, or DoRA or LoftQ is asked for.
    """

    peft_type: str = "ADALORA"
    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1  # noqa: N815 (PEFT's name)
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None
    rank_pattern: Mapping[str, Sequence[bool]] | None = None  # pyright: ignore[reportIncompatibleVariableOverride]

    patterned: ClassVar[Mapping[str, str]] = {}
    target_table: ClassVar[targets.Targets] = targets.ADALORA

    def __post_init__(self) -> None:
        for field, name in (("use_dora", "DoRA"), ("loftq_config", "LOFTQ")):
            if getattr(self, field):
                raise ValueError(f"{self.peft_type} does not support {name}.")
        masks = self.rank_pattern
        object.__setattr__(self, "rank_pattern", {})  # LoRA's checks take it for a table of ranks
        super().__post_init__()
        object.__setattr__(self, "rank_pattern", freeze(masks))
        _check_masks(masks)
        if self.total_step is None or self.total_step <= 0:
            raise ValueError("AdaLoRA does not work when `total_step` is None, supply a value > 0.")
        if not 0 <= self.orth_reg_weight < math.inf:
            raise ValueError("`orth_reg_weight` should be greater than or equal to 0, but the value passed is "
                             f"{self.orth_reg_weight}")  # fmt: skip
        if self.tinit >= self.total_step - self.tfinal:
            raise ValueError(
                "The supplied schedule values don't allow for a budgeting phase. Decrease `tfinal`/`tinit` or increase "
                f"`total_step`: {self.tinit} steps before it and {self.tfinal} after it are {self.total_step} or more."
            )
        for field, least in (("init_r", 1), ("target_r", 0), ("deltaT", 1), ("tinit", 0), ("tfinal", 0)):
            if getattr(self, field) < least:
                raise ValueError(
                    f"`{field}` should be at least {least}, but the value passed is {getattr(self, field)}."
                )
        for field in ("beta1", "beta2"):
            if not 0 < getattr(self, field) < 1:
                raise ValueError(
                    f"`{field}` should be between 0 and 1, but the value passed is {getattr(self, field)}."
                )
        ignored = {"use_rslora": self.use_rslora, "lora_bias": self.lora_bias, "alpha_pattern": self.alpha_pattern}
        ignored["init_lora_weights"] = isinstance(self.init_lora_weights, str)
        if self.r != 8:
            warnings.warn(
                "Note that `r` is not used in AdaLora and will be ignored. If you intended to set the initial rank, "
                "use `init_r` instead.",
                stacklevel=3,
            )
        for field in (name for name, given in ignored.items() if given):
            warnings.warn(f"Note that `{field}` is not used in AdaLora and will be ignored.", stacklevel=3)

    def label(self) -> str:
        """The method's name for people."""
        return "adalora"

    def rank(self, leaves: Mapping[str, Tensor]) -> int:
        """The rank of one site's leaves."""
        return leaves["lora_E"].shape[-2] if "lora_E" in leaves else 0


def _check_masks(masks: Any) -> None:
    rows: list[Any] = list(masks.values()) if isinstance(masks, Mapping) else [] if masks is None else [None]  # pyright: ignore
    if any(not isinstance(row, list | tuple) or any(type(kept) is not bool for kept in row) for row in rows):  # pyright: ignore
        raise TypeError(
            f"`rank_pattern` of AdaLoraConfig must map names to lists of booleans, or be None, got {masks!r}."
        )


def buffers(config: AdaLoraConfig) -> dict[str, Tensor]:
    """The scaling, and the rank by which it is divided, as 0-d leaves."""
    scaling = config.lora_alpha if config.lora_alpha > 0 else config.init_r
    values = {"scaling": scaling, "ranknum": config.init_r}
    return {name: torch.tensor(float(value), dtype=torch.float64) for name, value in values.items()}


def init(site: Site, config: AdaLoraConfig, draw: Draw, weight: Callable[[], Tensor]) -> Fresh:
    """A and B small, E zero; or all three normal if `init_lora_weights` is false."""
    if config.lora_dropout and site.kind in ("parameter", "experts"):
        raise SiteError(f"lora_dropout={config.lora_dropout} cannot act at the plain parameter {site.path!r}: "
                        "it is applied through its weight. Set lora_dropout=0.")  # fmt: skip
    r, std = config.init_r, 0.02 if config.init_lora_weights else 1.0
    params = {
        "lora_A": draw.normal(*site.stack, r, math.prod(site.shape[1:]), std=std),
        "lora_E": (draw.zeros if config.init_lora_weights else draw.normal)(*site.stack, r, 1),
        "lora_B": draw.normal(*site.stack, site.out_features, r, std=std),
    }
    return Fresh(params, {name: draw.cast(value) for name, value in buffers(config).items()})


def as_lora(p: Leaf) -> dict[str, Tensor]:
    """The leaves of a LoRA that does the same: E * A, B, and s / (n + 1e-5)."""
    a = p["lora_A"]
    scaled = a * p["lora_E"].reshape(*a.shape[:-1], 1)  # reshaped: an E of another size must not broadcast
    return {"lora_A": scaled, "lora_B": p["lora_B"], "scaling": p["scaling"] / (p["ranknum"] + _EPS)}


def after(layer: Layer, p: Leaf, x: Tensor, y: Tensor) -> Tensor:
    """Y + s / (n + 1e-5) * B (E * A) drop(x), in y's dtype."""
    config: Any = layer.config
    if config.lora_dropout:
        x = dropout(layer, x, config.lora_dropout)
    site, same = layer.site, as_lora(p)
    # reshaped to the site's sizes, so that a wrong one raises
    a = same["lora_A"].reshape(same["lora_A"].shape[0], *site.shape[1:])
    b = same["lora_B"].reshape(site.out_features, same["lora_B"].shape[1])
    if not site.kind.startswith("conv"):
        return lora.add_delta(layer, {**same, "lora_A": a, "lora_B": b}, x, y).to(y.dtype)
    # all of A reads each group of channels: to the first product, groups are rows
    spatial = len(site.shape) - 2
    lead = x.shape[: -spatial - 1]
    rows = x.to(a.dtype).reshape(math.prod(lead) * site.groups, site.shape[1], *x.shape[-spatial:])
    h = layer.linear(rows, a) * same["scaling"]
    h = h.reshape(*lead, site.groups * h.shape[1], *h.shape[-spatial:])
    return (y + layer.pointwise(h, b.reshape(*b.shape, *(1,) * spatial))).to(y.dtype)


def grouped(layer: Layer, p: Leaf, x: Tensor, y: Tensor) -> Any:
    """`after` for N adapters at once, as LoRA's; NotImplemented where the layer is no plain product."""
    return NotImplemented if layer.site.kind.startswith("conv") else lora.grouped(layer, as_lora(p), x, y)


def masked(layer: Layer, p: Leaf, x: Tensor, y: Tensor, choice: Tensor) -> Any:
    """`after` for groups of rows that choose among N adapters, as LoRA's; NotImplemented as in `grouped`."""
    return NotImplemented if layer.site.kind.startswith("conv") else lora.masked(layer, as_lora(p), x, y, choice)


def weight(layer: Layer, p: Leaf, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """W + s / (n + 1e-5) * B (E * A); the bias stays."""
    same = as_lora(p)
    delta = (same["lora_B"] * same["scaling"]) @ same["lora_A"]
    return (weight + delta.reshape(weight.shape)).to(weight.dtype), bias


def with_rank(p: Leaf, old: int, r: int) -> Leaf:
    """A and E with zero rows and B with zero columns up to rank r, or all three cut to it."""
    axes = {"lora_A": -2, "lora_E": -2, "lora_B": -1}
    return {**p, **{name: lora._resized(p[name], p[name].ndim + axis, r) for name, axis in axes.items()}}


def layout(p: Leaf) -> Leaf:
    """LoRA's. And a layer of which all was pruned keeps one row of zeros: elsewhere rank 0 means "not there"."""
    if "lora_E" in p and p["lora_E"].shape[-2:-1] == (0,) and all(name in p for name in _LEAVES):
        p = with_rank(p, 0, 1)
    return lora.layout(p)


def pack(p: Leaf) -> Leaf:
    """Experts as PEFT stores LoRA's; E like A."""
    packed = lora.pack(p)
    return p if packed is p else {**packed, "lora_E": p["lora_E"].flatten(0, 1)}


def unpack(config: AdaLoraConfig, p: Leaf) -> Leaf:
    """The inverse of `pack`."""
    unpacked = lora.unpack(lora.LoraConfig(r=config.init_r), p)
    return p if unpacked is p else {**unpacked, "lora_E": p["lora_E"].reshape(-1, config.init_r, 1)}


def check(config: AdaLoraConfig, path: str, p: Leaf) -> None:
    """All three leaves, with the rank that the config says is left."""
    for name in _LEAVES:
        if name not in p:
            raise SiteError(f"The site {path!r} lacks {name!r}.")
    a, e, b = (p[name].shape for name in _LEAVES)
    mask = mask_of(config, path)
    ranks = {config.init_r, max(1, sum(mask)) if mask is not None else config.init_r}
    fits = len(a) == len(e) == len(b) in (2, 3) and a[:-1] == e[:-1] and e[-1] == 1 and a[-2] == b[-1]
    if not fits or a[-2] not in ranks or (len(a) == 3 and (a[0] != b[0] or a[1] != config.init_r)):
        raise SiteError(
            f"The site {path!r} has lora_A of shape {tuple(a)}, lora_E of shape {tuple(e)} and lora_B of shape "
            f"{tuple(b)}; its config says that {' or '.join(map(str, sorted(ranks)))} triplets are there: expected "
            "(r, in), (r, 1) and (out, r)."
        )


def describe(config: AdaLoraConfig, leaves: Mapping[str, Leaf]) -> AdaLoraConfig:
    """The config that the leaves say: `rank_pattern` from the shapes, alpha from a scaling that all sites share.

    Args:
        config: the config.
        leaves: the leaves of each site, by path.

    Returns:
        The config. What it cannot say, such as a scaling of one site, goes into `lora_E` (see `stored`).
    """
    own = {path: p for path, p in leaves.items() if "lora_E" in p and "scaling" in p}
    if not own:
        return config
    r = max(config.init_r, *(config.rank(p) for p in own.values()))
    pattern = _masks(config, own)
    for path, p in own.items():
        mask, rank = mask_of(config, path), config.rank(p)
        told = rank in ({r} if mask is None else {r, max(1, sum(mask))})
        if p["lora_E"].ndim == 2 and (not told or (mask is not None and len(mask) != r)):
            pattern[f"{path}.lora_E"] = (True,) * rank + (False,) * (r - rank)
    if r != config.init_r or pattern != dict(config.rank_pattern or {}):
        config = dataclasses.replace(config, init_r=r, rank_pattern=pattern)
    scalings = {(float(p["scaling"]), float(p["ranknum"])) for p in own.values()}
    alpha = config.lora_alpha
    if len(scalings) == 1 and not _told(config, next(iter(own.values()))):
        scaling, n = scalings.pop()
        alpha = scaling if n == r else scaling * (r + _EPS) / (n + _EPS)
    elif alpha <= 0 and config.rank_pattern:  # PEFT would put in what is left of the rank
        alpha = config.init_r
    return config if alpha <= 0 or alpha == config.lora_alpha else dataclasses.replace(config, lora_alpha=alpha)


def _told(config: AdaLoraConfig, p: Leaf) -> bool:
    """Whether the 0-d leaves are those of the config."""
    return all(torch.equal(v.to(p[name].dtype), p[name].cpu().reshape(())) for name, v in buffers(config).items())


def stored(config: AdaLoraConfig, path: str, p: Leaf) -> Leaf:
    """The leaves as a checkpoint of that config holds them: only the triplets that `rank_pattern` leaves.

    Args:
        config: what `describe` said.
        path: the site.
        p: its leaves.

    Returns:
        Those that are other ones in the checkpoint.
    """
    if "lora_E" not in p:
        return {}
    leaves: Leaf = {name: p[name] for name in _LEAVES}
    if "scaling" in p and not _told(config, p):
        there = buffers(config)
        ratio = as_lora(p)["scaling"].double() * (there["ranknum"] + _EPS).item() / there["scaling"].item()
        leaves = {**leaves, "lora_E": (p["lora_E"] * ratio).to(p["lora_E"].dtype)}
    mask, rank = mask_of(config, path), config.rank(p)
    if leaves["lora_E"].ndim == 3:  # experts have one rank, so none can lose a triplet
        return with_rank(leaves, rank, config.init_r) if rank < config.init_r else leaves
    if mask is not None and rank == len(mask):
        return _cut(leaves, mask)
    return _cut(leaves, (False,)) if mask is not None and not any(mask) else leaves


def mask_of(config: AdaLoraConfig, path: str) -> Mask | None:
    """What `rank_pattern` says of a site.

    Args:
        config: the config.
        path: the site's path.

    Returns:
        The mask, or None. A name that still has the adapter's name at its end, as PEFT's in memory do, is found too.
    """
    pattern, name = config.rank_pattern or {}, f"{path}.lora_E"
    found = pattern.get(name)
    if found is None and pattern:
        found = next((mask for key, mask in pattern.items() if key.startswith(f"{name}.")), None)
    return None if found is None else tuple(found)


def _masks(config: AdaLoraConfig, paths: Iterable[str]) -> dict[str, Mask]:
    """The `rank_pattern` of some sites, with names as in PEFT's files."""
    return {f"{path}.lora_E": mask for path in paths if (mask := mask_of(config, path)) is not None}


def _cut(p: Leaf, mask: Sequence[bool]) -> Leaf:
    """The triplets where the mask is true."""
    keep = torch.tensor([i for i, kept in enumerate(mask) if kept], dtype=torch.long, device=p["lora_E"].device)
    rows = {name: p[name].index_select(0, keep) for name in ("lora_A", "lora_E")}
    return {**p, **rows, "lora_B": p["lora_B"].index_select(1, keep)}


# -- allocation of ranks ----------------------------------------------------------------------------------


class RankState(NamedTuple):
    """What `allocate` remembers, a pytree.

    Attributes:
        sensitivity: moving means of |parameter * gradient|, path -> leaf -> tensor.
        uncertainty: moving means of how far it is from its mean.
        mask: path -> the triplets that the last allocation kept, (r), for experts (experts, r).
    """

    sensitivity: TensorTree
    uncertainty: TensorTree
    mask: Mapping[str, Tensor]


def start(config: AdaLoraConfig, params: TensorTree) -> RankState:
    """The state before the first step.

    Args:
        config: the config. Triplets that its `rank_pattern` leaves out are masked.
        params: the trainable leaves of each site.

    Returns:
        The state.
    """

    def zeros() -> TensorTree:
        return {path: {k: torch.zeros_like(_wide(p[k])) for k in _LEAVES} for path, p in _own(params).items()}

    masks: dict[str, Tensor] = {}
    for path, p in _own(params).items():
        e, mask = p["lora_E"], mask_of(config, path)
        masks[path] = torch.ones(e.shape[:-1], dtype=torch.bool, device=e.device)
        if mask is not None and len(mask) == e.numel():
            masks[path] = torch.tensor(mask, device=e.device).reshape(e.shape[:-1])
    return RankState(zeros(), zeros(), masks)


def budget(config: AdaLoraConfig, step: int, initial: int, final: int) -> tuple[int, bool]:
    """How many triplets there may be after a step: first all, then less and less by a cubic curve, then the target.

        final + (initial - final) (1 - (step - tinit) / (total_step - tfinal - tinit))^3

    Args:
        config: the config.
        step: the step, from 0.
        initial: how many there are at the start.
        final: how many there are to be at the end.

    Returns:
        The number, and whether it is time for an allocation.

    Example:
        >>> config = AdaLoraConfig(total_step=10, tinit=2, tfinal=2, deltaT=2)
        >>> [budget(config, step, 24, 8) for step in (0, 3, 4, 6, 8, 9)]
        [(24, False), (17, False), (12, True), (8, True), (8, True), (8, True)]
    """
    last = _last(config)
    if step <= config.tinit:
        return initial, False
    if step > last:
        return final, True
    left = 1 - (step - config.tinit) / (last - config.tinit)
    return int((initial - final) * left**3 + final), step % config.deltaT == 0


def importance(
    config: AdaLoraConfig, state: RankState, params: TensorTree, grads: Mapping[str, Mapping[str, Tensor | None]]
) -> RankState:
    """The state after the gradients of one step.

        S <- beta1 S + (1 - beta1) |p g|        U <- beta2 U + (1 - beta2) ||p g| - S|

    Args:
        config: the config.
        state: the state.
        params: the trainable leaves of each site.
        grads: their gradients; None, or nothing, is zero.

    Returns:
        The new state.
    """
    sensitivity: dict[str, dict[str, Tensor]] = {}
    uncertainty: dict[str, dict[str, Tensor]] = {}
    for path, p in _own(params).items():
        s, u = sensitivity.setdefault(path, {}), uncertainty.setdefault(path, {})
        for name in _LEAVES:
            wide, g = _wide(p[name]), grads.get(path, {}).get(name)
            here = torch.zeros_like(wide) if g is None else (wide * _wide(g)).abs()
            s[name] = config.beta1 * state.sensitivity[path][name] + (1 - config.beta1) * here
            u[name] = config.beta2 * state.uncertainty[path][name] + (1 - config.beta2) * (here - s[name]).abs()
    return state._replace(sensitivity=sensitivity, uncertainty=uncertainty)


def scores(state: RankState) -> dict[str, Tensor]:
    """How much each triplet matters: S U of its number in E, plus the means of S U over its row of A and column of B.

    Args:
        state: the state.

    Returns:
        Path -> (r), for experts (experts, r).
    """
    found: dict[str, Tensor] = {}
    for path, s in state.sensitivity.items():
        a, e, b = (s[name] * state.uncertainty[path][name] for name in _LEAVES)
        found[path] = e.squeeze(-1) + (a.mean(-1) + b.mean(-2))
    return found


def threshold(found: Mapping[str, Tensor], count: int) -> Tensor:
    """The score at or below which triplets are masked, so that `count` are (more, if scores are equal).

    Args:
        found: the scores.
        count: how many.

    Returns:
        0-d; minus infinity if none is.

    Raises:
        AdapterError: if the count is negative.
    """
    every = torch.cat([s.flatten() for s in found.values()])
    if count < 0:
        raise AdapterError(
            f"target_r is larger than the rank of the layers: {every.numel()} triplets are there, and the budget is "
            f"{every.numel() - count}. Lower target_r, or raise init_r."
        )
    return torch.kthvalue(every, count).values if count else torch.full_like(every[0], -math.inf)


def update(
    config: AdaLoraConfig,
    state: RankState,
    params: TensorTree,
    grads: Mapping[str, Mapping[str, Tensor | None]],
    step: int,
) -> tuple[dict[str, Tensor], RankState, dict[str, list[bool]] | None]:
    """One step of PEFT's `update_and_allocate`, on leaves and gradients by site.

    Args:
        config: the config.
        state: the state.
        params: the trainable leaves of each site, after the optimiser's step.
        grads: the gradients of that step, None where there is none.
        step: the step, from 0.

    Returns:
        The new `lora_E` of each site, the new state, and the rank pattern if ranks were allocated in this step, else
        None.

    Raises:
        AdapterError: if `target_r` is too large, or ranks are to be fixed and no gradient was ever given.
    """
    values, state, allocated = _step(config, state, _own(params), grads, step)
    return values, state, rank_pattern(state.mask) if allocated else None


def allocate(adapter: Adapter, grads: Any, state: RankState, step: int) -> tuple[Adapter, RankState]:
    """One step of the allocation of ranks. Call it in each training step, after the optimiser's.

    Up to `tinit` it only watches. Then it masks triplets down to the budget, every `deltaT` steps; a masked one can
    grow again, and be kept in the next allocation. At `total_step - tfinal` the masks become final.

    Args:
        adapter: the adapter. Under `torch.func.vmap`, one of a stack of adapters of equal ranks.
        grads: the gradients of the step, a tree like the adapter's params.
        state: the state.
        step: the step, from 0.

    Returns:
        The adapter with zeros in `lora_E` where a triplet is masked, and the new state.

    Raises:
        AdapterError: as `update`; and for a stack of adapters of different ranks, whose padding would count.

    Example:
        >>> import torch
        >>> import funcadapt as fa
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
        >>> config = AdaLoraConfig(init_r=3, target_r=1, total_step=4, target_modules=["0", "1"])
        >>> adapter = fa.init(model, config)
        >>> state = start(config, adapter.params)
        >>> loss = lambda p: fa.functional_call(model, adapter.replace(params=p), torch.ones(1, 4)).pow(2).sum()
        >>> for step in range(5):
        ...     grads = torch.func.grad(loss)(adapter.params)
        ...     trained, _ = fa.optim.sgd.update(adapter.params, grads, fa.optim.sgd.init(grads), lr=0.1)
        ...     adapter, state = allocate(adapter.replace(params=trained), grads, state, step)
        >>> sum(sum(kept) for kept in rank_pattern(state.mask).values())
        2
        >>> prune(adapter, rank_pattern(state.mask)).num_parameters() < adapter.num_parameters()
        True
    """
    if adapter.members is not None and adapter.members.ranks:
        raise AdapterError("allocate: the adapters of this stack have different ranks. Allocate for each alone.")
    config: Any = adapter.config
    values, state, _ = _step(config, state, _own(adapter.params), grads, step)
    new = {path: {**p, "lora_E": values[path]} if path in values else p for path, p in adapter.params.items()}
    return adapter.replace(params=new), state


def _step(
    config: AdaLoraConfig, state: RankState, params: TensorTree, grads: Any, step: int
) -> tuple[dict[str, Tensor], RankState, bool]:
    """The new E of each site, the new state, and whether ranks were allocated."""
    last = _last(config)
    if step < last:
        state = importance(config, state, params, grads)
    matrices = sum(math.prod(p["lora_E"].shape[:-2]) for p in params.values())
    initial = sum(p["lora_E"].numel() for p in params.values())
    left, due = budget(config, step, initial, config.target_r * matrices)
    allocated = step == last or (step < last and due)
    if allocated:
        found = scores(state)
        if step == last and not values_unknown() and not any(s.any() for s in found.values()):
            raise AdapterError(
                f"At step {step} = total_step - tfinal the ranks become final, but no triplet has a score. Call this "
                "in every step from 0, with the gradients."
            )
        limit = threshold(found, initial - left)
        state = state._replace(mask={path: ~(s <= limit.to(s.device)) for path, s in found.items()})
    if step == last:
        forgotten = {
            path: {name: torch.zeros_like(t) for name, t in s.items()} for path, s in state.sensitivity.items()
        }
        state = state._replace(sensitivity=forgotten, uncertainty=forgotten)
    if not allocated and step <= last:
        return {path: p["lora_E"] for path, p in params.items()}, state, False
    kept = {path: torch.where(state.mask[path].unsqueeze(-1), p["lora_E"], 0) for path, p in params.items()}
    return kept, state, allocated


def rank_pattern(mask: Mapping[str, Tensor]) -> dict[str, list[bool]]:
    """The masks of a state in the form of PEFT's `config.rank_pattern`.

    Args:
        mask: `RankState.mask`.

    Returns:
        Site path and ".lora_E" -> which triplets are kept; expert by expert.
    """
    return {f"{path}.lora_E": m.flatten().tolist() for path, m in mask.items()}  # pyright: ignore


def prune(adapter: Adapter, pattern: Mapping[str, Sequence[bool]]) -> Adapter:
    """The adapter without the masked triplets, as PEFT saves it. It does what it did if `lora_E` is zero there.

    Experts keep theirs, with zeros in `lora_E`, as all of a stack have one rank. The optimiser's state does not fit any
    more.

    Args:
        adapter: the adapter.
        pattern: which triplets each site keeps, as `rank_pattern` gives it.

    Returns:
        The smaller adapter, with the pattern in its config.

    Raises:
        AdapterError: if the pattern has an unknown site, or another number of triplets than that has.
    """
    config: Any = adapter.config
    params, masks = dict(adapter.params), _masks(config, adapter.params)
    for name, mask in pattern.items():
        path, kept = name.rpartition(".lora_E")[0], tuple(map(bool, mask))
        if path not in _own(adapter.params):
            raise AdapterError(f"rank_pattern has {name!r}, which the adapter does not."
                               + did_you_mean(name, (f"{p}.lora_E" for p in _own(adapter.params))))  # fmt: skip
        p, before = adapter.params[path], mask_of(config, path)
        e, whole = p["lora_E"], kept
        if before is not None and sum(before) == len(kept) < len(before):  # pruned already: of the rows that are left
            rest = iter(kept)
            whole = tuple(b and next(rest) for b in before)
        masks[f"{path}.lora_E"] = whole
        if len(kept) != e.numel():
            raise AdapterError(f"rank_pattern has {len(kept)} triplets for {name!r}, the adapter has {e.numel()}.")
        if e.ndim == 3:
            zero = torch.tensor(kept, device=e.device).reshape(e.shape)
            params[path] = {**p, "lora_E": torch.where(zero, e, 0)}
        else:
            params[path] = layout(_cut(p, kept))
    return adapter.replace(params=params, config=dataclasses.replace(config, rank_pattern=masks))


def orthogonality(config: AdaLoraConfig, params: TensorTree) -> Tensor:
    """What is added to the loss so that A and B stay near the factors of an SVD.

        orth_reg_weight * mean over all A and B of |A A^T - I|, |B^T B - I|        Frobenius norms

    Args:
        config: the config.
        params: the trainable leaves of each site. Not those of a stack of different ranks, as padding counts.

    Returns:
        0-d.
    """
    terms: list[Tensor] = []
    for p in _own(params).values():
        a, b = p["lora_A"], p["lora_B"]
        for square in (a @ a.mT, b.mT @ b):
            eye = torch.eye(square.shape[-1], dtype=square.dtype, device=square.device)
            terms.append(linalg.vector_norm(square - eye, dim=(-2, -1)).flatten())
    if not terms:
        return torch.zeros(())
    return config.orth_reg_weight * torch.cat([term.to(terms[0]) for term in terms]).mean()


def _own(params: TensorTree) -> dict[str, Leaf]:
    return {path: p for path, p in params.items() if "lora_E" in p}


def _wide(t: Tensor) -> Tensor:
    """At least float32: products of small numbers vanish in less."""
    return t.detach().to(torch.promote_types(t.dtype, torch.float32))


def _last(config: AdaLoraConfig) -> int:
    """The step at which the ranks become final."""
    assert config.total_step is not None  # the config has checked
    return config.total_step - config.tfinal


METHOD = register(
    Method(
        name="adalora",
        config=AdaLoraConfig,
        kinds=lora.KINDS,
        keys={name: name for name in _LEAVES},
        init=init,
        after=after,
        weight=weight,
        buffers=buffers,
        describe=describe,
        stored=stored,
        check=check,
        layout=layout,
        pack=pack,
        unpack=unpack,
        dropout=lambda config: config.lora_dropout,
        reads=frozenset(),
        rank_field="init_r",
        with_rank=with_rank,
        neutral=lora.neutral,
        grouped=grouped,
        masked=masked,
    )
)
