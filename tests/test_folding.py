"""Where a method says that its dense form is faster, the layer runs once, with it. When, and when not."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

import funcadapt as fa
from funcadapt import peft as shim

CONFIG = fa.HiraConfig(r=2, target_modules=["0"], init_weights=False)
PRODUCTS = {"mm", "addmm", "bmm", "convolution"}


class Products(TorchDispatchMode):
    """Counts matrix products with as many rows as the input has."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rows = {a.shape[0] for a in args if isinstance(a, Tensor) and a.ndim > 1}
        self.count += func.overloadpacket.__name__ in PRODUCTS and 50 in rows
        return func(*args, **(kwargs or {}))


def products(call: Callable[[], Any]) -> int:
    with Products() as mode:
        call()
    return mode.count


def model_of(layer: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    nn.init.normal_(layer.weight)
    return nn.Sequential(layer).double()


def adapted(model: nn.Module, adapter: fa.Adapter, x: Tensor) -> Tensor:
    return torch.func.functional_call(model, fa.merge(model, adapter), (x,))


LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (50, 6)),
    "no bias": (lambda: nn.Linear(6, 4, bias=False), (50, 6)),
    "hf_conv1d": (lambda: Conv1D(4, 6), (50, 6)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1, padding_mode="circular"), (50, 4, 5, 5)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_a_plain_layer_runs_once(kind: str) -> None:
    make, shape = LAYERS[kind]
    model, x = model_of(make()), torch.randn(shape, dtype=torch.float64)
    adapter = fa.init(model, CONFIG)
    assert products(lambda: fa.functional_call(model, adapter, (x,))) == products(lambda: model(x)) == 1
    out = fa.functional_call(model, adapter, (x,))
    torch.testing.assert_close(out, adapted(model, adapter, x), rtol=0, atol=1e-12)


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def wrapped() -> nn.Module:
    layer = nn.Linear(6, 4)
    layer.forward = functools.partial(layer.forward)  # as accelerate does where weights are elsewhere
    return layer


def reparametrised() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(6, 4))


@pytest.mark.parametrize("make", [lambda: Doubled(6, 4), wrapped, reparametrised])
def test_any_other_layer_runs_as_it_is(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(make()).double(), torch.randn(50, 6, dtype=torch.float64)
    adapter = fa.init(model, fa.HiraConfig(r=2, target_modules="0", init_weights=False))
    bare, out = model(x), fa.functional_call(model, adapter, (x,))
    weight, p = model[0].weight, adapter.params["0"]
    expected = bare + x @ (weight * (p["hira_B"] @ p["hira_A"])).T
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    assert products(lambda: fa.functional_call(model, adapter, (x,))) == 2


def test_sixteen_bits_keep_a_small_update() -> None:
    """W + W * (B A) in bfloat16 would be W."""
    model = model_of(nn.Linear(64, 1)).bfloat16()
    weight, x = model[0].weight.detach(), torch.ones(50, 64, dtype=torch.bfloat16)
    adapter = fa.init(model, fa.HiraConfig(r=1, target_modules=["0"]))
    adapter = adapter.replace(
        params={"0": {"hira_A": 1.9e-3 * weight.sign(), "hira_B": torch.ones_like(weight[:, :1])}}
    )
    assert torch.equal(fa.merge(model, adapter)["0.weight"], weight)
    assert products(lambda: fa.functional_call(model, adapter, (x,))) == 2
    added = (fa.functional_call(model, adapter, (x,)) - model(x)).float()
    torch.testing.assert_close(added, (1.9e-3 * weight.abs().float().sum()).expand(50, 1), rtol=0.5, atol=0)


def test_dropout_weights_other_dtypes_and_other_adapters_use_the_hooks() -> None:
    model, x = model_of(nn.Linear(6, 4)), torch.randn(50, 6, dtype=torch.float64)
    adapter = fa.init(model, CONFIG)
    dropping = fa.init(model, fa.HiraConfig(r=2, target_modules=["0"], init_weights=False, hira_dropout=0.5))
    single = adapter.to(dtype=torch.float32)
    assert products(lambda: fa.functional_call(model, dropping, (x,))) == 2
    assert products(lambda: fa.functional_call(model.eval(), dropping, (x,))) == 1
    assert products(lambda: fa.functional_call(model, adapter, (x,), weights=0.5)) == 2
    assert products(lambda: fa.functional_call(model, single, (x,))) == 2
    # two adapters: the inner one folds, the outer one acts on its output
    assert products(lambda: fa.functional_call(model, {"a": adapter, "b": adapter}, (x,))) == 2
    replaced = {"0.weight": 3 * model[0].weight.detach()}
    assert products(lambda: fa.functional_call(model, adapter, (x,), parameters=replaced)) == 1
    out = fa.functional_call(model, adapter, (x,), parameters=replaced) - model[0].bias
    torch.testing.assert_close(out, 3 * (adapted(model, adapter, x) - model[0].bias), rtol=0, atol=1e-12)


def test_the_in_place_view_folds_unless_the_layer_has_hooks() -> None:
    """A hook of the base layer wants its output, which there is none of."""
    model, x = model_of(nn.Linear(6, 4)), torch.randn(50, 6, dtype=torch.float64)
    expected = adapted(model, fa.init(model, CONFIG), x)
    shim.inject_adapter_in_model(shim.HiraConfig(**CONFIG.to_dict()), model)
    layer: Any = model[0]
    with torch.no_grad():
        for name, leaf in fa.init(model_of(nn.Linear(6, 4)), CONFIG).params["0"].items():
            getattr(layer, name)["default"].copy_(leaf)
    assert products(lambda: model(x)) == 1
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
    seen: list[Tensor] = []
    layer.base_layer.register_forward_hook(lambda module, args, out: seen.append(out))
    assert products(lambda: model(x)) == 2
    assert len(seen) == 1
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
