"""The laws of per-sample gradients: each row's is the gradient of that row alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import FIRST, LAWS, Case, tolerance, tree_close
from oracles import Snapshot
from torch import Tensor
from torch.func import grad
from torch.utils import _pytree as pytree

import funcadapt as fa


def row_loss(case: Case, out: Tensor) -> Tensor:
    """A different slope everywhere, and a curved loss."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        slope = torch.randn(out.shape[1:], dtype=out.dtype)
    return (out * slope).flatten(1).sum(1).tanh() + out.flatten(1).pow(2).sum(1)


@pytest.mark.parametrize("case", LAWS, ids=str)
def test_each_row_has_the_gradient_of_that_row_alone(case: Case) -> None:
    model, x = case.model(), case.inputs()
    adapter, before = case.adapter(model), Snapshot(model)

    def one(row: Tensor) -> Any:
        def f(params: Any) -> Tensor:
            return row_loss(case, fa.functional_call(model, adapter.replace(params=params), (row,))).sum()

        return grad(f)(adapter.params)

    expected = pytree.tree_map(lambda *rows: torch.stack(rows), *[one(row) for row in x.split(1)])
    got = fa.per_sample.grads(model, adapter, (x,), loss=lambda out: row_loss(case, out))
    scale = max(g.abs().max().item() for g in pytree.tree_leaves(expected))
    assert scale > 0
    tree_close(got, expected, **tolerance(case.kind.exact, scale, roundings=64))
    norms = fa.per_sample.norms(model, adapter, (x,), loss=lambda out: row_loss(case, out))
    flat = torch.cat([g.flatten(1) for g in pytree.tree_leaves(expected)], 1)
    torch.testing.assert_close(norms, flat.norm(dim=1), **tolerance(case.kind.exact, scale * flat.shape[1]))
    assert all(not leaf.requires_grad and leaf.grad is None for leaf in adapter.tensors())
    before.check()


@pytest.mark.parametrize("case", FIRST[:1], ids=str)
def test_a_batch_loss_is_refused(case: Case) -> None:
    model, x = case.model(), case.inputs()
    with pytest.raises(fa.AdapterError, match="one loss for each row"):
        fa.per_sample.grads(model, case.adapter(model), (x,), loss=lambda out: out.sum())


@pytest.mark.parametrize("case", FIRST[:1], ids=str)
def test_a_call_without_rows_is_refused(case: Case) -> None:
    model = case.model()
    with pytest.raises(fa.AdapterError, match="rows on its first axis"):
        fa.per_sample.norms(model, case.adapter(model), (), loss=lambda out: out)


@pytest.mark.parametrize("case", FIRST[:1], ids=str)
def test_gradients_work_where_they_are_switched_off(case: Case) -> None:
    model, x = case.model(), case.inputs()
    adapter = case.adapter(model)
    expected = fa.per_sample.grads(model, adapter, (x,), loss=lambda out: row_loss(case, out))
    with torch.no_grad():
        got = fa.per_sample.grads(model, adapter, (x,), loss=lambda out: row_loss(case, out))
    tree_close(got, expected, **tolerance(case.kind.exact, 10.0))


def test_a_transformer(llama: Any, ids: Tensor) -> None:
    llama = copy.deepcopy(llama).double()  # its norms and softmax stay in float32
    adapter = fa.init(llama, fa.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))

    def loss(out: Any) -> Tensor:
        return out.logits.logsumexp(-1).mean(1)

    got = fa.per_sample.grads(llama, adapter, (ids,), {"use_cache": False}, loss=loss)
    for i, row in enumerate(ids.split(1)):

        def f(params: Any, row: Tensor = row) -> Tensor:
            return loss(fa.functional_call(llama, adapter.replace(params=params), (row,), {"use_cache": False})).sum()

        expected = grad(f)(adapter.params)
        tree_close(pytree.tree_map(lambda g, i=i: g[i], got), expected, rtol=0, atol=1e-5)


def test_what_a_method_needs_of_every_row_goes_with_the_row() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).double().eval()
    adapter = fa.init(model, fa.PolyConfig(r=2, n_tasks=3, target_modules=["0", "2"], init_weights=False))
    x, tasks = torch.randn(4, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 1])

    def one(row: Tensor, task: Tensor) -> Any:
        def f(params: Any) -> Tensor:
            out = fa.functional_call(model, adapter.replace(params=params), (row,), inputs={"task_ids": task})
            return out.square().sum()

        return grad(f)(adapter.params)

    expected = pytree.tree_map(lambda *rows: torch.stack(rows), *map(one, x.split(1), tasks.split(1)))
    how: Any = {"loss": lambda out: out.square().sum(1), "inputs": {"task_ids": tasks}}
    got = fa.per_sample.grads(model, adapter, (x,), **how)
    tree_close(got, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(fa.per_sample.norms(model, adapter, (x,), **how), fa.per_sample.norms_of(expected))
