"""GraLoRA: a low-rank update for every block of the weight, which is cut k times along both sides.

    y[m] = (W x + b)[m] + s * sum_n B[m, n] A[n, m] drop(x)[n]        m, n < k;  s = alpha / (r + hybrid_r)

and with `hybrid_r` a LoRA beside it, + s * G H drop(x), which has a dropout of its own.
Leaves: `gralora_A` (k, in / k, r): for each block n of inputs the A[n, m] of r / k ranks, m after m; `gralora_B`
(k, r, out / k): for each block m of outputs the B[m, n], n after n; `gralora_A_general` (hybrid_r, in) is H,
`gralora_B_general` (out, hybrid_r) is G; the buffer `scaling` (0-d).
Init: A kaiming-uniform, B zero: the identity. k = 1 is LoRA.
Cost: (r + hybrid_r) (in + out) parameters a layer; as many flops as a LoRA of that rank: 2 (r + hybrid_r) (in + out) a
token forward and twice that backward, in batched products of k blocks; the update has rank k r + hybrid_r.
Dense form: W[m, n] + s * B[m, n] A[n, m] (+ s * G H). Embeddings and convolutions are adapted by it, as matrices
(out, channels / groups * kernel).

Source: Jung et al. 2025, arXiv:2505.20355. Differs from PEFT: the output of the base layer is not changed in place; an
input can have any number of axes; also on embeddings, convolutions, multi-head attention and plain parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from funcadapt._torch import unflatten
from funcadapt.config import AdapterConfig
from funcadapt.errors import SiteError
from funcadapt.layer import Layer, dropout
from funcadapt.method import Draw, Fresh, Leaf, Method, View, register
from funcadapt.parts import lora_forms, scalings
from funcadapt.parts.checks import check_bias, check_leaves, check_positive, check_rates
from funcadapt.parts.forms import KINDS, add_weight, kaiming, matrix, refuse_dropout
from funcadapt.parts.lora_leaves import neutral
from funcadapt.sites import Site


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraloraConfig(AdapterConfig):
    """Config of GraLoRA, with PEFT's fields.

    Attributes:
        r: the rank of each row of blocks; a block has r / gralora_k.
        hybrid_r: the rank of the LoRA beside it; 0 for none.
        target_modules: names, a regular expression, "all-linear", or None for the model type's default.
        alpha: the scaling is alpha / (r + hybrid_r).
        gralora_dropout: dropout on the adapter's input, active when the layer is in training mode.
        gralora_k: into how many parts both sides of the weight are cut.
        fan_in_fan_out: PEFT's bookkeeping; the layer's type decides.
        bias: "none", "all" (train every bias of the model) or "gralora_only" (those of the adapted layers).
        modules_to_save: modules that are trained in full and saved with the adapter.
        init_weights: whether the update starts at zero; otherwise all factors are random.
        layers_to_transform: indices of the layers to adapt.
        layers_pattern: the name of the layer list, with `layers_to_transform`.

    Raises:
        ValueError: if a value is out of range, or `gralora_k` does not divide `r`.
    """

    peft_type: str = "GRALORA"
    r: int = 32
    hybrid_r: int = 0
    target_modules: Sequence[str] | str | None = None
    alpha: float = 64
    gralora_dropout: float = 0.0
    gralora_k: int = 2
    fan_in_fan_out: bool = False
    bias: str = "none"
    modules_to_save: Sequence[str] | None = None
    init_weights: bool = True
    layers_to_transform: Sequence[int] | int | None = None
    layers_pattern: Sequence[str] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "r", "gralora_k")
        check_bias(self)
        check_rates(self, "gralora_dropout")
        if self.hybrid_r < 0:
            raise ValueError(
                f"`hybrid_r` should be a non-negative integer value but the value passed is {self.hybrid_r}"
            )
        if self.r % self.gralora_k:
            raise ValueError(f"r should be divisible by gralora_k, but got {self.r} and {self.gralora_k}")
        if not -1e300 < self.alpha < 1e300:
            raise ValueError(f"`alpha` must be finite, got {self.alpha}.")

    def rank(self, leaves: Mapping[str, Tensor]) -> int:
        """The rank of one site's leaves."""
        return leaves["gralora_A"].shape[-1] if "gralora_A" in leaves else 0


def buffers(config: GraloraConfig) -> dict[str, Tensor]:
    """The scaling as a 0-d leaf: alpha / (r + hybrid_r)."""
    return {"scaling": torch.tensor(config.alpha / (config.r + config.hybrid_r), dtype=torch.float64, device="cpu")}


def init(site: Site, config: GraloraConfig, draw: Draw, weight: Callable[[], Tensor]) -> Fresh:
    """A random, B zero unless `init_weights` is false."""
    refuse_dropout(site, "gralora_dropout", config.gralora_dropout)
    k, r, hybrid = config.gralora_k, config.r, config.hybrid_r
    out, inputs = matrix(site)
    for side, size in (("in", inputs), ("out", out)):
        if size % k:
            raise SiteError(
                f"{side}_features should be divisible by gralora_k, but got {size} and {k} at {site.path!r}."
            )

    def second(*shape: int) -> Tensor:
        return draw.zeros(*shape) if config.init_weights else kaiming(draw, *shape)

    pairs = [(kaiming(draw, r, inputs // k), second(out // k, r)) for _ in range(k)]
    params = {
        name: torch.stack([pair[i] for pair in pairs]).transpose(1, 2).contiguous()
        for i, name in enumerate(("gralora_A", "gralora_B"))
    }
    if hybrid:
        # PEFT makes layers, which draw numbers that it then draws again: a seed gives the same
        for shape in ((hybrid, inputs), (out, hybrid)):
            kaiming(draw, *shape)
        params["gralora_A_general"] = kaiming(draw, hybrid, inputs)
        params["gralora_B_general"] = second(out, hybrid)
    return Fresh(params, {name: draw.cast(value) for name, value in buffers(config).items()})


def delta_weight(site: Site, p: Leaf) -> Tensor:
    """The update in canonical form. Any other size raises."""
    a, b = p["gralora_A"], p["gralora_B"]
    k, _, r = a.shape
    out, inputs = (size // k for size in matrix(site))
    a, b = a.reshape(k, inputs, k, r // k), b.reshape(k, k, r // k, out)
    delta = torch.einsum("nimq,mnqo->moni", a * p["scaling"], b).reshape(k * out, k * inputs)
    if "gralora_A_general" in p:
        delta = delta + (p["gralora_B_general"] * p["scaling"]) @ p["gralora_A_general"]
    return delta.reshape(site.shape)


def after(layer: Layer, p: Leaf, x: Tensor, y: Tensor) -> Tensor:
    """Y with the blocks' updates of drop(x), in y's dtype."""
    site, config = layer.site, layer.config
    assert isinstance(config, GraloraConfig)
    dropped = dropout(layer, x, config.gralora_dropout)
    if site.kind == "embedding" or len(site.shape) > 2:
        return add_weight(layer, dropped, y, delta_weight(site, p))
    a, b = p["gralora_A"], p["gralora_B"]
    k, inputs, r = a.shape
    rows = unflatten(dropped.to(a.dtype), x.dim() - 1, (k, inputs)).reshape(-1, k, inputs)
    h = torch.bmm(rows.transpose(0, 1), a) * p["scaling"]
    h = unflatten(h, 2, (k, r // k)).permute(2, 1, 0, 3).reshape(k, -1, r)  # (n, tokens, m, ranks) -> m first
    out = torch.bmm(h, b).transpose(0, 1)
    y = (unflatten(y, y.dim() - 1, (k, b.shape[2])).reshape(out.shape) + out).reshape(y.shape).to(y.dtype)
    if "gralora_A_general" in p:
        same = {"lora_A": p["gralora_A_general"], "lora_B": p["gralora_B_general"], "scaling": p["scaling"]}
        y = lora_forms.add_delta(layer, same, dropout(layer, x, config.gralora_dropout), y).to(y.dtype)
    return y


def weight(layer: Layer, p: Leaf, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """W and the updates of its blocks; the bias stays."""
    return (weight + delta_weight(layer.site, p)).to(weight.dtype), bias


def describe(config: GraloraConfig, leaves: Mapping[str, Leaf]) -> GraloraConfig:
    """The config with the most frequent alpha that the scalings say; others go into B (see `stored`)."""
    return scalings.describe(config, leaves, config.r + config.hybrid_r)


def stored(config: GraloraConfig, path: str, p: Leaf) -> Leaf:
    """B with what a scaling of its own is to the one that the config says: it has one alpha for all sites."""
    return scalings.absorbed(path, p, buffers(config)["scaling"], ("gralora_B", "gralora_B_general"))


def check(config: GraloraConfig, path: str, p: Leaf) -> None:
    """All leaves, with the config's ranks and number of blocks."""
    k, r, hybrid = config.gralora_k, config.r, config.hybrid_r
    expected: dict[str, tuple[int | None, ...]] = {"gralora_A": (k, None, r), "gralora_B": (k, r, None)}
    check_leaves(path, p, expected)
    if hybrid:
        inputs, out = k * p["gralora_A"].shape[-2], k * p["gralora_B"].shape[-1]
        expected |= {"gralora_A_general": (hybrid, inputs), "gralora_B_general": (out, hybrid)}
        check_leaves(path, p, expected)
    if len(p) > len(expected):
        raise SiteError(f"The site {path!r} has {sorted(p)}, its config says {sorted(expected)}.")


METHOD = register(
    Method(
        name="gralora",
        config=GraloraConfig,
        kinds=KINDS,
        keys={
            "gralora_A": "gralora_A",
            "gralora_B": "gralora_B",
            "gralora_A_general": "gralora_A_general.weight",
            "gralora_B_general": "gralora_B_general.weight",
        },
        init=init,
        after=after,
        folds=lambda layer, p, x: len(layer.site.shape) > 2,
        weight=weight,
        buffers=buffers,
        describe=describe,
        stored=stored,
        check=check,
        dropout=lambda config: config.gralora_dropout,
        reads=frozenset(),
        rank_field="",  # not every rank that leaves may have makes a config
        neutral=neutral,
        view=View(
            "gralora",
            "Gralora",
            "gralora_",
            label="gralora.",
            containers=("gralora_dropout", "gralora_A", "gralora_B", "gralora_A_general", "gralora_B_general"),
            derived=("scaling",),
            dropout="gralora_dropout",
            attributes={name: name for name in ("r", "alpha", "gralora_k", "hybrid_r")},
        ),
    )
)
