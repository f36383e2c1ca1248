"""OFT: orthogonal rotations of a layer's input, block by block.

    y = W R^T x + b,    R = blockdiag(R_1, ..., R_n),    R_i = (I - Q_i) (I + Q_i)^-1    (Cayley)

or, with `use_cayley_neumann` (the default), the Neumann series of the inverse rotation, (I + Q_i) (I - Q_i)^-1:
I for one term, I + 2 Q for two, I + 2 Q + ... + 2 Q^(p-1) + Q^p with p = max(3, terms - 1) for more. Q_i is the skew
matrix with a leaf's numbers above its diagonal, row by row. The two turn in opposite directions, as in PEFT (B5).
R is never built as a whole: x is multiplied block by block.
Leaves: `oft_R` (n or, with `block_share`, 1; k (k - 1) / 2) for blocks of size k; embeddings `oft_embedding_R`.
`coft` holds the Frobenius norm of each Q_i at or below eps / sqrt(rows of the leaf): longer ones are scaled down.
Init: zeros, which is the identity; `init_weights=False`: small normal numbers.
Cost: in (k - 1) / 2 parameters a layer; 2 in k flops a token and about 6 in k^2 a call forward, twice that backward.
A convolution is convolved once more, with W' - W.
Dense form: W' = W R^T on W as a matrix (out, in / groups * kernel); embeddings R^T W: they rotate what they look up.

Source: Qiu et al. 2023, arXiv:2306.07280; Neumann series: Qiu et al. 2025, arXiv:2506.19847. Differs from PEFT:
convolutions do what the merged weight says, also with kernels, strides and dilation (B3); several adapters nest (B4);
also on transformers' Conv1D, multi-head attention, plain parameters and experts. `coft` projects the numbers within the
call, differentiably, and leaves the adapter alone; PEFT overwrites it in the forward pass. `module_dropout` is never
applied, as in PEFT (B16).
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from funcadapt.config import AdapterConfig
from funcadapt.errors import SiteError
from funcadapt.layer import Layer
from funcadapt.method import Draw, Fresh, Leaf, Method, View, register
from funcadapt.parts.checks import check_layers, check_one_of
from funcadapt.parts.forms import KINDS
from funcadapt.parts.holders import holder
from funcadapt.parts.lora_leaves import neutral
from funcadapt.parts.orthogonal import cayley, convolved, rotated, side_of, size_of, skew, turns_input, without_autocast
from funcadapt.sites import Site


@dataclasses.dataclass(frozen=True, kw_only=True)
class OFTConfig(AdapterConfig):
    """Config of OFT, with PEFT's fields.

    Attributes:
        r: how many blocks; 0 where `oft_block_size` says it.
        oft_block_size: the size of a block; 0 where `r` says it. Either is moved to the nearest divisor of the inputs.
        module_dropout: never applied, as in PEFT.
        target_modules: names, a regular expression, "all-linear", or None for the model type's default.
        fan_in_fan_out: PEFT's bookkeeping; the layer's type decides.
        bias: "none", "all" (train every bias of the model) or "oft_only" (those of the adapted layers).
        exclude_modules: names or a regular expression to leave out.
        init_weights: whether a new adapter is the identity; otherwise it is random.
        layers_to_transform: indices of the layers to adapt.
        layers_pattern: the name of the layer list, with `layers_to_transform`.
        modules_to_save: modules that are trained in full and saved with the adapter.
        coft: whether the rotations are constrained by `eps`.
        eps: how far they may go.
        block_share: whether all blocks are the same.
        use_cayley_neumann: a series instead of a solve.
        num_cayley_neumann_terms: how long the series is.

    Raises:
        ValueError: if not exactly one of `r` and `oft_block_size` is given, or the values contradict each other.
    """

    peft_type: str = "OFT"
    r: int = 0
    oft_block_size: int = 32
    module_dropout: float = 0.0
    target_modules: Sequence[str] | str | None = None
    fan_in_fan_out: bool = False
    bias: str = "none"
    exclude_modules: Sequence[str] | str | None = None
    init_weights: bool = True
    layers_to_transform: Sequence[int] | int | None = None
    layers_pattern: Sequence[str] | str | None = None
    modules_to_save: Sequence[str] | None = None
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layers(self)
        check_one_of(self, "r", "oft_block_size")


def nearest_divisor(size: int, wanted: int) -> int:
    """The divisor of `size` that is nearest to `wanted`, the smaller one of two."""
    return min((n for n in range(1, size + 1) if size % n == 0), key=lambda n: (abs(n - wanted), n))


def _name(site: Site) -> str:
    return "oft_embedding_R" if site.kind == "embedding" else "oft_R"


def init(site: Site, config: OFTConfig, draw: Draw, weight: Callable[[], Tensor]) -> Fresh:
    """Zeros, or small normal numbers if `init_weights` is false."""
    size, wanted = size_of(site), config.r or config.oft_block_size
    found = nearest_divisor(size, wanted)
    if found != wanted and not draw.abstract:
        what = "r" if config.r else "oft_block_size"
        warnings.warn(
            f"Invalid `{what}` ({wanted}) for the {size} inputs of {site.path!r}! Adjusted `{what}` to ({found}).",
            stacklevel=2,
        )
    blocks = found if config.r else size // found
    side = size // blocks
    shape = (*site.stack, 1 if config.block_share else blocks, side * (side - 1) // 2)
    return Fresh({_name(site): draw.zeros(*shape) if config.init_weights else draw.normal(*shape, std=0.1)}, {})


def rotations(layer: Layer, p: Leaf) -> Tensor:
    """The blocks of R, (n or 1, side, side), in at least float32. Any other size raises."""
    config, vectors = layer.config, p[_name(layer.site)]
    assert isinstance(config, OFTConfig)
    blocks, numbers = vectors.shape
    side = side_of(numbers)
    size = size_of(layer.site)
    if size % side or blocks != (1 if config.block_share else size // side):
        raise SiteError(f"oft at {layer.site.path!r}: {blocks} blocks of size {side} are not made for {size} inputs.")
    vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    if config.coft:
        limit = config.eps**2 / blocks
        squares = 2 * vectors.square().sum(1, keepdim=True)  # of the norms of the skew matrices
        vectors = vectors * (limit / squares.clamp_min(limit)).sqrt()
    terms = config.num_cayley_neumann_terms if config.use_cayley_neumann else None
    with without_autocast(vectors.device):
        return cayley(skew(vectors, side), terms)


def before(layer: Layer, p: Leaf, x: Tensor) -> Tensor:
    """X R; nothing at embeddings and convolutions."""
    if not turns_input(layer.site):
        return x
    dtype = torch.promote_types(x.dtype, p["oft_R"].dtype)
    return rotated(x.to(dtype), rotations(layer, p).to(dtype)).to(x.dtype)


def after(layer: Layer, p: Leaf, x: Tensor, y: Tensor) -> Tensor:
    """At embeddings y R, at convolutions y + (W' - W) * x; nothing at the others."""
    if layer.site.kind == "embedding":
        dtype = torch.promote_types(y.dtype, p["oft_embedding_R"].dtype)
        return rotated(y.to(dtype), rotations(layer, p).to(dtype)).to(y.dtype)
    if turns_input(layer.site):
        return y
    blocks = rotations(layer, p)
    base = layer.weight.to(blocks.dtype)
    delta = rotated(base.flatten(1), blocks.mT).reshape(base.shape) - base
    return (y + convolved(layer, x, delta.to(p["oft_R"].dtype))).to(y.dtype)


def weight(layer: Layer, p: Leaf, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """W R^T; embeddings R^T W."""
    blocks = rotations(layer, p)
    wide = weight.to(torch.promote_types(weight.dtype, blocks.dtype))
    if layer.site.kind == "embedding":
        return rotated(wide.t(), blocks).t().to(weight.dtype), bias
    return rotated(wide.flatten(1), blocks.mT).reshape(weight.shape).to(weight.dtype), bias


def check(config: OFTConfig, path: str, p: Leaf) -> None:
    """One leaf, with the numbers of whole blocks."""
    names = [name for name in ("oft_R", "oft_embedding_R") if name in p]
    shape = p[names[0]].shape if len(names) == 1 else torch.Size()
    root = math.isqrt(1 + 8 * shape[-1]) if len(shape) in (2, 3) else 0
    if not root or root * root != 1 + 8 * shape[-1] or (config.block_share and shape[-2] != 1):
        raise SiteError(f"The site {path!r} has {names} of shape {tuple(shape)}, no rotations of this config.")


METHOD = register(
    Method(
        name="oft",
        config=OFTConfig,
        kinds=KINDS,
        keys={"oft_R": "oft_R.weight", "oft_embedding_R": "oft_embedding_R.weight"},
        init=init,
        inits_experts=True,
        before=before,
        after=after,
        weight=weight,
        check=check,
        reads=frozenset({"coft", "eps", "block_share", "use_cayley_neumann", "num_cayley_neumann_terms"}),
        rank_field="",  # r counts blocks
        neutral=neutral,
        view=View(
            "oft",
            "OFT",
            "oft_",
            containers=("oft_R", "oft_embedding_R"),
            label="oft.",
            holder=holder("OFTRotationModule"),
        ),
    )
)
