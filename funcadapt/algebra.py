"""The algebra of adapters: scaled, added, combined. Pure functions of values; no model is touched.

What is summed is what the adapters change: with W' the weight that an adapter makes of W, the exact sum of weighted
adapters makes W + sum w_i (W'_i - W), as nesting them does where they are additive.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from funcadapt import _torch
from funcadapt.adapter import Adapter
from funcadapt.combining import COMBINATIONS, SPARSE, Member, Recipe, Spot
from funcadapt.errors import AdapterError, did_you_mean
from funcadapt.layer import Layer
from funcadapt.method import Leaf, Method, method_of
from funcadapt.sites import describe
from funcadapt.sparsify import SIGNS
from funcadapt.uniting import config_of, split, whole_leaves


def scale(adapter: Adapter, w: float | Tensor, *, model: nn.Module | None = None) -> Adapter:
    """The adapter whose effect is w times that of another: W + w (W' - W), as `weights=` of `functional_call` does.

    Args:
        adapter: the adapter.
        w: a number or a 0-d tensor, also negative. Differentiable.
        model: the model, for methods whose effect depends on the base weight (DoRA).

    Returns:
        The new adapter. LoRA's factors are shared, its scaling is another.

    Raises:
        AdapterError: if the method cannot be scaled, or the adapter holds modules in full, or it needs the model.

    Example:
        >>> import torch
        >>> import funcadapt as fa
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> adapter = fa.init(model, fa.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
        >>> x = torch.randn(5, 4)
        >>> y = fa.functional_call(model, adapter, (x,), weights=0.5)
        >>> torch.allclose(y, fa.functional_call(model, scale(adapter, 0.5), (x,)), atol=1e-6)
        True
    """
    if not _is_one(w) and isinstance(adapter, Adapter):  # pyright: ignore[reportUnnecessaryIsInstance]
        _, whole = split(adapter, method_of(adapter.config))
        if whole.params:
            path, leaves = next(iter(whole.params.items()))
            raise AdapterError(
                f"scale: {next(iter(leaves))!r} of {path!r} is held in full, so {w} times its effect depends on the "
                "model. Pass weights= to fa.functional_call or fa.merge instead."
            )
    return combine([adapter], [w], "cat", model=model)


def add(*adapters: Adapter, model: nn.Module | None = None) -> Adapter:
    """The adapter that does what several do together: the exact sum of what they change.

    Args:
        *adapters: the adapters, of one method.
        model: the model, for methods whose effect depends on the base weight (DoRA).

    Returns:
        The new adapter. LoRA's rank is the sum of the ranks.

    Raises:
        AdapterError: as in `combine`.

    Example:
        >>> import torch
        >>> import funcadapt as fa
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> config = fa.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        >>> a, b = (fa.init(model, config, seed=seed) for seed in (0, 1))
        >>> add(a, b)
        Adapter(lora, 1 site, r=4, 28 parameters, float32)
        >>> nested, x = {"a": a, "b": b}, torch.randn(5, 4)
        >>> y = fa.functional_call(model, nested, (x,))
        >>> torch.allclose(y, fa.functional_call(model, add(a, b), (x,)), atol=1e-5)
        True
    """
    return combine(adapters, [1.0] * len(adapters), "cat", model=model)


def combine(
    adapters: Sequence[Adapter],
    weights: Sequence[float | Tensor] | Tensor,
    method: str = "linear",
    *,
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    svd_full_matrices: bool = True,
    svd_driver: str | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
    seed: int | None = 0,
    model: nn.Module | None = None,
) -> Adapter:
    """One adapter from several: PEFT's `add_weighted_adapter`, as a function of values.

    The sites of the result are those of any of the adapters; one that has nothing at a site adds nothing there. One
    adapter with weight 1 comes back as it is. One adapter alone is scaled, whatever the method; only an `svd_rank` or
    `svd_clamp` still acts. Differentiable in the weights and the leaves, with `torch.func` too, except that the roots
    in "linear" and the sparse methods have no derivative at weight 0, and a singular value decomposition none where
    singular values are equal.

    What a method is for LoRA, `parts/lowrank.py` says, for DoRA `methods/dora.py`, for (IA)^3 `methods/ia3.py`. In
    short: "cat" is the exact sum; "svd" is, cut to a rank; "linear" adds the leaves (for LoRA an approximation, kept
    as PEFT defines it, of square roots of the weights times A and B); "ties", "dare_linear", "dare_ties" and
    "magnitude_prune" are "linear" with sparse sums; with "_svd" they are sparse sums of whole updates, cut to a rank.
    The numbers are PEFT's where PEFT's are right. Where they are not (defect B9: with `use_rslora` all are wrong by a
    factor of sqrt(r), and decompositions crash on Conv1d and Conv3d; biases of `lora_bias`, the magnitudes of DoRA and
    modules saved in full are lost; rank and alpha patterns are lost in the config), they are the right ones.

    Args:
        adapters: the adapters, of one method, made for one model; no stacks.
        weights: a number or a 0-d tensor for each, also negative; or a 1-D tensor.
        method: "linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune", or one of the last four
            with "_svd".
        svd_rank: the rank to which an svd cuts; the largest of the adapters by default. No more than a layer's width.
        svd_clamp: after an svd, clamp the factors to this quantile of their values.
        svd_full_matrices: PEFT's, for the sake of its numbers with `svd_clamp`; nothing else depends on it.
        svd_driver: as in `torch.linalg.svd`, on CUDA only.
        density: for the sparse methods, the fraction of values to keep, in [0, 1].
        majority_sign_method: for ties, "total" (by the sum) or "frequency" (by the count).
        seed: for dare, what the random masks depend on, and on the site alone beside it; None takes torch's global
            generator, in PEFT's order.
        model: the model, where the combination depends on the base weight: DoRA with "cat", "svd" or "..._svd", or with
            weights that do not sum to one.

    Returns:
        The new adapter. Its config says what its leaves are (LoRA's scaling is 1), and targets what any of the adapters
        targets. What only one of them holds in full (`modules_to_save`, trained biases, token rows) is kept as it is.

    Raises:
        AdapterError: if the adapters do not go together, or the arguments are wrong: the message names what and where.
        TypeError: if something is no adapter, or a weight no number.
        RuntimeError: if `majority_sign_method` is unknown, as in PEFT.

    Example:
        >>> import torch
        >>> import funcadapt as fa
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> config = fa.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        >>> a, b = (fa.init(model, config, seed=seed) for seed in (0, 1))
        >>> combine([a, b], [0.7, -0.3], "svd", svd_rank=3)
        Adapter(lora, 1 site, r=3, 48 parameters, float32)
        >>> x = torch.randn(5, 8)
        >>> def loss(w):
        ...     return fa.functional_call(model, combine([a, b], w, "cat"), (x,)).pow(2).mean()
        >>> torch.func.grad(loss)(torch.tensor([0.5, 0.5])).shape
        torch.Size([2])
    """
    members = _adapters(adapters)
    values = _weights(weights, len(members))
    own_method = _one_method(members)
    name = _alone(method, svd_rank is not None or svd_clamp is not None) if len(members) == 1 else method
    _check(method, name, svd_rank, svd_clamp, density, majority_sign_method)
    if len(members) == 1 and _is_one(values[0]) and name != "svd":
        return members[0]
    algebra = own_method.algebra
    if algebra is None:
        raise AdapterError(
            f"combine: {own_method.name} does not say how its adapters are combined (Method.algebra), except for one "
            "with weight 1. Compose them in the call: fa.functional_call(model, {'a': a, 'b': b}, ..., weights=...)."
        )
    parts = [split(member, own_method) for member in members]
    ranks = [max([0, *(a.config.rank(p) for p in own.values())]) for a, (own, _) in zip(members, parts, strict=True)]
    recipe = Recipe(
        name=name,
        rank=max(ranks),
        svd_rank=svd_rank,
        svd_clamp=svd_clamp,
        svd_full_matrices=svd_full_matrices,
        svd_driver=svd_driver,
        density=density,
        majority_sign_method=majority_sign_method,
        seed=seed,
    )
    config: Any = config_of(members, [own for own, _ in parts], algebra.config)
    if max(ranks):  # shapes alone do not always say the rank; see LoraConfig.rank
        rank = sum(ranks) if name == "cat" else svd_rank or max(ranks)
        config = dataclasses.replace(config, **{own_method.rank_field: rank})
    params, buffers = whole_leaves(parts)
    described: dict[str, Leaf] = {}
    for path in dict.fromkeys(path for own, _ in parts for path in own):
        present = [i for i, (own, _) in enumerate(parts) if path in own]
        spot = Spot(
            path,
            [Member(members[i].config, parts[i][0][path], values[i]) for i in present],
            [w for i, w in enumerate(values) if i not in present],
            config,
            _base(model, path, config, own_method),
        )
        fresh = algebra.combine(recipe, spot)
        described[path] = {k: leaf.detach() for k, leaf in (*fresh.params.items(), *fresh.buffers.items())}
        params[path] = {**own_method.layout(fresh.params), **params.get(path, {})}
        if fresh.buffers:
            buffers[path] = {**fresh.buffers, **buffers.get(path, {})}
    if not _torch.values_unknown():  # fa.save describes the leaves again
        config = own_method.describe(config, described)
    return Adapter(params, buffers, config)


def _adapters(adapters: Sequence[Adapter]) -> list[Adapter]:
    members = list(adapters)
    if not members:
        raise AdapterError("combine: there are no adapters.")
    for i, adapter in enumerate(members):
        if not isinstance(adapter, Adapter):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"combine: adapters[{i}] is a {type(adapter).__name__}, expected an Adapter.")
        if adapter.members is not None:
            raise AdapterError(f"combine: adapters[{i}] is a stack. Combine its members: fa.unstack(stack).")
    return members


def _weights(weights: Sequence[float | Tensor] | Tensor, count: int) -> list[float | Tensor]:
    if isinstance(weights, Tensor):
        if weights.ndim != 1:
            raise AdapterError(f"combine: weights of shape {tuple(weights.shape)}, expected ({count},).")
        weights = list(weights.unbind())
    values = list(weights)
    if len(values) != count:
        raise AdapterError(f"combine: {count} adapters and {len(values)} weights. There must be one for each.")
    for i, w in enumerate(values):
        if isinstance(w, Tensor):
            if w.ndim or w.is_complex():
                raise AdapterError(
                    f"combine: weights[{i}] has shape {tuple(w.shape)}, expected a number (a 0-d tensor)."
                )
        elif not isinstance(w, numbers.Real):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"combine: weights[{i}] is {w!r}, expected a number or a 0-d tensor.")
        elif not math.isfinite(w):
            raise AdapterError(f"combine: weights[{i}] is {w}, expected a finite number.")
    return [w if isinstance(w, Tensor) else float(w) for w in values]


def _is_one(w: float | Tensor) -> bool:
    return not isinstance(w, Tensor) and w == 1


def _one_method(members: Sequence[Adapter]) -> Method:
    method = method_of(members[0].config)
    for i, adapter in enumerate(members[1:], 1):
        other = method_of(adapter.config)
        if other is not method:
            raise AdapterError(
                f"combine: adapters[0] is {method.name}, adapters[{i}] is {other.name}. Combine adapters of one "
                "method; others compose in the call: fa.functional_call(model, {'a': a, 'b': b}, ...)."
            )
    return method


def _alone(method: str, cut: bool) -> str:
    """What a method is for one adapter: there is nothing to elect, and nothing to prune for."""
    if method in SPARSE:
        return "linear"
    if method in COMBINATIONS and method.endswith("svd"):
        return "svd" if cut else "cat"
    return method


def _check(
    method: str,
    name: str,
    svd_rank: int | None,
    svd_clamp: float | None,
    density: float | None,
    majority_sign_method: str,
) -> None:
    if method not in COMBINATIONS:
        raise AdapterError(f"Invalid combination_type: {method}.{did_you_mean(method, COMBINATIONS, 11)}")
    if svd_rank is not None and svd_rank < 1:
        raise AdapterError(f"combine: svd_rank must be positive, got {svd_rank}.")
    if svd_clamp is not None and not 0 <= svd_clamp <= 1:
        raise AdapterError(f"combine: svd_clamp is a quantile, in [0, 1], got {svd_clamp}.")
    if majority_sign_method not in SIGNS:
        raise RuntimeError(f"Unimplemented mask method {majority_sign_method!r}.{did_you_mean('', SIGNS)}")
    if name.removesuffix("_svd") not in SPARSE:
        return
    if density is None:
        raise AdapterError(f"combine: {method!r} needs a density, the fraction of values to keep, such as density=0.5.")
    if density < 0:
        raise AdapterError(f"Density should be >= 0, got {density}")
    if density > 1 or (density == 0 and "dare" in name):
        raise AdapterError(f"combine: density is a fraction{', above 0 for dare' * (not density)}, got {density}.")


def _base(model: nn.Module | None, path: str, config: Any, method: Method) -> Callable[[], Tensor]:
    def weight() -> Tensor:
        if model is None:
            raise AdapterError(
                f"combine: what {method.name} changes at {path!r} depends on the base weight, and so does this "
                "combination. Pass the model: model=model."
            )
        site, module = describe(model, path)
        return Layer(site, module, config).weight.detach()

    return weight
