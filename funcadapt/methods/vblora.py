"""VB-LoRA: LoRA whose factors are put together from vectors of one bank that all layers share.

    y = W x + b + B A drop(x)        a piece of A or B = sum_k softmax(top-k of its logits)_k * bank_k

Leaves: `vblora_logits_A` (r, columns / v, h) and `vblora_logits_B` (out / v, r, h); shared by all layers, and trained:
`vblora_vector_bank` (h, v). A is (r, columns), B (out, r). The base weight is a matrix (out, columns) at every kind of
layer: columns are inputs, at a convolution inputs of a group times kernel. The vector length v must divide both.
Init: logits normal, bank uniform: no identity.
Cost: h v parameters in all and r (columns + out) h / v a layer; a call computes A and B, 2 r (columns + out) h flops
whatever the number of tokens, and then LoRA's 2 r (columns + out) flops a token.
`save_only_topk_weights` writes k indices and k - 1 weights for each piece. Read again, the other logits are so small
that they are never chosen: the same function, which can be trained further within the pieces that were chosen.
Dense form: W + B A.

Source: Li et al. 2024, arXiv:2405.15179. Differs from PEFT: also on embeddings, convolutions (grouped ones too),
multi-head attention, plain parameters and experts; what was saved as top-k weights can be trained (PEFT's other logits
are minus infinity there, and its training raises).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from funcadapt import targets
from funcadapt._torch import fork_rng
from funcadapt.config import AdapterConfig
from funcadapt.errors import SiteError
from funcadapt.layer import Layer, dropout
from funcadapt.method import Draw, Fresh, Leaf, Method, Shared, View, register
from funcadapt.parts.checks import check_common, check_leaves
from funcadapt.parts.forms import KINDS, add_product, columns, refuse_dropout
from funcadapt.sites import Site

BANK = "vblora_vector_bank"
LOGITS = ("vblora_logits_A", "vblora_logits_B")
_NEVER = -1e4  # a logit that any dtype has, of a weight that none has


@dataclasses.dataclass(frozen=True, kw_only=True)
class VBLoRAConfig(AdapterConfig):
    """Config of VB-LoRA, with PEFT's fields.

    Attributes:
        r: the rank.
        num_vectors: how many vectors the bank has.
        vector_length: how long they are; it must divide the widths of all layers.
        topk: how many of them make one piece.
        target_modules: names, a regular expression, "all-linear", or None for the model type's default.
        exclude_modules: names or a regular expression to leave out.
        save_only_topk_weights: whether checkpoints hold the chosen indices and weights instead of the logits.
        vblora_dropout: dropout on the adapter's input, active when the layer is in training mode.
        fan_in_fan_out: PEFT's bookkeeping; the layer's type decides.
        bias: "none", "all" (train every bias of the model) or "vblora_only" (those of the adapted layers).
        modules_to_save: modules that are trained in full and saved with the adapter.
        init_vector_bank_bound: the bank starts uniform in plus and minus this.
        init_logits_std: the standard deviation of the logits at the start.
        layers_to_transform: indices of the layers to adapt.
        layers_pattern: the name of the layer list, with `layers_to_transform`.

    Raises:
        ValueError: if the values contradict each other.
    """

    peft_type: str = "VBLORA"
    r: int = 4
    num_vectors: int = 256
    vector_length: int = 256
    topk: int = 2
    target_modules: Sequence[str] | str | None = None
    exclude_modules: Sequence[str] | str | None = None
    save_only_topk_weights: bool = False
    vblora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    modules_to_save: Sequence[str] | None = None
    init_vector_bank_bound: float = 0.02
    init_logits_std: float = 0.1
    layers_to_transform: Sequence[int] | int | None = None
    layers_pattern: Sequence[str] | str | None = None

    target_table: ClassVar[targets.Targets] = {
        name: ("query", "value") if name == "roberta" else modules for name, modules in targets.ADALORA.items()
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_common(self)
        if not 0 < self.topk <= self.num_vectors:
            raise ValueError(f"`topk` {self.topk} should be a positive integer value, at most num_vectors.")
        if self.vector_length <= 0:
            raise ValueError(f"`vector_length` should be a positive integer value, got {self.vector_length}.")

    def rank(self, leaves: Mapping[str, Tensor]) -> int:
        """The rank of one site's leaves."""
        return leaves[LOGITS[1]].shape[-2] if LOGITS[1] in leaves else 0


def init(site: Site, config: VBLoRAConfig, draw: Draw, weight: Callable[[], Tensor]) -> Fresh:
    """The logits: normal."""
    refuse_dropout(site, "vblora_dropout", config.vblora_dropout)
    v, sizes = config.vector_length, (columns(site), site.out_features)
    for name, size in zip(("in_features", "out_features"), sizes, strict=True):
        if size % v:
            raise SiteError(f"`{name}` {size} of {site.path!r} must be divisible by `vector_length` {v}")
    shapes = (config.r, sizes[0] // v), (sizes[1] // v, config.r)
    std = config.init_logits_std
    return Fresh({n: draw.normal(*s, config.num_vectors, std=std) for n, s in zip(LOGITS, shapes, strict=True)}, {})


def share(sites: Sequence[Site], config: VBLoRAConfig, draw: Draw, weight: Callable[[Site], Tensor]) -> Shared:
    """The bank: uniform."""
    # torch's own generator goes on after the logits: `warm` has drawn the bank
    with fork_rng(devices=[], enabled=draw.generator is None):
        return Shared(warm(sites[0], config, draw), {}, {})


def factors(layer: Layer, p: Leaf) -> tuple[Tensor, Tensor]:
    """A (r, columns) and B (out, r)."""
    config: Any = layer.config
    site, bank = layer.site, p[BANK]

    def pieces(logits: Tensor) -> Tensor:
        top, index = logits.topk(config.topk, dim=-1)
        # as a product with the bank, whose gradient is one too: gathering vectors would add them one by one
        return torch.zeros_like(logits).scatter(-1, index, torch.softmax(top, -1)) @ bank

    a, b = (pieces(p[name]) for name in LOGITS)
    r = a.shape[0]
    return a.reshape(r, columns(site)), b.transpose(1, 2).reshape(site.out_features, r)


def after(layer: Layer, p: Leaf, x: Tensor, y: Tensor) -> Tensor:
    """Y + B A drop(x)."""
    config: Any = layer.config
    if config.vblora_dropout:
        x = dropout(layer, x, config.vblora_dropout)
    return add_product(layer, x, y, *factors(layer, p))


def weight(layer: Layer, p: Leaf, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """W + B A."""
    a, b = factors(layer, p)
    return (weight + (b @ a).reshape(layer.site.shape)).to(weight.dtype), bias


def check(config: VBLoRAConfig, path: str, p: Leaf) -> None:
    """The logits, or the bank, in the config's sizes."""
    r, h = config.r, config.num_vectors
    if path:
        check_leaves(path, p, {LOGITS[0]: (r, None, h), LOGITS[1]: (None, r, h)})
    else:
        check_leaves(path, p, {BANK: (h, config.vector_length)}, lead=False)


def _index_dtype(config: VBLoRAConfig) -> torch.dtype:
    sizes = {2**8: torch.uint8, 2**15: torch.int16, 2**31: torch.int32}
    return next((dtype for size, dtype in sizes.items() if config.num_vectors < size), torch.int64)


def stored(config: VBLoRAConfig, path: str, p: Leaf) -> Mapping[str, Tensor | None]:
    """Indices and weights instead of logits, where the config says so; the last weight is what is left of 1."""
    made: dict[str, Tensor | None] = {}
    for name in LOGITS if config.save_only_topk_weights else ():
        if name in p:
            top, index = p[name].topk(config.topk)
            made[name] = None
            made[f"{name}_topk_indices"] = index.to(_index_dtype(config))
            made[f"{name}_topk_weights"] = torch.softmax(top, -1)[..., :-1].contiguous()
    return made


def restore(config: VBLoRAConfig, path: str, p: Leaf) -> Leaf:
    """The logits of indices and weights: the logarithms of the weights, and elsewhere what is never chosen."""
    kept = {name: leaf for name, leaf in p.items() if name not in WRITTEN}
    for name in LOGITS:
        if f"{name}_topk_indices" in p:
            index, given = p[f"{name}_topk_indices"].long(), p[f"{name}_topk_weights"]
            every = torch.cat([given, 1 - given.sum(-1, keepdim=True)], -1)
            empty = every.new_full((*every.shape[:-1], config.num_vectors), _NEVER)
            kept[name] = empty.scatter(-1, index, every.log().clamp(min=_NEVER / 2))
    return kept


def warm(site: Site, config: VBLoRAConfig, draw: Draw) -> dict[str, Tensor]:
    """PEFT draws the bank anew before every layer's logits: the last one stays."""
    return {BANK: draw.uniform(config.num_vectors, config.vector_length, bound=config.init_vector_bank_bound)}


def savable(tuner: nn.Module, adapter: str = "default") -> tuple[int, int]:
    """How many numbers a checkpoint holds, an index counted as the part of a float32 that it takes, and how many else.

    Args:
        tuner: the tuner model.
        adapter: the adapter's name.

    Returns:
        Those of VB-LoRA and the others that are trained.
    """
    named = dict(tuner.named_parameters())
    config: VBLoRAConfig = tuner.peft_config[adapter]  # pyright: ignore
    bank = sum(p.numel() for name, p in named.items() if BANK in name)
    logits = sum(p.numel() for name, p in named.items() if "vblora_logits" in name)
    other = sum(p.numel() for name, p in named.items() if p.requires_grad and "vblora_" not in name)
    if config.save_only_topk_weights:
        size = _index_dtype(config).itemsize / 4
        return int(bank + logits / config.num_vectors * (config.topk - 1 + config.topk * size)), other
    return bank + logits, other


def print_savable(tuner: nn.Module) -> None:
    """Print those numbers."""
    own, other = savable(tuner)
    print(f"VB-LoRA params to-be-saved (float32-equivalent): {own:,d} || total params to-be-saved: {own + other:,d}")


WRITTEN = {f"{name}_topk_{what}": f"{name}_topk_{what}" for name in LOGITS for what in ("indices", "weights")}

METHOD = register(
    Method(
        name="vblora",
        config=VBLoRAConfig,
        kinds=KINDS,
        keys={name: name for name in LOGITS},
        written=WRITTEN,
        shared={BANK: BANK},
        init=init,
        share=share,
        complete=lambda config: True,
        after=after,
        weight=weight,
        stored=stored,
        restore=restore,
        check=check,
        dropout=lambda config: config.vblora_dropout,
        reads=frozenset({"topk"}),
        view=View(
            package="vblora",
            name="VBLoRA",
            prefix="vblora_",
            label="vblora.",
            dropout="vblora_dropout",
            attributes={"r": "r", "topk": "topk"},
            warm=warm,
            tuner={"get_nb_savable_parameters": savable, "print_savable_parameters": print_savable},
        ),
    )
)
