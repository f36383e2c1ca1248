"""EVA: A is what the inputs of a layer vary in, and the ranks go where it explains most.

    A = the first principal components of the layer's inputs, B = 0

Each layer keeps up to rho * r components of an incremental PCA, batch after batch, until those that it gets stay within
a cosine of tau. The budget, the sum of all ranks, goes to the components with the largest share of their layer's
variance; a layer may get none, and is not adapted then. With `adjust_scaling_factors` each scaling stays as it was.
Where `torch.distributed` is initialised, the inputs of all ranks count, and all ranks get the same adapter.

Source: Paischer et al. 2024, arXiv:2410.07170. Differs from PEFT: the model stays as it is; layers with one and the
same input are found by the tensor, not by a hash of its numbers; data that does not converge is an error, not an
endless loop.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn

import funcadapt as fa
from funcadapt.errors import AdapterError
from funcadapt.parts.lora_leaves import patterns
from funcadapt.parts.lora_variants import settings
from funcadapt.pca import IncrementalPCA
from funcadapt.recipes.inits.common import Forward, Rows, flat, linear_sites, watch, with_factors
from funcadapt.sites import Site


@dataclasses.dataclass(frozen=True)
class Settings:
    """What `eva_config` holds."""

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def __post_init__(self) -> None:
        if self.rho < 1:
            raise ValueError(f"`rho` must be >= 1.0, got {self.rho}.")
        if not 0 <= self.tau <= 1:
            raise ValueError(f"`tau` must be between 0.0 and 1.0, got {self.tau}.")


def language_rows(given: Settings) -> Rows:
    """The rows of tokens that count in a batch of a language model; all rows in other batches."""

    def rows(x: Tensor, batch: Any, path: str) -> Tensor:
        if not isinstance(batch, Mapping) or "input_ids" not in batch:
            return flat(x, batch, path)
        items: Mapping[str, Tensor] = batch  # pyright: ignore[reportUnknownVariableType]
        mask = items.get("attention_mask", torch.ones_like(items["input_ids"])).bool()
        if given.use_label_mask and "labels" in items:
            mask = mask & (items["labels"] != given.label_mask_value)
        return x[mask] if x.shape[:-1] == mask.shape else flat(x, batch, path)

    return rows


class _Layer:
    """The components of one input so far.

    Args:
        sites: the sites that have it.
        count: how many components.
    """

    def __init__(self, sites: Sequence[Site], count: int) -> None:
        self.sites, self.count = sites, min(count, sites[0].in_features)
        lowrank = 2 * self.count <= self.sites[0].in_features
        self.pca = IncrementalPCA(self.count, lowrank=lowrank, lowrank_seed=42 if lowrank else None)
        self.same = torch.zeros(self.count, dtype=torch.bool)

    @property
    def started(self) -> bool:
        return hasattr(self.pca, "components_")

    def see(self, rows: Tensor, tau: float) -> None:
        """Take in the rows of one call."""
        if rows.shape[0] < self.count:
            return  # too few to say anything; PEFT prints so
        old = self.pca.components_ if self.started else None
        self.pca.partial_fit(rows.to(torch.float32))
        if old is not None:
            self.same = (torch.cosine_similarity(self.pca.components_, old) >= tau).cpu()


def _grouped(
    model: nn.Module, sites: Sequence[Site], batch: Any, forward: Forward | None, counts: Mapping[str, int]
) -> list[_Layer]:
    """Sites by input."""
    seen: list[tuple[Tensor, list[Site]]] = []  # inputs are kept until the end, so that no memory is used twice
    of_path = {site.path: site for site in sites}

    def see(path: str, x: Tensor, _: Any) -> None:
        if not any(of_path[path] in members for _, members in seen):
            same = (
                m for t, m in seen if t.data_ptr() == x.data_ptr() and t.shape == x.shape and t._version == x._version
            )
            members = next(same, None)
            if members is None:
                seen.append((x, [of_path[path]]))
            else:
                members.append(of_path[path])

    watch(model, sites, [batch], see, forward)
    missing = of_path.keys() - {site.path for _, members in seen for site in members}
    if missing:
        raise AdapterError(f"EVA: the layer {sorted(missing)[0]!r} was not called.")
    return [_Layer(members, max(counts[site.path] for site in members)) for _, members in seen]


def _ranks(layers: Sequence[_Layer], order: Sequence[str], budget: int) -> dict[str, int]:
    """The ranks of sites: the components with the largest shares of variance, `budget` in all."""
    of_path = {site.path: layer for layer in layers for site in layer.sites}
    shares = [(path, share) for path in order for share in of_path[path].pca.explained_variance_ratio_]
    if not shares:
        return {}
    best: list[int] = torch.stack([share for _, share in shares]).argsort(descending=True, stable=True).tolist()  # pyright: ignore
    counts = Counter(shares[i][0] for i in best[:budget])
    return {path: counts[path] for path in order}


def components(
    model: nn.Module,
    config: Any,
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    rows: Rows | None = None,
    steps: int = 1000,
    gather: bool = True,
    sites: Sequence[Site] | None = None,
) -> dict[str, Tensor]:
    """The principal components that EVA gives each layer, (rank, in); rank 0 where it gives none.

    Args:
        model: the model, not changed.
        config: the config.
        batches: what the model is called with, again and again until the components stay.
        forward: (model, batch): calls the model.
        rows: (input, batch, path) -> the rows of a layer's input that count; by default the tokens of a language model
            that are attended to and have a label, and all rows of other models.
        steps: how many batches it may take.
        gather: whether the rows of all ranks count, where `torch.distributed` is initialised; all must call this then,
            with as many layers. If not, each rank has components of its own batches.
        sites: the layers; by default all that the config selects.

    Returns:
        Path -> components.

    Raises:
        AdapterError: if there is no batch, or the components do not stay.
    """
    given = settings(Settings, config.eva_config or {}, "eva_config")
    chosen = rows or language_rows(given)
    sites = linear_sites(model, config, "EVA") if sites is None else sites
    counts = {site.path: round(config.at(site.path).r * given.rho) for site in sites}
    budget = sum(config.at(site.path).r for site in sites)
    iterator = iter(batches)
    first = next(iterator, None)
    if first is None:
        raise AdapterError("EVA: dataloader is empty")
    layers = _grouped(model, sites, first, forward, counts)
    leaders = {layer.sites[0].path: layer for layer in layers}
    order = [site.path for site in sites]
    ranks = counts
    batch: Any = first

    def needed(layer: _Layer) -> int:
        return max(ranks[site.path] for site in layer.sites)

    def see(path: str, x: Tensor, batch: Any) -> None:
        found = chosen(x, batch, path)
        leaders[path].see(_of_all_ranks(found) if gather else found, given.tau)

    for _ in range(steps):
        waiting = [layer for layer in layers if not layer.started or not layer.same[: needed(layer)].all()]
        if not waiting:
            return {
                site.path: _leading(layer.pca, ranks[site.path], given.whiten)
                for layer in layers
                for site in layer.sites
            }
        watch(model, [layer.sites[0] for layer in waiting], [batch], see, forward)
        if all(layer.started for layer in layers):
            ranks = _ranks(layers, order, budget)
        batch = next(iterator, None)
        if batch is None:
            iterator = iter(batches)
            batch = next(iterator, None)
        if batch is None:
            raise AdapterError("EVA: the batches ended before the components converged. Pass a list of them.")
    raise AdapterError(f"EVA: the components did not converge in {steps} batches. Lower `tau`, or pass more data.")


def _of_all_ranks(rows: Tensor) -> Tensor:
    """The rows of all ranks, one rank after the other; each may have another number of them."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return rows
    count = torch.tensor([rows.shape[0]], device=rows.device)
    counts = [torch.zeros_like(count) for _ in range(distributed.get_world_size())]
    distributed.all_gather(counts, count)  # pyright: ignore[reportUnknownMemberType]
    sizes = [int(c) for c in counts]
    padded = torch.cat([rows, rows.new_zeros(max(sizes) - rows.shape[0], rows.shape[1])]).contiguous()
    every = [torch.empty_like(padded) for _ in sizes]
    distributed.all_gather(every, padded)  # pyright: ignore[reportUnknownMemberType]
    return torch.cat([part[:size] for part, size in zip(every, sizes, strict=True)])


def _leading(pca: IncrementalPCA, rank: int, whiten: bool) -> Tensor:
    found = pca.components_[:rank]
    return found / pca.singular_values_[:rank].sqrt()[:, None] if whiten else found


def eva(
    model: nn.Module,
    config: Any,
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    rows: Rows | None = None,
    steps: int = 1000,
    gather: bool = True,
    seed: int = 0,
) -> fa.Adapter:
    """A LoRA with EVA's init and ranks.

    Args:
        model: the model, not changed.
        config: the config; `eva_config` says how.
        batches: as of `components`.
        forward: likewise.
        rows: likewise.
        steps: likewise.
        gather: likewise.
        seed: as of `fa.init`.

    Returns:
        The adapter. Its config names the layers that got a rank, and the ranks.

    Example:
        >>> import torch
        >>> import funcadapt as fa
        >>> from funcadapt.recipes.inits import eva
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
        >>> config = fa.LoraConfig(r=2, target_modules=["0", "2"], eva_config={"rho": 1.0})
        >>> adapter = eva(model, config, [torch.randn(50, 6)])
        >>> a = adapter.params["0"]["lora_A"]
        >>> torch.allclose(a @ a.T, torch.eye(2), atol=1e-4)
        True
    """
    found = components(model, config, batches, forward=forward, rows=rows, steps=steps, gather=gather)
    given = settings(Settings, config.eva_config or {}, "eva_config")
    config = dataclasses.replace(redistributed(config, found, given), init_lora_weights="eva")
    factors = {path: {"lora_A": a} for path, a in found.items() if a.shape[0]}
    return with_factors(model, config, factors, seed)[0]


def redistributed(config: Any, found: Mapping[str, Tensor], given: Settings, others: Iterable[str] = ()) -> Any:
    """The config with the ranks of given components.

    Args:
        config: the config.
        found: path -> components.
        given: whether scalings stay.
        others: further paths, which keep their ranks.

    Returns:
        The config with those paths that have a rank as targets, and with patterns.
    """
    kept = {path: a.shape[0] for path, a in found.items() if a.shape[0]}
    kept |= {path: config.at(path).r for path in others}
    alphas = {path: config.at(path).lora_alpha for path in kept}
    if given.adjust_scaling_factors:
        alphas = {path: alpha * (kept[path] / config.at(path).r) for path, alpha in alphas.items()}
    keys = patterns(kept)
    return dataclasses.replace(
        config,
        target_modules=sorted(kept),
        layers_to_transform=None,
        layers_pattern=None,
        rank_pattern={keys[path]: r for path, r in kept.items() if r != config.r},
        alpha_pattern={keys[path]: alpha for path, alpha in alphas.items() if alpha != config.lora_alpha},
    )
