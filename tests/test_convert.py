"""`fa.convert` and `fa.extract`: any adapter, and any fine-tuning, as a LoRA."""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES, FIRST, REFERENCE, SPECS, Case, tolerance
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import Snapshot
from peft_tools import logits, peft_load, tiny, tokens
from torch import Tensor, nn

import funcadapt as fa
from funcadapt.approximation import rank_for
from funcadapt.method import Fresh, unregister
from funcadapt.sites import describe

SOME = ("linear", "conv2d", "embedding")
# the reference methods on every kind, the others on some
TABLE = [c for c in CASES if SPECS[c.method.name].reference or (c in FIRST and c.kind.name in SOME)]


class Bits:
    """The tensors of an adapter, and that they stay."""

    def __init__(self, adapter: fa.Adapter) -> None:
        self.adapter, self.kept = adapter, [t.clone() for t in adapter.tensors()]
        self.config = adapter.config

    def check(self) -> None:
        assert self.adapter.config is self.config
        assert all(torch.equal(a, b) for a, b in zip(self.adapter.tensors(), self.kept, strict=True))


def changes_bias(case: Case, model: nn.Module, adapter: fa.Adapter) -> bool:
    if case.no_dense:  # it may be the bias that has none
        return case.kind.name not in ("embedding", "embedding_padding")
    return any(name.endswith("bias") for name in fa.merge(model, adapter, tied="untie"))


def delta(model: nn.Module, adapter: fa.Adapter, path: str) -> np.ndarray:
    """What an adapter changes, as matrices (blocks, out, columns), by merging."""
    site, module = describe(model, path)
    change = fa.merge(model, adapter)[site.weight_name] - getattr(module, site.parameter)
    change = change.transpose(-2, -1) if site.transposed else change
    change = change if site.stack else change.reshape(site.groups, site.out_features // site.groups, -1)
    return change.detach().double().numpy()


def best(matrix: np.ndarray, rank: int) -> np.ndarray:
    """The best approximation of a rank, term by term."""
    out = np.zeros_like(matrix)
    for block in range(matrix.shape[0]):
        u, s, vh = np.linalg.svd(matrix[block])
        for i in range(min(rank, len(s))):
            out[block] += s[i] * np.outer(u[:, i], vh[i])
    return out


# -- every method on every kind ---------------------------------------------------------------------------


@pytest.mark.parametrize("case", TABLE, ids=str)
def test_with_enough_rank_it_is_exact_and_nothing_changes(case: Case) -> None:
    model, x = case.model(), case.inputs()
    adapter = case.adapter(model)
    before, bits = Snapshot(model), Bits(adapter)
    config = fa.LoraConfig(r=8, lora_bias=changes_bias(case, model, adapter))
    try:
        made = fa.convert(model, adapter, config)
        whole = fa.convert(model, adapter, config, energy=1.0)
    except fa.SiteError:
        assert case.no_dense or case.kind.name == "mha_no_bias"  # there LoRA can have no bias
        return
    finally:
        before.check()
        bits.check()
    expected = fa.functional_call(model, adapter, (x,))
    allowed = tolerance(expected.dtype, expected.abs().max().item(), roundings=64)
    for lora in (made, whole):
        assert type(lora.config) is fa.LoraConfig
        assert fa.method_of(lora.config).name == "lora"
        out = fa.functional_call(model, lora, (x,))
        torch.testing.assert_close(out, expected, **allowed)
        # the config says what the leaves are, and selects their sites
        new = fa.init(model, lora.config)
        assert {p: {n: t.shape for n, t in v.items()} for p, v in new.params.items()} == {
            p: {n: t.shape for n, t in v.items()} for p, v in lora.params.items()
        }
        assert all(torch.equal(new.buffers[p]["scaling"], lora.buffers[p]["scaling"]) for p in lora.params)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("case", [c for c in REFERENCE if not c.no_dense], ids=str)
def test_it_is_the_best_approximation_of_its_rank(case: Case, rank: int) -> None:
    model = case.model()
    adapter = case.adapter(model)
    config = fa.LoraConfig(r=rank * (2 if case.kind.name == "conv2d_grouped" else 1), lora_bias=True)
    if case.kind.name in ("embedding", "embedding_padding", "mha_no_bias"):
        config = dataclasses.replace(config, lora_bias=False)
    made = fa.convert(model, adapter, config)
    for path in adapter.params:
        if case.kind.name == "conv2d_grouped":  # a LoRA has no dense form there
            site, p = describe(model, path)[0], made.leaves(path)
            a, b = p["lora_A"], p["lora_B"]
            found = np.zeros((2, 3, 4 // 2 * 9))
            for g in range(2):
                rows, columns = slice(3 * g, 3 * g + 3), slice(2 * g, 2 * g + 2)
                left = b[rows].flatten(1) * p["scaling"]
                one = a[rank * g : rank * (g + 1)]
                found[g] = (left @ one[:, columns].flatten(1)).detach().numpy()
                other = torch.ones(site.in_features, dtype=torch.bool)
                other[columns] = False
                assert not one[:, other].any()
        else:
            plain = fa.Adapter({path: dict(made.params[path])}, {path: made.buffers[path]}, made.config)
            plain.params[path].pop("lora_B_bias", None)  # pyright: ignore
            found = delta(model, plain, path)
        expected = best(delta(model, adapter, path), rank)
        np.testing.assert_allclose(found, expected, atol=64 * torch.finfo(case.kind.exact).eps * np.abs(expected).max())


def test_bfloat16_is_decomposed_in_float32() -> None:
    model = nn.Sequential(nn.Linear(16, 12, bias=False)).to(torch.bfloat16)
    adapter = fa.init(model, fa.IA3Config(target_modules=["0"], feedforward_modules=[], init_ia3_weights=False))
    made = fa.convert(model, adapter, fa.LoraConfig(r=12))
    assert {t.dtype for t in made.tensors()} == {torch.bfloat16}
    expected = model[0].weight.double() * (adapter.params["0"]["ia3_l"].double() - 1)
    p = {name: leaf.double() for name, leaf in made.leaves("0").items()}
    found = p["scaling"] * p["lora_B"] @ p["lora_A"]
    assert (found - expected).norm() < 2 * torch.finfo(torch.bfloat16).eps * expected.norm()


# -- ranks ------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 10), min_size=1, max_size=6), st.floats(0.01, 1.0))
@settings(max_examples=60, deadline=None)
def test_rank_for_is_the_smallest_that_holds_the_energy(values: list[float], energy: float) -> None:
    s = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    rank, powers = rank_for(s[None], energy), [v * v for v in s.tolist()]
    assert (rank == 0) == (sum(powers) == 0)
    if rank:
        assert sum(powers[:rank]) >= energy * sum(powers) * (1 - 1e-12)
        assert sum(powers[: rank - 1]) < energy * sum(powers) * (1 + 1e-12)


def two_layers(r: int = 2, seed: int = 0, **fields: Any) -> tuple[nn.Module, fa.Adapter]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(10, 8), nn.Linear(8, 9)).double()
    config = fa.LoraConfig(r=r, target_modules=["0", "1"], init_lora_weights=False, **fields)
    return model, fa.init(model, config, seed=seed)


@pytest.mark.parametrize("energy", [0.3, 0.6, 0.9, 0.99, 0.9999, 1.0])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_energies(method: str, energy: float) -> None:
    model, adapter = two_layers(5, use_dora=method == "dora")
    made = fa.convert(model, adapter, fa.LoraConfig(r=3, lora_alpha=3), energy=energy)
    for path in ("0", "1"):
        matrix = delta(model, adapter, path)
        powers = np.linalg.svd(matrix[0], compute_uv=False) ** 2
        r = made.config.rank(made.leaves(path))
        assert r == next(k for k in range(1, 10) if powers[:k].sum() >= energy * powers.sum() * (1 - 1e-9))
        assert made.config.at(path).r == r
        np.testing.assert_allclose(delta(model, made, path), best(matrix, r), atol=1e-12)
        assert float(made.buffers[path]["scaling"]) == 1.0
    if energy == 1.0 and method == "lora":
        assert made.config.r == 5
        assert not made.config.rank_pattern


def test_the_config_s_scaling_is_kept_and_the_factors_make_up_for_it() -> None:
    model, adapter = two_layers(4)
    for fields in (
        {"r": 4, "lora_alpha": 4},
        {"r": 4, "lora_alpha": 64},
        {"r": 2, "lora_alpha": -3},
        {"r": 4, "use_rslora": True},
        {"r": 2, "rank_pattern": {"1": 3}, "alpha_pattern": {"0": 5}},
        {"r": 2, "rank_pattern": {"1": 3}, "use_rslora": True},
    ):
        config = fa.LoraConfig(**fields)
        made = fa.convert(model, adapter, config)
        expected = dataclasses.replace(config, target_modules=("0", "1"))
        assert made.config == expected
        for path in ("0", "1"):
            at = config.at(path)
            assert made.config.rank(made.leaves(path)) == at.r
            scaling = at.lora_alpha / (at.r**0.5 if at.use_rslora else at.r)
            assert float(made.buffers[path]["scaling"]) == scaling
            np.testing.assert_allclose(delta(model, made, path), best(delta(model, adapter, path), at.r), atol=1e-12)
        if "rank_pattern" not in fields:
            varied = fa.convert(model, adapter, config, energy=0.8)
            assert all(torch.equal(v["scaling"], made.buffers[p]["scaling"]) for p, v in varied.buffers.items())


def test_a_lora_of_the_same_rank_keeps_its_bits() -> None:
    for fields in ({"r": 4}, {"r": 4, "use_rslora": True, "lora_alpha": 3}, {"r": 4, "lora_bias": True}):
        model, adapter = two_layers(**fields)
        same = {name: value for name, value in fields.items() if name != "r"}
        made = fa.convert(model, adapter, fa.LoraConfig(r=4, **same))
        for path in ("0", "1"):
            assert all(torch.equal(leaf, made.leaves(path)[name]) for name, leaf in adapter.leaves(path).items())
            kept = {leaf.data_ptr() for leaf in adapter.params[path].values()}
            assert kept.isdisjoint(leaf.data_ptr() for leaf in made.params[path].values())


def test_ranks_beyond_the_change_are_those_of_a_new_lora() -> None:
    model, adapter = two_layers(2)
    made = fa.convert(model, adapter, fa.LoraConfig(r=20, lora_alpha=20))
    p = made.params["0"]
    assert torch.equal(p["lora_A"][:2], adapter.params["0"]["lora_A"])
    assert p["lora_A"][2:].abs().min() > 0
    assert not p["lora_B"][:, 2:].any()

    def loss(params: Any) -> Tensor:
        return fa.functional_call(model, made.replace(params=params), (torch.ones(1, 10).double(),)).sum()

    assert (torch.func.grad(loss)(made.params)["0"]["lora_B"].abs().amin(0) > 0).all()


def test_groups_and_experts_share_a_rank() -> None:
    conv = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2, bias=False)).double()
    adapter = fa.init(conv, fa.IA3Config(target_modules=["0"], feedforward_modules=[]))
    vector = torch.tensor([2.0, 1, 1, 2, 2, 1]).double().reshape(1, 6, 1, 1)  # of rank 1 and of rank 2
    adapter = adapter.replace(params={"0": {"ia3_l": vector}})
    made = fa.convert(conv, adapter, fa.LoraConfig(), energy=1.0)
    assert made.config.r == 4
    x = torch.randn(2, 4, 5, 5).double()
    torch.testing.assert_close(fa.functional_call(conv, made, (x,)), fa.functional_call(conv, adapter, (x,)))
    with pytest.raises(fa.SiteError, match="'0' has 2 groups, which must divide the rank, got r=3"):
        fa.convert(conv, adapter, fa.LoraConfig(r=3))


# -- no change --------------------------------------------------------------------------------------------


def test_sites_without_a_change_are_excluded() -> None:
    model, adapter = two_layers(2)
    zero = {name: torch.zeros_like(leaf) for name, leaf in adapter.params["1"].items()}
    adapter = adapter.replace(params={**adapter.params, "1": zero})
    made = fa.convert(model, adapter, fa.LoraConfig(), energy=0.99)
    assert made.config.exclude_modules == ("1",)
    assert list(made.params) == list(made.buffers) == ["0"]
    assert [site.path for site in fa.sites(model, made.config)] == ["0"]
    fixed = fa.convert(model, adapter, fa.LoraConfig(r=3))
    assert fixed.config.exclude_modules is None
    assert not fixed.params["1"]["lora_B"].any()
    # a scaling of zero changes nothing, either
    off = adapter.replace(buffers={p: {"scaling": 0 * b["scaling"]} for p, b in adapter.buffers.items()})
    off = fa.convert(model, off, fa.LoraConfig(), energy=0.99)
    assert off.config.exclude_modules is None  # not all can be excluded
    assert [leaf.shape[0] for p in off.params.values() for name, leaf in p.items() if name == "lora_A"] == [1, 1]


def test_what_is_excluded_is_named_exactly() -> None:
    torch.manual_seed(3)
    model = nn.ModuleDict({"q": nn.Linear(4, 4), "a": nn.ModuleDict({"q": nn.Linear(4, 4)})})
    for exclude in (None, ["b"], "b.*"):
        config = fa.LoraConfig(target_modules=["q"], init_lora_weights=False)
        adapter = fa.init(model, config)
        zero = {name: torch.zeros_like(leaf) for name, leaf in adapter.params["q"].items()}
        adapter = adapter.replace(params={**adapter.params, "q": zero})
        model["b"] = nn.Linear(2, 2)  # excluded by another name
        made = fa.convert(model, adapter, fa.LoraConfig(exclude_modules=exclude), energy=0.99)
        assert list(made.params) == ["a.q"]
        assert [site.path for site in fa.sites(model, made.config)] == ["a.q"]


def test_parameters_without_a_change_are_no_targets() -> None:
    model = nn.Module()
    model.a, model.b = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3, 4, 5))
    config = fa.LoraConfig(target_parameters=["a", "b"], init_lora_weights=False)
    adapter = fa.init(model, config)
    for gone, left in (("a", "b"), ("b", "a")):
        zero = {name: torch.zeros_like(leaf) for name, leaf in adapter.params[gone].items()}
        one = adapter.replace(params={**adapter.params, gone: zero})
        made = fa.convert(model, one, fa.LoraConfig(), energy=0.99)
        assert list(made.params) == [left]
        assert made.config.target_parameters == (left,)


def test_half_of_an_attention_stays() -> None:
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "out": nn.Linear(8, 8)})
    adapter = fa.init(model, fa.LoraConfig(target_modules=["attn", "out"], init_lora_weights=False))
    zero = {name: torch.zeros_like(leaf) for name, leaf in adapter.params["attn.out_proj"].items()}
    adapter = adapter.replace(params={**adapter.params, "attn.out_proj": zero})
    made = fa.convert(model, adapter, fa.LoraConfig(r=8), energy=0.999)
    assert set(made.params) == set(adapter.params)
    assert made.params["attn.out_proj"]["lora_A"].shape[0] == 1
    assert not made.params["attn.out_proj"]["lora_B"].any()


def test_an_adapter_that_changes_nothing() -> None:
    model, _ = two_layers()
    adapter = fa.init(model, fa.LoraConfig(target_modules=["0", "1"]))
    made = fa.convert(model, adapter, fa.LoraConfig(), energy=0.9)
    assert made.config.r == 1
    x = torch.randn(2, 10).double()
    assert torch.equal(fa.functional_call(model, made, (x,)), model(x))


# -- biases, and what is held in full ---------------------------------------------------------------------


def ia3(model: nn.Module, **fields: Any) -> fa.Adapter:
    config = fa.IA3Config(feedforward_modules=[], init_ia3_weights=False, **fields)
    return fa.init(model, config)


def test_a_bias_that_changes_needs_a_place() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 4)).double()
    adapter, x = ia3(model, target_modules=["0"]), torch.randn(3, 5).double()
    expected = fa.functional_call(model, adapter, (x,))
    with pytest.raises(fa.SiteError, match=r"The bias at '0' changes, too.*Set lora_bias=True, or bias='lora_only'"):
        fa.convert(model, adapter, fa.LoraConfig(r=4))
    for fields in ({"lora_bias": True, "lora_alpha": 12}, {"bias": "lora_only"}, {"bias": "all"}):
        made = fa.convert(model, adapter, fa.LoraConfig(r=4, **fields))
        torch.testing.assert_close(fa.functional_call(model, made, (x,)), expected)
        assert ("bias" in made.params["0"]) == ("bias" in fields)
        assert ("lora_B_bias" in made.params["0"]) == ("lora_bias" in fields)
        assert ("1" in made.params) == (fields.get("bias") == "all")
    # the weight stays, the bias moves
    model[0].weight.data.zero_()
    made = fa.convert(model, adapter, fa.LoraConfig(r=4, lora_bias=True), energy=0.9)
    torch.testing.assert_close(fa.functional_call(model, made, (x,)), fa.functional_call(model, adapter, (x,)))
    made = fa.convert(model, adapter, fa.LoraConfig(r=4, bias="lora_only"), energy=0.9)
    torch.testing.assert_close(fa.functional_call(model, made, (x,)), fa.functional_call(model, adapter, (x,)))


def test_what_is_held_in_full_is_carried_over(llama: nn.Module, ids: Tensor) -> None:
    cases = (
        fa.IA3Config(
            target_modules=["v_proj"], feedforward_modules=[], init_ia3_weights=False, modules_to_save=["norm"]
        ),
        fa.LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False, modules_to_save=["lm_head"]),
        fa.LoraConfig(
            r=3,
            target_modules=["q_proj", "embed_tokens"],
            init_lora_weights=False,
            trainable_token_indices={"embed_tokens": [1, 5]},
            use_dora=True,
        ),
    )
    generator = torch.Generator().manual_seed(1)
    for config in cases:
        adapter = fa.init(llama, config)
        moved = {
            path: {k: v + 0.1 * torch.randn(v.shape, generator=generator) for k, v in leaves.items()}
            for path, leaves in adapter.params.items()
        }
        adapter = adapter.replace(params=moved)
        made = fa.convert(llama, adapter, fa.LoraConfig(r=16))
        expected = logits(fa.functional_call(llama, adapter, (ids,)))
        torch.testing.assert_close(logits(fa.functional_call(llama, made, (ids,))), expected, rtol=1e-4, atol=1e-4)
        for field in ("modules_to_save", "trainable_token_indices"):
            assert getattr(made.config, field) == getattr(config, field, None)
        assert made.params.keys() == adapter.params.keys()


def test_trained_biases_are_carried_over() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 4)).double()
    x = torch.randn(3, 5).double()
    for bias in ("all", "lora_only"):
        adapter = fa.init(model, fa.LoraConfig(r=2, target_modules=["0"], bias=bias, use_dora=True))
        adapter = adapter.map(lambda t: t + 0.1)
        made = fa.convert(model, adapter, fa.LoraConfig(r=4))
        assert made.config.bias == bias
        assert torch.equal(made.params["0"]["bias"], adapter.params["0"]["bias"])
        assert ("1" in made.params) == (bias == "all")
        torch.testing.assert_close(fa.functional_call(model, made, (x,)), fa.functional_call(model, adapter, (x,)))
        # what the config asks for in addition has the model's values
        both = fa.convert(model, adapter, fa.LoraConfig(r=4, modules_to_save=["1"]))
        assert both.config.modules_to_save == ("1",)
        assert torch.equal(both.params["1"]["weight"], model[1].weight)
        torch.testing.assert_close(fa.functional_call(model, both, (x,)), fa.functional_call(model, adapter, (x,)))


# -- targets ----------------------------------------------------------------------------------------------


def test_targets_are_the_adapter_s_unless_the_config_names_some() -> None:
    model, adapter = two_layers(2)
    assert fa.convert(model, adapter, fa.LoraConfig()).config.target_modules == ("0", "1")
    named = fa.convert(model, adapter, fa.LoraConfig(target_modules=r"[01]"))
    assert named.config.target_modules == "[01]"
    with pytest.raises(fa.TargetError, match=r"the adapter changes '1' \(1 such sites\), which the config does not"):
        fa.convert(model, adapter, fa.LoraConfig(target_modules=["0"]))
    with pytest.raises(fa.TargetError, match="target_modules names 'nothing'"):
        fa.convert(model, adapter, fa.LoraConfig(target_modules=["0", "1", "nothing"]))
    # a site that the adapter does not have is that of a new LoRA
    one = fa.init(model, fa.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    made = fa.convert(model, one, fa.LoraConfig(target_modules=["0", "1"]))
    assert not made.params["1"]["lora_B"].any()
    assert made.params["1"]["lora_A"].any()
    made = fa.convert(model, one, fa.LoraConfig(target_modules=["0", "1"]), energy=0.9)
    assert (list(made.params), made.config.exclude_modules) == (["0"], ("1",))


def test_adapters_that_no_config_made() -> None:
    """Their sites are named one by one."""
    model = nn.ModuleDict(
        {
            "q": nn.Linear(4, 4),
            "a": nn.ModuleDict({"q": nn.Linear(4, 4), "w": nn.ParameterDict({"x": nn.Parameter(torch.randn(4, 3))})}),
            "attn": nn.MultiheadAttention(8, 2),
        }
    )
    every = fa.init(
        model,
        fa.LoraConfig(target_modules=["q", "a.q", "attn"], target_parameters=["a.w.x"], init_lora_weights=False, r=2),
    )
    for paths in (["q"], ["a.q"], ["q", "a.q"], ["attn.in_proj_weight", "attn.out_proj", "a.w.x"], ["attn.out_proj"]):
        part = fa.Adapter({p: every.params[p] for p in paths}, {p: every.buffers[p] for p in paths}, every.config)
        made = fa.convert(model, part, fa.LoraConfig(r=2))
        assert set(made.params) == set(paths)
        assert {site.path for site in fa.sites(model, made.config)} == set(paths)
    part = fa.Adapter({"attn.in_proj_weight": every.params["attn.in_proj_weight"]}, {}, every.config)
    part = part.replace(buffers={"attn.in_proj_weight": every.buffers["attn.in_proj_weight"]})
    made = fa.convert(model, part, fa.LoraConfig(r=2))
    assert made.config.target_parameters == ("attn.in_proj_weight",)


def test_ranks_of_sites_whose_path_ends_another() -> None:
    torch.manual_seed(3)
    model = nn.ModuleDict({"a": nn.ModuleDict({"q": nn.Linear(6, 6)}), "q": nn.Linear(6, 6), "k": nn.Linear(6, 6)})
    config = fa.LoraConfig(target_modules=["q", "k"], init_lora_weights=False, rank_pattern={"^q": 1, "a.q": 4}, r=4)
    adapter = fa.init(model, config)
    made = fa.convert(model, adapter, fa.LoraConfig(), energy=1.0)
    assert {path: made.config.at(path).r for path in made.params} == {"a.q": 4, "q": 1, "k": 4}
    assert fa.method_of(made.config).describe(made.config, {p: made.leaves(p) for p in made.params}) is made.config


# -- errors -----------------------------------------------------------------------------------------------


def test_errors() -> None:
    model, adapter = two_layers()
    stack, nan = fa.stack([adapter, adapter]), adapter.map(lambda t: t * float("nan"))
    wrong = adapter.replace(params={**adapter.params, "1": adapter.params["0"]})
    dora = fa.LoraConfig(use_dora=True)
    for error, run, text in (
        (TypeError, lambda: fa.convert(model, {"a": adapter}, fa.LoraConfig()), "expected an Adapter, got dict"),
        (TypeError, lambda: fa.convert(model, adapter, fa.IA3Config()), "expected a LoraConfig"),
        (fa.AdapterError, lambda: fa.convert(model, stack, fa.LoraConfig()), "a stack has many weights.*unstack"),
        (fa.AdapterError, lambda: fa.convert(model, adapter, dora), "the config is for dora, and only a plain LoRA"),
        (fa.AdapterError, lambda: fa.extract(model, model, dora), "extract: the config is for dora"),
        (ValueError, lambda: fa.convert(model, adapter, fa.LoraConfig(), energy=0.0), "share.*in .0, 1., got 0"),
        (ValueError, lambda: fa.convert(model, adapter, fa.LoraConfig(), energy=90), "share.*in .0, 1., got 90"),
        (fa.AdapterError, lambda: fa.convert(model, adapter, fa.LoraConfig(lora_alpha=0)), "scaling 0 at '0'"),
        (fa.AdapterError, lambda: fa.convert(model, nan, fa.LoraConfig()), "What is changed at '0' is not finite"),
        (fa.SiteError, lambda: fa.convert(model, wrong, fa.LoraConfig()), "lora at '1': lora_A has shape .2, 10."),
    ):
        before, bits = Snapshot(model), Bits(adapter)
        with pytest.raises(error, match=text):
            run()
        before.check()
        bits.check()


def test_a_quantised_weight_is_refused_unless_factors_are_known() -> None:
    model, adapter = two_layers()
    quantised = copy.deepcopy(model)
    for layer in quantised:
        layer.weight = nn.Parameter(torch.zeros(layer.weight.shape, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(fa.SiteError, match=r"The weight at '0' is quantised \(torch.uint8\)"):
        fa.convert(quantised, ia3(model, target_modules=["0"]), fa.LoraConfig(lora_bias=True))
    made = fa.convert(quantised, adapter, fa.LoraConfig(r=2, lora_alpha=8))
    assert torch.equal(made.params["0"]["lora_A"], adapter.params["0"]["lora_A"])


def test_token_rows_of_the_config_and_the_adapter_must_agree(llama: nn.Module) -> None:
    adapter = fa.init(llama, fa.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1]))
    with pytest.raises(fa.AdapterError, match="trainable_token_indices"):
        fa.convert(llama, adapter, fa.LoraConfig(trainable_token_indices=[2]))


def test_an_error_that_no_shape_explains_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    model, adapter = two_layers(use_dora=True)
    monkeypatch.setattr("funcadapt.approximation.dense_levels", _fail)
    with pytest.raises(RuntimeError, match="out of luck"):
        fa.convert(model, adapter, fa.LoraConfig())


def _fail(*_: Any) -> Any:
    raise RuntimeError("out of luck")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShiftConfig(fa.AdapterConfig):
    """A method that adds a bias, also where the layer has none, or an input-dependent one if told so."""

    peft_type: str = "TEST_SHIFT"
    target_modules: Any = None
    dynamic: bool = False


def _shifted(layer: Any, p: Any, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if layer.config.dynamic:
        raise fa.SiteError(f"There is no fixed weight at {layer.site.path!r}.")
    return weight, p["shift"] if bias is None else bias + p["shift"]


@pytest.fixture
def _shift() -> Iterator[None]:
    fa.register(
        fa.Method(
            name="shift",
            config=ShiftConfig,
            kinds=frozenset({"linear", "embedding"}),
            keys={"shift": "shift"},
            init=lambda site, config, draw, weight: Fresh({"shift": draw.normal(site.out_features)}, {}),
            weight=_shifted,
            after=lambda layer, p, x, y: y + p["shift"],
        )
    )
    yield
    unregister("shift")


@pytest.mark.usefixtures("_shift")
def test_a_bias_where_the_layer_has_none() -> None:
    model, x = nn.Sequential(nn.Linear(5, 4, bias=False)), torch.randn(3, 5)
    adapter = fa.init(model, ShiftConfig(target_modules=["0"]))
    with pytest.raises(fa.SiteError, match="The bias at '0' changes, too"):
        fa.convert(model, adapter, fa.LoraConfig())
    with pytest.raises(fa.SiteError, match="The bias at '0' changes, too"):
        fa.convert(model, adapter, fa.LoraConfig(bias="all"))
    made = fa.convert(model, adapter, fa.LoraConfig(lora_bias=True), energy=0.9)
    assert made.config.r == 1
    torch.testing.assert_close(fa.functional_call(model, made, (x,)), fa.functional_call(model, adapter, (x,)))
    embedding = nn.Sequential(nn.Embedding(5, 4))
    adapter = fa.init(embedding, ShiftConfig(target_modules=["0"]))
    with pytest.raises(fa.SiteError, match="lora_bias=True is not supported for the embedding"):
        fa.convert(embedding, adapter, fa.LoraConfig(lora_bias=True))


@pytest.mark.usefixtures("_shift")
def test_an_output_that_is_no_fixed_weight_is_refused() -> None:
    model = nn.Sequential(nn.Linear(5, 4))
    adapter = fa.init(model, ShiftConfig(target_modules=["0"], dynamic=True))
    with pytest.raises(fa.SiteError, match="no fixed weight at '0'"):
        fa.convert(model, adapter, fa.LoraConfig())


def test_one_expert_has_no_axis_of_experts() -> None:
    model = nn.Module()
    model.w = nn.Parameter(torch.randn(1, 5, 4))
    adapter = fa.init(model, fa.LoraConfig(r=3, target_parameters=["w"], init_lora_weights=False, use_dora=True))
    made = fa.convert(model, adapter, fa.LoraConfig(r=5))
    assert {name: tuple(leaf.shape) for name, leaf in made.params["w"].items()} == {"lora_A": (5, 4), "lora_B": (5, 5)}
    np.testing.assert_allclose(delta(model, made, "w"), delta(model, adapter, "w"), atol=1e-5)


def test_what_no_config_selects_is_refused() -> None:
    model = nn.ModuleDict({"x": nn.ParameterDict({"w": nn.Parameter(torch.randn(4, 4))})})
    model.register_parameter("w", nn.Parameter(torch.randn(4, 4)))
    config = fa.LoraConfig(r=1, target_parameters=["w"])
    adapter = fa.init(model, config)
    adapter = fa.Adapter({"w": adapter.params["w"]}, {"w": adapter.buffers["w"]}, config)  # "w" also is "x.w"
    with pytest.raises(fa.TargetError, match="no LoraConfig selects exactly what the adapter changes, 'w'"):
        fa.convert(model, adapter, fa.LoraConfig())
    made = fa.convert(model, adapter, config)
    assert set(made.params) == {"w", "x.w"}


# -- files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "targets", "energy"),
    [("llama", ["v_proj", "down_proj", "embed_tokens"], None), ("gpt2", ["c_attn", "c_proj"], 0.95)],
)
def test_peft_loads_what_is_saved(tmp_path: Path, name: str, targets: list[str], energy: float | None) -> None:
    model = tiny(name)
    adapter = fa.init(model, fa.LoraConfig(r=5, target_modules=targets, use_dora=True, init_lora_weights=False))
    adapter = adapter.replace(params={p: {k: 0.5 * v for k, v in q.items()} for p, q in adapter.params.items()})
    made = fa.convert(model, adapter, fa.LoraConfig(r=16, lora_alpha=4), energy=energy)
    fa.save(made, tmp_path)
    x = tokens(name)
    out = logits(fa.functional_call(model, made, (), x))
    if energy is None:
        torch.testing.assert_close(
            out, logits(fa.functional_call(model, adapter, (), x)), rtol=1e-3, atol=1e-3 * out.abs().max().item()
        )
    else:
        assert made.config.rank_pattern
    loaded = fa.load(tmp_path, model=model)
    assert torch.equal(logits(fa.functional_call(model, loaded, (), x)), out)
    with torch.no_grad():
        torch.testing.assert_close(logits(peft_load(model, tmp_path)(**x)), out.detach(), rtol=1e-4, atol=1e-4)


def test_peft_loads_excluded_sites_and_biases(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    adapter = ia3(model, target_modules=["0", "1"])
    adapter = adapter.replace(params={**adapter.params, "1": {"ia3_l": torch.ones(4, 1)}})
    made = fa.convert(model, adapter, fa.LoraConfig(lora_bias=True), energy=0.99)
    assert made.config.exclude_modules == ("1",)
    fa.save(made, tmp_path)
    x = torch.randn(3, 5)
    expected = fa.functional_call(model, made, (x,)).detach()
    torch.testing.assert_close(peft_load(copy.deepcopy(model), tmp_path)(x).detach(), expected)


# -- extract ----------------------------------------------------------------------------------------------


class Net(nn.Module):
    """One layer of most kinds, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 6)
        self.attn = nn.MultiheadAttention(6, 2, batch_first=True)
        self.conv = nn.Conv1d(6, 6, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm1d(6)
        self.experts = nn.Parameter(torch.randn(3, 6, 6))
        self.head = nn.Linear(6, 10)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.attn(x, x, x)[0]
        x = self.norm(self.conv(x.transpose(1, 2))).transpose(1, 2)
        return self.head(sum(x @ self.experts[e] for e in range(3)))


SITES = {"target_modules": ["embed", "attn", "conv", "head"], "target_parameters": ["experts"]}


def tuned_net(*names: str) -> tuple[Net, Net, Tensor]:
    torch.manual_seed(3)
    base = Net().double().eval()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for name, value in tuned.state_dict().items():
            if name.startswith(names) and value.is_floating_point():
                value.add_(0.1 * torch.rand_like(value))
    return base, tuned, torch.tensor([[1, 2, 3], [4, 5, 6]])


WEIGHTS = ("embed", "attn.in_proj_weight", "attn.out_proj.weight", "conv.weight", "experts", "head.weight")


@pytest.mark.parametrize("energy", [None, 1.0])
def test_extract_is_exact_with_enough_rank(energy: float | None) -> None:
    base, tuned, x = tuned_net(*WEIGHTS)
    before, there = Snapshot(base), Snapshot(tuned)
    for values in (tuned, tuned.state_dict()):
        made = fa.extract(base, values, fa.LoraConfig(r=6, **SITES), energy=energy)
        torch.testing.assert_close(fa.functional_call(base, made, (x,)), tuned(x))
        assert {t.dtype for t in made.tensors()} == {torch.float64}
    before.check()
    there.check()


def test_extract_is_the_best_of_its_rank() -> None:
    base, tuned, _ = tuned_net("head.weight")
    made = fa.extract(base, tuned, fa.LoraConfig(r=2, target_modules=["head"]))
    change = (tuned.head.weight - base.head.weight).detach().numpy()
    np.testing.assert_allclose(delta(base, made, "head"), best(change[None], 2), atol=1e-12)


def test_extract_leaves_out_what_did_not_change() -> None:
    base, tuned, x = tuned_net("head.weight", "attn.in_proj_weight")
    made = fa.extract(base, tuned, fa.LoraConfig(**SITES), energy=1.0)
    assert set(made.params) == {"attn.in_proj_weight", "attn.out_proj", "head"}  # one target, two sites
    assert made.config.target_parameters is None
    assert set(made.config.exclude_modules) == {"embed", "conv"}
    torch.testing.assert_close(fa.functional_call(base, made, (x,)), tuned(x))


@pytest.mark.parametrize(
    ("changed", "fields"),
    [
        ("norm", {"modules_to_save": ["norm"]}),
        ("conv", {"modules_to_save": ["norm"], "lora_bias": True}),
        ("conv", {"bias": "lora_only"}),
        ("norm.bias", {"bias": "all"}),
        ("head", {"modules_to_save": ["head"]}),
    ],
    ids=str,
)
def test_extract_takes_over_what_the_config_covers(changed: str, fields: dict[str, Any]) -> None:
    base, tuned, x = tuned_net(changed)
    sites = {"target_modules": ["conv"]}
    made = fa.extract(base, tuned, fa.LoraConfig(r=6, **sites, **fields))
    torch.testing.assert_close(fa.functional_call(base, made, (x,)), tuned(x))
    assert made.config.target_modules == ("conv",)


def test_extract_token_rows() -> None:
    base, tuned, x = tuned_net()
    with torch.no_grad():
        tuned.embed.weight[[2, 5]] += 1
    for targets in (["head"], ["head", "embed"]):
        config = fa.LoraConfig(r=2, target_modules=targets, trainable_token_indices={"embed": [2, 5]})
        made = fa.extract(base, tuned, config, energy=0.9)
        torch.testing.assert_close(fa.functional_call(base, made, (x,)), tuned(x))
    with torch.no_grad():
        tuned.embed.weight[7] += 1
    with pytest.raises(fa.AdapterError, match=r"1 tensors differ.*'embed.weight'"):
        fa.extract(base, tuned, dataclasses.replace(config, target_modules=["head"]))
    made = fa.extract(base, tuned, config)  # the other row is LoRA's
    torch.testing.assert_close(fa.functional_call(base, made, (x,)), tuned(x))


def test_extract_names_what_it_cannot_cover() -> None:
    base, tuned, _ = tuned_net("conv", "norm")
    config = fa.LoraConfig(target_modules=["conv"])
    with pytest.raises(fa.AdapterError, match=r"5 tensors differ.*'conv.bias', 'norm.weight', 'norm.bias', 'norm.runn"):
        fa.extract(base, tuned, config)
    with pytest.raises(fa.AdapterError, match=r"4 tensors differ.*: 'norm.weight'"):
        fa.extract(base, tuned, dataclasses.replace(config, lora_bias=True))
    state = dict(base.state_dict())
    for change, text in (
        ({"haed.weight": torch.zeros(1)}, "has 'haed.weight' .1 such names., which.*Did you mean 'head.weight'"),
        ({"head.weight": torch.zeros(2, 2)}, r"'head.weight' has shape \(2, 2\) in the tuned model, \(10, 6\) in"),
    ):
        with pytest.raises(fa.AdapterError, match=text):
            fa.extract(base, {**state, **change}, config)
    state.pop("head.weight")
    with pytest.raises(fa.AdapterError, match=r"the tuned model lacks 'head\.weight'"):
        fa.extract(base, state, config)
    with pytest.raises(fa.TargetError, match="modules_to_save names 'haed'"):
        fa.extract(base, tuned, dataclasses.replace(config, modules_to_save=["haed"]))
    with pytest.raises(TypeError, match="extract: expected a LoraConfig"):
        fa.extract(base, tuned, fa.IA3Config())


def test_extract_and_tied_weights() -> None:
    base, tuned = tiny("llama_tied"), tiny("llama_tied")
    with torch.no_grad():
        tuned.model.embed_tokens.weight.add_(0.1)
    config = fa.LoraConfig(r=1, target_modules=["embed_tokens"])
    with pytest.raises(fa.AdapterError, match=r"'lm_head.weight'.*is tied to 'model.embed_tokens.weight'.*untie"):
        fa.extract(base, tuned, config)
    # a file has one of the two names
    state = {k: v for k, v in base.state_dict().items() if k != "lm_head.weight"}
    x = tokens("llama")
    with torch.no_grad():
        tuned = tiny("llama_tied")
        tuned.model.layers[0].mlp.up_proj.weight.add_(0.1)
        state["model.layers.0.mlp.up_proj.weight"] = tuned.model.layers[0].mlp.up_proj.weight
        made = fa.extract(base, state, fa.LoraConfig(r=1, target_modules=["up_proj"]))
        out = logits(fa.functional_call(base, made, (), x))
        torch.testing.assert_close(out, tuned(**x).logits, rtol=1e-4, atol=1e-4)


def test_extract_of_a_merged_adapter_is_the_adapter(llama: nn.Module) -> None:
    adapter = fa.init(llama, fa.LoraConfig(r=3, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    state = {**llama.state_dict(), **fa.merge(llama, adapter)}
    made = fa.extract(llama, state, fa.LoraConfig(r=3, target_modules=["q_proj", "v_proj"]))
    for path in adapter.params:
        np.testing.assert_allclose(delta(llama, made, path), delta(llama, adapter, path), atol=1e-5)


def test_extract_needs_weights_that_are_parameters() -> None:
    base = nn.Sequential(OrderedDict(layer=nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))))
    with pytest.raises(fa.SiteError, match="The weight at 'layer' is computed from others"):
        fa.extract(base, base, fa.LoraConfig(target_modules=["layer"]))
    # the adapter of such a layer can be converted
    adapter = fa.init(base, fa.LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False, use_dora=True))
    adapter, x = adapter.map(lambda t: t + 0.1), torch.randn(2, 3)
    made = fa.convert(base, adapter, fa.LoraConfig(r=3))
    torch.testing.assert_close(fa.functional_call(base, made, (x,)), fa.functional_call(base, adapter, (x,)))
