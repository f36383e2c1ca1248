"""Merging: the dense weights that an adapter stands for."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from funcadapt._torch import named_modules
from funcadapt.binding import bind, state_of
from funcadapt.call import Adapters, Weights, entries_of
from funcadapt.compose import Level, dense_levels, interpolate
from funcadapt.errors import AdapterError, SiteError
from funcadapt.layer import Dense, Layer
from funcadapt.quantised import is_quantised
from funcadapt.sites import tied_names

Tied = Literal["error", "untie", "share"]


def merge(
    model: nn.Module, adapters: Adapters, *, weights: Weights | None = None, tied: Tied = "error"
) -> dict[str, Tensor]:
    """The adapted weights of a model, by parameter name. The model is not changed.

    Sums are taken in float32 (or wider) and rounded once, to the dtype of the base weight. The result is
    differentiable with respect to the adapters.

    Args:
        model: the model.
        adapters: one adapter, or adapters by name, nested in their order.
        weights: as in `functional_call`, scalars only.
        tied: what to do where an adapted weight is tied to another name: "error"; "untie" returns the other name with
            the unchanged weight; "share" returns the merged weight under every name.

    Returns:
        Name -> tensor, for `torch.func.functional_call(model, weights, args)` (with `tie_weights=False` if weights were
        untied), or for `merge_`.

    Raises:
        AdapterError: if a weight is tied and `tied` is "error", or has no dense form.
        SiteError: if a leaf does not fit the model, or a base weight is quantised.

    Example:
        >>> import torch
        >>> import funcadapt as fa
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2))
        >>> adapter = fa.init(model, fa.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
        >>> x, weights = torch.randn(3, 4), fa.merge(model, adapter)
        >>> sorted(weights)
        ['0.weight']
        >>> y = torch.func.functional_call(model, weights, (x,))
        >>> torch.allclose(y, fa.functional_call(model, adapter, x), atol=1e-6)
        True
    """
    if tied not in ("error", "untie", "share"):
        raise AdapterError(f"tied must be 'error', 'untie' or 'share', got {tied!r}.")
    bound = bind(model, entries_of(adapters, weights), state_of(model))
    if bound.rows:
        raise AdapterError(
            "merge: grouped and routed adapters have a weight for every row. Merge one: fa.select(stack, i)."
        )
    ties = tied_names(model)
    own = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
    paths = {id(module): path for path, module in named_modules(model)}
    merged: dict[str, Tensor] = {}

    def now(name: str) -> Tensor:
        return merged.get(name, own[name])

    for _, module, short, tensor, w, _ in bound.replaced:
        # A module that is saved whole has a weight of its own, also where the base ties it to another.
        name = _join(paths[id(module)], short)
        merged[name] = interpolate(own[name], tensor.to(own[name].dtype), w)
        for other in ties.get(name, ()):
            merged.setdefault(other, own[other])
    for path, _, rows, indices, w, _ in bound.tokens:
        name = _join(path, "weight")
        old = now(name)
        new = interpolate(old, old.index_copy(0, indices, rows.to(old.dtype)), w)
        for each in (name, *ties.get(name, ())):  # a tied head shares the trained rows, and stays tied
            merged[each] = new
    for path, levels in bound.levels.items():
        site, module = bound.places[path].site, bound.places[path].module
        assert site is not None
        name, bias_name = site.weight_name, _join(site.owner, site.bias) if site.bias else ""
        if name not in own:
            raise SiteError(
                f"The weight at {path!r} is computed from others and cannot be merged into. Call "
                "torch.nn.utils.parametrize.remove_parametrizations first."
            )
        if is_quantised(own[name]):
            raise SiteError(f"The weight at {path!r} is quantised ({own[name].dtype}) and cannot be merged into.")
        others = ties.get(name, ())
        if others and name not in merged and tied == "error":
            raise AdapterError(
                f"{name!r} is tied to {', '.join(map(repr, others))}: merging would change more than the adapter does. "
                "Pass tied='untie' to give them separate weights, or tied='share' to change both."
            )
        old_bias = now(bias_name) if bias_name else None
        weight, bias = merge_levels(levels, Layer(site, module, levels[0].config), now(name), old_bias)
        for other in others:
            if tied == "share":
                merged[other] = weight
            else:
                merged.setdefault(other, own[other])
        merged[name] = weight
        if bias is not None:
            merged[bias_name] = bias
    return merged


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def merge_levels(levels: list[Level], layer: Layer, stored: Tensor, bias: Tensor | None) -> Dense:
    """Adapters merged into one weight, accumulated in float32 or wider.

    Args:
        levels: the adapters, the first innermost.
        layer: the layer.
        stored: its weight, as stored.
        bias: its bias, or None.

    Returns:
        The merged weight as stored, and the merged bias if it changed.
    """
    wide = torch.promote_types(stored.dtype, torch.float32)
    weight, first_bias = layer.canonical(stored).to(wide), None if bias is None else bias.to(wide)
    for level in levels:
        level.p = {k: v.to(wide) if v.is_floating_point() else v for k, v in level.p.items()}
    weight, new_bias = dense_levels(levels, layer.site, layer.module, weight, first_bias)
    merged = layer.stored(weight).to(stored.dtype).contiguous()
    if bias is None or new_bias is None or new_bias is first_bias:
        return merged, None
    return merged, new_bias.to(bias.dtype)


def merge_(
    model: nn.Module,
    adapters: Adapters,
    *,
    weights: Weights | None = None,
    tied: Tied = "error",
    safe: bool = False,
) -> nn.Module:
    """Merge in place: the model's own parameters get the adapted values.

    Everything is computed before anything is written, so a failure leaves the model as it was.

    Args:
        model: the model, changed in place.
        adapters: as in `merge`.
        weights: as in `merge`.
        tied: as in `merge`; "untie" gives the adapted name a parameter of its own.
        safe: whether to check first that every merged weight is finite.

    Returns:
        The model.

    Raises:
        AdapterError: as in `merge`, and in safe mode if a merged weight is not finite.
        SiteError: as in `merge`.

    Example:
        >>> import torch
        >>> import funcadapt as fa
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2))
        >>> adapter = fa.init(model, fa.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
        >>> x = torch.randn(3, 4)
        >>> y = fa.functional_call(model, adapter, x)
        >>> torch.allclose(fa.merge_(model, adapter, safe=True)(x), y, atol=1e-6)
        True
    """
    with torch.no_grad():
        merged = merge(model, adapters, weights=weights, tied=tied)
    for name, tensor in merged.items():
        if safe and not torch.isfinite(tensor).all():
            raise AdapterError(
                f"NaN or infinity in the merged {name!r}. The adapter seems to be broken; nothing was merged."
            )
    ties = tied_names(model)
    with torch.no_grad():
        for name, tensor in merged.items():
            owner, _, short = name.rpartition(".")
            module = model.get_submodule(owner)
            old = module._parameters.get(short)
            untied = any(merged.get(other) is not tensor for other in ties.get(name, ()))
            if tensor is old:
                continue
            if old is not None and untied:
                module._parameters[short] = nn.Parameter(tensor.clone(), requires_grad=old.requires_grad)
            else:
                (module._buffers[short] if old is None else old).copy_(tensor)  # pyright: ignore
    return model
