"""The functional optimisers against `torch.optim`, one adapter at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import optree
import pytest
import torch
from torch import Tensor

import funcadapt as fa
from funcadapt import optim

N, STEPS = 3, 12
LR = torch.tensor([1e-1, 1e-2, 3e-3], dtype=torch.float64)


def tree(dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Leaves of several ranks, one of them stored column by column, as `lora_B` is."""
    column_major = torch.randn(N, 4, 6, dtype=dtype).transpose(1, 2)
    return {
        "z": {"a": torch.randn(N, 2, 5, dtype=dtype), "b": column_major},
        "a": {"vector": torch.randn(N, 7, dtype=dtype), "scalar": torch.randn(N, dtype=dtype)},
    }


def gradients(count: int = STEPS, dtype: torch.dtype = torch.float64) -> list[dict[str, Any]]:
    scale = torch.tensor([1.0, 10.0, 0.1], dtype=dtype)
    return [optree.tree_map(lambda g: g * scale.reshape(N, *(1,) * (g.ndim - 1)), tree(dtype)) for _ in range(count)]


def one(value: Any, i: int) -> Any:
    """The part of adapter i."""
    return optree.tree_map(lambda t: t[i], value)


def alone(params: Any, grads: list[Any], make: Callable[[list[Tensor]], torch.optim.Optimizer], clip: float = math.inf):
    """What torch does to a single adapter."""
    leaves = [t.clone().requires_grad_() for t in optree.tree_leaves(params)]
    optimizer = make(leaves)
    norms = []
    for g in grads:
        for leaf, grad in zip(leaves, optree.tree_leaves(g), strict=True):
            leaf.grad = grad.clone()
        if clip < math.inf:
            norms.append(torch.nn.utils.clip_grad_norm_(leaves, clip))
        optimizer.step()
    return [leaf.detach() for leaf in leaves], norms


def assert_alone(params: Any, expected: list[list[Tensor]], **tolerance: float) -> None:
    for i, leaves in enumerate(expected):
        for got, want in zip(optree.tree_leaves(one(params, i)), leaves, strict=True):
            torch.testing.assert_close(got, want, **(tolerance or {"rtol": 1e-13, "atol": 1e-15}))


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_adamw_is_torch_for_each(dtype: torch.dtype, rtol: float):
    start, grads = tree(dtype), gradients(dtype=dtype)
    hyper: dict[str, list[Any]] = {
        "betas": [(0.9, 0.999), (0.5, 0.9), (0.0, 0.99)],
        "eps": [1e-8, 1e-3, 1e-6],
        "weight_decay": [0.0, 0.3, 0.01],
    }
    expected = [
        alone(one(start, i), [one(g, i) for g in grads],
              lambda p, i=i: torch.optim.AdamW(p, lr=float(LR[i]), **{k: v[i] for k, v in hyper.items()}))[0]
        for i in range(N)
    ]  # fmt: skip
    params, state = start, optim.adamw.init(start)
    betas = torch.tensor(hyper["betas"], dtype=torch.float64).unbind(1)
    others = {k: torch.tensor(hyper[k], dtype=torch.float64) for k in ("eps", "weight_decay")}
    for g in grads:
        params, state = optim.adamw.update(params, g, state, lr=LR, betas=betas, **others)
    assert_alone(params, expected, rtol=rtol, atol=rtol / 10)
    assert all(t.dtype == dtype for t in optree.tree_leaves(params))


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_torch_for_each(nesterov: bool):
    start, grads = tree(), gradients()
    momentum, decay = [0.9, 0.5, 0.2], [0.0, 0.1, 0.5]
    expected = [
        alone(one(start, i), [one(g, i) for g in grads],
              lambda p, i=i: torch.optim.SGD(p, lr=float(LR[i]), momentum=momentum[i], weight_decay=decay[i],
                                             nesterov=nesterov))[0]
        for i in range(N)
    ]  # fmt: skip
    params, state = start, optim.sgd.init(start)
    for g in grads:
        params, state = optim.sgd.update(
            params,
            g,
            state,
            lr=LR,
            momentum=torch.tensor(momentum),
            weight_decay=torch.tensor(decay),
            nesterov=nesterov,
        )
    assert_alone(params, expected, rtol=1e-6, atol=1e-7)  # momentum in float32 is 0.9 to seven digits
    params, state = start, optim.sgd.init(start)
    wide = {k: torch.tensor(v, dtype=torch.float64) for k, v in (("momentum", momentum), ("weight_decay", decay))}
    for g in grads:
        params, state = optim.sgd.update(params, g, state, lr=LR, nesterov=nesterov, **wide)
    assert_alone(params, expected)


def test_plain_numbers_are_for_all():
    start, grads = tree(), gradients(4)
    expected = [
        alone(one(start, i), [one(g, i) for g in grads], lambda p: torch.optim.AdamW(p, lr=0.1))[0] for i in range(N)
    ]
    params, state = start, optim.adamw.init(start)
    for g in grads:
        params, state = optim.adamw.update(params, g, state, lr=0.1)
    assert_alone(params, expected)


def test_clipping_is_torch_for_each():
    start, grads = tree(), gradients()
    limits = [0.5, math.inf, 100.0]  # clipped, not clipped, below the limit
    results = [
        alone(one(start, i), [one(g, i) for g in grads], lambda p: torch.optim.SGD(p, lr=1.0), limits[i])
        for i in range(N)
    ]
    params, state, norms = start, optim.sgd.init(start), []
    for g in grads:
        g, norm = optim.clip_by_norm(g, torch.tensor(limits))
        norms.append(norm)
        params, state = optim.sgd.update(params, g, state, lr=1.0)
    assert_alone(params, [leaves for leaves, _ in results])
    for i in (0, 2):
        torch.testing.assert_close(torch.stack(norms)[:, i], torch.stack(results[i][1]))


def test_clipping_keeps_adapters_apart():
    grads = {"a": torch.tensor([[math.nan, 1.0], [math.inf, 1.0], [3.0, 4.0]])}
    clipped, norms = optim.clip_by_norm(grads, torch.tensor([1.0, math.inf, 1.0]))
    assert clipped["a"][0].isnan().all()
    assert torch.equal(clipped["a"][1], grads["a"][1])  # no limit: exactly as it was
    torch.testing.assert_close(clipped["a"][2], torch.tensor([0.6, 0.8]))
    assert norms[2] == 5
    params = {"a": torch.ones(3, 2)}
    new, _ = optim.adamw.update(params, clipped, optim.adamw.init(params), lr=0.1)
    assert new["a"][2].isfinite().all()


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_vmap_and_single_adapters(name: str):
    optimizer = getattr(optim, name)
    params, (grads, more) = tree(), gradients(2)
    limit = torch.tensor([0.1, 1.0, 50.0], dtype=torch.float64)

    def step(params: Any, grads: Any, state: Any, lr: Any, limit: Any, stacked: bool) -> Any:
        grads, _ = optim.clip_by_norm(grads, limit, stacked=stacked)
        return optimizer.update(params, grads, state, lr=lr, weight_decay=0.1)

    stacked = step(params, grads, optimizer.init(params), LR, limit, True)
    stacked = step(stacked[0], more, stacked[1], LR, limit, True)

    @torch.func.vmap
    def mapped(params: Any, grads: Any, more: Any, lr: Tensor, limit: Tensor) -> Any:
        done = step(params, grads, optimizer.init(params, stacked=False), lr, limit, False)
        return step(done[0], more, done[1], lr, limit, False)

    for got, want in zip(
        optree.tree_leaves(mapped(params, grads, more, LR, limit)), optree.tree_leaves(stacked), strict=True
    ):
        torch.testing.assert_close(got, want)
    first = step(one(params, 0), one(grads, 0), optimizer.init(one(params, 0), stacked=False), 0.1, 0.1, False)
    first = step(first[0], one(more, 0), first[1], 0.1, 0.1, False)
    torch.testing.assert_close(first[0], one(stacked[0], 0))


def test_learning_rates_can_be_learned():
    """The update is differentiable: the slope with respect to the learning rates, against differences."""
    params, grads = {"a": torch.randn(2, 3, dtype=torch.float64)}, {"a": torch.randn(2, 3, dtype=torch.float64)}

    def after(lr: Tensor) -> Tensor:
        return optim.adamw.update(params, grads, optim.adamw.init(params), lr=lr)[0]["a"].square().sum(1)

    assert torch.autograd.gradcheck(after, (torch.tensor([0.1, 0.2], dtype=torch.float64, requires_grad=True),))


def test_nothing_is_changed_and_layouts_stay():
    params, (grads, *_) = tree(), gradients(1)
    copies = [t.clone() for t in optree.tree_leaves((params, grads))]
    state = optim.adamw.init(params)
    new, later = optim.adamw.update(params, grads, state, lr=0.1)
    assert all(torch.equal(a, b) for a, b in zip(copies, optree.tree_leaves((params, grads)), strict=True))
    assert not any(t.any() for t in optree.tree_leaves(state))
    for values in (new, later.mean, later.square, optim.select(new, [1])):
        assert values["z"]["b"].stride()[1:] == params["z"]["b"].stride()[1:]


def test_selected_adapters_go_on_as_before():
    params, grads = tree(), gradients(6)
    state = optim.adamw.init(params)
    small, few = params, state
    for step, g in enumerate(grads):
        params, state = optim.adamw.update(params, g, state, lr=LR)
        if step == 2:
            small, few = optim.select((params, state), [2, 0])
        if step > 2:
            small, few = optim.adamw.update(small, optim.select(g, [2, 0]), few, lr=LR[[2, 0]])
    for got, want in zip(optree.tree_leaves((small, few)), optree.tree_leaves((params, state)), strict=True):
        assert torch.equal(got, want[[2, 0]])


@pytest.mark.parametrize("warmup", [0, 4])
@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_schedules_are_those_of_transformers(kind: str, warmup: int):
    transformers = pytest.importorskip("transformers")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    name = "constant_with_warmup" if kind == "constant" else kind
    theirs = transformers.get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=20)
    make = getattr(optim, kind)
    ours = make(warmup=warmup) if kind == "constant" else make(20, warmup=warmup)
    for step in range(22 if kind != "cosine" else 21):
        assert float(ours(step)) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12), step
        optimizer.step()
        theirs.step()


def test_schedules_for_each_adapter():
    steps, warmup, end = torch.tensor([10, 20, 20]), torch.tensor([0, 5, 5]), torch.tensor([0.0, 0.0, 0.25])
    for kind in (optim.linear, optim.cosine):
        schedule = kind(steps, warmup=warmup, end=end)
        for step in range(25):
            got = schedule(step)
            assert got.shape == (3,)
            for i in range(3):
                single = kind(int(steps[i]), warmup=int(warmup[i]), end=float(end[i]))(step)
                assert float(got[i]) == pytest.approx(float(single), abs=1e-12)
    assert torch.equal(optim.linear(10)(torch.arange(3)), torch.tensor([1.0, 0.9, 0.8], dtype=torch.float64))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: optim.adamw.update(p, p, optim.adamw.init(p), lr=-1.0), "lr must not be negative, got -1"),
        (lambda p: optim.adamw.update(p, p, optim.adamw.init(p), lr=math.nan), "lr must not be negative, got nan"),
        (lambda p: optim.adamw.update(p, p, optim.adamw.init(p), lr=1.0, betas=(1.0, 0.9)), r"betas.*in \[0, 1\)"),
        (lambda p: optim.adamw.update(p, p, optim.adamw.init(p), lr=torch.ones(2)), "for 2 adapters.*axis of 2"),
        (lambda p: optim.sgd.update(p, p, optim.sgd.init(p), lr=torch.ones(3, 1)), r"lr must be.*shape \(3, 1\)"),
        (lambda p: optim.sgd.update(p, p, optim.sgd.init(p), lr=1.0, momentum=-0.1), "momentum must not be"),
        (lambda p: optim.clip_by_norm(p, -1.0), "max_norm must not be negative"),
        (lambda p: optim.adamw.init({}), "nothing to train"),
        (lambda p: optim.linear(4, warmup=-1)(0), "warmup must not be"),
    ],
)
def test_errors_say_what_is_wrong(call: Callable[[Any], Any], message: str):
    with pytest.raises(fa.AdapterError, match=message):
        call({"a": torch.ones(3, 2)})


def test_it_compiles():
    params, (grads, *_) = tree(), gradients(1)
    state = optim.adamw.init(params)
    step = torch.compile(lambda p, g, s: optim.adamw.update(p, g, s, lr=LR), backend="eager")
    for got, want in zip(
        optree.tree_leaves(step(params, grads, state)),
        optree.tree_leaves(optim.adamw.update(params, grads, state, lr=LR)),
        strict=True,
    ):
        assert torch.equal(got, want)
