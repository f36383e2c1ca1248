"""PEFT's tables from `PeftType` to classes: views of what is registered, so that a new method is in them by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any, Generic, TypeVar

from funcadapt.config import _configs as registered_configs
from funcadapt.errors import did_you_mean
from funcadapt.method import methods
from funcadapt.peft.absent import ROWS
from funcadapt.peft.method_configs import config_class, config_named
from funcadapt.peft.types import as_peft_type
from funcadapt.view.holding import view_of

_V = TypeVar("_V")


class LiveMapping(Mapping[str, _V], Generic[_V]):
    """A mapping that is computed at every look, by a function; a key is a `PeftType` or its name.

    Args:
        name: its name, for messages.
        compute: returns the keys and how to get each value.
    """

    def __init__(self, name: str, compute: Callable[[], Mapping[str, Callable[[], _V]]]) -> None:
        self._name, self._compute = name, compute

    def __getitem__(self, key: str) -> _V:
        table = self._compute()
        if key not in table:
            raise KeyError(f"{self._name} has no {key!r}.{did_you_mean(str(key), map(str, table))}")
        return table[key]()

    def __iter__(self) -> Iterator[str]:
        return (as_peft_type(key) for key in self._compute())

    def __len__(self) -> int:
        return len(self._compute())

    def __contains__(self, key: object) -> bool:
        return key in self._compute()

    def __repr__(self) -> str:
        return repr(dict(self))


def _packages() -> dict[str, tuple[str, str]]:
    """peft_type -> (package, prefix), of the methods that there are."""
    views = {method.config.peft_type: view_of(method) for method in methods()}
    return {peft_type: (view.package, view.prefix) for peft_type, view in views.items()}


def _configs() -> dict[str, Callable[[], type[Any]]]:
    table: dict[str, Callable[[], type[Any]]] = {
        row.peft_type: lambda row=row: config_named(row.config) for row in ROWS
    }
    return table | {name: lambda cls=cls: config_class(cls) for name, cls in registered_configs.items()}


def _tuners() -> dict[str, Callable[[], type[Any]]]:
    found = {name: lambda package=package: _tuner(package) for name, (package, _) in _packages().items()}
    return {
        "XLORA": lambda: import_module("funcadapt.peft.xlora_model").XLoraModel,
        "SHADOW": lambda: import_module("funcadapt.peft.shadow_model").ShadowModel,
        **found,
    }


def _tuner(package: str) -> type[Any]:
    from funcadapt.peft.tuner import tuner_class

    return tuner_class(package)


def _prefixes() -> dict[str, Callable[[], str]]:
    table: dict[str, Callable[[], str]] = {row.peft_type: lambda row=row: row.prefix for row in ROWS}
    return table | {name: lambda prefix=prefix: prefix for name, (_, prefix) in _packages().items()}


PEFT_TYPE_TO_CONFIG_MAPPING: LiveMapping[type[Any]] = LiveMapping("PEFT_TYPE_TO_CONFIG_MAPPING", _configs)
PEFT_TYPE_TO_TUNER_MAPPING: LiveMapping[type[Any]] = LiveMapping("PEFT_TYPE_TO_TUNER_MAPPING", _tuners)
PEFT_TYPE_TO_PREFIX_MAPPING: LiveMapping[str] = LiveMapping("PEFT_TYPE_TO_PREFIX_MAPPING", _prefixes)
# every method can be mixed with every other: they nest
PEFT_TYPE_TO_MIXED_MODEL_MAPPING: LiveMapping[type[Any]] = LiveMapping("PEFT_TYPE_TO_MIXED_MODEL_MAPPING", _tuners)


def _task_models() -> dict[str, Callable[[], type[Any]]]:
    return {
        task: lambda name=name: _task_model(name)
        for task, name in {
            "SEQ_CLS": "PeftModelForSequenceClassification",
            "SEQ_2_SEQ_LM": "PeftModelForSeq2SeqLM",
            "CAUSAL_LM": "PeftModelForCausalLM",
            "TOKEN_CLS": "PeftModelForTokenClassification",
            "QUESTION_ANS": "PeftModelForQuestionAnswering",
            "FEATURE_EXTRACTION": "PeftModelForFeatureExtraction",
        }.items()
    }


def _task_model(name: str) -> type[Any]:
    from funcadapt.peft import tasks

    return getattr(tasks, name)


MODEL_TYPE_TO_PEFT_MODEL_MAPPING: LiveMapping[type[Any]] = LiveMapping("MODEL_TYPE_TO_PEFT_MODEL_MAPPING", _task_models)


def get_peft_config(config_dict: Mapping[str, Any]) -> Any:
    """A config from a dict.

    Args:
        config_dict: the fields; `peft_type` says of which class.

    Returns:
        The config.

    Example:
        >>> get_peft_config({"peft_type": "LORA", "r": 4}).r
        4
    """
    return PEFT_TYPE_TO_CONFIG_MAPPING[config_dict["peft_type"]](**config_dict)


def __getattr__(name: str) -> Any:
    # PEFT has the function in this module; here it is beside the other functions over a model
    if name == "inject_adapter_in_model":
        return import_module("funcadapt.peft.functional").inject_adapter_in_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}.{did_you_mean(name, globals())}")
