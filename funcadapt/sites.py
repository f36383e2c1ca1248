"""Sites: the places in a model where an adapter applies, and PEFT's rules for choosing them."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn

from funcadapt._torch import named_modules
from funcadapt.config import AdapterConfig, matching_pattern
from funcadapt.errors import SiteError, TargetError, did_you_mean


@dataclasses.dataclass(frozen=True)
class Site:
    """One place where an adapter applies: a layer, or a plain parameter.

    Attributes:
        path: where the adapter's leaves live: the module's path, or the parameter's.
        kind: "linear", "hf_conv1d" (transformers' Conv1D), "embedding", "conv1d", "conv2d", "conv3d", "mha" (the
            packed in-projection of `nn.MultiheadAttention`), "parameter" (2-D) or "experts" (3-D).
        shape: the canonical weight's shape, (out, in, *kernel), of one expert if there are several.
        dtype: the dtype of the weight, or float32 where it is quantised.
        device: the device of the weight.
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


def sites(model: nn.Module, config: AdapterConfig, *, expect: int | None = None, strict: bool = True) -> SiteTable:
    """The sites that a config selects in a model, by PEFT's rules.

    `target_modules` is a list of names (each matches a module of that path, or one that ends in it after a dot), a
    regular expression for the whole path, "all-linear", or None for the model type's default. `exclude_modules`,
    `layers_to_transform` with `layers_pattern`, `modules_to_save` and `target_parameters` mean what they mean in
    PEFT. An `nn.MultiheadAttention` gives two sites, its packed in-projection and its out-projection.

    Args:
        model: the model.
        config: the config.
        expect: how many sites there must be.
        strict: whether a name or pattern that matched nothing is an error (PEFT ignores it).

    Returns:
        The table of sites.

    Raises:
        TargetError: if nothing matched, a name or pattern was unused, the count differs from `expect`, or one tied
            weight would be adapted under two names.
        SiteError: if a matched module is of a kind that the method cannot adapt.

    Example:
        >>> import torch
        >>> import funcadapt as fa
        >>> model = torch.nn.ModuleDict({"up": torch.nn.Linear(4, 8), "down": torch.nn.Linear(8, 4)})
        >>> fa.sites(model, fa.LoraConfig(target_modules=["up", "down"]), expect=2)
        path  kind    shape  parameters  tied with
        up    linear  8x4    32
        down  linear  4x8    32
        2 sites, 64 base parameters
    """
    from funcadapt.method import method_of  # the registry imports the contract, which names Site

    by_default = getattr(config, "target_modules", None) is None
    config = config.for_model(model_type(model))
    method = method_of(config)
    tied = tied_names(model)
    _check_saved_modules(model, config)
    chosen = _target_modules(model, config, strict, by_default)
    found: dict[str, Site] = {}
    for path, module in chosen.items():
        for site in describe_module(path, module, method.name):
            found[site.path] = site
    for path in _target_parameters(model, config, strict):
        if path.rpartition(".")[0] in chosen:
            raise TargetError(
                f"Parameter {path!r} is in target_parameters, and its module {path.rpartition('.')[0]!r} is in "
                "target_modules: each weight is adapted once. Drop one of them, or pass target_modules=[]."
            )
        found[path] = describe(model, path)[0]
    table = [dataclasses.replace(s, tied=tied.get(s.weight_name, ())) for s in found.values()]
    for site in table:
        if site.kind not in method.kinds:
            raise SiteError(
                f"{method.name} cannot adapt {site.path!r}, which is of kind {site.kind!r}. It supports: "
                f"{', '.join(sorted(method.kinds))}. Name other target_modules, or exclude it with exclude_modules."
            )
    _check_ties(table)
    _check_patterns(config, table, strict)
    if expect is not None and len(table) != expect:
        raise TargetError(f"Expected {expect} sites, got {len(table)}:\n{SiteTable(table)!r}")
    return SiteTable(table)


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
            _floating(m.weight),
            m.weight.device,
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
        kind, bias = "mha", "in_proj_bias" if module.in_proj_bias is not None else ""
        if name != "in_proj_weight":
            bias = ""
    transposed = weight.ndim == 3 and bool(getattr(module, "is_transposed", False))
    rows, columns = weight.shape[-2:]
    return Site(
        path,
        kind,
        (columns, rows) if transposed else (rows, columns),
        _floating(weight),
        weight.device,
        owner=owner,
        parameter=name,
        bias=bias,
        transposed=transposed,
        experts=weight.shape[0] if weight.ndim == 3 else 0,
    )


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


def model_type(model: nn.Module) -> str | None:
    """Transformers' model type ("llama"), from the model's config, or None."""
    config: Any = getattr(model, "config", None)
    found = config.get("model_type") if isinstance(config, Mapping) else getattr(config, "model_type", None)  # pyright: ignore
    return found if isinstance(found, str) else None


def names_match(names: str | Sequence[str], path: str) -> bool:
    """PEFT's rule: a string is a regular expression for the whole path, a list holds paths or endings of paths."""
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)


def is_saved(config: AdapterConfig, path: str) -> bool:
    """Whether a path is in or below a module that `modules_to_save` names.

    PEFT's rule: the end of the module's path decides, without a dot before it, so that "norm" also is
    "layers.0.input_layernorm".

    Args:
        config: the config.
        path: the path.

    Returns:
        Whether it is.
    """
    saved: Sequence[str] = getattr(config, "modules_to_save", None) or ()
    return any(f"{name}." in f"{path}." for name in saved)


def whole_names(model: nn.Module, config: AdapterConfig, adapted: Collection[str]) -> Iterator[tuple[str, str]]:
    """The parameters and buffers that `modules_to_save` and `bias` put into an adapter in full.

    Args:
        model: the model.
        config: the config.
        adapted: the paths of the sites.

    Yields:
        The module's path and the name in it.
    """
    bias = getattr(config, "bias", "none")
    for path, module in model.named_modules(remove_duplicate=False):
        whole = bool(path) and is_saved(config, path)
        trained = bias == "all" or (bias == "lora_only" and path in adapted)
        for name, parameter in module._parameters.items():
            if parameter is not None and (whole or (name == "bias" and trained)):
                yield path, name
        for name, buffer in module._buffers.items() if whole else ():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield path, name


def _is_kept_out(config: AdapterConfig, path: str) -> bool:
    """Whether `modules_to_save` keeps a path from being a target. PEFT's rule here has the dot before the name."""
    saved: Sequence[str] = getattr(config, "modules_to_save", None) or ()
    return any(f".{name}." in f".{path}." for name in saved)


def _target_modules(model: nn.Module, config: AdapterConfig, strict: bool, by_default: bool) -> dict[str, nn.Module]:
    targets: Any = getattr(config, "target_modules", None)
    parameters = getattr(config, "target_parameters", None)
    if targets is None and parameters:
        return {}
    modules = {path: m for path, m in named_modules(model) if path}
    if isinstance(targets, str) and targets.lower() == "all-linear":
        targets = _all_linear(model, config, modules)
    exclude: Any = getattr(config, "exclude_modules", None)
    excluded = [path for path in modules if exclude and names_match(exclude, path)]
    left = {path: module for path, module in modules.items() if _matches(config, targets, path)}
    chosen = {p: m for p, m in left.items() if p not in set(excluded) and not _is_kept_out(config, p)}
    for path in chosen:
        if is_saved(config, path):
            raise TargetError(
                f"{path!r} is in target_modules, and its name ends in one of modules_to_save={config.modules_to_save}: "  # pyright: ignore
                "it would be trained twice. Give the longer path in modules_to_save, or drop it from target_modules."
            )
    if not chosen and not parameters:
        _nothing_matched(config, targets, list(modules), bool(left))
    if strict:
        if exclude and not excluded:
            raise TargetError(f"exclude_modules={exclude!r} excludes nothing.{_near(exclude, modules)}")
        # of PEFT's defaults for a model type, some are in none but an older transformers
        for name in () if isinstance(targets, str) or by_default else targets:
            used = any(names_match((name,), path) for path in (*chosen, *excluded))
            if not used and not _is_kept_out(config, name):
                raise TargetError(
                    f"target_modules names {name!r}, which matches no module"
                    f"{_layers_note(config)}.{did_you_mean(name, _endings(modules))}"
                )
    return chosen


def _matches(config: AdapterConfig, targets: str | Sequence[str], path: str) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    if path in targets:  # PEFT: an exact path is meant, whatever layers_to_transform says
        return True
    if not names_match(targets, path):
        return False
    layers: Any = getattr(config, "layers_to_transform", None)
    if layers is None or layers == ():
        return True
    patterns: Any = getattr(config, "layers_pattern", None) or None
    found: re.Match[str] | None = None
    if patterns is None:
        found = re.match(r".*?\.[^.]*\.(\d+)\.", path)
    else:
        for pattern in (patterns,) if isinstance(patterns, str) else patterns:
            found = found or re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", path)
    index = int(found.group(1)) if found else None
    return index is not None and (index == layers if isinstance(layers, int) else index in layers)


def _all_linear(model: nn.Module, config: AdapterConfig, modules: Mapping[str, nn.Module]) -> tuple[str, ...]:
    get_output: Any = getattr(model, "get_output_embeddings", None)
    output: Any = get_output() if get_output is not None else None
    if output is None and get_output is not None and getattr(config, "task_type", None) == "SEQ_CLS":
        heads = (getattr(model, name, None) for name in ("score", "classifier"))
        output = next((head for head in heads if head is not None), None)
    names: list[str] = []
    for path, module in modules.items():
        linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        if linear and module is not output:
            names.append(path)
    return tuple(names)


def _target_parameters(model: nn.Module, config: AdapterConfig, strict: bool) -> list[str]:
    wanted: Sequence[str] = getattr(config, "target_parameters", None) or ()
    if not wanted:
        return []
    names = [name for name, _ in model.named_parameters()]
    found = [name for name in names if names_match(wanted, name)]
    for name in wanted:
        if strict and not any(names_match((name,), path) for path in found):
            near = did_you_mean(name, [*_endings(names), *names])
            raise TargetError(f"target_parameters names {name!r}, which matches no parameter.{near}")
    return found


def _nothing_matched(config: AdapterConfig, targets: Any, paths: list[str], excluded: bool) -> None:
    if excluded:
        raise TargetError(
            "All modules were excluded. This is likely unintended. Check your `target_modules`, `exclude_modules` "
            "and `modules_to_save` configuration."
        )
    if not targets and targets is not None and _has_others(config):
        return  # only modules_to_save, trainable tokens or biases are trained
    raise TargetError(
        f"Target modules {targets!r} not found in the base model. Please check the target modules and try again."
        f"{_layers_note(config)}{_near(targets, paths)}"
    )


def _has_others(config: AdapterConfig) -> bool:
    return any(getattr(config, f, None) for f in ("modules_to_save", "trainable_token_indices"))


def _layers_note(config: AdapterConfig) -> str:
    layers, pattern = (getattr(config, f, None) for f in ("layers_to_transform", "layers_pattern"))
    note = f" Note: You specified 'layers_to_transform': {layers}." if layers is not None else ""
    return note + (f" You also specified 'layers_pattern': {pattern}." if pattern is not None else "")


def _endings(paths: Iterator[str] | Mapping[str, Any] | Sequence[str]) -> list[str]:
    """The last components of paths that are not numbers, most frequent first: what people name as targets."""
    counts = Counter(path.rpartition(".")[2] for path in paths)
    return [name for name, _ in counts.most_common() if not name.isdigit()]


def _near(names: Any, paths: Mapping[str, Any] | Sequence[str]) -> str:
    first = names if isinstance(names, str) else next(iter(names), "")
    return did_you_mean(first, _endings(paths), count=6)


def _check_saved_modules(model: nn.Module, config: AdapterConfig) -> None:
    saved: Sequence[str] = getattr(config, "modules_to_save", None) or ()
    for path, module in named_modules(model) if saved else ():
        named = path and any(path.endswith(name) for name in saved)
        if named and isinstance(module, nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict):
            raise TargetError(
                f"modules_to_save names {path!r}, which is a {type(module).__name__}: it is never called, so PEFT "
                "cannot save it. Name the modules in it."
            )


def _check_ties(table: Sequence[Site]) -> None:
    by_name = {site.weight_name: site for site in table}
    for site in table:
        for other in site.tied:
            if other in by_name:
                raise TargetError(
                    f"{site.path!r} and {by_name[other].path!r} share one tied weight, and both are targeted. Adapt it "
                    "under one name (exclude_modules drops the other), or untie the weight first."
                )


def _check_patterns(config: AdapterConfig, table: Sequence[Site], strict: bool) -> None:
    for field in config.patterned.values():
        patterns: Mapping[str, Any] = getattr(config, field) or {}
        for pattern in patterns if strict else ():
            if not any(matching_pattern((pattern,), site.path) for site in table):
                near = did_you_mean(pattern, [*_endings([s.path for s in table]), *(s.path for s in table)])
                raise TargetError(f"{field} has the key {pattern!r}, which matches none of the sites.{near}")
