"""MiSS: matrix shard sharing. One small block of rows is the update of every shard of the inputs.

    y = W x + b + D^T u,      u[k] = sum of drop(x)[i] over the inputs i with i mod r = k        D = miss_block

Leaves: `miss_block` (r, out); "mini": (r, mini_r), repeated along the outputs; "bat": (out / r, r, r).
Init: zeros, the identity; kaiming-uniform with `init_weights=False`.
Cost: r out parameters a layer ("mini": r mini_r); `in` additions and 2 r out flops a token forward, and twice those
flops backward. "bat": the dense form at every call, 2 r in out flops, and the base layer twice.
Dense form: W[o, i] + D[i mod r, o]. "bat" cuts W into tiles of r x r and maps each, T -> T + (T + 1) D[o / r], so that
it reads the base weight. Embeddings and convolutions count the inputs of a row in the order of the flattened weight.

Source: Kang and Yin 2024, arXiv:2409.15371. As in PEFT, "bat" has no dropout.
Differs from PEFT: also on transformers' Conv1D, embeddings, convolutions (in each group), multi-head attention and
plain parameters; adapters with different `init_weights` compose, where PEFT takes the first one's formula for all.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from funcadapt.config import AdapterConfig
from funcadapt.errors import SiteError
from funcadapt.layer import Layer, dropout
from funcadapt.method import Draw, Fresh, Leaf, Method, View, register
from funcadapt.parts.forms import KINDS, add_weight
from funcadapt.sites import Site


@dataclasses.dataclass(frozen=True, kw_only=True)
class MissConfig(AdapterConfig):
    """Config of MiSS, with PEFT's fields.

    Attributes:
        r: the width of a shard of the inputs.
        miss_dropout: dropout on the adapter's input; not with "bat".
        mini_r: the width of a shard of the outputs, with "mini". It divides them.
        target_modules: names, a regular expression, "all-linear", or None for the model type's default.
        exclude_modules: names or a regular expression to leave out.
        init_weights: True, False (random numbers), or the name of a variant: "bat" or "mini".
        layers_to_transform: indices of the layers to adapt.
        layers_pattern: the name of the layer list, with `layers_to_transform`.
        bias: "none", "all" (train every bias of the model) or "MiSS_only" (those of the adapted layers).
        modules_to_save: modules that are trained in full and saved with the adapter.

    Raises:
        ValueError: if the values contradict each other.
    """

    peft_type: str = "MISS"
    r: int = 64
    miss_dropout: float = 0.0
    mini_r: int = 1
    target_modules: Sequence[str] | str | None = None
    exclude_modules: Sequence[str] | str | None = None
    init_weights: bool | str = True
    layers_to_transform: Sequence[int] | int | None = None
    layers_pattern: str | None = None
    bias: str = "none"
    modules_to_save: Sequence[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("r", "mini_r"):
            if getattr(self, name) <= 0:
                raise ValueError(f"`{name}` should be a positive integer value but the value passed is "
                                 f"{getattr(self, name)}.")  # fmt: skip
        if self.init_weights not in (True, False, "bat", "mini"):
            raise ValueError(f"`init_weights` must be True, False, 'bat' or 'mini', got {self.init_weights!r}.")
        if not 0 <= self.miss_dropout < 1:
            raise ValueError(f"`miss_dropout` must be in [0, 1), got {self.miss_dropout}.")
        if isinstance(self.target_modules, str):
            for field in ("layers_to_transform", "layers_pattern"):
                if getattr(self, field) is not None:
                    raise ValueError(f"`{field}` cannot be used when `target_modules` is a str.")

    def rank(self, leaves: Mapping[str, Tensor]) -> int:
        """The width of a shard that the block of one site has."""
        return leaves["miss_block"].shape[-2] if "miss_block" in leaves else 0


def _rate(config: MissConfig) -> float:
    return 0.0 if config.init_weights == "bat" else config.miss_dropout


def _inputs(site: Site) -> int:
    """How many inputs a row of the weight has."""
    return math.prod(site.shape[1:])


def _shape(site: Site, config: MissConfig) -> tuple[int, ...]:
    r, out = config.r, site.out_features
    if config.init_weights == "bat":
        return out // r, r, r
    return r, config.mini_r if config.init_weights == "mini" else out


def init(site: Site, config: MissConfig, draw: Draw, weight: Callable[[], Tensor]) -> Fresh:
    """`miss_block`: zeros, or kaiming-uniform if `init_weights` is false."""
    r, out, inputs, how = config.r, site.out_features, _inputs(site), config.init_weights
    if _rate(config) and site.kind in ("parameter", "experts"):
        raise SiteError(f"miss_dropout={config.miss_dropout} cannot act at the plain parameter {site.path!r}: "
                        "it is applied through its weight. Set miss_dropout=0.")  # fmt: skip
    if r > inputs:
        raise SiteError(f"`r` ({r}) must be at most the {inputs} inputs of {site.path!r}.")
    if how == "bat" and (inputs % r or out % r):
        raise SiteError(f"init_weights='bat' cuts the weight of {site.path!r} into tiles of {r} x {r}: r must divide "
                        f"its {inputs} inputs and its {out} outputs.")  # fmt: skip
    if how == "mini" and out % config.mini_r:
        raise SiteError(f"mini_r={config.mini_r} must divide the {out} outputs of {site.path!r}.")
    shape = _shape(site, config)
    return Fresh({"miss_block": draw.zeros(*shape) if how else draw.uniform(*shape, bound=1 / math.sqrt(out))}, {})


def _block(layer: Layer, p: Leaf) -> Tensor:
    """The block as (r, out), or (out / r, r, r) with "bat". Any other size raises."""
    site, config = layer.site, layer.config
    assert isinstance(config, MissConfig)
    block = p["miss_block"].reshape(_shape(site, config))
    return block.repeat(1, site.out_features // config.mini_r) if config.init_weights == "mini" else block


def _bat(w: Tensor, block: Tensor) -> Tensor:
    """(T + 1) D for every tile T of the weight as a matrix."""
    wide = torch.promote_types(block.dtype, torch.float32)
    n, r, _ = block.shape
    tiles = w.reshape(n, r, -1, r).to(wide)
    block = block.to(wide)
    return torch.einsum("oaib,obc->oaic", tiles, block) + block.unsqueeze(2)


def _sums(layer: Layer, x: Tensor, r: int, dtype: torch.dtype) -> Tensor:
    """U: the sums over the inputs that are equal modulo r, (*batch, r) or (batch, r * groups, *spatial)."""
    site = layer.site
    if site.kind == "embedding" or len(site.shape) > 2:  # a product with zeros and ones
        select = torch.arange(_inputs(site), device=x.device) % r == torch.arange(r, device=x.device).unsqueeze(1)
        select = select.to(dtype).reshape(r, *site.shape[1:])
        if site.groups > 1:
            eye = torch.eye(site.groups, dtype=dtype, device=x.device)
            select = torch.kron(eye.reshape(site.groups, site.groups, *(1,) * (len(site.shape) - 2)), select)
        return layer.linear(x, select)
    shards, rest = site.in_features // r, site.in_features % r  # dynamo has no divmod of sizes
    whole = shards * r
    sums = (x[..., :whole] if rest else x).reshape(*x.shape[:-1], shards, r).sum(-2)
    return sums + F.pad(x[..., whole:], (0, r - rest)) if rest else sums


def folds(layer: Layer, p: Leaf, x: Tensor) -> bool:
    """Whether the update is as large as the weight: Bat's."""
    return getattr(layer.config, "init_weights", None) == "bat"


def after(layer: Layer, p: Leaf, x: Tensor, y: Tensor) -> Tensor:
    """Y + D^T u, in y's dtype."""
    config, site, block = layer.config, layer.site, _block(layer, p)
    assert isinstance(config, MissConfig)
    if x.is_floating_point() and x.dtype != block.dtype:
        x = x.to(block.dtype)
    if config.init_weights == "bat":
        return add_weight(layer, x, y, _bat(layer.weight, block).to(block.dtype).reshape(site.shape))
    r = config.r
    u = _sums(layer, dropout(layer, x, config.miss_dropout), r, block.dtype)
    if site.kind in ("linear", "hf_conv1d") and u.dim() > 1 and u.dtype == y.dtype:
        # one fused product: no temporary of the output's size. It would broadcast y: the view says no.
        return torch.addmm(y.reshape(-1, y.shape[-1]), u.reshape(-1, r), block).view(y.shape).to(y.dtype)
    return (y + layer.pointwise(u, block.t().reshape(-1, r, *(1,) * (len(site.shape) - 2)))).to(y.dtype)


def weight(layer: Layer, p: Leaf, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """W + (T + 1) D per tile, or W[o, i] + D[i mod r, o]."""
    config, block = layer.config, _block(layer, p)
    assert isinstance(config, MissConfig)
    if config.init_weights == "bat":
        delta = _bat(weight, block)
    else:
        delta = block.t()[:, torch.arange(_inputs(layer.site), device=block.device) % config.r]
    return (weight + delta.reshape(layer.site.shape)).to(weight.dtype), bias


def check(config: MissConfig, path: str, p: Leaf) -> None:
    """One block, of the shape that the config says."""
    block = p.get("miss_block")
    sizes = () if block is None else tuple(block.shape)
    last = {"bat": config.r, "mini": config.mini_r}.get(str(config.init_weights), sizes[-1] if sizes else 0)
    dims = 3 if config.init_weights == "bat" else 2
    if len(sizes) not in (dims, dims + 1) or sizes[-2:] != (config.r, last):
        raise SiteError(f"The site {path!r} has miss_block of shape {sizes}, expected (..., {config.r}, "
                        f"{last or 'out'}) for init_weights={config.init_weights!r}.")  # fmt: skip


METHOD = register(
    Method(
        name="miss",
        config=MissConfig,
        kinds=KINDS,
        keys={"miss_block": "miss_block"},
        init=init,
        after=after,
        folds=folds,
        weight=weight,
        check=check,
        dropout=_rate,
        reads=frozenset({"r", "mini_r", "init_weights"}),
        rank_field="",  # blocks of two widths repeat with two periods: no padding makes one of the other
        neutral=lambda p: {name: torch.zeros_like(leaf) for name, leaf in p.items()},
        view=View(
            "miss",
            "Miss",
            "miss_",
            classes={"linear": "MissLinear", "hf_conv1d": "MissLinear"},
            label="miss.",
            dropout="miss_dropout",
            attributes={"miss_r": "r", "miss_mini_r": "mini_r"},
        ),
    )
)
