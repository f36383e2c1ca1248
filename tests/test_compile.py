"""torch.compile on a whole model: one frame per form of adapter, and the eager numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.func import grad_and_value
from torch.utils import _pytree as pytree

import funcadapt as fa


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def lora(model: nn.Module, seed: int = 0, **fields: Any) -> fa.Adapter:
    config = fa.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, **fields)
    return fa.init(model, config, seed=seed)


def close(a: Any, b: Any) -> None:
    torch.testing.assert_close(pytree.tree_leaves(a), pytree.tree_leaves(b), rtol=0, atol=1e-4)


def test_a_training_step_of_a_llama_is_one_frame(llama: Any, ids: Tensor) -> None:
    def step(adapter: fa.Adapter, ids: Tensor) -> Any:
        def loss(params: Any) -> Tensor:
            logits = fa.functional_call(llama, adapter.replace(params=params), (ids,), {"use_cache": False}).logits
            return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

        g, value = grad_and_value(loss)(adapter.params)
        return value, pytree.tree_map(lambda p, g: p - 0.1 * g, adapter.params, g)

    counter = CompileCounter()
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for seed in range(3):
        adapter = lora(llama, seed)
        scaled = adapter.replace(buffers=pytree.tree_map(lambda t, s=seed: t * (s + 1), adapter.buffers))
        close(compiled(scaled, ids), step(scaled, ids))
    assert counter.frame_count == 1


def test_weights_and_names_are_inputs_too() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)), torch.randn(5, 4)

    def call(adapters: dict[str, fa.Adapter], weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return fa.functional_call(model, adapters, (x,), weights=weights)

    counter = CompileCounter()
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for seed in range(3):
        adapters = {"a": lora(model, seed), "b": lora(model, seed + 5, use_dora=True)}
        weights = {"a": torch.tensor(0.3 * seed), "b": torch.randn(5)}
        close(compiled(adapters, weights, x), call(adapters, weights, x))
    assert counter.frame_count == 1


def test_base_parameters_can_be_overridden_inside() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(5, 4)

    def call(adapter: fa.Adapter, base: dict[str, Tensor], x: Tensor) -> Tensor:
        return fa.functional_call(model, adapter, (x,), parameters=base)

    compiled = torch.compile(call, fullgraph=True, backend="eager")
    for seed in range(2):
        adapter, base = lora(model, seed), {"0.weight": torch.randn(4, 4)}
        close(compiled(adapter, base, x), call(adapter, base, x))


def test_the_compiled_call_sees_a_changed_base() -> None:
    """Nothing of the model is baked in."""
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(5, 4)
    compiled = torch.compile(lambda a, x: fa.functional_call(model, a, (x,)), fullgraph=True, backend="eager")
    adapter = lora(model)
    first = compiled(adapter, x)
    with torch.no_grad():
        model[0].weight.add_(1)  # pyright: ignore
    second = compiled(adapter, x)
    assert not torch.allclose(first, second)
    close(second, fa.functional_call(model, adapter, (x,)))


def test_aot_autograd_gives_the_eager_gradients() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)).requires_grad_(False), torch.randn(5, 4)
    call = lambda a, x: fa.functional_call(model, a, (x,))  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    results = []
    for f in (call, compiled):
        adapter = lora(model).map(lambda t: t.clone().requires_grad_())
        f(adapter, x).pow(2).sum().backward()
        results.append(pytree.tree_map(lambda t: t.grad, adapter.params))
    close(*results)


def test_dropout_acts_under_compile() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(5, 4)
    adapter = lora(model, lora_dropout=0.5)
    compiled = torch.compile(lambda a, x: fa.functional_call(model, a, (x,)), fullgraph=True, backend="eager")
    torch.manual_seed(0)
    out = compiled(adapter, x)
    torch.manual_seed(0)
    close(out, fa.functional_call(model, adapter, (x,)))
    assert not torch.equal(out, compiled(adapter, x))
    model.eval()
    assert torch.equal(compiled(adapter, x), compiled(adapter, x))


def test_an_unknown_site_is_an_error_under_compile() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(5, 4)
    adapter = lora(nn.Sequential(nn.ReLU(), nn.Linear(4, 4)))
    compiled = torch.compile(lambda a, x: fa.functional_call(model, a, (x,)), backend="eager")
    with pytest.raises(Exception, match="'1'"):
        compiled(adapter, x)
    assert "forward" not in model[0].__dict__
