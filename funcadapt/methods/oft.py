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
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from funcadapt._torch import linalg, unflatten
from funcadapt.config import AdapterConfig
from funcadapt.errors import SiteError
from funcadapt.forms import KINDS
from funcadapt.layer import Layer
from funcadapt.method import Draw, Fresh, Leaf, Method, View, register
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
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified. ")
        if self.r == 0 and self.oft_block_size == 0:
            raise ValueError(
                f"Either `r` or `oft_block_size` must be non-zero. Currently, r = {self.r} and oft_block_size = "
                f"{self.oft_block_size}."
            )
        if self.r != 0 and self.oft_block_size != 0:
            raise ValueError(
                f"You can only specify either r ({self.r}) or oft_block_size ({self.oft_block_size}), but not both "
                "simultaneously, because r x oft_block_size == in_features."
            )


def size_of(site: Site) -> int:
    """How many numbers are rotated: the inputs, those of a kernel, or the width of an embedding."""
    return site.out_features if site.kind == "embedding" else math.prod(site.shape[1:])


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


def skew(vectors: Tensor, side: int) -> Tensor:
    """The skew matrices (n, side, side) with the given numbers (n, side (side - 1) / 2) above their diagonals."""
    rows, columns = torch.triu_indices(side, side, 1, device=vectors.device).unbind(0)
    places = (rows * side + columns).expand(vectors.shape[0], -1)
    # contiguous matrices: products with others are several times slower on a CPU
    upper = vectors.new_zeros(vectors.shape[0], side * side).scatter(1, places, vectors)
    upper = unflatten(upper, 1, (side, side))
    return upper - upper.mT


def cayley(q: Tensor, terms: int | None) -> Tensor:
    """Orthogonal matrices from skew ones.

    Args:
        q: skew matrices, (n, side, side).
        terms: None for (I - Q) (I + Q)^-1; otherwise the length of the series of (I + Q) (I - Q)^-1.

    Returns:
        As `q`.
    """
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    if terms is None:
        return linalg.solve_ex(eye + q, eye - q)[0]  # never singular, so no check, for which a GPU would wait
    if terms < 2:
        return eye + 0 * q
    if terms == 2:
        return eye + 2 * q
    last = max(3, terms - 1)
    partial = q + 2 * eye  # Horner: I + Q (2 I + Q (2 I + ... (2 I + Q)))
    for power in range(last - 1):
        partial = torch.baddbmm(eye, q, partial, beta=1 if power == last - 2 else 2)
    return partial


def rotations(layer: Layer, p: Leaf) -> Tensor:
    """The blocks of R, (n or 1, side, side), in at least float32.

    Args:
        layer: the layer.
        p: the leaves.

    Returns:
        The blocks.

    Raises:
        SiteError: if they do not make the size of the site.
    """
    config, vectors = layer.config, p[_name(layer.site)]
    assert isinstance(config, OFTConfig)
    blocks, numbers = vectors.shape
    side = (1 + math.isqrt(1 + 8 * numbers)) // 2
    size = size_of(layer.site)
    if size % side or blocks != (1 if config.block_share else size // side):
        raise SiteError(f"oft at {layer.site.path!r}: {blocks} blocks of size {side} are not made for {size} inputs.")
    vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    if config.coft:
        limit = config.eps**2 / blocks
        squares = 2 * vectors.square().sum(1, keepdim=True)  # of the norms of the skew matrices
        vectors = vectors * (limit / squares.clamp_min(limit)).sqrt()
    terms = config.num_cayley_neumann_terms if config.use_cayley_neumann else None
    if torch.is_autocast_enabled(vectors.device.type):
        with torch.autocast(vectors.device.type, enabled=False):
            return cayley(skew(vectors, side), terms)
    return cayley(skew(vectors, side), terms)


def rotated(x: Tensor, blocks: Tensor) -> Tensor:
    """X R, for the rows of x.

    Args:
        x: (*batch, n * side).
        blocks: (n, side, side), or (1, side, side) for all.

    Returns:
        Of x's shape.
    """
    side = blocks.shape[-1]
    if blocks.shape[0] == 1:
        return (x.reshape(-1, side) @ blocks[0]).reshape(x.shape)
    rows = x.reshape(-1, blocks.shape[0], side)
    return torch.bmm(rows.transpose(0, 1), blocks).transpose(0, 1).reshape(x.shape)


def convolved(layer: Layer, x: Tensor, weight: Tensor) -> Tensor:
    """A weight in canonical form applied as a convolution's own, with its groups.

    Args:
        layer: the layer.
        x: its input.
        weight: (n, in / groups, *kernel), where the first n / groups outputs see the first group, and so on.

    Returns:
        The n outputs, without a bias.
    """
    site, outputs = layer.site, weight.shape[0]
    if site.groups > 1:  # zeros where an output does not see the input
        ones = (1,) * (weight.ndim - 1)
        eye = torch.eye(site.groups, dtype=weight.dtype, device=weight.device)
        weight = weight.reshape(site.groups, -1, 1, *weight.shape[1:]) * eye.reshape(site.groups, 1, site.groups, *ones)
        weight = weight.reshape(outputs, site.in_features, *site.shape[2:])
    return layer.linear(x.to(weight.dtype), weight)


def before(layer: Layer, p: Leaf, x: Tensor) -> Tensor:
    """X R; nothing at embeddings and convolutions."""
    if layer.site.kind == "embedding" or layer.site.kind.startswith("conv"):
        return x
    dtype = torch.promote_types(x.dtype, p["oft_R"].dtype)
    return rotated(x.to(dtype), rotations(layer, p).to(dtype)).to(x.dtype)


def after(layer: Layer, p: Leaf, x: Tensor, y: Tensor) -> Tensor:
    """At embeddings y R, at convolutions y + (W' - W) * x; nothing at the others."""
    if layer.site.kind == "embedding":
        dtype = torch.promote_types(y.dtype, p["oft_embedding_R"].dtype)
        return rotated(y.to(dtype), rotations(layer, p).to(dtype)).to(y.dtype)
    if not layer.site.kind.startswith("conv"):
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


class OFTRotationModule(nn.Module):
    """What PEFT's `oft_R` holds for each adapter, in the in-place view."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


def holder(site: Site, base: nn.Module, container: str, parts: Mapping[str, Tensor]) -> nn.Module:
    """The module that holds the numbers in the in-place view."""
    return OFTRotationModule(parts["weight"])


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
        neutral=lambda p: {name: torch.zeros_like(leaf) for name, leaf in p.items()},
        view=View("oft", "OFT", "oft_", containers=("oft_R", "oft_embedding_R"), label="oft.", holder=holder),
    )
)
