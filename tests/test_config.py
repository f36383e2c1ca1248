"""Configs: PEFT's fields, defaults, errors and JSON; frozen and hashable; strict where PEFT takes anything."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from typing import Any

import peft
import pytest
import torch
from peft.utils import constants
from peft_tools import configs

import funcadapt as fa
from funcadapt import targets
from funcadapt.config import config_from_dict

PAIRS = {"lora": (peft.LoraConfig, fa.LoraConfig), "ia3": (peft.IA3Config, fa.IA3Config)}


def as_json(values: dict[str, Any]) -> dict[str, Any]:
    """JSON types, sets and what PEFT keeps as sets as sorted lists, less the version."""
    unordered = ("target_modules", "exclude_modules", "feedforward_modules")

    def plain(value: Any) -> Any:
        if isinstance(value, set):
            return sorted(value)
        return value.value if hasattr(value, "value") else value

    values = {k: plain(v) for k, v in values.items() if k not in ("peft_version", "runtime_config")}
    for key in unordered:
        if isinstance(values.get(key), list):
            values[key] = sorted(values[key])
    return json.loads(json.dumps(values))


@pytest.mark.parametrize("method", PAIRS)
def test_every_field_and_default(method: str) -> None:
    theirs, ours = (cls() for cls in PAIRS[method])
    assert as_json(theirs.to_dict()) == as_json(ours.to_dict())


SAME: list[tuple[str, dict[str, Any]]] = [
    ("lora", {"r": 4, "lora_alpha": 16, "target_modules": ["v", "q"], "lora_dropout": 0.1}),
    ("lora", {"target_modules": "all-linear", "exclude_modules": ["a", "b"], "use_rslora": True}),
    ("lora", {"target_modules": r".*\.q", "exclude_modules": r".*0.*", "task_type": "CAUSAL_LM"}),
    ("lora", {"target_modules": {"b", "a"}, "rank_pattern": {"b": 2, "a": 3}, "alpha_pattern": {"a": 0.5}}),
    ("lora", {"target_modules": ["a"], "layers_to_transform": [0, 2], "layers_pattern": ["h", "layers"]}),
    ("lora", {"target_modules": ["a"], "layers_to_transform": 1, "layers_pattern": "h"}),
    ("lora", {"target_parameters": ["experts.up", "experts.down"], "bias": "all"}),
    ("lora", {"trainable_token_indices": {"embed": [1, 2]}, "modules_to_save": ["head"], "bias": "lora_only"}),
    ("lora", {"trainable_token_indices": [1, 2], "lora_bias": True, "init_lora_weights": False}),
    ("lora", {"init_lora_weights": "gaussian", "base_model_name_or_path": "m", "revision": "r"}),
    ("lora", {"inference_mode": True}),
    ("lora", {"use_dora": True, "init_lora_weights": "pissa_niter_4", "fan_in_fan_out": True}),
    ("ia3", {"target_modules": ["a", "b"], "feedforward_modules": ["b"], "task_type": peft.TaskType.SEQ_CLS}),
    ("ia3", {"target_modules": r".*a", "feedforward_modules": ["b"], "init_ia3_weights": False}),
]


@pytest.mark.parametrize(("method", "fields"), SAME)
def test_to_dict_is_peft_s(method: str, fields: dict[str, Any]) -> None:
    theirs, ours = configs(method, **fields)
    assert as_json(theirs.to_dict()) == as_json(ours.to_dict())
    assert config_from_dict(json.loads(json.dumps(ours.to_dict()))) == ours


REFUSED_BY_BOTH: list[tuple[str, dict[str, Any]]] = [
    ("lora", {"target_modules": ".*q", "layers_to_transform": [1]}),
    ("lora", {"target_modules": "all-linear", "layers_to_transform": [1]}),
    ("lora", {"target_modules": ".*q", "layers_pattern": "h"}),
    ("lora", {"target_modules": ["q"], "layers_pattern": "h"}),
    ("lora", {"target_parameters": "up"}),
    ("lora", {"lora_bias": True, "use_dora": True}),
    ("lora", {"lora_bias": True, "init_lora_weights": "gaussian"}),
    ("lora", {"lora_bias": True, "init_lora_weights": None}),
    ("lora", {"task_type": "CHAT"}),
    ("ia3", {"target_modules": ["a"], "feedforward_modules": ["b"]}),
    ("ia3", {"task_type": "CHAT"}),
]


@pytest.mark.parametrize(("method", "fields"), REFUSED_BY_BOTH)
def test_peft_s_errors(method: str, fields: dict[str, Any]) -> None:
    """The same type of error; and PEFT's words up to the first stop or comma."""
    theirs, ours = PAIRS[method]
    with pytest.raises((ValueError, TypeError)) as expected:
        theirs(**fields)
    with pytest.raises(type(expected.value)) as got:
        ours(**fields)
    start = str(expected.value).split(",")[0].split(". ")[0].split(" got ")[0].rstrip(" .")
    assert str(got.value).startswith(start[:60])


REFUSED_HERE: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"r": 0}, ValueError, "positive integer"),
    ({"r": -3}, ValueError, "positive integer"),
    ({"r": 2.5}, TypeError, "`r` of LoraConfig must be int, got 2.5"),
    ({"r": True}, TypeError, "`r`"),
    ({"r": "8"}, TypeError, "`r`"),
    ({"rank_pattern": {"q": 0}}, ValueError, "positive integer.*'q'"),
    ({"lora_alpha": "16"}, TypeError, "`lora_alpha`"),
    ({"use_dora": "no"}, TypeError, "`use_dora`"),
    ({"modules_to_save": "head"}, TypeError, "`modules_to_save`"),
    ({"target_modules": [1, 2]}, TypeError, "`target_modules`"),
    ({"target_modules": 5}, TypeError, "`target_modules`"),
    ({"target_modules": "*q"}, ValueError, "`target_modules` has '\\*q', which is no regular expression"),
    ({"exclude_modules": "(q"}, ValueError, "`exclude_modules`"),
    ({"rank_pattern": {"q(": 2}}, ValueError, "`rank_pattern`"),
    ({"target_modules": ["q"], "layers_to_transform": 1, "layers_pattern": ["h("]}, ValueError, "`layers_pattern`"),
    ({"lora_dropout": 1.0}, ValueError, "lora_dropout"),
    ({"lora_dropout": float("nan")}, ValueError, "lora_dropout"),
    ({"bias": "some"}, ValueError, "bias"),
    ({"trainable_token_indices": ["a"]}, TypeError, "trainable_token_indices"),
]


@pytest.mark.parametrize(("fields", "error", "message"), REFUSED_HERE)
def test_values_that_peft_would_take(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    """Each would be a failure later, or worse: `use_dora="no"` is true, "head" is five modules of one letter."""
    peft.LoraConfig(**fields)  # once PEFT refuses too, the case belongs in REFUSED_BY_BOTH
    with pytest.raises(error, match=message):
        fa.LoraConfig(**fields)


@pytest.mark.parametrize("field", sorted(fa.LoraConfig.unsupported))
def test_parts_of_peft_that_are_missing_say_so(field: str) -> None:
    default = next(f for f in dataclasses.fields(fa.LoraConfig) if f.name == field)
    value: Any = {"bool": True, "Sequence[int] | None": [1], "Sequence[Sequence[int]] | None": [[0, 1]]}.get(
        str(default.type), {"a": 1}
    )
    with pytest.raises(NotImplementedError, match=field):
        fa.LoraConfig(**{field: value})


def test_frozen_and_hashable() -> None:
    config = fa.LoraConfig(target_modules=["q"], rank_pattern={"q": 2}, trainable_token_indices={"e": [1]})
    same = fa.LoraConfig(target_modules=("q",), rank_pattern={"q": 2}, trainable_token_indices={"e": (1,)})
    assert config == same
    assert hash(config) == hash(same)
    assert {config: 1}[same] == 1
    assert config != dataclasses.replace(config, r=9)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.r = 3  # pyright: ignore
    for change in (
        lambda d: d.update(a=1),
        lambda d: d.__setitem__("a", 1),
        lambda d: d.pop("q"),
        lambda d: d.clear(),
        lambda d: d.setdefault("a", 1),
        lambda d: d.__delitem__("q"),
        lambda d: d.popitem(),
        lambda d: d.__ior__({"a": 1}),
    ):
        with pytest.raises(TypeError, match="immutable"):
            change(config.rank_pattern)
    assert config.rank_pattern == {"q": 2}
    assert pickle.loads(pickle.dumps(config)) == config
    assert copy.deepcopy(config) == config


def test_a_caller_s_list_can_change_later() -> None:
    names, pattern = ["q"], {"q": 2}
    config = fa.LoraConfig(target_modules=names, rank_pattern=pattern)
    names.append("v")
    pattern["v"] = 3
    assert config.target_modules == ("q",)
    assert config.rank_pattern == {"q": 2}
    assert config.to_dict()["target_modules"] == ["q"]


def test_adapters_of_equal_configs_share_a_pytree_structure() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2))
    one, two = (fa.init(model, fa.LoraConfig(r=2, target_modules=["0"])) for _ in range(2))
    spec = torch.utils._pytree.tree_structure
    assert spec(one) == spec(two)
    assert spec(one) != spec(fa.init(model, fa.LoraConfig(r=2, target_modules=["0"], use_rslora=True)))


def test_default_targets_are_peft_s() -> None:
    """Appendix D, compared with the tables themselves."""

    def plain(table: Any) -> dict[str, Any]:
        return {k: v if isinstance(v, str) else sorted(v) for k, v in table.items()}

    assert plain(targets.LORA) == plain(constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING)
    assert plain(targets.IA3) == plain(constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING)
    feedforward = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
    assert plain(targets.IA3_FEEDFORWARD) == plain(feedforward)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "No 'peft_type'"),
        ({"peft_type": None}, "No 'peft_type'"),
        ({"peft_type": "LORRA"}, "Unknown peft_type 'LORRA'.*'LORA'"),
        ({"peft_type": ["LORA"]}, "Unknown peft_type"),
        ({"peft_type": "LORA", "rr": 3}, "no field 'rr'"),
        ({"peft_type": "LORA", "lora_alhpa": 3}, "Did you mean 'lora_alpha'"),
        ({"peft_type": "LORA", "r": "8"}, "LoraConfig.r must be an integer, got '8'"),
        ({"peft_type": "LORA", "lora_alpha": float("nan")}, "lora_alpha"),
        ({"peft_type": "LORA", "r": 2**31}, "LoraConfig.r"),
        ({"peft_type": "LORA", "alpha_pattern": {"q": float("inf")}}, "must be finite, got inf .*q"),
        ({"peft_type": "LORA", "rank_pattern": None}, "rank_pattern"),
        ({"peft_type": "LORA", "task_type": "CHAT"}, "Invalid task type"),
        ({"peft_type": "IA3", "target_modules": ["a"], "feedforward_modules": ["b"]}, "subset"),
    ],
)
def test_dicts_that_make_no_config(values: dict[str, Any], message: str) -> None:
    with pytest.raises(fa.AdapterFileError, match=message):
        config_from_dict(values)


@pytest.mark.parametrize("value", [None, False, {}, []])
def test_a_new_field_that_is_off_only_warns(value: Any) -> None:
    with pytest.warns(UserWarning, match="no field 'use_future'"):
        assert config_from_dict({"peft_type": "LORA", "use_future": value}) == fa.LoraConfig()


def test_peft_s_bookkeeping_is_accepted() -> None:
    values = {**peft.LoraConfig(target_modules=["q"]).to_dict(), "runtime_config": {"ephemeral_gpu_offload": False}}
    values["target_modules"] = list(values["target_modules"])
    assert config_from_dict(values).r == 8
