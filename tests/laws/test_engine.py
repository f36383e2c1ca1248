"""The laws of the engine: unchanged models, threads, activation checkpoints, one graph for compile and export."""

from __future__ import annotations

import io
import threading
from typing import Any

import pytest
import torch
from cases import REFERENCE, SLOW, Case, stacked, tolerance, tree_close
from oracles import Snapshot
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.func import grad, vmap
from torch.utils import _pytree as pytree

import funcadapt as fa

pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop.* aten..?_grouped_mm:UserWarning"),
    # Strict export notices that a call sets and removes an attribute. The laws below show that both happen.
    pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning"),
]


class Bomb(nn.Module):
    """A layer that fails if it sees a NaN, which is how a test can make the model fail after its sites ran."""

    def forward(self, x: Tensor) -> Tensor:
        if x.isnan().any():
            raise ArithmeticError("boom")
        return x


@pytest.mark.parametrize("case", SLOW, ids=str)
def test_a_call_leaves_the_model_unchanged(case: Case) -> None:
    model, x = case.model().append(Bomb()), case.inputs()
    adapter = case.adapter(model)
    broken = adapter.replace(params=pytree.tree_map(lambda t: t * float("nan"), adapter.params))
    misfit = adapter.replace(params=pytree.tree_map(lambda t: torch.cat([t, t]), adapter.params))
    before = Snapshot(model)
    fa.functional_call(model, adapter, (x,))
    before.check()
    fa.functional_call(model, {"a": adapter, "b": adapter}, (x,), weights={"b": 0.5})
    before.check()
    with pytest.raises(ArithmeticError, match="boom"):
        fa.functional_call(model, broken, (x,))
    before.check()
    with pytest.raises(ArithmeticError, match="boom"), fa.applied(model, broken):
        model(x)
    before.check()
    with pytest.raises((fa.AdapterError, RuntimeError)):
        fa.functional_call(model, misfit, (x,))
    before.check()
    if not case.no_dense:
        fa.merge(model, adapter)
        before.check()


@pytest.mark.parametrize("case", SLOW, ids=str)
def test_a_transform_leaves_the_model_unchanged(case: Case) -> None:
    model, x = case.model(), case.inputs()
    adapter, before = case.adapter(model), Snapshot(model)
    stack = stacked([adapter, adapter])
    vmap(grad(lambda p: fa.functional_call(model, adapter.replace(params=p), (x,)).pow(2).sum()))(stack.params)
    before.check()


@pytest.mark.usefixtures("_frequent_switches")
@pytest.mark.parametrize("case", SLOW, ids=str)
def test_two_threads_agree_with_the_sequential_result(case: Case) -> None:
    model, x = case.model(), case.inputs()
    adapters = [case.adapter(model, seed) for seed in range(2)]
    expected = [fa.functional_call(model, a, (x,)) for a in adapters]
    bare, before, wrong = model(x), Snapshot(model), []

    def work(mine: int) -> None:
        torch.set_num_threads(1)  # a new thread of Python has the default again, with which MKL's FFT rounds otherwise
        try:
            for _ in range(25):
                out = fa.functional_call(model, adapters[mine], (x,))
                if not torch.equal(out, expected[mine]):
                    wrong.append(mine)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(mine,)) for mine in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert torch.equal(model(x), bare)
    before.check()


class Checkpointed(nn.Module):
    """A block in an activation checkpoint, as a user writes one."""

    def __init__(self, block: nn.Module, on: bool) -> None:
        super().__init__()
        self.add_module("0", block)
        self.on = on

    def forward(self, x: Tensor) -> Tensor:
        block = self._modules["0"]
        if not self.on:
            return block(x)  # pyright: ignore
        return torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False, context_fn=fa.checkpoint_context)  # pyright: ignore


@pytest.mark.parametrize("case", SLOW, ids=str)
def test_checkpointed_gradients_equal_plain_ones(case: Case) -> None:
    inner, x = case.model(), case.inputs()
    adapter = case.adapter(inner)
    results = []
    for on in (False, True):
        model = Checkpointed(inner[0], on).train(case.variant.training)
        leaves = adapter.replace(params=pytree.tree_map(lambda t: t.clone().requires_grad_(), adapter.params))
        model.requires_grad_(False)
        before = Snapshot(model)
        fa.functional_call(model, leaves, (x,)).pow(2).sum().backward()
        before.check()
        results.append(pytree.tree_map(lambda t: t.grad, leaves.params))
    found = {name: g for p in results[0].values() for name, g in p.items()}
    assert all(name in case.variant.idle or (g is not None and g.abs().max() > 0) for name, g in found.items())
    tree_close(results[1], results[0], rtol=0, atol=0)


# Dropout and scalings are the other variants' difference; the graphs are the same, so one variant is compiled.
@pytest.mark.parametrize("case", [c for c in SLOW if c.kind.exact == torch.float64], ids=str)
def test_compile_sees_one_frame(case: Case) -> None:
    """Forward, gradient and vmap inside one compiled function: one graph for any adapters of one form."""
    model, x = case.model(), case.inputs()

    def f(adapter: fa.Adapter, stack: fa.Adapter, x: Tensor) -> tuple[Any, ...]:
        def loss(params: Any) -> tuple[Tensor, Tensor]:
            out = fa.functional_call(model, adapter.replace(params=params), (x,))
            return out.pow(2).sum(), out

        return *grad(loss, has_aux=True)(adapter.params), vmap(lambda a: fa.functional_call(model, a, (x,)))(stack)

    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(f, fullgraph=True, backend=counter)
    before = Snapshot(model)
    for seed in range(3):  # other values, another scaling
        adapter, stack = case.adapter(model, seed), stacked([case.adapter(model, seed + i) for i in range(2)])
        expected = f(adapter, stack, x)
        scale = max(t.abs().max().item() for t in pytree.tree_leaves(expected))
        tree_close(compiled(adapter, stack, x), expected, **tolerance(case.kind.exact, scale, roundings=64))
    assert counter.frame_count == 1
    before.check()


class Exported(nn.Module):
    """What a user exports: a module whose input is the adapter."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, adapter: fa.Adapter, x: Tensor) -> Tensor:
        return fa.functional_call(self.model, adapter, (x,))


# All methods are exported at a linear layer in test_shapes.py, with an unknown number of tokens.
@pytest.mark.parametrize("strict", [False, True], ids=["non_strict", "strict"])
@pytest.mark.parametrize("case", [c for c in REFERENCE if c.kind.exact == torch.float64], ids=str)
def test_export_takes_the_adapter_as_an_input(case: Case, strict: bool) -> None:
    model, x = case.model().requires_grad_(False), case.inputs()
    first, second = case.adapter(model, 0), case.adapter(model, 1)
    before = Snapshot(model)
    program = torch.export.export(Exported(model), (first, x), strict=strict)
    before.check()
    expected = fa.functional_call(model, second, (x,))
    out = program.module()(second, x)
    torch.testing.assert_close(out, expected, **tolerance(out.dtype, expected.abs().max().item()))
    if case.kind.name == "linear":
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        again = torch.export.load(file)
        assert "Adapter" in str(again.call_spec.in_spec)
        torch.testing.assert_close(again.module()(second, x), out, rtol=0, atol=0)
        # The config travels in the spec: an adapter with another config is another type of input.
        (given, _), _ = pytree.tree_unflatten([*pytree.tree_leaves((second, x))], again.call_spec.in_spec)
        assert given.config == second.config
