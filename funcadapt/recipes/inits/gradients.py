"""LoRA-GA: the first step of the training of A and B goes where that of the weight would.

With U S V^T the SVD of the mean gradient of W (its 2 r largest singular values):

    ArB2r    A = V^T[:r],      B = U[:, r:2r] S        A2rBr    A = V^T[r:2r],   B = U[:, :r] S
    ArBr     A = V^T[1::2],    B = U[:, 0::2] S        random   r of them

times a number that `scale` says; s B A is taken out of W.

    stable   B * out^(1/4) / stable_gamma^(1/2)        weight_svd   B, to the size of W's largest singular value
    gd_scale A / s, B / s                              unit         nothing

Source: Wang et al. 2024, arXiv:2407.05000. Differs from PEFT: the model and its `.grad` stay as they are, `out` is that
of transformers' Conv1D, too, and a layer that is too small for the directions is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

import funcadapt as fa
from funcadapt._torch import fork_rng
from funcadapt.errors import AdapterError, SiteError
from funcadapt.parts.lora_variants import settings
from funcadapt.recipes.inits.common import linear_sites, weight_of, with_factors

DIRECTIONS = ("ArBr", "A2rBr", "ArB2r", "random")
SCALES = ("stable", "weight_svd", "gd_scale", "unit")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What `lora_ga_config` holds."""

    direction: str = "ArB2r"
    scale: str = "stable"
    stable_gamma: int = 16

    def __post_init__(self) -> None:
        for name, known in (("direction", DIRECTIONS), ("scale", SCALES)):
            if getattr(self, name) not in known:
                raise ValueError(f"`{name}` must be one of {', '.join(known)}, got {getattr(self, name)!r}.")


def _loss_of(output: Any, batch: Any) -> Tensor:
    return output.loss


def gradients(
    model: nn.Module, names: Iterable[str], batches: Iterable[Any], loss: Callable[[Any, Any], Tensor] = _loss_of
) -> dict[str, Tensor]:
    """The mean gradient of weights over batches. Neither the model nor any `.grad` changes.

    Args:
        model: the model.
        names: the names of the weights.
        batches: what the model is called with.
        loss: (output, batch) -> a number; by default the output's `loss`.

    Returns:
        Name -> gradient.

    Raises:
        AdapterError: if there is no batch, or a weight did not take part.
    """
    own = dict(model.named_parameters())
    live = {name: own[name].detach().clone().requires_grad_() for name in names}
    frozen = {name: p.detach() for name, p in own.items() if name not in live}
    sums: dict[str, Tensor] = {}
    count = 0
    for batch in batches:
        named, several = isinstance(batch, dict), isinstance(batch, tuple)
        args: Any = () if named else batch if several else (batch,)
        kwargs: Any = batch if named else {}
        with torch.enable_grad():
            output = torch.func.functional_call(model, {**frozen, **live}, args, kwargs)
            found: Any = torch.autograd.grad(loss(output, batch), list(live.values()), allow_unused=True)
        for name, g in zip(live, found, strict=True):
            if g is None:
                raise AdapterError(f"LoRA-GA: the loss does not depend on {name!r}.")
            sums[name] = sums[name] + g if name in sums else g
        count += 1
    if not count:
        raise AdapterError("LoRA-GA: there are no batches.")
    return {name: g / count for name, g in sums.items()}


def decomposed(
    gradient: Tensor, weight: Tensor, r: int, scaling: float, given: Settings, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """LoRA-GA's factors of one weight.

    Args:
        gradient: (out, in).
        weight: (out, in).
        r: the rank.
        scaling: the scaling.
        given: the direction and the scale.
        seed: of the approximate SVD.

    Returns:
        A (r, in) and B (out, r), in at least float32.
    """
    wide = torch.promote_types(gradient.dtype, torch.float32)
    with fork_rng(devices=[]):
        torch.manual_seed(seed)  # pyright: ignore[reportUnknownMemberType]
        u, s, v = torch.svd_lowrank(gradient.to(wide), q=min(4 * r, *gradient.shape), niter=4)
        some = torch.randperm(2 * r)[:r]
        spectrum = torch.svd_lowrank(weight.to(wide), q=r, niter=4)[1] if given.scale == "weight_svd" else s
    of_a, of_b = {
        "ArBr": (slice(1, 2 * r, 2), slice(0, 2 * r, 2)),
        "A2rBr": (slice(r, 2 * r), slice(0, r)),
        "ArB2r": (slice(0, r), slice(r, 2 * r)),
        "random": (some, some),
    }[given.direction]
    a, b = v.T[of_a], u[:, of_b] * s[of_b]
    if given.scale == "stable":
        b = b * (weight.shape[0] ** 0.25 / given.stable_gamma**0.5)
    elif given.scale == "weight_svd" and s[of_b][0] > 0:
        b = b * (spectrum[0] / s[of_b][0])
    elif given.scale == "gd_scale":
        a, b = a / scaling, b / scaling
    return a, b


def lora_ga(
    model: nn.Module,
    config: Any,
    batches: Iterable[Any],
    loss: Callable[[Any, Any], Tensor] = _loss_of,
    *,
    seed: int = 0,
) -> tuple[fa.Adapter, dict[str, Tensor]]:
    """A LoRA with LoRA-GA's init, and the base weights that go with it.

    Args:
        model: the model, not changed. It is called in the mode that it is in.
        config: the config; `lora_ga_config` says the direction and the scale.
        batches: what the model is called with.
        loss: (output, batch) -> a number; by default the output's `loss`.
        seed: as of `fa.init`; also of the approximate SVDs.

    Returns:
        The adapter, and the corrected base weights by name.

    Raises:
        SiteError: if a layer is smaller than 2 r.

    Example:
        >>> import torch
        >>> import funcadapt as fa
        >>> from funcadapt.recipes.inits import lora_ga
        >>> model, x = torch.nn.Sequential(torch.nn.Linear(6, 4)), torch.randn(20, 6)
        >>> config = fa.LoraConfig(r=2, target_modules=["0"])
        >>> adapter, base = lora_ga(model, config, [x], lambda y, batch: y.square().mean())
        >>> torch.allclose(fa.functional_call(model, adapter, x, parameters=base), model(x), atol=1e-5)
        True
    """
    given = settings(Settings, config.lora_ga_config or {}, "lora_ga_config")
    config = dataclasses.replace(config, init_lora_weights="lora_ga")
    sites = linear_sites(model, config, "LoRA-GA")
    found = gradients(model, [site.weight_name for site in sites], batches, loss)
    factors: dict[str, dict[str, Tensor]] = {}
    for site in sites:
        at = config.at(site.path)
        if 2 * at.r > min(site.shape):
            raise SiteError(f"LoRA-GA needs 2 r <= {min(site.shape)} at {site.path!r}, got r={at.r}.")
        gradient = found[site.weight_name]
        gradient = gradient.T if site.transposed else gradient
        scaling = float(fa.method_of(at).buffers(at)["scaling"])
        a, b = decomposed(gradient, weight_of(model, site, at), at.r, scaling, given, seed)
        factors[site.path] = {"lora_A": a, "lora_B": b}
    return with_factors(model, config, factors, seed)
