"""Uni-LoRA: every number of every A and B is one of a few trained ones.

    y = W x + b + B A drop(x)        A = theta[indices_A] * scales_A,    B = theta[indices_B] * scales_B

Leaves: `unilora_theta_d` (d), shared by all layers and all that is trained. The constants of a layer are
`unilora_indices_A` (r, columns) and `unilora_indices_B` (out, r), which say where each number comes from, and
`unilora_scales_A` and `unilora_scales_B` in the same shapes: 1 / sqrt(how often that number is used). The base weight
is a matrix (out, columns) at every kind of layer: columns are inputs, at a convolution inputs of a group times kernel.
Init: theta uniform, not the identity. Indices from a generator seeded with `proj_seed`, every number used equally often
or once more, over the layers in model order, A before B: bit for bit PEFT's, though PEFT draws them with numpy. A
checkpoint only holds them with `save_indices=True`.
Cost: d parameters; LoRA's 2 r (columns + out) flops a token forward and twice that backward, and r (columns + out)
numbers looked up a call. Dense form: W + B A.

Source: "Uni-LoRA: One Vector Is All You Need", arXiv:2506.00799. Differs from PEFT: also on embeddings, convolutions
(grouped ones too), multi-head attention, plain parameters and experts; theta has the dtype of the base weight.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from funcadapt.config import AdapterConfig
from funcadapt.errors import SiteError
from funcadapt.layer import Layer, dropout
from funcadapt.method import Draw, Fresh, Leaf, Method, Shared, View, register
from funcadapt.parts.checks import check_common, check_layers, check_leaves, check_positive
from funcadapt.parts.forms import KINDS, add_product, add_products, columns, refuse_dropout
from funcadapt.parts.pcg64 import indices
from funcadapt.sites import Site

_OF_SITES: tuple[str, ...] = ("unilora_indices_A", "unilora_indices_B", "unilora_scales_A", "unilora_scales_B")


@dataclasses.dataclass(frozen=True, kw_only=True)
class UniLoraConfig(AdapterConfig):
    """Config of Uni-LoRA, with PEFT's fields.

    Attributes:
        r: the rank.
        proj_seed: the seed of the indices.
        theta_d_length: how many numbers are trained.
        target_modules: names, a regular expression, "all-linear", or None for the model type's default.
        unilora_dropout: dropout on the adapter's input, active when the layer is in training mode.
        fan_in_fan_out: PEFT's bookkeeping; the layer's type decides.
        bias: "none", "all" (train every bias of the model) or "unilora_only" (those of the adapted layers).
        modules_to_save: modules that are trained in full and saved with the adapter.
        init_theta_d_bound: the trained numbers start uniform between minus this and this.
        init_weights: whether they do; otherwise they start normal.
        save_indices: whether checkpoints hold indices and scales.
        layers_to_transform: indices of the layers to adapt.
        layers_pattern: the name of the layer list, with `layers_to_transform`.

    Raises:
        ValueError: if the values contradict each other.
    """

    peft_type: str = "UNILORA"
    r: int = 4
    proj_seed: int = 42
    theta_d_length: int = 256
    target_modules: Sequence[str] | str | None = None
    unilora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    modules_to_save: Sequence[str] | None = None
    init_theta_d_bound: float = 0.02
    init_weights: bool = True
    save_indices: bool = False
    layers_to_transform: Sequence[int] | int | None = None
    layers_pattern: Sequence[str] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_common(self)
        check_positive(self, "theta_d_length")
        check_layers(self, of_names=True)
        if self.proj_seed < 0:
            raise ValueError(f"`proj_seed` must not be negative, got {self.proj_seed}.")
        if self.init_theta_d_bound <= 0:
            raise ValueError(f"`init_theta_d_bound` should be a positive float, got {self.init_theta_d_bound}.")

    def rank(self, leaves: Mapping[str, Tensor]) -> int:
        """The rank of one site's leaves."""
        return leaves["unilora_indices_B"].shape[-1] if "unilora_indices_B" in leaves else 0


def init(site: Site, config: UniLoraConfig, draw: Draw, weight: Callable[[], Tensor]) -> Fresh:
    """Nothing: all that a site has depends on the others, see `share`."""
    refuse_dropout(site, "unilora_dropout", config.unilora_dropout)
    return Fresh({}, {})


def share(sites: Sequence[Site], config: UniLoraConfig, draw: Draw, weight: Callable[[Site], Tensor]) -> Shared:
    """The numbers, and the indices and scales of each site."""
    length, r = config.theta_d_length, config.r
    theta = draw.uniform(length, bound=config.init_theta_d_bound) if config.init_weights else draw.normal(length)
    shapes: list[tuple[int, ...]] = []
    for site in sites:
        lead = site.stack if site.experts > 1 else ()
        shapes += [(*lead, r, columns(site)), (*lead, site.out_features, r)]
    sizes = [torch.Size(shape).numel() for shape in shapes]
    if draw.generator is None and not draw.abstract:  # torch's own: PEFT draws indices that it then replaces
        for shape in shapes:
            torch.randint(length, shape)
    if draw.abstract:
        index, scale = torch.zeros(sum(sizes), dtype=torch.long, device=draw.device), draw.zeros(sum(sizes))
    else:
        drawn = indices(sum(sizes), length, config.proj_seed)
        scale = draw.cast(torch.bincount(drawn, minlength=length).float().rsqrt()[drawn])
        index = drawn.to(draw.device)
    parts: list[tuple[Tensor, Tensor]] = []
    start = 0
    for size, shape in zip(sizes, shapes, strict=True):
        own = (index.narrow(0, start, size), scale.narrow(0, start, size))
        parts.append((own[0].reshape(shape).clone(), own[1].reshape(shape).clone()))  # or each would keep all alive
        start += size
    at = {
        site.path: dict(zip(_OF_SITES, (a[0], b[0], a[1], b[1]), strict=True))
        for site, a, b in zip(sites, parts[::2], parts[1::2], strict=True)
    }
    return Shared({"unilora_theta_d": theta}, {}, at)


def _looked_up(p: Leaf, which: str, length: int, shape: tuple[int, ...]) -> Tensor:
    theta, index, scale = p["unilora_theta_d"], p[f"unilora_indices_{which}"], p[f"unilora_scales_{which}"]
    *lead, rows, inner = shape
    found = theta.reshape(*lead, length).gather(-1, index.reshape(*lead, rows * inner))
    return found.view(shape) * scale.reshape(shape).to(theta.dtype)


def factors(layer: Layer, p: Leaf, *lead: int) -> tuple[Tensor, Tensor]:
    """A (*lead, r, columns) and B (*lead, out, r)."""
    config: Any = layer.config
    r, length = p["unilora_indices_B"].shape[-1], config.theta_d_length
    a, b = (*lead, r, columns(layer.site)), (*lead, layer.site.out_features, r)
    return _looked_up(p, "A", length, a), _looked_up(p, "B", length, b)


def after(layer: Layer, p: Leaf, x: Tensor, y: Tensor) -> Tensor:
    """Y + B A drop(x)."""
    config: Any = layer.config
    if config.unilora_dropout:
        x = dropout(layer, x, config.unilora_dropout)
    return add_product(layer, x, y, *factors(layer, p))


def grouped(layer: Layer, p: Leaf, x: Tensor, y: Tensor) -> Any:
    """`after` for N adapters at once: leaves (N, ...), rows in N equal groups."""
    config: Any = layer.config
    if layer.site.kind not in ("linear", "hf_conv1d"):
        return NotImplemented
    if config.unilora_dropout:
        x = dropout(layer, x, config.unilora_dropout)
    return add_products(x, y, *factors(layer, p, p["unilora_theta_d"].shape[0]))


def weight(layer: Layer, p: Leaf, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """W + B A."""
    a, b = factors(layer, p)
    return (weight + (b @ a).reshape(layer.site.shape)).to(weight.dtype), bias


def with_rank(p: Leaf, rank: int, other: int) -> Leaf:
    """With scales of zero for more ranks, or with fewer of them."""
    more = other - rank
    padding = {"A": (0, 0, 0, more), "B": (0, more)}
    return {name: F.pad(leaf, padding[name[-1]]) if name in _OF_SITES else leaf for name, leaf in p.items()}


def check(config: UniLoraConfig, path: str, p: Leaf) -> None:
    """Theta; indices within it and scales, of the config's rank."""
    if not path:
        check_leaves(path, p, {"unilora_theta_d": (config.theta_d_length,)}, lead=False)
        return
    shapes: tuple[tuple[int | None, ...], ...] = ((config.r, None), (None, config.r)) * 2
    check_leaves(path, p, dict(zip(_OF_SITES, shapes, strict=True)))
    for name in _OF_SITES[:2]:
        index, last = p[name], config.theta_d_length - 1
        if index.dtype != torch.long or (index.numel() and not (index.min() >= 0 and index.max() <= last)):
            raise SiteError(f"The site {path!r} has {name} that are no indices from 0 to {last}.")


def stored(config: Any, path: str, p: Leaf) -> Mapping[str, Tensor | None]:
    """No indices where the config says so."""
    return dict.fromkeys(_OF_SITES) if path and not config.save_indices else {}


METHOD = register(
    Method(
        name="unilora",
        config=UniLoraConfig,
        kinds=KINDS,
        keys={name: name for name in _OF_SITES},
        shared={"unilora_theta_d": "unilora_theta_d"},
        constants=frozenset(_OF_SITES),
        init=init,
        share=share,
        complete=lambda config: config.save_indices,
        after=after,
        grouped=grouped,
        weight=weight,
        stored=stored,
        check=check,
        dropout=lambda config: config.unilora_dropout,
        reads=frozenset({"theta_d_length"}),
        with_rank=with_rank,
        view=View(
            package="unilora",
            name="UniLora",
            prefix="unilora_",
            label="unilora.",
            dropout="unilora_dropout",
            attributes={"r": "r"},
        ),
    )
)
