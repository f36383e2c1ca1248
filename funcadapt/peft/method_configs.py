"""PEFT's config classes of methods, generated: `LoraConfig` with the fields of the frozen `fa.LoraConfig`.

There is one for every config class of funcadapt that is registered, with its name, fields, order and defaults. Further
names of PEFT are stand-ins, which raise when they are called.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from funcadapt.config import AdapterConfig, _hints, thaw
from funcadapt.config import _configs as registered_configs
from funcadapt.errors import did_you_mean
from funcadapt.peft import lora_parts
from funcadapt.peft.absent import ROWS, stand_in
from funcadapt.peft.config import PeftConfig, PromptLearningConfig
from funcadapt.peft.types import PeftType

_MODULE = PeftConfig.__module__  # where pickle finds the classes

# class -> (field, the field before it, its type): fields of PEFT that say nothing about the adapter
_RUNTIME_FIELDS = {"LoraConfig": ("runtime_config", "layer_replication", lora_parts.LoraRuntimeConfig)}

_generated: dict[type[AdapterConfig], type[Any]] = {}
_stand_ins: dict[str, type[Any]] = {}


def config_class(config: type[AdapterConfig]) -> type[Any]:
    """PEFT's mutable config class for one of funcadapt's.

    Args:
        config: the class, e.g. `fa.LoraConfig`.

    Returns:
        A dataclass of the same name, with the same fields; always the same one.

    Example:
        >>> import funcadapt as fa
        >>> config_class(fa.LoraConfig).__name__
        'LoraConfig'
    """
    if config not in _generated:
        _generated[config] = _generate(config)
    return _generated[config]


def _generate(config: type[AdapterConfig]) -> type[Any]:
    own = [b for b in config.__bases__ if issubclass(b, AdapterConfig) and b is not AdapterConfig]
    bases = tuple(config_class(b) for b in own) or (PeftConfig,)
    hints = _hints(config)
    fields: list[tuple[str, Any, Any]] = []
    declared = inspect.get_annotations(config)
    known = {field.name: field for field in dataclasses.fields(config)}
    for field in (known[name] for name in declared if name in known and name != "peft_type"):
        fields.append((field.name, hints.get(field.name, Any), _mutable(field)))
        runtime = _RUNTIME_FIELDS.get(config.__name__)
        if runtime is not None and runtime[1] == field.name:
            fields.append((runtime[0], runtime[2], dataclasses.field(default_factory=runtime[2])))
    body = {
        "__module__": _MODULE,
        "__qualname__": config.__name__,
        "__doc__": config.__doc__,
        "_funcadapt": config,
    }
    return dataclasses.make_dataclass(config.__name__, fields, bases=bases, namespace=body)


def _mutable(field: dataclasses.Field[Any]) -> Any:
    """A field with the same default as a funcadapt config's, but a new list or dict for every config."""
    make = field.default_factory
    if make is not dataclasses.MISSING:
        return dataclasses.field(default_factory=lambda: thaw(make()))
    if isinstance(field.default, tuple | dict):
        return dataclasses.field(default_factory=lambda: thaw(field.default))
    return dataclasses.field(default=field.default)


def config_names() -> tuple[str, ...]:
    """The names of all config classes of methods: those that there are, and PEFT's."""
    known = (cls.__name__ for cls in registered_configs.values())
    return tuple(dict.fromkeys((*known, *(row.config for row in ROWS))))


def config_named(name: str) -> type[Any]:
    """A config class by its name.

    A registered config of funcadapt wins over PEFT's table of names, whose classes raise when they are called.

    Args:
        name: the name, "LoraConfig".

    Returns:
        The class.

    Raises:
        AttributeError: if neither funcadapt nor PEFT has it.

    Example:
        >>> config_named("PromptTuningConfig")()
        Traceback (most recent call last):
        funcadapt.peft.absent.OutOfScopeError: PromptTuningConfig: prompt learning is out of funcadapt's scope...
    """
    for cls in registered_configs.values():
        if cls.__name__ == name:
            return config_class(cls)
    row = next((row for row in ROWS if row.config == name), None)
    if row is None:
        raise AttributeError(f"There is no config class {name!r}.{did_you_mean(name, config_names())}")
    if name not in _stand_ins:
        base = {"PeftConfig": PeftConfig, "PromptLearningConfig": PromptLearningConfig}.get(row.base)
        bases = (base or config_named(row.base),)
        adaption = {"is_adaption_prompt": True} if row.peft_type == "ADAPTION_PROMPT" else {}
        peft_type = PeftType(row.peft_type)
        _stand_ins[name] = stand_in(name, row.package, bases, __module__=_MODULE, peft_type=peft_type, **adaption)
    return _stand_ins[name]
