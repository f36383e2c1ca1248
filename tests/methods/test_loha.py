"""LoHa: PEFT's wrong gradients (B2), dropout, and the two ways to compute the same."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import funcadapt as fa
from funcadapt.methods.loha import as_lora, delta_weight


def random(model: nn.Module, config: fa.AdapterConfig, std: float = 1.0) -> fa.Adapter:
    adapter = fa.init(model, config)
    return adapter.replace(params=pytree.tree_map(lambda t: torch.randn_like(t) * std, adapter.params))


def test_gradients_of_the_effective_convolution_are_right_where_pefts_are_wrong() -> None:
    base, x = nn.Conv2d(4, 6, 3).double(), torch.randn(2, 4, 5, 5).double()
    model = nn.Sequential(base)
    adapter = random(model, fa.LoHaConfig(r=2, use_effective_conv2d=True, target_modules=["0"]))
    names = ["hada_w1_a", "hada_w1_b", "hada_t1", "hada_w2_a", "hada_w2_b", "hada_t2"]
    leaves = [adapter.params["0"][name] for name in names]

    def ours(*leaves: Tensor) -> Tensor:
        p = {"0": dict(zip(names, leaves, strict=True))}
        return fa.functional_call(model, adapter.replace(params=p), (x,))

    assert torch.autograd.gradcheck(ours, [leaf.clone().requires_grad_() for leaf in leaves])

    # PEFT: the same output, and other gradients
    config = peft.LoHaConfig(r=2, use_effective_conv2d=True, target_modules=["0"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(nn.Sequential(nn.Conv2d(4, 6, 3).double()), config).double()
    layer = wrapped.base_model.model[0]
    layer.base_layer.load_state_dict(base.state_dict())
    for name, leaf in zip(names, leaves, strict=True):
        getattr(layer, name)["default"].data = leaf.clone()
    out = wrapped(x)
    torch.testing.assert_close(out, ours(*leaves))
    out.pow(2).sum().backward()
    theirs = [getattr(layer, name)["default"].grad for name in names]
    moved = [leaf.clone().requires_grad_() for leaf in leaves]
    right = torch.autograd.grad(ours(*moved).pow(2).sum(), moved)
    wrong = {name for name, a, b in zip(names, theirs, right, strict=True) if not torch.allclose(a, b)}
    assert wrong == {"hada_w1_a", "hada_w2_a"}


@pytest.mark.parametrize("layer", [nn.Linear(40, 50), nn.Conv2d(16, 50, 3, padding=1), nn.Embedding(60, 50)], ids=str)
def test_the_factored_form_is_the_dense_one(layer: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(layer).double()
    x = {"Linear": torch.randn(2, 3, 40), "Conv2d": torch.randn(2, 16, 5, 5)}.get(type(layer).__name__)
    x = torch.randint(60, (2, 3)) if x is None else x.double()
    adapter = random(model, fa.LoHaConfig(r=3, alpha=2, target_modules=["0"]))
    expected = torch.func.functional_call(model, fa.merge(model, adapter), (x,))
    monkeypatch.setattr("funcadapt.methods.loha.delta_weight", lambda *_: pytest.fail("built the dense form"))
    torch.testing.assert_close(fa.functional_call(model, adapter, (x,)), expected)


def test_it_is_a_lora_of_rank_r_squared() -> None:
    model = nn.Sequential(nn.Linear(5, 7))
    adapter, (site,) = (
        random(model, config := fa.LoHaConfig(r=2, alpha=2, target_modules=["0"])),
        fa.sites(model, config),
    )
    same = as_lora(site, adapter.leaves("0"))
    torch.testing.assert_close(same["lora_B"] @ same["lora_A"], delta_weight(site, adapter.leaves("0")))
    assert same["lora_A"].shape == (4, 5)


def test_dropout_in_training() -> None:
    model, x = nn.Sequential(nn.Linear(4, 50)).double().train(), torch.randn(3, 4).double()

    def delta(**dropout: float) -> Tensor:
        adapter = random(model, fa.LoHaConfig(target_modules=["0"], r=2, **dropout))
        whole = fa.functional_call(model.eval(), adapter, (x,)) - model(x)
        return (fa.functional_call(model.train(), adapter, (x,)) - model(x)) / whole

    ratio = delta(rank_dropout=0.3)
    kept = (ratio.abs() > 1e-6).double()
    assert 0.4 < kept.mean() < 0.95
    torch.testing.assert_close(ratio, kept / kept.mean())  # the same outputs for all inputs
    torch.testing.assert_close(kept, kept[:1].expand(3, -1))
    outcomes = [delta(module_dropout=0.5).mean().item() for _ in range(20)]
    assert 0 < sum(value > 0.5 for value in outcomes) < 20
    assert all(min(abs(value), abs(value - 1)) < 1e-6 for value in outcomes)
    assert torch.equal(delta(module_dropout=1.0), torch.zeros_like(x[:, :1].expand(3, 50)))


def test_if_every_output_is_dropped_there_is_no_nan() -> None:
    model, x = nn.Sequential(nn.Linear(4, 1)).train(), torch.randn(3, 4)
    adapter = random(model, fa.LoHaConfig(target_modules=["0"], r=2, rank_dropout=0.9))
    outs = [fa.functional_call(model, adapter, (x,)) for _ in range(30)]
    assert sum(torch.equal(out, model(x)) for out in outs) > 10
    assert all(out.isfinite().all() for out in outs)


def test_dropout_has_no_dense_form() -> None:
    model = nn.Sequential(nn.MultiheadAttention(8, 2, batch_first=True)).train()
    adapter = random(model, fa.LoHaConfig(target_modules=["0"], r=2, rank_dropout=0.3))
    with pytest.raises(fa.AdapterError, match="dropout"):
        fa.functional_call(model[0], fa.Adapter({}, {}, adapter.config).replace(
            params={p.removeprefix("0."): v for p, v in adapter.params.items()},
            buffers={p.removeprefix("0."): v for p, v in adapter.buffers.items()},
        ), (torch.randn(1, 3, 8),) * 3)  # fmt: skip


def test_adapters_with_other_rates_do_not_stack() -> None:
    model = nn.Sequential(nn.Linear(4, 6))
    a, b = (fa.init(model, fa.LoHaConfig(target_modules=["0"], rank_dropout=rate)) for rate in (0.1, 0.2))
    with pytest.raises(fa.AdapterError, match="rank_dropout"):
        fa.stack([a, b])
    fa.stack([a, fa.init(model, fa.LoHaConfig(target_modules=["0"], rank_dropout=0.1, r=2, alpha=1))])


@pytest.mark.parametrize(
    "fields",
    [{"r": 0}, {"rank_pattern": {"a": 0}}, {"alpha": float("inf")}, {"rank_dropout": 1.0}, {"module_dropout": -0.1},
     {"layers_pattern": "h"}],
    ids=str,
)  # fmt: skip
def test_values_that_make_no_config(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"r|alpha|dropout|layers"):
        fa.LoHaConfig(**fields)  # pyright: ignore


@pytest.mark.parametrize("change", [
    lambda p: {k: v for k, v in p.items() if k != "hada_w2_b"},
    lambda p: {**p, "hada_t1": torch.zeros(2, 2, 3, 3)},
    lambda p: {**p, "hada_w2_a": torch.zeros(5, 2)},
    lambda p: {k: torch.cat([v, v], -1) for k, v in p.items()},
    lambda p: {**p, "hada_w1_b": torch.zeros(3, 4)},
])  # fmt: skip
def test_leaves_that_do_not_fit_the_config_are_refused(change: object, tmp_path: object) -> None:
    model = nn.Sequential(nn.Linear(4, 6))
    adapter = fa.init(model, fa.LoHaConfig(target_modules=["0"], r=2))
    fa.save(adapter.replace(params={"0": change(adapter.params["0"])}), tmp_path)  # pyright: ignore
    with pytest.raises(fa.AdapterFileError, match="0"):
        fa.load(tmp_path)  # pyright: ignore
