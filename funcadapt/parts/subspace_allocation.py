"""ASA: which of AdaMSS's subspaces go on training, as pure functions over a state.

    state = start(adapter.params)
    each step: new = keep(state, params, the params after the optimiser's step)
               state = update(config, state, new, grads, step)

As in PEFT, but it keeps as many subspaces as the schedule says, where PEFT's strict comparison keeps one less.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from funcadapt.adapter import TensorTree
from funcadapt.parts.subspaces import count

if TYPE_CHECKING:
    from funcadapt.methods.adamss import AdamssConfig


class SubspaceState(NamedTuple):
    """What `update` remembers, a pytree.

    Attributes:
        importance: moving means of |parameter * gradient|, path -> leaf -> tensor.
        uncertainty: moving means of how far it is from its mean.
        active: path -> which subspaces are trained, (K).
    """

    importance: TensorTree
    uncertainty: TensorTree
    active: Mapping[str, Tensor]


def _own(params: TensorTree) -> dict[str, dict[str, Tensor]]:
    own = {path: {k: t for k, t in p.items() if k.startswith("adamss_")} for path, p in params.items()}
    return {path: p for path, p in own.items() if p}


def _zeros(params: TensorTree) -> TensorTree:
    return {path: {name: torch.zeros_like(t) for name, t in p.items()} for path, p in _own(params).items()}


def start(params: TensorTree) -> SubspaceState:
    """The state before the first step: all subspaces are trained.

    Args:
        params: the trainable leaves of each site.

    Returns:
        The state.
    """
    active = {
        path: torch.ones(count(p), dtype=torch.bool, device=next(iter(p.values())).device)
        for path, p in _own(params).items()
    }
    return SubspaceState(_zeros(params), _zeros(params), active)


def budget(config: AdamssConfig, step: int, total: int) -> int:
    """How many subspaces are to be trained after a step.

        target + (total - target) (1 - (step - init_warmup) / (final_warmup - init_warmup)) ^ exponent

    Args:
        config: the config.
        step: the step, between `init_warmup` and `final_warmup`.
        total: how many there are in all layers.

    Returns:
        The number.

    Example:
        >>> import funcadapt as fa
        >>> config = fa.AdamssConfig(use_asa=True, asa_target_subspaces=4, init_warmup=0, final_warmup=10)
        >>> [budget(config, step, 20) for step in (0, 5, 10)]
        [20, 6, 4]
    """
    left = 1 - (step - config.init_warmup) / (config.final_warmup - config.init_warmup)
    return int(config.asa_target_subspaces + (total - config.asa_target_subspaces) * left**config.asa_schedule_exponent)


def update(
    config: AdamssConfig,
    state: SubspaceState,
    params: TensorTree,
    grads: Mapping[str, Mapping[str, Tensor | None]],
    step: int,
) -> SubspaceState:
    """One step of the allocation of subspaces. Call it in each training step, after the optimiser's.

        U <- beta2 U + (1 - beta2) ||p g| - I|        I <- beta1 I + (1 - beta1) |p g|

    From `init_warmup` to `final_warmup`. Every `mask_interval` steps those subspaces stay whose mean of I U, over A and
    over B, is largest; I and U begin anew. A subspace that is left out never comes back.

    Args:
        config: the config.
        state: the state.
        params: the trainable leaves of each site.
        grads: their gradients; None, or nothing, is zero.
        step: the step.

    Returns:
        The new state.
    """
    if not config.use_asa or not config.init_warmup <= step <= config.final_warmup:
        return state
    beta1, beta2 = config.asa_importance_beta, config.asa_uncertainty_beta
    importance: dict[str, dict[str, Tensor]] = {}
    uncertainty: dict[str, dict[str, Tensor]] = {}
    for path, p in _own(params).items():
        i, u = importance.setdefault(path, {}), uncertainty.setdefault(path, {})
        for name, leaf in p.items():
            g, mean = grads.get(path, {}).get(name), state.importance[path][name]
            here = torch.zeros_like(mean) if g is None else (leaf * g).abs().detach()
            u[name] = beta2 * state.uncertainty[path][name] + (1 - beta2) * (here - mean).abs()
            i[name] = beta1 * mean + (1 - beta1) * here
    state = SubspaceState(importance, uncertainty, state.active)
    if step % config.mask_interval:
        return state
    found = {path: torch.where(on, _scores(state, path, len(on)), -torch.inf) for path, on in state.active.items()}
    every = torch.cat([*found.values()])
    limit = every.topk(min(budget(config, step, len(every)), len(every))).values[-1]
    active = {path: on & (found[path] >= limit) for path, on in state.active.items()}
    return SubspaceState(_zeros(params), _zeros(params), active)


def _scores(state: SubspaceState, path: str, n: int) -> Tensor:
    both = {name: t * state.uncertainty[path][name] for name, t in state.importance[path].items()}
    return torch.stack([both[f"adamss_A.{i}"].mean() + both[f"adamss_B.{i}"].mean() for i in range(n)])


def keep(state: SubspaceState, before: TensorTree, after: TensorTree) -> dict[str, dict[str, Tensor]]:
    """The leaves after a step of the optimiser, but those of subspaces that are not trained as they were before it.

    Args:
        state: the state.
        before: the trainable leaves before the step.
        after: and after it.

    Returns:
        The leaves.
    """
    new = {path: dict(p) for path, p in after.items()}
    for path, on in state.active.items():
        for i, name in itertools.product(range(len(on)), ("adamss_A", "adamss_B")):
            leaf = f"{name}.{i}"
            new[path][leaf] = torch.where(on[i], after[path][leaf], before[path][leaf])
    return new


def update_and_allocate(tuner: Any, global_step: int) -> None:
    """PEFT's `AdamssModel.update_and_allocate`: the same on the modules of a live model, by `requires_grad`.

    Args:
        tuner: the tuner model; it keeps the states in its attribute `subspace_states`, by adapter name.
        global_step: the step.
    """
    from funcadapt.methods.adamss import AdamssConfig  # it builds on this file
    from funcadapt.view.values import adapter_of  # it builds on the methods
    from funcadapt.view.walking import view_state

    states: dict[str, SubspaceState] = tuner.__dict__.setdefault("subspace_states", {})
    for name in tuner.active_adapters:
        config = view_state(tuner.model).configs.get(name)
        if not isinstance(config, AdamssConfig) or not config.use_asa:
            continue
        params = adapter_of(tuner.model, name).params
        grads = {path: {leaf: t.grad for leaf, t in p.items()} for path, p in _own(params).items()}
        with torch.no_grad():
            states[name] = update(config, states.get(name) or start(params), params, grads, global_step)
        for path, active in states[name].active.items():
            for i, on in enumerate(active.tolist()):  # pyright: ignore
                for leaf in (params[path][f"adamss_A.{i}"], params[path][f"adamss_B.{i}"]):
                    if not on:
                        leaf.requires_grad_(False).grad = None
