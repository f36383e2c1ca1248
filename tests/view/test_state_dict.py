"""The keys of PEFT's checkpoints from a live model and into it, with PEFT's functions as the oracle."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import peft
import pytest
import torch
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from peft_tools import configs, layer_model, same_tensors, tiny
from torch import Tensor, nn

import funcadapt as fa
from funcadapt.methods.adalora import AdaLoraConfig
from funcadapt.view import inject
from funcadapt.view.state_dict import adapter_state_dict, load_adapter_state_dict
from funcadapt.view.walking import layers, view_state

PREFIX = "base_model.model."
QV = {"target_modules": ["q_proj", "v_proj"], "r": 2}
EMBED = {"target_modules": ["embed_tokens", "q_proj"], "r": 2}

# model, method, the config fields of each adapter by name
CASES: dict[str, tuple[str, str, dict[str, dict[str, Any]]]] = {
    "one": ("llama", "lora", {"default": QV}),
    "two": ("llama", "lora", {"default": QV, "other": {"target_modules": ["k_proj"], "r": 3}}),
    "names in names": ("llama", "lora", {"a": QV, "ab": QV, "b": QV}),
    "dora": ("llama", "dora", {"default": QV, "other": QV}),
    "ia3": (
        "llama",
        "ia3",
        {"default": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}},
    ),
    "bias all": (
        "bert",
        "lora",
        {"default": {"target_modules": ["query"], "r": 2, "bias": "all"}, "other": {"target_modules": ["key"], "r": 2}},
    ),
    "bias only": ("bert", "lora", {"default": {"target_modules": ["query"], "r": 2, "bias": "lora_only"}}),
    "bias of a saved module": (
        "bert_cls",
        "lora",
        {"default": {"target_modules": ["query"], "r": 2, "bias": "all", "modules_to_save": ["classifier"]}},
    ),
    "bias of B": ("llama", "lora", {"default": {**QV, "lora_bias": True}}),
    "saved": (
        "llama",
        "lora",
        {"default": {**QV, "modules_to_save": ["lm_head"]}, "other": {**QV, "modules_to_save": ["lm_head", "norm"]}},
    ),
    "tokens": (
        "llama",
        "lora",
        {"default": {**QV, "trainable_token_indices": [3, 1]}, "other": {**QV, "trainable_token_indices": [5]}},
    ),
    "tied tokens": ("llama_tied", "lora", {"default": {**QV, "trainable_token_indices": [3, 1]}}),
    "embedding": ("llama", "lora", {"default": EMBED}),
    "embedding by pattern": ("llama", "lora", {"default": {"target_modules": r".*(embed_tokens|q_proj)", "r": 2}}),
    "embedding and tokens of the head": (
        "llama",
        "lora",
        {"default": {**EMBED, "trainable_token_indices": {"lm_head": [2]}}},
    ),
    "convolution": ("conv2d", "lora", {"default": {"r": 2}}),
    "attention": ("mha", "lora", {"default": {"r": 2}}),
    "attention, biases": ("mha", "lora", {"default": {"r": 2, "bias": "all"}}),
    "experts": ("experts", "lora", {"default": {"r": 2}}),
    "experts, two": ("experts", "lora", {"default": {"r": 2}, "other": {"r": 4}}),
}


def fresh(kind: str) -> tuple[nn.Module, dict[str, Any]]:
    try:
        model, _, target = layer_model(kind)
    except KeyError:
        return tiny(kind), {}
    return model, target


def pair(case: str) -> tuple[nn.Module, nn.Module, list[str]]:
    """The same model with the same adapters: PEFT's injection, and ours with the same numbers."""
    kind, method, adapters = CASES[case]
    (theirs, target), (ours, _) = fresh(kind), fresh(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, fields in adapters.items():
            their_config, our_config = configs(method, **{**target, **fields})
            peft.inject_adapter_in_model(their_config, theirs, name)
            inject(ours, our_config, name)
    torch.manual_seed(3)
    for parameter in theirs.parameters():
        parameter.data.normal_()
    assert sorted(theirs.state_dict()) == sorted(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours, list(adapters)


def noted(function: Any) -> tuple[Any, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = function()
    return result, sorted(str(w.message) for w in caught)


@pytest.mark.parametrize("save_embeddings", ["auto", True, False])
@pytest.mark.parametrize("case", CASES)
def test_keys_tensors_and_warnings_are_pefts(case: str, save_embeddings: Any) -> None:
    theirs, ours, names = pair(case)
    for name in names:
        expected, said = noted(
            lambda name=name: get_peft_model_state_dict(
                theirs, adapter_name=name, save_embedding_layers=save_embeddings
            )
        )
        found, we_said = noted(lambda name=name: adapter_state_dict(ours, name, save_embedding_layers=save_embeddings))
        same_tensors(found, expected)
        # PEFT takes the bias of a B for a shard of it
        assert we_said == [message for message in said if "lora_B.bias" not in message]


# PEFT raises KeyError for the prefixed keys of saved modules and trained rows, see below
UNPREFIXED = [
    c
    for c, (*_, a) in CASES.items()
    if any("modules_to_save" in f or "trainable_token_indices" in f for f in a.values())
]


@pytest.mark.parametrize(
    ("case", "prefix"), [(case, p) for case in CASES for p in ("", PREFIX) if not (p and case in UNPREFIXED)]
)
def test_loading_is_pefts(case: str, prefix: str) -> None:
    theirs, ours, names = pair(case)
    for name in names:
        saved, _ = noted(lambda name=name: get_peft_model_state_dict(theirs, adapter_name=name))
        changed = {prefix + key: value + 1 for key, value in saved.items()}
        changed["nowhere.lora_A.weight"] = torch.ones(1)
        given = dict(changed)
        expected = set_peft_model_state_dict(theirs, changed, name)
        found = load_adapter_state_dict(ours, changed, name)
        assert changed == given or list(changed) == list(given)
        assert sorted(found.missing_keys) == sorted(expected.missing_keys)
        assert sorted(found.unexpected_keys) == sorted(expected.unexpected_keys)
        same_tensors(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("case", ["saved", "tied tokens", "bias of a saved module"])
def test_prefixed_keys_of_saved_modules_are_taken(case: str) -> None:
    """PEFT takes `base_model.model.` before all keys of an injected model but these."""
    theirs, ours, (name, *_) = pair(case)
    saved = {PREFIX + key: value + 1 for key, value in adapter_state_dict(ours, name).items()}
    with pytest.raises(KeyError):
        set_peft_model_state_dict(theirs, saved, name)
    result = load_adapter_state_dict(ours, saved, name)
    assert [
        key for key in result.unexpected_keys if "modules_to_save" not in key and "original_module" not in key
    ] == []
    same_tensors(
        {PREFIX + k: v for k, v in adapter_state_dict(ours, name).items()}, saved
    ) if "bias" not in case else None


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize("case", ["saved", "tokens"])
def test_a_missing_saved_module_is_a_key_error_and_changes_nothing(case: str) -> None:
    theirs, ours, (name, *_) = pair(case)
    saved = {k: v + 1 for k, v in adapter_state_dict(ours, name).items()}
    gone = next(key for key in saved if "lora_" not in key)
    del saved[gone]
    before = snapshot(ours)
    with pytest.raises(KeyError, match=gone):
        set_peft_model_state_dict(theirs, saved, name)
    with pytest.raises(KeyError, match=gone):
        load_adapter_state_dict(ours, saved, name)
    same_tensors(ours.state_dict(), before)


def test_mis_shaped_tensors() -> None:
    theirs, ours, (name, *_) = pair("one")
    saved = {k: v + 1 for k, v in adapter_state_dict(ours, name).items()}
    wrong = [key for key in saved if key.endswith("lora_B.weight")][-1]
    saved[wrong] = saved[wrong][:, :1].clone()
    before = snapshot(ours)
    messages = []
    for call in (set_peft_model_state_dict, load_adapter_state_dict):
        with pytest.raises(RuntimeError, match="size mismatch for") as caught:
            call(theirs if call is set_peft_model_state_dict else ours, saved, name)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    same_tensors(ours.state_dict(), before)  # where PEFT has written all the others by now
    loaded = next(key for key in saved if key != wrong)
    held = loaded.replace(".weight", ".default.weight")
    assert torch.equal(theirs.state_dict()[held], saved[loaded])
    expected, said = noted(lambda: set_peft_model_state_dict(theirs, saved, name, ignore_mismatched_sizes=True))
    found, we_said = noted(lambda: load_adapter_state_dict(ours, saved, name, ignore_mismatched_sizes=True))
    assert we_said == said
    assert len(said) == 1
    assert (list(found.missing_keys), found.unexpected_keys) == (list(expected.missing_keys), expected.unexpected_keys)
    same_tensors(ours.state_dict(), theirs.state_dict())


def test_values_that_are_no_tensors_and_keys_that_are_there_twice() -> None:
    _, ours, (name, *_) = pair("one")
    saved: dict[str, Any] = adapter_state_dict(ours, name)
    before, key = snapshot(ours), next(iter(saved))
    with pytest.raises(RuntimeError, match=r"expected torch.Tensor or Tensor-like object from checkpoint"):
        load_adapter_state_dict(ours, {k: v + 1 for k, v in saved.items()} | {key: [1.0]}, name)
    with pytest.raises(RuntimeError, match="twice, with and without the prefix"):
        load_adapter_state_dict(ours, saved | {PREFIX + key: saved[key]}, name)
    with pytest.raises(ValueError, match="Adapter zz not found"):
        load_adapter_state_dict(ours, saved, "zz")
    with pytest.raises(ValueError, match=r"Adapter defualt not found\. Did you mean 'default'"):
        adapter_state_dict(ours, "defualt")
    same_tensors(ours.state_dict(), before)


# -- defects of PEFT --------------------------------------------------------------------------------------


def test_an_adapter_that_is_called_like_a_module() -> None:
    """B11: in PEFT the adapter "q_proj" takes the keys of all modules of that name from the others' checkpoints."""
    theirs, ours = tiny("llama"), tiny("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("default", "q_proj", "layers"):
            their_config, our_config = configs("lora", **QV)
            peft.inject_adapter_in_model(their_config, theirs, name)
            inject(ours, our_config, name)
    truth = {key.replace(".default", "") for key in ours.state_dict() if ".default" in key}
    assert set(adapter_state_dict(ours, "default")) == truth
    assert set(adapter_state_dict(ours, "q_proj")) == truth
    assert set(get_peft_model_state_dict(theirs, adapter_name="default")) < truth
    saved = {key: torch.full_like(value, 7) for key, value in adapter_state_dict(ours, "layers").items()}
    assert not load_adapter_state_dict(ours, saved, "layers").unexpected_keys
    state = ours.state_dict()
    assert {key for key, value in state.items() if value.eq(7).all()} == {k for k in state if ".layers." in k[13:]}


def test_an_adapter_without_rows_beside_one_with_rows() -> None:
    """PEFT cannot save it: it looks for its rows."""
    for library in (peft, fa):
        model, (their_config, config) = tiny("llama"), configs("lora", **QV, trainable_token_indices=[1])
        their_plain, plain = configs("lora", **QV)
        if library is fa:
            inject(model, config, "rows")
            inject(model, plain, "plain")
            assert not any("token" in key for key in adapter_state_dict(model, "plain"))
            continue
        peft.inject_adapter_in_model(their_config, model, "rows")
        with pytest.warns(UserWarning, match="Already found"):
            peft.inject_adapter_in_model(their_plain, model, "plain")
        with pytest.raises(KeyError):
            get_peft_model_state_dict(model, adapter_name="plain")


def test_other_adapters_biases_stay_out() -> None:
    """A module called like the adapter keeps its name in the keys, whatever the adapter is called."""
    model = nn.ModuleDict({"default": nn.Linear(4, 4), "x": nn.Linear(4, 4)})
    config = fa.LoraConfig(r=2, target_modules=["x"], bias="all", lora_bias=True)
    inject(model, config, "default")
    inject(model, fa.LoraConfig(r=2, target_modules=["x"], lora_bias=True), "x")
    assert sorted(adapter_state_dict(model, "default")) == [
        "default.bias",
        "x.base_layer.bias",
        "x.lora_A.weight",
        "x.lora_B.bias",
        "x.lora_B.weight",
    ]


# -- given state dicts, meta tensors, shards --------------------------------------------------------------


def test_a_given_state_dict_is_used() -> None:
    theirs, ours, (name, *_) = pair("saved")
    gathered = {key: value * 2 for key, value in ours.state_dict().items()}
    expected = get_peft_model_state_dict(theirs, state_dict=gathered, adapter_name=name)
    same_tensors(adapter_state_dict(ours, name, gathered), expected)
    only = {key: value for key, value in gathered.items() if "q_proj" not in key}
    expected = get_peft_model_state_dict(theirs, state_dict=only, adapter_name=name)
    same_tensors(adapter_state_dict(ours, name, only), expected)
    with pytest.raises(KeyError):
        adapter_state_dict(ours, name, {})
    twin = copy.deepcopy(ours)
    twin._orig_mod = ours
    assert list(adapter_state_dict(twin, name, unwrap_compiled=True)) == list(adapter_state_dict(ours, name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_meta_tensors_are_replaced(dtype: torch.dtype) -> None:
    theirs, ours = tiny("llama").to(dtype), tiny("llama").to(dtype)
    their_config, our_config = configs("dora", **QV)
    peft.inject_adapter_in_model(their_config, theirs, low_cpu_mem_usage=True)
    inject(ours, our_config, low_cpu_mem_usage=True)
    for _, layer in layers(ours):
        assert all(p.is_meta for p in layer.parameters_of("default"))
    saved = {k: torch.randn(v.shape) for k, v in adapter_state_dict(ours, "default").items()}
    expected = set_peft_model_state_dict(theirs, saved, low_cpu_mem_usage=True)
    found = load_adapter_state_dict(ours, saved, "default", low_cpu_mem_usage=True)
    assert list(found.missing_keys) == list(expected.missing_keys)
    same_tensors(ours.state_dict(), theirs.state_dict())
    flags = {n: p.requires_grad for n, p in theirs.named_parameters()}
    assert flags == {n: p.requires_grad for n, p in ours.named_parameters()}


def test_sharded_models_take_whole_tensors(tmp_path: Any) -> None:
    """A model under FSDP2: what is loaded is split as the model's own tensors are."""
    from torch import distributed
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        _, model, (name, *_) = pair("one")
        saved = {k: v.clone() + 1 for k, v in adapter_state_dict(model, name).items()}
        fully_shard(model, mesh=distributed.device_mesh.init_device_mesh("cpu", (1,)))
        assert not load_adapter_state_dict(model, saved, name).unexpected_keys
        found = adapter_state_dict(model, name)
        assert all(isinstance(value, DTensor) for value in found.values())
        same_tensors({k: v.full_tensor() for k, v in found.items()}, saved)
    finally:
        distributed.destroy_process_group()


# -- embeddings -------------------------------------------------------------------------------------------


def test_resized_vocabularies_are_saved(tmp_path: Any) -> None:
    results: list[Any] = []
    for function in (get_peft_model_state_dict, adapter_state_dict):
        model = tiny("llama")
        model.save_pretrained(tmp_path)
        model.resize_token_embeddings(40)
        their_config, our_config = configs("lora", **QV, base_model_name_or_path=str(tmp_path))
        if function is adapter_state_dict:
            inject(model, our_config)
            results.append(noted(lambda m=model: function(m, "default")))
        else:
            peft.inject_adapter_in_model(their_config, model)
            results.append(noted(lambda m=model: function(m, adapter_name="default")))
    (theirs, said), (ours, we_said) = results
    assert said == we_said
    assert sorted(ours) == sorted(theirs)
    assert {"model.embed_tokens.weight", "lm_head.weight"} < set(ours)


def test_an_unknown_base_model_is_said() -> None:
    model = tiny("llama")
    inject(model, fa.LoraConfig(**QV, base_model_name_or_path="some/where"))
    with pytest.warns(UserWarning, match="Could not find a config file in some/where - will assume"):
        adapter_state_dict(model, "default")
    bare = nn.Sequential(nn.Linear(4, 4))
    inject(bare, fa.LoraConfig(target_modules=["0"], r=2))
    with pytest.warns(UserWarning, match="Could not identify embedding layer"):
        adapter_state_dict(bare, "default", save_embedding_layers=True)


# -- AdaLoRA ----------------------------------------------------------------------------------------------


def masks(kept: Mapping[str, list[bool]], name: str = "") -> dict[str, list[bool]]:
    return {f"{path}.lora_E{name}": mask for path, mask in kept.items()}


KEPT = {"lin0": [True, False, True], "lin1": [True, True, True]}


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lin0, self.lin1 = nn.Linear(4, 5), nn.Linear(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin1(torch.tanh(self.lin0(x)))


def ada(**fields: Any) -> tuple[Any, Any]:
    given = {"init_r": 3, "target_r": 1, "total_step": 10, "target_modules": ["lin0", "lin1"], **fields}
    return peft.AdaLoraConfig(**given), AdaLoraConfig(**given)


def test_pruned_ranks_are_left_out_and_come_back() -> None:
    their_config, our_config = ada()
    theirs = peft.get_peft_model(Two(), their_config)
    ours = Two()
    inject(ours, our_config)
    torch.manual_seed(1)
    for parameter in theirs.parameters():
        parameter.data.normal_()
    state = {k.removeprefix(PREFIX): v for k, v in theirs.state_dict().items()}
    assert sorted(state) == sorted(ours.state_dict())
    for key in state:
        if key.endswith("ranknum.default"):
            state[key].fill_(3)
    ours.load_state_dict(state)
    their_config.rank_pattern = masks(KEPT, ".default")
    expected = {k.removeprefix(PREFIX): v for k, v in get_peft_model_state_dict(theirs).items()}
    pruned = dataclasses.replace(our_config, rank_pattern=masks(KEPT))
    found = adapter_state_dict(ours, "default", config=pruned)
    same_tensors(found, expected)
    assert found["lin0.lora_A"].shape == (2, 4)

    with pytest.warns(RuntimeWarning, match="rank_pattern keys did not match"):  # PEFT takes them for LoRA's patterns
        their_fresh = peft.get_peft_model(Two(), dataclasses.replace(their_config, rank_pattern=masks(KEPT)))
    fresh_model = Two()
    inject(fresh_model, pruned)
    given = {k: v + 1 for k, v in found.items()}
    expected_result = set_peft_model_state_dict(their_fresh, {PREFIX + k: v for k, v in given.items()})
    result = load_adapter_state_dict(fresh_model, given, "default")
    assert sorted(result.missing_keys) == sorted(k.removeprefix(PREFIX) for k in expected_result.missing_keys)
    assert not result.unexpected_keys
    same_tensors(adapter_state_dict(fresh_model, "default"), given)
    shapes = {k.removeprefix(PREFIX): v.shape for k, v in their_fresh.state_dict().items()}
    assert {k: v.shape for k, v in fresh_model.state_dict().items()} == shapes
    x = torch.randn(3, 4)
    fresh_model.load_state_dict({k.removeprefix(PREFIX): v for k, v in their_fresh.state_dict().items()})
    torch.testing.assert_close(fresh_model(x), their_fresh(x))
    assert fresh_model.lin0.r == their_fresh.base_model.model.lin0.r
    assert all(p.requires_grad for p in fresh_model.lin0.parameters_of("default") if p.ndim == 2)


def test_a_full_checkpoint_is_loaded_whatever_the_pattern_says() -> None:
    _, config = ada(rank_pattern=masks(KEPT))
    model = Two()
    inject(model, config)
    full = {f"{p}.{n}": torch.randn(s) for p, (i, o) in {"lin0": (4, 5), "lin1": (5, 6)}.items()
            for n, s in {"lora_A": (3, i), "lora_E": (3, 1), "lora_B": (o, 3)}.items()}  # fmt: skip
    load_adapter_state_dict(model, full, "default")
    assert torch.equal(model.lin0.lora_A["default"], full["lin0.lora_A"])


def test_a_layer_that_lost_everything() -> None:
    _, config = ada(rank_pattern=masks({"lin0": [False] * 3, "lin1": [True] * 3}))
    model, x = Two(), torch.randn(2, 4)
    inject(model, config)
    saved = {k: v + 1 for k, v in adapter_state_dict(model, "default").items()}
    assert saved["lin0.lora_A"].shape == (0, 4)
    load_adapter_state_dict(model, saved, "default")
    torch.testing.assert_close(model.lin0(x), model.lin0.base_layer(x))
    again = adapter_state_dict(model, "default")
    same_tensors(again, saved)
    assert view_state(model).configs["default"] == config
