"""GLoRA: weight and bias are scaled and shifted, and the weight moves the bias.

    y = (W + W * A + B) x + b + b * D + E + W C

Leaves: two or one for each of A to E, by `config_A_B`, `config_C` and `config_D_E`:
    "lora"      `glora_A.Xd` (out, r), `glora_A.Xu` (r, in), likewise B; `glora_C.Xd` (in, r), `glora_C.Xu` (r, 1)
    "vector"    `glora_A.X` (out, 1), likewise B; `glora_C.X` (in, 1); `glora_D.X`, `glora_E.X` (out)
    "constant"  `.X` (1)
    "none"      a buffer `.zeros` of the full size, for files only; so are C, D and E where the layer has no bias
For convolutions in = channels / groups * kernel.
Init: Xd and X zero: the identity; with `init_weights=False` kaiming-uniform, and constants normal.
Cost: 2 r (in + out) + r (in + 1) + 2 parameters a layer with the default config; 2 in out flops a token and 4 r in out
flops a call forward, twice that backward; one matrix of the size of W is made in a call. Of vectors and constants: out
multiplications and `in` additions a token, as (W * A) x = A * (y - b), and 2 in out flops a call for C.
Dense form: as above; it is the only one that convolutions in groups and plain parameters have.

Source: Chavan et al. 2023, arXiv:2306.07967. Differs from PEFT: the base layer's output is used, not computed twice;
several adapters nest; also on transformers' Conv1D, embeddings, convolutions, multi-head attention and parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from funcadapt.config import AdapterConfig
from funcadapt.errors import SiteError
from funcadapt.layer import Layer
from funcadapt.method import Draw, Fresh, Leaf, Method, View, register
from funcadapt.parts.checks import check_bias, check_leaves, check_positive
from funcadapt.parts.forms import KINDS, add_weight, kaiming, matrix, product
from funcadapt.parts.holders import holder
from funcadapt.parts.lora_leaves import neutral, resized
from funcadapt.sites import Site

PATHS = ("glora_A", "glora_B", "glora_C", "glora_D", "glora_E")
_KINDS = {"config_A_B": ("lora", "vector", "constant", "none"), "config_C": ("lora", "vector", "none"),
          "config_D_E": ("vector", "constant", "none")}  # fmt: skip
_CALLED = frozenset({"linear", "hf_conv1d", "embedding", "conv1d", "conv2d", "conv3d"})  # y is W x + b there


@dataclasses.dataclass(frozen=True, kw_only=True)
class GloraConfig(AdapterConfig):
    """Config of GLoRA, with PEFT's fields.

    Attributes:
        r: the rank of what is "lora".
        target_modules: names, a regular expression, "all-linear", or None for the model type's default.
        bias: "none", "all" (train every bias of the model) or "glora_only" (those of the adapted layers).
        modules_to_save: modules that are trained in full and saved with the adapter.
        config_A_B: the form of A and B: "lora", "vector" (a number for each output), "constant" or "none".
        config_C: the form of C: "lora", "vector" or "none".
        config_D_E: the form of D and E: "vector", "constant" or "none".
        init_weights: whether nothing changes at the start; otherwise all is random.

    Raises:
        ValueError: if a value is out of range.
    """

    peft_type: str = "GLORA"
    r: int = 8
    target_modules: Sequence[str] | str | None = None
    bias: str = "none"
    modules_to_save: Sequence[str] | None = None
    config_A_B: str = "lora"  # noqa: N815 (PEFT's name)
    config_C: str = "lora"  # noqa: N815
    config_D_E: str = "constant"  # noqa: N815
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "r")
        check_bias(self)
        for field, kinds in _KINDS.items():
            if getattr(self, field) not in kinds:
                raise ValueError(
                    f"Invalid {field} value: {getattr(self, field)!r}. Valid values are: {', '.join(sorted(kinds))}."
                )

    def rank(self, leaves: Mapping[str, Tensor]) -> int:
        """The rank of one site's leaves; 0 if none is "lora"."""
        return next((leaf.shape[-1] for name, leaf in leaves.items() if name.endswith(".Xd")), 0)


def _forms(config: GloraConfig) -> tuple[str, ...]:
    """The forms of A to E."""
    return config.config_A_B, config.config_A_B, config.config_C, config.config_D_E, config.config_D_E


def init(site: Site, config: GloraConfig, draw: Draw, weight: Callable[[], Tensor]) -> Fresh:
    """The leaves of the five paths, those without any as zeros among the buffers."""
    (out, inputs), r = matrix(site), config.r
    kinds = _forms(config) if site.bias else (*_forms(config)[:2], "none", "none", "none")
    sizes = ((out, inputs), (out, inputs), (inputs, 1), (out,), (out,))
    params, buffers = dict[str, Tensor](), dict[str, Tensor]()

    def start(*shape: int) -> Tensor:
        return draw.zeros(*shape) if config.init_weights else kaiming(draw, *shape)

    for name, kind, size in zip(PATHS, kinds, sizes, strict=True):
        if kind == "none":
            buffers[f"{name}.zeros"] = draw.zeros(*size)
        elif kind == "constant":
            params[f"{name}.X"] = draw.zeros(1) if config.init_weights else draw.normal(1, std=0.02)
        elif kind == "vector":  # PEFT takes that of D and E for a row, and the others for columns
            params[f"{name}.X"] = start(size[0], 1) if len(size) > 1 else start(1, out).flatten()
        else:
            up = kaiming(draw, r, size[-1])
            params |= {f"{name}.Xd": start(size[0], r), f"{name}.Xu": up}
    return Fresh(params, buffers)


def _factors(p: Leaf, name: str, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """The factors of what is "lora", as matrices. Any other size raises."""
    down, up = p[f"{name}.Xd"], p[f"{name}.Xu"]
    return down.reshape(rows, down.shape[1]), up.reshape(down.shape[1], columns)


def _part(p: Leaf, name: str, rows: int, columns: int) -> Tensor | None:
    """A to E, as a matrix of those sizes or of 1; None for zeros. Any other size raises."""
    if f"{name}.Xd" in p:
        return torch.mm(*_factors(p, name, rows, columns))
    x = p.get(f"{name}.X")
    return None if x is None else x.reshape((1, 1) if x.numel() == 1 else (rows, 1))


def bias_change(site: Site, p: Leaf, weight: Callable[[], Tensor], bias: Tensor | None) -> Tensor | None:
    """B * D + E + W C, (out) or of one number; None if there is none of them."""
    out, inputs = matrix(site)
    c, d, e = _part(p, "glora_C", inputs, 1), _part(p, "glora_D", out, 1), _part(p, "glora_E", out, 1)
    if bias is None:
        if c is not None or d is not None or e is not None:
            raise SiteError(f"GLoRA has a C, D or E at {site.path!r}, which has no bias that they could act on.")
        return None
    parts = [] if c is None else [product(weight().flatten(1), c.expand(inputs, 1)).flatten()]
    parts += [] if d is None or e is None else [bias * d.flatten(), e.flatten()]
    return sum(parts[1:], parts[0]) if parts else None


def weight_change(site: Site, p: Leaf, weight: Callable[[], Tensor]) -> Tensor | None:
    """W * A + B in canonical form; None if there is neither."""
    out, inputs = matrix(site)
    a = _part(p, "glora_A", out, inputs)
    if a is None:
        return None
    scaled = weight().reshape(out, inputs) * a
    if "glora_B.Xd" in p:
        factors = (t.to(scaled.dtype) for t in _factors(p, "glora_B", out, inputs))
        return torch.addmm(scaled, *factors).reshape(site.shape)
    return (scaled + p["glora_B.X"].reshape(a.shape)).reshape(site.shape)


def folds(layer: Layer, p: Leaf, x: Tensor) -> bool:
    """Whether A is a matrix, or applied as one."""
    return p.get("glora_A.X") is None or layer.site.groups > 1


def after(layer: Layer, p: Leaf, x: Tensor, y: Tensor) -> Tensor:
    """Y + (W * A + B) x + b * D + E + W C, in y's dtype."""
    site = layer.site
    read: Callable[[], Tensor] = lambda: layer.weight  # noqa: E731
    base, a = y, p.get("glora_A.X")
    if site.kind in _CALLED:  # elsewhere the bias, if there is one, is not a part of y
        change = bias_change(site, p, read, layer.bias)
        if change is not None:
            y = (y + change.reshape(-1, *(1,) * (len(site.shape) - 2))).to(y.dtype)
    if a is None or folds(layer, p, x) or site.kind not in _CALLED:
        delta = weight_change(site, p, read)
        return y if delta is None else add_weight(layer, x, y, delta)
    b, bias, rest = p["glora_B.X"], layer.bias, (1,) * (len(site.shape) - 2)
    if bias is not None:
        base = base - layer.per_output(bias)
    if x.is_floating_point() and x.dtype != b.dtype:
        x = x.to(b.dtype)
    plain = len(site.shape) == 2 and site.kind != "embedding"
    total = x.sum(-1, keepdim=True) if plain else layer.linear(x, b.new_ones(1, *site.shape[1:]))
    size = 1 if a.numel() == 1 else site.out_features
    return (y + base * a.reshape(size, *rest) + total * b.reshape(size, *rest)).to(y.dtype)


def weight(layer: Layer, p: Leaf, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """W + W * A + B, and b + b * D + E + W C."""
    delta = weight_change(layer.site, p, lambda: weight)
    change = bias_change(layer.site, p, lambda: weight, bias)
    new = weight if delta is None else (weight + delta).to(weight.dtype)
    return new, bias if bias is None or change is None else (bias + change).to(bias.dtype)


def with_rank(p: Leaf, old: int, r: int) -> Leaf:
    """Xd with zero columns and Xu with zero rows up to rank r, or both cut to it."""
    axes = {"Xd": 1, "Xu": 2}
    return {
        name: resized(leaf, leaf.ndim - axes[kind], r) if (kind := name.rpartition(".")[2]) in axes else leaf
        for name, leaf in p.items()
    }


def check(config: GloraConfig, path: str, p: Leaf) -> None:
    """The leaves that the config asks for, with its rank; C, D and E can be zeros where there is no bias."""
    leaves = {"lora": {"Xd", "Xu"}, "none": {"zeros"}, "vector": {"X"}, "constant": {"X"}}
    for name, kind in zip(PATHS, _forms(config), strict=True):
        found = {leaf.rpartition(".")[2] for leaf in p if leaf.startswith(f"{name}.")}
        if found != leaves[kind] and not (name[-1] in "CDE" and found == {"zeros"}):
            raise SiteError(f"The site {path!r} has {sorted(found)} of {name}, its config says {sorted(leaves[kind])}.")
        if "Xd" in found:
            check_leaves(path, p, {f"{name}.Xd": (None, config.r), f"{name}.Xu": (config.r, None)})


def path_of(site: Site, base: nn.Module, container: str, parts: Mapping[str, Tensor]) -> nn.Module:
    """What holds A to E in the in-place view: a path of PEFT's."""
    kind = "Lora" if "Xd" in parts else "Empty" if "zeros" in parts else "Vector" if len(parts["X"]) > 1 else "Scalar"
    return holder(f"Glora{kind}Path", buffers=("zeros",))(site, base, container, parts)


METHOD = register(
    Method(
        name="glora",
        config=GloraConfig,
        kinds=KINDS,
        keys={f"{name}.{leaf}": f"{name}.{leaf}" for name in PATHS for leaf in ("Xd", "Xu", "X", "zeros")},
        constants=frozenset(f"{name}.zeros" for name in PATHS),
        init=init,
        after=after,
        folds=folds,
        weight=weight,
        check=check,
        reads=frozenset(),
        with_rank=with_rank,
        neutral=neutral,
        view=View("glora", "Glora", "glora_", label="glora.", containers=PATHS, attributes={"r": "r"}, holder=path_of),
    )
)
