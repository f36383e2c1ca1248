"""PEANuT: an update that a small neural network computes from the base weight.

    y = W x + b + s B h x        h = f(A W) (r, columns)        f: the activation, on every number
    depth d:  h_0 = f(A W),  h_i = f(E_i h_{i-1}),  then  h <- f(D_i h) + h_{d-i}  for i = 1 ... d

Leaves: `peanut_A` (r, out), `peanut_B` (out, r), `peanut_encoders.i` and `peanut_decoders.i` (r, r). The base weight is
a matrix (out, columns) at every kind of layer: columns are inputs, at a convolution inputs of a group times kernel.
Init: kaiming-uniform, B zero: the identity.
Cost: 2 r out + 2 d r^2 parameters. A call computes h, 2 r out columns flops and twice that backward whatever the number
of tokens, and then LoRA's 2 r (columns + out) flops a token; the (out, columns) update is never built.
Dense form: W + s B h.

Source: Zhong et al. 2024, arXiv:2410.01870. Differs from PEFT: also on transformers' Conv1D, embeddings, convolutions,
multi-head attention, plain parameters and experts; several adapters nest, each sees the weight below it, so that the
result equals the dense forms in order (PEFT's all see W, and its merged weight is theirs only if nothing else acts).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from funcadapt.config import AdapterConfig
from funcadapt.errors import SiteError, did_you_mean
from funcadapt.layer import Layer
from funcadapt.method import Draw, Fresh, Leaf, Method, View, register
from funcadapt.parts.forms import KINDS, add_product
from funcadapt.sites import Site


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _xielu(x: Tensor) -> Tensor:
    # what transformers' parameters, which nobody trains here, are in bfloat16
    positive, negative, eps = 0.80078125, 0.80078125, -9.98377799987793e-07
    return torch.where(x > 0, positive * x * x, (torch.expm1(x.clamp_max(eps)) - x) * negative) + 0.5 * x


# transformers' table, `ACT2FN`: what differs in the last bits only is one function here
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    **dict.fromkeys(("gelu", "gelu_python"), F.gelu),
    "gelu_10": lambda x: F.gelu(x).clamp(-10, 10),
    **dict.fromkeys(("gelu_fast", "gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate"), _gelu_tanh),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "hardswish": F.hardswish,
    "laplace": lambda x: 0.5 * (1 + torch.erf((x - 0.707107) / (0.282095 * math.sqrt(2)))),
    "leaky_relu": F.leaky_relu,
    "linear": lambda x: x,
    "mish": F.mish,
    "prelu": partial(F.leaky_relu, negative_slope=0.25),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    **dict.fromkeys(("silu", "swish"), F.silu),
    "sqrtsoftplus": lambda x: F.softplus(x).sqrt(),
    "tanh": torch.tanh,
    "xielu": _xielu,
}
_NOT_ZERO_AT_ZERO = frozenset({"laplace", "sigmoid", "sqrtsoftplus", "xielu"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeanutConfig(AdapterConfig):
    """Config of PEANuT, with PEFT's fields.

    Attributes:
        r: the width of the network.
        depth: how many encoders, and as many decoders, there are between A and B.
        act_fn: the activation, by its name in transformers.
        scaling: a factor of the update.
        target_modules: names, a regular expression, "all-linear", or None for the model type's default.
        exclude_modules: names or a regular expression to leave out.
        modules_to_save: modules that are trained in full and saved with the adapter.
        layers_to_transform: indices of the layers to adapt.
        layers_pattern: the name of the layer list, with `layers_to_transform`.
        init_weights: whether B starts at zero.

    Raises:
        ValueError: if the values contradict each other, or there is no such activation.
    """

    peft_type: str = "PEANUT"
    r: int = 32
    depth: int = 0
    act_fn: str = "relu"
    scaling: float = 1.0
    target_modules: Sequence[str] | str | None = None
    exclude_modules: Sequence[str] | str | None = None
    modules_to_save: Sequence[str] | None = None
    layers_to_transform: Sequence[int] | int | None = None
    layers_pattern: Sequence[str] | str | None = None
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")
        if self.r <= 0:
            raise ValueError(f"`r` must be a positive integer, got {self.r}.")
        if self.depth < 0:
            raise ValueError(f"`depth` can only be a non-negative integer, got {self.depth}.")
        if self.act_fn not in ACTIVATIONS:
            raise ValueError(f"Unsupported `act_fn`: {self.act_fn!r}.{did_you_mean(self.act_fn, ACTIVATIONS)}")

    def rank(self, leaves: Mapping[str, Tensor]) -> int:
        """The rank of one site's leaves."""
        return leaves["peanut_B"].shape[-1] if "peanut_B" in leaves else 0


def _hidden(depth: int) -> list[str]:
    return [f"peanut_{side}.{i}" for side in ("encoders", "decoders") for i in range(depth)]


def init(site: Site, config: PeanutConfig, draw: Draw, weight: Callable[[], Tensor]) -> Fresh:
    """All kaiming-uniform, but B zero."""
    r, out = config.r, site.out_features
    a = draw.uniform(r, out, bound=1 / math.sqrt(out))
    hidden = {name: draw.uniform(r, r, bound=1 / math.sqrt(r)) for name in _hidden(config.depth)}
    b = draw.zeros(out, r) if config.init_weights else draw.uniform(out, r, bound=1 / math.sqrt(r))
    return Fresh({"peanut_A": a, "peanut_B": b, **hidden}, {})


def factors(layer: Layer, p: Leaf, weight: Tensor) -> tuple[Tensor, Tensor]:
    """What the network makes of the base weight, (r, columns), and s * B: the update is their product."""
    config: Any = layer.config
    f, a, b = ACTIVATIONS[config.act_fn], p["peanut_A"], p["peanut_B"]
    # rows of zeros that only pad the rank (`with_rank`) have no gradient, whatever f(0) is
    live = (a != 0).any(1, keepdim=True) if config.act_fn in _NOT_ZERO_AT_ZERO else None

    def step(matrix: Tensor, h: Tensor) -> Tensor:
        h = f(matrix @ h)
        return h if live is None else h * live

    h = step(a, weight.flatten(1).to(a.dtype))
    seen: list[Tensor] = []
    for i in range(config.depth):
        seen.append(h)
        h = step(p[f"peanut_encoders.{i}"], h)
    for i in range(config.depth):
        h = step(p[f"peanut_decoders.{i}"], h) + seen.pop()
    return h, b if config.scaling == 1 else b * config.scaling


def after(layer: Layer, p: Leaf, x: Tensor, y: Tensor) -> Tensor:
    """Y + s B h x."""
    return add_product(layer, x, y, *factors(layer, p, layer.weight))


def weight(layer: Layer, p: Leaf, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """W + s B h."""
    h, b = factors(layer, p, weight)
    return (weight + (b @ h).reshape(layer.site.shape)).to(weight.dtype), bias


def check(config: PeanutConfig, path: str, p: Leaf) -> None:
    """All layers of the network, of one width."""
    names = ["peanut_A", "peanut_B", *_hidden(config.depth)]
    if sorted(names) != sorted(p):
        raise SiteError(f"The site {path!r} has {sorted(p)}; its config says depth {config.depth}: expected {names}.")
    r, a, b = config.r, p["peanut_A"].shape, p["peanut_B"].shape
    square = all(p[name].shape == (*a[:-2], r, r) for name in names[2:])
    if len(a) not in (2, 3) or a[-2] != r or b != (*a[:-2], a[-1], r) or not square:
        shapes = {name: tuple(p[name].shape) for name in names}
        raise SiteError(f"The site {path!r} has {shapes}; its config says rank {r}: expected ({r}, out), (out, {r}) "
                        f"and ({r}, {r}).")  # fmt: skip


def with_rank(p: Leaf, old: int, r: int) -> Leaf:
    """Zero rows of A, zero columns of B, both of what is between; or all cut."""

    def sized(name: str, leaf: Tensor) -> Tensor:
        rows, columns = name != "peanut_B", name != "peanut_A"
        return F.pad(leaf, (0, (r - old) * columns, 0, (r - old) * rows))

    return {name: sized(name, leaf) for name, leaf in p.items()}


def warm(site: Site, config: PeanutConfig, draw: Draw) -> None:
    """PEFT builds them as layers, which draw their own init, before it draws again."""
    init(site, dataclasses.replace(config, init_weights=False), draw, lambda: draw.zeros())


METHOD = register(
    Method(
        name="peanut",
        config=PeanutConfig,
        kinds=KINDS,
        keys={
            "peanut_A": "peanut_A.weight",
            "peanut_B": "peanut_B.weight",
            "peanut_encoders.*": "peanut_encoders.*.weight",
            "peanut_decoders.*": "peanut_decoders.*.weight",
        },
        init=init,
        after=after,
        weight=weight,
        check=check,
        reads=frozenset({"depth", "act_fn", "scaling"}),
        with_rank=with_rank,
        neutral=lambda p: {name: torch.zeros_like(leaf) for name, leaf in p.items()},
        view=View(
            package="peanut",
            name="Peanut",
            prefix="peanut_",
            containers=("peanut_A", "peanut_B", "peanut_encoders", "peanut_decoders"),
            label="peanut.",
            attributes={"r": "r", "depth": "depth", "res_num": "depth", "scaling": "scaling", "act_fn": "act_fn"},
            warm=warm,
        ),
    )
)
