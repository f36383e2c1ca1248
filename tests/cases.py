"""The table of cases for the laws: method variants x layer kinds.

The laws in `tests/laws` know no method by name. To put a new method under all of them, add a file to `tests/specs`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import specs
import torch
import torch.nn.functional as F
from specs import Variant
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers.pytorch_utils import Conv1D

import funcadapt as fa
from funcadapt.method import Method, methods

# -- layer kinds ------------------------------------------------------------------------------------------


class SelfAttention(nn.Module):
    """The smallest user of `nn.MultiheadAttention`."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, bias=bias)
        if bias:  # torch starts them at zero, where what scales a bias would not show
            nn.init.normal_(self.attention.in_proj_bias, std=0.2)
            nn.init.normal_(self.attention.out_proj.bias, std=0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


class PlainParameter(nn.Module):
    """A 2-D weight that belongs to no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w)


class Experts(nn.Module):
    """A stack of expert weights, used in one of the ways in which models use them."""

    def __init__(self, use: str) -> None:
        super().__init__()
        self.use, self.is_transposed = use, use == "matmul"
        # grouped_mm wants rows of 16 bytes
        self.w = nn.Parameter(
            torch.randn(3, *((4, 6) if self.is_transposed else (8, 16) if use == "grouped" else (6, 4)))
        )

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        if self.use == "linear":
            return sum(F.linear(x, self.w[e]) * (e + 1) for e in range(3))  # pyright: ignore
        if self.use == "matmul":
            return sum(x @ self.w[e] * (e + 1) for e in range(3))  # pyright: ignore
        if self.use == "bmm":  # every row picks an expert
            return torch.bmm(self.w[torch.arange(n) % 3], x.unsqueeze(-1)).squeeze(-1)
        ends = torch.tensor([n // 2, n // 2, n], dtype=torch.int32)  # the second expert gets no row
        return F.grouped_mm(x, self.w.transpose(-2, -1), offs=ends)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of layer in the smallest model that has one.

    Attributes:
        name: its name in the ids of the tests.
        layer: builds the layer. The model is `nn.Sequential(layer)`.
        target: the path of the module or parameter to adapt.
        x: draws an input.
        exact: the widest dtype in which the layer runs.
    """

    name: str
    layer: Callable[[], nn.Module]
    target: str
    x: Callable[[], Tensor]
    exact: torch.dtype = torch.float64

    @property
    def is_parameter(self) -> bool:
        return self.target.endswith(".w")

    def model(self, dtype: torch.dtype | None = None) -> nn.Sequential:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return nn.Sequential(self.layer()).to(dtype or self.exact)

    def inputs(self, dtype: torch.dtype | None = None) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            x = self.x()
        return x.to(dtype or self.exact) if x.is_floating_point() else x


def _normal(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape)


def _hf_conv1d() -> nn.Module:
    layer = Conv1D(6, 4)
    nn.init.normal_(layer.weight)  # its own init is so small that nothing would show
    nn.init.normal_(layer.bias)
    return layer


def _tokens() -> Tensor:
    return torch.tensor([[0, 3, 9], [3, 5, 0]])


KINDS = [
    Kind("linear", lambda: nn.Linear(4, 6), "0", _normal(2, 3, 4)),
    Kind("linear_no_bias", lambda: nn.Linear(4, 6, bias=False), "0", _normal(5, 4)),
    Kind("hf_conv1d", _hf_conv1d, "0", _normal(2, 3, 4)),
    Kind("embedding", lambda: nn.Embedding(10, 6), "0", _tokens),
    Kind("embedding_padding", lambda: nn.Embedding(10, 6, padding_idx=3), "0", _tokens),
    Kind("conv1d", lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2), "0", _normal(2, 4, 9)),
    Kind("conv2d", lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, padding_mode="circular"), "0", _normal(2, 4, 5, 5)),
    Kind("conv2d_grouped", lambda: nn.Conv2d(4, 6, 3, groups=2), "0", _normal(2, 4, 5, 5)),
    Kind("conv3d", lambda: nn.Conv3d(4, 6, (1, 3, 3), padding="same", bias=False), "0", _normal(2, 4, 3, 4, 3)),
    Kind("mha", SelfAttention, "0.attention", _normal(2, 3, 8)),
    Kind("mha_no_bias", lambda: SelfAttention(bias=False), "0.attention", _normal(2, 3, 8)),
    Kind("parameter", PlainParameter, "0.w", _normal(2, 4)),
    Kind("experts_linear", lambda: Experts("linear"), "0.w", _normal(4, 4)),
    Kind("experts_transposed", lambda: Experts("matmul"), "0.w", _normal(4, 4)),
    Kind("experts_bmm", lambda: Experts("bmm"), "0.w", _normal(4, 4)),
    Kind("experts_grouped", lambda: Experts("grouped"), "0.w", _normal(4, 16), torch.float32),
]

# -- cases ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """One method variant on one layer kind."""

    method: Method
    variant: Variant
    kind: Kind

    def __str__(self) -> str:
        return f"{self.method.name}-{self.variant.name}-{self.kind.name}"

    def model(self, dtype: torch.dtype | None = None) -> nn.Sequential:
        return self.kind.model(dtype).train(self.variant.training)

    def inputs(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.kind.inputs(dtype)

    def new(self, model: nn.Module, seed: int = 0) -> fa.Adapter:
        """A freshly initialised adapter."""
        return self.given(self._new(model, seed))

    def given(self, adapter: fa.Adapter) -> fa.Adapter:
        """The adapter with the inputs that its method needs."""
        if not self.variant.inputs:
            return adapter
        own = {**adapter.buffers.get("", {}), **self.variant.inputs}
        return adapter.replace(buffers={**adapter.buffers, "": own})

    def _new(self, model: nn.Module, seed: int = 0) -> fa.Adapter:
        if self.kind.is_parameter:
            return fa.init(model, self.variant.config(target_parameters=[self.kind.target]), seed=seed)
        return fa.init(model, self.variant.config(target_modules=[self.kind.target]), seed=seed)

    def adapter(self, model: nn.Module, seed: int = 0) -> fa.Adapter:
        """An adapter with no leaf at its initial value, scalars included."""
        generator = torch.Generator().manual_seed(100 + seed)

        def moved(leaf: Tensor) -> Tensor:
            if not leaf.is_floating_point():
                return leaf
            if not leaf.ndim:
                return leaf * (1 + 0.25 * (seed + 1))
            return leaf + 0.3 * torch.randn(leaf.shape, generator=generator).to(leaf.dtype)

        return self.new(model, seed).map(moved)

    def slope(self, model: nn.Module, x: Tensor) -> Tensor:
        """A different slope for every output; none where torch gives the base layer no gradient by design."""
        out = model(x).detach()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            slope = torch.randn_like(out)
        padding = getattr(model[0], "padding_idx", None)  # pyright: ignore
        return slope if padding is None else slope * (x != padding).unsqueeze(-1)

    @property
    def no_dense(self) -> bool:
        return self.kind.name in self.variant.no_dense


SPECS = specs.load()
VARIANTS = {name: spec.variants for name, spec in SPECS.items()}
ALL = [
    Case(method, variant, kind) for method in methods() for variant in VARIANTS.get(method.name, ()) for kind in KINDS
]
UNUSABLE = [case for case in ALL if case.kind.name in case.variant.unusable]
REFUSED = [case for case in ALL if case.kind.name in case.variant.refused]
CASES = [case for case in ALL if case.kind.name not in case.variant.refused | case.variant.unusable]


def _is_first(case: Case) -> bool:
    return case.variant is VARIANTS[case.method.name][0]


def _stands_for_all(case: Case) -> bool:
    return SPECS[case.method.name].reference


_SOME = ("linear", "conv2d")
_ONE_OF_EACH = (*_SOME, "experts_linear", "embedding")
# For the laws of the formula: the first variant on every kind, the others where a formula is written differently.
CASES = [case for case in CASES if _is_first(case) or _stands_for_all(case) or case.kind.name in _SOME]
# For the laws of what is derived from the formula. A method that stands for all is there on every kind; the others on
# one of each way of calling a formula, as the rest differs in nothing that a method sees but the shapes.
FIRST = [c for c in CASES if _is_first(c) and (_stands_for_all(c) or c.kind.name in _ONE_OF_EACH)]
LAWS = [case for case in CASES if case in FIRST or case.kind.name == "linear"]
# The engine does the same for every method, so that its own laws need one on every kind.
REFERENCE = [case for case in FIRST if _stands_for_all(case)]
# For the laws of the compiler, which are slow, and for what the engine does with any leaves and hooks.
SLOW = [case for case in FIRST if case.kind.name == "linear" or case in REFERENCE]


def stacked(adapters: list[fa.Adapter]) -> fa.Adapter:
    """Adapters of one form with a leading axis on every leaf: plain pytree arithmetic."""
    return pytree.tree_map(lambda *leaves: torch.stack(leaves), *adapters)


def tree_close(a: Any, b: Any, **tolerance: float) -> None:
    """Compare two pytrees of tensors of the same form."""
    pairs_a, spec_a = pytree.tree_flatten(a)
    pairs_b, spec_b = pytree.tree_flatten(b)
    assert spec_a == spec_b
    torch.testing.assert_close(pairs_a, pairs_b, **tolerance)


def tolerance(dtype: torch.dtype, scale: float = 1.0, roundings: int = 16) -> dict[str, float]:
    """As many roundings of a value of the given size as a law allows: `roundings * eps * scale`."""
    return {"rtol": 0.0, "atol": roundings * torch.finfo(dtype).eps * max(scale, 1.0)}
