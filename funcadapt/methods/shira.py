"""SHiRA: a sparse update of high rank. Few entries of the weight are trained, the same ones from start to end.

    y = W x + b + S x,      S[rows[j], columns[j]] = w[j], and 0 elsewhere

Leaves: `shira_weight` (n), n = r (out + in), as many as a LoRA of rank r has; the constant `shira_indices` (2, n)
int32, rows and columns of W as a matrix (out, in), distinct and in checkpoints.
Init: w zeros, the identity; normal with `init_weights=False`. The places are a random subset, from `random_seed` or, if
that is None, from the adapter's own stream. For places of one's own, replace both leaves of a new adapter.
Cost: n parameters a layer. For few tokens 2 n flops each, by gathering inputs and adding to outputs. Otherwise n flops
and a matrix of the size of W a call: the layer runs with W + S. Where that cannot be (16 bits, a quantised base, many
adapters), S is a weight of its own: 2 in out flops a token. Twice that backward.
Dense form: W + S. Convolutions and embeddings: in is the size of a row of the weight.

Source: Bhardwaj et al. 2024, arXiv:2406.13175.
Differs from PEFT: the base layer runs in its quantisation; transformers' Conv1D, embeddings,
convolutions, multi-head attention and plain parameters; `torch.func` transforms work. There is no `mask_fn`, a function
that PEFT sets on the config: its files load, as they hold the places.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from funcadapt import targets
from funcadapt.config import AdapterConfig
from funcadapt.errors import SiteError
from funcadapt.layer import Layer
from funcadapt.method import Draw, Fresh, Leaf, Method, View, register
from funcadapt.parts.forms import KINDS, add_entries, add_sparse, add_weight, flat, is_dense, matrix, sparse
from funcadapt.sites import Site


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShiraConfig(AdapterConfig):
    """Config of SHiRA, with PEFT's fields.

    Attributes:
        r: there are r (out + in) trained entries a layer; it is no bound of the rank.
        mask_type: "random". Another name is for files of PEFT whose places some function chose.
        random_seed: the seed of the places; equal layers then have equal places.
        target_modules: names, a regular expression, "all-linear", or None for the model type's default.
        fan_in_fan_out: PEFT's bookkeeping; the layer's type decides.
        init_weights: whether the entries start at zero.
        modules_to_save: modules that are trained in full and saved with the adapter.

    Raises:
        ValueError: if `r` is not positive.
    """

    peft_type: str = "SHIRA"
    r: int = 32
    mask_type: str = "random"
    random_seed: int | None = None
    target_modules: Sequence[str] | str | None = None
    fan_in_fan_out: bool = False
    init_weights: bool = True
    modules_to_save: Sequence[str] | None = None

    target_table: ClassVar[targets.Targets] = {**targets.LORA, "phi": ("q_proj", "v_proj")}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r <= 0:
            raise ValueError(f"`r` should be a positive integer value but the value passed is {self.r}.")


def init(site: Site, config: ShiraConfig, draw: Draw, weight: Callable[[], Tensor]) -> Fresh:
    """`shira_weight`: zeros, or normal numbers if `init_weights` is false; `shira_indices`: a random subset."""
    out, inputs = matrix(site)
    n = config.r * (out + inputs)
    if n > out * inputs:
        raise SiteError(f"r={config.r} trains {n} entries of the weight of {site.path!r}, which has {out * inputs}.")
    if config.mask_type != "random":
        raise SiteError(f"mask_type={config.mask_type!r} says no places for {site.path!r}. Use 'random', and replace "
                        "`shira_indices` of the new adapter.")  # fmt: skip
    if draw.abstract:
        indices = torch.zeros(2, n, dtype=torch.int32, device=draw.device)
    else:
        # PEFT's generator has torch's constant seed if there is none in the config; so has ours, without one of its own
        generator = draw.generator if config.random_seed is None else torch.Generator().manual_seed(config.random_seed)
        flat = torch.randperm(out * inputs, generator=generator or torch.Generator())[:n].sort().values
        indices = torch.stack([flat // inputs, flat % inputs]).to(dtype=torch.int32, device=draw.device)
    return Fresh({"shira_weight": draw.zeros(n) if config.init_weights else draw.normal(n)}, {"shira_indices": indices})


def _entries(p: Leaf) -> tuple[Tensor, Tensor]:
    """Places (2, n) and values (n)."""
    at, values = p["shira_indices"].long(), p["shira_weight"]
    return at, values.reshape(at.shape[1:])


def folds(layer: Layer, p: Leaf, x: Tensor) -> bool:
    """Whether there are many tokens: then one product with W + S."""
    return is_dense(layer, p["shira_weight"].shape[-1], x)


def after(layer: Layer, p: Leaf, x: Tensor, y: Tensor) -> Tensor:
    """Y + S x, in y's dtype."""
    site, (at, values) = layer.site, _entries(p)
    if folds(layer, p, x):
        return add_weight(layer, x, y, sparse(matrix(site), at, values).reshape(site.shape))
    return add_sparse(y, x, at, values).to(y.dtype)


def weight(layer: Layer, p: Leaf, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """W + S; the bias stays."""
    at, values = _entries(p)
    return add_entries(weight, flat(matrix(layer.site), at), values).to(weight.dtype), bias


def restore(config: ShiraConfig, path: str, p: Leaf) -> Leaf:
    """PEFT writes the places as float32 on Windows."""
    return {name: leaf.to(torch.int32) if name == "shira_indices" else leaf for name, leaf in p.items()}


def check(config: ShiraConfig, path: str, p: Leaf) -> None:
    """As many values as places, and no place twice."""
    shapes = {name: tuple(p[name].shape) if name in p else None for name in ("shira_weight", "shira_indices")}
    size, places = shapes.values()
    if size is None or places is None or places != (*size[:-1], 2, *size[-1:]) or 0 in (size or (0,)):
        raise SiteError(f"The site {path!r} has leaves of shapes {shapes}, expected (n,) and (2, n).")
    rows, columns = p["shira_indices"].long().movedim(-2, 0)
    if has_duplicates(rows * 2**31 + columns) or (not rows.is_meta and min(rows.min(), columns.min()) < 0):
        raise SiteError(f"The site {path!r} has a negative place or one place twice in shira_indices.")


def has_duplicates(numbers: Tensor) -> bool:
    """Whether a number is there twice, in one row of (*experts, n)."""
    ordered = numbers.sort().values
    return not numbers.is_meta and bool((ordered[..., 1:] == ordered[..., :-1]).any())


METHOD = register(
    Method(
        name="shira",
        config=ShiraConfig,
        kinds=KINDS,
        keys={"shira_weight": "shira_weight", "shira_indices": "shira_indices"},
        constants=frozenset({"shira_indices"}),
        init=init,
        after=after,
        folds=folds,
        weight=weight,
        restore=restore,
        check=check,
        reads=frozenset(),
        rank_field="",  # r only counts entries
        view=View(
            package="shira",
            name="Shira",
            prefix="shira_",
            label="shira.",
            buffers=frozenset({"shira_indices"}),
            hidden=frozenset({"shira_indices"}),
            attributes={"r": "r"},
        ),
    )
)
