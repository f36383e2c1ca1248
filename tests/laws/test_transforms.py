"""The laws of `torch.func`: vmap is a loop, gradients are derivatives, forward mode is the adjoint of reverse mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optree
import pytest
import torch
from cases import FIRST, LAWS, SLOW, Case, stacked, tolerance, tree_close
from oracles import DENSE, dense_weights
from torch import Tensor
from torch.func import grad, jvp, vjp, vmap
from torch.utils import _pytree as pytree

import funcadapt as fa

# torch has no batching rule for its grouped product: under vmap over the inputs it loops, correctly, and says so.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop.* aten..?_grouped_mm:UserWarning")

Tree = dict[str, dict[str, Tensor]]


def objective(case: Case, model: torch.nn.Module, x: Tensor) -> Callable[[fa.Adapter], Tensor]:
    """A scalar with a different slope at every output."""
    slope = case.slope(model, x)
    return lambda adapter: (fa.functional_call(model, adapter, (x,)) * slope).sum()


def no_forward_mode(case: Case) -> bool:
    """torch has no forward mode for its grouped product. A method that acts after it needs none; others do."""
    return case.kind.name == "experts_grouped" and case.method.before is not None


def gradient(f: Callable[[fa.Adapter], Tensor]) -> Callable[[fa.Adapter], Tree]:
    return lambda adapter: grad(lambda params: f(adapter.replace(params=params)))(adapter.params)


@pytest.mark.parametrize("case", LAWS, ids=str)
def test_vmap_equals_a_loop(case: Case) -> None:
    model, x = case.model(), case.inputs()
    adapters = [case.adapter(model, seed) for seed in range(3)]
    out = vmap(lambda a: fa.functional_call(model, a, (x,)))(stacked(adapters))
    expected = torch.stack([fa.functional_call(model, a, (x,)) for a in adapters])
    torch.testing.assert_close(out, expected, **tolerance(out.dtype, expected.abs().max().item()))


@pytest.mark.parametrize("case", LAWS, ids=str)
def test_vmap_over_adapters_and_inputs_equals_a_loop(case: Case) -> None:
    model, x = case.model(), case.inputs()
    adapters = [case.adapter(model, seed) for seed in range(3)]
    xs = torch.stack([x, x.flip(0), x.roll(1, -1)])
    out = vmap(lambda a, x: fa.functional_call(model, a, (x,)))(stacked(adapters), xs)
    expected = torch.stack([fa.functional_call(model, a, (x,)) for a, x in zip(adapters, xs, strict=True)])
    torch.testing.assert_close(out, expected, **tolerance(out.dtype, expected.abs().max().item(), roundings=64))


@pytest.mark.parametrize("case", LAWS, ids=str)
def test_vmap_of_grad_equals_a_loop_of_grads(case: Case) -> None:
    model, x = case.model(), case.inputs()
    adapters = [case.adapter(model, seed) for seed in range(3)]
    one = gradient(objective(case, model, x))
    expected = pytree.tree_map(lambda *g: torch.stack(g), *[one(a) for a in adapters])
    scale = max(g.abs().max().item() for g in pytree.tree_leaves(expected))
    tree_close(vmap(one)(stacked(adapters)), expected, **tolerance(case.kind.exact, scale, roundings=64))


@pytest.mark.parametrize("case", LAWS, ids=str)
def test_autograd_equals_grad(case: Case) -> None:
    model, x = case.model(), case.inputs()
    f, adapter = objective(case, model, x), case.adapter(model)
    expected = gradient(f)(adapter)
    leaves = adapter.replace(params=pytree.tree_map(lambda t: t.clone().requires_grad_(), adapter.params))
    f(leaves).backward()
    scale = max(g.abs().max().item() for g in pytree.tree_leaves(expected))
    assert scale > 0
    found = pytree.tree_map(lambda t: torch.zeros_like(t) if t.grad is None else t.grad, leaves.params)
    tree_close(found, expected, **tolerance(case.kind.exact, scale))


@pytest.mark.parametrize("case", [c for c in LAWS if c.kind.exact == torch.float64], ids=str)
def test_grad_agrees_with_central_differences(case: Case) -> None:
    model, x = case.model(), case.inputs()
    f, adapter = objective(case, model, x), case.adapter(model)
    g = gradient(f)(adapter)
    step, checked = 1e-4, 0
    for path, leaves in adapter.params.items():
        for name, leaf in leaves.items():
            if name in case.method.constant_in_gradient:
                continue  # a constant in the gradient by design: see the oracle below
            direction = torch.randn_like(leaf)

            def moved(by: float) -> Tensor:
                changed = {**leaves, name: leaf + by * direction}
                return f(adapter.replace(params={**adapter.params, path: changed}))

            # fourth order: attention bends too much for a plain central difference at this accuracy
            near, far = moved(step) - moved(-step), moved(2 * step) - moved(-2 * step)
            numeric = (8 * near - far) / (12 * step)
            analytic = (g[path][name] * direction).sum()
            # the roundings of f, divided by the step
            torch.testing.assert_close(analytic, numeric, rtol=1e-7, atol=1e-7)
            checked += 1
    assert checked


@pytest.mark.parametrize("case", [c for c in LAWS if not c.no_dense], ids=str)
def test_grad_agrees_with_the_oracle(case: Case) -> None:
    if case.method.name not in DENSE:
        return  # test_dense.py wants an oracle where one is needed
    model, x = case.model(), case.inputs()
    adapter = case.adapter(model)
    slope = case.slope(model, x)
    g = grad(lambda p: (fa.functional_call(model, adapter.replace(params=p), (x,)) * slope).sum())(adapter.params)

    def naive(params: Tree) -> Tensor:
        weights = dense_weights(model, adapter.replace(params=params), case.method.name)
        return (torch.func.functional_call(model, weights, (x,)) * slope).sum()

    expected = grad(naive)(adapter.params)
    scale = max(t.abs().max().item() for t in pytree.tree_leaves(expected))
    tree_close(g, expected, **tolerance(case.kind.exact, scale, roundings=64))


@pytest.mark.parametrize("case", LAWS, ids=str)
def test_forward_mode_is_the_adjoint_of_reverse_mode(case: Case) -> None:
    model, x = case.model(), case.inputs()
    adapter = case.adapter(model)

    def f(params: Tree) -> Tensor:
        return fa.functional_call(model, adapter.replace(params=params), (x,))

    tangent = pytree.tree_map(torch.randn_like, adapter.params)
    if no_forward_mode(case):
        with pytest.raises(NotImplementedError, match="_grouped_mm"):
            jvp(f, (adapter.params,), (tangent,))
        return
    with fa.math_attention():
        out, forward = jvp(f, (adapter.params,), (tangent,))
        again, pull = vjp(f, adapter.params)
        cotangent = case.slope(model, x)
        back = pull(cotangent)[0]
    torch.testing.assert_close(out, again, **tolerance(out.dtype, out.abs().max().item()))
    left = (cotangent * forward).sum()
    right = sum((a * b).sum() for a, b in zip(pytree.tree_leaves(tangent), pytree.tree_leaves(back), strict=True))
    assert left.abs() > 0
    torch.testing.assert_close(left, right, **tolerance(out.dtype, out.numel() * out.abs().max().item()))


@pytest.mark.parametrize("case", FIRST, ids=str)
def test_the_hessian_is_symmetric(case: Case) -> None:
    """Second order: forward over reverse and reverse over reverse agree."""
    model, x = case.model(), case.inputs()
    adapter = case.adapter(model)
    torch.manual_seed(0)
    slope, v = case.slope(model, x), pytree.tree_map(torch.randn_like, adapter.params)

    def f(params: Tree) -> Tensor:
        return (fa.functional_call(model, adapter.replace(params=params), (x,)) * slope).pow(2).sum()

    def dot(a: Tree, b: Tree) -> Tensor:
        return sum((s * t).sum() for s, t in zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True))  # pyright: ignore

    reverse = grad(lambda p: dot(grad(f)(p), v))(adapter.params)
    if case.method.constant_in_gradient:
        # A gradient that leaves a term out is no gradient field: only its derivative has to exist.
        assert all(t.isfinite().all() for t in pytree.tree_leaves(reverse))
        return
    if no_forward_mode(case):
        return  # its error is in the law above
    forward = jvp(grad(f), (adapter.params,), (v,))[1]
    # every number is a sum over all of v, so its error is in units of the norm
    scale = torch.cat([t.flatten() for t in pytree.tree_leaves(forward)]).norm().item()
    tree_close(reverse, forward, **tolerance(case.kind.exact, scale, roundings=64))


@pytest.mark.parametrize("case", [c for c in FIRST if not c.no_dense], ids=str)
def test_merge_is_differentiable(case: Case) -> None:
    model, x = case.model(), case.inputs()
    adapter = case.adapter(model)
    slope = case.slope(model, x)

    def through_merge(params: Tree) -> Tensor:
        weights = fa.merge(model, adapter.replace(params=params))
        return (torch.func.functional_call(model, weights, (x,)) * slope).sum()

    g = grad(lambda p: (fa.functional_call(model, adapter.replace(params=p), (x,)) * slope).sum())(adapter.params)
    merged = grad(through_merge)(adapter.params)
    scale = max(t.abs().max().item() for t in pytree.tree_leaves(g))
    tree_close(merged, g, **tolerance(case.kind.exact, scale, roundings=64))


@pytest.mark.parametrize("case", SLOW, ids=str)
def test_an_adapter_is_a_pytree_for_torch_and_optree(case: Case) -> None:
    adapter = case.adapter(case.model())
    expected = [
        (f".{tree}['{path}']['{name}']", leaf)
        for tree in ("params", "buffers")
        for path, leaves in getattr(adapter, tree).items()
        for name, leaf in leaves.items()
    ]
    with_keys, spec = pytree.tree_flatten_with_path(adapter)
    assert [(pytree.keystr(path), id(leaf)) for path, leaf in with_keys] == [(key, id(leaf)) for key, leaf in expected]
    again: Any = pytree.tree_unflatten([leaf for _, leaf in with_keys], spec)
    assert again.config == adapter.config
    assert [id(t) for t in again.tensors()] == [id(t) for t in adapter.tensors()]
    paths, leaves, treespec = optree.tree_flatten_with_path(adapter)  # pyright: ignore
    assert {(p[0], *p[1:]): id(leaf) for p, leaf in zip(paths, leaves, strict=True)} == {
        (tree, path, name): id(leaf)
        for tree in ("params", "buffers")
        for path, sub in getattr(adapter, tree).items()
        for name, leaf in sub.items()
    }
    rebuilt: Any = optree.tree_unflatten(treespec, leaves)
    assert rebuilt.config == adapter.config
    tree_close(dict(rebuilt.params), dict(adapter.params), rtol=0, atol=0)


@pytest.mark.parametrize("case", SLOW, ids=str)
def test_to_converts_every_floating_leaf(case: Case) -> None:
    adapter = case.adapter(case.model())
    low = adapter.to(torch.bfloat16)
    assert {t.dtype for t in low.tensors() if t.is_floating_point()} == {torch.bfloat16}
    for a, b in zip(adapter.tensors(), low.tensors(), strict=True):
        assert a.is_floating_point() or a is b
    assert {t.device.type for t in adapter.to(device="meta").tensors()} == {"meta"}
    assert all(a is b for a, b in zip(adapter.to(case.kind.exact).tensors(), adapter.tensors(), strict=True))
    with pytest.raises(TypeError, match="floating"):
        adapter.to(torch.int8)
