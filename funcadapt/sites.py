"""Sites: the places in a model where an adapter applies."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn

from funcadapt._torch import named_modules
from funcadapt.errors import SiteError, did_you_mean
from funcadapt.quantised import is_quantised_linear


@dataclasses.dataclass(frozen=True)
class Site:
    """One place where an adapter applies: a layer, or a plain parameter.

    Attributes:
        path: where the adapter's leaves live: the module's path, or the parameter's.
        kind: "linear", "hf_conv1d" (transformers' Conv1D), "embedding", "conv1d", "conv2d", "conv3d", "mha" (the
            packed in-projection of `nn.MultiheadAttention`), "parameter" (2-D) or "experts" (3-D).
        shape: the canonical weight's shape, (out, in, *kernel), of one expert if there are several.
        dtype: the dtype of the weight, or float32 where it is quantised.
        device: where the layer computes, see `device_of`.
        owner: path of the module that holds the weight.
        parameter: the weight's name in that module.
        bias: the bias's name in that module, or "".
        transposed: whether the weight is stored as (in, out).
        experts: how many experts are stacked in the parameter; 0 for none.
        groups: the groups of a convolution.
        tied: other names of the same weight.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    owner: str
    parameter: str = "weight"
    bias: str = ""
    transposed: bool = False
    experts: int = 0
    groups: int = 1
    tied: tuple[str, ...] = ()

    @property
    def out_features(self) -> int:
        """Outputs of the layer (channels of a convolution, width of an embedding)."""
        return self.shape[0]

    @property
    def in_features(self) -> int:
        """Inputs of the layer (all groups of a convolution, vocabulary of an embedding)."""
        return self.shape[1] * self.groups

    @property
    def weight_name(self) -> str:
        """The weight's full name in the model."""
        return f"{self.owner}.{self.parameter}" if self.owner else self.parameter

    @property
    def stack(self) -> tuple[int, ...]:
        """The leading axis that leaves have at experts; () elsewhere."""
        return (self.experts,) if self.experts else ()

    @property
    def num_parameters(self) -> int:
        """How many numbers the base weight has."""
        return torch.Size(self.shape).numel() * max(1, self.experts)


def one_expert(site: Site) -> Site:
    """The site of a single one of several experts: a plain 2-D parameter."""
    return dataclasses.replace(site, kind="parameter", experts=0)


class SiteTable(Sequence[Site]):
    """The sites that a config selects, in model order. Prints as a table."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self._sites = tuple(sites)

    @overload
    def __getitem__(self, index: int) -> Site: ...
    @overload
    def __getitem__(self, index: slice) -> SiteTable: ...
    def __getitem__(self, index: int | slice) -> Site | SiteTable:
        """A site by position, or a part of the table."""
        return SiteTable(self._sites[index]) if isinstance(index, slice) else self._sites[index]

    def __len__(self) -> int:
        """How many sites there are."""
        return len(self._sites)

    def __repr__(self) -> str:
        """The table: path, kind, shape, parameters, tied names."""
        rows = [("path", "kind", "shape", "parameters", "tied with")]
        for s in self:
            shape = "x".join(map(str, ((s.experts,) if s.experts else ()) + s.shape))
            rows.append((s.path, s.kind, shape, f"{s.num_parameters:,}", ", ".join(s.tied)))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        total = sum(s.num_parameters for s in self)
        return "\n".join([*lines, f"{len(self)} site{'s' * (len(self) != 1)}, {total:,} base parameters"])


def describe(model: nn.Module, path: str) -> tuple[Site, nn.Module]:
    """The site at a path, and the module that holds its weight.

    Args:
        model: the model.
        path: the path of a module or of a parameter.

    Returns:
        The site and the module.

    Raises:
        SiteError: if there is nothing at that path, or nothing that can be adapted.
    """
    owner, _, name = path.rpartition(".")
    module = _find(model, owner)
    if module is not None:
        child = module._modules.get(name) if path else model
        if child is not None:
            described = describe_module(path, child)
            if len(described) == 1:
                return described[0], child
        elif module._parameters.get(name) is not None:
            return describe_parameter(owner, module, name), module
    raise SiteError(
        f"The model has no layer or parameter at {path!r} that an adapter could apply to."
        + did_you_mean(path, (n for n, _ in named_modules(model)))
        + " Was this adapter made for another model?"
    )


def describe_module(path: str, module: nn.Module, method: str = "an adapter") -> list[Site]:
    """The sites of one module: one, or two for `nn.MultiheadAttention`.

    Args:
        path: the module's path.
        module: the module.
        method: who asks, for the error message.

    Returns:
        The sites.

    Raises:
        SiteError: if the module is of no kind that can be adapted.
    """
    m: Any = module
    if isinstance(module, nn.MultiheadAttention):
        if m.in_proj_weight is None:
            raise SiteError(
                f"{path!r} is an nn.MultiheadAttention whose key or value width differs from the query's, so it has "
                f"no packed in-projection. Adapt its weights one by one: target_parameters=['{path}.q_proj_weight', "
                f"'{path}.k_proj_weight', '{path}.v_proj_weight']."
            )
        packed = describe_parameter(path, module, "in_proj_weight")
        return [packed, *describe_module(f"{path}.out_proj", m.out_proj)]
    groups, transposed = 1, False
    if isinstance(module, nn.Linear):
        kind, shape = "linear", (m.out_features, m.in_features)  # not weight.shape: it may be quantised
    elif isinstance(module, nn.Embedding):
        kind, shape, transposed = "embedding", (m.embedding_dim, m.num_embeddings), True
        if m.max_norm is not None:
            raise SiteError(
                f"{path!r} is an embedding with max_norm={m.max_norm}: it renormalises its weight in place on every "
                "call, so it has no fixed weight to adapt."
            )
    elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        kind = f"conv{len(m.kernel_size)}d"
        shape, groups = (m.out_channels, m.in_channels // m.groups, *m.kernel_size), m.groups
    elif type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        kind, shape, transposed = "hf_conv1d", (m.weight.shape[1], m.weight.shape[0]), True
    elif is_quantised_linear(module):  # GPTQ, AWQ, HQQ: packed under other names
        kind, shape = "linear", (m.out_features, m.in_features)
    else:
        raise SiteError(
            f"{method} cannot adapt {path!r}: {type(module).__name__} is no layer with a weight that it knows. Target "
            "its linear, embedding or convolution layers, or its parameters with target_parameters."
        )
    return [
        Site(
            path,
            kind,
            tuple(shape),
            _floating(weight := _held(m)),
            device_of(m, weight),
            owner=path,
            bias="bias" if getattr(m, "bias", None) is not None else "",
            transposed=transposed,
            groups=groups,
        )
    ]


def describe_parameter(owner: str, module: nn.Module, name: str) -> Site:
    """The site of a plain parameter: 2-D (out, in), or 3-D experts, transposed if the module says so.

    Args:
        owner: path of the module that holds it.
        module: that module.
        name: the parameter's name in it.

    Returns:
        The site.

    Raises:
        SiteError: if the parameter is neither 2-D nor 3-D.
    """
    weight: Tensor = getattr(module, name)
    path = f"{owner}.{name}" if owner else name
    if weight.ndim not in (2, 3):
        raise SiteError(f"Parameter {path!r} has shape {tuple(weight.shape)}; only 2-D and 3-D ones can be adapted.")
    kind, bias = ("experts" if weight.ndim == 3 else "parameter"), ""
    if isinstance(module, nn.MultiheadAttention):
        kind = "mha"
        if name == "in_proj_weight" and module._parameters.get("in_proj_bias") is not None:
            bias = "in_proj_bias"
    transposed = weight.ndim == 3 and bool(getattr(module, "is_transposed", False))
    rows, columns = weight.shape[-2:]
    return Site(
        path,
        kind,
        (columns, rows) if transposed else (rows, columns),
        _floating(weight),
        device_of(module, weight),
        owner=owner,
        parameter=name,
        bias=bias,
        transposed=transposed,
        experts=weight.shape[0] if weight.ndim == 3 else 0,
    )


def device_of(module: nn.Module, weight: Tensor) -> torch.device:
    """Where a layer computes: where its weight is or, if accelerate has offloaded it, where a call brings it.

    Args:
        module: the layer.
        weight: its weight.

    Returns:
        The device.
    """
    if weight.is_meta and (hook := getattr(module, "_hf_hook", None)) is not None:
        for one in getattr(hook, "hooks", (hook,)):
            if (where := getattr(one, "execution_device", None)) is not None:
                return torch.device(where)
    return weight.device


def _held(module: Any) -> Tensor:
    """The weight of a layer, or where it has none of that name, what it holds instead."""
    weight: Any = getattr(module, "weight", None)
    return weight if isinstance(weight, Tensor) else next(t for t in (*module.buffers(), *module.parameters()))


def _floating(weight: Tensor) -> torch.dtype:
    return weight.dtype if weight.is_floating_point() and weight.element_size() > 1 else torch.float32


def _find(model: nn.Module, path: str) -> nn.Module | None:
    module: nn.Module | None = model
    for name in path.split(".") if path else ():
        module = module._modules.get(name) if module is not None else None
    return module


def tied_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """For each parameter that has several names: the others."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return {n: tuple(o for o in names if o != n) for names in groups.values() for n in names if len(names) > 1}
