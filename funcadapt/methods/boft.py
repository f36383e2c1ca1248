"""BOFT: butterfly products of block-diagonal rotations of a layer's input, and a scale for each output.

    y = s * (W R^T x) + b,    R = R_N ... R_1,    R_n = P_n blockdiag(Q_n1, ..., Q_nD) P_n^T
    Q = (I - K) (I + K)^-1,   K = (A - A^T) / 2   (Cayley)

A are the D blocks (k, k) of the n-th factor. The butterfly permutation P_n pairs the half blocks of the inputs that are
2^(n-1) half blocks apart, within segments of k 2^(n-1) inputs: one factor is OFT, N factors mix inputs of 2^(N-1)
blocks. P is a transposition of axes here, and no matrix; x is multiplied block by block.
Leaves: `boft_R` (N, D, k, k), `boft_s` (out, 1); at convolutions (1, out). D k is the number of inputs, of a kernel's
numbers (in / groups * kernel), or the width of an embedding, which rotates and scales what it looks up.
Init: A zero and s one, which is the identity; `init_weights=False`: small normal numbers around them.
Cost: N in k + out parameters a layer; 2 N in k flops a token and about 3 N in k^2 a call forward, twice that backward,
and a second product with W, or a second convolution.
Dense form: W' = s * W R^T, rows scaled, on W as a matrix (out, in / groups * kernel); embeddings s * R^T W.
`boft_dropout`: in training, blocks of one factor, drawn by chance, are replaced by the identity: int(rate * D) of them.

Source: Liu et al. 2023, arXiv:2311.06243. Differs from PEFT: more than one factor without its CUDA extension, which
else trains one, whatever the config says (B20): a file of such a training is read with factors of zeros, which is the
same. Also on transformers' Conv1D, embeddings, multi-head attention, plain parameters, experts and all convolutions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from funcadapt._torch import unflatten
from funcadapt.config import AdapterConfig
from funcadapt.errors import SiteError
from funcadapt.layer import Layer
from funcadapt.method import Draw, Fresh, Leaf, Method, View, register
from funcadapt.parts.checks import check_layers, check_one_of, check_positive
from funcadapt.parts.forms import KINDS, refuse_dropout
from funcadapt.parts.orthogonal import butterfly, cayley, convolved, size_of
from funcadapt.sites import Site


@dataclass(frozen=True, kw_only=True)
class BOFTConfig(AdapterConfig):
    """Config of BOFT, with PEFT's fields.

    Attributes:
        boft_block_size: the size of a block; 0 where `boft_block_num` says it.
        boft_block_num: how many blocks; 0 where `boft_block_size` says it.
        boft_n_butterfly_factor: how many factors the rotation has.
        target_modules: names, a regular expression, "all-linear", or None for the model type's default.
        exclude_modules: names or a regular expression to leave out.
        boft_dropout: the part of the blocks of one factor that are the identity in training.
        fan_in_fan_out: PEFT's bookkeeping; the layer's type decides.
        bias: "none", "all" (train every bias of the model) or "boft_only" (those of the adapted layers).
        modules_to_save: modules that are trained in full and saved with the adapter.
        init_weights: whether a new adapter is the identity; otherwise it is random.
        layers_to_transform: indices of the layers to adapt.
        layers_pattern: the name of the layer list, with `layers_to_transform`.

    Raises:
        ValueError: if not exactly one of `boft_block_size` and `boft_block_num` is given, or a value is out of range.
    """

    peft_type: str = "BOFT"
    boft_block_size: int = 4
    boft_block_num: int = 0
    boft_n_butterfly_factor: int = 1
    target_modules: Sequence[str] | str | None = None
    exclude_modules: Sequence[str] | str | None = None
    boft_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    modules_to_save: Sequence[str] | None = None
    init_weights: bool = True
    layers_to_transform: Sequence[int] | int | None = None
    layers_pattern: Sequence[str] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layers(self)
        check_one_of(self, "boft_block_size", "boft_block_num")
        check_positive(self, "boft_n_butterfly_factor")
        if not 0 <= self.boft_dropout <= 1:
            raise ValueError(f"`boft_dropout` must be in [0, 1], got {self.boft_dropout}.")


def init(site: Site, config: BOFTConfig, draw: Draw, weight: Callable[[], Tensor]) -> Fresh:
    """Blocks of zeros and scales of one, or normal numbers around them if `init_weights` is false."""
    refuse_dropout(site, "boft_dropout", config.boft_dropout)
    size, factors = size_of(site), config.boft_n_butterfly_factor
    given = config.boft_block_size or config.boft_block_num
    if size % given:
        what = "boft_block_size" if config.boft_block_size else "boft_block_num"
        raise SiteError(f"in_features ({size}) of {site.path!r} must be divisible by {what} ({given})!")
    side = given if config.boft_block_size else size // given
    blocks = size // side
    if factors > 1 and (side % 2 or blocks % 2 ** (factors - 1)):
        raise SiteError(
            f"{site.path!r} has {blocks} blocks of size {side}: boft_n_butterfly_factor={factors} needs an even size, "
            f"and a multiple of {2 ** (factors - 1)} blocks."
        )
    shape = (*site.stack, factors, blocks, side, side)
    scales = (*site.stack, *((1, site.out_features) if site.kind.startswith("conv") else (site.out_features, 1)))
    if config.init_weights:
        return Fresh({"boft_R": draw.zeros(*shape), "boft_s": draw.ones(*scales)}, {})
    rotations = draw.normal(*shape, std=0.1)
    return Fresh({"boft_R": rotations, "boft_s": draw.cast(1 + draw.normal(*scales, std=0.1).float())}, {})


def rotations(layer: Layer, p: Leaf) -> Tensor:
    """The blocks of all factors, (N, D, k, k), in at least float32, with dropout. Any other size raises."""
    given, config = p["boft_R"], layer.config
    factors, blocks, side = given.shape[:3]
    if blocks * side != size_of(layer.site):
        raise SiteError(
            f"boft at {layer.site.path!r}: {blocks} blocks of size {side} do not make {size_of(layer.site)} inputs."
        )
    wide = given.to(torch.promote_types(given.dtype, torch.float32))
    q = cayley((wide - wide.mT).flatten(0, 1) / 2, None)
    q = unflatten(q, 0, (factors, blocks))
    assert isinstance(config, BOFTConfig)
    if not config.boft_dropout or not layer.training:
        return q
    # in the order in which PEFT draws
    chosen = torch.arange(factors, device=q.device) == torch.randint(factors, (1,), device=q.device)
    dropped = torch.randperm(blocks, device=q.device) < int(config.boft_dropout * blocks)
    mask = (chosen[:, None] & dropped)[:, :, None, None]
    return torch.where(mask, torch.eye(side, dtype=q.dtype, device=q.device), q)


def after(layer: Layer, p: Leaf, x: Tensor, y: Tensor) -> Tensor:
    """S (y - b) + b, where y has the product of W and what the rotation adds to x; at embeddings y is rotated."""
    site = layer.site
    blocks, wide = rotations(layer, p), torch.promote_types(y.dtype, p["boft_R"].dtype)
    if site.kind == "embedding":
        out = butterfly(y.to(wide), blocks.to(wide))
    elif site.kind.startswith("conv"):
        base = layer.weight.to(blocks.dtype)
        delta = butterfly(base.flatten(1), blocks, transposed=True).reshape(base.shape) - base
        out = y + convolved(layer, x, delta.to(p["boft_R"].dtype))
    else:
        # Not in a hook on the input: a weight of the adapter interpolates the value of each hook, and the layer would
        # be quadratic in it if both of them acted.
        x = x.to(wide)
        out = y + layer.linear(butterfly(x, blocks.to(wide)) - x, layer.weight.to(wide))
    scale = layer.per_output(p["boft_s"].flatten())
    if not site.bias or layer.bias is None:
        return (out * scale).to(y.dtype)
    return torch.lerp(layer.per_output(layer.bias).to(wide), out.to(wide), scale.to(wide)).to(y.dtype)


def weight(layer: Layer, p: Leaf, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """S W R^T; embeddings S R^T W."""
    blocks = rotations(layer, p)
    wide = weight.to(torch.promote_types(weight.dtype, blocks.dtype))
    if layer.site.kind == "embedding":
        new = butterfly(wide.t(), blocks).t()
    else:
        new = butterfly(wide.flatten(1), blocks, transposed=True).reshape(weight.shape)
    return (new * layer.rows(p["boft_s"].flatten())).to(weight.dtype), bias


def restore(config: BOFTConfig, path: str, p: Leaf) -> Leaf:
    """Factors of zeros up to the config's number: PEFT without its CUDA extension trains and saves one."""
    if "boft_R" not in p or p["boft_R"].ndim not in (4, 5) or p["boft_R"].shape[-4] != 1:
        return p
    missing = config.boft_n_butterfly_factor - 1
    return {**p, "boft_R": F.pad(p["boft_R"], (0, 0, 0, 0, 0, 0, 0, missing))} if missing else p


def check(config: BOFTConfig, path: str, p: Leaf) -> None:
    """Both leaves, with square blocks."""
    shapes = {name: tuple(p[name].shape) for name in ("boft_R", "boft_s") if name in p}
    r = p["boft_R"].shape if len(shapes) == 2 else torch.Size()
    square = len(r) in (4, 5) and r[-1] == r[-2] and r[-4] == config.boft_n_butterfly_factor
    if not square or p["boft_s"].ndim != len(r) - 2 or 1 not in shapes["boft_s"][-2:]:
        raise SiteError(f"The site {path!r} has the leaves {shapes}, expected boft_R of shape "
                        f"({config.boft_n_butterfly_factor}, blocks, k, k) and boft_s of shape (out, 1).")  # fmt: skip


def neutral(p: Leaf) -> Leaf:
    """No rotation, scales of one."""
    return {k: torch.ones_like(v) if k == "boft_s" else torch.zeros_like(v) for k, v in p.items()}


METHOD = register(
    Method(
        name="boft",
        config=BOFTConfig,
        kinds=KINDS,
        keys={"boft_R": "boft_R", "boft_s": "boft_s"},
        init=init,
        inits_experts=True,
        after=after,
        weight=weight,
        restore=restore,
        check=check,
        dropout=lambda config: config.boft_dropout,
        reads=frozenset(),
        rank_field="",
        neutral=neutral,
        view=View("boft", "BOFT", "boft_", label="boft.", dropout="boft_dropout"),
    )
)
