"""The algebra of adapters: laws over every method and layer, exactness, derivatives, bad input.

What it shares with PEFT is in `tests/parity/test_algebra_parity.py`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import LAWS, Case, tolerance
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import grad, jvp, vmap

import funcadapt as fa
from funcadapt import sparsify
from funcadapt.algebra import add, combine, scale
from funcadapt.combining import COMBINATIONS, SPARSE

ALGEBRAIC = [case for case in LAWS if case.method.algebra is not None and not case.variant.inputs]
PLAIN = [case for case in LAWS if case.method.algebra is None and case.kind.name == "linear"]
LORA = [case for case in ALGEBRAIC if case.method.name in ("lora", "dora")]
DENSITY = {name: 0.5 for name in COMBINATIONS if name.removesuffix("_svd") in SPARSE}


def tensor(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def effect(case: Case, model: nn.Module, adapter: fa.Adapter) -> dict[str, Tensor]:
    """What an adapter adds: to the weights, or to the output where the layer has no dense form (it is linear)."""
    x = case.inputs()
    if case.no_dense:
        with torch.no_grad():
            return {"output": fa.functional_call(model.eval(), adapter, (x,)) - model(x)}
    merged = fa.merge(model, adapter)
    return {name: merged[name] - tensor for name, tensor in model.named_parameters() if name in merged}


def close(got: dict[str, Tensor], expected: dict[str, Tensor], roundings: int = 2000) -> None:
    assert got.keys() >= expected.keys()
    for name in got:
        want = expected.get(name, torch.zeros_like(got[name]))
        torch.testing.assert_close(
            got[name],
            want,
            **tolerance(want.dtype, want.abs().max().item(), roundings=roundings),
            msg=lambda m: f"{name}: {m}",
        )


def weighted(effects: Sequence[dict[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    names = {name for each in effects for name in each}
    return {
        name: sum(w * each[name] for w, each in zip(weights, effects, strict=True) if name in each) for name in names
    }


def trio(case: Case) -> tuple[nn.Module, list[fa.Adapter]]:
    model = case.model()
    return model, [case.adapter(model, seed) for seed in range(3)]


# -- laws -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", LAWS, ids=str)
def test_one_adapter_with_weight_1_comes_back(case: Case) -> None:
    adapter = case.adapter(case.model())
    for name in COMBINATIONS:
        assert combine([adapter], [1.0], name) is adapter
    assert scale(adapter, 1) is adapter
    assert add(adapter) is adapter


@pytest.mark.parametrize("case", ALGEBRAIC, ids=str)
def test_one_adapter_with_a_variable_1_does_the_same(case: Case) -> None:
    # a tensor may be any number, so nothing is short-circuited
    model = case.model()
    adapter = case.adapter(model)
    expected = effect(case, model, adapter)
    one = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    for name in COMBINATIONS:
        close(effect(case, model, combine([adapter], [one], name, model=model)), expected)
    if case in LORA:
        close(effect(case, model, combine([adapter], [1.0], "svd", svd_rank=98, model=model)), expected)


@pytest.mark.parametrize("case", ALGEBRAIC, ids=str)
def test_cat_is_the_exact_sum(case: Case) -> None:
    model, adapters = trio(case)
    weights = [0.7, -0.4, 0.3]
    expected = weighted([effect(case, model, a) for a in adapters], weights)
    close(effect(case, model, combine(adapters, weights, "cat", model=model)), expected)
    total = weighted([effect(case, model, a) for a in adapters], [1, 1, 1])
    close(effect(case, model, add(*adapters, model=model)), total)


@pytest.mark.parametrize("case", LORA, ids=str)
def test_a_decomposition_at_full_rank_is_the_exact_sum(case: Case) -> None:
    model, adapters = trio(case)
    weights = [0.7, -0.4, 0.3]
    expected = weighted([effect(case, model, a) for a in adapters], weights)
    close(effect(case, model, combine(adapters, weights, "svd", svd_rank=6, model=model)), expected)
    for name in ("dare_linear_svd", "magnitude_prune_svd"):
        with pytest.warns(UserWarning, match="no pruning"):
            new = combine(adapters, weights, name, density=1.0, svd_rank=6, model=model)
        close(effect(case, model, new), expected)


@pytest.mark.parametrize("case", LORA, ids=str)
def test_svd_is_the_best_approximation_of_its_rank(case: Case) -> None:
    if case.kind.is_parameter or "conv" in case.kind.name or case.kind.name.startswith("mha"):
        return
    if case.method.name == "dora" or case.no_dense:
        return  # of the low-rank part, not of what the weight becomes; biases are not cut
    model, adapters = trio(case)
    weights = [0.7, -0.4, 0.3]
    exact = effect(case, model, combine(adapters, weights, "cat"))["0.weight"]
    for rank in (1, 2, 3):
        cut = effect(case, model, combine(adapters, weights, "svd", svd_rank=rank))["0.weight"]
        u, s, vh = torch.linalg.svd(exact, full_matrices=False)
        torch.testing.assert_close(cut, (u[:, :rank] * s[:rank]) @ vh[:rank])


@pytest.mark.parametrize("w", [0.5, -2, 0])
@pytest.mark.parametrize("case", ALGEBRAIC, ids=str)
def test_scale_is_what_weights_do(case: Case, w: float) -> None:
    model, x = case.model().eval(), case.inputs()
    adapter = case.adapter(model)
    expected = fa.functional_call(model, adapter, (x,), weights=float(w))
    out = fa.functional_call(model, scale(adapter, w, model=model), (x,))
    torch.testing.assert_close(out, expected, **tolerance(out.dtype, expected.abs().max().item(), roundings=500))


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_a_method_without_an_algebra_says_so(case: Case) -> None:
    adapter = case.adapter(case.model())
    with pytest.raises(fa.AdapterError, match=rf"{case.method.name} does not say how its adapters are combined"):
        combine([adapter, adapter], [0.5, 0.5])
    with pytest.raises(fa.AdapterError, match="does not say"):
        scale(adapter, 0.5)


@pytest.mark.parametrize("case", ALGEBRAIC, ids=str)
def test_the_result_is_an_adapter_like_any_other(case: Case, tmp_path: Path) -> None:
    """It runs, its leaves have the shapes that the method makes, and a file gives it back."""
    model, adapters = trio(case)
    for name in COMBINATIONS:
        if case.method.name == "ia3" and name.endswith("svd"):
            continue
        new = combine(adapters, [0.5, 0.8, -0.3], name, density=DENSITY.get(name), model=model)
        assert all(leaf.isfinite().all() for leaf in new.tensors())
        assert {t.dtype for t in new.tensors()} == {t.dtype for t in adapters[0].tensors()}
        fa.functional_call(model.eval(), new, (case.inputs(),))
        if case.method.name == "ia3" and case.kind.is_parameter:
            continue  # there is no config that selects it
        fa.save(new, tmp_path / name)
        loaded = fa.load(tmp_path / name, model=model)
        assert loaded.config == new.config
        for path in new.params:
            for leaf, value in new.leaves(path).items():
                assert torch.equal(loaded.leaves(path)[leaf], value), (name, path, leaf)


def test_ranks_cannot_be_cut_without_ranks() -> None:
    case = next(case for case in ALGEBRAIC if case.method.name == "ia3")
    _, adapters = trio(case)
    with pytest.raises(fa.SiteError, match="has none"):
        combine(adapters, [1, 1, 1], "ties_svd", density=0.5)


@pytest.mark.parametrize("case", [c for c in LORA if c.method.name == "dora"], ids=str)
def test_dora_without_the_model(case: Case) -> None:
    model, adapters = trio(case)
    for name in ("cat", "svd", "ties_svd"):
        with pytest.raises(fa.AdapterError, match="depends on the base weight"):
            combine(adapters, [0.2, 0.3, 0.5], name, density=0.5)
    with pytest.raises(fa.AdapterError, match="depends on the base weight"):
        combine(adapters, [0.5, 0.5, 0.5])
    with pytest.raises(fa.AdapterError, match="depends on the base weight"):
        scale(adapters[0], 0.5)
    # weights that sum to one need no model for sums of leaves, and give the same without it
    for name in ("linear", *SPARSE):
        one, other = (combine(adapters, [0.2, 0.3, 0.5], name, density=0.5, model=m) for m in (None, model))
        path = next(iter(one.params))
        for leaf in one.params[path]:
            assert torch.equal(one.params[path][leaf], other.params[path][leaf])
    mean = sum(w * a.params[path]["lora_magnitude_vector"] for w, a in zip([0.2, 0.3, 0.5], adapters, strict=True))
    torch.testing.assert_close(combine(adapters, [0.2, 0.3, 0.5]).params[path]["lora_magnitude_vector"], mean)
    # otherwise the base's own magnitude makes up for the rest
    twice = combine([adapters[0]] * 2, [1, 1], model=model).params[path]["lora_magnitude_vector"]
    base = fa.init(model, adapters[0].config).params[path]["lora_magnitude_vector"] if path == "0" else None
    if base is not None:
        torch.testing.assert_close(twice, 2 * adapters[0].params[path]["lora_magnitude_vector"] - base)


# -- several sites ----------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 8)
        self.layers = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(8, 12), "down": nn.Linear(12, 8)}) for _ in "ab"])
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        for layer in self.layers:
            x = x + layer["down"](torch.tanh(layer["up"](x)))
        return self.head(self.norm(x))


@pytest.fixture
def net() -> Net:
    return Net().double()


IDS = torch.tensor([[0, 3, 9], [3, 5, 10]])


def lora(net: nn.Module, seed: int, **fields: Any) -> fa.Adapter:
    fields.setdefault("target_modules", ["up", "down", "tokens"])
    adapter = fa.init(net, fa.LoraConfig(**{"r": 2, "init_lora_weights": False, **fields}), seed=seed)
    generator = torch.Generator().manual_seed(seed)

    def moved(leaf: Tensor) -> Tensor:
        noise = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
        return leaf + 0.3 * noise if leaf.ndim and leaf.is_floating_point() else leaf

    return adapter.map(moved)


def delta(net: nn.Module, adapter: fa.Adapter) -> dict[str, Tensor]:
    merged = fa.merge(net, adapter)
    return {name: merged[name] - tensor for name, tensor in net.named_parameters() if name in merged}


def mixed(net: nn.Module, use_dora: bool = False) -> list[fa.Adapter]:
    """Adapters of different sites, ranks, alphas, patterns and scalings."""
    return [
        lora(net, 0, r=3, lora_alpha=7, rank_pattern={"up": 5}, alpha_pattern={r"1\.up": 2.5}, use_dora=use_dora),
        lora(net, 1, r=2, use_rslora=True, target_modules=["up", "down"], use_dora=use_dora),
        lora(net, 2, r=4, lora_alpha=-3, target_modules=["tokens", "0.up"], use_dora=use_dora),
    ]


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("name", ["cat", "svd"])
def test_mixed_ranks_alphas_patterns_and_sites(net: Net, name: str, use_dora: bool, tmp_path: Path) -> None:
    adapters, weights = mixed(net, use_dora), [0.5, -1.5, 2.0]
    new = combine(adapters, weights, name, svd_rank=12, model=net)
    close(delta(net, new), weighted([delta(net, a) for a in adapters], weights))
    assert set(new.params) == {"tokens", *(f"layers.{i}.{n}" for i in (0, 1) for n in ("up", "down"))}
    assert {float(leaves["scaling"]) for leaves in new.buffers.values()} == {1.0}
    if name == "cat":
        assert [new.config.rank(new.leaves(f"layers.0.{n}")) for n in ("up", "down")] == [11, 5]
    fa.save(new, tmp_path)
    loaded = fa.load(tmp_path, model=net)
    close(delta(net, loaded), delta(net, new), roundings=1)


@pytest.mark.parametrize("use_dora", [False, True])
def test_laws_of_the_algebra(net: Net, use_dora: bool) -> None:
    a, b, c = mixed(net, use_dora)
    of = lambda *adapters: delta(net, add(*adapters, model=net))  # noqa: E731
    close(of(a, b), of(b, a))
    close(of(add(a, b, model=net), c), of(a, add(b, c, model=net)))
    close(of(a, scale(a, -1, model=net)), {}, roundings=20000)
    close(of(scale(a, 0.3, model=net), scale(a, 0.7, model=net)), delta(net, a))
    close(delta(net, scale(scale(a, 2, model=net), 0.5, model=net)), delta(net, a))


def test_scale_shares_the_factors(net: Net) -> None:
    adapter = lora(net, 0, lora_alpha=6)
    half = scale(adapter, 0.5)
    assert all(
        half.params[p][n] is leaf for p, leaves in adapter.params.items() for n, leaf in leaves.items() if p == "tokens"
    )
    assert half.config.lora_alpha == 3
    assert adapter.config.lora_alpha == 6


def test_config_of_the_result(net: Net) -> None:
    a = lora(net, 0, r=3, lora_alpha=7, target_modules=["up"], task_type="CAUSAL_LM")
    b = lora(net, 1, r=3, use_rslora=True, target_modules=["down", "up"])
    new = combine([a, b], [1, 1])
    assert (new.config.r, new.config.lora_alpha) == (3, 3)
    assert not new.config.rank_pattern
    assert new.config.target_modules == ("up", "down")
    assert new.config.task_type == "CAUSAL_LM"
    # the first config says how the scaling is computed: PEFT leaves lora_alpha at r there (B9)
    other = combine([b, a], [1, 1])
    assert other.config.use_rslora
    assert other.config.lora_alpha == pytest.approx(3**0.5)
    expressions = combine([lora(net, i, target_modules=t) for i, t in enumerate([r".*\.up", r".*\.down"])], [1, 1])
    assert expressions.config.target_modules == r"(.*\.up)|(.*\.down)"
    assert fa.sites(net, expressions.config, expect=4)


@pytest.mark.parametrize(
    "fields",
    [
        [{"target_modules": "all-linear"}, {"target_modules": ["tokens"]}],
        [{"exclude_modules": ["0.up"]}, {"exclude_modules": ["1.up"]}],
        [
            {"layers_to_transform": [0], "layers_pattern": "layers", "target_modules": ["up"]},
            {"target_modules": ["down"]},
        ],
        [{"target_modules": ["up"]}, {"target_modules": [], "target_parameters": ["head.weight"]}],
        [{"target_modules": "all-linear", "exclude_modules": ["head"]}] * 2,
    ],
)
def test_the_config_selects_the_sites_of_all(net: Net, fields: list[dict[str, Any]], tmp_path: Path) -> None:
    adapters = [lora(net, i, **f) for i, f in enumerate(fields)]
    new = combine(adapters, [0.5, 0.5], "cat")
    assert {site.path for site in fa.sites(net, new.config)} == set(new.params)
    fa.save(new, tmp_path)
    assert set(fa.load(tmp_path, model=net).params) == set(new.params)


def test_attention_is_named_as_one_module() -> None:
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "up": nn.Linear(8, 8)})
    a = fa.init(model, fa.LoraConfig(r=2, target_modules=["attn"]))
    b = fa.init(model, fa.LoraConfig(r=2, target_modules=["up"], exclude_modules=["attn"]))
    new = combine([a, b], [1, 1], "cat")
    assert new.config.target_modules == ("attn", "up")
    assert {site.path for site in fa.sites(model, new.config)} == set(new.params)


def test_biases_of_b(net: Net) -> None:
    a = lora(net, 0, lora_bias=True, target_modules=["up"], lora_alpha=5)
    b = lora(net, 1, target_modules=["up", "down"])
    new = combine([a, b], [-0.5, 2], "cat")
    assert new.config.lora_bias
    close(delta(net, new), weighted([delta(net, a), delta(net, b)], [-0.5, 2]))
    with pytest.raises(fa.SiteError, match="not supported for the embedding 'tokens'"):
        combine([a, lora(net, 1)], [1, 1], "cat")


def test_pissa_becomes_a_lora_for_the_original_weights(net: Net) -> None:
    config = fa.LoraConfig(r=2, target_modules=["up", "down"], init_lora_weights="pissa", lora_alpha=3)
    initial, base = fa.init_with_base(net, config)
    trained = initial.map(lambda leaf: leaf + 0.1 * torch.randn_like(leaf) if leaf.ndim else leaf)
    expected = fa.functional_call(net, trained, (IDS,), parameters=base)
    plain = combine([trained, initial], [1, -1], "cat")
    assert plain.config.init_lora_weights is True
    assert plain.config.r == 4
    torch.testing.assert_close(fa.functional_call(net, plain, (IDS,)), expected)


def test_what_one_adapter_holds_in_full_is_kept(net: Net, tmp_path: Path) -> None:
    a = lora(net, 0, modules_to_save=["head", "norm"], target_modules=["up"])
    b = lora(net, 1, bias="lora_only", target_modules=["down"])
    c = lora(net, 2, trainable_token_indices={"tokens": [1, 4]}, target_modules=["up"])
    new = combine([a, b, c], [0.5, 0.5, -1], "cat")
    assert new.params["head"] == a.params["head"]
    assert new.params["norm"] == a.params["norm"]
    assert new.params["layers.0.down"]["bias"] is b.params["layers.0.down"]["bias"]
    assert new.params["tokens"] == c.params["tokens"]
    assert new.buffers["tokens"] == c.buffers["tokens"]
    assert new.config.bias == "lora_only"
    assert new.config.modules_to_save == ("head", "norm")
    # the same as the adapters one in the other, each with what it holds in full
    nested = {"a": scaled(a, 0.5), "b": scaled(b, 0.5), "c": scaled(c, -1)}
    torch.testing.assert_close(fa.functional_call(net, new, (IDS,)), fa.functional_call(net, nested, (IDS,)))
    fa.save(new, tmp_path)
    loaded = fa.load(tmp_path)
    assert {p: set(v) for p, v in loaded.params.items()} == {p: set(v) for p, v in new.params.items()}


def scaled(adapter: fa.Adapter, w: float) -> fa.Adapter:
    """LoRA's part scaled, the rest kept."""
    buffers = {p: {n: t * w if n == "scaling" else t for n, t in v.items()} for p, v in adapter.buffers.items()}
    return adapter.replace(buffers=buffers)


def test_what_two_adapters_hold_in_full_is_refused(net: Net) -> None:
    a, b = (lora(net, i, modules_to_save=["head"]) for i in (0, 1))
    message = "Cannot add weighted adapters if they target the same module with modules_to_save, but found 1 such "
    with pytest.raises(ValueError, match=re.escape(f"{message}instance(s).")):
        combine([a, b], [1, 1])
    with pytest.raises(ValueError, match="'head'"):
        combine([a, lora(net, 1, target_modules=["head"])], [1, 1], "cat")
    with pytest.raises(ValueError, match="'tokens'"):
        combine([lora(net, i, trainable_token_indices={"tokens": [i]}, target_modules=["up"]) for i in (0, 1)], [1, 1])
    with pytest.raises(fa.AdapterError, match="'weight' of 'head' is held in full"):
        scale(a, 0.5)
    assert scale(a, 1) is a


def test_ia3_counts_an_absent_adapter_as_ones(net: Net) -> None:
    def vectors(seed: int, targets: list[str], feedforward: list[str]) -> fa.Adapter:
        adapter = fa.init(net, fa.IA3Config(target_modules=targets, feedforward_modules=feedforward))
        generator = torch.Generator().manual_seed(seed)
        return adapter.map(lambda t: t + 0.3 * torch.randn(t.shape, generator=generator, dtype=t.dtype))

    a, b = vectors(0, ["up", "down"], ["down"]), vectors(1, ["up"], [])
    new = combine([a, b], [0.25, 0.75])
    l_a, l_b = (adapter.params["layers.0.up"]["ia3_l"] for adapter in (a, b))
    torch.testing.assert_close(new.params["layers.0.up"]["ia3_l"], 0.25 * l_a + 0.75 * l_b)
    torch.testing.assert_close(new.params["layers.1.down"]["ia3_l"], 0.25 * a.params["layers.1.down"]["ia3_l"] + 0.75)
    # weights that sum to one make "linear" the exact sum of changes
    close(delta(net, new), weighted([delta(net, a), delta(net, b)], [0.25, 0.75]))
    close(delta(net, combine([a, b], [2, -1], "cat")), weighted([delta(net, a), delta(net, b)], [2, -1]))
    ties = combine([a, b], [1, 1], "ties", density=0.5).params["layers.0.up"]["ia3_l"]
    torch.testing.assert_close(ties, 1 + sparsify.ties([l_a - 1, l_b - 1], torch.ones(2).double(), 0.5))
    with pytest.raises(fa.SiteError, match="feedforward_modules in some"):
        combine([a, vectors(1, ["down"], [])], [1, 1])


def test_dtypes_are_promoted(net: Net) -> None:
    a, b = lora(net, 0), lora(net, 1)
    for name in ("linear", "cat", "svd", "ties"):
        new = combine([a.to(torch.bfloat16), b.to(torch.float32)], [1, 1], name, density=0.5)
        assert {t.dtype for t in new.tensors()} == {torch.float32}
    half = combine([x.to(torch.bfloat16) for x in (a, b)], [0.3, 0.6], "cat")
    assert {t.dtype for t in half.tensors()} == {torch.bfloat16}
    vectors = fa.init(net, fa.IA3Config(target_modules=["up"], feedforward_modules=[]))
    new = combine([vectors.to(torch.bfloat16), vectors.to(torch.float32)], [1, 1])
    assert {t.dtype for t in new.tensors()} == {torch.float32}


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_exactness_of_random_combinations(data: st.DataObject) -> None:
    torch.manual_seed(0)
    net = Net().double()
    use_dora = data.draw(st.booleans(), label="use_dora")
    number = st.floats(-3, 3, allow_nan=False).map(lambda w: round(w, 3))
    targets = st.lists(st.sampled_from(["up", "down", "tokens", "0.up"]), min_size=1, max_size=3, unique=True)
    count = data.draw(st.integers(1, 4), label="count")
    adapters = [
        lora(
            net,
            seed,
            r=data.draw(st.integers(1, 6)),
            lora_alpha=data.draw(number),
            use_rslora=data.draw(st.booleans()),
            use_dora=use_dora,
            target_modules=data.draw(targets),
        )
        for seed in range(count)
    ]
    weights = data.draw(st.lists(number, min_size=count, max_size=count), label="weights")
    expected = weighted([delta(net, a) for a in adapters], weights)
    for name in ("cat", "svd"):
        close(delta(net, combine(adapters, weights, name, svd_rank=24, model=net)), expected, roundings=10**6)


# -- derivatives ------------------------------------------------------------------------------------------


def wide_pair(use_dora: bool = False) -> tuple[nn.Module, list[fa.Adapter]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 7)).double()
    config = fa.LoraConfig(r=2, lora_alpha=3, target_modules=["0"], init_lora_weights=False, use_dora=use_dora)
    adapters = [fa.init(model, config, seed=i) for i in range(2)]
    return model, adapters


@pytest.mark.parametrize("name", COMBINATIONS)
def test_gradients_agree_with_finite_differences(name: str) -> None:
    model, adapters = wide_pair()

    def weight(w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        first = adapters[0].replace(params={"0": {"lora_A": a, "lora_B": b}})
        new = combine([first, adapters[1]], w, name, density=DENSITY.get(name), svd_rank=3)
        return fa.merge(model, new)["0.weight"]

    p = adapters[0].params["0"]
    inputs = [tensor([0.6, -0.4]), p["lora_A"].clone(), p["lora_B"].clone()]
    assert torch.autograd.gradcheck(weight, [t.requires_grad_() for t in inputs], atol=1e-6)
    assert torch.autograd.gradcheck(weight, [t.requires_grad_() for t in inputs], check_forward_ad=True, atol=1e-6)


@pytest.mark.parametrize("name", ["cat", "svd", "ties_svd"])
def test_gradients_through_dora(name: str) -> None:
    """Of what the new adapter does, in the weights: the norms that DoRA keeps constant are constant on both sides."""
    model, adapters = wide_pair(use_dora=True)
    adapters = [a.map(lambda t: t * 1.2 if t.ndim == 1 else t) for a in adapters]

    def weight(w: Tensor) -> Tensor:
        new = combine(adapters, w, name, density=DENSITY.get(name), svd_rank=4, model=model)
        return fa.merge(model, new)["0.weight"]

    assert torch.autograd.gradcheck(weight, [tensor([0.6, -0.4]).requires_grad_()], atol=1e-6)


@pytest.mark.parametrize("name", COMBINATIONS)
@pytest.mark.parametrize("use_dora", [False, True])
def test_under_transforms(name: str, use_dora: bool) -> None:
    model, adapters = wide_pair(use_dora)
    x = torch.randn(3, 9).double()

    def loss(w: Tensor) -> Tensor:
        new = combine(adapters, w, name, density=DENSITY.get(name), svd_rank=3, model=model)
        return fa.functional_call(model, new, (x,)).square().mean()

    w = tensor([0.6, 0.4])
    variable = w.clone().requires_grad_()
    loss(variable).backward()
    torch.testing.assert_close(grad(loss)(w), variable.grad)
    _, tangent = jvp(loss, (w,), (torch.ones(2).double(),))
    torch.testing.assert_close(tangent, variable.grad.sum())
    several = torch.stack([w, w + 0.5, -w])
    torch.testing.assert_close(vmap(loss)(several), torch.stack([loss(each) for each in several]))
    per_leaf = grad(lambda params: loss_of(adapters[0].replace(params=params)))

    def loss_of(first: fa.Adapter) -> Tensor:
        new = combine([first, adapters[1]], w, name, density=DENSITY.get(name), svd_rank=3, model=model)
        return fa.functional_call(model, new, (x,)).square().mean()

    assert all(leaf.isfinite().all() for leaf in per_leaf(adapters[0].params)["0"].values())


def test_a_result_made_inside_a_transform_can_be_saved(tmp_path: Path) -> None:
    model, adapters = wide_pair()

    def loss(w: Tensor) -> tuple[Tensor, fa.Adapter]:
        new = combine(adapters, w, "cat")
        return fa.merge(model, new)["0.weight"].sum(), new

    _, new = grad(loss, has_aux=True)(tensor([0.6, 0.4]))
    fa.save(new, tmp_path)
    assert fa.load(tmp_path).config.r == 4
    close(delta(model, fa.load(tmp_path)), delta(model, combine(adapters, [0.6, 0.4], "cat")))


def test_learned_weights_find_the_mixture() -> None:
    """Gradient descent on the weights recovers the mixture that made the data."""
    model, adapters = wide_pair()
    truth = combine(adapters, [0.8, -0.3], "cat")
    x = torch.randn(64, 9).double()
    y = fa.functional_call(model, truth, (x,)).detach()

    def loss(w: Tensor) -> Tensor:
        return (fa.functional_call(model, combine(adapters, w, "cat"), (x,)) - y).square().mean()

    w = tensor([0.5, 0.5])
    for _ in range(200):
        w = w - 0.3 * grad(loss)(w)
    torch.testing.assert_close(w, tensor([0.8, -0.3]), atol=1e-4, rtol=0)


# -- random masks -----------------------------------------------------------------------------------------


def test_dare_depends_on_its_seed_alone() -> None:
    _, adapters = wide_pair()
    make = lambda **kw: combine(adapters, [0.5, 0.5], "dare_linear", density=0.5, **kw).params["0"]["lora_A"]  # noqa: E731
    state = torch.get_rng_state()
    first = make()
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(99)
    assert torch.equal(first, make(seed=0))
    assert not torch.equal(first, make(seed=1))
    torch.manual_seed(3)
    drawn = make(seed=None)
    assert not torch.equal(drawn, make(seed=None))
    torch.manual_seed(3)
    assert torch.equal(drawn, make(seed=None))


def test_masks_differ_between_sites_adapters_factors_and_experts() -> None:
    model = nn.Sequential(nn.Linear(40, 40, bias=False), nn.Linear(40, 40, bias=False))
    ones = fa.init(model, fa.LoraConfig(r=8, target_modules=["0", "1"])).map(torch.ones_like)
    new = combine([ones, ones], [1.0, 1.0], "dare_linear", density=0.5)
    masks = [new.params[path]["lora_A"].flatten() for path in ("0", "1")]
    masks.append(new.params["0"]["lora_B"].T.flatten())
    for one, other in itertools.combinations(masks, 2):
        assert torch.corrcoef(torch.stack([one, other]))[0, 1].abs() < 0.2
    # sums of two independent coins, each 0 or 2: a quarter, a half, a quarter
    shares = torch.stack([(masks[0] == value).float().mean() for value in (0.0, 2.0, 4.0)])
    torch.testing.assert_close(shares, torch.tensor([0.25, 0.5, 0.25]), atol=0.1, rtol=0)
    case = next(c for c in ALGEBRAIC if str(c) == "lora-plain-experts_grouped")
    base = case.model()
    adapter = case.adapter(base).map(torch.ones_like)
    a = combine([adapter, adapter], [1, 1], "dare_linear", density=0.5).params["0.w"]["lora_A"]
    assert not torch.equal(a[0], a[1])
    assert not torch.equal(a[1], a[2])


@pytest.mark.parametrize("density", [0.25, 0.8])
def test_dare_keeps_the_mean(density: float) -> None:
    """Over many draws: the share that is kept is the density, and the mean is the sum without dropping."""
    model, adapters = wide_pair()

    def draw(seed: int) -> Tensor:
        new = combine(adapters, [0.7, -0.5], "dare_linear_svd", density=density, svd_rank=7, seed=seed)
        return delta(model, new)["0.weight"]

    draws = torch.stack([draw(seed) for seed in range(600)])
    parts = [delta(model, a)["0.weight"] for a in adapters]
    mean = 0.7 * parts[0] - 0.5 * parts[1]
    variance = (1 / density - 1) * (0.49 * parts[0] ** 2 + 0.25 * parts[1] ** 2)
    error = (draws.mean(0) - mean) / (variance / 600).sqrt()
    assert error.abs().max() < 4.5
    assert 0.7 < error.std() < 1.3
    torch.testing.assert_close(draws.var(0), variance, rtol=0.5, atol=0)
    some = (draws.abs() > 1e-9).double().mean()
    assert some == pytest.approx(1 - (1 - density) ** 2, abs=0.02)


def test_shapes_that_could_be_experts() -> None:
    """A convolution of one channel with as many outputs as ranks; and one expert, whose leaves have no axis for it."""
    model = nn.Sequential(nn.Conv1d(1, 8, 3)).double()
    adapters = [lora(model, i, r=4, target_modules=["0"]) for i in range(2)]
    x = torch.randn(2, 1, 9).double()
    parts = [fa.functional_call(model, a, (x,)) - model(x) for a in adapters]
    for name in ("cat", "svd"):
        new = combine(adapters, [0.5, -2], name, svd_rank=8 if name == "svd" else None)
        torch.testing.assert_close(fa.functional_call(model, new, (x,)) - model(x), 0.5 * parts[0] - 2 * parts[1])
        assert new.config.rank(new.leaves("0")) == new.config.r == (8 if name == "cat" else 3)
    model = nn.ParameterDict({"w": nn.Parameter(torch.randn(1, 6, 4).double())})
    for use_dora in (False, True):
        adapters = [lora(model, i, target_modules=[], target_parameters=["w"], use_dora=use_dora) for i in range(2)]
        expected = weighted([delta(model, a) for a in adapters], [0.5, -2])
        for name in ("cat", "svd"):
            close(delta(model, combine(adapters, [0.5, -2], name, svd_rank=4, model=model)), expected)


def test_experts_are_pruned_one_by_one() -> None:
    case = next(c for c in ALGEBRAIC if str(c) == "lora-plain-experts_linear")
    _, adapters = trio(case)
    adapters = [a.map(lambda t: t * tensor([1.0, 10, 100]).view(-1, 1, 1) if t.ndim else t) for a in adapters]
    for name in ("ties", "magnitude_prune", "ties_svd", "svd"):
        new = combine(adapters, [0.5, 0.2, 0.3], name, density=0.5)
        for e in range(3):
            alone = [a.replace(params={"0.w": {n: t[e] for n, t in a.params["0.w"].items()}}) for a in adapters]
            one = combine(alone, [0.5, 0.2, 0.3], name, density=0.5)
            product = one.params["0.w"]["lora_B"] @ one.params["0.w"]["lora_A"]
            torch.testing.assert_close(new.params["0.w"]["lora_B"][e] @ new.params["0.w"]["lora_A"][e], product)


# -- bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([], []), {}, ValueError, "no adapters"),
        ((["a"], [1.0, 2.0]), {}, ValueError, "1 adapters and 2 weights"),
        ((["a", "b"], torch.ones(3)), {}, ValueError, "2 adapters and 3 weights"),
        ((["a", "b"], torch.ones(2, 1)), {}, ValueError, "shape"),
        ((["a", "b"], [torch.ones(1), 1.0]), {}, ValueError, r"weights\[0\] has shape \(1,\)"),
        ((["a", "b"], ["1", 1.0]), {}, TypeError, r"weights\[0\] is '1'"),
        ((["a", "b"], [float("nan"), 1.0]), {}, ValueError, "finite"),
        ((["a", "b"], [1, 1], "tie"), {}, ValueError, "Invalid combination_type: tie. Did you mean 'ties'"),
        ((["a", "b"], [1, 1], "ties"), {}, ValueError, "needs a density"),
        ((["a", "b"], [1, 1], "ties"), {"density": -0.1}, ValueError, "Density should be >= 0"),
        ((["a", "b"], [1, 1], "ties"), {"density": 1.1}, ValueError, "fraction"),
        ((["a", "b"], [1, 1], "dare_ties_svd"), {"density": 0}, ValueError, "above 0 for dare"),
        ((["a", "b"], [1, 1], "ties"), {"density": 0.5, "majority_sign_method": "most"}, RuntimeError, "method 'most'"),
        ((["a", "b"], [1, 1], "svd"), {"svd_rank": 0}, ValueError, "svd_rank must be positive"),
        ((["a", "b"], [1, 1], "svd"), {"svd_clamp": 2.0}, ValueError, "quantile"),
        ((["a", "wide"], [1, 1]), {}, ValueError, "must have the same r value"),
        ((["a", "dora"], [1, 1]), {}, ValueError, r"adapters\[0\] is lora, adapters\[1\] is dora"),
        ((["a", "ia3"], [1, 1]), {}, ValueError, "is ia3"),
        ((["a", "stack"], [1, 1]), {}, ValueError, r"adapters\[1\] is a stack"),
        ((["a", "expression"], [1, 1]), {}, ValueError, "should follow the same target modules type"),
        ((["a", "other"], [1, 1], "cat"), {}, ValueError, r"do not fit each other at 'layers.0.up'.*\(8,\).*\(6,\)"),
    ],
)  # fmt: skip
def test_bad_input(net: Net, arguments: Any, options: Any, error: type[Exception], message: str) -> None:
    other = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"up": nn.Linear(6, 12)})])}).double()
    known = {
        "a": lora(net, 0, target_modules=["up"]),
        "b": lora(net, 1, target_modules=["up"]),
        "wide": lora(net, 1, r=3, target_modules=["up"]),
        "dora": lora(net, 1, use_dora=True, target_modules=["up"]),
        "ia3": fa.init(net, fa.IA3Config(target_modules=["up"], feedforward_modules=[])),
        "stack": fa.stack([lora(net, 0), lora(net, 1)]),
        "expression": lora(net, 0, target_modules=r".*\.up"),
        "other": lora(other, 0, target_modules=["up"]),
    }
    names, *rest = arguments
    with pytest.raises(error, match=message):
        combine([known[name] for name in names], *rest, **options)


def test_what_is_no_adapter() -> None:
    with pytest.raises(TypeError, match=r"adapters\[0\] is a str"):
        combine(["a"], [0.5])  # pyright: ignore
    with pytest.raises(TypeError, match=r"adapters\[0\] is a dict"):
        scale({}, 0.5)  # pyright: ignore
    with pytest.raises(fa.AdapterError, match="no adapters"):
        add()


def test_a_rank_that_groups_do_not_divide() -> None:
    case = next(c for c in ALGEBRAIC if str(c) == "lora-plain-conv2d_grouped")
    _, adapters = trio(case)
    with pytest.raises(fa.SiteError, match="2 groups, which must divide the rank: svd_rank=3"):
        combine(adapters, [1, 1, 1], "svd", svd_rank=3)
    wide = fa.init(nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)).double(), fa.LoraConfig(r=4, target_modules=["0"]))
    assert combine([adapters[0], wide], [1, 1], "svd").params["0"]["lora_A"].shape[0] == 4


def test_a_cancelled_base_weight() -> None:
    model, adapters = wide_pair(use_dora=True)
    # an adapter that takes away all of W, twice over: g = 1 + 1 (0 - 1) = 0
    nothing = adapters[0].map(lambda t: t * 0 if t.ndim == 1 else t)
    with pytest.raises(fa.SiteError, match="cancel the base weight"):
        combine([nothing, fa.init(model, adapters[0].config)], [1, 1], "cat", model=model)


# -- the functions on tensors -----------------------------------------------------------------------------


def test_sparse_functions_under_vmap() -> None:
    tensors = [torch.randn(4, 5, 6) for _ in range(3)]
    weights = torch.tensor([0.5, -1.0, 2.0])
    for name in ("ties", "magnitude_prune"):
        function = getattr(sparsify, name)
        batched = vmap(lambda ts, f=function: f(ts, weights, 0.4))(tensors)
        loop = torch.stack([function([t[i] for t in tensors], weights, 0.4) for i in range(4)])
        torch.testing.assert_close(batched, loop)


def test_prune_says_what_is_wrong() -> None:
    t = torch.randn(4)
    with pytest.raises(ValueError, match="Unknown method 'median'"):
        sparsify.prune(t, 0.5, "median")
    with pytest.raises(ValueError, match=r"1 / 0"):
        sparsify.prune(t, 0, "random", rescale=True)
    with pytest.raises(ValueError, match="Density should be >= 0"):
        sparsify.prune(t, -1, "magnitude")
    with pytest.raises(RuntimeError, match="mask method 'most'"):
        sparsify.calculate_majority_sign_mask(t[None], "most")
    assert torch.equal(sparsify.prune(t, 0, "magnitude"), torch.zeros(4))
