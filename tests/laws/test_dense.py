"""The first laws: identity at init, and `after . base . before` equals the dense form."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, FIRST, LAWS, REFUSED, UNUSABLE, VARIANTS, Case, tolerance, tree_close
from oracles import DENSE, dense_weights

import funcadapt as fa
from funcadapt.method import methods


def test_every_registered_method_is_under_the_laws() -> None:
    assert {m.name for m in methods()} <= set(VARIANTS), "add the new method to tests/cases.py"


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_what_a_method_cannot_adapt_is_refused_at_init(case: Case) -> None:
    with pytest.raises(fa.SiteError, match=r"0"):
        case.new(case.model())


@pytest.mark.parametrize("case", UNUSABLE, ids=str)
def test_what_has_no_form_at_all_is_refused_by_the_call(case: Case) -> None:
    model = case.model()
    with pytest.raises(fa.SiteError, match="0"):
        fa.functional_call(model, case.adapter(model), (case.inputs(),))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [c for c in CASES if c.variant.identity], ids=str)
def test_a_new_adapter_changes_nothing(case: Case, dtype: torch.dtype) -> None:
    dtype = min(dtype, case.kind.exact, key=lambda d: -torch.finfo(d).eps)
    model, x = case.model(dtype), case.inputs(dtype)
    expected = model(x)
    out = fa.functional_call(model, case.new(model), (x,))
    scale = expected.abs().max().item()
    # DoRA divides a norm by itself, so the identity holds up to roundings, not bit for bit
    torch.testing.assert_close(out, expected, **tolerance(dtype, scale, roundings=8))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_adapter_changes_the_output(case: Case) -> None:
    # Without this, a method that did nothing would pass every other law.
    model, x = case.model(), case.inputs()
    assert (fa.functional_call(model, case.adapter(model), (x,)) - model(x)).abs().max() > 0.05


@pytest.mark.parametrize("case", CASES, ids=str)
def test_merge_equals_apply(case: Case) -> None:
    model, x = case.model(), case.inputs()
    adapter = case.adapter(model)
    if case.no_dense:
        with pytest.raises(fa.SiteError, match="0"):
            fa.merge(model, adapter)
        return
    out = fa.functional_call(model, adapter, (x,))
    merged = torch.func.functional_call(model, fa.merge(model, adapter), (x,))
    torch.testing.assert_close(out, merged, **tolerance(out.dtype, out.abs().max().item()))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_dense_form_is_the_one_of_the_paper(case: Case) -> None:
    model, x = case.model(), case.inputs()
    adapter = case.adapter(model)
    if case.no_dense:
        return  # test_merge_equals_apply wants the error
    if case.method.name not in DENSE:
        assert not case.method.constant_in_gradient, "a method with an unusual gradient needs an oracle"
        return
    weights = dense_weights(model, adapter, case.method.name)
    merged = fa.merge(model, adapter)
    assert sorted(weights) == sorted(merged)
    tree_close(dict(sorted(merged.items())), dict(sorted(weights.items())), **tolerance(case.kind.exact, 4))
    out = fa.functional_call(model, adapter, (x,))
    expected = torch.func.functional_call(model, weights, (x,))
    torch.testing.assert_close(out, expected, **tolerance(out.dtype, out.abs().max().item()))


@pytest.mark.parametrize("case", LAWS, ids=str)
def test_bfloat16_is_float64_up_to_roundings(case: Case) -> None:
    low, high = torch.bfloat16, case.kind.exact
    model, x = case.model(low), case.inputs(low)
    adapter = case.adapter(model)
    wide = case.model().to(low).to(high)  # the same numbers
    x_wide = x.to(high) if x.is_floating_point() else x
    expected = fa.functional_call(wide, adapter.to(high), (x_wide,))
    # Each output is a sum of products, so its error is in units of the largest term, not of the sum.
    allowed = tolerance(low, expected.abs().max().item(), roundings=4)
    out = fa.functional_call(model, adapter, (x,))
    assert out.dtype == low
    torch.testing.assert_close(out.to(high), expected, **allowed)
    if not case.no_dense:
        merged = fa.merge(model, adapter)
        assert {t.dtype for t in merged.values()} == {low}
        out = torch.func.functional_call(model, merged, (x,))
        torch.testing.assert_close(out.to(high), expected, **allowed)


@pytest.mark.parametrize("case", [c for c in CASES if c.kind.name.startswith("experts")], ids=str)
def test_products_with_experts_build_no_dense_copy(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    if case.kind.name == "experts_grouped" and case.method.before is not None:
        return  # rows of different experts go into one product, so a hook on its input takes the dense form
    monkeypatch.setattr("funcadapt.factored.dense_levels", lambda *args: pytest.fail("built the dense form"))
    model = case.model()
    fa.functional_call(model, case.adapter(model), (case.inputs(),))


@pytest.mark.parametrize("w", [0.0, 0.3, 1.0, torch.tensor(0.3, dtype=torch.float64)], ids=["0", "0.3", "1", "tensor"])
@pytest.mark.parametrize("case", FIRST, ids=str)
def test_a_weight_interpolates_the_layer_and_its_dense_form(case: Case, w: float | torch.Tensor) -> None:
    model, x = case.model(), case.inputs()
    adapter = case.adapter(model)
    out = fa.functional_call(model, adapter, (x,), weights=w)
    if w == 0.0:
        torch.testing.assert_close(out, model(x), **tolerance(out.dtype, out.abs().max().item(), roundings=4))
    elif w == 1.0:
        whole = fa.functional_call(model, adapter, (x,))
        torch.testing.assert_close(out, whole, **tolerance(out.dtype, out.abs().max().item()))
    if not case.no_dense:
        merged = torch.func.functional_call(model, fa.merge(model, adapter, weights=w), (x,))
        torch.testing.assert_close(out, merged, **tolerance(out.dtype, out.abs().max().item()))


@pytest.mark.parametrize("case", FIRST, ids=str)
def test_two_adapters_nest_like_their_dense_forms(case: Case) -> None:
    model, x = case.model(), case.inputs()
    both = {"inner": case.adapter(model, 0), "outer": case.adapter(model, 1)}
    out = fa.functional_call(model, both, (x,))
    if case.no_dense:
        inner = fa.functional_call(model, both["inner"], (x,)) - model(x)
        outer = fa.functional_call(model, both["outer"], (x,)) - model(x)
        # What has no dense form is additive.
        torch.testing.assert_close(out, model(x) + inner + outer, **tolerance(out.dtype, out.abs().max().item()))
        return
    first = fa.merge(model, both["inner"])
    inside = case.model()
    inside.load_state_dict({**model.state_dict(), **first})
    nested = torch.func.functional_call(inside, fa.merge(inside, both["outer"]), (x,))
    torch.testing.assert_close(out, nested, **tolerance(out.dtype, out.abs().max().item()))
    merged = torch.func.functional_call(model, fa.merge(model, both), (x,))
    torch.testing.assert_close(out, merged, **tolerance(out.dtype, out.abs().max().item()))
    with fa.applied(model, both["inner"]), fa.applied(model, both["outer"]):
        torch.testing.assert_close(model(x), out, **tolerance(out.dtype, out.abs().max().item()))
