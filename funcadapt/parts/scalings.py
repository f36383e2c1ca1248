"""What a config can say of scalings that were changed, alpha / r, and what must go into other leaves."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from funcadapt.errors import SiteError
from funcadapt.method import Leaf
from funcadapt.methods.lora import LoraConfig
from funcadapt.parts import lora_leaves


def describe(config: Any, leaves: Mapping[str, Leaf], rank: int | None = None) -> Any:
    """The config that the leaves say: alphas from the scalings, as LoRA's.

    Args:
        config: a config with `alpha`; and with `r` and patterns of both, unless the rank is given.
        leaves: the leaves of each site, by path.
        rank: what alpha is divided by at every site; else the rank that the leaves have.

    Returns:
        The config, itself if it says the same.
    """
    fields = {} if rank else {"rank_pattern": config.rank_pattern, "alpha_pattern": config.alpha_pattern}
    like = LoraConfig(r=rank or config.r, lora_alpha=config.alpha, **fields)
    ranks = {path: rank or config.rank(p) or config.at(path).r for path, p in leaves.items() if "scaling" in p}
    as_lora = {
        path: {"lora_A": torch.empty(r, 1), "lora_B": torch.empty(1, r), "scaling": leaves[path]["scaling"]}
        for path, r in ranks.items()
    }
    found = lora_leaves.describe(like, as_lora)
    if found is like:
        return config
    new = {} if rank else {name: getattr(found, name) for name in ("r", *fields)}
    return dataclasses.replace(config, alpha=found.lora_alpha, **new)


def describe_common(config: Any, leaves: Mapping[str, Leaf], said: Tensor, factor: str) -> Any:
    """The config with the scaling that all sites have in common.

    Args:
        config: a config with `scaling`.
        leaves: the leaves of each site, by path.
        said: the scaling of the config, as `buffers` makes it.
        factor: a leaf that could be multiplied instead.

    Returns:
        The config, itself if it says the same.

    Raises:
        SiteError: if the sites have different ones, which no config can say.
    """
    own = {path: p["scaling"] for path, p in leaves.items() if "scaling" in p and not p["scaling"].is_meta}
    if all(torch.equal(s.cpu(), said.to(s.dtype)) for s in own.values()):
        return config
    if len({float(s) for s in own.values()}) > 1:
        raise SiteError(f"The sites {', '.join(map(repr, [*own][:3]))} ... have different scalings, which no "
                        f"{type(config).__name__} can say: multiply their {factor} instead.")  # fmt: skip
    return dataclasses.replace(config, scaling=float(next(iter(own.values()))))


def absorbed(path: str, p: Leaf, said: Tensor, names: Iterable[str]) -> Leaf:
    """Leaves times what a site's scaling is to the one that the config says.

    Args:
        path: the site's path.
        p: its leaves.
        said: the scaling of the config.
        names: those that the scaling multiplies.

    Returns:
        The leaves that change, so that with the scaling of the config they do the same.

    Raises:
        SiteError: if the config's scaling is zero.
    """
    scaling = p.get("scaling")
    if scaling is None or scaling.is_meta or torch.equal(said.to(scaling.dtype), scaling.cpu()):
        return {}
    if not said:
        raise SiteError(f"The site {path!r} has scaling {scaling.item()}, which alpha=0 cannot say.")
    ratio = scaling.double() / said.item()
    return {name: (p[name] * ratio).to(p[name].dtype) for name in names if name in p}
