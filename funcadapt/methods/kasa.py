"""KaSA: LoRA in the form of an SVD, on a base weight without its r smallest singular values.

    y = (W - U S V^T) x + b + s * B (d * A drop(x))        U S V^T: the part of W of its r smallest singular values

Leaves: LoRA's, and `lora_diag` (r), the singular values of the update. The part of W that is left out follows from W:
`noise_A` = V^T (r, in) and `noise_B` = U S (out, r), in no checkpoint.
Init: A and B as in LoRA, d normal. B is zero, but the output is that of the truncated weight, not the base model's.
Cost: r (in + out + 1) parameters a layer are trained; twice LoRA's flops forward, and LoRA's own backward, with r (in +
out) flops more for the gradient of the input. An SVD of W at the start.
Dense form: W - U S V^T + s * B diag(d) A.
`penalty` is what the paper adds to the loss: beta * |d|^2 + gamma * (|B^T B - I| + |A A^T - I|), summed over layers.

Source: Wang et al. 2024, arXiv:2412.06071. Differs from PEFT, which truncates the model's weights in place: here the
model stays as it is, the part is subtracted from the output, and adapters of other methods or ranks see the whole
weight. (Two KaSAs at once subtract it twice.) Also on every other kind of layer but grouped convolutions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from funcadapt._torch import linalg
from funcadapt.errors import SiteError
from funcadapt.layer import Layer, dropout
from funcadapt.method import Draw, Fresh, Leaf, Method, register
from funcadapt.methods import lora
from funcadapt.parts import lora_forms, lora_inits, lora_view, lowrank
from funcadapt.parts.forms import KINDS
from funcadapt.parts.lora_variants import asks, check_init, settings
from funcadapt.sites import Site

if TYPE_CHECKING:
    from funcadapt.adapter import Adapter

NOISE_A, NOISE_B, DIAGONAL = "noise_A", "noise_B", "lora_diag"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What `kasa_config` holds: the weights of the two parts of `penalty`."""

    beta: float = 1e-4
    gamma: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("beta", "gamma"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` must be non-negative, got {getattr(self, name)}.")


def _check_config(config: lora.LoraConfig) -> None:
    settings(Settings, config.kasa_config or {}, "kasa_config")
    check_init(config, "orthogonal")


def init(site: Site, config: lora.LoraConfig, draw: Draw, weight: Callable[[], Tensor]) -> Fresh:
    """LoRA's leaves, and a diagonal of normal numbers."""
    if site.groups > 1:
        raise SiteError(f"KaSA cannot adapt the grouped convolution {site.path!r}. Exclude it.")
    smaller = min(site.out_features, math.prod(site.shape[1:]))
    if config.r >= smaller:
        raise SiteError(
            f"KaSA requires `r` ({config.r}) to be smaller than min(in_features, out_features) ({smaller}) at "
            f"{site.path!r}, so that something of the weight is left."
        )
    params, buffers = lora.init(site, config, draw, weight)
    return Fresh({**params, DIAGONAL: lora_inits.like_base(site, draw, config.r)}, buffers)


def noise(weight: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """The part of a matrix of its r smallest singular values, as factors in at least float32.

    Args:
        weight: (out, in).
        r: how many.

    Returns:
        V^T (r, in) and U S (out, r).
    """
    u, s, vh = linalg.svd(weight.to(torch.promote_types(weight.dtype, torch.float32)), full_matrices=False)
    return vh[-r:], u[:, -r:] * s[-r:]


def derive(site: Site, config: lora.LoraConfig, draw: Draw, weight: Callable[[], Tensor]) -> dict[str, Tensor]:
    """The part of the weight that is left out, in the shapes of LoRA's factors."""
    shape_a = (config.r, *site.shape[1:])
    shape_b = (site.out_features, config.r, *(1,) * (len(site.shape) - 2))
    if draw.abstract:
        return {NOISE_A: draw.zeros(*shape_a), NOISE_B: draw.zeros(*shape_b)}
    a, b = noise(weight().detach().reshape(site.out_features, -1), config.r)
    return {NOISE_A: draw.cast(a.reshape(shape_a)), NOISE_B: draw.cast(b.reshape(shape_b))}


def _updates(layer: Layer, p: Leaf) -> tuple[Leaf, Leaf]:
    """What is added and what is left out, both as the leaves of a LoRA."""
    name_a, name_b = lowrank.factor_names(p)
    a, diagonal = p[name_a], p[DIAGONAL]
    # one number for each rank, in the place of the scaling
    diagonal = diagonal.reshape(a.shape[0], *(1,) * (a.ndim - 2)) * p["scaling"]
    added = {name: p[name] for name in (name_a, name_b, "lora_B_bias") if name in p}
    if "lora_B_bias" in p:
        added = {**added, name_a: a * (diagonal / p["scaling"]).reshape(-1, *(1,) * (a.ndim - 1))}
        diagonal = p["scaling"]
    minus = -torch.ones((), dtype=p[NOISE_A].dtype, device=a.device)
    return {**added, "scaling": diagonal}, {name_a: p[NOISE_A], name_b: p[NOISE_B], "scaling": minus}


def after(layer: Layer, p: Leaf, x: Tensor, y: Tensor) -> Tensor:
    """Y - U S V^T x + s * B (d * A drop(x))."""
    config: Any = layer.config
    added, left_out = _updates(layer, p)
    out = lora_forms.add_delta(layer, left_out, x, y)
    return lora_forms.add_delta(layer, added, dropout(layer, x, config.lora_dropout), out).to(y.dtype)


def weight(layer: Layer, p: Leaf, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """W - U S V^T + s * B diag(d) A."""
    added, left_out = _updates(layer, p)
    if added["scaling"].ndim:
        added = {**added, "scaling": added["scaling"].flatten()}
    merged, bias = lora.weight(layer, added, weight, bias)
    return (merged + lora_forms.delta_weight(layer, left_out)).to(weight.dtype), bias


def check(config: lora.LoraConfig, path: str, p: Leaf) -> None:
    """LoRA's leaves, and a diagonal of the same rank."""
    if DIAGONAL not in p:
        raise SiteError(f"The site {path!r} lacks {DIAGONAL!r}.")
    lora.check(config, path, {name: leaf for name, leaf in p.items() if name != DIAGONAL})
    if p[DIAGONAL].shape[-1:] != (config.r,):
        raise SiteError(f"The site {path!r} has {DIAGONAL} of shape {tuple(p[DIAGONAL].shape)}, expected {config.r}.")


def site_penalty(config: lora.LoraConfig, p: Leaf) -> Tensor:
    """The penalty of one site: of the sum over its experts, if there are some."""
    weights = settings(Settings, config.kasa_config or {}, "kasa_config")
    a, b, _ = lowrank.factors(p)
    d = p[DIAGONAL]
    experts = d.ndim > 1
    a, b = (t.reshape(*t.shape[: 1 + experts], -1) for t in (a, b))
    wide = torch.promote_types(d.dtype, torch.float32)
    a, b, d = a.to(wide), b.to(wide), d.to(wide)
    eye = torch.eye(d.shape[-1], dtype=wide, device=d.device)
    off: Tensor = linalg.matrix_norm(b.mT @ b - eye) + linalg.matrix_norm(a @ a.mT - eye)
    return weights.beta * d.square().sum() + weights.gamma * off.sum()


def penalty(adapter: Adapter) -> Tensor:
    """What KaSA adds to the loss of a model, the sum over its layers.

    Args:
        adapter: the adapter.

    Returns:
        0-d.

    Example:
        >>> import torch
        >>> import funcadapt as fa
        >>> from funcadapt.methods.kasa import penalty
        >>> config = fa.LoraConfig(r=2, target_modules=["0"], kasa_config={"beta": 1.0, "gamma": 0.0})
        >>> adapter = fa.init(torch.nn.Sequential(torch.nn.Linear(4, 3)), config)
        >>> torch.equal(penalty(adapter), adapter.params["0"]["lora_diag"].square().sum())
        True
    """
    config: Any = adapter.config
    every = [site_penalty(config, adapter.leaves(path)) for path, p in adapter.params.items() if DIAGONAL in p]
    return torch.stack(every).sum() if every else torch.zeros(())


def _get_kasa_loss(tuner: Any, adapter_names: str | Sequence[str] | None = None) -> Any:
    """PEFT's name for `penalty`, of the live layers; 0.0 if there are none."""
    from funcadapt.view.walking import layers  # it builds on this file

    names = tuner.active_adapters if adapter_names is None else adapter_names
    total: Any = 0.0
    for _, layer in layers(tuner.model):
        for name in (names,) if isinstance(names, str) else names:
            held = layer.adapters.get(name)
            if held is not None and held.method is METHOD:
                config: Any = held.config
                total = total + site_penalty(config, layer.leaves(name))
    return total


lora_view.TUNER["_get_kasa_loss"] = _get_kasa_loss

METHOD = register(
    Method(
        name="kasa",
        config=lora.LoraConfig,
        when=asks("kasa_config", check=_check_config),
        kinds=KINDS,
        keys={**lora.METHOD.keys, DIAGONAL: DIAGONAL},
        init=init,
        derive=derive,
        after=after,
        weight=weight,
        buffers=lora.buffers,
        describe=lora.describe,
        check=check,
        dropout=lora.METHOD.dropout,
        reads=frozenset(),
        neutral=lora.neutral,
        view=lora.VIEW,
    )
)
