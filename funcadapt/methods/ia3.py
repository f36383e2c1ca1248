"""(IA)^3: learned vectors that scale activations.

    y = l * (W x + b)        at most layers: the bias is scaled too
    y = W (l * x) + b        at feed-forward layers (`feedforward_modules`)

Leaves: `ia3_l` of shape (out, 1), or (1, in) at feed-forward layers; (1, channels, 1, ...) at convolutions.
Init: ones, which is the identity. Cost: `out` (or `in`) parameters a layer and one multiplication.
Dense form: rows of W and b scaled by l, or columns of W.

Source: Liu et al. 2022, arXiv:2205.05638. Differs from PEFT: also on embeddings (not feed-forward), Conv1d, multi-head
attention and plain parameters; with an unequal group count on convolutions; several adapters compose in order; files of
"all-linear" with names of feed-forward layers can be read.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor

from funcadapt import targets
from funcadapt.combining import Algebra, Recipe, Spot, as_scalar, same_shapes, united
from funcadapt.config import AdapterConfig
from funcadapt.errors import SiteError, TargetError
from funcadapt.layer import Layer
from funcadapt.method import Draw, Fresh, Leaf, Method, View, register
from funcadapt.parts.forms import KINDS
from funcadapt.sites import Site


@dataclasses.dataclass(frozen=True, kw_only=True)
class IA3Config(AdapterConfig):
    """Config of (IA)^3, with PEFT's fields.

    Attributes:
        target_modules: names, a regular expression, "all-linear", or None for the model type's default.
        exclude_modules: names or a regular expression to leave out.
        feedforward_modules: which of the targets are scaled at their input. None: the model type's default, whatever
            `target_modules` is.
        fan_in_fan_out: PEFT's bookkeeping; the layer's type decides.
        modules_to_save: modules that are trained in full and saved with the adapter.
        init_ia3_weights: whether the vectors start at one.

    Raises:
        ValueError: if `feedforward_modules` has a name that is not among `target_modules`, nor the end of one of them.
    """

    peft_type: str = "IA3"
    target_modules: Sequence[str] | str | None = None
    exclude_modules: Sequence[str] | str | None = None
    feedforward_modules: Sequence[str] | str | None = None
    fan_in_fan_out: bool = False
    modules_to_save: Sequence[str] | None = None
    init_ia3_weights: bool = True

    target_table: ClassVar[targets.Targets] = targets.IA3

    def __post_init__(self) -> None:
        super().__post_init__()
        names, own = self.target_modules, self.feedforward_modules
        if isinstance(names, tuple) and isinstance(own, tuple):
            every = (*names, *(self.target_parameters or ()))
            # a file says paths for "all-linear", and then still the names of feed-forward layers
            if not all(_is_among(name, every) for name in own):
                raise ValueError("`feedforward_modules` should be a subset of `target_modules`")

    def for_model(self, model_type: str | None) -> Self:
        """This config with the model type's defaults filled in, `feedforward_modules` too."""
        config = super().for_model(model_type)
        if config.feedforward_modules is not None:
            return config
        if model_type not in targets.IA3_FEEDFORWARD:
            raise TargetError("Please specify `feedforward_modules` in the config; [] if no layer is one.")
        return dataclasses.replace(config, feedforward_modules=targets.IA3_FEEDFORWARD[model_type])


def _is_among(name: str, targets: Sequence[str]) -> bool:
    return any(target == name or target.endswith(f".{name}") for target in targets)


# The pattern is matched once, while tracing; dynamo need not look into `re`.
@torch.compiler.assume_constant_result  # pyright: ignore[reportUnknownMemberType, reportUntypedFunctionDecorator]
def _is_feedforward(names: Sequence[str] | str | None, path: str) -> bool:
    # PEFT: unlike target_modules, a list is matched by its ending without a dot
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path.endswith(name) for name in names or ())


def _at_input(layer: Layer) -> bool:
    return _is_feedforward(layer.config.feedforward_modules, layer.site.path)  # pyright: ignore


def init(site: Site, config: IA3Config, draw: Draw, weight: Callable[[], Tensor]) -> Fresh:
    """`ia3_l`: ones, or normal numbers if `init_ia3_weights` is false."""
    feedforward = _is_feedforward(config.feedforward_modules, site.path)
    if feedforward and site.kind == "embedding":
        raise SiteError(f"{site.path!r} is an embedding: it has no input to scale. Drop it from feedforward_modules.")
    size = site.in_features if feedforward else site.out_features
    if site.kind.startswith("conv"):
        shape = (1, size, *(1,) * (len(site.shape) - 2))
    else:
        shape = (1, size) if feedforward else (size, 1)
    shape = (*site.stack, *shape)
    return Fresh({"ia3_l": draw.ones(*shape) if config.init_ia3_weights else draw.normal(*shape)}, {})


def before(layer: Layer, p: Leaf, x: Tensor) -> Tensor:
    """X * l at feed-forward layers."""
    if not _at_input(layer):
        return x
    return (x * layer.per_input(p["ia3_l"])).to(x.dtype)


def after(layer: Layer, p: Leaf, x: Tensor, y: Tensor) -> Tensor:
    """Y * l at the other layers."""
    if _at_input(layer):
        return y
    return (y * layer.per_output(p["ia3_l"])).to(y.dtype)


def weight(layer: Layer, p: Leaf, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Columns of W scaled, or rows of W and b."""
    if _at_input(layer):
        return weight * layer.columns(p["ia3_l"]), bias
    scaled = bias if bias is None else bias * p["ia3_l"].reshape(layer.site.out_features)
    return weight * layer.rows(p["ia3_l"]), scaled


def check(config: IA3Config, path: str, p: Leaf) -> None:
    """One vector, with at most one axis longer than 1 (two where there are experts)."""
    shape = p["ia3_l"].shape
    if len(shape) < 2 or sum(size > 1 for size in shape[-2:]) > 1:
        raise SiteError(f"The site {path!r} has ia3_l of shape {tuple(shape)}, expected (out, 1) or (1, in).")


def warm(site: Site, config: IA3Config, draw: Draw) -> None:
    """PEFT draws the vectors before it sets them to one."""
    if config.init_ia3_weights:
        init(site, dataclasses.replace(config, init_ia3_weights=False), draw, lambda: draw.zeros())


def combine(recipe: Recipe, spot: Spot) -> Fresh:
    """(IA)^3's part of `fa.combine`.

    "linear" is sum w_i l_i, as in PEFT, where an adapter that has nothing here counts as ones (PEFT: as zeros, so that
    an activation vanishes which no adapter scales). The others sum what the adapters change, l_i - 1: "cat" exactly,
    the sparse ones as TIES was published, on the vectors of (IA)^3. There is no rank to cut.

    Args:
        recipe: how.
        spot: the site.

    Returns:
        The vector.

    Raises:
        SiteError: if the recipe ends in svd, or one adapter scales the input and another the output.
    """
    if recipe.is_svd:
        raise SiteError(f"{recipe.name!r} cuts ranks, and (IA)^3 has none. Use 'cat' or 'linear', or a sparse one.")
    configs = [spot.config, *(member.config for member in spot.members)]
    if len({_is_feedforward(config.feedforward_modules, spot.path) for config in configs}) > 1:
        raise SiteError(
            f"{spot.path!r} is one of feedforward_modules in some of the adapters, and not in others: their vectors "
            "scale different things."
        )
    vectors = [member.p["ia3_l"] for member in spot.members]
    same_shapes(spot.path, [{"ia3_l": tuple(vector.shape)} for vector in vectors])
    dtype = torch.stack(vectors).dtype
    wide = [vector.to(torch.promote_types(dtype, torch.float32)) for vector in vectors]
    weights = spot.weights(wide[0])
    if recipe.name == "linear":
        vector = recipe.merge(wide, weights, spot.path)
        for w in spot.absent:
            vector = vector + as_scalar(w, vector)
    else:
        vector = 1 + recipe.merge([each - 1 for each in wide], weights, spot.path)
    return Fresh({"ia3_l": vector.to(dtype)}, {})


def union(configs: Sequence[IA3Config], merged: IA3Config) -> IA3Config:
    """The new adapter has the feed-forward layers of all."""
    names = united([config.feedforward_modules for config in configs], "feedforward_modules")
    return dataclasses.replace(merged, feedforward_modules=names)


METHOD = register(
    Method(
        name="ia3",
        config=IA3Config,
        kinds=KINDS,
        keys={"ia3_l": "ia3_l"},
        init=init,
        inits_experts=True,
        before=before,
        after=after,
        weight=weight,
        check=check,
        reads=frozenset({"feedforward_modules"}),
        neutral=lambda p: {name: torch.ones_like(leaf) for name, leaf in p.items()},
        algebra=Algebra(combine, union),
        view=View("ia3", "IA3", "ia3_", warm=warm),
    )
)
