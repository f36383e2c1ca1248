"""Threads: calls on one model wait for each other, structural copies run side by side. Both are exact."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import Snapshot
from torch import Tensor, nn

import funcadapt as fa
from funcadapt.binding import state_of

pytestmark = pytest.mark.usefixtures("_frequent_switches")


def lora(model: nn.Module, seed: int) -> fa.Adapter:
    config = fa.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    return fa.init(model, config, seed=seed)


def together(*works: Callable[[], None]) -> None:
    """Run in one thread each, started together; the first exception is raised here."""
    barrier, errors = threading.Barrier(len(works)), []

    def run(work: Callable[[], None]) -> None:
        try:
            barrier.wait()
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def agree(out: Tensor, expected: Tensor) -> None:
    # Another adapter's answer is off by one or so. The engine may fuse products from the second call on, so the bits
    # of a first call differ.
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


def repeat(
    model: Any, adapter: fa.Adapter | None, ids: Tensor, expected: Tensor, times: int = 15
) -> Callable[[], None]:
    def work() -> None:
        for _ in range(times):
            with torch.no_grad():  # a thread has its own grad mode
                call = fa.functional_call(model, adapter or {}, (ids,))
            agree(call.logits, expected)

    return work


@torch.no_grad()
def logits(model: Any, adapter: fa.Adapter, ids: Tensor) -> Tensor:
    return fa.functional_call(model, adapter, (ids,)).logits


def test_two_adapters_on_one_model(llama: nn.Module, ids: Tensor) -> None:
    adapters = [lora(llama, seed) for seed in range(2)]
    bare = llama(ids).logits.detach()
    before = Snapshot(llama)
    works = [repeat(llama, a, ids, logits(llama, a, ids)) for a in adapters]
    together(*works, repeat(llama, None, ids, bare))
    before.check()


def test_a_block_keeps_other_threads_out(llama: nn.Module, ids: Tensor) -> None:
    first, second = lora(llama, 0), lora(llama, 1)
    expected = [logits(llama, a, ids) for a in (first, second)]

    @torch.no_grad()
    def block() -> None:
        for _ in range(10):
            with fa.applied(llama, first):
                agree(llama(ids).logits, expected[0])

    together(block, repeat(llama, second, ids, expected[1]))


def test_structural_copies_run_side_by_side(llama: nn.Module, ids: Tensor) -> None:
    twin = fa.structural_copy(llama)
    assert {id(p) for p in twin.parameters()} == {id(p) for p in llama.parameters()}
    assert not {id(m) for m in twin.modules()} & {id(m) for m in llama.modules()}
    assert state_of(twin) is not state_of(llama)
    adapters = [lora(llama, seed) for seed in range(2)]
    expected = [logits(llama, a, ids) for a in adapters]
    # Both hold their lock at the same time, so a shared lock would block forever here.
    inside = threading.Barrier(2)

    def work(model: Any, which: int) -> Callable[[], None]:
        @torch.no_grad()
        def run() -> None:
            with fa.applied(model, adapters[which]):
                inside.wait(timeout=30)
                agree(model(ids).logits, expected[which])
            repeat(model, adapters[which], ids, expected[which])()

        return run

    together(work(llama, 0), work(twin, 1))


def test_a_structural_copy_made_inside_a_block_is_of_the_bare_model(llama: nn.Module, ids: Tensor) -> None:
    adapter = lora(llama, 0)
    bare = llama(ids).logits
    with fa.applied(llama, adapter):
        twin = fa.structural_copy(llama)
        assert not torch.equal(llama(ids).logits, bare)  # the block goes on
    assert torch.equal(twin(ids).logits, bare)
    assert not any("forward" in m.__dict__ for m in twin.modules())


def test_buffers_and_ties_are_shared() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.BatchNorm1d(3), nn.Linear(4, 5, bias=False))
    model[2].weight = model[0].weight
    twin = fa.structural_copy(model)
    assert twin[1].running_mean is model[1].running_mean
    assert twin[2].weight is twin[0].weight is model[0].weight
    with torch.no_grad():
        model[0].weight.zero_()
    assert not twin[2].weight.any()


def test_models_that_share_a_module_share_the_lock() -> None:
    shared = nn.Linear(4, 4)
    first, second = nn.Sequential(shared), nn.Sequential(shared, nn.Linear(4, 4))
    assert state_of(first) is state_of(second) is state_of(shared)


def test_a_module_that_joins_a_model_later_shares_the_lock() -> None:
    first, second = nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4)
    x = torch.randn(2, 4)
    state_of(first), state_of(second)
    both = nn.Sequential(first, second)
    fa.functional_call(both, {}, (x,))
    assert state_of(both) is state_of(first) is state_of(second)


def test_a_model_that_was_called_can_be_freed():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    adapter = fa.init(model, fa.LoraConfig(r=2, target_modules=["0", "1"]))
    fa.functional_call(model, adapter, torch.randn(2, 4))
    fa.merge(model, adapter)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
