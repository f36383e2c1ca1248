"""Arrow's leaves beside the formula: the settings, how LoRAs become them, and what a file must hold.

The prototype of an expert is the top right singular vector of its B A: the direction that it amplifies most.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from funcadapt._torch import linalg
from funcadapt.errors import SiteError
from funcadapt.method import Leaf
from funcadapt.parts import lora_leaves
from funcadapt.parts.lora_variants import settings

if TYPE_CHECKING:
    from funcadapt.methods.lora import LoraConfig

LEAVES = A, B, GAINS, PROTOTYPES = "lora_arrow_A", "lora_arrow_B", "lora_arrow_gains", "lora_arrow_prototypes"
_STEPS, _EPS = 15, 1e-8


@dataclasses.dataclass(frozen=True)
class Settings:
    """What `arrow_config` holds."""

    top_k: int = 3
    router_temperature: float = 1.0
    use_gks: bool = False
    task_adapter_names: Sequence[str] | None = None
    gks_adapter_names: Sequence[str] | None = None
    rng_seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("top_k", "router_temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be greater than 0, got {getattr(self, name)}.")


def settings_of(config: Any) -> Settings:
    """The settings of an Arrow adapter."""
    return settings(Settings, config.arrow_config or {}, "arrow_config")


def prototypes(a: Tensor, b: Tensor, rng_seed: int | None = None) -> Tensor:
    """The top right singular vector of B A, up to its sign.

    Args:
        a: (..., r, in).
        b: (..., out, r).
        rng_seed: if given, PEFT's approximation of it.

    Returns:
        (..., in), of length 1, in a's dtype.
    """
    wide = torch.promote_types(a.dtype, torch.float32)
    if rng_seed is None:
        q, right = linalg.qr(a.to(wide).transpose(-2, -1))
        left = linalg.qr(b.to(wide))[1]
        return (q @ linalg.svd(left @ right.transpose(-2, -1))[2][..., :1, :].transpose(-2, -1)).squeeze(-1).to(a.dtype)
    a32, b32 = a.float(), b.float()
    gram = b32.transpose(-2, -1) @ b32
    v = torch.randn(a.shape[-1], generator=torch.Generator().manual_seed(rng_seed)).to(a.device)
    v = (v / (linalg.vector_norm(v) + _EPS)).expand(*a.shape[:-2], a.shape[-1]).unsqueeze(-1)
    for _ in range(_STEPS):
        w = a32.transpose(-2, -1) @ (gram @ (a32 @ v))
        v = w / (torch.sqrt(w.square().sum(-2, keepdim=True)) + _EPS)
    return v.squeeze(-1).to(a.dtype)


def without_general(leaves: Leaf, general: Sequence[Leaf]) -> Leaf:
    """GenKnowSub at one site: the mean of general adapters subtracted, of A and of B each.

    Args:
        leaves: LoRA's leaves.
        general: those of the general adapters, of the same rank.

    Returns:
        The leaves of the same adapters without what is general.
    """
    mean = {name: torch.stack([p[name] for p in general]).mean(0) for name in ("lora_A", "lora_B")}
    return {name: leaf - mean[name] if name in mean else leaf for name, leaf in leaves.items()}


def stacked(leaves: Sequence[Leaf], scaling: float, rng_seed: int | None = None) -> dict[str, Tensor]:
    """The leaves of one site of an Arrow adapter.

    Args:
        leaves: LoRA's leaves of each expert, all of one rank.
        scaling: the router's scaling, of which the gains are multiples.
        rng_seed: if given, the prototypes are PEFT's.

    Returns:
        All leaves but the scaling.
    """
    a, b = (torch.stack([p[name] for p in leaves]) for name in ("lora_A", "lora_B"))
    scalings = torch.stack([p["scaling"] for p in leaves])
    # in float64: the quotient of equal numbers is 1
    gains = (scalings.double() / scaling).to(device=a.device, dtype=a.dtype)
    return {A: a, B: b, GAINS: gains, PROTOTYPES: prototypes(a.detach(), b.detach(), rng_seed)}


def describe(config: Any, leaves: Mapping[str, Leaf]) -> Any:
    """The config that the leaves say, as LoRA's."""
    one = {path: {"lora_A": p[A][0], "lora_B": p[B][0], "scaling": p["scaling"]} for path, p in leaves.items()}
    return lora_leaves.describe(config, one)


def check(config: LoraConfig, path: str, p: Leaf) -> None:
    """Four leaves that fit each other, of as many experts as have names."""
    for name in LEAVES:
        if name not in p:
            raise SiteError(f"The site {path!r} lacks {name!r}. (PEFT's checkpoints of an arrow_router lack experts.)")
    a, b, n = p[A].shape, p[B].shape, len(settings_of(config).task_adapter_names or ())
    fits = len(a) == len(b) == 3 and a[:2] == (n, config.r) and (b[0], b[2]) == (n, config.r)
    if not fits or p[GAINS].shape != (n,) or p[PROTOTYPES].shape != (n, a[2]):
        raise SiteError(
            f"The site {path!r} has A of shape {tuple(a)}, B {tuple(b)}, gains {tuple(p[GAINS].shape)} and prototypes "
            f"{tuple(p[PROTOTYPES].shape)}; its config says {n} experts of rank {config.r}."
        )
