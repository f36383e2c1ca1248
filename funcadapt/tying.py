"""Tied leaves: a site that uses a leaf of another site, as Lily's layers use the A and B of the first of their group.

The leaf is in the adapter once, at the first site. Another one has a frozen 0-d leaf instead whose name says where it
is, "lily_A@model.layers.0.q_proj". Names are static: they survive stacking, transforms and compilation. PEFT's
checkpoints repeat the leaf at each site.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from funcadapt._torch import values_unknown
from funcadapt.errors import SiteError
from funcadapt.method import Leaf

_AT = "@"

Tree = dict[str, dict[str, Tensor]]


def tie(leaf: str, path: str) -> str:
    """The name of the leaf that stands for a leaf of another site."""
    return f"{leaf}{_AT}{path}"


def ties(frozen: Leaf) -> Iterator[tuple[str, str, str]]:
    """The ties among the frozen leaves of a site: (name, leaf, path of the site that has it)."""
    for name in frozen:
        leaf, at, path = name.partition(_AT)
        if at:
            yield name, leaf, path


def untied(p: Leaf, params: Mapping[str, Leaf], path: str) -> Leaf:
    """The leaves of a site with those of other sites that it uses.

    Args:
        p: its own, frozen ones included.
        params: the adapter's.
        path: the site's path.

    Returns:
        The leaves, without the ties.

    Raises:
        SiteError: if the adapter lacks one.
    """
    found = dict(p)
    for name, leaf, other in ties(p):
        if leaf not in params.get(other, {}):
            raise SiteError(f"{path!r} uses {leaf!r} of {other!r}, which the adapter lacks.")
        del found[name]
        found[leaf] = params[other][leaf]
    return found


def untied_trees(
    params: Mapping[str, Leaf], buffers: Mapping[str, Leaf], *, copy: bool
) -> tuple[dict[str, Leaf], dict[str, Leaf]]:
    """The trees with every tied leaf at each site, as a checkpoint has them.

    Args:
        params: the adapter's.
        buffers: likewise.
        copy: whether each site gets a copy.

    Returns:
        Params and buffers without ties.

    Raises:
        SiteError: if the adapter lacks a leaf that a site uses.
    """
    trees = dict(params), dict(buffers)
    for path, frozen in buffers.items():
        names = {name: leaf for name, leaf, _ in ties(frozen)}
        if names:
            found = untied({**params.get(path, {}), **frozen}, params, path)
            own = {leaf: found[leaf].clone() if copy else found[leaf] for leaf in names.values()}
            trees[0][path] = {**params.get(path, {}), **own}
            trees[1][path] = {name: leaf for name, leaf in frozen.items() if name not in names}
    return trees


def without_copies(params: Tree, buffers: Mapping[str, Leaf], *, same: bool) -> None:
    """Drop the leaves of sites that use those of others.

    Args:
        params: the adapter's, changed in place.
        buffers: its frozen leaves, ties among them.
        same: whether they must be copies, as in a file.

    Raises:
        SiteError: if they must, and one is not.
    """
    for path, frozen in buffers.items():
        for _, leaf, other in ties(frozen):
            own = params.get(path, {}).pop(leaf, None)
            if same and own is not None and not values_unknown():
                first = params.get(other, {}).get(leaf)
                if first is None or first.shape != own.shape or not torch.equal(first, own):
                    raise SiteError(
                        f"By the config {path!r} and {other!r} have {leaf!r} in common, but not the same numbers in it."
                    )
