"""TinyLoRA: between the largest singular directions of W, an r x r matrix that is made from a few numbers.

    y = W x + b + B R A drop(x)        R = sum_i v_i P_i,    W = U S V^T,    A = sqrt(S) V^T,  B = U sqrt(S), cut to r

Leaves: `tinylora_v.0`, `tinylora_v.1`, ... (u each), shared by groups of consecutive layers and all that is trained;
the constants `tinylora_A` (r, columns), `tinylora_B` (out, r) and `tinylora_P` (u, r, r) of each layer. The leaf
`tinylora_group_3` of a layer says by its name that v number 3 is its own. The base weight is a matrix (out, columns) at
every kind of layer: columns are inputs, at a convolution inputs of a group times kernel. An embedding's weight is
(vocabulary, width), as torch stores it: y = W[i] + B[i] R A.
Groups: n layers have max(1, round(n (1 - weight_tying))) of them, so that each has its own v by default.
Init: v zero, the identity. P normal with deviation 1 / sqrt(r), from a generator seeded with `projection_seed` plus
the layer's number: bit for bit PEFT's. With `save_projection=False` no checkpoint holds P.
Cost: u parameters a group; 2 r (columns + out) flops a token forward and as many backward, as A and B have no gradient,
and 2 u r^2 a call. Dense form: W + B R A.

Source: "Learning to Reason in 13 Parameters", arXiv:2602.04118. Differs from PEFT: also on convolutions (grouped ones
too), multi-head attention, plain parameters and experts (of one parameter all share v); no dropout at embeddings; with
`init_weights=False`, where PEFT leaves v as memory was, it is zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from funcadapt._torch import linalg
from funcadapt.config import AdapterConfig
from funcadapt.errors import SiteError
from funcadapt.layer import Layer, dropout
from funcadapt.method import Draw, Fresh, Leaf, Method, Shared, View, register
from funcadapt.parts.checks import check_common, check_leaves, check_positive
from funcadapt.parts.forms import KINDS, add_product, add_products, columns, refuse_dropout
from funcadapt.sites import Site

_V, _GROUP = "tinylora_v.", "tinylora_group_"
_ATTRIBUTES = {"r": "r", "u": "u"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TinyLoraConfig(AdapterConfig):
    """Config of TinyLoRA, with PEFT's fields.

    Attributes:
        r: how many singular directions; a smaller layer has as many as it can.
        u: how many numbers each group trains.
        weight_tying: 0 for a group of each layer, 1 for one group of all, and in between.
        projection_seed: the seed of P.
        save_projection: whether checkpoints hold P.
        init_v_bound: the bound of v with "uniform".
        target_modules: names, a regular expression, "all-linear", or None for the model type's default.
        tinylora_dropout: dropout on the adapter's input, active when the layer is in training mode.
        fan_in_fan_out: PEFT's bookkeeping; the layer's type decides.
        bias: "none", "all" (train every bias of the model) or "tinylora_only" (those of the adapted layers).
        modules_to_save: modules that are trained in full and saved with the adapter.
        init_weights: True, or "uniform" for random numbers in v.
        layers_to_transform: indices of the layers to adapt.
        layers_pattern: the name of the layer list, with `layers_to_transform`.

    Raises:
        ValueError: if the values contradict each other.
    """

    peft_type: str = "TINYLORA"
    r: int = 2
    u: int = 64
    weight_tying: float = 0.0
    projection_seed: int = 42
    save_projection: bool = True
    init_v_bound: float = 0.02
    target_modules: Sequence[str] | str | None = None
    tinylora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    modules_to_save: Sequence[str] | None = None
    init_weights: bool | str = True
    layers_to_transform: Sequence[int] | int | None = None
    layers_pattern: Sequence[str] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_common(self)
        check_positive(self, "u")
        if not 0 <= self.weight_tying <= 1:
            raise ValueError(f"`weight_tying` should be a float between 0.0 and 1.0, got {self.weight_tying}.")
        if self.init_weights not in (True, False, "uniform"):
            raise ValueError(f"`init_weights` must be True, False or 'uniform', got {self.init_weights!r}.")

    def rank(self, leaves: Mapping[str, Tensor]) -> int:
        """The rank of one site's leaves."""
        return leaves["tinylora_B"].shape[-1] if "tinylora_B" in leaves else 0


def groups(n: int, weight_tying: float) -> list[int]:
    """The group of each of n layers, by PEFT's rule."""
    count = max(1, round(n * (1 - weight_tying)))
    size = max(1, n // count)
    return [min(i // size, count - 1) for i in range(n)]


def _rank(site: Site, config: TinyLoraConfig) -> int:
    return min(config.r, site.out_features, columns(site))


def init(site: Site, config: TinyLoraConfig, draw: Draw, weight: Callable[[], Tensor]) -> Fresh:
    """A and B, from the base weight's largest singular directions."""
    refuse_dropout(site, "tinylora_dropout", config.tinylora_dropout)
    r, embedding = _rank(site, config), site.kind == "embedding"
    if draw.abstract:
        rows, inner = (columns(site), site.out_features) if embedding else (site.out_features, columns(site))
        return Fresh({}, {"tinylora_A": draw.zeros(r, inner), "tinylora_B": draw.zeros(rows, r)})
    base = weight().flatten(1)
    u, s, v = linalg.svd((base.t() if embedding else base).float(), full_matrices=False)
    root = s[:r].to(base.dtype).sqrt()
    a, b = root.unsqueeze(1) * v[:r].to(base.dtype), u[:, :r].to(base.dtype) * root
    return Fresh({}, {"tinylora_A": draw.cast(a).contiguous(), "tinylora_B": draw.cast(b).contiguous()})


def _start(config: TinyLoraConfig, draw: Draw) -> Tensor:
    if config.init_weights != "uniform" or draw.abstract:
        return draw.zeros(config.u)
    # from torch's own generator PEFT draws in the dtype of the weight, which gives other numbers
    dtype = draw.dtype if draw.generator is None else torch.float32
    v = torch.empty(config.u, dtype=dtype)
    return draw.cast(v.uniform_(-config.init_v_bound, config.init_v_bound, generator=draw.generator))


def share(sites: Sequence[Site], config: TinyLoraConfig, draw: Draw, weight: Callable[[Site], Tensor]) -> Shared:
    """A v for each group; P and the number of its group for each layer."""
    numbers = groups(len(sites), config.weight_tying)
    trained = {f"{_V}{g}": _start(config, draw) for g in dict.fromkeys(numbers)}
    at: dict[str, dict[str, Tensor]] = {}
    for i, (site, group) in enumerate(zip(sites, numbers, strict=True)):
        r = _rank(site, config)
        shape = (*(site.stack if site.experts > 1 else ()), config.u, r, r)
        generator = torch.Generator("cpu").manual_seed(config.projection_seed + i)
        projections = draw.cast(torch.normal(0.0, 1 / r**0.5, shape, generator=generator))
        number = torch.zeros((), dtype=torch.long, device=draw.device)
        at[site.path] = {"tinylora_P": projections, f"{_GROUP}{group}": number}
    return Shared(trained, {}, at)


def _own(names: Iterable[str]) -> str:
    """The name of the v of a site's group."""
    return next(_V + name.removeprefix(_GROUP) for name in names if name.startswith(_GROUP))


def middle(p: Leaf, *lead: int) -> Tensor:
    """R (*lead, r, r), made of the trained numbers."""
    projections = p["tinylora_P"]
    u, r, _ = projections.shape[len(lead) :]
    v = p[_own(p)].reshape(*lead, 1, u).to(projections.dtype)
    return (v @ projections.reshape(*lead, u, r * r)).reshape(*lead, r, r)


def factors(layer: Layer, p: Leaf) -> tuple[Tensor, Tensor]:
    """Two matrices (r, columns) and (out, r) whose product is the update; R in the second, so that x is not kept."""
    a, b = p["tinylora_A"], p["tinylora_B"]
    return (b.t(), (middle(p) @ a).t()) if layer.site.kind == "embedding" else (a, b @ middle(p))


def after(layer: Layer, p: Leaf, x: Tensor, y: Tensor) -> Tensor:
    """Y + B R A drop(x)."""
    config: Any = layer.config
    x = dropout(layer, x, config.tinylora_dropout)
    return add_product(layer, x, y, *factors(layer, p))


def grouped(layer: Layer, p: Leaf, x: Tensor, y: Tensor) -> Any:
    """`after` for N adapters at once: leaves (N, ...), rows in N equal groups."""
    config: Any = layer.config
    if layer.site.kind not in ("linear", "hf_conv1d"):
        return NotImplemented
    x = dropout(layer, x, config.tinylora_dropout)
    a = p["tinylora_A"]
    return add_products(x, y, a, p["tinylora_B"] @ middle(p, a.shape[0]))


def weight(layer: Layer, p: Leaf, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """W + B R A."""
    a, b = factors(layer, p)
    return (weight + (b @ a).reshape(layer.site.shape)).to(weight.dtype), bias


def with_rank(p: Leaf, rank: int, other: int) -> Leaf:
    """A, B and P with zeros for more directions, or with fewer of them."""
    a, b, projections = p["tinylora_A"], p["tinylora_B"], p["tinylora_P"]
    more = other - rank
    return {
        **p,
        "tinylora_A": F.pad(a, (0, 0, 0, more)),
        "tinylora_B": F.pad(b, (0, more)),
        "tinylora_P": F.pad(projections, (0, more, 0, more)),
    }


def check(config: TinyLoraConfig, path: str, p: Leaf) -> None:
    """Every v of u numbers; A, B and P of one rank."""
    if not path:
        check_leaves(path, p, dict.fromkeys(p, (config.u,)), lead=False)
        return
    r = config.rank(p)
    expected: dict[str, tuple[int | None, ...]] = {"tinylora_A": (r, None), "tinylora_B": (None, r)}
    if "tinylora_P" in p:
        expected["tinylora_P"] = (config.u, r, r)
    check_leaves(path, p, expected)
    if not 0 < r <= config.r:
        raise SiteError(f"The site {path!r} has tinylora_B of rank {r}, expected at most r={config.r}.")


def stored(config: Any, path: str, p: Leaf) -> Mapping[str, Tensor | None]:
    """No P where the config says so."""
    return {"tinylora_P": None} if path and not config.save_projection else {}


METHOD = register(
    Method(
        name="tinylora",
        config=TinyLoraConfig,
        kinds=KINDS,
        keys={name: name for name in ("tinylora_A", "tinylora_B", "tinylora_P")},
        shared={f"{_V}*": f"{_V}*"},
        constants=frozenset({"tinylora_A", "tinylora_B", "tinylora_P"}),
        init=init,
        share=share,
        uses=lambda site, own, shared: (_own(own),),
        after=after,
        grouped=grouped,
        weight=weight,
        stored=stored,
        check=check,
        dropout=lambda config: config.tinylora_dropout,
        reads=frozenset(),
        with_rank=with_rank,
        view=View(
            "tinylora", "TinyLora", "tinylora_", label="tinylora.", dropout="tinylora_dropout", attributes=_ATTRIBUTES
        ),
    )
)
