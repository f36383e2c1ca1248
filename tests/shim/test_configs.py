"""PEFT's configs: the same API, dicts, files and errors as PEFT's own, for every config that funcadapt has."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import peft
import pytest
import torch

import funcadapt as fa
import funcadapt.peft as shim
from funcadapt.config import _configs
from funcadapt.method import unregister
from funcadapt.peft import absent, lora_parts, mapping
from funcadapt.peft.absent import OutOfScopeError

NAMES = ["LoraConfig", "AdaLoraConfig", "IA3Config"]
REQUIRED = {"AdaLoraConfig": {"total_step": 100}}

SHARED: list[dict[str, Any]] = [
    {},
    {"task_type": "CAUSAL_LM"},
    {"task_type": peft.TaskType.SEQ_CLS},
    {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": {"q_proj"}},
    {"target_modules": ("q_proj", "v_proj")},
    {"target_modules": r".*\.(q|v)"},
    {"target_modules": "all-linear", "exclude_modules": ["head"]},
    {"target_modules": ["q"], "exclude_modules": ".*3.*"},
    {"target_modules": [], "modules_to_save": ["classifier"]},
    {"inference_mode": True, "base_model_name_or_path": "some/model", "revision": "main"},
    {"auto_mapping": {"base_model_class": "Net", "parent_library": "__main__"}},
    {"peft_version": "0.18.0"},
    {"peft_type": "IA3"},
    {"fan_in_fan_out": True},
]
LORA: list[dict[str, Any]] = [
    {"r": 4, "lora_alpha": 16},
    {"lora_alpha": 12.5, "lora_dropout": 0.1},
    {"r": 2, "rank_pattern": {"q": 4, r"layers\.0\.v": 8}, "alpha_pattern": {"q": 16}},
    {"bias": "all"},
    {"bias": "lora_only", "use_rslora": True},
    {"init_lora_weights": False},
    {"init_lora_weights": "gaussian"},
    {"init_lora_weights": "pissa_niter_4"},
    {"init_lora_weights": None},
    {"layers_to_transform": [0, 2], "target_modules": ["q"]},
    {"layers_to_transform": 1, "layers_pattern": "layers"},
    {"layers_to_transform": [1], "layers_pattern": ["layers", "h"]},
    {"trainable_token_indices": [1, 2]},
    {"trainable_token_indices": {"embed_tokens": [3]}},
    {"use_dora": True},
    {"lora_bias": True},
    {"target_parameters": ["experts.up"], "target_modules": []},
    {"runtime_config": None},
    {"modules_to_save": ["a", "b"], "bias": "none"},
]
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, kwargs) for name in NAMES for kwargs in SHARED),
    *(("LoraConfig", kwargs) for kwargs in LORA),
    ("IA3Config", {"target_modules": ["k", "down"], "feedforward_modules": ["down"]}),
    ("IA3Config", {"target_modules": ".*k", "feedforward_modules": ".*down"}),
    ("IA3Config", {"target_modules": ["k"], "feedforward_modules": [], "init_ia3_weights": False}),
    ("AdaLoraConfig", {"target_r": 4, "init_r": 6, "tinit": 10, "tfinal": 20, "deltaT": 5, "beta1": 0.9, "beta2": 0.8}),
    ("AdaLoraConfig", {"orth_reg_weight": 0.1, "lora_alpha": 32, "lora_dropout": 0.5}),
    ("AdaLoraConfig", {"rank_pattern": {"model.q.lora_E": [True, False]}}),
]


def pair(name: str, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    kwargs = {**REQUIRED.get(name, {}), **kwargs}
    return getattr(peft, name)(**copy.deepcopy(kwargs)), getattr(shim, name)(**copy.deepcopy(kwargs))


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """Enumerations of the two packages are equal as strings, but not as members."""
    return {k: str(v.value) if hasattr(v, "value") else v for k, v in values.items()}


@pytest.mark.parametrize(("name", "kwargs"), CASES)
def test_same_dict_and_file(name: str, kwargs: dict[str, Any], tmp_path: Path) -> None:
    theirs, ours = pair(name, kwargs)
    assert plain(ours.to_dict()) == plain(theirs.to_dict())
    assert list(ours.to_dict()) == list(theirs.to_dict())
    for key, value in theirs.to_dict().items():
        assert type(ours.to_dict()[key]).__name__ == type(value).__name__, key
    theirs.save_pretrained(tmp_path / "theirs", auto_mapping_dict={"a": 1})
    ours.save_pretrained(tmp_path / "ours", auto_mapping_dict={"a": 1})
    files = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("theirs", "ours")]
    for content in files:
        for field in ("target_modules", "exclude_modules", "feedforward_modules"):
            if isinstance(content.get(field), list):
                content[field].sort()
    assert files[0] == files[1]
    # and each reads the other's
    assert plain(shim.PeftConfig.from_pretrained(tmp_path / "theirs").to_dict()) == plain(
        peft.PeftConfig.from_pretrained(tmp_path / "ours").to_dict()
    )
    assert str(ours).replace("None", "") != ""


@pytest.mark.parametrize(("name", "kwargs"), CASES)
def test_round_trips(name: str, kwargs: dict[str, Any], tmp_path: Path) -> None:
    _, ours = pair(name, kwargs)
    assert copy.deepcopy(ours) == ours == dataclasses.replace(ours)
    assert pickle.loads(pickle.dumps(ours)) == ours
    frozen = ours.to_funcadapt()
    assert type(frozen).__name__ == name
    hash(frozen)
    back = shim.PeftConfig.from_funcadapt(frozen)
    assert type(back) is type(ours)
    assert back.to_funcadapt() == frozen


@pytest.mark.parametrize("name", NAMES)
def test_same_fields(name: str) -> None:
    theirs, ours = getattr(peft, name), getattr(shim, name)
    assert [f.name for f in dataclasses.fields(ours)] == [f.name for f in dataclasses.fields(theirs)]
    assert ours.__name__ == ours.__qualname__ == name
    assert ours.__doc__
    assert issubclass(ours, shim.PeftConfig)
    assert issubclass(ours, shim.LoraConfig) == issubclass(theirs, peft.LoraConfig)


def test_positional_arguments() -> None:
    values = ("CAUSAL_LM", None, None, None, "base", None, False, 4, ["q"], None, 16)
    theirs, ours = peft.LoraConfig(*values), shim.LoraConfig(*values)
    assert plain(ours.to_dict()) == plain(theirs.to_dict())
    assert (ours.r, ours.lora_alpha, ours.base_model_name_or_path) == (4, 16, "base")


def test_mutable() -> None:
    config = shim.LoraConfig(target_modules=["q"])
    config.r = 3
    config.modules_to_save = ["head"]
    config.modules_to_save.append("tail")
    config.target_modules.add("v")
    config.anything = 1
    frozen = config.to_funcadapt()
    assert (frozen.r, frozen.modules_to_save, frozen.target_modules) == (3, ("head", "tail"), ("q", "v"))
    config.r = 0
    with pytest.raises(ValueError, match="should be a positive integer"):
        config.to_funcadapt()
    assert shim.LoraConfig().rank_pattern is not shim.LoraConfig().rank_pattern


ERRORS: list[tuple[str, dict[str, Any]]] = [
    ("LoraConfig", {"task_type": "NOTHING"}),
    ("LoraConfig", {"target_modules": ".*", "layers_to_transform": [1]}),
    ("LoraConfig", {"target_modules": ".*", "layers_pattern": "h"}),
    ("LoraConfig", {"layers_pattern": "h"}),
    ("LoraConfig", {"target_parameters": "experts"}),
    ("LoraConfig", {"lora_bias": True, "init_lora_weights": "gaussian"}),
    ("LoraConfig", {"lora_bias": True, "use_dora": True}),
    ("LoraConfig", {"init_lora_weights": "loftq"}),
    ("LoraConfig", {"eva_config": 3}),
    ("LoraConfig", {"nothing": 3}),
    ("IA3Config", {"target_modules": ["k"], "feedforward_modules": ["q"]}),
    ("IA3Config", {"task_type": "causal_lm"}),
    ("AdaLoraConfig", {"total_step": None}),
    ("AdaLoraConfig", {"total_step": 0}),
    ("AdaLoraConfig", {"orth_reg_weight": -1.0}),
    ("AdaLoraConfig", {"tinit": 50, "tfinal": 50}),
]


@pytest.mark.parametrize(("name", "kwargs"), ERRORS)
def test_same_errors(name: str, kwargs: dict[str, Any]) -> None:
    kwargs = {**REQUIRED.get(name, {}), **kwargs}
    if kwargs.get("init_lora_weights") == "loftq" and not _has("scipy"):
        error: tuple[type[BaseException], str] = (ValueError, "`loftq_config` must be specified")
    else:
        with pytest.raises((ValueError, TypeError)) as theirs:
            getattr(peft, name)(**kwargs)
        error = (theirs.type, str(theirs.value)[:30])
    with pytest.raises(error[0]) as ours:
        getattr(shim, name)(**kwargs)
    assert str(ours.value).startswith(error[1])


def _has(package: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(package) is not None


WARNINGS: list[tuple[str, dict[str, Any]]] = [
    ("LoraConfig", {"loftq_config": {"loftq_bits": 4}}),
    ("LoraConfig", {"use_rslora": True, "rank_pattern": {"q": 2}, "init_lora_weights": "pissa"}),
    ("LoraConfig", {"use_rslora": True, "alpha_pattern": {"q": 2}, "init_lora_weights": "olora"}),
    ("AdaLoraConfig", {"r": 4}),
    ("VeraConfig", {"save_projection": False}),
    ("PveraConfig", {"save_projection": False}),
    ("RandLoraConfig", {"save_projection": False}),
    ("TinyLoraConfig", {"save_projection": False}),
    ("SupertuningConfig", {"save_precomputed_indices": False}),
]


@pytest.mark.parametrize(("name", "kwargs"), WARNINGS)
def test_same_warnings(name: str, kwargs: dict[str, Any]) -> None:
    kwargs = {**REQUIRED.get(name, {}), **kwargs}
    with warnings.catch_warnings(record=True) as theirs:
        warnings.simplefilter("always")
        config = getattr(peft, name)(**copy.deepcopy(kwargs))
    with warnings.catch_warnings(record=True) as ours:
        warnings.simplefilter("always")
        same = getattr(shim, name)(**copy.deepcopy(kwargs))
    assert len(theirs) == 1
    assert [str(w.message)[:40] for w in ours] == [str(w.message)[:40] for w in theirs]
    assert name == "AdaLoraConfig" or ours[0].filename == __file__
    assert plain(same.to_dict()) == plain(config.to_dict())
    same.to_funcadapt()  # warned once


@pytest.mark.parametrize(
    "kwargs",
    [
        {"layer_replication": [[0, 2]]},
        {"megatron_config": {"a": 1}},
    ],
)
def test_parts_that_are_not_implemented(kwargs: dict[str, Any]) -> None:
    field = next(iter(kwargs))
    if isinstance(kwargs[field], str):
        kwargs = {field: getattr(shim.tuners.lora, kwargs[field])()}
    elif isinstance(kwargs[field], type):
        kwargs = {**kwargs, field: lora_parts.CordaConfig()}
    with pytest.raises(NotImplementedError, match=rf"LoraConfig.{field}"):
        shim.LoraConfig(**kwargs)


def test_default_eva_config() -> None:
    with pytest.warns(UserWarning, match="Using default EVA config"):
        assert shim.LoraConfig(init_lora_weights="eva").eva_config == lora_parts.EvaConfig()


@pytest.mark.parametrize("name", list(lora_parts.CLASSES))
def test_nested_classes(name: str) -> None:
    theirs, ours = getattr(peft.tuners.lora.config, name), lora_parts.CLASSES[name]
    assert getattr(shim.tuners.lora.config, name) is ours is getattr(shim.config, name)
    assert dataclasses.asdict(theirs()) == dataclasses.asdict(ours())
    for field in dataclasses.fields(theirs):
        if not field.init:
            continue
        for value in (-1, 0, 2, 1.5, "nothing"):
            outcomes = []
            for cls in (theirs, ours):
                try:
                    outcomes.append(dataclasses.asdict(cls(**{field.name: value})))
                except (ValueError, TypeError) as error:
                    outcomes.append(type(error))
            assert outcomes[0] == outcomes[1], (field.name, value)


def test_nested_from_dict() -> None:
    given = {"top_k": 2, "task_adapter_names": ["a"]}
    found = lora_parts.nested(given, lora_parts.ArrowConfig)
    assert (found.top_k, found.router_temperature, found.task_adapter_names) == (2, 1.0, ["a"])
    with pytest.raises(TypeError, match="must be a `EvaConfig`, a dict, or None"):
        lora_parts.nested([], lora_parts.EvaConfig)


def test_runtime_config(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="has no effect"):
        config = shim.LoraConfig(runtime_config=shim.LoraRuntimeConfig(ephemeral_gpu_offload=True))
    assert "runtime_config" not in config.to_dict()
    config.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "runtime_config": {"ephemeral_gpu_offload": True}}))
    with pytest.warns(UserWarning, match="contains a `runtime_config` key"):
        assert not shim.PeftConfig.from_pretrained(tmp_path).runtime_config.ephemeral_gpu_offload


def test_look_alikes() -> None:
    config = shim.LoraConfig(r=np.int64(4), lora_alpha=np.float32(2), target_modules=dict.fromkeys(["q", "v"]).keys())
    frozen = config.to_funcadapt()
    assert (frozen.r, frozen.lora_alpha, frozen.target_modules) == (4, 2.0, ("q", "v"))
    assert type(frozen.r) is int


def test_unknown_fields_of_a_file(tmp_path: Path) -> None:
    shim.IA3Config(target_modules=["k"]).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    values = {**json.loads(file.read_text()), "newer": 1, "another": None}
    file.write_text(json.dumps(values))
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['another', 'newer'\] for class IA3Config"):
        config = shim.PeftConfig.from_pretrained(tmp_path)
    assert config == shim.IA3Config(target_modules=["k"])
    del values["peft_type"]
    file.write_text(json.dumps(values))
    with pytest.raises(TypeError, match="missing required keys"):
        shim.PeftConfig.from_pretrained(tmp_path)


def test_reading(tmp_path: Path) -> None:
    shim.LoraConfig(r=3, task_type="CAUSAL_LM").save_pretrained(tmp_path / "sub")
    for cls in (shim.PeftConfig, shim.LoraConfig, shim.IA3Config):
        config = cls.from_pretrained(str(tmp_path), subfolder="sub", task_type="SEQ_CLS", revision="x", unknown=1)
        assert (type(config), config.r, config.task_type, config.revision) == (shim.LoraConfig, 3, "CAUSAL_LM", None)
    assert shim.PeftConfig._get_peft_type(tmp_path, subfolder="sub") == "LORA"
    assert shim.LoraConfig.from_json_file(tmp_path / "sub" / "adapter_config.json")["r"] == 3
    assert shim.get_peft_config({"peft_type": "LORA", "r": 2}) == shim.LoraConfig(r=2)
    assert shim.LoraConfig.from_peft_type(r=2) == shim.LoraConfig(r=2)
    assert shim.PeftConfig.from_peft_type(peft_type="IA3") == shim.IA3Config()
    assert shim.LoraConfig.check_kwargs(a=1) == {"a": 1}
    with pytest.raises(AssertionError, match="should be a directory, not a file"):
        shim.LoraConfig().save_pretrained(tmp_path / "sub" / "adapter_config.json")
    with pytest.raises(KeyError, match="LORRA"):
        shim.get_peft_config({"peft_type": "LORRA"})


def test_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shim.LoraConfig(r=5).save_pretrained(tmp_path)
    calls = []

    def download(repo_id: str, filename: str, *, subfolder: Any = None, revision: Any = None, user_agent: Any) -> str:
        calls.append((repo_id, filename, subfolder, revision, user_agent))
        if repo_id != "me/adapter":
            raise OSError
        return str(tmp_path / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    config = shim.PeftConfig.from_pretrained("me/adapter", revision="abc", subfolder="s", r=3, task_type="CAUSAL_LM")
    assert (config.r, config.task_type) == (5, None)
    assert calls == [("me/adapter", "adapter_config.json", "s", "abc", f"funcadapt/{fa.__version__}")]
    assert shim.PeftConfig._get_peft_type("me/adapter") == "LORA"
    split = shim.LoraConfig._split_kwargs({"revision": "a", "r": 1, "other": 2})
    assert split == ({"revision": "a"}, {"r": 1}, {"other": 2})
    for read in (shim.PeftConfig.from_pretrained, shim.PeftConfig._get_peft_type):
        with pytest.raises(ValueError, match=r"Can't find 'adapter_config\.json' at 'me/nothing'"):
            read("me/nothing")


def test_push_to_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = {}

    class Api:
        def __init__(self, token: Any) -> None:
            sent["token"] = token

        def create_repo(self, repo_id: str, private: Any, exist_ok: bool) -> Any:
            return type("Repo", (), {"repo_id": f"me/{repo_id}"})

        def upload_folder(self, folder_path: str, **kwargs: Any) -> str:
            sent.update(kwargs, files=[path.name for path in Path(folder_path).iterdir()])
            return "url"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert shim.LoraConfig().push_to_hub("a", token="t") == "url"
    assert (sent["token"], sent["repo_id"], sent["files"]) == ("t", "me/a", ["adapter_config.json"])


def test_base_configs() -> None:
    config = shim.PeftConfig(peft_type="LORA", task_type="CAUSAL_LM")
    assert plain(config.to_dict()) == plain(peft.PeftConfig(peft_type="LORA", task_type="CAUSAL_LM").to_dict())
    with pytest.raises(TypeError, match="is for no method"):
        config.to_funcadapt()
    prompt = shim.PromptLearningConfig(num_virtual_tokens=3)
    assert plain(prompt.to_dict()) == plain(peft.PromptLearningConfig(num_virtual_tokens=3).to_dict())
    assert prompt.is_prompt_learning
    assert not shim.LoraConfig().is_prompt_learning
    assert not shim.LoraConfig().is_adaption_prompt
    with pytest.raises(NotImplementedError, match=r"register a method|Register a method"):
        shim.LoraConfig()._register_custom_module({torch.nn.LSTM: torch.nn.Module})
    assert shim.LoraConfig()._custom_modules is None


@pytest.mark.parametrize("enum", ["PeftType", "TaskType"])
def test_enumerations(enum: str) -> None:
    theirs, ours = getattr(peft, enum), getattr(shim, enum)
    assert {m.name: m.value for m in ours} == {m.name: m.value for m in theirs}
    assert [str(m) for m in ours] == [str(m) for m in theirs]
    assert all(member == member.value for member in ours)


@pytest.mark.parametrize(
    ("name", "error"), [("lora", KeyError), ("new", ValueError), ("Lora", ValueError), ("lora_", ValueError)]
)
def test_register_peft_method(name: str, error: type[Exception]) -> None:
    for package in (peft, shim):
        with pytest.raises(error) as caught:
            package.utils.register_peft_method(name=name, config_cls=None, model_cls=None)
        assert name.lower() in str(caught.value).lower()


PEFT_CONFIGS = sorted(cls.__name__ for cls in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.values())


@pytest.mark.parametrize("name", PEFT_CONFIGS)
def test_every_config_of_peft(name: str) -> None:
    theirs, ours = getattr(peft, name), getattr(shim, name)
    assert ours is getattr(shim, name) is getattr(shim.tuners, name)
    assert ours.__name__ == name
    assert issubclass(ours, shim.PeftConfig)
    assert issubclass(ours, shim.PromptLearningConfig) == issubclass(theirs, peft.PromptLearningConfig)
    package = theirs.__module__.split(".")[2]
    assert getattr(getattr(shim.tuners, package), name) is ours
    registered = {cls.__name__ for cls in _configs.values()}
    if name in registered:
        return
    prompts = issubclass(theirs, peft.PromptLearningConfig) or name == "AdaptionPromptConfig"
    with pytest.raises(NotImplementedError, match=f"^{name}.*(out of funcadapt's scope|not implemented)") as caught:
        ours(task_type="CAUSAL_LM", r=3)
    assert isinstance(caught.value, OutOfScopeError) == isinstance(caught.value, ValueError) == prompts
    peft_type = next(t for t, cls in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.items() if cls is theirs)
    assert ours.peft_type == peft_type.value
    with pytest.raises(NotImplementedError, match=name):
        shim.PeftConfig.from_peft_type(peft_type=peft_type.value, num_virtual_tokens=3)


@pytest.mark.parametrize("name", list(absent.ENUMS))
def test_enumerations_of_prompts(name: str) -> None:
    theirs, ours = getattr(peft, name), getattr(shim, name)
    assert {m.name: m.value for m in ours} == {m.name: m.value for m in theirs}
    member = next(iter(ours))
    assert member == member.value
    assert pickle.loads(pickle.dumps(member)) is member


def test_mappings() -> None:
    for table in ("CONFIG", "PREFIX"):
        theirs, ours = (getattr(m, f"PEFT_TYPE_TO_{table}_MAPPING") for m in (peft.mapping, mapping))
        assert {t.value for t in theirs} <= {t.value if isinstance(t, shim.PeftType) else t for t in ours}
    assert {k.value: v for k, v in peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING.items()}.items() <= {
        getattr(k, "value", k): v for k, v in mapping.PEFT_TYPE_TO_PREFIX_MAPPING.items()
    }.items()
    configs = shim.PEFT_TYPE_TO_CONFIG_MAPPING
    assert configs["LORA"] is configs[shim.PeftType.LORA] is shim.LoraConfig
    assert "LORA" in configs
    assert "NOTHING" not in configs
    assert None not in configs
    assert configs.get("NOTHING") is None
    assert len(configs) == len(dict(configs))
    with pytest.raises(KeyError, match="Did you mean 'LORA'"):
        configs["LORAA"]
    with pytest.raises(TypeError):
        configs["X"] = 1  # type: ignore[index]
    assert set(mapping.PEFT_TYPE_TO_TUNER_MAPPING) == set(mapping.PEFT_TYPE_TO_MIXED_MODEL_MAPPING) >= {"LORA", "IA3"}
    assert list(shim.MODEL_TYPE_TO_PEFT_MODEL_MAPPING) == list(peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING)
    assert "LORA" in repr(configs)


def test_a_method_that_is_registered_later_wins() -> None:
    """No file of the shim changes for a new method."""
    before, held = shim.ShadowConfig, _configs["SHADOW"]

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class ShadowConfig(fa.AdapterConfig):
        """A config."""

        peft_type: str = "SHADOW"
        shadow_block_size: int = 4
        target_modules: Any = None
        names: Any = ("a",)

    lora = fa.method_of(fa.LoraConfig())
    changes = {"grouped": None, "masked": None, "view": None, "keys": {"lora_A": "shadow_R"}}
    fa.register(dataclasses.replace(lora, name="shadow", config=ShadowConfig, **changes))
    try:
        assert shim.ShadowConfig is not before
        config = shim.ShadowConfig(shadow_block_size=8, target_modules=["q"])
        assert (config.target_modules, config.names, config.peft_type) == ({"q"}, ["a"], shim.PeftType.SHADOW)
        expected = ShadowConfig(shadow_block_size=8, target_modules=("q",), peft_version="0.21.2")
        assert config.to_funcadapt() == expected
        assert shim.PEFT_TYPE_TO_CONFIG_MAPPING["SHADOW"] is shim.ShadowConfig is shim.tuners.shadow.ShadowConfig
        assert shim.ShadowModel is shim.PEFT_TYPE_TO_TUNER_MAPPING["SHADOW"] is shim.tuners.shadow.model.ShadowModel
        assert shim.tuners.shadow.layer.ShadowLayer.adapter_layer_names == ("shadow_R",)
        assert mapping.PEFT_TYPE_TO_PREFIX_MAPPING["SHADOW"] == "shadow_"
    finally:
        unregister("shadow")
        _configs["SHADOW"] = held
    assert shim.ShadowConfig is before


def test_no_warning_by_default() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shim.LoraConfig()
        shim.IA3Config()
        shim.AdaLoraConfig(total_step=10)
