"""How levels of adapters nest around one layer: the only place where hooks and dense forms are composed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from funcadapt.config import AdapterConfig
from funcadapt.errors import AdapterError
from funcadapt.layer import Dense, Layer
from funcadapt.method import Leaf, Method
from funcadapt.sites import Site

if TYPE_CHECKING:
    from funcadapt.rows import Rows

Weight = float | Tensor | None
"""How much of an adapter acts: None for all of it, a number, a 0-d tensor, (rows) or (rows, tokens)."""

Forward = Callable[..., Any]


@dataclasses.dataclass(slots=True)
class Level:
    """One adapter at one site, or a stack of them.

    Attributes:
        method: the method.
        config: the adapter's config.
        p: the leaves, params and buffers.
        w: how much of it acts.
        rows: which row belongs to which adapter of a stack; None for a single adapter.
    """

    method: Method
    config: AdapterConfig
    p: Leaf
    w: Weight
    rows: Rows | None = None


class Hooked:
    """One level around a forward: `after(p, x, base(before(p, x)))`, interpolated by the level's weight.

    An object rather than a closure: an installation makes one per site and call, and a closure costs a dozen
    objects, which the garbage collector would have to look at.

    Attributes:
        base: the forward below.
        level: the adapter.
        layer: the layer, as this level sees it.
    """

    __slots__ = ("base", "layer", "level")

    def __init__(self, base: Forward, level: Level, layer: Layer) -> None:
        self.base, self.level, self.layer = base, level, layer

    def __call__(self, x: Any = None, /, *args: Any, **kwargs: Any) -> Any:
        """The adapted forward. Its first argument may also come by name, `input` or `x`."""
        if x is None:
            x = kwargs.pop("input" if "input" in kwargs else "x")
        level, layer = self.level, self.layer
        if level.rows is not None:
            return self._many(level.rows, x, args, kwargs)
        if level.w is not None:
            return self._weighted(x, args, kwargs, _single)
        return single(self.base, level, layer, x, args, kwargs)

    def _weighted(self, x: Any, args: Any, kwargs: Any, run: Callable[..., Tensor]) -> Any:
        level, layer = self.level, self.layer
        method, inner = level.method, x
        if method.before is not None:
            changed = run(method.before, level, layer, x)
            inner = x if changed is x else blend(x, changed, level.w, layer.site)
        y = self.base(inner, *args, **kwargs)
        if method.after is None:
            return y
        if run is _single and (out := scaled(level, layer, x, y)) is not None:
            return out
        return blend(y, run(method.after, level, layer, x, y), level.w, layer.site)

    def _many(self, rows: Rows, x: Any, args: Any, kwargs: Any) -> Any:
        level, layer = self.level, self.layer
        if rows.current is not None:  # inside a module that is run adapter by adapter
            one = rows.alone(level, rows.current)
            if one is None:
                return self.base(x, *args, **kwargs)
            alone = Layer(layer.site, layer.module, one.config, layer.below)
            if layer.module.training:
                alone.mask = rows.mask_alone(level, layer, x)
            return Hooked(self.base, one, alone)(x, *args, **kwargs)
        x = rows.all_rows(x, layer.site)
        if layer.module.training and (mask := rows.mask(level, layer, x)) is not None:
            layer = Layer(layer.site, layer.module, layer.config, layer.below)
            layer.mask = mask
        method, run = level.method, rows.run
        if level.w is not None:
            return Hooked(self.base, level, layer)._weighted(x, args, kwargs, run)
        y = self.base(x if method.before is None else run(method.before, level, layer, x), *args, **kwargs)
        return y if method.after is None else run(method.after, level, layer, x, y)

    def dense(self) -> Dense:
        """The dense form of this level and everything below.

        Returns:
            The weight and bias.

        Raises:
            AdapterError: if it is another one for every row.
        """
        level, layer = self.level, self.layer
        if level.rows is not None:
            if level.rows.current is None:
                raise AdapterError(
                    f"The outer adapter at {layer.site.path!r} needs the weight that it wraps, but the adapter inside "
                    "is grouped or routed: there is one weight for every row. Change their order."
                )
            one = level.rows.alone(level, level.rows.current)
            if one is None:
                return layer.weight, layer.bias
            return dense(one, layer, layer.weight, layer.bias)
        return dense(level, layer, layer.weight, layer.bias)


def single(base: Forward, level: Level, layer: Layer, x: Any, args: Any, kwargs: Any) -> Any:
    """One adapter, all of it, around a forward: its hooks, or the dense form where that is faster."""
    method, p = level.method, level.p
    alone = not args and not kwargs
    if method.folds is not None and alone and _plain(base, level, layer, x) and method.folds(layer, p, x):
        return layer.apply(x, *method.weight(layer, p, layer.weight, layer.bias))
    y = base(x if method.before is None else method.before(layer, p, x), *args, **kwargs)
    return y if method.after is None else method.after(layer, p, x, y)


def _plain(base: Forward, level: Level, layer: Layer, x: Any) -> bool:
    """Whether `Layer.apply` is what a forward computes, as exactly: that of a plain layer with nothing around it."""
    site, dtype = layer.site, x.dtype
    module: Any = layer.module
    if base is module:  # the hooks that it may have are for a call of it
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or "forward" in vars(module):
            return False
    elif getattr(base, "__self__", None) is not module:
        return False  # another adapter, or a wrapper that brings the weight from somewhere
    weight: Any = module._parameters.get(site.parameter)
    return (
        layer.is_plain
        and type(weight) in (Tensor, nn.Parameter)  # none that is quantised or distributed
        and layer.canonical(weight).shape == site.shape
        and dtype == weight.dtype
        and dtype.itemsize >= 4  # in fewer bits, an update that is small beside the weight would be rounded away
        and all(leaf.dtype == dtype for leaf in level.p.values() if leaf.is_floating_point())
        and not (module.training and level.method.dropout(level.config))
    )


def _single(hook: Callable[..., Tensor], level: Level, layer: Layer, *tensors: Tensor) -> Tensor:
    return hook(layer, level.p, *tensors)


def scaled(level: Level, layer: Layer, x: Any, y: Tensor) -> Tensor | None:
    """A method's `after` with a tensor of weights inside, where it can be: on r numbers instead of on all outputs.

    Args:
        level: the adapter and its weight.
        layer: the layer.
        x: the layer's input.
        y: the layer's output.

    Returns:
        What `blend` gives, or None where that has to be computed.
    """
    method, w = level.method, level.w
    if method.masked is None or method.before is not None or method.couples:
        return None
    if not isinstance(w, Tensor) or not isinstance(x, Tensor) or w.dtype != x.dtype:
        return None
    if w.shape != x.shape[: w.ndim] or w.ndim >= x.ndim:
        return None
    out = method.masked(layer, {k: leaf.unsqueeze(0) for k, leaf in level.p.items()}, x, y, w.reshape(-1, 1))
    return None if out is NotImplemented else out


def blend(without: Tensor, with_: Tensor, w: Weight, site: Site) -> Tensor:
    """`without + w * (with_ - without)`, for a number, a scalar, a vector per row or a tensor per token.

    Args:
        without: the value without the adapter, (rows, ...).
        with_: the value with it.
        w: the weight.
        site: where, for the error message.

    Returns:
        The interpolation, in the dtype of `without`.

    Raises:
        AdapterError: if `w` does not have one entry per row, or per row and token, of this value.
    """
    if isinstance(w, Tensor) and w.ndim:
        if w.shape != without.shape[: w.ndim] or w.ndim >= without.ndim:
            raise AdapterError(
                f"weights at {site.path!r}: got shape {tuple(w.shape)}, but the layer's value has shape "
                f"{tuple(without.shape)}. A vector has one weight per row, a matrix one per row and token; a layer "
                "that flattens rows and tokens can only take a scalar."
            )
        w = w.reshape(*w.shape, *(1,) * (without.ndim - w.ndim))
    assert w is not None
    return (without + w * (with_ - without)).to(without.dtype)


def dense(level: Level, layer: Layer, weight: Tensor, bias: Tensor | None) -> Dense:
    """The dense form of one level, experts batched, interpolated by the level's weight.

    Args:
        level: the adapter.
        layer: the layer.
        weight: canonical, (out, in, *kernel), experts first if there are several.
        bias: (out), or None.

    Returns:
        The adapted weight and bias.

    Raises:
        AdapterError: if the level's weight is per row or token: that cannot act through a weight.
    """
    method, p, site = level.method, level.p, layer.site
    check_dense(level, site, training=False)
    if site.stack:

        def one(weight: Tensor, p: Leaf) -> Tensor:
            return method.weight(layer, p, weight, None)[0]

        axes = {name: 0 if leaf.ndim else None for name, leaf in p.items()}
        new, new_bias = torch.func.vmap(one, in_dims=(0, axes))(weight, p), bias
    else:
        new, new_bias = method.weight(layer, p, weight, bias)
    if bias is not None and new_bias is not None and new_bias is not bias:
        new_bias = interpolate(bias, new_bias, level.w)
    return interpolate(weight, new, level.w), new_bias


def dense_levels(levels: Sequence[Level], site: Site, module: nn.Module, weight: Tensor, bias: Tensor | None) -> Dense:
    """The dense form of several levels, the first innermost: each sees the weight below it as its own.

    Args:
        levels: the adapters.
        site: the site.
        module: its module.
        weight: the innermost weight, canonical.
        bias: the innermost bias, or None.

    Returns:
        The adapted weight and bias.
    """
    for level in levels:
        below: Dense = (weight, bias)
        layer = Layer(site, module, level.config, lambda below=below: below)
        weight, bias = dense(level, layer, weight, bias)
    return weight, bias


def check_dense(level: Level, site: Site, *, training: bool) -> None:
    """Refuse what cannot act through a weight: weights per row or token, and dropout.

    Args:
        level: the adapter.
        site: where.
        training: whether dropout would be active.

    Raises:
        AdapterError: if there is any of it.
    """
    if isinstance(level.w, Tensor) and level.w.ndim:
        raise AdapterError(
            f"weights per row or token cannot act at {site.path!r}: it is applied through its weight. Use a scalar."
        )
    rate = level.method.dropout(level.config)
    if training and rate:
        raise AdapterError(
            f"{level.method.name} has dropout {rate}, which cannot act at {site.path!r}: it is applied through its "
            "weight. Set the dropout to 0, or put the module in eval mode."
        )


def interpolate(old: Tensor, new: Tensor, w: Weight) -> Tensor:
    """`old + w * (new - old)` for a scalar weight, in the dtype of `old`; `new` itself where the weight is None."""
    return new if w is None else (old + w * (new - old)).to(old.dtype)


def nest(
    base: Forward, levels: Sequence[Level], site: Site, module: nn.Module, below: Callable[[], Dense] | None
) -> Hooked:
    """Nest levels around a forward, the first innermost.

    Args:
        base: the innermost forward.
        levels: the adapters, at least one.
        site: the site.
        module: its module.
        below: what the innermost level wraps, if it is not the module's own weight.

    Returns:
        The outermost forward.
    """
    hooked = Hooked(base, levels[0], Layer(site, module, levels[0].config, below))
    for level in levels[1:]:
        hooked = Hooked(hooked, level, Layer(site, module, level.config, hooked.dense))
    return hooked
