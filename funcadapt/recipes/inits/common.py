"""What the inits that look at data have in common: batches, sites, and an adapter made of given factors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import funcadapt as fa
from funcadapt.activations import watched
from funcadapt.errors import SiteError
from funcadapt.init import init_with_base
from funcadapt.layer import Given, Layer
from funcadapt.sites import Site

LINEAR = ("linear", "hf_conv1d")

Forward = Callable[[nn.Module, Any], Any]
Rows = Callable[[Tensor, Any, str], Tensor]


def call(model: nn.Module, batch: Any) -> Any:
    """A model's output for a batch: keyword arguments in a dict, arguments in a tuple or list, or the only one."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def flat(x: Tensor, batch: Any, path: str) -> Tensor:
    """All rows of an input."""
    return x.reshape(-1, x.shape[-1])


def linear_sites(model: nn.Module, config: Any, name: str) -> list[Site]:
    """The sites of a config, which must be linear layers.

    Args:
        model: the model.
        config: the config.
        name: the init's name, for the error.

    Returns:
        The sites.

    Raises:
        SiteError: if one is of another kind.
    """
    found = list(fa.sites(model, config))
    for site in found:
        if site.kind not in LINEAR:
            raise SiteError(f"{name} needs linear layers; {site.path!r} is of kind {site.kind!r}. Exclude it.")
    return found


def watch(
    model: nn.Module,
    sites: Iterable[Site],
    batches: Iterable[Any],
    see: Callable[[str, Tensor, Any], None],
    forward: Forward | None = None,
) -> None:
    """Run a model in eval mode and without gradients, and show the inputs of layers.

    Args:
        model: the model, not changed.
        sites: the layers.
        batches: the batches.
        see: called with a path, the input and the batch.
        forward: (model, batch): calls the model; by default as `call`.
    """
    now: list[Any] = [None]
    copy = watched(model, [site.path for site in sites], lambda path, x: see(path, x, now[0])).eval()
    with torch.no_grad():
        for batch in batches:
            now[0] = batch
            (forward or call)(copy, batch)


def weight_of(model: nn.Module, site: Site, config: Any) -> Tensor:
    """A site's weight, (out, in), in at least float32."""
    weight = Layer(site, model.get_submodule(site.owner), config).weight.detach()
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def with_factors(
    model: nn.Module, config: Any, factors: Mapping[str, Mapping[str, Tensor]], seed: int
) -> tuple[fa.Adapter, dict[str, Tensor]]:
    """A new adapter with given leaves, and the base weights that go with it.

    Args:
        model: the model.
        config: the config, whose init says whether the base weights change.
        factors: path -> leaves.
        seed: the seed of the leaves that are not given.

    Returns:
        The adapter and the base weights.
    """
    fresh, _ = init_with_base(model, dataclasses.replace(config, init_lora_weights=True), seed=seed)
    method = fa.method_of(config)
    params = {
        path: method.layout({**p, **{name: leaf.to(p[name]) for name, leaf in factors.get(path, {}).items()}})
        for path, p in fresh.params.items()
    }
    adapter = fresh.replace(
        params=params, config=dataclasses.replace(fresh.config, init_lora_weights=config.init_lora_weights)
    )
    base: dict[str, Tensor] = {}
    for site in fa.sites(model, config):
        at: Any = adapter.config.at(site.path)
        layer = Layer(site, model.get_submodule(site.owner), at)
        corrected = method.residual(at, adapter.leaves(site.path), Given(layer, changes=True))
        if corrected is not None:
            base[site.weight_name] = layer.stored(corrected)
    return adapter, base
