"""AdaLoRA: a low-rank update in the form of an SVD, whose rank is given to the layers that need it while it trains.

    y = W x + b + s / (n + 1e-5) * B (E * A) drop(x)        s = lora_alpha if that is positive, else r

Leaves: `lora_A` (r, in), `lora_E` (r, 1), `lora_B` (out, r); 0-d buffers `scaling` (s) and `ranknum` (n = init_r, also
where rows were pruned). Convolutions: `lora_A` (r, in channels / groups * kernel). Experts: a leading axis on each.
Init: A and B normal with deviation 0.02, E zero: the identity.
Cost: r (in + out + 1) parameters a layer; LoRA's flops, and r in for E * A.

The rank moves between layers in training: `funcadapt.allocation`.

Source: Zhang et al. 2023, arXiv:2303.10512. Differs from PEFT: every kind of layer; padding modes and groups of
convolutions are right; `ranknum` is never trained (in PEFT it is where the base is not float32, and is not saved);
without an alpha, a pruned adapter keeps its scaling when it is read. PEFT adds the penalty to the loss of models with
a task type only.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from funcadapt import lora_leaves, targets
from funcadapt.config import freeze
from funcadapt.errors import SiteError
from funcadapt.forms import KINDS, refuse_dropout
from funcadapt.layer import Layer, dropout
from funcadapt.method import Draw, Fresh, Leaf, Method, View, register
from funcadapt.methods import lora
from funcadapt.sites import Site

LEAVES = ("lora_A", "lora_E", "lora_B")
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
    return {name: torch.tensor(float(value), dtype=torch.float64, device="cpu") for name, value in values.items()}


def init(site: Site, config: AdaLoraConfig, draw: Draw, weight: Callable[[], Tensor]) -> Fresh:
    """A and B small, E zero; or all three normal if `init_lora_weights` is false."""
    refuse_dropout(site, "lora_dropout", config.lora_dropout)
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
    return {**p, **{name: lora_leaves.resized(p[name], p[name].ndim + axis, r) for name, axis in axes.items()}}


def layout(p: Leaf) -> Leaf:
    """LoRA's. And a layer of which all was pruned keeps one row of zeros: elsewhere rank 0 means "not there"."""
    if "lora_E" in p and p["lora_E"].shape[-2:-1] == (0,) and all(name in p for name in LEAVES):
        p = with_rank(p, 0, 1)
    return lora.layout(p)


def pack(p: Leaf) -> Leaf:
    """Experts as PEFT stores LoRA's; E like A."""
    packed = lora.pack(p)
    return p if packed is p else {**packed, "lora_E": p["lora_E"].flatten(0, 1)}


def unpack(config: AdaLoraConfig, p: Leaf) -> Leaf:
    """The inverse of `pack`."""
    found = lora_leaves.unpacked(config.init_r, p)
    return p if found is p else {**found, "lora_E": p["lora_E"].reshape(-1, config.init_r, 1)}


def check(config: AdaLoraConfig, path: str, p: Leaf) -> None:
    """All three leaves, with the rank that the config says is left."""
    for name in LEAVES:
        if name not in p:
            raise SiteError(f"The site {path!r} lacks {name!r}.")
    a, e, b = (p[name].shape for name in LEAVES)
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
    own = {path: p for path, p in leaves.items() if "lora_E" in p and "scaling" in p and not p["scaling"].is_meta}
    if not own:
        return config
    r = max(config.init_r, *(config.rank(p) for p in own.values()))
    pattern = masks(config, own)
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
    """Whether the 0-d leaves are those of the config; on the meta device, where they have no values, they are."""
    derived = buffers(config)
    given = {name: p[name] for name in derived if not p[name].is_meta}
    return all(torch.equal(derived[name].to(v.dtype), v.cpu().reshape(())) for name, v in given.items())


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
    leaves: Leaf = {name: p[name] for name in LEAVES}
    if "scaling" in p and not _told(config, p):
        there = buffers(config)
        ratio = as_lora(p)["scaling"].double() * (there["ranknum"] + _EPS).item() / there["scaling"].item()
        leaves = {**leaves, "lora_E": (p["lora_E"] * ratio).to(p["lora_E"].dtype)}
    mask, rank = mask_of(config, path), config.rank(p)
    if leaves["lora_E"].ndim == 3:  # experts have one rank, so none can lose a triplet
        return with_rank(leaves, rank, config.init_r) if rank < config.init_r else leaves
    if mask is not None and rank == len(mask):
        return cut(leaves, mask)
    return cut(leaves, (False,)) if mask is not None and not any(mask) else leaves


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


def masks(config: AdaLoraConfig, paths: Iterable[str]) -> dict[str, Mask]:
    """The `rank_pattern` of some sites, with names as in PEFT's files.

    Args:
        config: the config.
        paths: the sites.

    Returns:
        Site path and ".lora_E" -> mask; sites of which it says nothing are left out.
    """
    return {f"{path}.lora_E": mask for path in paths if (mask := mask_of(config, path)) is not None}


def cut(p: Leaf, mask: Sequence[bool]) -> Leaf:
    """The triplets where the mask is true.

    Args:
        p: the leaves of a site without experts.
        mask: (r).

    Returns:
        The leaves, with fewer rows in A and E and columns in B.
    """
    keep = torch.tensor([i for i, kept in enumerate(mask) if kept], dtype=torch.long, device=p["lora_E"].device)
    rows = {name: p[name].index_select(0, keep) for name in ("lora_A", "lora_E")}
    return {**p, **rows, "lora_B": p["lora_B"].index_select(1, keep)}


def warm(site: Site, config: AdaLoraConfig, draw: Draw) -> None:
    """PEFT draws all leaves, `ranknum` too, before it draws A and B again."""
    if config.init_lora_weights:
        init(site, dataclasses.replace(config, init_lora_weights=False), draw, lambda: draw.zeros())
        draw.normal(1)


def _update_and_allocate(tuner: Any, global_step: int) -> None:
    from funcadapt.view.allocating import update_and_allocate  # it builds on this file

    update_and_allocate(tuner, global_step)


def _loss(model: nn.Module, name: str) -> Tensor | None:
    from funcadapt.view.allocating import live_orthogonality

    return live_orthogonality(model, name)


_PLAIN = ("lora_alpha", "use_dora", "use_rslora", "lora_bias")

VIEW = View(
    package="adalora",
    name="AdaLora",
    prefix="lora_",
    extends="lora",
    containers=(*lora.VIEW.containers, "lora_E", "ranknum"),
    empty={
        "lora_embedding_A": nn.ParameterDict,
        "lora_embedding_B": nn.ParameterDict,
        "lora_magnitude_vector": nn.ModuleDict,
    },
    classes={"linear": "SVDLinear", "hf_conv1d": "SVDLinear", "conv2d": "SVDConv2d"},
    label="adalora.",
    frozen=frozenset({"ranknum"}),
    derived=("scaling",),
    dropout="lora_dropout",
    attributes={"r": "init_r", **{name: name for name in _PLAIN}},
    warm=warm,
    tuner={"update_and_allocate": _update_and_allocate},
    loss=_loss,
)

METHOD = register(
    Method(
        name="adalora",
        config=AdaLoraConfig,
        kinds=KINDS,
        keys={name: name for name in LEAVES},
        init=init,
        inits_experts=True,
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
        view=VIEW,
    )
)
