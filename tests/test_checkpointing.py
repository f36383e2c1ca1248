"""Activation checkpointing: gradients are exact, or the call raises. Never wrong in silence."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from oracles import Snapshot
from torch import Tensor, nn
from torch.func import grad
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import funcadapt as fa

NON_REENTRANT = {"use_reentrant": False}


@pytest.fixture(scope="module")
def trained(llama: nn.Module) -> Any:
    """A tiny Llama in training mode; each test chooses how it checkpoints."""
    return copy.deepcopy(llama).train()


def lora(model: nn.Module, seed: int = 0, **fields: Any) -> fa.Adapter:
    config = fa.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, **fields)
    adapter = fa.init(model, config, seed=seed).map(lambda t: t.clone().requires_grad_())
    # The engine learns in a first call which products it can fuse, so only later ones are equal to the last bit.
    with torch.no_grad():
        fa.functional_call(model.eval(), adapter, (torch.tensor([[0]]),))
    model.train()
    return adapter


def grads(adapter: fa.Adapter) -> list[Tensor]:
    found = [t.grad for leaves in adapter.params.values() for t in leaves.values()]
    assert all(g is not None and g.abs().max() > 0 for g in found)
    for t in adapter.tensors():
        t.grad = None
    return found  # pyright: ignore


def loss(model: Any, adapter: fa.Adapter, ids: Tensor, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return fa.functional_call(model, adapter, (ids,), {"labels": ids}).loss


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"lora_dropout": 0.3}], ids=str)
def test_hugging_face_checkpointing_is_automatic(trained: Any, ids: Tensor, fields: dict[str, Any]) -> None:
    adapter = lora(trained, **fields)
    trained.activation_checkpointing_disable()
    loss(trained, adapter, ids).backward()
    expected = grads(adapter)
    trained.activation_checkpointing_enable(activation_checkpointing_kwargs=NON_REENTRANT)
    before = Snapshot(trained)
    out = loss(trained, adapter, ids)
    before.check()
    out.backward()
    before.check()
    for got, want in zip(grads(adapter), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_whole_parameters_survive_a_checkpoint(trained: Any, ids: Tensor) -> None:
    """Parameters that were swapped in are there again when the block is recomputed."""
    adapter = lora(trained, modules_to_save=["input_layernorm"])
    trained.activation_checkpointing_disable()
    loss(trained, adapter, ids).backward()
    expected = grads(adapter)
    trained.activation_checkpointing_enable(activation_checkpointing_kwargs=NON_REENTRANT)
    loss(trained, adapter, ids).backward()
    for got, want in zip(grads(adapter), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_reentrant_checkpointing_raises_on_hugging_face(trained: Any, ids: Tensor) -> None:
    trained.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    before = Snapshot(trained)
    with pytest.raises(RuntimeError, match=r"use_reentrant.*False"):
        loss(trained, lora(trained), ids)
    before.check()


def test_under_torch_func_the_error_says_what_to_do(trained: Any, ids: Tensor) -> None:
    trained.activation_checkpointing_enable(activation_checkpointing_kwargs=NON_REENTRANT)
    adapter, before = lora(trained), Snapshot(trained)
    with pytest.raises(RuntimeError, match="activation_checkpointing_disable"):
        grad(lambda p: loss(trained, adapter.replace(params=p), ids))(pytree.tree_map(torch.detach, adapter.params))
    before.check()


def test_evaluation_is_not_checkpointed(trained: Any, ids: Tensor) -> None:
    trained.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    adapter = lora(trained)
    trained.eval()
    try:
        out = loss(trained, adapter, ids)
        trained.activation_checkpointing_disable()
        assert torch.equal(out, loss(trained, adapter, ids))
    finally:
        trained.train()


# -- backward at another time, with other adapters in place -----------------------------------------------


def test_backward_inside_a_block(trained: Any, ids: Tensor) -> None:
    adapter = lora(trained)
    trained.activation_checkpointing_disable()
    loss(trained, adapter, ids).backward()
    expected = grads(adapter)
    trained.activation_checkpointing_enable(activation_checkpointing_kwargs=NON_REENTRANT)
    before = Snapshot(trained)
    with fa.applied(trained, adapter):
        trained(ids, labels=ids).loss.backward()
    before.check()
    for got, want in zip(grads(adapter), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_backward_while_another_adapter_is_applied(trained: Any, ids: Tensor) -> None:
    adapter, other = lora(trained), lora(trained, seed=1)
    trained.activation_checkpointing_disable()
    loss(trained, adapter, ids).backward()
    expected = grads(adapter)
    trained.activation_checkpointing_enable(activation_checkpointing_kwargs=NON_REENTRANT)
    out, before = loss(trained, adapter, ids), Snapshot(trained)
    with fa.applied(trained, other):
        with torch.no_grad():
            inside = trained(ids).logits
        out.backward()
        with torch.no_grad():
            assert torch.equal(trained(ids).logits, inside)  # the block's own adapter is back
    before.check()
    for got, want in zip(grads(adapter), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert all(t.grad is None for t in other.tensors())


def test_two_losses_of_two_adapters_in_one_backward(trained: Any, ids: Tensor) -> None:
    first, second = lora(trained), lora(trained, seed=1)
    trained.activation_checkpointing_disable()
    (loss(trained, first, ids) + 2 * loss(trained, second, ids)).backward()
    expected = grads(first) + grads(second)
    trained.activation_checkpointing_enable(activation_checkpointing_kwargs=NON_REENTRANT)
    (loss(trained, first, ids) + 2 * loss(trained, second, ids)).backward()
    for got, want in zip(grads(first) + grads(second), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


# -- models written by hand -------------------------------------------------------------------------------


class ByHand(nn.Module):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        self.kwargs = kwargs

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, **self.kwargs) if self.kwargs else self.block(x)  # pyright: ignore


def by_hand(**kwargs: Any) -> tuple[ByHand, fa.Adapter]:
    torch.manual_seed(0)
    model = ByHand(**kwargs).requires_grad_(False)
    config = fa.LoraConfig(r=2, target_modules=["block.0", "block.2"], init_lora_weights=False)
    return model, fa.init(model, config).map(lambda t: t.clone().requires_grad_())


def test_reentrant_checkpointing_raises_by_hand() -> None:
    model, adapter = by_hand(use_reentrant=True)
    x, before = torch.randn(2, 4, requires_grad=True), Snapshot(model)
    with pytest.raises(RuntimeError, match=r"context_fn=fa\.checkpoint_context"):
        fa.functional_call(model, adapter, (x,))
    before.check()


def test_a_forgotten_context_is_an_error_and_not_a_wrong_gradient() -> None:
    model, adapter = by_hand(use_reentrant=False)
    out = fa.functional_call(model, adapter, (torch.randn(2, 4),))
    with pytest.raises(RuntimeError):
        out.sum().backward()


def test_the_context_recomputes_nested_adapters() -> None:
    plain, adapter = by_hand()
    model, _ = by_hand(use_reentrant=False, context_fn=fa.checkpoint_context)
    outer, x = fa.init(plain, adapter.config, seed=1).map(lambda t: t.clone().requires_grad_()), torch.randn(2, 4)
    results = []
    for m in (plain, model):
        with fa.applied(m, adapter):
            out = fa.functional_call(m, outer, (x,), weights=0.5)
        out.pow(2).sum().backward()
        results.append(grads(adapter) + grads(outer))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_the_context_without_adapters_does_nothing() -> None:
    model, _ = by_hand(use_reentrant=False, context_fn=fa.checkpoint_context)
    x = torch.randn(2, 4, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None
