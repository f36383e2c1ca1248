"""AdaLoRA against PEFT: layers, configs, files, and how ranks evolve over a training."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from cases import KINDS, VARIANTS, Case, tolerance
from peft.utils import constants
from peft_tools import (
    config_file,
    get_peft_model_state_dict,
    layer_model,
    logits,
    peft_load,
    peft_save,
    raw,
    same_adapters,
    same_tensors,
    tiny,
    tokens,
    wrap,
)
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import funcadapt as fa
from funcadapt import allocation, targets
from funcadapt.config import config_from_dict
from funcadapt.methods import adalora
from funcadapt.methods.adalora import AdaLoraConfig
from funcadapt.parts import adalora_leaves
from funcadapt.sites import describe

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::RuntimeWarning:peft")

# -- configs ----------------------------------------------------------------------------------------------


def as_json(values: dict[str, Any]) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        return sorted(value) if isinstance(value, set) else getattr(value, "value", value)

    return {
        k: plain(v)
        for k, v in json.loads(json.dumps(values, default=plain)).items()
        if k not in ("peft_version", "runtime_config")
    }


def test_every_field_and_default() -> None:
    assert as_json(peft.AdaLoraConfig(total_step=5).to_dict()) == as_json(AdaLoraConfig(total_step=5).to_dict())


SAME: list[dict[str, Any]] = [
    {"target_modules": ["q"], "init_r": 6, "target_r": 2, "tinit": 3, "tfinal": 4, "deltaT": 2, "total_step": 50},
    {"target_modules": "all-linear", "beta1": 0.5, "beta2": 0.9, "orth_reg_weight": 0.0, "total_step": 1},
    {"rank_pattern": {"a.lora_E": [True, False]}, "total_step": 9, "lora_dropout": 0.1, "bias": "all"},
]


@pytest.mark.parametrize("fields", SAME)
def test_to_dict_is_peft_s(fields: dict[str, Any]) -> None:
    ours = AdaLoraConfig(**fields)
    assert as_json(peft.AdaLoraConfig(**fields).to_dict()) == as_json(ours.to_dict())
    assert config_from_dict(json.loads(json.dumps(ours.to_dict()))) == ours
    assert hash(ours) == hash(AdaLoraConfig(**fields))


REFUSED_BY_BOTH: list[dict[str, Any]] = [
    {},
    {"total_step": 0},
    {"total_step": -3},
    {"total_step": 10, "orth_reg_weight": -0.5},
    {"total_step": 10, "tinit": 10},
    {"total_step": 10, "tinit": 5, "tfinal": 5},
    {"total_step": 10, "use_dora": True},
    {"total_step": 10, "target_modules": ".*q", "layers_to_transform": [1]},
    {"total_step": 10, "target_modules": ["q"], "layers_pattern": "h"},
]


@pytest.mark.parametrize("fields", REFUSED_BY_BOTH)
def test_peft_s_errors(fields: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)) as expected:
        peft.AdaLoraConfig(**fields)
    with pytest.raises(type(expected.value)) as got:
        AdaLoraConfig(**fields)
    words = str(expected.value).removeprefix("PeftType.").split(". ")[0].rstrip(" .")
    assert str(got.value).startswith(words[:60])


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"init_r": 0}, ValueError, "`init_r` should be at least 1.*0"),
        ({"target_r": -1}, ValueError, "`target_r` should be at least 0"),
        ({"deltaT": 0}, ValueError, "`deltaT`"),
        ({"tinit": -1}, ValueError, "`tinit`"),
        ({"tfinal": -1}, ValueError, "`tfinal`"),
        ({"beta1": 1.0}, ValueError, "`beta1` should be between 0 and 1"),
        ({"beta2": 0.0}, ValueError, "`beta2`"),
        ({"orth_reg_weight": float("nan")}, ValueError, "`orth_reg_weight`"),
        ({"loftq_config": {"loftq_bits": 4}}, ValueError, "ADALORA does not support LOFTQ"),
        ({"total_step": 9.5}, TypeError, "`total_step`"),
        ({"rank_pattern": {"a": 3}}, TypeError, "`rank_pattern` of AdaLoraConfig must be Mapping"),
        ({"rank_pattern": {"a": [1, 0]}}, TypeError, "`rank_pattern`"),
        ({"rank_pattern": [True]}, TypeError, "`rank_pattern`"),
        ({"megatron_config": {"a": 1}}, NotImplementedError, "megatron_config"),
    ],
)
def test_values_that_peft_would_take(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    peft.AdaLoraConfig(**{"total_step": 10, **fields})
    with pytest.raises(error, match=message):
        AdaLoraConfig(**{"total_step": 10, **fields})


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 4},
        {"use_rslora": True},
        {"lora_bias": True},
        {"alpha_pattern": {"q": 2}},
        {"init_lora_weights": "gaussian"},
    ],
)
def test_fields_that_do_nothing_warn(fields: dict[str, Any]) -> None:
    """PEFT says so of `r` alone."""
    with pytest.warns(UserWarning, match=f"`{next(iter(fields))}` is not used in AdaLora and will be ignored"):
        AdaLoraConfig(total_step=9, **fields)


def test_default_targets_are_peft_s() -> None:
    table = constants.TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING
    assert {k: v if isinstance(v, str) else [*v] for k, v in targets.ADALORA.items()} == table
    assert AdaLoraConfig(total_step=3).for_model("bart").target_modules == tuple(table["bart"])


# -- layers -----------------------------------------------------------------------------------------------

FIELDS: dict[str, Any] = {"init_r": 4, "target_r": 2, "total_step": 40, "tinit": 5, "tfinal": 10, "lora_alpha": 6}
LAYERS = ["linear", "linear_no_bias", "hf_conv1d", "conv2d", "conv2d_1x1"]
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "defaults": ("llama", {}),
    "all-linear": ("llama", {"target_modules": "all-linear", "lora_alpha": -1, "task_type": "CAUSAL_LM"}),
    "gpt2": ("gpt2", {"bias": "all"}),
    "bert": ("bert_cls", {"target_modules": ["query", "dense"], "bias": "lora_only", "task_type": "SEQ_CLS"}),
    "saved": ("llama", {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]}),
    "tokens": ("llama", {"target_modules": ["v_proj"], "trainable_token_indices": [3, 5]}),
}


def frozen(wrapped: Any) -> Any:
    """PEFT trains `ranknum` where the base is not float32, see `test_peft_trains_ranknum`: put it back."""
    for name, p in wrapped.named_parameters():
        if "ranknum" in name:
            p.requires_grad_(False).fill_(float(wrapped.peft_config["default"].init_r))
    return wrapped


class Pair:
    """One adapter in PEFT and here, in float64."""

    def __init__(self, name: str, folder: Path, **fields: Any) -> None:
        fields = {**FIELDS, **fields}
        if name in MODELS:
            family, own = MODELS[name]
            fields = {**fields, **own}
            self.make = lambda: tiny(family).double()
            self.inputs: dict[str, Any] = tokens(family)
        else:
            _, x, target = layer_model(name)
            fields = {**fields, **target}
            self.make = lambda: layer_model(name)[0].double().eval()
            self.inputs = {"x": x.double()}
        self.wrapped: Any = frozen(wrap(self.make(), peft.AdaLoraConfig(**fields)).double())
        self.model = self.make()
        self.folder = peft_save(self.wrapped, folder / "theirs")
        self.adapter = fa.load(self.folder, model=self.model)

    def theirs(self) -> Tensor:
        return logits(self.wrapped(**self.inputs))

    def ours(self, adapter: fa.Adapter | None = None) -> Tensor:
        return logits(fa.functional_call(self.model, adapter or self.adapter, (), self.inputs))


def close(a: Tensor, b: Tensor, what: str = "") -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10, msg=lambda m: f"{what}: {m}")


@pytest.mark.parametrize("name", [*LAYERS, *MODELS])
def test_outputs_gradients_and_files(name: str, tmp_path: Path) -> None:
    pair = Pair(name, tmp_path)
    assert (pair.theirs() - logits(pair.make()(**pair.inputs))).abs().max() > 1e-3
    close(pair.ours(), pair.theirs())
    probe = torch.randn(pair.theirs().shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (pair.theirs() * probe).sum().backward()
    leaves = pair.adapter.replace(params=pytree.tree_map(lambda t: t.clone().requires_grad_(), pair.adapter.params))
    (pair.ours(leaves) * probe).sum().backward()
    inside = dict(pair.wrapped.base_model.model.named_parameters())
    checked = 0
    for path, p in leaves.params.items():
        for leaf in set(p) & {"lora_A", "lora_E", "lora_B"}:
            close(p[leaf].grad, inside[f"{path}.{leaf}.default"].grad, f"{path}.{leaf}")  # pyright: ignore
            checked += 1
    assert checked == sum("lora_" in key for key, p in inside.items() if p.requires_grad) >= 3
    # and back to PEFT
    fa.save(pair.adapter, tmp_path / "ours")
    same_tensors(raw(pair.folder), raw(tmp_path / "ours"))
    assert config_file(pair.folder) == config_file(tmp_path / "ours")
    same_adapters(pair.adapter, fa.load(tmp_path / "ours"))
    close(logits(peft_load(pair.make(), tmp_path / "ours").double()(**pair.inputs)), pair.theirs())


@pytest.mark.parametrize("name", [*LAYERS, "defaults", "gpt2"])
def test_merged_weights(name: str, tmp_path: Path) -> None:
    pair = Pair(name, tmp_path)
    merged = fa.merge(pair.model, pair.adapter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = dict(pair.wrapped.merge_and_unload().named_parameters(remove_duplicate=False))
    base = dict(pair.make().named_parameters(remove_duplicate=False))
    changed = {key for key in base if not torch.equal(theirs[key], base[key])}
    assert changed
    assert changed <= set(merged)
    for key, weight in merged.items():
        close(weight, theirs[key], key)


@pytest.mark.parametrize("name", ["linear", "hf_conv1d", "conv2d", "defaults"])
def test_training_with_dropout(name: str, tmp_path: Path) -> None:
    pair = Pair(name, tmp_path, lora_dropout=0.4)
    pair.wrapped.train()
    pair.model.train()
    torch.manual_seed(3)
    theirs = pair.theirs()
    torch.manual_seed(3)
    close(pair.ours(), theirs)
    torch.manual_seed(4)
    assert not torch.allclose(pair.ours(), theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_narrow_bases(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """PEFT keeps the adapter in float32; the output is of the base's dtype."""
    model, x, target = layer_model(name)
    wrapped = frozen(wrap(model.to(dtype), peft.AdaLoraConfig(**FIELDS, **target)))
    adapter = fa.load(peft_save(wrapped, tmp_path))
    assert next(adapter.tensors()).dtype == torch.float32
    with torch.no_grad():
        expected = wrapped(x.to(dtype))
        got = fa.functional_call(layer_model(name)[0].to(dtype), adapter, (x.to(dtype),))
    assert got.dtype == expected.dtype == dtype
    torch.testing.assert_close(got, expected, **tolerance(dtype, 1.0, roundings=4))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_dense_form_is_the_one_of_the_paper(kind: Any) -> None:
    """W + s / (n + 1e-5) B diag(E) A at every kind, also those that PEFT refuses."""
    case = Case(adalora.METHOD, VARIANTS["adalora"][0], kind)
    model = case.model()
    adapter = case.adapter(model)
    merged, expected = fa.merge(model, adapter), {}
    for path in adapter.params:
        p, (site, module) = adapter.leaves(path), describe(model, path)
        w = getattr(module, site.parameter).detach()
        w = w.transpose(-2, -1) if site.transposed else w
        delta = torch.einsum("...or,...r,...ri->...oi", p["lora_B"], p["lora_E"][..., 0], p["lora_A"])
        new = w + (delta * p["scaling"] / (p["ranknum"] + 1e-5)).reshape(w.shape)
        expected[site.weight_name] = new.transpose(-2, -1) if site.transposed else new
    assert sorted(merged) == sorted(expected)
    for name, weight in merged.items():
        torch.testing.assert_close(weight, expected[name], **tolerance(kind.exact, 8.0))


@pytest.mark.parametrize("kind", [k for k in KINDS if not k.name.startswith("linear")], ids=lambda kind: kind.name)
def test_every_kind_has_files(kind: Any, tmp_path: Path) -> None:
    case = Case(adalora.METHOD, VARIANTS["adalora"][0], kind)
    model = case.model()
    adapter = case.adapter(model)
    told = adapter.replace(buffers=case.new(model).buffers)  # no scaling that the file has to tell
    fa.save(told, tmp_path)
    again = fa.load(tmp_path, model=model)
    same_adapters(again, told)


def test_an_unbatched_image() -> None:
    model, x = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)).double(), torch.randn(4, 7, 6, dtype=torch.float64)
    adapter = Case(adalora.METHOD, VARIANTS["adalora"][0], KINDS[7]).adapter(model)
    out = fa.functional_call(model, adapter, (x,))
    torch.testing.assert_close(out, fa.functional_call(model, adapter, (x[None],))[0])
    assert not torch.allclose(out, model(x))


@pytest.mark.parametrize("leaf", ["lora_A", "lora_E", "lora_B"])
@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_wrong_shapes_are_errors(name: str, leaf: str, tmp_path: Path) -> None:
    pair = Pair(name, tmp_path)
    ((path, p),) = pair.adapter.params.items()
    for wrong in (p[leaf][:1], p[leaf][:, :1], torch.cat([p[leaf], p[leaf]])):
        if wrong.shape == p[leaf].shape:
            continue
        broken = pair.adapter.replace(params={path: {**p, leaf: wrong}})
        with pytest.raises((fa.SiteError, RuntimeError)):
            pair.ours(broken)
        with pytest.raises((fa.SiteError, RuntimeError)):
            fa.merge(pair.model, broken)


# -- the evolution of ranks -------------------------------------------------------------------------------


class Training:
    """The same training of a tiny Llama in PEFT and here, step by step."""

    def __init__(self, folder: Path, **fields: Any) -> None:
        config = {**FIELDS, "init_r": 4, "target_r": 2, "target_modules": ["q_proj", "v_proj", "down_proj"]}
        config = {**config, "task_type": "CAUSAL_LM", **fields}  # without a task PEFT does not add the penalty
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.wrapped: Any = frozen(peft.get_peft_model(tiny("llama").double(), peft.AdaLoraConfig(**config)))
        self.model = tiny("llama").double()
        self.adapter = fa.load(peft_save(self.wrapped, folder / "start"), model=self.model)
        self.config: Any = self.adapter.config
        self.theirs = torch.optim.AdamW([p for p in self.wrapped.parameters() if p.requires_grad], lr=0.02)
        self.moments = fa.optim.adamw.init(self.adapter.params, stacked=False)
        self.state = allocation.start(self.config, self.adapter.params)
        self.generator = torch.Generator().manual_seed(7)
        self.thresholds: list[float] = []
        kthvalue = torch.kthvalue

        def spy(every: Tensor, k: int) -> Any:
            self.thresholds.append(kthvalue(every, k)[0].item())
            return kthvalue(every, k)

        self.spy = spy

    def loss(self, params: Any, ids: Tensor) -> Tensor:
        out = fa.functional_call(self.model, self.adapter.replace(params=params), (), {"input_ids": ids, "labels": ids})
        return out.loss + allocation.orthogonality(self.config, params)

    def step(self, step: int, patch: pytest.MonkeyPatch) -> dict[str, list[bool]] | None:
        """One step of both; every number must agree."""
        ids = torch.randint(2, 32, (2, 6), generator=self.generator)
        theirs = self.wrapped(input_ids=ids, labels=ids).loss
        theirs.backward()
        self.theirs.step()
        allocator, config = self.wrapped.base_model, self.wrapped.peft_config["default"]
        before = config.rank_pattern
        with patch.context() as inside:
            inside.setattr(torch, "kthvalue", self.spy)
            self.thresholds.clear()
            allocator.update_and_allocate(step)
        self.theirs.zero_grad()

        value = self.loss(self.adapter.params, ids)
        torch.testing.assert_close(value.float(), theirs.detach())  # transformers makes its losses in float32
        grads = torch.func.grad(lambda p: self.loss(p, ids))(self.adapter.params)
        params, self.moments = fa.optim.adamw.update(
            self.adapter.params, grads, self.moments, lr=torch.tensor(0.02, dtype=torch.float64)
        )
        values, after, pattern = allocation.update(self.config, self.state, params, grads, step)
        self.adapter, self.state = allocation.allocate(self.adapter.replace(params=params), grads, self.state, step)
        for path, e in values.items():
            assert torch.equal(e, self.adapter.params[path]["lora_E"])
            assert torch.equal(after.mask[path], self.state.mask[path])
        assert (pattern is not None) == bool(self.thresholds)
        if pattern is not None:
            found = {key.replace(".default", ""): kept for key, kept in config.rank_pattern.items()}
            assert pattern == found
            assert sorted(map(sum, pattern.values())) == sorted(map(sum, found.values()))
        else:
            assert config.rank_pattern is before
        for name, p in self.wrapped.base_model.model.named_parameters():
            if p.requires_grad:
                path, leaf = name.removesuffix(".default").rsplit(".", 1)
                ours = self.adapter.params[path][leaf]
                torch.testing.assert_close(ours, p.detach(), rtol=1e-7, atol=1e-9, msg=lambda m: f"{name}, {step}: {m}")
                if leaf == "lora_E":
                    assert torch.equal(ours == 0, p == 0)
        emas = allocator.rankallocator
        for name, ema in emas.exp_avg_ipt.items():
            path, leaf = name.removesuffix(".default").rsplit(".", 1)
            torch.testing.assert_close(self.state.sensitivity[path][leaf], ema.detach(), rtol=1e-6, atol=1e-12)
            torch.testing.assert_close(
                self.state.uncertainty[path][leaf], emas.exp_avg_unc[name], rtol=1e-6, atol=1e-12
            )
        return pattern


@pytest.mark.parametrize(
    "fields",
    [{}, {"deltaT": 3, "tinit": 2, "tfinal": 7}, {"tfinal": 0, "beta1": 0.5, "beta2": 0.7, "target_r": 1, "init_r": 3}],
    ids=["plain", "every third", "to the end"],
)
def test_the_whole_evolution(fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Training(tmp_path, **fields)
    kept: list[int] = []
    for step in range(42):
        pattern = run.step(step, monkeypatch)
        if pattern is not None:
            count = sum(map(sum, pattern.values()))
            scored = step < run.config.total_step - run.config.tfinal
            if scored:
                found = allocation.scores(run.state)
                left, due = allocation.budget(run.config, step, run.config.init_r * 6, run.config.target_r * 6)
                assert due
                limit = allocation.threshold(found, run.config.init_r * 6 - left)
                torch.testing.assert_close(limit.item(), run.thresholds[0], rtol=1e-6, atol=0)
                assert count == left
            kept.append(count)
    assert kept == sorted(kept, reverse=True)
    assert kept[-1] == run.config.target_r * 6 < kept[0]

    # both save what is left, and read each other's
    ids, theirs = tokens("llama"), peft_save(run.wrapped, tmp_path / "theirs")
    pruned = allocation.prune(run.adapter, allocation.rank_pattern(run.state.mask))
    assert pruned.num_parameters() < run.adapter.num_parameters()
    close(
        logits(fa.functional_call(run.model, pruned, (), ids)),
        logits(fa.functional_call(run.model, run.adapter, (), ids)),
    )
    for name, adapter in {
        "pruned": pruned,
        "masked": run.adapter.replace(config=pruned.config),
        "again": fa.load(theirs, model=run.model),
    }.items():
        fa.save(adapter, tmp_path / name)
        ours, expected = raw(tmp_path / name), raw(theirs)
        assert sorted(ours) == sorted(expected)
        for key, tensor in expected.items():
            torch.testing.assert_close(ours[key], tensor, rtol=1e-7, atol=1e-9)
        assert config_file(tmp_path / name) == config_file(theirs)
        again = fa.load(tmp_path / name, model=run.model)
        assert again.config.rank_pattern == pruned.config.rank_pattern  # pyright: ignore
        out = logits(peft_load(tiny("llama").double(), tmp_path / name).double()(**ids))
        torch.testing.assert_close(out, logits(run.wrapped.eval()(**ids)), rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(logits(fa.functional_call(run.model, again, (), ids)), out, rtol=1e-6, atol=1e-8)


def test_orthogonality_is_what_peft_adds(tmp_path: Path) -> None:
    pair = Pair("all-linear", tmp_path, orth_reg_weight=0.3)
    inputs = {**pair.inputs, "labels": pair.inputs["input_ids"]}
    with_penalty = pair.wrapped(**inputs).loss
    without = pair.wrapped.base_model.model(**inputs).loss
    added = allocation.orthogonality(pair.adapter.config, pair.adapter.params)  # pyright: ignore
    torch.testing.assert_close(added.float(), (with_penalty - without).detach())
    with_penalty.backward()
    inside = dict(pair.wrapped.base_model.model.named_parameters())
    grads = torch.func.grad(
        lambda p: (
            fa.functional_call(pair.model, pair.adapter.replace(params=p), (), inputs).loss
            + allocation.orthogonality(pair.adapter.config, p)  # pyright: ignore
        )
    )(pair.adapter.params)
    for path, g in grads.items():
        for leaf, tensor in g.items():
            close(tensor, inside[f"{path}.{leaf}.default"].grad)


def test_peft_adds_no_penalty_without_a_task(tmp_path: Path) -> None:
    """A defect of PEFT: only the classes of tasks call the tuner's forward, which adds it."""
    pair = Pair("defaults", tmp_path)
    inputs = {**pair.inputs, "labels": pair.inputs["input_ids"]}
    assert torch.equal(pair.wrapped(**inputs).loss, pair.wrapped.base_model.model(**inputs).loss)
    assert allocation.orthogonality(pair.adapter.config, pair.adapter.params) > 0.1  # pyright: ignore


@pytest.mark.parametrize(
    ("fields", "initial", "final"),
    [({"tinit": 3, "tfinal": 4, "deltaT": 2}, 24, 8), ({}, 12, 12), ({"deltaT": 5, "tfinal": 1}, 70, 0)],
)
def test_the_budget_is_peft_s(fields: dict[str, Any], initial: int, final: int) -> None:
    from peft.tuners.adalora.layer import RankAllocator

    theirs = RankAllocator(nn.Module(), peft.AdaLoraConfig(total_step=20, **fields), "default")
    theirs.init_bgt, theirs.target_bgt = initial, final
    ours = AdaLoraConfig(total_step=20, **fields)
    for step in range(25):
        assert allocation.budget(ours, step, initial, final) == theirs.budget_schedule(step)


# -- the allocator as pure functions ----------------------------------------------------------------------


def small(**fields: Any) -> tuple[nn.Module, fa.Adapter]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 5)).double()
    config = AdaLoraConfig(**{"init_r": 3, "target_r": 1, "total_step": 6, "target_modules": ["0", "2"], **fields})
    return model, fa.init(model, config)


def trained(adapter: fa.Adapter, steps: int, seed: int = 0) -> tuple[fa.Adapter, allocation.RankState]:
    """As many steps of something like a training."""
    generator = torch.Generator().manual_seed(seed)
    config: Any = adapter.config
    state = allocation.start(config, adapter.params)
    for step in range(steps):
        grads = pytree.tree_map(lambda t: torch.randn(t.shape, generator=generator, dtype=t.dtype), adapter.params)
        params = pytree.tree_map(lambda p, g: p - 0.1 * g, adapter.params, grads)
        adapter, state = allocation.allocate(adapter.replace(params=params), grads, state, step)
    return adapter, state


def test_vmap_is_a_loop() -> None:
    _, adapter = small()
    adapters = [adapter.map(lambda t, i=i: t + i) for i in range(3)]
    generator = torch.Generator().manual_seed(0)
    grads = [
        [
            pytree.tree_map(lambda t: torch.randn(t.shape, generator=generator, dtype=t.dtype), adapter.params)
            for _ in range(3)
        ]
        for _ in range(8)
    ]
    config: Any = adapter.config
    stack = fa.stack(adapters)
    state = torch.func.vmap(lambda p: allocation.start(config, p))(stack.params)
    states = [allocation.start(config, a.params) for a in adapters]
    for step, row in enumerate(grads):
        together = pytree.tree_map(lambda *g: torch.stack(g), *row)
        stack, state = torch.func.vmap(lambda a, g, s, step=step: allocation.allocate(a, g, s, step))(
            stack, together, state
        )
        for i, g in enumerate(row):
            adapters[i], states[i] = allocation.allocate(adapters[i], g, states[i], step)
            for a, b in zip(pytree.tree_leaves(states[i]), pytree.tree_leaves(state), strict=True):
                torch.testing.assert_close(a, b[i])
            for a, b in zip(adapters[i].tensors(), fa.unstack(stack)[i].tensors(), strict=True):
                torch.testing.assert_close(a, b)
    assert not all(m.all() for m in state.mask.values())
    patterns = [allocation.rank_pattern(s.mask) for s in states]
    assert patterns == [allocation.rank_pattern({p: m[i] for p, m in state.mask.items()}) for i in range(3)]


def test_nothing_is_changed_in_place() -> None:
    _, adapter = small()
    adapter, state = trained(adapter, 4)
    copies = pytree.tree_map(torch.clone, (adapter, state))
    grads = pytree.tree_map(torch.ones_like, adapter.params)
    for step in (1, 6, 7):
        allocation.allocate(adapter, grads, state, step)
    allocation.prune(adapter, allocation.rank_pattern(state.mask))
    for a, b in zip(pytree.tree_leaves((adapter, state)), pytree.tree_leaves(copies), strict=True):
        assert torch.equal(a, b)


def test_masks_stay_at_the_end_and_forgetting_starts_anew() -> None:
    _, adapter = small(tfinal=2)
    adapter, state = trained(adapter, 5)  # step 4 is the last allocation
    assert not any(t.any() for t in pytree.tree_leaves((state.sensitivity, state.uncertainty)))
    grown = {path: {**p, "lora_E": torch.ones_like(p["lora_E"])} for path, p in adapter.params.items()}
    for step in (5, 6, 100):
        again, later = allocation.allocate(adapter.replace(params=grown), grown, state, step)
        for path, mask in state.mask.items():
            assert torch.equal(again.params[path]["lora_E"][:, 0] != 0, mask)
            assert torch.equal(later.mask[path], mask)


def test_no_gradient_is_a_zero_gradient() -> None:
    _, adapter = small()
    config: Any = adapter.config
    state = allocation.start(config, adapter.params)
    ones = pytree.tree_map(torch.ones_like, adapter.params)
    none = {"0": ones["0"], "2": dict.fromkeys(ones["2"])}
    zero = {"0": ones["0"], "2": pytree.tree_map(torch.zeros_like, ones["2"])}
    for grads in (none, {"0": ones["0"]}):
        a, b = (allocation.importance(config, state, adapter.params, g) for g in (grads, zero))
        assert all(torch.equal(x, y) for x, y in zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True))


def test_narrow_leaves_are_scored_in_float32() -> None:
    """Products of four small numbers are zero in float16, and then PEFT masks everything."""
    _, adapter = small()
    adapter = adapter.to(torch.float16).map(lambda t: t + 1e-3 if t.ndim else t)
    grads = pytree.tree_map(lambda t: torch.full_like(t, 1e-4), adapter.params)
    config: Any = adapter.config
    state = allocation.importance(config, allocation.start(config, adapter.params), adapter.params, grads)
    assert all(s.dtype == torch.float32 and s.min() > 0 for s in allocation.scores(state).values())


@pytest.mark.parametrize("kind", ["padding", "groups"])
def test_convolutions_that_peft_gets_wrong(kind: str, tmp_path: Path) -> None:
    """PEFT pads with zeros whatever the layer does, and has no shape for groups. Ours is the dense truth."""
    layer = nn.Conv2d(4, 6, 3, padding=1, **({"groups": 2} if kind == "groups" else {"padding_mode": "circular"}))
    model, x = nn.Sequential(layer).double(), torch.randn(2, 4, 5, 6, dtype=torch.float64)
    wrapped = frozen(wrap(copy.deepcopy(model), peft.AdaLoraConfig(**FIELDS, target_modules=["0"])))
    if kind == "groups":
        with pytest.raises(RuntimeError, match="invalid for input of size"):
            wrapped(x)
        adapter = masked(fa.init(model, AdaLoraConfig(**FIELDS, target_modules=["0"])), {})
    else:
        adapter = fa.load(peft_save(wrapped, tmp_path), model=model)
    out = fa.functional_call(model, adapter, (x,))
    close(out, torch.func.functional_call(model, fa.merge(model, adapter), (x,)))
    if kind == "padding":
        assert not torch.allclose(wrapped(x), out, atol=1e-3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            close(wrapped.merge_and_unload()(x), out)


def test_peft_scales_by_what_is_left_after_loading(tmp_path: Path) -> None:
    """A defect of PEFT: without an alpha, loading a pruned adapter changes what it does. Our files prevent it."""
    wrapped: Any = frozen(
        wrap(small()[0], peft.AdaLoraConfig(**{**FIELDS, "lora_alpha": 0}, target_modules=["0", "2"]))
    )
    x, pattern = (
        torch.randn(7, 5, dtype=torch.float64),
        {"0.lora_E": [True, False] * 2, "2.lora_E": [True] * 3 + [False]},
    )
    wrapped.peft_config["default"].rank_pattern = pattern
    wrapped.base_model.rankallocator.mask_using_rank_pattern(wrapped.base_model.model, pattern)
    trained = wrapped(x)
    theirs = peft_save(wrapped, tmp_path / "theirs")
    assert not torch.allclose(peft_load(small()[0], theirs)(x), trained, atol=1e-3)
    model, adapter = small()[0], fa.load(theirs)
    close(fa.functional_call(model, adapter, (x,)), trained)
    fa.save(adapter, tmp_path / "ours")
    close(peft_load(small()[0], tmp_path / "ours").double()(x), trained)


def test_peft_trains_ranknum(tmp_path: Path) -> None:
    """A defect of PEFT: on a base that is not float32 the divisor is a trainable parameter, and it is not saved."""
    model, x, target = layer_model("linear")
    wrapped = wrap(model.bfloat16(), peft.AdaLoraConfig(**FIELDS, **target))
    layer = wrapped.base_model.model.inner["layer"]
    assert layer.ranknum["default"].requires_grad
    with torch.no_grad():
        layer.ranknum["default"].fill_(2.0)  # as if trained
        trained = wrapped(x.bfloat16())
        folder = peft_save(wrapped, tmp_path)
        again = peft_load(layer_model("linear")[0].bfloat16(), folder)(x.bfloat16())
        adapter = fa.load(folder)
        ours = fa.functional_call(layer_model("linear")[0].bfloat16(), adapter, (x.bfloat16(),))
        truth = layer_model("linear")[0].double()
        dense = torch.func.functional_call(truth, fa.merge(truth, adapter.to(torch.float64)), (x.double(),))
    assert "ranknum" not in adapter.params["inner.layer"]
    assert not torch.allclose(trained, again, atol=1e-2)
    torch.testing.assert_close(ours, again, **tolerance(torch.bfloat16))
    torch.testing.assert_close(ours.double(), dense, **tolerance(torch.bfloat16))


def test_a_target_that_is_the_start_masks_nothing(tmp_path: Path) -> None:
    _, adapter = small(target_r=3)
    before, state = trained(adapter, 8)
    assert all(m.all() for m in state.mask.values())
    wrapped: Any = wrap(
        tiny("llama"), peft.AdaLoraConfig(init_r=3, target_r=3, total_step=6, target_modules=["q_proj"])
    )
    wrapped(**tokens("llama")).logits.sum().backward()
    with pytest.raises(RuntimeError, match="kthvalue"):
        wrapped.base_model.update_and_allocate(1)
    assert before.num_parameters() == adapter.num_parameters()


def test_bad_input() -> None:
    model, adapter = small()
    config: Any = adapter.config
    state = allocation.start(config, adapter.params)
    grads = pytree.tree_map(torch.zeros_like, adapter.params)
    with pytest.raises(fa.AdapterError, match=r"step 6 = total_step - tfinal .* no triplet has a score"):
        allocation.allocate(adapter, grads, state, 6)
    _, larger = small(target_r=4)
    with pytest.raises(fa.AdapterError, match=r"target_r is larger than the rank of the layers: 6 triplets .* is 7"):
        allocation.allocate(larger, grads, state, 4)
    with pytest.raises(fa.AdapterError, match="different ranks"):
        allocation.allocate(fa.stack([adapter, small(init_r=2)[1]]), grads, state, 0)
    for pattern, message in (
        ({"1.lora_E": [True] * 3}, "'1.lora_E', which the adapter does not. Did you mean"),
        ({"0.lora_E": [True]}, "1 triplets for '0.lora_E', the adapter has 3"),
    ):
        with pytest.raises(fa.AdapterError, match=message):
            allocation.prune(adapter, pattern)
    assert allocation.orthogonality(config, {}).item() == 0
    pytree.tree_map(lambda t: t, state)
    assert model is not None


# -- pruned adapters --------------------------------------------------------------------------------------


def some_pattern(adapter: fa.Adapter, **kept: list[bool]) -> dict[str, list[bool]]:
    return {f"{path}.lora_E": kept[f"at{path}"] for path in adapter.params if f"at{path}" in kept}


def masked(adapter: fa.Adapter, pattern: dict[str, list[bool]]) -> fa.Adapter:
    """Random leaves with zeros where the pattern says so."""
    moved = adapter.map(lambda t: t + torch.randn(t.shape, dtype=t.dtype) if t.ndim else t)
    params = dict(moved.params)
    for name, kept in pattern.items():
        p = params[name.removesuffix(".lora_E")]
        zeroed = p["lora_E"] * torch.tensor(kept, dtype=p["lora_E"].dtype).reshape(p["lora_E"].shape)
        params[name.removesuffix(".lora_E")] = {**p, "lora_E": zeroed}
    return moved.replace(params=params)


@pytest.mark.parametrize("at0", [[True, False, True], [False] * 3, [True] * 3, [False, False, True]], ids=str)
def test_a_pruned_adapter_is_the_masked_one(at0: list[bool], tmp_path: Path) -> None:
    """Also where nothing is left of a layer."""
    model, adapter = small()
    pattern = some_pattern(adapter, at0=at0, at2=[False, True, True])
    full = masked(adapter, pattern)
    x = torch.randn(7, 5, dtype=torch.float64)
    out = fa.functional_call(model, full, (x,))
    pruned = allocation.prune(full, pattern)
    assert pruned.params["0"]["lora_A"].shape == (max(1, sum(at0)), 5)
    assert float(pruned.buffers["0"]["ranknum"]) == 3  # the scaling is what it was
    close(fa.functional_call(model, pruned, (x,)), out)
    fa.save(pruned, tmp_path / "pruned")
    assert raw(tmp_path / "pruned")["base_model.model.0.lora_B"].shape == (4, sum(at0))
    again = fa.load(tmp_path / "pruned", model=model)
    same_adapters(again, pruned)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT notices the empty tensors
        theirs = peft_load(small()[0], tmp_path / "pruned").double()
        close(theirs(x), out)
        peft_save(theirs, tmp_path / "theirs")
    same_tensors(raw(tmp_path / "theirs"), raw(tmp_path / "pruned"))
    assert config_file(tmp_path / "theirs") == config_file(tmp_path / "pruned")
    close(fa.functional_call(model, fa.load(tmp_path / "theirs", model=model), (x,)), out)

    # stacked with others, and a slot of a bank
    stack = fa.stack([pruned, adapter, full])
    for i, a in enumerate((pruned, adapter, full)):
        same_adapters(fa.unstack(stack)[i], a)
        close(
            torch.func.vmap(lambda a: fa.functional_call(model, a, (x,)))(stack)[i], fa.functional_call(model, a, (x,))
        )
    config: Any = adapter.config
    bank = fa.AdapterBank(model, config, capacity=2)
    for name in ("one", "two"):  # the second the fast way
        bank.load(name, tmp_path / "pruned")
        same_adapters(bank.get(name), again)


def test_pruning_goes_on(tmp_path: Path) -> None:
    """A pruned adapter is trained, and pruned again: the pattern is of the first rank."""
    model, adapter = small()
    once = allocation.prune(adapter, {"0.lora_E": [True, False, True]})
    config: Any = once.config
    assert [*allocation.start(config, once.params).mask["0"].shape] == [2]
    twice = allocation.prune(masked(once, {}), {"0.lora_E": [False, True]})
    assert twice.config.rank_pattern == {"0.lora_E": (False, False, True)}  # pyright: ignore
    assert twice.params["0"]["lora_A"].shape[0] == 1
    fa.save(twice, tmp_path)
    same_adapters(fa.load(tmp_path, model=model), twice)
    again = allocation.start(config, adapter.params)  # the state of a training that goes on
    assert again.mask["0"].tolist() == [True, False, True]
    assert again.mask["2"].all()


def test_experts_keep_their_ranks(tmp_path: Path) -> None:
    case = Case(adalora.METHOD, VARIANTS["adalora"][0], next(k for k in KINDS if k.name == "experts_linear"))
    model, x = case.model(), case.inputs()
    adapter = case.adapter(model).replace(buffers=case.new(model).buffers)
    pattern = {"0.w.lora_E": [True, False, False, False, True, True]}
    full = allocation.prune(adapter, pattern)
    assert full.params["0.w"]["lora_E"].flatten().ne(0).tolist() == pattern["0.w.lora_E"]
    fa.save(full, tmp_path)
    again = fa.load(tmp_path, model=model)
    same_adapters(again, full)
    close(fa.functional_call(model, again, (x,)), fa.functional_call(model, full, (x,)))
    state = allocation.start(full.config, adapter.params)  # pyright: ignore
    assert allocation.rank_pattern(state.mask) == pattern
    grads = pytree.tree_map(torch.ones_like, adapter.params)
    kept, state = allocation.allocate(adapter, grads, state, 9)
    assert kept.params["0.w"]["lora_E"].ne(0).sum() == state.mask["0.w"].sum()
    penalty = allocation.orthogonality(full.config, adapter.params)  # pyright: ignore
    one_by_one = {str(e): {k: v[e] for k, v in adapter.params["0.w"].items()} for e in range(3)}
    close(penalty, allocation.orthogonality(full.config, one_by_one))  # pyright: ignore


@pytest.mark.parametrize("scale", [1.5, -0.5, 0.0], ids=str)
@pytest.mark.parametrize("where", ["everywhere", "one site", "ranknum"])
def test_a_changed_scaling_is_saved(where: str, scale: float, tmp_path: Path) -> None:
    """In alpha if it is one positive number for all; else in E."""
    model, adapter = small()
    adapter = masked(adapter, {})
    x, name = torch.randn(7, 5, dtype=torch.float64), "ranknum" if where == "ranknum" else "scaling"
    if where == "ranknum" and scale <= 0:
        return
    sites = ["0"] if where == "one site" else ["0", "2"]
    buffers = {
        p: {k: v * scale if k == name and p in sites else v for k, v in b.items()} for p, b in adapter.buffers.items()
    }
    changed = adapter.replace(buffers=buffers)
    out = fa.functional_call(model, changed, (x,))
    assert not torch.allclose(out, fa.functional_call(model, adapter, (x,)))
    fa.save(changed, tmp_path)
    again: Any = fa.load(tmp_path, model=model)
    close(fa.functional_call(model, again, (x,)), out)
    assert (again.config.lora_alpha != 8) == (where != "one site" and scale > 0)
    if where == "everywhere" and scale > 0:
        assert again.config.lora_alpha == 8 * scale
        same_tensors(dict(again.params["0"]), dict(changed.params["0"]))
    close(peft_load(small()[0], tmp_path).double()(x), out)


def test_ranks_that_the_config_does_not_say(tmp_path: Path) -> None:
    """Cut by hand, or padded by a stack: the file says it."""
    model, adapter = small()
    adapter = masked(adapter, {})
    x = torch.randn(7, 5, dtype=torch.float64)
    for ranks in ((1, 3), (2, 2), (5, 3), (5, 4)):
        params = {p: adalora_leaves.with_rank(adapter.params[p], 3, r) for p, r in zip("02", ranks, strict=True)}
        changed = adapter.replace(params=params)
        fa.save(changed, tmp_path)
        again = fa.load(tmp_path, model=model)
        out = fa.functional_call(model, changed, (x,))
        close(fa.functional_call(model, again, (x,)), out)
        assert [again.config.rank(again.params[p]) for p in "02"] == list(ranks)
        close(peft_load(small()[0], tmp_path).double()(x), out)


def test_malformed_files(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model, adapter = small()
    fa.save(allocation.prune(masked(adapter, {}), {"0.lora_E": [True, False, True]}), tmp_path)
    good, config = raw(tmp_path), json.loads((tmp_path / "adapter_config.json").read_text())
    key = "base_model.model.0.lora_"
    for change, message in (
        ({f"{key}E": None}, "lacks 'lora_E'"),
        ({f"{key}E": good[f"{key}E"][:1]}, "2 or 3 triplets"),
        ({f"{key}A": good[f"{key}A"].flatten()}, "2 or 3 triplets"),
        ({f"{key}{n}": good[f"{key}{n}"][:1] for n in "AE"} | {f"{key}B": good[f"{key}B"][:, :1]}, "2 or 3 triplets"),
        ({f"{key}B": good[f"{key}B"].int()}, "floating"),
    ):
        tensors = {k: v for k, v in {**good, **change}.items() if v is not None}
        save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "adapter_model.safetensors")
        with pytest.raises(fa.AdapterFileError, match=message):
            fa.load(tmp_path, model=model)
    for pattern in ({"0.lora_E": 2}, [1], {"0.lora_E": ["yes"]}):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "rank_pattern": pattern}))
        with pytest.raises(fa.AdapterFileError, match="rank_pattern"):
            fa.load(tmp_path)


def test_names_with_the_adapter_s_are_read(tmp_path: Path) -> None:
    """What PEFT has in memory, and older releases in their files."""
    model, adapter = small()
    pruned = allocation.prune(masked(adapter, {}), {"0.lora_E": [True, False, True]})
    fa.save(pruned, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace("0.lora_E", "0.lora_E.default"))
    again = fa.load(tmp_path, model=model)
    assert adalora_leaves.mask_of(again.config, "0") == (True, False, True)  # pyright: ignore
    same_tensors(dict(again.params["0"]), dict(pruned.params["0"]))
    fa.save(again, tmp_path)
    assert json.loads(path.read_text())["rank_pattern"] == {"0.lora_E": [True, False, True]}
    twice = allocation.prune(again, {"0.lora_E.default": [False, True]})
    assert twice.config.rank_pattern == {"0.lora_E": (False, False, True)}  # pyright: ignore


def test_peft_s_state_dict_agrees(tmp_path: Path) -> None:
    """The keys, and what is not saved."""
    pair = Pair("defaults", tmp_path)
    assert sorted(get_peft_model_state_dict(pair.wrapped)) == sorted(raw(pair.folder))
    assert not any("ranknum" in key for key in raw(pair.folder))
    assert repr(pair.adapter).startswith("Adapter(adalora, 4 sites, r=4, ")
