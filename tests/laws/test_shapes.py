"""The laws of shapes: no row, rows of a number that a compiler does not know, no values, leaves of another dtype."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cases import FIRST, LAWS, SLOW, Case, Kind, tolerance
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils import _pytree as pytree

import funcadapt as fa
from funcadapt.view import adapter_of
from funcadapt.view.inject import inject
from funcadapt.view.loading import load_adapter_state_dict
from funcadapt.view.state_dict import adapter_state_dict

Tree = dict[str, dict[str, Tensor]]
LINEAR = [case for case in LAWS if case.kind.name == "linear"]


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("case", [c for c in SLOW if c.kind.exact == torch.float64], ids=str)
def test_leaves_of_another_dtype_than_the_layer(case: Case, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """The output keeps the layer's, and the numbers are those of float64 up to the roundings of 16 bits."""
    (dtype, leaves), wide = dtypes, torch.float64
    model, x = case.model(dtype), case.inputs(dtype)
    adapter = case.adapter(model).to(leaves)
    high, x_high = case.model().to(dtype).to(wide), x.to(wide) if x.is_floating_point() else x
    expected = fa.functional_call(high, adapter.to(wide), (x_high,))
    allowed = tolerance(torch.bfloat16, expected.abs().max().item(), roundings=4)
    out = fa.functional_call(model, adapter, (x,))
    assert out.dtype == dtype
    torch.testing.assert_close(out.to(wide), expected, **allowed)
    if not case.no_dense:
        merged = fa.merge(model, adapter)
        assert {t.dtype for t in merged.values()} == {dtype}
        torch.testing.assert_close(torch.func.functional_call(model, merged, (x,)).to(wide), expected, **allowed)


@pytest.mark.parametrize("case", LINEAR, ids=str)
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4)], ids=str)
def test_no_row_gives_no_row(case: Case, shape: tuple[int, ...]) -> None:
    model = case.model()
    adapter, x = case.adapter(model), torch.zeros(shape, dtype=case.kind.exact)
    out = fa.functional_call(model, adapter, (x,))
    assert out.shape == (*shape[:-1], 6)
    params = pytree.tree_map(lambda t: t.clone().requires_grad_(), adapter.params)
    fa.functional_call(model, adapter.replace(params=params), (x.requires_grad_(),)).sum().backward()
    grads = [t.grad for t in pytree.tree_leaves(params) if t.grad is not None]
    assert all(not g.any() for g in grads)


def forms(adapter: fa.Adapter) -> object:
    return pytree.tree_map(lambda t: (t.shape, t.dtype), (adapter.params, adapter.buffers))


@pytest.mark.parametrize("case", FIRST, ids=str)
def test_a_model_without_numbers(case: Case) -> None:
    """The leaves of a model on the meta device have the forms of those of a real one, and a call has the output's."""
    if case.kind.name == "experts_grouped":
        return  # torch's own product of groups wants bfloat16 there
    model, x = case.model(), case.inputs()
    adapter, expected = case.new(model), fa.functional_call(model, case.new(model), (x,))
    bare = case.model().to("meta")
    try:
        abstract = case.new(bare)
    except fa.SiteError as error:
        assert "values" in str(error)  # noqa: PT017
        abstract = adapter.to(device="meta")
    assert forms(abstract) == forms(adapter)
    assert {leaf.device.type for p in abstract.params.values() for leaf in p.values()} == {"meta"}
    out = fa.functional_call(bare, abstract.to(device="meta"), (x.to("meta"),))
    assert out.device.type == "meta"
    assert (out.shape, out.dtype) == (expected.shape, expected.dtype)


class Called(nn.Module):
    """A module whose inputs are the leaves of an adapter, and its own input."""

    def __init__(self, model: nn.Module, adapter: fa.Adapter) -> None:
        super().__init__()
        self.model, self.adapter = model, adapter

    def forward(self, params: Tree, buffers: Tree, x: Tensor) -> Tensor:
        return fa.functional_call(self.model, self.adapter.replace(params=params, buffers=buffers), (x,))


WIDE = Kind("linear", lambda: nn.Linear(32, 48), "0", lambda: torch.randn(2, 37, 32))
"""A layer at which few tokens and many have forms of their own. 37 is no other size: torch takes equal ones for one."""

COMPILED = [dataclasses.replace(case, kind=WIDE) for case in SLOW if case.kind.name == "linear"]
LENGTHS = (37, 2, 500)


def rows(case: Case, n: int) -> Tensor:
    return torch.randn(2, n, 32, generator=torch.Generator().manual_seed(n), dtype=case.kind.exact)


@pytest.mark.parametrize("case", COMPILED, ids=str)
def test_export_with_an_unknown_number_of_tokens(case: Case) -> None:
    model = case.model().requires_grad_(False)
    first, second = case.adapter(model, 0), case.adapter(model, 1)
    given = (first.params, first.buffers, rows(case, LENGTHS[0]))
    shapes = (*pytree.tree_map(lambda t: None, given[:2]), {1: torch.export.Dim("t", min=2, max=512)})
    program = torch.export.export(Called(model, first), given, dynamic_shapes=shapes, strict=False)
    for n in LENGTHS:
        expected = fa.functional_call(model, second, (rows(case, n),))
        out = program.module()(second.params, second.buffers, rows(case, n))
        torch.testing.assert_close(out, expected, **tolerance(out.dtype, expected.abs().max().item(), roundings=64))


# Where a form is chosen by the number of tokens; with a known number every method is compiled in test_engine.py.
CHOOSING = [case for case in COMPILED if case.method.folds is not None or case.method.name in ("lora", "oft", "miss")]


@pytest.mark.parametrize("case", CHOOSING, ids=str)
def test_compile_with_an_unknown_number_of_tokens_is_one_frame(case: Case) -> None:
    model = case.model()
    adapter = case.adapter(model)
    torch._dynamo.reset()
    counter = CompileCounter()
    call = lambda a, x: fa.functional_call(model, a, (x,))  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, backend=counter, dynamic=True)
    for n in LENGTHS:
        expected = call(adapter, rows(case, n))
        out = compiled(adapter, rows(case, n))
        torch.testing.assert_close(out, expected, **tolerance(out.dtype, expected.abs().max().item(), roundings=64))
    assert counter.frame_count == 1


@pytest.mark.parametrize("case", LINEAR, ids=str)
def test_an_injected_adapter_that_gets_its_numbers_later(case: Case) -> None:
    """It is made on the meta device, with the values of the weights at hand; then nothing of it is left there."""
    config, real, later = case.variant.config(target_modules=["0"]), case.model(), case.model()
    inject(real, config)
    inject(later, config, low_cpu_mem_usage=True)
    assert any(parameter.is_meta for parameter in later.parameters())
    load_adapter_state_dict(later, adapter_state_dict(real, "default"), "default", low_cpu_mem_usage=True)
    assert not any(tensor.is_meta for tensor in (*later.parameters(), *later.buffers()))
    assert forms(adapter_of(later, "default")) == forms(adapter_of(real, "default"))
