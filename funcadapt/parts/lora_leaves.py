"""LoRA's leaves beside the formula: their layout, ranks, files, and the config that they say."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from funcadapt._torch import unflatten
from funcadapt.errors import SiteError
from funcadapt.method import Leaf
from funcadapt.parts.lowrank import factor_names, factors, has_experts

if TYPE_CHECKING:
    from funcadapt.methods.lora import LoraConfig


def buffers(config: LoraConfig) -> dict[str, Tensor]:
    """The scaling as a 0-d leaf: lora_alpha / r, or lora_alpha / sqrt(r)."""
    s = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    return {"scaling": torch.tensor(s, dtype=torch.float64, device="cpu")}  # for leaves of any dtype and device


def rank_of(config: LoraConfig, p: Leaf) -> int:
    """The rank of one site's leaves, experts first or not; 0 if there are no factors."""
    if "lora_embedding_A" in p:
        return p["lora_embedding_A"].shape[0]
    if "lora_A" not in p or "lora_B" not in p:
        return 0
    a, b = p["lora_A"].shape, p["lora_B"].shape
    said = (config.r, *config.rank_pattern.values())
    three = len(a) == len(b) == 3 and a[0] == b[0]
    blocks = a[1] in said and config.use_bdlora and a[1] == b[2] * config.use_bdlora.get("nblocks", 1) if three else 0
    experts = three and bool(a[1] == b[2] or blocks)
    if experts and a[1] == 1 and 1 not in said and a[0] in said:
        return a[0]  # a convolution of one channel with as many outputs as ranks
    return a[1] if experts else a[0]


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
    rows = resized(unflatten(a, axis, (groups, -1)), axis + 1, r // groups).flatten(axis, axis + 1)
    return {**p, name_a: rows, name_b: resized(b, axis + 1, r // groups)}


def resized(t: Tensor, axis: int, size: int) -> Tensor:
    """A tensor with one axis cut, or padded with zeros."""
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


def patterns(paths: Collection[str]) -> dict[str, str]:
    r"""Keys of `rank_pattern` and `alpha_pattern`, for each path one that matches no other.

    PEFT matches a key with the end of a path, so that "q" is "a.q", too: such a path is tied to the beginning.

    Args:
        paths: all paths of an adapter.

    Returns:
        Path -> key.

    Example:
        >>> patterns(["q", "a.q", "b.v"])
        {'q': '^q', 'a.q': 'a\\.q', 'b.v': 'b\\.v'}
    """
    ends = {path[i + 1 :] for path in paths for i, letter in enumerate(path) if letter == "."}
    return {path: "^" * (path in ends) + re.escape(path) for path in paths}


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
    keys = patterns(leaves.keys())
    ranks = {keys[path]: s[0] for path, s in said.items() if s[0] != r}
    alphas = {keys[path]: s[1] for path, s in said.items() if s[1] != alpha}
    return dataclasses.replace(config, r=r, lora_alpha=alpha, rank_pattern=ranks, alpha_pattern=alphas)
