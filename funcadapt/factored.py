"""`Factored`: a plain parameter with adapters, that applies them where it is used, never building a dense copy.

For the duration of a call it stands in the place of an `nn.Parameter`, such as the stacked (experts, out, in)
weights of a mixture of experts. Where the layer indexes an expert and multiplies with it, the method's own hooks
run around that product, on that expert's leaves. Any other use gets the dense form: slower, never wrong.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funcadapt import _torch
from funcadapt.compose import Level, check_dense, dense_levels, nest
from funcadapt.errors import SiteError
from funcadapt.layer import Dense
from funcadapt.sites import Site


class Factored:
    """A weight with adapters. Quacks like the parameter that it stands for.

    Attributes:
        stored: the base weight as the model sees it (now indexed, or transposed).
        levels: the adapters, leaves indexed like the weight.
        site: the site, or one expert of it.
        module: the owner.
        transposed: whether `stored` is (..., in, out).
    """

    __slots__ = ("_dense", "levels", "module", "site", "stored", "transposed")

    def __init__(
        self, stored: Tensor, levels: Sequence[Level], site: Site, module: nn.Module, transposed: bool
    ) -> None:
        self.stored, self.levels, self.site, self.module = stored, levels, site, module
        self.transposed = transposed
        self._dense: Tensor | None = None

    @classmethod
    def create(cls, stored: Any, levels: Sequence[Level], site: Site, module: nn.Module) -> Factored:
        """The stand-in for a whole parameter.

        Args:
            stored: the parameter, or what an outer call put in its place.
            levels: the adapters.
            site: the site.
            module: the owner.

        Returns:
            The stand-in.

        Raises:
            AdapterError: if a weight is per row or token (rows are regrouped before they get here), or dropout is
                active.
            SiteError: if a leaf has another number of experts.
        """
        for level in levels:
            check_dense(level, site, training=module.training)
            for name, leaf in level.p.items() if site.experts else ():
                if leaf.ndim and leaf.shape[0] != site.experts:  # indexing an expert would not notice
                    raise SiteError(
                        f"{level.method.name} at {site.path!r}: {name} has shape {tuple(leaf.shape)}, expected one "
                        f"entry for each of the {site.experts} experts. Was this adapter made for another model?"
                    )
        if isinstance(stored, Factored):
            levels, stored = [*stored.levels, *levels], stored.stored
        return cls(stored, levels, site, module, site.transposed)

    # -- the two ways to use it -------------------------------------------------------------------------

    def dense(self) -> Tensor:
        """The adapted weight, in the form in which the model holds it."""
        if self._dense is None:
            weight, _ = dense_levels(self.levels, self.site, self.module, self._canonical(), None)
            new = weight.transpose(-2, -1) if self.transposed else weight
            self._dense = new
        return self._dense

    def product(self, x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        """The hooks around one product with a single (out, in) weight.

        Args:
            x: (*batch, in).
            base: the product itself.

        Returns:
            (*batch, out).
        """
        below: Callable[[], Dense] = lambda: (self._canonical(), None)  # noqa: E731
        return nest(base, self.levels, self._one(), self.module, below)(x)

    def batched(self, x: Tensor) -> Tensor:
        """One product per leading index of weight and leaves: x (S, n, in) -> (S, n, out)."""
        names = [list(level.p) for level in self.levels]
        leaves = [[level.p[n] for n in ns] for ns, level in zip(names, self.levels, strict=True)]
        axes = [[0 if leaf.ndim else None for leaf in row] for row in leaves]

        def one(x: Tensor, w: Tensor, leaves: Any) -> Tensor:
            levels = [
                dataclasses.replace(level, p=dict(zip(ns, row, strict=True)))
                for level, ns, row in zip(self.levels, names, leaves, strict=True)
            ]
            item = Factored(w, levels, self._one(), self.module, False)
            return item.product(x, lambda z: F.linear(z, w))

        return torch.func.vmap(one, (0, 0, axes))(x, self._canonical(), leaves)

    def _canonical(self) -> Tensor:
        return self.stored.transpose(-2, -1) if self.transposed else self.stored

    def _one(self) -> Site:
        return dataclasses.replace(self.site, experts=0) if self.site.experts else self.site

    # -- what models do with a parameter ----------------------------------------------------------------

    def __getitem__(self, index: Any) -> Any:
        """One expert, or a batch of experts: still factored. Anything else: dense."""
        picks = isinstance(index, int) or (isinstance(index, Tensor) and not index.is_floating_point()
                                           and index.dtype != torch.bool and index.ndim < 2)  # fmt: skip
        if not self.site.experts or not picks or (isinstance(index, Tensor) and not index.numel()):
            return self.dense()[index]
        levels = [
            dataclasses.replace(level, p={k: v[index] if v.ndim else v for k, v in level.p.items()})
            for level in self.levels
        ]
        stored = self.stored[index]
        site = dataclasses.replace(self.site, experts=stored.shape[0] if stored.ndim == 3 else 0)
        return Factored(stored, levels, site, self.module, self.transposed)

    def transpose(self, first: int, second: int) -> Any:
        """The transposed weight, still factored."""
        last = self.stored.ndim - 1
        if {first % (last + 1), second % (last + 1)} != {last - 1, last}:
            return self.dense().transpose(first, second)
        stored = self.stored.transpose(-2, -1)
        return Factored(stored, self.levels, self.site, self.module, not self.transposed)

    def t(self) -> Any:
        """The transposed 2-D weight."""
        return self.transpose(0, 1)

    @property
    def mT(self) -> Any:  # noqa: N802
        """The transposed weight."""
        return self.transpose(-2, -1)

    T = mT

    def __matmul__(self, other: Any) -> Any:
        """`weight @ x`."""
        return torch.matmul(self, other)  # pyright: ignore[reportArgumentType, reportCallIssue]

    def __rmatmul__(self, other: Any) -> Any:
        """`x @ weight`."""
        return torch.matmul(other, self)  # pyright: ignore[reportArgumentType, reportCallIssue]

    def __getattr__(self, name: str) -> Any:
        """Shape, dtype and device without building anything; everything else from the dense form."""
        if name in _CHEAP:
            return getattr(self.stored, name)
        return getattr(self.dense(), name)

    def __len__(self) -> int:
        """The length of the first axis."""
        return len(self.stored)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Products by the rules below, everything else on the dense form."""
        rule = _RULES.get(func)
        if rule is not None:
            result = rule(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        return func(*_densify(args), **{k: _densify((v,))[0] for k, v in (kwargs or {}).items()})


_CHEAP = frozenset(
    [
        "shape",
        "dtype",
        "device",
        "ndim",
        "size",
        "dim",
        "numel",
        "is_cuda",
        "requires_grad",
        "is_floating_point",
        "layout",
        "is_meta",
        "element_size",
    ]
)


def _densify(values: Sequence[Any]) -> list[Any]:
    out: list[Any] = []
    for value in values:
        if isinstance(value, Factored):
            value = value.dense()
        elif isinstance(value, list | tuple):
            value = type(value)(_densify(value))  # pyright: ignore
        out.append(value)
    return out


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    if not isinstance(weight, Factored) or weight.stored.ndim != 2 or weight.transposed:
        return NotImplemented
    stored = weight.stored
    return weight.product(x, lambda z: F.linear(z, stored, bias))


def _matmul(first: Any, second: Any) -> Any:
    if isinstance(second, Factored) and not isinstance(first, Factored) and second.transposed:
        stored = second.stored
        if stored.ndim == 2:
            return second.product(first, lambda z: z @ stored)
        if first.ndim == 3 and second.site.experts:
            return second.batched(first)
    columns = isinstance(first, Factored) and not isinstance(second, Factored) and not first.transposed
    if columns and second.ndim == 3 and first.site.experts:  # W x = (x' W')'
        return first.batched(second.transpose(-2, -1)).transpose(-2, -1)
    return NotImplemented


def _grouped(x: Any, weight: Any, *, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Any:
    """Rows grouped by expert: the base product once, the hooks on each group of rows."""
    usable = isinstance(weight, Factored) and weight.transposed and weight.site.experts
    if not usable or offs is None or bias is not None or out_dtype is not None or _needs_before(weight):
        return NotImplemented
    y = F.grouped_mm(x, weight.stored, offs=offs)
    pieces: list[Tensor] = []
    start = 0
    for expert, end in enumerate(offs.tolist()):
        if end > start:
            pieces.append(weight[expert].product(x[start:end], functools.partial(_given, y[start:end])))
        start = end
    return torch.cat([*pieces, y[start:]])


def _given(y: Tensor, _: Tensor) -> Tensor:
    return y


def _rmatmul(weight: Any, x: Any) -> Any:
    return _matmul(x, weight)


def _needs_before(weight: Any) -> bool:
    return any(level.method.before is not None for level in weight.levels)


_RULES: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    **dict.fromkeys(
        (torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__), _matmul
    ),
    Tensor.__rmatmul__: _rmatmul,
    F.grouped_mm: _grouped,
    _torch.grouped_mm: _grouped,
}
