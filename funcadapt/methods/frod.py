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
`projection_prng_key`. With `save_projection=False` no checkpoint holds V, which is computed again; with True a file
without it is refused, as eigenvectors have other signs on other machines.
Cost: columns + nnz parameters a layer, nnz = `sparse_rate` columns^2; 2 columns (2 columns + out) flops a token forward
and twice that backward; U has as many numbers as W. Dense form: W + U (S + diag(l - l_0)) V^T.

Source: FRoD, AAAI 2026, doi:10.1609/aaai.v40i31.39813. Differs from PEFT: U follows from the V of a checkpoint (PEFT:
from one that it computes anew, whose signs may be others); layers of one index and category, as in an encoder and a
decoder, all count in V (PEFT B21: the last one alone); rounding does not change a new adapter's output; also on
embeddings, convolutions (grouped ones too), multi-head attention, plain parameters and experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from funcadapt import targets
from funcadapt.config import AdapterConfig
from funcadapt.layer import Layer, dropout
from funcadapt.method import Draw, Fresh, Leaf, Method, Shared, View, register
from funcadapt.parts import joint_basis
from funcadapt.parts.checks import check_bias, check_layers, check_rates
from funcadapt.parts.forms import KINDS, add_product, refuse_dropout
from funcadapt.parts.random_projections import restore, stored
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
        check_layers(self)
        check_bias(self)
        check_rates(self, "frod_dropout")
        if not 0 <= self.sparse_rate <= 1:
            raise ValueError(f"`sparse_rate` should be between 0 and 1, got {self.sparse_rate}.")


def init(site: Site, config: FrodConfig, draw: Draw, weight: Callable[[], Tensor]) -> Fresh:
    """The shapes alone: what a site has depends on the others, see `share`."""
    refuse_dropout(site, "frod_dropout", config.frod_dropout)
    if not draw.abstract:
        return Fresh({}, {})
    width = joint_basis.sizes(site)[1]
    count = joint_basis.entries(width, config.sparse_rate)
    return Fresh({"frod_lambda_l": draw.zeros(width), "frod_lambda_s_values": draw.zeros(count)}, {})


def share(sites: Sequence[Site], config: FrodConfig, draw: Draw, weight: Callable[[Site], Tensor]) -> Shared:
    """V and the places of S for each category; U, l_0, l and the numbers of S for each site."""
    members = joint_basis.categories(sites)
    generator = torch.Generator("cpu").manual_seed(config.projection_prng_key)
    frozen: dict[str, Tensor] = {}
    at: dict[str, dict[str, Tensor]] = {}
    for name in sorted(members):
        row, width = members[name], joint_basis.sizes(members[name][0])[1]
        count = joint_basis.entries(width, config.sparse_rate)
        v_name = f"frod_V.{name}"
        if draw.abstract:
            frozen[v_name] = draw.zeros(width, width)
            places = torch.zeros(2, count, dtype=torch.long)
        else:
            places = joint_basis.off_diagonal(width, count, generator)
            if v_name in draw.known:
                frozen[v_name] = draw.known[v_name]
            else:
                every = [m for site in row for m in joint_basis.matrices(site, weight(site))]
                v = joint_basis.basis([m.float().cpu() for m in every], config.regularization_alpha)
                frozen[v_name] = draw.cast(v)
        frozen[f"frod_s_indices.{name}"] = places.to(draw.device)
        frozen[f"frod_s_size.{name}"] = torch.tensor([width, width], device=draw.device)
    for site in sites:  # in model order, as PEFT draws
        at[site.path] = _own(site, config, draw, frozen[f"frod_V.{joint_basis.category(site.path)}"], weight)
    return Shared({}, frozen, at)


def _own(site: Site, config: FrodConfig, draw: Draw, v: Tensor, weight: Callable[[Site], Tensor]) -> dict[str, Tensor]:
    rows, width = joint_basis.sizes(site)
    lead = site.stack if site.experts > 1 else ()
    count = joint_basis.entries(width, config.sparse_rate)
    if draw.abstract:
        u, start = draw.zeros(*lead, rows, width), draw.zeros(*lead, width)
    else:
        pairs = [joint_basis.decompose(matrix, v) for matrix in joint_basis.matrices(site, weight(site))]
        u = draw.cast(torch.stack([u for u, _ in pairs])).reshape(*lead, rows, width)
        start = draw.cast(torch.stack([start for _, start in pairs])).reshape(*lead, width)
    random = not config.init_weights
    values = draw.normal(*lead, count, std=0.1) if random else draw.zeros(*lead, count)
    strength = start + draw.normal(*lead, width, std=0.1) if random else start.clone()
    trained = {"frod_lambda_l": strength, "frod_lambda_s_values": values}
    return {**trained, "frod_U": u, "frod_lambda_0": start}


def inner(layer: Layer, p: Leaf) -> tuple[Tensor, Tensor, Tensor]:
    """U, S + diag(l - l_0) and V."""
    rows, width = joint_basis.sizes(layer.site)
    name = joint_basis.category(layer.site.path)
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
        uses=lambda site, own, shared: [name.replace("*", joint_basis.category(site.path)) for name in _SHARED],
        after=after,
        weight=weight,
        stored=stored,
        restore=restore,
        check=joint_basis.check,
        dropout=lambda config: config.frod_dropout,
        reads=frozenset(),
        view=View(
            package="frod",
            name="Frod",
            prefix="frod_",
            label="frod.",
            dropout="frod_dropout",
            containers=("frod_lambda_l", "frod_lambda_s_values", "frod_U", "frod_V", "frod_s_indices", "frod_s_size"),
            buffers=frozenset({"frod_U"}),
            hidden=frozenset({"frod_V", "frod_s_indices", "frod_s_size"}),
        ),
    )
)
