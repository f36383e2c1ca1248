"""`add_weighted_adapter`: a new adapter in a model, combined from others there."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from funcadapt.errors import AdapterError
from funcadapt.method import method_of
from funcadapt.peft.plain import add_weighted_adapter as add
from funcadapt.view.auxiliary import ModulesToSaveWrapper
from funcadapt.view.inject import fresh
from funcadapt.view.walking import auxiliaries, layers, unwrapped, view_state

if TYPE_CHECKING:
    from funcadapt.peft.tuner import BaseTuner

_SAME_RANK = ("linear", "ties", "dare_ties", "dare_linear", "magnitude_prune")


def add_weighted_adapter(
    self: BaseTuner,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str | None = None,
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    svd_full_matrices: bool = True,
    svd_driver: str | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
) -> None:
    """Add an adapter that is combined from others, see `fa.combine`. It becomes neither active nor trainable.

    Nothing happens if there is an adapter of that name already, as in PEFT. Where PEFT's numbers are wrong (its defect
    B9: with `use_rslora` every combination is off by the square root of the rank; biases of `lora_bias`, DoRA's
    magnitudes and rank patterns are lost) these are right.

    Args:
        self: the tuner.
        adapters: the names of the others.
        weights: a number for each, also negative.
        adapter_name: the new name.
        combination_type: "svd", "linear", "cat", "ties", "ties_svd", "dare_ties", "dare_linear", "dare_ties_svd",
            "dare_linear_svd", "magnitude_prune" or "magnitude_prune_svd"; by default "svd" for methods that have a
            rank, "linear" for others.
        svd_rank: the rank to which an svd cuts; the largest of the adapters by default.
        svd_clamp: after an svd, clamp the factors to this quantile of their values.
        svd_full_matrices: PEFT's, for its numbers with `svd_clamp`.
        svd_driver: as in `torch.linalg.svd`, on CUDA only.
        density: for the sparse types, the fraction of values to keep.
        majority_sign_method: for ties, "total" or "frequency".

    Raises:
        TypeError: if the method's adapters cannot be combined.
        AdapterError: a ValueError, if an adapter is unknown, or they do not go together.
    """
    if adapter_name in self.peft_config:
        return
    for name in adapters:
        if name not in self.peft_config:
            raise AdapterError(f"Adapter {name} does not exist")
    if not adapters:
        raise AdapterError("Found no adapter matching the names in []")
    configs: list[Any] = [view_state(self.model).configs[name] for name in adapters]
    method = method_of(configs[0])
    if method.algebra is None:
        raise TypeError(f"{type(self).__name__} does not support add_weighted_adapter method.")
    kind = combination_type or ("linear" if method.with_rank is None else "svd")
    if len(adapters) > 1:
        _check_together(self.model, adapters, configs, kind)
    if method.with_rank is not None:
        _draw(self.model, adapters, configs, kind, svd_rank)
    # the tuner's dict is the model's own
    add(
        self.model,
        adapters,
        weights,
        adapter_name,
        kind,
        svd_rank=svd_rank,
        svd_clamp=svd_clamp,
        svd_full_matrices=svd_full_matrices,
        svd_driver=svd_driver,
        density=density,
        majority_sign_method=majority_sign_method,
        seed=None,  # torch's own generator, as in PEFT
    )
    self._settle(adapter_name, view_state(self.model).configs[adapter_name])


def _draw(model: nn.Module, adapters: Sequence[str], configs: Sequence[Any], kind: str, svd_rank: int | None) -> None:
    """Draw the numbers that PEFT draws, and drops, for the new adapter: what comes after them depends on the seed."""
    method = method_of(configs[0])
    ranks = [getattr(config, method.rank_field) for config in configs]
    rank = sum(ranks) if kind == "cat" else max(ranks) if not kind.endswith("svd") else svd_rank or max(ranks)
    patterns = {pattern: dict[str, Any]() for pattern in configs[0].patterned.values()}
    table = [layer.site for _, layer in layers(model) if not layer.adapters.keys().isdisjoint(adapters)]
    with unwrapped(model):
        fresh(model, dataclasses.replace(configs[0], **{method.rank_field: rank, **patterns}), table)


def _check_together(model: nn.Module, adapters: Sequence[str], configs: Sequence[Any], kind: str) -> None:
    """What PEFT refuses."""
    saved = [w for _, w in auxiliaries(model) if isinstance(w, ModulesToSaveWrapper)]
    torn = [w for w in saved if sum(name in w.modules_to_save for name in adapters) > 1]
    if torn:
        raise AdapterError(
            "Cannot add weighted adapters if they target the same module with modules_to_save, but found "
            f"{len(torn)} such instance(s)."
        )
    ranks = {
        max(c.r, *c.rank_pattern.values()) if c.rank_pattern else c.r for c in configs if hasattr(c, "rank_pattern")
    }
    if kind in _SAME_RANK and len(ranks) > 1:
        raise AdapterError(
            "All adapters must have the same r value when using combination_type linear, ties, dare_ties or "
            f"dare_linear, got {sorted(ranks)}. 'cat' and the types with svd take any."
        )
    if len({isinstance(config.target_modules, str) for config in configs}) > 1:
        raise AdapterError(
            "all adapter configs should follow the same target modules type. Combining adapters with `target_modules` "
            "type being a mix of list/set and string is not supported."
        )
