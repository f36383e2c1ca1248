"""The laws of many adapters in one pass: `grouped` and `routed` are loops, in value, gradient, graph and export."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from typing import Any

import optree
import pytest
import torch
from cases import FIRST, LAWS, REFERENCE, SLOW, Case, tolerance, tree_close
from oracles import Snapshot
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.func import grad, jvp, vmap
from torch.utils import _pytree as pytree

import funcadapt as fa
from funcadapt.layer import Layer
from funcadapt.many import Routed
from funcadapt.sharing import SHARED
from funcadapt.sites import describe

pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop.* aten..?_grouped_mm:UserWarning"),
    pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning"),
]

HOW = [None, "gather", "sort", "masked"]


# Where the rows of a call act on each other through the adapter, a loop over rows is another function.
BY_ROW = [case for case in FIRST if not case.method.couples]
SLOW_BY_ROW = [case for case in SLOW if not case.method.couples]


def ways(cases: list[Case], hows: list[str | None]) -> pytest.MarkDecorator:
    """Every way of routing where it can differ: at a linear layer, and everywhere for what stands for all."""
    pairs = [
        (case, how)
        for case in cases
        for how in hows
        if case in REFERENCE or case.kind.name == "linear" or how == hows[0]
    ]
    return pytest.mark.parametrize(("case", "how"), pairs, ids=[f"{case}-{how}" for case, how in pairs])


# What these layers do with a row depends on where it stands, so a row alone says nothing. `grouped` runs them on the
# rows of each group, where all is well defined. `routed` wants layers that treat rows independently: here it is only
# tested in eager mode on rows in equal groups, where it must do the same.
BY_POSITION = frozenset({"experts_bmm", "experts_grouped"})
# Adapted through their weight: there is no output of theirs to weigh row by row.
THROUGH_THE_WEIGHT = frozenset({"mha", "mha_no_bias"})
HOOKED = [c for c in FIRST if not c.kind.is_parameter and c.kind.name not in THROUGH_THE_WEIGHT]

Tree = Any


def inputs(case: Case, n: int) -> list[Tensor]:
    """n different inputs of a case, each (B, ...)."""
    x, generator = case.inputs(), torch.Generator().manual_seed(3)
    if not x.is_floating_point():
        return [x.roll(i, -1).add(i).remainder(10) for i in range(n)]
    return [torch.randn(x.shape, generator=generator).to(x.dtype) for _ in range(n)]


def leaves(stack: fa.Adapter) -> fa.Adapter:
    """The same adapter, to be differentiated by autograd."""
    return stack.replace(params=pytree.tree_map(lambda t: t.detach().clone().requires_grad_(), stack.params))


def size_of(tree: Tree) -> float:
    return max(t.abs().max().item() for t in pytree.tree_leaves(tree))


def gradients(value: Tensor, adapters: list[fa.Adapter]) -> list[Tree]:
    """The gradient with respect to the params of each."""
    flat, spec = pytree.tree_flatten([a.params for a in adapters])
    found = torch.autograd.grad(value, flat, materialize_grads=True)
    return pytree.tree_unflatten([*found], spec)


def index_for(case: Case, rows: int) -> Tensor:
    """Which adapter of three each row uses: -1 is there, and 1 is not."""
    if case.kind.name in BY_POSITION:  # equal groups in order: the module sees each group as it would alone
        return torch.tensor([-1, 0, 2]).repeat_interleave(rows // 3)
    return torch.tensor([2, -1, 0, 0, 2]).repeat(rows)[:rows]


def row_by_row(case: Case, model: nn.Module, adapters: list[fa.Adapter], index: Tensor, x: Tensor) -> Tensor:
    """The oracle of `routed`: every row with its own adapter, alone."""

    def call(which: int, x: Tensor) -> Tensor:
        return model(x) if which < 0 else fa.functional_call(model, adapters[which], (x,))

    if case.kind.name in BY_POSITION:
        runs, counts = torch.unique_consecutive(index, return_counts=True)
        parts = x.split(counts.tolist())
        return torch.cat([call(which, part) for which, part in zip(runs.tolist(), parts, strict=True)])
    return torch.cat([call(which, x[i : i + 1]) for i, which in enumerate(index.tolist())])


def refuses(case: Case, how: str | None) -> bool:
    """Whether that execution does not exist for the method."""
    return (how == "masked" and case.method.masked is None) or (case.method.couples and how in ("gather", "sort"))


def has_rank(case: Case) -> bool:
    return case.method.with_rank is not None


def of_ranks(case: Case, model: nn.Sequential, ranks: tuple[int, ...]) -> list[fa.Adapter]:
    """Adapters of other ranks (multiples of a convolution's groups), no leaf at its initial value."""
    groups = getattr(model[0], "groups", 1)
    adapters: list[fa.Adapter] = []
    for seed, r in enumerate(ranks):

        def config(r: int = r * groups, **targets: Any) -> fa.AdapterConfig:
            return dataclasses.replace(case.variant.config(**targets), **{case.method.rank_field: r})  # pyright: ignore

        other = dataclasses.replace(case, variant=dataclasses.replace(case.variant, config=config))
        adapters.append(other.adapter(model, seed))
    return adapters


# -- values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", FIRST, ids=str)
def test_grouped_is_a_loop(case: Case) -> None:
    model, xs = case.model(), inputs(case, 3)
    adapters = [case.adapter(model, seed) for seed in range(3)]
    expected = torch.cat([fa.functional_call(model, a, (x,)) for a, x in zip(adapters, xs, strict=True)])
    close = tolerance(expected.dtype, expected.abs().max().item())
    many, x = fa.grouped(fa.stack(adapters)), torch.cat(xs)
    torch.testing.assert_close(fa.functional_call(model, many, (x,), strict=True), expected, **close)
    with fa.applied(model, {"many": many}, strict=True):
        torch.testing.assert_close(model(x), expected, **close)
        torch.testing.assert_close(model(x), expected, **close)
    shared = torch.cat([fa.functional_call(model, a, (xs[0],)) for a in adapters])
    expand = fa.grouped(fa.stack(adapters), expand=True)
    torch.testing.assert_close(fa.functional_call(model, expand, (xs[0],)), shared, **close)


@ways(BY_ROW, HOW)
def test_routed_is_a_loop_over_rows(case: Case, how: str | None) -> None:
    model, x = case.model(), torch.cat(inputs(case, 3))
    adapters = [case.adapter(model, seed) for seed in range(3)]
    index = index_for(case, len(x))
    if refuses(case, how):
        with pytest.raises(fa.AdapterError, match="masked"):
            fa.routed(fa.stack(adapters), index, how=how)
        return
    many = fa.routed(fa.stack(adapters), index, how=how)
    expected = row_by_row(case, model, adapters, index, x)
    close = tolerance(expected.dtype, expected.abs().max().item())
    out = fa.functional_call(model, many, (x,), strict=True)
    torch.testing.assert_close(out, expected, **close)
    with fa.applied(model, many, strict=True):
        torch.testing.assert_close(model(x), expected, **close)
    bare = torch.full_like(index, -1)
    out = fa.functional_call(model, fa.routed(fa.stack(adapters), bare, how=how), (x,))
    if case.kind.name not in BY_POSITION:
        torch.testing.assert_close(out, model(x), **tolerance(out.dtype, out.abs().max().item(), roundings=4))


@ways([c for c in BY_ROW if c.kind.name not in BY_POSITION], [None, "masked"])
def test_an_index_entry_is_for_consecutive_rows(case: Case, how: str | None) -> None:
    """Beams, return sequences, and tokens that a layer sees as rows."""
    if refuses(case, how):
        return
    model, x = case.model(), torch.cat(inputs(case, 3))
    adapters = [case.adapter(model, seed) for seed in range(3)]
    for k in (2, 3):
        index = index_for(case, len(x))
        many = x.repeat_interleave(k, 0).roll(1, -1)
        expected = row_by_row(case, model, adapters, index.repeat_interleave(k), many)
        out = fa.functional_call(model, fa.routed(fa.stack(adapters), index, how=how), (many,))
        torch.testing.assert_close(out, expected, **tolerance(out.dtype, expected.abs().max().item()))


TOKENS = frozenset({"linear", "hf_conv1d", "embedding", "embedding_padding"})


@ways([c for c in BY_ROW if c.kind.name in TOKENS], HOW)
def test_an_index_of_two_axes_routes_tokens(case: Case, how: str | None) -> None:
    if refuses(case, how):
        return
    model, x = case.model(), torch.cat(inputs(case, 2))
    adapters = [case.adapter(model, seed) for seed in range(3)]
    index = torch.tensor([2, -1, 0, 1, 0]).repeat(4)[: x.shape[0] * x.shape[1]].reshape(x.shape[:2])
    each = torch.stack([*(fa.functional_call(model, a, (x,)) for a in adapters), model(x)])
    expected = each.gather(0, index.remainder(4)[None, :, :, None].expand(1, -1, -1, each.shape[-1]))[0]
    out = fa.functional_call(model, fa.routed(fa.stack(adapters), index, how=how), (x,))
    torch.testing.assert_close(out, expected, **tolerance(out.dtype, expected.abs().max().item()))


@pytest.mark.parametrize("case", SLOW_BY_ROW, ids=str)
def test_bfloat16_is_the_loop_up_to_roundings(case: Case) -> None:
    low = torch.bfloat16
    model, xs = case.model(low), [x.to(low) if x.is_floating_point() else x for x in inputs(case, 3)]
    adapters = [case.adapter(model, seed) for seed in range(3)]
    stack, x = fa.stack(adapters), torch.cat(xs)
    expected = torch.cat([fa.functional_call(model, a, (x,)) for a, x in zip(adapters, xs, strict=True)])
    index = torch.arange(3).repeat_interleave(len(xs[0]))
    for many in (fa.grouped(stack), *(fa.routed(stack, index, how=how) for how in HOW if not refuses(case, how))):
        out = fa.functional_call(model, many, (x,))
        assert out.dtype == low
        torch.testing.assert_close(out, expected, **tolerance(low, expected.abs().max().item(), roundings=4))


# -- gradients --------------------------------------------------------------------------------------------


def _loop_gradients(
    case: Case, adapters: list[fa.Adapter], call: Callable[[list[fa.Adapter], Tensor], Tensor], x: Tensor, slope: Tensor
) -> tuple[list[Tree], Tensor | None]:
    """Of every adapter in the loop, and of the input."""
    own = [leaves(a) for a in adapters]
    x = x.detach().clone().requires_grad_() if x.is_floating_point() else x
    value = (call(own, x) * slope).sum()
    to_input = torch.autograd.grad(value, x, retain_graph=True)[0] if x.requires_grad else None
    return gradients(value, own), to_input


def _check_gradients(
    case: Case,
    model: nn.Module,
    many: Callable[[fa.Adapter], Any],
    adapters: list[fa.Adapter],
    loop: Callable[[list[fa.Adapter], Tensor], Tensor],
    x: Tensor,
) -> None:
    stack, slope = fa.stack(adapters), case.slope(model, x)
    expected, expected_x = _loop_gradients(case, adapters, loop, x, slope)
    # padded in the same way as the adapters were
    padded = dict(fa.stack([a.replace(params=g) for a, g in zip(adapters, expected, strict=True)]).params)
    scale = size_of(padded)
    assert scale > 0
    close = tolerance(case.kind.exact, scale, roundings=64)

    own = leaves(stack)
    at = x.detach().clone().requires_grad_() if x.is_floating_point() else x
    loss = (fa.functional_call(model, many(own), (at,)) * slope).sum()
    if expected_x is not None:
        g_x = torch.autograd.grad(loss, at, retain_graph=True)[0]
        torch.testing.assert_close(
            g_x, expected_x, **tolerance(case.kind.exact, expected_x.abs().max().item(), roundings=64)
        )
    by_autograd = gradients(loss, [own])[0]
    tree_close(by_autograd, padded, **close)

    def objective(params: Tree) -> Tensor:
        return (fa.functional_call(model, many(stack.replace(params=params)), (x,)) * slope).sum()

    value = many(stack)
    if isinstance(value, Routed) and case.kind.name in BY_POSITION:
        by_grad = by_autograd  # see BY_POSITION
    elif isinstance(value, Routed) and value.how == "sort" and case in HOOKED:
        with pytest.raises(fa.AdapterError, match="sort"):
            grad(objective)(stack.params)
        by_grad = by_autograd
    else:
        by_grad = grad(objective)(stack.params)
        tree_close(by_grad, padded, **close)
    for g in (by_autograd, by_grad):
        # cutting the padding off and putting zeros there changes nothing: it was exactly zero
        cut = fa.stack([m.replace(config=a.config) for m, a in zip(fa.unstack(stack.replace(params=g)), adapters)])
        tree_close(dict(cut.params), g, rtol=0, atol=0)


@pytest.mark.parametrize("case", FIRST, ids=str)
def test_gradients_of_grouped_are_the_loops(case: Case) -> None:
    model, xs = case.model(), inputs(case, 3)
    size = len(xs[0])

    def loop(adapters: list[fa.Adapter], x: Tensor) -> Tensor:
        return torch.cat([fa.functional_call(model, a, (g,)) for a, g in zip(adapters, x.split(size), strict=True)])

    adapters = [case.adapter(model, seed) for seed in range(3)]
    _check_gradients(case, model, fa.grouped, adapters, loop, torch.cat(xs))


@ways(BY_ROW, HOW)
def test_gradients_of_routed_are_the_loops(case: Case, how: str | None) -> None:
    if refuses(case, how):
        return
    model, x = case.model(), torch.cat(inputs(case, 3))
    index = index_for(case, len(x))
    adapters = [case.adapter(model, seed) for seed in range(3)]
    _check_gradients(
        case,
        model,
        lambda stack: fa.routed(stack, index, how=how),
        adapters,
        lambda adapters, x: row_by_row(case, model, adapters, index, x),
        x,
    )
    # the adapter that no row uses gets exactly nothing
    own = leaves(fa.stack(adapters))
    g = gradients((fa.functional_call(model, fa.routed(own, index, how=how), (x,))).pow(2).sum(), [own])[0]
    assert not any(t[1].any() for t in pytree.tree_leaves(g))


@ways([c for c in BY_ROW if has_rank(c)], ["grouped", *HOW[1:]])
def test_mixed_ranks_are_padded_and_the_padding_has_no_gradient(case: Case, how: str) -> None:
    if refuses(case, how):
        return
    model, xs = case.model(), inputs(case, 3)
    adapters, x, size = of_ranks(case, model, (2, 1, 3)), torch.cat(xs), len(xs[0])
    index = torch.arange(3).repeat_interleave(size)

    def loop(adapters: list[fa.Adapter], x: Tensor) -> Tensor:
        return torch.cat([fa.functional_call(model, a, (g,)) for a, g in zip(adapters, x.split(size), strict=True)])

    def many(stack: fa.Adapter) -> Any:
        return fa.grouped(stack) if how == "grouped" else fa.routed(stack, index, how=how)

    out = fa.functional_call(model, many(fa.stack(adapters)), (x,))
    expected = loop(adapters, x)
    torch.testing.assert_close(out, expected, **tolerance(out.dtype, expected.abs().max().item()))
    _check_gradients(case, model, many, adapters, loop, x)


def _forward_mode(case: Case) -> bool:
    """torch has no forward mode for its grouped product, see test_transforms.py."""
    return case.kind.name != "experts_grouped"


@pytest.mark.parametrize("case", [c for c in BY_ROW if _forward_mode(c)], ids=str)
def test_forward_mode_is_the_loops(case: Case) -> None:
    model, xs = case.model(), inputs(case, 2)
    adapters = [case.adapter(model, seed) for seed in range(2)]
    stack, x = fa.stack(adapters), torch.cat(xs)
    tangent = pytree.tree_map(torch.randn_like, stack.params)
    tangents = [a.params for a in fa.unstack(stack.replace(params=tangent))]
    index = torch.tensor([0, 1]).repeat_interleave(len(xs[0]))
    with fa.math_attention():
        expected = torch.cat(
            [
                jvp(lambda p, a=a, x=x: fa.functional_call(model, a.replace(params=p), (x,)), (a.params,), (t,))[1]
                for a, t, x in zip(adapters, tangents, xs, strict=True)
            ]
        )
        for many in (fa.grouped, lambda s: fa.routed(s, index)):
            if isinstance(many(stack), Routed) and case.kind.name in BY_POSITION:
                continue
            _, out = jvp(
                lambda p, many=many: fa.functional_call(model, many(stack.replace(params=p)), (x,)),
                (stack.params,),
                (tangent,),
            )
            torch.testing.assert_close(out, expected, **tolerance(out.dtype, expected.abs().max().item(), roundings=64))


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


@ways(SLOW_BY_ROW, ["grouped", *HOW])
def test_checkpointed_gradients_equal_plain_ones(case: Case, how: str | None) -> None:
    if refuses(case, how):
        return
    inner, x = case.model(), torch.cat(inputs(case, 3))
    stack, index = fa.stack([case.adapter(inner, seed) for seed in range(3)]), index_for(case, len(x))
    results = []
    for on in (False, True):
        model = Checkpointed(inner[0], on).train(case.variant.training).requires_grad_(False)
        own, before = leaves(stack), Snapshot(model)
        many = fa.grouped(own) if how == "grouped" else fa.routed(own, index, how=how)
        out = fa.functional_call(model, many, (x,))
        before.check()
        with fa.applied(model, fa.grouped(fa.stack([*fa.unstack(stack)[::-1]]))):  # others are in place by now
            model(x)
            out.pow(2).sum().backward()
        before.check()
        results.append(pytree.tree_map(lambda t: t.grad, own.params))
    found = {name: g for p in results[0].values() for name, g in p.items()}
    assert all(name in case.variant.idle or (g is not None and g.abs().max() > 0) for name, g in found.items())
    tree_close(results[1], results[0], rtol=0, atol=0)


# -- few rows, wrong rows ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SLOW_BY_ROW, ids=str)
def test_one_adapter_one_row_and_none(case: Case) -> None:
    model, x = case.model(), case.inputs()
    adapters = [case.adapter(model, seed) for seed in range(2)]
    alone = fa.functional_call(model, adapters[1], (x,))
    close = tolerance(alone.dtype, alone.abs().max().item())
    one = fa.stack(adapters[1:])
    torch.testing.assert_close(fa.functional_call(model, fa.grouped(one), (x,)), alone, **close)
    zeros = torch.zeros(len(x), dtype=torch.long)
    stack = fa.stack(adapters)
    rows = [row_by_row(case, model, [a], zeros[:1], x[:1]) for a in adapters]
    close = tolerance(alone.dtype, max(r.abs().max().item() for r in rows))
    both = torch.cat([x[:1], x[:1]])
    torch.testing.assert_close(fa.functional_call(model, fa.grouped(stack), (both,)), torch.cat(rows), **close)
    for how in HOW:
        if refuses(case, how):
            continue
        torch.testing.assert_close(fa.functional_call(model, fa.routed(one, zeros, how=how), (x,)), alone, **close)
        last = fa.routed(stack, [1], how=how)
        torch.testing.assert_close(fa.functional_call(model, last, (x[:1],)), rows[1], **close)
        torch.testing.assert_close(fa.functional_call(model, fa.routed(stack, [1, 1], how=how), (both,)),
                                   torch.cat([rows[1], rows[1]]) if case.kind.name not in BY_POSITION
                                   else fa.functional_call(model, adapters[1], (both,)), **close)  # fmt: skip


@pytest.mark.parametrize("case", SLOW, ids=str)
def test_no_rows_at_all(case: Case) -> None:
    model, x = case.model(), case.inputs()[:0]
    stack = fa.stack([case.adapter(model, seed) for seed in range(2)])
    try:
        alone = leaves(fa.unstack(stack)[0])
        expected = fa.functional_call(model, alone, (x,))
        gradients(expected.sum(), [alone])
    except (RuntimeError, ValueError):
        return  # the layer itself cannot
    none = torch.empty(0, dtype=torch.long)
    for many in (fa.grouped(stack), *(fa.routed(stack, none, how=how) for how in HOW if not refuses(case, how))):
        own = leaves(stack)
        assert fa.functional_call(model, many, (x,)).shape == expected.shape
        out = fa.functional_call(model, dataclasses.replace(many, stack=own), (x,))
        g = gradients(out.sum(), [own])[0]
        assert not any(t.any() for t in pytree.tree_leaves(g))


@pytest.mark.parametrize("case", SLOW, ids=str)
def test_rows_that_do_not_fit_are_errors(case: Case) -> None:
    model, x = case.model(), torch.cat(inputs(case, 2))
    stack = fa.stack([case.adapter(model, seed) for seed in range(3)])
    rows, before = len(x), Snapshot(model)
    x = x[: rows - 1] if rows % 3 == 0 else x
    rows = len(x)
    for many in (
        lambda: fa.grouped(stack),
        lambda: fa.routed(stack, torch.zeros(rows + 1, dtype=torch.long)),
        lambda: fa.routed(stack, torch.zeros(rows - 1, dtype=torch.long)),
        lambda: fa.routed(stack, [0] * (rows - 1) + [3]),
        lambda: fa.routed(stack, [0] * (rows - 1) + [-2]),
        lambda: fa.routed(stack, torch.zeros(rows)),
        lambda: fa.routed(stack, torch.zeros(rows, dtype=torch.bool)),
        lambda: fa.routed(stack, torch.tensor(0)),
    ):
        with pytest.raises(fa.AdapterError):
            fa.functional_call(model, many(), (x,))
        before.check()


class Bomb(nn.Module):
    """A layer that fails if it sees a NaN, which is how a test can make the model fail after its sites ran."""

    def forward(self, x: Tensor) -> Tensor:
        if x.isnan().any():
            raise ArithmeticError("boom")
        return x


@pytest.mark.parametrize("case", SLOW_BY_ROW, ids=str)
def test_the_model_is_unchanged(case: Case) -> None:
    model, x = case.model().append(Bomb()), torch.cat(inputs(case, 3))
    stack, index = fa.stack([case.adapter(model, seed) for seed in range(3)]), index_for(case, len(x))
    broken = stack.replace(params=pytree.tree_map(lambda t: t * float("nan"), stack.params))
    misfit = stack.replace(params=pytree.tree_map(lambda t: torch.cat([t, t], 1), stack.params))
    before = Snapshot(model)
    for make in (fa.grouped, lambda s: fa.routed(s, index), lambda s: fa.routed(s, index, how="sort")):
        fa.functional_call(model, make(stack), (x,))
        before.check()
        with pytest.raises(ArithmeticError, match="boom"):
            fa.functional_call(model, make(broken), (x,))
        before.check()
        with pytest.raises(ArithmeticError, match="boom"), fa.applied(model, make(broken)):
            model(x)
        before.check()
        with pytest.raises((fa.AdapterError, RuntimeError, ValueError)):
            fa.functional_call(model, make(misfit), (x,))
        before.check()


# -- composition ------------------------------------------------------------------------------------------


def looks_at_the_weight(case: Case) -> bool:
    """Whether hooks read the weight that they wrap, as DoRA's. Around many adapters there is none: an error."""
    if case not in HOOKED:
        return False
    model, x = case.model(), case.inputs()
    adapter, seen = case.adapter(model), []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("weight", "bias"):
            get = vars(Layer)[name].fget
            patch.setattr(Layer, name, property(lambda layer, get=get: (seen.append(layer), get(layer))[1]))
        fa.functional_call(model, adapter, (x,), weights=1.0)  # hooks, also of a method that folds
    return bool(seen)


@pytest.mark.parametrize("case", SLOW_BY_ROW, ids=str)
def test_grouped_and_single_adapters_nest(case: Case) -> None:
    model, xs = case.model(), inputs(case, 2)
    one, *adapters = (case.adapter(model, seed) for seed in range(3))
    stack, x = fa.stack(adapters), torch.cat(xs)
    index = torch.tensor([0, 1]).repeat_interleave(len(xs[0]))
    for names in (("one", "many"), ("many", "one")):
        loop = [{"one": one, "many": a} for a in adapters]
        expected = torch.cat(
            [fa.functional_call(model, {n: by[n] for n in names}, (x,)) for by, x in zip(loop, xs, strict=True)]
        )
        close = tolerance(expected.dtype, expected.abs().max().item())
        for many in (fa.grouped(stack), fa.routed(stack, index)):
            by = {"one": one, "many": many}
            if names[0] == "many" and looks_at_the_weight(case):
                with pytest.raises(fa.AdapterError, match="needs the weight that it wraps"):
                    fa.functional_call(model, {n: by[n] for n in names}, (x,))
                with pytest.raises(fa.AdapterError, match="needs the weight"), fa.applied(model, many):
                    fa.functional_call(model, one, (x,))
                continue
            out = fa.functional_call(model, {n: by[n] for n in names}, (x,))
            torch.testing.assert_close(out, expected, **close)
            with fa.applied(model, by[names[0]]), fa.applied(model, by[names[1]]):
                torch.testing.assert_close(model(x), expected, **close)
    first, second = adapters
    expected = torch.cat(
        [
            fa.functional_call(model, {"a": a, "b": b}, (x,))
            for a, b, x in zip((first, second), (second, one), xs, strict=True)
        ]
    )
    close = tolerance(expected.dtype, expected.abs().max().item())
    other = fa.stack([second, one])
    if looks_at_the_weight(case):
        return
    for a in (fa.grouped(stack), fa.routed(stack, index)):
        for b in (fa.grouped(other), fa.routed(other, index)):
            torch.testing.assert_close(fa.functional_call(model, {"a": a, "b": b}, (x,)), expected, **close)
            with fa.applied(model, a), fa.applied(model, b):
                torch.testing.assert_close(model(x), expected, **close)


@pytest.mark.parametrize("case", [c for c in SLOW_BY_ROW if c.kind.name not in BY_POSITION], ids=str)
def test_stacks_of_different_sizes_nest(case: Case) -> None:
    if looks_at_the_weight(case):
        return
    model, x = case.model(), torch.cat(inputs(case, 3))[:6]
    three, two = ([case.adapter(model, start + i) for i in range(n)] for start, n in ((0, 3), (3, 2)))
    count = len(x)
    expected = torch.cat(
        [
            fa.functional_call(model, {"a": three[i * 3 // count], "b": two[i * 2 // count]}, (x[i : i + 1],))
            for i in range(count)
        ]
    )
    many = {"a": fa.grouped(fa.stack(three)), "b": fa.grouped(fa.stack(two))}
    out = fa.functional_call(model, many, (x,))
    torch.testing.assert_close(out, expected, **tolerance(out.dtype, expected.abs().max().item()))


@pytest.mark.parametrize("case", SLOW_BY_ROW, ids=str)
def test_weights_interpolate_grouped_and_routed(case: Case) -> None:
    model, xs = case.model(), inputs(case, 2)
    one, *adapters = (case.adapter(model, seed) for seed in range(3))
    stack, x, size = fa.stack(adapters), torch.cat(xs), len(xs[0])
    index = torch.tensor([0, 1]).repeat_interleave(size)
    ws: list[Any] = [0.0, 0.3, torch.tensor(0.3, dtype=case.kind.exact)]
    if not case.kind.is_parameter and case.kind.name not in THROUGH_THE_WEIGHT:
        ws.append(torch.linspace(-1, 2, 2 * size, dtype=case.kind.exact))
    for w in ws:
        parts = w.split(size) if isinstance(w, Tensor) and w.ndim else (w, w)
        expected = torch.cat(
            [
                fa.functional_call(model, {"one": one, "many": a}, (x,), weights={"many": part})
                for a, x, part in zip(adapters, xs, parts, strict=True)
            ]
        )
        close = tolerance(expected.dtype, expected.abs().max().item())
        for many in (fa.grouped(stack), fa.routed(stack, index)):
            out = fa.functional_call(model, {"one": one, "many": many}, (x,), weights={"many": w})
            torch.testing.assert_close(out, expected, **close)
        alone = torch.cat(
            [fa.functional_call(model, a, (x,), weights=part) for a, x, part in zip(adapters, xs, parts, strict=True)]
        )
        out = fa.functional_call(model, fa.grouped(stack), (x,), weights=w)
        torch.testing.assert_close(out, alone, **tolerance(alone.dtype, alone.abs().max().item()))


# -- dropout ----------------------------------------------------------------------------------------------

DROPOUT = [c for c in LAWS if c.kind.name == "linear"]
DROPOUT = [c for c in DROPOUT if c.method.dropout(c.variant.config(target_modules=[c.kind.target]))]
# These draw something else than masks of their inputs, from torch's generator: blocks to drop, noise.
DROPOUT = [c for c in DROPOUT if c.method.name not in ("boft", "pvera")]
assert DROPOUT


@pytest.mark.parametrize("case", DROPOUT, ids=str)
def test_seeded_dropout_is_each_adapters_own(case: Case) -> None:
    """The mask of an adapter depends on its seed and the site: not on its neighbours, nor on its place."""
    model, xs = case.model().train(), inputs(case, 3)
    adapters = [case.adapter(model, seed) for seed in range(3)]

    def call(order: list[int], seeds: list[int]) -> list[Tensor]:
        many = fa.grouped(fa.stack([adapters[i] for i in order]), seeds=seeds)
        out = fa.functional_call(model, many, (torch.cat([xs[i] for i in order]),))
        return [*out.split(len(xs[0]))]

    first = call([0, 1, 2], [5, 6, 7])
    close = tolerance(first[0].dtype, max(t.abs().max().item() for t in first))
    again = call([0, 1, 2], [5, 6, 7])
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    for i, out in zip([2, 0], call([2, 0], [7, 5]), strict=True):
        torch.testing.assert_close(out, first[i], **close)
    for i in range(3):
        torch.testing.assert_close(call([i], [5 + i])[0], first[i], **close)
    drops = not case.kind.name.startswith("embedding")  # an embedding has no input to drop
    other = call([0, 1, 2], [5, 8, 7])
    assert torch.equal(other[0], first[0])
    assert torch.equal(other[2], first[2])
    assert torch.equal(other[1], first[1]) != drops
    plain = fa.functional_call(model.eval(), fa.grouped(fa.stack(adapters), seeds=[5, 6, 7]), (torch.cat(xs),))
    expected = torch.cat([fa.functional_call(model, a, (x,)) for a, x in zip(adapters, xs, strict=True)])
    torch.testing.assert_close(plain, expected, **close)


# -- one graph --------------------------------------------------------------------------------------------


# One kind of each way to be adapted: the graphs of the others are the same.
COMPILED = frozenset({"linear", "embedding", "conv2d", "mha", "experts_linear"})
# Where a method has no form of its own for many adapters, its graph is that of `vmap`, under a law in test_engine.py.
OWN_GRAPH = [c for c in SLOW if c in REFERENCE or c.method.grouped is not None or c.method.masked is not None]


@pytest.mark.parametrize("case", [c for c in OWN_GRAPH if c.kind.name in COMPILED], ids=str)
def test_compile_sees_one_frame(case: Case) -> None:
    """A gradient of grouped, and routed, in one graph, for any adapters of one form, any scalings and any index."""
    model, x = case.model(), torch.cat(inputs(case, 3))

    def f(stack: fa.Adapter, index: Tensor, x: Tensor) -> tuple[Any, ...]:
        def loss(params: Tree) -> tuple[Tensor, Tensor]:
            out = fa.functional_call(model, fa.grouped(stack.replace(params=params)), (x,))
            return out.pow(2).sum(), out

        found = grad(loss, has_aux=True)(stack.params)
        return (
            found if case.kind.name in BY_POSITION else (*found, fa.functional_call(model, fa.routed(stack, index), x))
        )

    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(f, fullgraph=True, backend=counter)
    before, index = Snapshot(model), index_for(case, len(x))
    for seed in range(3):
        stack = fa.stack([case.adapter(model, seed + i) for i in range(3)])
        expected = f(stack, index, x)
        close = tolerance(case.kind.exact, size_of(expected), roundings=64)
        tree_close(compiled(stack, index, x), expected, **close)
        index = index.roll(1)
    assert counter.frame_count == 1
    before.check()


@pytest.mark.parametrize("case", [c for c in REFERENCE if c.kind.name == "linear"], ids=str)
def test_compile_takes_any_index_in_one_graph(case: Case) -> None:
    """A value that was made outside of the compiled function, with and without rows of the bare model."""
    model, x = case.model(), torch.cat(inputs(case, 3))
    stack = fa.stack([case.adapter(model, seed) for seed in range(3)])
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(lambda many, x: fa.functional_call(model, many, (x,)), fullgraph=True, backend=counter)
    for index in ([0, 1, 2, 0, 1, 2], [-1, 0, 0, 2, -1, 1], [2] * 6):
        many = fa.routed(stack, index)
        expected = fa.functional_call(model, many, (x,))
        torch.testing.assert_close(compiled(many, x), expected, **tolerance(x.dtype, expected.abs().max().item()))
    assert counter.frame_count == 1


@pytest.mark.parametrize("case", [c for c in REFERENCE if c.kind.name in ("linear", "conv2d")], ids=str)
def test_compile_takes_the_value_and_its_backward_pass(case: Case) -> None:
    """The value crosses the border of the compiled function, and plain autograd goes through it."""
    model, x = case.model().requires_grad_(False), torch.cat(inputs(case, 3))
    stack, index = fa.stack([case.adapter(model, seed) for seed in range(3)]), index_for(case, len(x))

    def f(many: Any, x: Tensor) -> Tensor:
        return fa.functional_call(model, many, (x,)).pow(2).sum()

    for make in (fa.grouped, lambda s: fa.routed(s, index), lambda s: fa.routed(s, index, how="gather")):
        torch._dynamo.reset()
        counter = CompileCounter()
        compiled = torch.compile(f, fullgraph=True, backend=counter)
        results = []
        for run in (f, compiled):
            own = leaves(stack)
            results.append(gradients(run(make(own), x), [own])[0])
        tree_close(results[1], results[0], **tolerance(case.kind.exact, size_of(results[0]), roundings=64))
        assert counter.frame_count == 1


class Exported(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, many: Any, x: Tensor) -> Tensor:
        return fa.functional_call(self.model, many, (x,))


@pytest.mark.parametrize("case", [c for c in REFERENCE if c.kind.name in COMPILED | {"parameter", "conv1d"}], ids=str)
def test_export_takes_grouped_and_routed_as_inputs(case: Case) -> None:
    model, x = case.model().requires_grad_(False), torch.cat(inputs(case, 3))
    first, second = (fa.stack([case.adapter(model, start + i) for i in range(3)]) for start in (0, 3))
    index = index_for(case, len(x))
    pairs: list[Any] = [
        (fa.grouped(first), fa.grouped(second)),
        (fa.grouped(first, seeds=[1, 2, 3], expand=True), fa.grouped(second, seeds=[1, 2, 3], expand=True)),
    ]
    if case.kind.name not in BY_POSITION:
        pairs.append((fa.routed(first, index), fa.routed(second, index.roll(1))))
    for given, then in pairs:
        before = Snapshot(model)
        program = torch.export.export(Exported(model), (given, x), strict=False)
        before.check()
        expected = fa.functional_call(model, then, (x,))
        out = program.module()(then, x)
        torch.testing.assert_close(out, expected, **tolerance(out.dtype, expected.abs().max().item()))
        if case.kind.name == "linear":
            file = io.BytesIO()
            torch.export.save(program, file)
            file.seek(0)
            again = torch.export.load(file).module()
            torch.testing.assert_close(again(then, x), out, rtol=0, atol=0)


# -- the batched forms ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [c for c in HOOKED if c.method.grouped is not None], ids=str)
def test_the_grouped_form_is_vmap_of_after(case: Case) -> None:
    model, xs = case.model(), inputs(case, 3)
    adapters = [case.adapter(model, seed) for seed in range(3)]
    site, module = describe(model, case.kind.target)
    layer = Layer(site, module, adapters[0].config)
    stack, x = fa.stack(adapters), torch.stack(xs)
    p = {**stack.leaves(SHARED), **stack.leaves(case.kind.target)}
    y = torch.stack([model(x) for x in xs])
    assert case.method.grouped is not None
    out = case.method.grouped(layer, p, x, y)
    if out is NotImplemented:
        assert "lora_B_bias" in p or case.kind.name not in ("linear", "hf_conv1d")
        return
    after: Any = case.method.after
    expected = vmap(lambda p, x, y: after(layer, p, x, y))(p, x, y)
    assert out.dtype == expected.dtype
    torch.testing.assert_close(out, expected, **tolerance(out.dtype, expected.abs().max().item()))


@pytest.mark.parametrize("case", [c for c in HOOKED if c.method.masked is not None and not c.method.couples], ids=str)
def test_the_masked_form_is_after_of_the_chosen_adapter(case: Case) -> None:
    if case.kind.name not in ("linear", "linear_no_bias", "hf_conv1d"):
        return  # rows of features are what it is for
    model, x = case.model(), torch.cat(inputs(case, 3)).flatten(0, -2)
    adapters = [case.adapter(model, seed) for seed in range(3)]
    site, module = describe(model, case.kind.target)
    layer = Layer(site, module, adapters[0].config)
    index = torch.tensor([2, -1, 0, 0, 2, 1]).repeat(len(x))[: len(x)]
    choice = torch.nn.functional.one_hot(index + 1, 4)[:, 1:].to(x.dtype)
    y = model(x)
    assert case.method.masked is not None
    out = case.method.masked(layer, fa.stack(adapters).leaves(case.kind.target), x, y, choice)
    if out is NotImplemented:
        assert "lora_B_bias" in adapters[0].params[case.kind.target]
        return
    after: Any = case.method.after
    rows = [
        after(layer, adapters[i].leaves(case.kind.target), x[row : row + 1], y[row : row + 1])
        if i >= 0
        else y[row : row + 1]
        for row, i in enumerate(index.tolist())
    ]
    expected = torch.cat(rows)
    torch.testing.assert_close(out, expected, **tolerance(out.dtype, expected.abs().max().item()))


# -- values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [c for c in BY_ROW if c.kind.name in ("linear", "experts_linear")], ids=str)
def test_both_are_pytrees_for_torch_and_optree(case: Case) -> None:
    model, x = case.model(), torch.cat(inputs(case, 3))
    stack, index = fa.stack([case.adapter(model, seed) for seed in range(3)]), index_for(case, len(x))
    for many, count in (
        (fa.grouped(stack), 0),
        (fa.grouped(stack, seeds=[1, 2, 3], expand=True), 0),
        (fa.routed(stack, index), 1),
        (fa.routed(stack, index, how="gather"), 1),
    ):
        flat, spec = pytree.tree_flatten(many)
        assert len(flat) == len(pytree.tree_leaves(stack)) + count
        read = pytree.treespec_loads(pytree.treespec_dumps(spec))
        assert read == spec
        with_optree, treespec = optree.tree_flatten(many)  # pyright: ignore
        assert len(with_optree) == len(flat)
        paths = [path for path, _ in pytree.tree_flatten_with_path(many)[0]]
        assert {path[0] for path in paths} == {
            pytree.GetAttrKey(n) for n in (("stack", "index") if count else ("stack",))
        }
        for again in (
            pytree.tree_unflatten(flat, read),
            pytree.tree_map(lambda t: t.clone(), many),
            optree.tree_unflatten(treespec, with_optree),  # pyright: ignore
        ):
            assert type(again) is type(many)
            out = fa.functional_call(model, again, (x,))
            assert torch.equal(out, fa.functional_call(model, many, (x,)))
