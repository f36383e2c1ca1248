"""AdaLoRA's allocator: in training, the ranks go to the layers that need them. Pure functions over a state.

One row of A, one number of E and one column of B are a triplet. `allocate` after each step of the optimiser keeps the
triplets that matter most within a budget that falls from init_r to target_r a layer on average, and puts zero into E
at the others. `prune` takes them out at the end. Add `orthogonality` to the loss.

    from funcadapt import allocation

    state = allocation.start(adapter.config, adapter.params)
    for step in range(adapter.config.total_step):
        grads = grad(lambda p: loss(p) + allocation.orthogonality(adapter.config, p))(adapter.params)
        ...                                                                 # the optimiser's step
        adapter, state = allocation.allocate(adapter, grads, state, step)
    adapter = allocation.prune(adapter, allocation.rank_pattern(state.mask))

Source: Zhang et al. 2023, arXiv:2303.10512. Differs from PEFT: a `target_r` that equals `init_r` masks nothing, where
PEFT raises; a layer that got no gradient counts as unimportant; nothing is read off parameter names.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from funcadapt._torch import linalg, values_unknown
from funcadapt.adapter import Adapter, TensorTree
from funcadapt.errors import AdapterError, did_you_mean
from funcadapt.method import Leaf
from funcadapt.parts.adalora_leaves import LEAVES, cut, layout, mask_of, masks_of

if TYPE_CHECKING:
    from funcadapt.methods.adalora import AdaLoraConfig


class RankState(NamedTuple):
    """What `allocate` remembers, a pytree.

    Attributes:
        sensitivity: moving means of |parameter * gradient|, path -> leaf -> tensor.
        uncertainty: moving means of how far it is from its mean.
        mask: path -> the triplets that the last allocation kept, (r), for experts (experts, r).
    """

    sensitivity: TensorTree
    uncertainty: TensorTree
    mask: Mapping[str, Tensor]


def start(config: AdaLoraConfig, params: TensorTree) -> RankState:
    """The state before the first step.

    Args:
        config: the config. Triplets that its `rank_pattern` leaves out are masked.
        params: the trainable leaves of each site.

    Returns:
        The state.
    """

    def zeros() -> TensorTree:
        return {path: {k: torch.zeros_like(_wide(p[k])) for k in LEAVES} for path, p in own(params).items()}

    masks: dict[str, Tensor] = {}
    for path, p in own(params).items():
        e, mask = p["lora_E"], mask_of(config, path)
        masks[path] = torch.ones(e.shape[:-1], dtype=torch.bool, device=e.device)
        if mask is not None and len(mask) == e.numel():
            masks[path] = torch.tensor(mask, device=e.device).reshape(e.shape[:-1])
    return RankState(zeros(), zeros(), masks)


def budget(config: AdaLoraConfig, step: int, initial: int, final: int) -> tuple[int, bool]:
    """How many triplets there may be after a step: first all, then less and less by a cubic curve, then the target.

        final + (initial - final) (1 - (step - tinit) / (total_step - tfinal - tinit))^3

    Args:
        config: the config.
        step: the step, from 0.
        initial: how many there are at the start.
        final: how many there are to be at the end.

    Returns:
        The number, and whether it is time for an allocation.

    Example:
        >>> import funcadapt as fa
        >>> config = fa.AdaLoraConfig(total_step=10, tinit=2, tfinal=2, deltaT=2)
        >>> [budget(config, step, 24, 8) for step in (0, 3, 4, 6, 8, 9)]
        [(24, False), (17, False), (12, True), (8, True), (8, True), (8, True)]
    """
    last = _last(config)
    if step <= config.tinit:
        return initial, False
    if step > last:
        return final, True
    left = 1 - (step - config.tinit) / (last - config.tinit)
    return int((initial - final) * left**3 + final), step % config.deltaT == 0


def importance(
    config: AdaLoraConfig,
    state: RankState,
    params: TensorTree,
    grads: Mapping[str, Mapping[str, Tensor | None]],
) -> RankState:
    """The state after the gradients of one step.

        S <- beta1 S + (1 - beta1) |p g|        U <- beta2 U + (1 - beta2) ||p g| - S|

    Args:
        config: the config.
        state: the state.
        params: the trainable leaves of each site.
        grads: their gradients; None, or nothing, is zero.

    Returns:
        The new state.
    """
    sensitivity: dict[str, dict[str, Tensor]] = {}
    uncertainty: dict[str, dict[str, Tensor]] = {}
    for path, p in own(params).items():
        s, u = sensitivity.setdefault(path, {}), uncertainty.setdefault(path, {})
        for name in LEAVES:
            wide, g = _wide(p[name]), grads.get(path, {}).get(name)
            here = torch.zeros_like(wide) if g is None else (wide * _wide(g)).abs()
            s[name] = config.beta1 * state.sensitivity[path][name] + (1 - config.beta1) * here
            u[name] = config.beta2 * state.uncertainty[path][name] + (1 - config.beta2) * (here - s[name]).abs()
    return state._replace(sensitivity=sensitivity, uncertainty=uncertainty)


def scores(state: RankState) -> dict[str, Tensor]:
    """How much each triplet matters: S U of its number in E, plus the means of S U over its row of A and column of B.

    Args:
        state: the state.

    Returns:
        Path -> (r), for experts (experts, r).
    """
    found: dict[str, Tensor] = {}
    for path, s in state.sensitivity.items():
        a, e, b = (s[name] * state.uncertainty[path][name] for name in LEAVES)
        found[path] = e.squeeze(-1) + (a.mean(-1) + b.mean(-2))
    return found


def threshold(found: Mapping[str, Tensor], count: int) -> Tensor:
    """The score at or below which triplets are masked, so that `count` are (more, if scores are equal).

    Args:
        found: the scores.
        count: how many.

    Returns:
        0-d; minus infinity if none is.

    Raises:
        AdapterError: if the count is negative.
    """
    every = torch.cat([s.flatten() for s in found.values()])
    if count < 0:
        raise AdapterError(
            f"target_r is larger than the rank of the layers: {every.numel()} triplets are there, and the budget is "
            f"{every.numel() - count}. Lower target_r, or raise init_r."
        )
    return torch.kthvalue(every, count).values if count else torch.full_like(every[0], -math.inf)


def update(
    config: AdaLoraConfig,
    state: RankState,
    params: TensorTree,
    grads: Mapping[str, Mapping[str, Tensor | None]],
    step: int,
) -> tuple[dict[str, Tensor], RankState, dict[str, list[bool]] | None]:
    """One step of PEFT's `update_and_allocate`, on leaves and gradients by site.

    Args:
        config: the config.
        state: the state.
        params: the trainable leaves of each site, after the optimiser's step.
        grads: the gradients of that step, None where there is none.
        step: the step, from 0.

    Returns:
        The new `lora_E` of each site, the new state, and the rank pattern if ranks were allocated in this step, else
        None.

    Raises:
        AdapterError: if `target_r` is too large, or ranks are to be fixed and no gradient was ever given.
    """
    values, state, allocated = _step(config, state, own(params), grads, step)
    return values, state, rank_pattern(state.mask) if allocated else None


def allocate(adapter: Adapter, grads: Any, state: RankState, step: int) -> tuple[Adapter, RankState]:
    """One step of the allocation of ranks. Call it in each training step, after the optimiser's.

    Up to `tinit` it only watches. Then it masks triplets down to the budget, every `deltaT` steps; a masked one can
    grow again, and be kept in the next allocation. At `total_step - tfinal` the masks become final.

    Args:
        adapter: the adapter. Under `torch.func.vmap`, one of a stack of adapters of equal ranks.
        grads: the gradients of the step, a tree like the adapter's params.
        state: the state.
        step: the step, from 0.

    Returns:
        The adapter with zeros in `lora_E` where a triplet is masked, and the new state.

    Raises:
        AdapterError: as `update`; and for a stack of adapters of different ranks, whose padding would count.

    Example:
        >>> import torch
        >>> import funcadapt as fa
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
        >>> config = fa.AdaLoraConfig(init_r=3, target_r=1, total_step=4, target_modules=["0", "1"])
        >>> adapter = fa.init(model, config)
        >>> state = start(config, adapter.params)
        >>> loss = lambda p: fa.functional_call(model, adapter.replace(params=p), torch.ones(1, 4)).pow(2).sum()
        >>> for step in range(5):
        ...     grads = torch.func.grad(loss)(adapter.params)
        ...     trained, _ = fa.optim.sgd.update(adapter.params, grads, fa.optim.sgd.init(grads), lr=0.1)
        ...     adapter, state = allocate(adapter.replace(params=trained), grads, state, step)
        >>> sum(sum(kept) for kept in rank_pattern(state.mask).values())
        2
        >>> prune(adapter, rank_pattern(state.mask)).num_parameters() < adapter.num_parameters()
        True
    """
    if adapter.members is not None and adapter.members.ranks:
        raise AdapterError("allocate: the adapters of this stack have different ranks. Allocate for each alone.")
    config: Any = adapter.config
    values, state, _ = _step(config, state, own(adapter.params), grads, step)
    new = {path: {**p, "lora_E": values[path]} if path in values else p for path, p in adapter.params.items()}
    return adapter.replace(params=new), state


def _step(
    config: AdaLoraConfig, state: RankState, params: TensorTree, grads: Any, step: int
) -> tuple[dict[str, Tensor], RankState, bool]:
    """The new E of each site, the new state, and whether ranks were allocated."""
    last = _last(config)
    if step < last:
        state = importance(config, state, params, grads)
    matrices = sum(math.prod(p["lora_E"].shape[:-2]) for p in params.values())
    initial = sum(p["lora_E"].numel() for p in params.values())
    left, due = budget(config, step, initial, config.target_r * matrices)
    allocated = step == last or (step < last and due)
    if allocated:
        found = scores(state)
        if step == last and not values_unknown() and not any(s.any() for s in found.values()):
            raise AdapterError(
                f"At step {step} = total_step - tfinal the ranks become final, but no triplet has a score. Call this "
                "in every step from 0, with the gradients."
            )
        limit = threshold(found, initial - left)
        state = state._replace(mask={path: ~(s <= limit.to(s.device)) for path, s in found.items()})
    if step == last:
        forgotten = {
            path: {name: torch.zeros_like(t) for name, t in s.items()} for path, s in state.sensitivity.items()
        }
        state = state._replace(sensitivity=forgotten, uncertainty=forgotten)
    if not allocated and step <= last:
        return {path: p["lora_E"] for path, p in params.items()}, state, False
    kept = {path: torch.where(state.mask[path].unsqueeze(-1), p["lora_E"], 0) for path, p in params.items()}
    return kept, state, allocated


def rank_pattern(mask: Mapping[str, Tensor]) -> dict[str, list[bool]]:
    """The masks of a state in the form of PEFT's `config.rank_pattern`.

    Args:
        mask: `RankState.mask`.

    Returns:
        Site path and ".lora_E" -> which triplets are kept; expert by expert.
    """
    return {f"{path}.lora_E": m.flatten().tolist() for path, m in mask.items()}  # pyright: ignore


def prune(adapter: Adapter, pattern: Mapping[str, Sequence[bool]]) -> Adapter:
    """The adapter without the masked triplets, as PEFT saves it. It does what it did if `lora_E` is zero there.

    Experts keep theirs, with zeros in `lora_E`, as all of a stack have one rank. The optimiser's state does not fit any
    more.

    Args:
        adapter: the adapter.
        pattern: which triplets each site keeps, as `rank_pattern` gives it.

    Returns:
        The smaller adapter, with the pattern in its config.

    Raises:
        AdapterError: if the pattern has an unknown site, or another number of triplets than that has.
    """
    config: Any = adapter.config
    params, masks = dict(adapter.params), masks_of(config, adapter.params)
    for name, mask in pattern.items():
        path, kept = name.rpartition(".lora_E")[0], tuple(map(bool, mask))
        if path not in own(adapter.params):
            raise AdapterError(f"rank_pattern has {name!r}, which the adapter does not."
                               + did_you_mean(name, (f"{p}.lora_E" for p in own(adapter.params))))  # fmt: skip
        p, before = adapter.params[path], mask_of(config, path)
        e, whole = p["lora_E"], kept
        if before is not None and sum(before) == len(kept) < len(before):  # pruned already: of the rows that are left
            rest = iter(kept)
            whole = tuple(b and next(rest) for b in before)
        masks[f"{path}.lora_E"] = whole
        if len(kept) != e.numel():
            raise AdapterError(f"rank_pattern has {len(kept)} triplets for {name!r}, the adapter has {e.numel()}.")
        if e.ndim == 3:
            zero = torch.tensor(kept, device=e.device).reshape(e.shape)
            params[path] = {**p, "lora_E": torch.where(zero, e, 0)}
        else:
            params[path] = layout(cut(p, kept))
    return adapter.replace(params=params, config=dataclasses.replace(config, rank_pattern=masks))


def orthogonality(config: AdaLoraConfig, params: TensorTree) -> Tensor:
    """What is added to the loss so that A and B stay near the factors of an SVD.

        orth_reg_weight * mean over all A and B of |A A^T - I|, |B^T B - I|        Frobenius norms

    Args:
        config: the config.
        params: the trainable leaves of each site. Not those of a stack of different ranks, as padding counts.

    Returns:
        0-d.
    """
    terms: list[Tensor] = []
    for p in own(params).values():
        a, b = p["lora_A"], p["lora_B"]
        for square in (a @ a.mT, b.mT @ b):
            eye = torch.eye(square.shape[-1], dtype=square.dtype, device=square.device)
            terms.append(linalg.vector_norm(square - eye, dim=(-2, -1)).flatten())
    if not terms:
        return torch.zeros(())
    return config.orth_reg_weight * torch.cat([term.to(terms[0]) for term in terms]).mean()


def own(params: TensorTree) -> dict[str, Leaf]:
    """The sites of AdaLoRA among those of an adapter, which may also hold whole modules."""
    return {path: p for path, p in params.items() if "lora_E" in p}


def _wide(t: Tensor) -> Tensor:
    """At least float32: products of small numbers vanish in less."""
    return t.detach().to(torch.promote_types(t.dtype, torch.float32))


def _last(config: AdaLoraConfig) -> int:
    """The step at which the ranks become final."""
    assert config.total_step is not None  # the config has checked
    return config.total_step - config.tfinal
