"""HRA: Householder reflections of a layer's input.

    y = W H x + b,    H = (I - 2 u_1 u_1^T) ... (I - 2 u_r u_r^T),    u_i the columns of U, normalised

H is never built. In compact form, H = I - 2 U V with V = S^-1 U^T of shape (r, in), where S is the unit upper
triangular matrix with 2 u_i^T u_j above the diagonal; `before` is x - 2 (x V^T) U^T. With `apply_GS` the vectors are
made orthogonal first, in their order: U^T becomes L^-1 U^T with L L^T = U^T U, in float64, as vectors may be close to
dependent, and V = U^T.
Leaves: `hra_u` (in, r); convolutions (in / groups * kernel, r), embeddings (width, r), as they reflect the vectors that
they look up. Experts: a leading axis.
Init: r / 2 kaiming-uniform columns, each twice, so that H is the identity; r columns, and no identity, if r is odd or
`init_weights` is false. With `apply_GS` also r columns: H cannot be the identity there.
Cost: r in parameters a layer; 4 r in flops a token and 2 r^2 in a call forward, twice that backward. A convolution adds
2 r out in * kernel flops a call, as it computes y - 2 (W U) (V * x), with r channels in between.
Dense form: W' = W H on W as a matrix (out, in / groups * kernel); embeddings W' = H W.

Source: Yuan et al. 2024, arXiv:2405.17484. Differs from PEFT: also on transformers' Conv1D, embeddings, multi-head
attention, plain parameters, experts and all convolutions (PEFT: square kernels, zero padding, no dilation); gradients
reach the base weight, too; a zero column is no reflection (PEFT: NaN), so ranks can be mixed; a new adapter with
`apply_GS` has independent columns: PEFT's come in equal pairs, and it divides the rounding noise of their difference
by its norm.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from funcadapt._torch import linalg
from funcadapt.config import AdapterConfig
from funcadapt.errors import SiteError
from funcadapt.layer import Layer
from funcadapt.method import Draw, Fresh, Leaf, Method, View, register
from funcadapt.parts.checks import check_layers, check_positive
from funcadapt.parts.forms import KINDS
from funcadapt.parts.lora_leaves import neutral
from funcadapt.parts.orthogonal import convolved, size_of, turns_input, without_autocast
from funcadapt.sites import Site


@dataclasses.dataclass(frozen=True, kw_only=True)
class HRAConfig(AdapterConfig):
    """Config of HRA, with PEFT's fields.

    Attributes:
        r: how many reflections; an even number, or a new adapter is not the identity.
        apply_GS: whether the vectors are made orthogonal (Gram-Schmidt).
        target_modules: names, a regular expression, "all-linear", or None for the model type's default.
        exclude_modules: names or a regular expression to leave out.
        init_weights: whether a new adapter is the identity; otherwise it is random.
        layers_to_transform: indices of the layers to adapt.
        layers_pattern: the name of the layer list, with `layers_to_transform`.
        bias: "none", "all" (train every bias of the model) or "hra_only" (those of the adapted layers).
        modules_to_save: modules that are trained in full and saved with the adapter.

    Raises:
        ValueError: if `r` is not positive, or the values contradict each other.
    """

    peft_type: str = "HRA"
    r: int = 8
    apply_GS: bool = False  # noqa: N815
    target_modules: Sequence[str] | str | None = None
    exclude_modules: Sequence[str] | str | None = None
    init_weights: bool = True
    layers_to_transform: Sequence[int] | int | None = None
    layers_pattern: Sequence[str] | str | None = None
    bias: str = "none"
    modules_to_save: Sequence[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "r")
        check_layers(self, of_names=True)

    def rank(self, leaves: Mapping[str, Tensor]) -> int:
        """How many reflections one site's leaves have."""
        return leaves["hra_u"].shape[-1] if "hra_u" in leaves else 0


def init(site: Site, config: HRAConfig, draw: Draw, weight: Callable[[], Tensor]) -> Fresh:
    """Pairs of equal columns, or r different ones."""
    r = config.r
    size = size_of(site)
    if config.apply_GS and r > size:
        raise SiteError(f"apply_GS=True needs r <= {size} at {site.path!r}, got r={r}: no more vectors are orthogonal.")
    if r % 2 or config.apply_GS or not config.init_weights:
        return Fresh({"hra_u": draw.uniform(*site.stack, size, r, bound=1 / math.sqrt(r))}, {})
    half = draw.uniform(*site.stack, size, r // 2, bound=1 / math.sqrt(r // 2))
    return Fresh({"hra_u": half.repeat_interleave(2, -1)}, {})


def factors(layer: Layer, p: Leaf) -> tuple[Tensor, Tensor]:
    """U (n, r) and V (r, n), in at least float32: H = I - 2 U V.

    Args:
        layer: the layer.
        p: the leaves.

    Returns:
        U and V.
    """
    config, u = layer.config, p["hra_u"]
    assert isinstance(config, HRAConfig)
    wide = torch.promote_types(u.dtype, torch.float64 if config.apply_GS else torch.float32)
    # tiny: what a zero column is divided by, so that it stays zero and its gradient is
    u = F.normalize(u.to(wide), dim=0, eps=torch.finfo(wide).tiny)
    with without_autocast(u.device):
        return _compact(config, u)


def _compact(config: HRAConfig, u: Tensor) -> tuple[Tensor, Tensor]:
    gram, v = u.t() @ u, u.t()
    if not config.apply_GS:
        return u, linalg.solve_triangular(gram * 2, v, upper=True, unitriangular=True)
    # ones on the diagonal, also where a column is zero; no check of the result, for which a GPU would wait
    root = linalg.cholesky_ex(gram + torch.diag_embed(1 - gram.diagonal()))[0]
    v = linalg.solve_triangular(root, v, upper=False)
    return v.t(), v


def reflected(layer: Layer, p: Leaf, x: Tensor, *, transposed: bool = False) -> Tensor:
    """X H^T, or x H, for the rows of x.

    Args:
        layer: the layer.
        p: the leaves.
        x: (*batch, n).
        transposed: whether the rows are multiplied by H instead.

    Returns:
        Of x's shape, in the dtype that promotes x and the leaves.
    """
    u, v = factors(layer, p)
    dtype = torch.promote_types(x.dtype, p["hra_u"].dtype)
    rows, u, v = x.reshape(-1, x.shape[-1]).to(dtype), u.to(dtype), v.to(dtype)
    first, second = (u, v) if transposed else (v.t(), u.t())
    return torch.addmm(rows, rows @ first, second, alpha=-2).view(x.shape)


def before(layer: Layer, p: Leaf, x: Tensor) -> Tensor:
    """X H^T; nothing at embeddings and convolutions."""
    if not turns_input(layer.site):
        return x
    return reflected(layer, p, x).to(x.dtype)


def after(layer: Layer, p: Leaf, x: Tensor, y: Tensor) -> Tensor:
    """At embeddings y H^T, at convolutions y - 2 (W U) (V * x); nothing at the others."""
    site = layer.site
    if site.kind == "embedding":
        return reflected(layer, p, y).to(y.dtype)
    if turns_input(site):
        return y
    u, v = factors(layer, p)
    up = ((layer.weight.flatten(1).to(u.dtype) @ u) * -2).to(p["hra_u"].dtype)
    v = v.to(p["hra_u"].dtype).reshape(u.shape[1], *site.shape[1:])
    h = convolved(layer, x, v.repeat(site.groups, *(1,) * (v.ndim - 1)))  # of each group
    return (y + layer.pointwise(h, up.reshape(*up.shape, *(1,) * (v.ndim - 2)))).to(y.dtype)


def weight(layer: Layer, p: Leaf, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """W H; embeddings H W."""
    if layer.site.kind == "embedding":
        return reflected(layer, p, weight.t()).t().to(weight.dtype), bias
    return reflected(layer, p, weight.flatten(1), transposed=True).reshape(weight.shape).to(weight.dtype), bias


def with_rank(p: Leaf, old: int, r: int) -> Leaf:
    """Zero columns up to rank r, or the columns cut to it."""
    u = p["hra_u"]
    return {**p, "hra_u": F.pad(u, (0, r - old)) if r > old else u[..., :r]}


def check(config: HRAConfig, path: str, p: Leaf) -> None:
    """The vectors, as many as the config says."""
    shape = tuple(p["hra_u"].shape) if "hra_u" in p else None
    if shape is None or len(shape) not in (2, 3) or shape[-1] != config.r:
        raise SiteError(f"The site {path!r} has hra_u of shape {shape}, its config says r={config.r}.")


METHOD = register(
    Method(
        name="hra",
        config=HRAConfig,
        kinds=KINDS,
        keys={"hra_u": "hra_u"},
        init=init,
        before=before,
        after=after,
        weight=weight,
        check=check,
        reads=frozenset({"apply_GS"}),
        with_rank=with_rank,
        neutral=neutral,
        view=View(
            "hra",
            "HRA",
            "hra_",
            classes={"linear": "HRALinear", "conv2d": "HRAConv2d"},
            label="hra.",
            attributes={"hra_r": "r", "hra_apply_GS": "apply_GS"},
        ),
    )
)
