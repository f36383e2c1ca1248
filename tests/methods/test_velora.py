"""VeLoRA in training, which the laws do not see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_tools import layer_model, peft_save, wrap
from torch import Tensor, nn
from torch.func import grad, jvp, vjp, vmap
from torch.utils import _pytree as pytree

import funcadapt as fa
from funcadapt.methods import velora


def make(layer: nn.Module, groups: int = 3, init_type: str = "batch_average", seed: int = 0) -> fa.Adapter:
    given = {"num_groups": groups, "scale": 0.7, "init_type": init_type}
    config = fa.LoraConfig(r=2, lora_alpha=5, target_modules=["0"], init_lora_weights=False, velora_config=given)
    return fa.init(nn.Sequential(layer), config, seed=seed)


@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("init_type", ["random", "batch_average", "batch_average_once"])
def test_gradients_are_those_of_peft(init_type: str, groups: int, tmp_path: Path) -> None:
    model, x, target = layer_model("linear")
    model, x = model.double().train(), x.double()
    given = {"num_groups": groups, "scale": 0.7, "init_type": init_type}
    config = peft.LoraConfig(r=3, **target, velora_config=given)  # pyright: ignore
    wrapped: Any = wrap(layer_model("linear")[0].double(), config).double()
    adapter = fa.load(peft_save(wrapped, tmp_path), model=model)
    wrapped.train()(x).square().sum().backward()
    layer = wrapped.base_model.model.inner["layer"]

    def loss(params: Any, x: Tensor) -> Tensor:
        return fa.functional_call(model, adapter.replace(params=params), (x,)).square().sum()

    ours = grad(loss)(adapter.params, x)["inner.layer"]
    torch.testing.assert_close(ours["lora_A"], layer.lora_A["default"].weight.grad)
    torch.testing.assert_close(ours["lora_B"], layer.lora_B["default"].weight.grad)
    seen = velora.observe(model, adapter, (x,))
    # PEFT writes what it saw while it computed that gradient; and normalises in float32
    held = layer.lora_velora_embed["default"]
    torch.testing.assert_close(seen.buffers["inner.layer"]["lora_velora_embed"], held, rtol=1e-6, atol=1e-6)
    again = velora.observe(model, seen, (x.flip(-1) - 3,))
    one, other = (a.buffers["inner.layer"]["lora_velora_embed"] for a in (seen, again))
    assert torch.equal(one, other) == (init_type != "batch_average")


def test_inputs_are_not_kept() -> None:
    model = nn.Sequential(nn.Linear(64, 8)).requires_grad_(False)
    adapter, x = make(model[0], 4), torch.randn(100, 64)
    live = adapter.replace(params=pytree.tree_map(lambda t: t.clone().requires_grad_(), adapter.params))
    kept: list[int] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        fa.functional_call(model.train(), live, (x,))
    assert max(kept) < x.numel()


def test_the_gradient_of_the_input_is_that_of_lora() -> None:
    model = nn.Sequential(nn.Linear(6, 5)).double()
    adapter, x = make(model[0]), torch.randn(4, 6, dtype=torch.float64)
    out = [
        grad(lambda x: fa.functional_call(model.train(mode), adapter, (x,)).square().sum())(x) for mode in (False, True)
    ]
    torch.testing.assert_close(out[0], out[1])


@pytest.mark.parametrize(
    "layer", [nn.Linear(6, 5), nn.Conv1d(6, 4, 3, stride=2), nn.Conv2d(6, 4, 3, padding=1, groups=2)], ids=str
)
def test_with_all_that_is_kept_it_is_lora(layer: nn.Module) -> None:
    """With groups of one number nothing is lost."""
    model = nn.Sequential(layer).double()
    adapter = make(model[0], 6)
    config = adapter.config
    adapter = adapter.replace(
        config=fa.LoraConfig(**{**config.to_dict(), "velora_config": {"num_groups": 6, "scale": 1.0}})
    )
    x = torch.randn(3, 6, *(7,) * (model[0].weight.ndim - 2), dtype=torch.float64)  # pyright: ignore

    def f(params: Any, train: bool) -> Tensor:
        return fa.functional_call(model.train(train), adapter.replace(params=params), (x,)).square().sum()

    for ours, plain in zip(*(pytree.tree_leaves(grad(f)(adapter.params, mode)) for mode in (True, False)), strict=True):
        torch.testing.assert_close(ours, plain)


def test_transforms() -> None:
    model = nn.Sequential(nn.Linear(6, 5)).double().train()
    adapters = [make(model[0], 2, seed=i) for i in range(3)]
    x = torch.randn(4, 6, dtype=torch.float64)

    def f(params: Any) -> Tensor:
        return fa.functional_call(model, adapters[0].replace(params=params), (x,))

    stack = pytree.tree_map(lambda *t: torch.stack(t), *(a.params for a in adapters))
    many = vmap(grad(lambda p: f(p).square().sum()))(stack)
    for i, adapter in enumerate(adapters):
        one = grad(lambda p: f(p).square().sum())(adapter.params)
        for name in ("lora_A", "lora_B"):
            torch.testing.assert_close(many["0"][name][i], one["0"][name])
    tangent = pytree.tree_map(torch.randn_like, adapters[0].params)
    out, forward = jvp(f, (adapters[0].params,), (tangent,))
    cotangent = torch.randn_like(out)
    back = vjp(f, adapters[0].params)[1](cotangent)[0]
    right = sum((a * b).sum() for a, b in zip(pytree.tree_leaves(tangent), pytree.tree_leaves(back), strict=True))
    torch.testing.assert_close((cotangent * forward).sum(), right)


def test_grouped_equals_a_loop() -> None:
    model = nn.Sequential(nn.Linear(6, 5)).double().train()
    adapters = [make(model[0], 2, seed=i) for i in range(3)]
    stack, x = fa.stack(adapters), torch.randn(12, 6, dtype=torch.float64)

    def f(params: Any) -> Tensor:
        return fa.functional_call(model, fa.grouped(stack.replace(params=params)), (x,)).square().sum()

    g = grad(f)(stack.params)["0"]["lora_A"]
    for i, adapter in enumerate(adapters):
        rows = x[4 * i : 4 * i + 4]
        one = grad(
            lambda p, a=adapter, rows=rows: fa.functional_call(model, a.replace(params=p), (rows,)).square().sum()
        )(adapter.params)
        torch.testing.assert_close(g[i], one["0"]["lora_A"])


def test_errors() -> None:
    for fields, message in (
        ({"num_groups": 0}, "`num_groups` must be a positive integer"),
        ({"scale": 0.0}, "`scale` must be a positive number"),
        ({"init_type": "mean"}, "Unsupported `init_type` 'mean'"),
    ):
        with pytest.raises(ValueError, match=message):
            fa.LoraConfig(velora_config={"num_groups": 2, **fields})
