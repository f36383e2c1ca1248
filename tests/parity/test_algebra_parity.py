"""`fa.combine` against PEFT's `add_weighted_adapter`, and where PEFT is wrong: its answer, ours and the dense truth."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.ia3.layer import IA3Layer
from peft.tuners.lora.layer import LoraLayer
from peft.utils import merge_utils
from peft_tools import Net, configs, layer_model, peft_load, peft_save, randomise, tiny
from torch import Tensor, nn

import funcadapt as fa
from funcadapt import sparsify
from funcadapt.algebra import combine
from funcadapt.combining import COMBINATIONS, SPARSE

WEIGHTS = [0.7, -0.4]
FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
OPTIONS: dict[str, dict[str, Any]] = {
    "linear": {},
    "cat": {},
    "svd": {},
    "svd of rank 3": {"svd_rank": 3},
    "svd with clamp": {"svd_clamp": 0.8},
    "svd with clamp, reduced": {"svd_clamp": 0.8, "svd_full_matrices": False},
    "ties": {"density": 0.5},
    "ties by frequency": {"density": 0.4, "majority_sign_method": "frequency"},
    "magnitude_prune": {"density": 0.3},
    "dare_linear": {"density": 0.6},
    "dare_ties": {"density": 0.6},
    "ties_svd": {"density": 0.5},
    "ties_svd by frequency": {"density": 0.5, "majority_sign_method": "frequency", "svd_rank": 2},
    "dare_linear_svd": {"density": 0.6},
    "dare_ties_svd": {"density": 0.6},
    "magnitude_prune_svd": {"density": 0.3},
}
KINDS = ["linear", "linear_no_bias", "hf_conv1d", "embedding", "conv2d", "conv2d_1x1"]


def pair(
    model: nn.Module, fields: list[dict[str, Any]], folder: Path, method: str = "lora"
) -> tuple[peft.PeftModel, list[fa.Adapter]]:
    """A PEFT model with random adapters "a0", "a1", ..., and the same as values."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, configs(method, **fields[0])[0], adapter_name="a0")
        for i, field in enumerate(fields[1:], 1):
            wrapped.add_adapter(f"a{i}", configs(method, **field)[0])
    for name, parameter in wrapped.named_parameters():
        parameter.requires_grad_(any(f".a{i}" in name for i in range(len(fields))))
    randomise(wrapped)
    peft_save(wrapped, folder, selected_adapters=[f"a{i}" for i in range(len(fields))])
    return wrapped.eval(), [fa.load(folder / f"a{i}") for i in range(len(fields))]


def add_weighted(wrapped: peft.PeftModel, count: int, weights: list[float], name: str, **options: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.add_weighted_adapter([f"a{i}" for i in range(count)], weights, "new", combination_type=name, **options)


def peft_leaves(wrapped: nn.Module, name: str) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for path, module in wrapped.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        leaves = {}
        for leaf in FACTORS:
            held = getattr(module, leaf)
            if name in held:
                leaves[leaf] = getattr(held[name], "weight", held[name]).detach()
        if leaves:
            leaves["delta"] = module.get_delta_weight(name).detach()
            found[path.removeprefix("base_model.model.")] = leaves
    return found


bernoulli = torch.bernoulli


def coins(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same masks from here on, whatever else is drawn: PEFT draws the new adapter's init first."""
    generator = torch.Generator().manual_seed(5)
    monkeypatch.setattr(torch, "bernoulli", lambda p: bernoulli(p, generator=generator))


def bare(model: nn.Module) -> nn.Module:
    """A model whose adapters were taken out."""
    return model.unload() if isinstance(model, peft.PeftModel) else model


def our_delta(model: nn.Module, adapter: fa.Adapter) -> dict[str, Tensor]:
    merged = fa.merge(model, adapter)
    return {n: (merged[n] - t).detach() for n, t in model.named_parameters() if n in merged and n.endswith("weight")}


def drawn_transposed(kind: str, label: str) -> bool:
    """Where PEFT drops values of the transposed update: the same law, other draws."""
    name = label.split()[0]
    return name.startswith("dare") and name.endswith("svd") and kind in ("hf_conv1d", "embedding")


@pytest.mark.parametrize(
    ("kind", "label"), [(kind, label) for kind in KINDS for label in OPTIONS if not drawn_transposed(kind, label)]
)
def test_the_same_numbers_as_peft(kind: str, label: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, target = layer_model(kind)
    fields = [{"r": 4, "lora_alpha": 6, **target}, {"r": 4, "lora_alpha": 3, **target}]
    wrapped, adapters = pair(model, fields, tmp_path)
    name = label.split()[0]
    coins(monkeypatch)
    add_weighted(wrapped, 2, WEIGHTS, name, **OPTIONS[label])
    theirs = peft_leaves(wrapped, "new")
    wrapped.set_adapter("new")
    expected = wrapped(x).detach()
    coins(monkeypatch)
    new = combine(adapters, WEIGHTS, name, seed=None, **OPTIONS[label])
    assert set(new.params) == set(theirs)
    base = bare(wrapped)
    for path, delta in our_delta(base, new).items():
        torch.testing.assert_close(delta, theirs[path.removesuffix(".weight")]["delta"], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(fa.functional_call(base, new, (x,)), expected, atol=2e-5, rtol=1e-4)
    if "svd" not in name or "clamp" in label:  # singular vectors are what they are up to a sign
        for path, leaves in theirs.items():
            for leaf in leaves.keys() - {"delta"}:
                torch.testing.assert_close(new.params[path][leaf], leaves[leaf], atol=1e-5, rtol=1e-5)
    ours, peft_config = new.config, wrapped.peft_config["new"]
    assert (ours.r, ours.lora_alpha) == (peft_config.r, peft_config.lora_alpha)
    assert set(ours.target_modules) == set(peft_config.target_modules)


@pytest.mark.parametrize("name", ["linear", "cat", "ties", "magnitude_prune", "dare_linear"])
@pytest.mark.parametrize("kind", ["conv1d", "conv3d", "conv2d_grouped"])
def test_leaf_by_leaf_on_other_convolutions(
    kind: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _, target = layer_model(kind)
    wrapped, adapters = pair(model, [{"r": 4, "lora_alpha": alpha, **target} for alpha in (6, 3)], tmp_path)
    options = {"density": 0.5} if name in SPARSE else {}
    if kind == "conv2d_grouped" and name == "cat":
        # there the ranks of all groups are side by side: see the defects
        return
    coins(monkeypatch)
    add_weighted(wrapped, 2, WEIGHTS, name, **options)
    coins(monkeypatch)
    new = combine(adapters, WEIGHTS, name, seed=None, **options)
    layer = wrapped.base_model.model.inner["layer"]
    for leaf in ("lora_A", "lora_B"):
        expected = getattr(layer, leaf)["new"].weight
        torch.testing.assert_close(new.params["inner.layer"][leaf], expected.detach(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["cat", "svd"])
def test_mixed_ranks_and_patterns_in_a_language_model(name: str, tmp_path: Path) -> None:
    model = tiny("llama")
    fields = [
        {"r": 2, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 3}},
        {"r": 3, "lora_alpha": 2, "target_modules": ["q_proj", "down_proj"], "alpha_pattern": {"down_proj": 7}},
        {"r": 1, "lora_alpha": 2, "target_modules": ["embed_tokens", "up_proj"]},
    ]
    wrapped, adapters = pair(model, fields, tmp_path)
    weights = [0.5, -1.0, 2.0]
    add_weighted(wrapped, 3, weights, name)
    theirs = peft_leaves(wrapped, "new")
    new = combine(adapters, weights, name)
    base = bare(wrapped)
    deltas = our_delta(base, new)
    assert {path + ".weight" for path in theirs} == set(deltas)
    for path, leaves in theirs.items():
        torch.testing.assert_close(deltas[f"{path}.weight"], leaves["delta"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["linear", "embedding", "conv2d"])
def test_one_adapter_alone_is_scaled(kind: str, tmp_path: Path) -> None:
    for name in COMBINATIONS:
        model, x, target = layer_model(kind)
        wrapped, adapters = pair(model, [{"r": 4, "lora_alpha": 6, **target}], tmp_path / name)
        add_weighted(wrapped, 1, [-0.6], name, density=0.5)
        wrapped.set_adapter("new")
        expected = wrapped(x).detach()
        out = fa.functional_call(bare(wrapped), combine(adapters, [-0.6], name, density=0.5), (x,))
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)


def test_a_saved_combination_is_read_by_peft(tmp_path: Path) -> None:
    model, x, target = layer_model("linear")
    wrapped, adapters = pair(model, [{"r": 4, "lora_alpha": 6, **target}, {"r": 2, **target}], tmp_path)
    base = bare(wrapped)
    for name in ("cat", "svd"):
        new = combine(adapters, WEIGHTS, name)
        expected = fa.functional_call(base, new, (x,))
        fa.save(new, tmp_path / name)
        fresh, _, _ = layer_model("linear")
        torch.testing.assert_close(peft_load(fresh, tmp_path / name)(x).detach(), expected.detach())


# -- (IA)^3 -----------------------------------------------------------------------------------------------


def ia3_vectors(wrapped: nn.Module, name: str) -> dict[str, Tensor]:
    return {
        path.removeprefix("base_model.model."): module.ia3_l[name].detach()
        for path, module in wrapped.named_modules()
        if isinstance(module, IA3Layer) and name in module.ia3_l
    }


def test_ia3_is_the_weighted_sum(tmp_path: Path) -> None:
    field = {"target_modules": ["q_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    wrapped, adapters = pair(tiny("llama"), [field, field], tmp_path, "ia3")
    wrapped.base_model.add_weighted_adapter(["a0", "a1"], WEIGHTS, "new")
    new = combine(adapters, WEIGHTS)
    theirs = ia3_vectors(wrapped, "new")
    assert set(theirs) == set(new.params)
    for path, vector in theirs.items():
        torch.testing.assert_close(new.params[path]["ia3_l"], vector)
    alone = combine(adapters[:1], [0.5])
    for path, leaves in alone.params.items():
        torch.testing.assert_close(leaves["ia3_l"], 0.5 * adapters[0].params[path]["ia3_l"])


def test_ia3_where_one_adapter_has_nothing(tmp_path: Path) -> None:
    """PEFT takes an adapter that does not touch a layer for one that switches it off."""
    fields = [{"target_modules": ["layer"], "feedforward_modules": []}, {"target_modules": ["other"]}]
    fields[1]["feedforward_modules"] = []
    model = nn.ModuleDict({"layer": nn.Linear(4, 5), "other": nn.Linear(4, 5)})
    wrapped, adapters = pair(model, fields, tmp_path, "ia3")
    wrapped.base_model.add_weighted_adapter(["a0", "a1"], [0.5, 0.5], "new")
    theirs = ia3_vectors(wrapped, "new")["layer"]
    own = adapters[0].params["layer"]["ia3_l"]
    torch.testing.assert_close(theirs, 0.5 * own)  # PEFT
    new = combine(adapters, [0.5, 0.5])
    torch.testing.assert_close(new.params["layer"]["ia3_l"], 0.5 * own + 0.5)  # ours
    truth = [fa.merge(bare(wrapped), adapter).get("layer.weight", model["layer"].weight) for adapter in adapters]
    merged = fa.merge(model, new)["layer.weight"]
    torch.testing.assert_close(merged, 0.5 * truth[0] + 0.5 * truth[1])


# -- defects ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "cat", "svd", "ties", "magnitude_prune_svd"])
def test_b9_rank_stabilised_lora(name: str, tmp_path: Path) -> None:
    """PEFT sets lora_alpha = r and keeps use_rslora, so that the new scaling is sqrt(r) and not 1."""
    model, _, target = layer_model("linear")
    fields = [{"r": 4, "lora_alpha": alpha, "use_rslora": True, **target} for alpha in (6, 3)]
    wrapped, adapters = pair(model, fields, tmp_path)
    options = {"density": 0.5} if name.removesuffix("_svd") in SPARSE else {}
    add_weighted(wrapped, 2, WEIGHTS, name, **options)
    theirs = peft_leaves(wrapped, "new")["inner.layer"]["delta"]
    separate = [peft_leaves(wrapped, f"a{i}")["inner.layer"]["delta"] for i in (0, 1)]
    base = bare(wrapped)
    ours = our_delta(base, combine(adapters, WEIGHTS, name, **options))["inner.layer.weight"]
    r = 8 if name == "cat" else 4
    torch.testing.assert_close(theirs, ours * r**0.5, atol=1e-5, rtol=1e-4)
    if name == "cat":
        torch.testing.assert_close(ours, 0.7 * separate[0] - 0.4 * separate[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["conv1d", "conv3d"])
def test_b9_decompositions_of_convolutions(kind: str, tmp_path: Path) -> None:
    """PEFT reshapes the SVD of a 2-D convolution alone."""
    model, x, target = layer_model(kind)
    wrapped, adapters = pair(model, [{"r": 2, "lora_alpha": alpha, **target} for alpha in (6, 3)], tmp_path)
    with pytest.raises((RuntimeError, IndexError)):
        add_weighted(wrapped, 2, WEIGHTS, "svd")
    fresh, _, _ = layer_model(kind)
    new = combine(adapters, WEIGHTS, "svd", svd_rank=4)
    parts = [fa.functional_call(fresh, a, (x,)).atanh() - fresh(x).atanh() for a in adapters]
    out = fa.functional_call(fresh, new, (x,)).atanh() - fresh(x).atanh()
    torch.testing.assert_close(out, 0.7 * parts[0] - 0.4 * parts[1], atol=1e-3, rtol=1e-3)


def test_cat_on_a_grouped_convolution(tmp_path: Path) -> None:
    """PEFT puts the adapters' ranks one behind the other, where the groups expect their own: another convolution."""
    torch.manual_seed(0)
    model, x, target = nn.Conv2d(4, 6, 3, groups=2), torch.randn(2, 4, 5, 5), {"target_modules": ["layer"]}
    model = Linear(model)
    wrapped, adapters = pair(model, [{"r": 4, "lora_alpha": alpha, **target} for alpha in (6, 3)], tmp_path)
    add_weighted(wrapped, 2, WEIGHTS, "cat")
    wrapped.set_adapter("new")
    theirs = wrapped(x).detach()
    base = bare(wrapped)
    truth = base(x) + sum(
        w * (fa.functional_call(base, a, (x,)) - base(x)) for w, a in zip(WEIGHTS, adapters, strict=True)
    )
    ours = fa.functional_call(base, combine(adapters, WEIGHTS, "cat"), (x,))
    torch.testing.assert_close(ours, truth, atol=1e-5, rtol=1e-4)
    assert (theirs - truth).abs().max() > 0.1


class Linear(nn.Module):
    """A layer and nothing else, under the name `layer`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def test_biases_of_b_are_lost(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, target = torch.randn(3, 6), {"target_modules": ["layer"]}
    fields = [{"r": 2, "lora_alpha": alpha, "lora_bias": True, **target} for alpha in (6, 3)]
    wrapped, adapters = pair(Linear(nn.Linear(6, 5)), fields, tmp_path)
    add_weighted(wrapped, 2, WEIGHTS, "cat")
    assert not wrapped.base_model.model.layer.lora_B["new"].bias.any()  # PEFT
    base = bare(wrapped)
    truth = base(x) + sum(
        w * (fa.functional_call(base, a, (x,)) - base(x)) for w, a in zip(WEIGHTS, adapters, strict=True)
    )
    ours = fa.functional_call(base, combine(adapters, WEIGHTS, "cat"), (x,))
    torch.testing.assert_close(ours, truth, atol=1e-5, rtol=1e-4)


def test_magnitudes_of_dora_are_lost(tmp_path: Path) -> None:
    """In PEFT even a copy of one adapter is another adapter."""
    torch.manual_seed(0)
    x, target = torch.randn(3, 6), {"target_modules": ["layer"]}
    fields = [{"r": 2, "lora_alpha": alpha, **target} for alpha in (6, 3)]
    wrapped, adapters = pair(Linear(nn.Linear(6, 5)), fields, tmp_path, "dora")
    wrapped.set_adapter("a0")
    truth = wrapped(x).detach()
    add_weighted(wrapped, 1, [1.0], "linear")
    wrapped.set_adapter("new")
    assert (wrapped(x) - truth).abs().max() > 0.1  # PEFT
    base = bare(wrapped)
    torch.testing.assert_close(fa.functional_call(base, combine(adapters[:1], [1.0]), (x,)), truth)  # ours
    both = base(x) + sum(
        w * (fa.functional_call(base, a, (x,)) - base(x)) for w, a in zip(WEIGHTS, adapters, strict=True)
    )
    for name in ("cat", "svd"):
        ours = fa.functional_call(base, combine(adapters, WEIGHTS, name, svd_rank=4, model=base), (x,))
        torch.testing.assert_close(ours, both, atol=1e-5, rtol=1e-4)


def test_saved_modules_are_lost(tmp_path: Path) -> None:
    model = tiny("llama_cls")
    fields = [{"r": 2, "target_modules": ["q_proj"]} for _ in range(2)]
    fields[0]["modules_to_save"] = ["score"]
    wrapped, adapters = pair(model, fields, tmp_path)
    trained = adapters[0].params["score"]["weight"]
    before = wrapped.base_model.model.score.original_module.weight.detach().clone()
    add_weighted(wrapped, 2, WEIGHTS, "linear")
    theirs = wrapped.base_model.model.score.modules_to_save["new"].weight
    assert torch.equal(theirs, before)  # PEFT: not the trained head
    assert not torch.equal(theirs, trained)
    assert combine(adapters, WEIGHTS).params["score"]["weight"] is trained  # ours


def test_patterns_are_lost_in_the_config(tmp_path: Path) -> None:
    """PEFT's config says rank 4 everywhere, where the pattern's factors have rank 2: it cannot read its own file."""
    model, x = Net(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 5))), torch.randn(3, 6)
    target = {"target_modules": ["layer.0", "layer.1"], "rank_pattern": {r"layer\.1": 2}}
    wrapped, adapters = pair(model, [{"r": 4, **target}, {"r": 4, **target}], tmp_path)
    add_weighted(wrapped, 2, WEIGHTS, "linear")
    peft_save(wrapped, tmp_path, selected_adapters=["new"])
    fresh = Net(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 5)))
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft_load(fresh, tmp_path / "new")
    base = bare(wrapped)
    ours = combine(adapters, WEIGHTS)
    fa.save(ours, tmp_path / "ours")
    reloaded = fa.functional_call(base, fa.load(tmp_path / "ours", model=base), (x,))
    torch.testing.assert_close(reloaded, fa.functional_call(base, ours, (x,)))


# -- errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ([{"r": 2}, {"r": 4}], "linear"),
        ([{"r": 2}, {"r": 4}], "ties"),
        ([{}, {"target_modules": ".*layer"}], "linear"),
        ([{}, {}], "sum"),
    ],
)
def test_peft_raises_the_same(fields: list[dict[str, Any]], name: str, tmp_path: Path) -> None:
    model, _, target = layer_model("linear")
    wrapped, adapters = pair(model, [{**target, **field} for field in fields], tmp_path)
    with pytest.raises(ValueError, match=r".") as theirs:
        add_weighted(wrapped, 2, WEIGHTS, name, density=0.5)
    with pytest.raises(ValueError, match=re.escape(str(theirs.value)[:29])):
        combine(adapters, WEIGHTS, name, density=0.5)


# -- the functions on tensors -----------------------------------------------------------------------------


def test_every_name_of_merge_utils() -> None:
    theirs = {name: f for name, f in vars(merge_utils).items() if inspect.isfunction(f)}
    for name, function in theirs.items():
        ours = inspect.signature(getattr(sparsify, name)).parameters
        expected = inspect.signature(function).parameters
        assert list(ours)[: len(expected)] == list(expected), name
        for parameter in expected:
            assert ours[parameter].default == expected[parameter].default


@settings(deadline=None, max_examples=60)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    count=st.integers(1, 4),
    density=st.floats(0.05, 0.99),
    majority=st.sampled_from(["total", "frequency"]),
    seed=st.integers(0, 1000),
)
def test_sparse_sums_are_peft_s(shape: list[int], count: int, density: float, majority: str, seed: int) -> None:
    torch.manual_seed(seed)
    tensors = [torch.randn(shape) for _ in range(count)]
    weights = torch.randn(count)
    calls: Mapping[str, tuple[Any, ...]] = {
        "task_arithmetic": (),
        "magnitude_prune": (density,),
        "ties": (density, majority),
        "dare_linear": (density,),
        "dare_ties": (density, majority),
    }
    for name, options in calls.items():
        torch.manual_seed(seed)
        theirs = getattr(merge_utils, name)([t.clone() for t in tensors], weights, *options)
        torch.manual_seed(seed)
        assert torch.equal(getattr(sparsify, name)(tensors, weights, *options), theirs), name
    with pytest.warns(UserWarning, match="no pruning will be performed"):
        assert sparsify.prune(tensors[0], 1.0, "magnitude") is tensors[0]
