"""A quantised base: every method is on it what it is on the floats that the layer multiplies with."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import FIRST, LAWS, Case, tree_close
from torch import Tensor, nn

import funcadapt as fa


class Quantised(nn.Linear):
    """Eight bits, packed as bitsandbytes packs four: bytes in one column."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None)
        self.scale = layer.weight.detach().abs().max() / 127
        packed = (layer.weight.detach() / self.scale).round().to(torch.int8).view(torch.uint8)
        self.weight, self.bias = nn.Parameter(packed.reshape(-1, 1), requires_grad=False), layer.bias

    def floats(self) -> Tensor:
        return self.weight.view(torch.int8).reshape(self.out_features, self.in_features) * self.scale

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.floats(), self.bias)


class Telling(Quantised):
    """One that says what it multiplies with."""

    def dequantize(self) -> Tensor:
        return self.floats()


class _Kernel(torch.autograd.Function):
    """As the kernels of bitsandbytes are: without a rule for any transform."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] @ ctx.saved_tensors[0], None


class Opaque(Quantised):
    """One that torch.func cannot go through."""

    def forward(self, input: Tensor) -> Tensor:
        y = _Kernel.apply(input, self.floats())
        return y if self.bias is None else y + self.bias  # type: ignore[operator]


def models(
    case: Case, kind: type[Quantised] = Quantised, dtype: torch.dtype | None = None
) -> tuple[nn.Sequential, nn.Sequential]:
    """A model whose first layer is quantised, and one with the same weight in floats."""
    model = case.model(dtype).eval()
    layer = model[0]
    assert isinstance(layer, nn.Linear)
    packed = kind(layer)
    plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    plain.weight, plain.bias = nn.Parameter(packed.floats()), layer.bias
    rest = list(model)[1:]
    return nn.Sequential(packed, *rest).eval(), nn.Sequential(plain, *rest).eval()


LINEAR = [case for case in LAWS if case.kind.name == "linear"]


@pytest.mark.parametrize("case", LINEAR, ids=str)
def test_a_quantised_layer(case: Case) -> None:
    """On a packed weight every method is what it is on the floats that the layer multiplies with."""
    (model, floats), x = models(case), case.inputs()
    adapter = case.adapter(floats)
    expected = fa.functional_call(floats, {"a": adapter}, (x,), weights={"a": 1.0})  # by hooks, also where it folds
    torch.testing.assert_close(fa.functional_call(model, adapter, (x,)), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", LINEAR, ids=str)
def test_the_init_on_a_quantised_layer(case: Case) -> None:
    model, floats = models(case, Telling, torch.float32)  # what leaves are made in where the weight does not say
    found, expected = (fa.init(m, case.adapter(floats).config) for m in (model, floats))
    tree_close(found.params, expected.params, rtol=0, atol=0)


@pytest.mark.parametrize("case", [case for case in FIRST if case.kind.name == "linear"], ids=str)
def test_transforms_of_a_quantised_layer(case: Case) -> None:
    """A kernel that torch.func cannot go through is replaced by the product with the dequantised weight."""
    (model, floats), x = models(case, Opaque), case.inputs()
    adapter = case.adapter(floats)

    def loss(model: nn.Module, params: Any, x: Tensor) -> Tensor:
        return fa.functional_call(model, adapter.replace(params=params), (x,)).square().sum()

    run = partial(torch.func.vmap, in_dims=(None, 0), randomness="different")
    for transform in (torch.func.grad, partial(torch.func.grad, argnums=1), lambda f: run(torch.func.grad(f))):
        found, expected = (transform(partial(loss, m))(adapter.params, x) for m in (model, floats))
        tree_close(found, expected, rtol=1e-9, atol=1e-9)
    found, expected = (torch.func.jvp(partial(loss, m, adapter.params), (x,), (x,)) for m in (model, floats))
    tree_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("init", ["pissa", "olora", "loftq"])
def test_an_init_that_changes_a_quantised_weight_is_refused(init: str) -> None:
    model = nn.Sequential(Quantised(nn.Linear(4, 6)))
    config = fa.LoraConfig(r=2, target_modules=["0"], init_lora_weights=init)
    with pytest.raises(fa.SiteError, match=r"The weight at '0' is quantised \(torch.uint8\), and this init changes"):
        fa.init_with_base(model, config)


def test_a_weight_that_cannot_be_read() -> None:
    conv = nn.Conv2d(2, 2, 1)
    conv.weight = nn.Parameter(torch.zeros(2, 2, 1, 1, dtype=torch.int8), requires_grad=False)
    with pytest.raises(fa.SiteError, match=r"'0' is quantised \(torch.int8\), LORA or its .*a method dequantize"):
        fa.init(nn.Sequential(conv), fa.LoraConfig(r=1, target_modules=["0"], use_dora=True))
