"""FRoD: a basis that layers of one role share, in which each layer is scaled, and rotated by a sparse matrix.

    y = U (S + diag(l)) V^T x + b        where U diag(l_0) V^T = W, so that y = W x + b + U (S + diag(l - l_0)) V^T x

Leaves of a layer: `frod_lambda_l` (columns), which is l, and `frod_lambda_s_values` (nnz), the numbers of S. Shared by
the layers of a category and frozen: `frod_V.<category>` (columns, columns), `frod_s_indices.<category>` (2, nnz), rows
and columns of S, and `frod_s_size.<category>`, its shape. Frozen and in no checkpoint: `frod_U` (out, columns) and
`frod_lambda_0` (columns) of a layer, which follow from V and the base weight, so that `fa.load` needs the model. The
base weight is a matrix (out, columns) at every kind of layer: columns are inputs, at a convolution inputs of a group
times kernel. An embedding's is (vocabulary, width), as torch stores it.
The category is the end of a layer's path: "self_attn_q_proj". V joins the weights of a category by a QR decomposition
and the eigenvectors of what its parts have in common (`regularization_alpha` is the ridge).
Init: S zero, l = l_0: the identity, exactly, as only l - l_0 acts. The places of S from a generator seeded with
`projection_prng_key`. With `save_projection=False` no checkpoint holds V.
Cost: columns + nnz parameters a layer, nnz = `sparse_rate` columns^2; 2 columns (2 columns + out) flops a token forward
and twice that backward; U has as many numbers as W. Dense form: W + U (S + diag(l - l_0)) V^T.

Source: FRoD, AAAI 2026, doi:10.1609/aaai.v40i31.39813. Differs from PEFT: U follows from the V of a checkpoint (PEFT:
from one that it computes anew, whose signs may be others); layers of one index and category, as in an encoder and a
decoder, all count in V (PEFT B21: the last one alone); rounding does not change a new adapter's output; also on
embeddings, convolutions (grouped ones too), multi-head attention, plain parameters and experts.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from funcadapt import targets
from funcadapt._torch import linalg
from funcadapt.config import AdapterConfig
from funcadapt.errors import SiteError
from funcadapt.forms import KINDS, add_product, columns, refuse_dropout
from funcadapt.layer import Layer, dropout
from funcadapt.method import Draw, Fresh, Leaf, Method, Shared, View, register
from funcadapt.methods.vera import check_leaves
from funcadapt.sites import Site


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrodConfig(AdapterConfig):
    """Config of FRoD, with PEFT's fields.

    Attributes:
        target_modules: names, a regular expression, "all-linear", or None for the model type's default.
        projection_prng_key: the seed of the places of S.
        save_projection: whether checkpoints hold V and the places of S.
        frod_dropout: dropout on the adapter's input, active when the layer is in training mode.
        fan_in_fan_out: PEFT's bookkeeping; the layer's type decides.
        bias: "none", "all" (train every bias of the model) or "frod_only" (those of the adapted layers).
        modules_to_save: modules that are trained in full and saved with the adapter.
        init_weights: whether the adapter starts as the identity; otherwise with random numbers in S and l.
        layers_to_transform: indices of the layers to adapt.
        layers_pattern: the name of the layer list, with `layers_to_transform`.
        sparse_rate: how much of S is trained.
        regularization_alpha: the ridge in the joint decomposition.
        progressbar: PEFT's; nothing is shown here.
        runtime_offload_base_weight: PEFT's; the base weight stays where it is.

    Raises:
        ValueError: if the values contradict each other.
    """

    peft_type: str = "FROD"
    target_modules: Sequence[str] | str | None = None
    projection_prng_key: int = 0
    save_projection: bool = True
    frod_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    modules_to_save: Sequence[str] | None = None
    init_weights: bool = True
    layers_to_transform: Sequence[int] | int | None = None
    layers_pattern: Sequence[str] | str | None = None
    sparse_rate: float = 0.01
    regularization_alpha: float = 1e-3
    progressbar: bool = True
    runtime_offload_base_weight: bool = False

    target_table: ClassVar[targets.Targets] = {
        **targets.LORA,
        "phi": ("q_proj", "v_proj"),
        "vit": ("query", "value"),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified. ")
        if not 0 <= self.sparse_rate <= 1:
            raise ValueError(f"`sparse_rate` should be between 0 and 1, got {self.sparse_rate}.")
        if self.bias not in ("none", "all", "frod_only"):
            raise ValueError(f"`bias` must be 'none', 'all' or 'frod_only', got {self.bias!r}.")
        if not 0 <= self.frod_dropout < 1:
            raise ValueError(f"`frod_dropout` must be in [0, 1), got {self.frod_dropout}.")


def category(path: str) -> str:
    """The role of a layer, by PEFT's rule: the last two parts of its path, or one if the other is a number.

    Args:
        path: its path.

    Returns:
        The name, "self_attn_q_proj".
    """
    parts = path.split(".")
    if len(parts) == 1 or parts[-2].isdigit():
        return parts[-1]
    name = f"{parts[-2]}_{parts[-1]}"
    # BERT's attention has an output.dense of its own
    return "attention_output" if name == "output_dense" and "attention" in parts[-3:-2] else name


def _depth(path: str, fallback: int) -> int:
    """The number of a layer's block, by PEFT's rule."""
    parts = path.split(".")
    after = parts[parts.index("layers") + 1 :][:1] if "layers" in parts else []
    return next((int(part) for part in (*after, *parts) if part.isdigit()), fallback)


def _sizes(site: Site) -> tuple[int, int]:
    """Rows and columns of the weight as a matrix."""
    if site.kind == "embedding":
        return site.in_features, site.out_features
    return site.out_features, columns(site)


def _count(width: int, rate: float) -> int:
    """How many numbers S has."""
    count = min(int(width * width * rate), width * (width - 1))
    return max(1, count) if rate > 0 and width > 1 else count


def basis(matrices: Sequence[Tensor], alpha: float) -> Tensor:
    """V: what the weights of a category have in common, as PEFT computes it.

    Args:
        matrices: the weights, (rows, columns) each, float32.
        alpha: the ridge.

    Returns:
        (columns, columns).
    """
    stacked = torch.cat([*matrices])
    if stacked.shape[0] < stacked.shape[1]:
        return linalg.svd(stacked, full_matrices=True)[2].T
    q, r = linalg.qr(stacked)
    ridge = alpha * torch.eye(r.shape[1], dtype=r.dtype, device=r.device)
    inverses: list[Tensor] = [linalg.inv(part.T @ part + ridge) for part in q.split([len(m) for m in matrices])]
    mean = sum(inverses, torch.zeros_like(ridge)) / len(matrices)
    return r.T @ linalg.eigh(mean)[1]


def decompose(matrix: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """U with columns of length 1, and l_0, so that U diag(l_0) V^T is a weight.

    Args:
        matrix: the weight, (rows, columns).
        v: V.

    Returns:
        U (rows, columns) and l_0 (columns), in float64.
    """
    w, v = matrix.to(v.device, torch.float64), v.double()
    try:
        scaled: Tensor = linalg.solve(v, w.T).T
    except RuntimeError:  # V is singular
        scaled = w @ linalg.pinv(v, rtol=1e-6).T
    strength: Tensor = linalg.vector_norm(scaled, dim=0)
    some = strength > 1e-12
    return torch.where(some, scaled / torch.where(some, strength, 1.0), 0.0), strength


def init(site: Site, config: FrodConfig, draw: Draw, weight: Callable[[], Tensor]) -> Fresh:
    """The shapes alone: what a site has depends on the others, see `share`."""
    refuse_dropout(site, "frod_dropout", config.frod_dropout)
    if not draw.abstract:
        return Fresh({}, {})
    width = _sizes(site)[1]
    count = _count(width, config.sparse_rate)
    return Fresh({"frod_lambda_l": draw.zeros(width), "frod_lambda_s_values": draw.zeros(count)}, {})


def _places(width: int, count: int, generator: torch.Generator) -> Tensor:
    """Rows and columns of so many places off the diagonal, (2, count)."""
    drawn = torch.randperm(width * (width - 1), generator=generator)[:count] if count else torch.empty(0).long()
    rows = drawn // max(width - 1, 1)
    inner = drawn - rows * (width - 1)
    return torch.stack([rows, inner + (inner >= rows)])  # the diagonal is left out


def share(sites: Sequence[Site], config: FrodConfig, draw: Draw, weight: Callable[[Site], Tensor]) -> Shared:
    """V and the places of S for each category; U, l_0, l and the numbers of S for each site."""
    members: dict[str, list[tuple[int, Site]]] = {}
    for i, site in enumerate(sites):
        members.setdefault(category(site.path), []).append((_depth(site.path, i), site))
    generator = torch.Generator("cpu").manual_seed(config.projection_prng_key)
    frozen: dict[str, Tensor] = {}
    at: dict[str, dict[str, Tensor]] = {}
    for name in sorted(members):
        row = [site for _, site in sorted(members[name], key=lambda pair: pair[0])]
        widths = {_sizes(site)[1] for site in row}
        if len(widths) > 1:
            raise SiteError(f"The layers of the category {name!r}, such as {row[0].path!r}, share a basis, but they "
                            f"have {sorted(widths)} inputs. Adapt those of one size.")  # fmt: skip
        width = widths.pop()
        count = _count(width, config.sparse_rate)
        v_name = f"frod_V.{name}"
        if draw.abstract:
            frozen[v_name] = draw.zeros(width, width)
            places = torch.zeros(2, count, dtype=torch.long)
        else:
            places = _places(width, count, generator)
            if v_name in draw.known:
                frozen[v_name] = draw.known[v_name]
            else:
                every = [m for site in row for m in _matrices(site, weight(site))]
                frozen[v_name] = draw.cast(basis([m.float().cpu() for m in every], config.regularization_alpha))
        frozen[f"frod_s_indices.{name}"] = places.to(draw.device)
        frozen[f"frod_s_size.{name}"] = torch.tensor([width, width], device=draw.device)
    for site in sites:  # in model order, as PEFT draws
        at[site.path] = _own(site, config, draw, frozen[f"frod_V.{category(site.path)}"], weight)
    return Shared({}, frozen, at)


def _matrices(site: Site, weight: Tensor) -> list[Tensor]:
    """The weight as a matrix, or those of all experts."""
    if site.stack:
        return [*weight]
    return [weight.t() if site.kind == "embedding" else weight.flatten(1)]


def _own(site: Site, config: FrodConfig, draw: Draw, v: Tensor, weight: Callable[[Site], Tensor]) -> dict[str, Tensor]:
    rows, width = _sizes(site)
    lead = site.stack if site.experts > 1 else ()
    count = _count(width, config.sparse_rate)
    if draw.abstract:
        u, start = draw.zeros(*lead, rows, width), draw.zeros(*lead, width)
    else:
        pairs = [decompose(matrix, v) for matrix in _matrices(site, weight(site))]
        u = draw.cast(torch.stack([u for u, _ in pairs])).reshape(*lead, rows, width)
        start = draw.cast(torch.stack([start for _, start in pairs])).reshape(*lead, width)
    random = not config.init_weights
    values = draw.normal(*lead, count, std=0.1) if random else draw.zeros(*lead, count)
    strength = start + draw.normal(*lead, width, std=0.1) if random else start.clone()
    trained = {"frod_lambda_l": strength, "frod_lambda_s_values": values}
    return {**trained, "frod_U": u, "frod_lambda_0": start}


def inner(layer: Layer, p: Leaf) -> tuple[Tensor, Tensor, Tensor]:
    """U, S + diag(l - l_0) and V."""
    rows, width = _sizes(layer.site)
    name = category(layer.site.path)
    u, v, places = p["frod_U"].reshape(rows, width), p[f"frod_V.{name}"], p[f"frod_s_indices.{name}"]
    values = p["frod_lambda_s_values"].reshape(places.shape[1])
    strength = (p["frod_lambda_l"] - p["frod_lambda_0"]).reshape(width)
    diagonal = torch.arange(width, device=places.device) * (width + 1)
    index = torch.cat([places[0] * width + places[1], diagonal])
    flat = torch.zeros(width * width, dtype=values.dtype, device=values.device)
    middle = flat.scatter_add(0, index, torch.cat([values, strength])).view(width, width)
    return u, middle, v.reshape(width, width)


def after(layer: Layer, p: Leaf, x: Tensor, y: Tensor) -> Tensor:
    """Y + U (S + diag(l - l_0)) V^T drop(x)."""
    config: Any = layer.config
    if config.frod_dropout:
        x = dropout(layer, x, config.frod_dropout)
    u, middle, v = inner(layer, p)
    if layer.site.kind == "embedding":
        return (y + F.linear(torch.matmul(layer.linear(x, u.t()), middle), v)).to(y.dtype)
    if layer.site.kind in ("linear", "hf_conv1d"):
        return add_product(layer, torch.matmul(x.to(v.dtype), v), y, middle, u)
    return add_product(layer, x, y, middle @ v.t(), u)


def weight(layer: Layer, p: Leaf, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """W + U (S + diag(l - l_0)) V^T."""
    u, middle, v = inner(layer, p)
    update = u @ middle @ v.t()
    update = update.t() if layer.site.kind == "embedding" else update
    return (weight + update.reshape(layer.site.shape)).to(weight.dtype), bias


def check(config: FrodConfig, path: str, p: Leaf) -> None:
    """A basis and the places of S for each category, or l and the numbers of S."""
    if path:
        check_leaves(path, p, {"frod_lambda_l": (None,), "frod_lambda_s_values": (None,)})
        return
    for name in [leaf.removeprefix("frod_V.") for leaf in p if leaf.startswith("frod_V.")]:
        width = p[f"frod_V.{name}"].shape[0]
        expected: dict[str, tuple[int | None, ...]] = {f"frod_V.{name}": (width, width)}
        check_leaves(
            path, p, {**expected, f"frod_s_indices.{name}": (2, None), f"frod_s_size.{name}": (2,)}, lead=False
        )
        places, size = p[f"frod_s_indices.{name}"], p[f"frod_s_size.{name}"]
        if places.is_floating_point() or (places.numel() and not (places.min() >= 0 and places.max() < width)):
            raise SiteError(f"The file has frod_s_indices.{name} that are no places of a matrix of {width} rows.")
        if [int(n) for n in size] != [width, width]:
            raise SiteError(f"The file has frod_s_size.{name} {size.tolist()}, and frod_V.{name} of {width} rows.")  # pyright: ignore


def stored(config: Any, path: str, p: Leaf) -> Mapping[str, Tensor | None]:
    """No projections where the config says so."""
    return dict.fromkeys(p) if not path and not config.save_projection else {}


def restore(config: Any, path: str, p: Leaf) -> Leaf:
    """As PEFT: without the projections where the config says that they are made again, even if they are there."""
    if path or config.save_projection:
        return p
    warnings.warn(
        "The checkpoint holds the projections of FRoD, but save_projection=False says to compute them again from the "
        "base weights. Set save_projection=True to use them.",
        stacklevel=2,
    )
    return {}


_SHARED = ("frod_V.*", "frod_s_indices.*", "frod_s_size.*")

METHOD = register(
    Method(
        name="frod",
        config=FrodConfig,
        kinds=KINDS,
        keys={name: name for name in ("frod_lambda_l", "frod_lambda_s_values")},
        shared={name: name for name in _SHARED},
        constants=frozenset(_SHARED),
        init=init,
        share=share,
        uses=lambda site, own, shared: [name.replace("*", category(site.path)) for name in _SHARED],
        after=after,
        weight=weight,
        stored=stored,
        restore=restore,
        check=check,
        dropout=lambda config: config.frod_dropout,
        reads=frozenset(),
        view=View(
            package="frod",
            name="Frod",
            prefix="frod_",
            label="frod.",
            dropout="frod_dropout",
        ),
    )
)
