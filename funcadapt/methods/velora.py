"""VeLoRA: LoRA that trains on compressed inputs, so that the inputs need not be kept for the backward pass.

    y = W x + b + s * B A drop(x)            as LoRA
    dA = s * (B^T dy) z^T (x) c e            in training: of each input, G numbers z_g = <x_g, e> are kept

The input is cut into G groups of d = ceil(in / G) numbers (`num_groups`), and e (d), of norm 1, is one direction for
all of them; c is `scale`. By the formula, without a function of its own for the backward pass:

    h = A' x + (E - E') z,        E (r, G) = c * A e group by group,        a prime: a constant for the gradient

so that forward mode, vmap and second derivatives follow. `init_type` says what e is in training: the direction of the
mean of the groups of this very input ("batch_average"), of the first one that was observed ("batch_average_once", see
`observe`), or a random one.
Leaves: LoRA's, and the constant `lora_velora_embed` (d), zero where nothing was observed.
Init: LoRA's: the identity. Cost: LoRA's; G numbers a token are kept instead of in, for 2 in + 2 r G flops a token.
Dense form: LoRA's.

Source: Miles et al. 2024, arXiv:2405.17991. Differs from PEFT: also on convolutions, whose channels are cut; the
embed that is held does not change in a call, but by `observe`. In `fa.grouped` each adapter has its own mean, in
`fa.routed` each run of rows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funcadapt._torch import in_functorch, linalg
from funcadapt.errors import SiteError
from funcadapt.layer import Layer, dropout
from funcadapt.method import Draw, Fresh, Leaf, Method, register
from funcadapt.methods import lora
from funcadapt.parts import lora_forms, lora_inits
from funcadapt.parts.lora_variants import asks, setting, settings
from funcadapt.sites import Site

if TYPE_CHECKING:
    from funcadapt.adapter import Adapter

EMBED = "lora_velora_embed"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What `velora_config` holds."""

    num_groups: int = 64
    scale: float = 1.0
    init_type: str = "batch_average"

    def __post_init__(self) -> None:
        if self.num_groups < 1:
            raise ValueError(f"`num_groups` must be a positive integer, got {self.num_groups}.")
        if not 0 < self.scale < math.inf:
            raise ValueError(f"`scale` must be a positive number, got {self.scale}.")
        known = ("batch_average_once", "batch_average", "random")
        if self.init_type not in known:
            raise ValueError(f"Unsupported `init_type` {self.init_type!r}. It is one of {known}.")


def _settings(config: Any) -> Settings:
    return settings(Settings, config.velora_config or {}, "velora_config")


def _check_config(config: lora.LoraConfig) -> None:
    _settings(config)


def _width(features: int, groups: int) -> int:
    return -(-features // groups)


def grouped_inputs(x: Tensor, groups: int) -> Tensor:
    """(..., in) -> (..., G, d), with zeros at the end."""
    width = _width(x.shape[-1], groups)
    missing = groups * width - x.shape[-1]
    return (F.pad(x, (0, missing)) if missing else x).reshape(*x.shape[:-1], groups, width)


def direction(x: Tensor, groups: int) -> Tensor:
    """The direction of the mean group of an input, in at least float32.

    Args:
        x: (..., in).
        groups: how many groups there are.

    Returns:
        (d), of norm 1; that of all ones if the mean is zero.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    mean = grouped_inputs(x.detach(), groups).flatten(0, -2).mean(0).to(wide)
    norm: Tensor = linalg.vector_norm(mean)
    nothing = norm == 0
    return torch.where(nothing, mean.shape[0] ** -0.5, mean / torch.where(nothing, 1.0, norm))


def init(site: Site, config: lora.LoraConfig, draw: Draw, weight: Callable[[], Tensor]) -> Fresh:
    """LoRA's leaves, and the direction: random, or zero."""
    params, buffers = lora.init(site, config, draw, weight)
    found = _settings(config)
    width = _width(site.in_features, found.num_groups)
    embed = draw.zeros(width)
    if found.init_type == "random" and not draw.abstract:
        drawn = lora_inits.like_base(site, draw, width)
        embed = draw.cast(drawn / linalg.vector_norm(drawn))
    return Fresh(params, {**buffers, EMBED: embed})


def _direction_of(config: Any, p: Leaf, x: Tensor) -> Tensor:
    groups = setting(Settings, config.velora_config, "num_groups")
    how = setting(Settings, config.velora_config, "init_type")
    held = p[EMBED].reshape(_width(x.shape[-1], groups))
    if how == "random":
        return held
    of_input = direction(x, groups).to(held.dtype)
    if how == "batch_average":
        return of_input
    return torch.where(held.abs().sum() == 0, of_input, held)


def after(layer: Layer, p: Leaf, x: Tensor, y: Tensor) -> Tensor:
    """Y + s * B A drop(x); in training the gradient of A is that of the compressed input."""
    config: Any = layer.config
    x = dropout(layer, x, config.lora_dropout).to(p["lora_A"].dtype)
    if not (layer.training and (torch.is_grad_enabled() or in_functorch())):  # the values are LoRA's
        return lora_forms.add_delta(layer, p, x, y).to(y.dtype)
    a, given = p["lora_A"], config.velora_config
    groups, scale = setting(Settings, given, "num_groups"), setting(Settings, given, "scale")
    conv = layer.site.kind not in lora_forms.PRODUCTS
    last = x.detach().movedim(1, -1) if conv else x.detach()
    e = _direction_of(config, p, last).to(x.dtype)
    z = grouped_inputs(last, groups) @ e
    if conv:
        z = z.movedim(-1, 1)
    short = grouped_inputs(a.movedim(1, -1), groups) @ (scale * e)
    short = short.movedim(-1, 1)
    # the second product is zero, but for its gradient; with A a constant, torch does not keep x
    h = layer.linear(x, a.detach()) + layer.linear(z, short - short.detach())
    delta = layer.pointwise(h * p["scaling"], p["lora_B"])
    if "lora_B_bias" in p:
        delta = delta + layer.per_output(p["lora_B_bias"] * p["scaling"])
    return (y + delta).to(y.dtype)


def observe(model: nn.Module, adapter: Adapter, args: Any, kwargs: Mapping[str, Any] | None = None) -> Adapter:
    """The adapter with the directions of the inputs that its sites get in one call, which PEFT writes in training.

    Args:
        model: the model, not changed.
        adapter: the adapter, which acts in the call.
        args: as of `fa.functional_call`.
        kwargs: likewise.

    Returns:
        The adapter with other `lora_velora_embed`. Where the init is "random", or "batch_average_once" and done, it
        stays.

    Example:
        >>> import torch
        >>> import funcadapt as fa
        >>> from funcadapt.methods.velora import observe
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> config = fa.LoraConfig(r=2, target_modules=["0"], velora_config={"num_groups": 2})
        >>> adapter = observe(model, fa.init(model, config), (torch.tensor([[3.0, 4.0, 0.0, 0.0]]),))
        >>> adapter.buffers["0"]["lora_velora_embed"]
        tensor([0.6000, 0.8000])
    """
    from funcadapt.activations import inputs_of  # it builds on the engine

    buffers = {path: dict(leaves) for path, leaves in adapter.buffers.items()}

    def see(path: str, x: Tensor) -> None:
        held = buffers[path][EMBED]
        last = x.movedim(1, -1) if adapter.params[path]["lora_A"].ndim > 2 else x
        buffers[path][EMBED] = _direction_of(adapter.config, {EMBED: held}, last).to(held)

    sites = [path for path, leaves in buffers.items() if EMBED in leaves]
    inputs_of(model, sites, see, args, kwargs, adapter=adapter)
    return adapter.replace(buffers=buffers)


def check(config: lora.LoraConfig, path: str, p: Leaf) -> None:
    """LoRA's leaves, and a direction."""
    lora.check(config, path, {name: leaf for name, leaf in p.items() if name != EMBED})
    if EMBED not in p or p[EMBED].ndim != 1:
        raise SiteError(f"The site {path!r} lacks {EMBED!r}, a vector.")


METHOD = register(
    Method(
        name="velora",
        config=lora.LoraConfig,
        when=asks("velora_config", check=_check_config),
        kinds=frozenset({"linear", "hf_conv1d", "conv1d", "conv2d", "conv3d"}),
        keys={**lora.METHOD.keys, EMBED: EMBED},
        init=init,
        constants=frozenset({EMBED}),
        after=after,
        weight=lora.weight,
        buffers=lora.buffers,
        describe=lora.describe,
        check=check,
        layout=lora.layout,
        residual=lora.residual,
        dropout=lora.METHOD.dropout,
        reads=frozenset({"velora_config"}),
        with_rank=lora.with_rank,
        neutral=lora.neutral,
        view=lora.VIEW,
    )
)
