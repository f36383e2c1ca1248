"""AdaLoRA's leaves beside the formula: which triplets are left, layout and files, and the config that they say.

A triplet is a row of A, a number of E and a column of B. `rank_pattern` says which there are of those that a layer
began with, by masks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from funcadapt.errors import SiteError
from funcadapt.method import Leaf
from funcadapt.parts import lora_leaves

if TYPE_CHECKING:
    from funcadapt.methods.adalora import AdaLoraConfig

LEAVES = ("lora_A", "lora_E", "lora_B")
EPS = 1e-5  # PEFT's, beside ranknum

Mask = tuple[bool, ...]
"""Which triplets of a layer there are, of the init_r that it began with; expert by expert."""


def buffers(config: AdaLoraConfig) -> dict[str, Tensor]:
    """The scaling, and the rank by which it is divided, as 0-d leaves."""
    scaling = config.lora_alpha if config.lora_alpha > 0 else config.init_r
    values = {"scaling": scaling, "ranknum": config.init_r}
    return {name: torch.tensor(float(value), dtype=torch.float64, device="cpu") for name, value in values.items()}


def scale(p: Leaf) -> Tensor:
    """S / (n + 1e-5)."""
    return p["scaling"] / (p["ranknum"] + EPS)


def with_rank(p: Leaf, old: int, r: int) -> Leaf:
    """A and E with zero rows and B with zero columns up to rank r, or all three cut to it."""
    axes = {"lora_A": -2, "lora_E": -2, "lora_B": -1}
    return {**p, **{name: lora_leaves.resized(p[name], p[name].ndim + axis, r) for name, axis in axes.items()}}


def layout(p: Leaf) -> Leaf:
    """LoRA's. And a layer of which all was pruned keeps one row of zeros: elsewhere rank 0 means "not there"."""
    if "lora_E" in p and p["lora_E"].shape[-2:-1] == (0,) and all(name in p for name in LEAVES):
        p = with_rank(p, 0, 1)
    return lora_leaves.layout(p)


def pack(p: Leaf) -> Leaf:
    """Experts as PEFT stores LoRA's; E like A."""
    packed = lora_leaves.pack(p)
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
    scales = ("scaling", "ranknum")
    own = {path: p for path, p in leaves.items() if "lora_E" in p and "scaling" in p}
    own = {path: p for path, p in own.items() if not any(p[name].is_meta for name in scales if name in p)}
    if not own:
        return config
    r = max(config.init_r, *(config.rank(p) for p in own.values()))
    pattern = masks_of(config, own)
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
        alpha = scaling if n == r else scaling * (r + EPS) / (n + EPS)
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
        ratio = scale(p).double() * (there["ranknum"] + EPS).item() / there["scaling"].item()
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


def masks_of(config: AdaLoraConfig, paths: Iterable[str]) -> dict[str, Mask]:
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
