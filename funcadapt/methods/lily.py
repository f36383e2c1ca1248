"""Lily: each layer mixes a few common matrices B by a router that looks at all its inputs.

    y = W x + b + s h sum_e q_e B_e        h = A x,    q = the mean over all rows and tokens of softmax(R h)

Leaves: `lily_A` (r, columns), `lily_B` (num_B r, out), which is B_0, B_1, ... one below the other, `lily_router`
(num_B, r), which is R, and the buffer `scaling` (0-d). A layer's group are those of the same target and shape: all of
them have the B of the first, and each `stride_A` consecutive ones the A of the first of these. There the others have a
frozen leaf whose name says where it is, see `funcadapt.tying`; checkpoints repeat A and B in every layer, and what is
common follows from the model: `fa.load(directory, model=model)`.
At a convolution A reads all input channels, whatever its groups, and q is a mean over positions, too.
Init: A and R kaiming-uniform, B zero: the identity.
Cost: r (columns + num_B out) parameters a group, or less, and num_B r a layer; 2 r (columns + out + num_B) flops a
token forward, num_B r out more a call, and twice that backward. There is no dense form: q depends on the input, so
nothing can be merged, and attention, whose weights are read without a call, cannot be adapted.
The rows of a call act on each other through q. Of many adapters each takes the mean over its own rows: `fa.grouped` is
the loop over groups, and `fa.routed` the loop over adapters, each with all its rows, and not a loop over rows.

Source: "Low-Rank Interconnected Adaptation Across Layers", arXiv:2407.09946. Differs from PEFT: also on transformers'
Conv1D, embeddings, convolutions, plain parameters and experts; every adapter of a model shares A and B, not the first
alone; of several targets that match, a layer has the longest (PEFT: the last of a set, in no order); q is computed in
float32 at least.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from funcadapt._torch import unflatten
from funcadapt.config import AdapterConfig
from funcadapt.errors import SiteError
from funcadapt.layer import Layer
from funcadapt.method import Draw, Fresh, Leaf, Method, Shared, View, register
from funcadapt.parts import scalings
from funcadapt.parts.checks import check_layers, check_leaves, check_positive
from funcadapt.parts.forms import KINDS, kaiming
from funcadapt.sites import Site
from funcadapt.tying import tie


@dataclasses.dataclass(frozen=True, kw_only=True)
class LilyConfig(AdapterConfig):
    """Config of Lily, with PEFT's fields.

    Attributes:
        r: the rank.
        stride_A: how many consecutive layers of one target have the same A.
        num_B: how many matrices B the router mixes.
        scaling: multiplies the update.
        target_modules: names, a regular expression, "all-linear", or None for the model type's default.
        exclude_modules: names or a regular expression to leave out.
        modules_to_save: modules that are trained in full and saved with the adapter.
        layers_to_transform: indices of the layers to adapt.
        layers_pattern: the name of the layer list, with `layers_to_transform`.
        init_weights: whether B starts at zero.

    Raises:
        ValueError: if the values contradict each other.
    """

    peft_type: str = "LILY"
    r: int = 32
    stride_A: int = 1  # noqa: N815 (PEFT's name)
    num_B: int = 2  # noqa: N815
    scaling: float = 1.0
    target_modules: Sequence[str] | str | None = None
    exclude_modules: Sequence[str] | str | None = None
    modules_to_save: Sequence[str] | None = None
    layers_to_transform: Sequence[int] | int | None = None
    layers_pattern: Sequence[str] | str | None = None
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "r", "stride_A")
        check_layers(self)
        if self.num_B < 2:
            raise ValueError("`num_B` must be at least 2 for the router to be trained.")

    def rank(self, leaves: Mapping[str, Tensor]) -> int:
        """The rank of one site's leaves."""
        return leaves["lily_router"].shape[-1] if "lily_router" in leaves else 0


def buffers(config: LilyConfig) -> dict[str, Tensor]:
    """The scaling."""
    return {"scaling": torch.tensor(config.scaling, dtype=torch.float64)}


def _shapes(site: Site, config: LilyConfig) -> tuple[tuple[int, int], ...]:
    """Of A, B and R."""
    r, n = config.r, config.num_B
    return (r, math.prod((site.in_features, *site.shape[2:]))), (n * r, site.out_features), (n, r)


def init(site: Site, config: LilyConfig, draw: Draw, weight: Callable[[], Tensor]) -> Fresh:
    """A and R kaiming-uniform, B zero, or as they are."""
    a, b, router = _shapes(site, config)
    first, routes = kaiming(draw, *a), kaiming(draw, *router)
    second = draw.zeros(*b) if config.init_weights else kaiming(draw, *b)
    scaling = {name: draw.cast(value) for name, value in buffers(config).items()}
    return Fresh({"lily_A": first, "lily_B": second, "lily_router": routes}, scaling)


def warm(site: Site, config: LilyConfig, draw: Draw) -> None:
    """PEFT builds A, B and R as layers, which draw their own init, before it draws A and R again."""
    for shape in _shapes(site, config):
        kaiming(draw, *shape)


def _target(config: LilyConfig, path: str) -> str:
    names = config.target_modules
    if isinstance(names, str):
        return path.rpartition(".")[2] if names.lower() == "all-linear" else names
    return max((name for name in names or () if path.endswith(name)), key=len, default="")


def share(sites: Sequence[Site], config: LilyConfig, draw: Draw, weight: Callable[[Site], Tensor]) -> Shared:
    """Which sites have the A and B of which."""
    found: dict[Any, list[Site]] = {}
    for site in sites:
        key = _target(config, site.path), site.kind, site.shape, site.groups, site.experts
        found.setdefault(key, []).append(site)
    at: dict[str, dict[str, Tensor]] = {}
    for group in found.values():
        for i, site in enumerate(group):
            first_a = group[i // config.stride_A * config.stride_A]
            for leaf, first in (("lily_A", first_a), ("lily_B", group[0])):
                if first is not site:
                    zero = torch.zeros((), dtype=torch.long, device=draw.device)
                    at.setdefault(site.path, {})[tie(leaf, first.path)] = zero
    return Shared({}, {}, at)


def _down(layer: Layer, x: Tensor, a: Tensor, n: int) -> Tensor:
    """The input through the n rows of A: (rows, ..., n), channels last."""
    site = layer.site
    if x.is_floating_point() and x.dtype != a.dtype:
        x = x.to(a.dtype)
    return layer.linear(x, a.reshape(n, site.in_features, *site.shape[2:])).movedim(1 - len(site.shape), -1)


def _add(layer: Layer, y: Tensor, update: Tensor) -> Tensor:
    """Y + an update whose channels come last."""
    return (y + update.movedim(-1, 1 - len(layer.site.shape))).to(y.dtype)


def _probabilities(logits: Tensor) -> Tensor:
    return torch.softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))


def after(layer: Layer, p: Leaf, x: Tensor, y: Tensor) -> Tensor:
    """Y + s h sum_e q_e B_e."""
    router, b = p["lily_router"], p["lily_B"]
    count, r = router.shape
    h = _down(layer, x, p["lily_A"], r)
    each = _probabilities(F.linear(h, router)).reshape(-1, count)
    q = each.sum(0) / max(each.shape[0], 1)  # a mean of nothing would be no number
    mixed = torch.mv(b.reshape(count, -1).t(), (q * p["scaling"]).to(b.dtype)).view(r, layer.site.out_features)
    return _add(layer, y, torch.matmul(h, mixed))


def masked(layer: Layer, p: Leaf, x: Tensor, y: Tensor, choice: Tensor) -> Tensor:
    """`after` for groups of rows that choose among N adapters, each with the mean over all its rows.

    Args:
        layer: the layer.
        p: the leaves, `lily_A` (N, r, columns) and so on.
        x: (groups * rows, ...).
        y: likewise.
        choice: (groups, N), at most one 1 in each.

    Returns:
        Of y's shape.
    """
    router, b = p["lily_router"], p["lily_B"]
    n, count, r = router.shape
    every = _down(layer, x, p["lily_A"], n * r)
    choice = choice.to(every.dtype)
    h = every.reshape(choice.shape[0], -1, n, r)
    logits = torch.einsum("gjnr,gn,nbr->gjb", h, choice, router)
    sums = torch.einsum("gn,gjb->nb", choice, _probabilities(logits).to(choice.dtype))
    q = sums / (choice.sum(0) * h.shape[1]).clamp_min(1).unsqueeze(1) * p["scaling"].view(n, 1)
    mixed = torch.einsum("nb,nbx->nx", q.to(b.dtype), b.reshape(n, count, -1)).view(n * r, layer.site.out_features)
    h = (h * choice.view(-1, 1, n, 1)).reshape(*every.shape[:-1], n * r)
    return _add(layer, y, torch.matmul(h, mixed))


def weight(layer: Layer, p: Leaf, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """There is none."""
    raise SiteError(
        f"Lily has no dense form at {layer.site.path!r}: how much of each B acts depends on the input. Keep the "
        "adapter unmerged, and call the layer."
    )


def with_rank(p: Leaf, rank: int, other: int) -> Leaf:
    """A, B and R with zeros for more ranks, or with fewer of them."""
    more, new = other - rank, dict(p)
    new["lily_router"] = F.pad(p["lily_router"], (0, more))
    if "lily_A" in p:
        new["lily_A"] = F.pad(p["lily_A"], (0, 0, 0, more))
    if "lily_B" in p:
        each = unflatten(p["lily_B"], -2, (-1, rank))
        new["lily_B"] = F.pad(each, (0, 0, 0, more)).flatten(-3, -2)
    return new


def check(config: LilyConfig, path: str, p: Leaf) -> None:
    """All leaves, of the config's rank and number of B."""
    r, count = config.r, config.num_B
    check_leaves(path, p, {"lily_A": (r, None), "lily_B": (count * r, None), "lily_router": (count, r)})


def describe(config: LilyConfig, leaves: Mapping[str, Leaf]) -> LilyConfig:
    """The config with the scaling that the leaves have, the same at all sites."""
    return scalings.describe_common(config, leaves, buffers(config)["scaling"], "lily_B")


METHOD = register(
    Method(
        name="lily",
        config=LilyConfig,
        kinds=KINDS - {"mha"},
        keys={name: f"{name}.weight" for name in ("lily_A", "lily_B", "lily_router")},
        tied=frozenset({"lily_A", "lily_B"}),
        couples=True,
        init=init,
        share=share,
        buffers=buffers,
        describe=describe,
        after=after,
        masked=masked,
        weight=weight,
        check=check,
        reads=frozenset(),
        with_rank=with_rank,
        view=View(
            package="lily",
            name="Lily",
            prefix="lily_",
            label="lily.",
            derived=("scaling",),
            attributes={"r": "r", "stride_A": "stride_A", "num_B": "num_B"},
            warm=warm,
        ),
    )
)
