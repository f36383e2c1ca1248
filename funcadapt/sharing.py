"""Leaves that a site does not have to itself: what all sites of an adapter share, and what follows from the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from funcadapt.config import AdapterConfig
from funcadapt.layer import Given, Layer
from funcadapt.method import Draw, Leaf, Method
from funcadapt.rows import BY_ROW
from funcadapt.sites import Site, one_expert
from funcadapt.tying import without_copies

SHARED = ""
"""The path of what sites share, in an adapter's trees."""

Tree = dict[str, dict[str, Tensor]]


def stacked(leaves: Sequence[Leaf]) -> dict[str, Tensor]:
    """The leaves of experts with an expert axis; 0-d ones are the same for all."""
    return {k: torch.stack([p[k] for p in leaves]) if v.ndim else v for k, v in leaves[0].items()}


def shared_of(method: Method, params: Mapping[str, Leaf], buffers: Mapping[str, Leaf]) -> dict[str, Tensor]:
    """The leaves that all sites see.

    Args:
        method: the method.
        params: the adapter's trees.
        buffers: likewise.

    Returns:
        Leaf name -> tensor; empty for most methods.
    """
    if not method.shared and not method.inputs:
        return {}
    both = {**params.get(SHARED, {}), **buffers.get(SHARED, {})}
    inputs = {*method.inputs, *(BY_ROW + name for name in method.inputs)}
    return {name: leaf for name, leaf in both.items() if name in method.shared or name in inputs}


def in_files(method: Method, config: AdapterConfig, name: str) -> bool:
    """Whether the checkpoints of a config hold a frozen leaf that sites share.

    Args:
        method: the method.
        config: the config.
        name: the leaf's name.

    Returns:
        Whether they do.
    """
    if name not in method.shared or not method.is_constant(name):
        return False
    leaf = torch.empty(0)
    return method.stored is None or method.stored(config, SHARED, {name: leaf}).get(name, leaf) is not None


def complete(
    model: nn.Module,
    method: Method,
    config: AdapterConfig,
    table: Sequence[Site],
    trees: tuple[Tree, Tree],
    draw_of: Callable[[Site], Draw],
    *,
    from_file: bool = False,
) -> list[str]:
    """Add what sites share and what follows from the model, where it is not there yet.

    Args:
        model: the model, not changed.
        method: the method.
        config: the adapter's config.
        table: the sites, in model order.
        trees: params and buffers, changed in place.
        draw_of: gives the draw of a site. What sites share is drawn at the first one.
        from_file: whether the trees are those of a file, in which tied leaves are repeated.

    Returns:
        The names of the leaves that had to be made, which a checkpoint should have had.
    """
    params, buffers = trees
    layers: dict[str, Layer] = {}

    def given(site: Site) -> Given:
        if site.path not in layers:
            layers[site.path] = Layer(site, model.get_submodule(site.owner), config)
        return Given(layers[site.path])

    made: list[str] = []
    if method.share is not None and table:
        draw = draw_of(table[0])
        draw.known = {**params.get(SHARED, {}), **buffers.get(SHARED, {})}
        shared = method.share(table, config, draw, lambda site: given(site)())
        for tree, leaves in ((params, shared.params), (buffers, shared.buffers)):
            there = tree.get(SHARED, {})
            made += [
                name for name in leaves if name not in there and (tree is params or in_files(method, config, name))
            ]
            if leaves:
                tree[SHARED] = {**leaves, **there}
        for path, leaves in shared.at.items():
            trained = {k: v for k, v in leaves.items() if k in method.keys and not method.is_constant(k)}
            frozen = {k: v for k, v in leaves.items() if k not in trained}
            buffers[path] = {**frozen, **buffers.get(path, {})}
            if trained:
                made += [name for name in trained if name not in params.get(path, {})]
                params[path] = {**trained, **params.get(path, {})}
        if method.tied:
            without_copies(params, buffers, same=from_file)
    if method.derive is not None:
        for site in table:
            derived = _derived(method, site, config.at(site.path), draw_of(site), given(site))
            buffers[site.path] = {**derived, **buffers.get(site.path, {})}
    return made


def _derived(method: Method, site: Site, config: Any, draw: Draw, weight: Callable[[], Tensor]) -> dict[str, Tensor]:
    derive = method.derive
    assert derive is not None
    if not site.stack:
        return derive(site, config, draw, weight)
    one = one_expert(site)
    made = stacked([derive(one, config, draw, lambda e=e: weight()[e]) for e in range(site.experts)])
    return {k: v.squeeze(0) if v.ndim else v for k, v in made.items()} if site.experts == 1 else made
