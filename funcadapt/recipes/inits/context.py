"""CorDA: the factors of LoRA are the part of the weight that matters most, or least, for given inputs.

    C = mean of X^T X,   U S V^T = svd(W (C + d I)),   A = (S / s)^(1/2) V^T (C + d I)^-1,   B = U (S / s)^(1/2)

of the r largest singular values ("ipm", for learning the task of the inputs) or the r smallest ("kpm", for keeping what
they need); s B A is taken out of W. d is 0.01 times the mean of C's diagonal, doubled until C + d I can be inverted.

Source: Yang et al. 2024, arXiv:2406.05223. Differs from PEFT: needs no undeclared package, leaves the model as it is;
inputs are scaled by their largest absolute value, not by the absolute value of the largest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

import funcadapt as fa
from funcadapt._torch import linalg
from funcadapt.errors import AdapterError
from funcadapt.parts.lora_variants import settings
from funcadapt.recipes.inits.common import Forward, Rows, flat, linear_sites, watch, weight_of, with_factors


@dataclasses.dataclass(frozen=True)
class Settings:
    """What `corda_config` holds. Only the method matters here: there are no files, and nothing is left to prune."""

    cache_file: str | None = None
    covariance_file: str | None = None
    corda_method: str = "ipm"
    verbose: bool = False
    use_float16_for_covariance: bool = False
    prune_temporary_fields: bool = True

    def __post_init__(self) -> None:
        if self.corda_method not in ("ipm", "kpm"):
            raise ValueError(f"Invalid corda_method: {self.corda_method!r}, it should be 'ipm' or 'kpm'.")


def covariance(x: Tensor) -> Tensor:
    """X^T X of inputs that are scaled to 1, (in, in), in at least float32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    largest = wide.abs().max()
    wide = wide / torch.where(largest == 0, 1.0, largest)
    return wide.T @ wide


def decomposed(weight: Tensor, moments: Tensor, r: int, scaling: float, method: str = "ipm") -> tuple[Tensor, Tensor]:
    """CorDA's factors of one weight.

    Args:
        weight: (out, in).
        moments: C, (in, in).
        r: the rank.
        scaling: the scaling.
        method: "ipm" or "kpm".

    Returns:
        A (r, in) and B (out, r).

    Raises:
        AdapterError: if C is not finite.
    """
    if not moments.isfinite().all():
        raise AdapterError("CorDA: the inputs of a layer are not finite.")
    eye, damp = torch.eye(moments.shape[0], dtype=moments.dtype, device=moments.device), 0.01
    while True:
        fixed = moments + eye * (moments.diagonal().mean().clamp(min=1e-30) * damp)
        inverse = linalg.inv(fixed)
        if torch.dist(fixed @ inverse, eye) < 0.05:
            break
        damp *= 2
    u, s, vh = linalg.svd(weight.to(fixed) @ fixed, full_matrices=False)
    kept = slice(r) if method == "ipm" else slice(s.shape[0] - r, None)
    root = (s[kept] / scaling).sqrt()
    return root[:, None] * (vh[kept] @ inverse), u[:, kept] * root


def corda(
    model: nn.Module,
    config: Any,
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    rows: Rows = flat,
    seed: int = 0,
) -> tuple[fa.Adapter, dict[str, Tensor]]:
    """A LoRA with CorDA's init, and the base weights that go with it.

    Args:
        model: the model, not changed.
        config: the config; `corda_config` says the method.
        batches: what the model is called with.
        forward: (model, batch): calls the model.
        rows: (input, batch, path) -> the rows of a layer's input that count.
        seed: as of `fa.init`.

    Returns:
        The adapter, and the corrected base weights by name.

    Raises:
        AdapterError: if a layer saw no input.

    Example:
        >>> import torch
        >>> import funcadapt as fa
        >>> from funcadapt.recipes.inits import corda
        >>> model, x = torch.nn.Sequential(torch.nn.Linear(6, 4)), torch.randn(20, 6)
        >>> adapter, base = corda(model, fa.LoraConfig(r=2, target_modules=["0"]), [x])
        >>> torch.allclose(fa.functional_call(model, adapter, x, parameters=base), model(x), atol=1e-5)
        True
    """
    given = settings(Settings, config.corda_config or {}, "corda_config")
    config = dataclasses.replace(config, init_lora_weights="corda")
    sites = linear_sites(model, config, "CorDA")
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def see(path: str, x: Tensor, batch: Any) -> None:
        found = covariance(rows(x, batch, path))
        sums[path] = sums[path] + found if path in sums else found
        counts[path] = counts.get(path, 0) + 1

    watch(model, sites, batches, see, forward)
    factors: dict[str, dict[str, Tensor]] = {}
    for site in sites:
        if site.path not in sums:
            raise AdapterError(f"CorDA: the layer {site.path!r} was never called.")
        at = config.at(site.path)
        scaling = float(fa.method_of(at).buffers(at)["scaling"])
        moments = sums[site.path] / counts[site.path]
        a, b = decomposed(weight_of(model, site, at), moments, at.r, scaling, given.corda_method)
        factors[site.path] = {"lora_A": a, "lora_B": b}
    return with_factors(model, config, factors, seed)
