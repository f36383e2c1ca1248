"""Configs: frozen, hashable dataclasses with PEFT's field names, defaults and meanings."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import numbers
import re
import types
import typing
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self, TypeVar

from torch import Tensor

from funcadapt._torch import add_safe_globals
from funcadapt.errors import AdapterFileError, did_you_mean
from funcadapt.targets import default_targets

# What PEFT writes beside a method's own fields, and names that older releases wrote. None changes a result.
_BOOKKEEPING = frozenset({"auto_mapping", "peft_version", "runtime_config", "inference_mode", "revision"})

# PEFT's task types; a file with another one cannot be read by PEFT.
_TASKS = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")

# Fields that hold a regular expression where they hold a string, and lists of regular expressions.
_REGEX_FIELDS = ("target_modules", "exclude_modules", "feedforward_modules")

_configs: dict[str, type[AdapterConfig]] = {}
# Adapters with parts around the model: their modules register their configs when they are imported.
_ELSEWHERE = {"XLORA": "funcadapt.xlora", "SHADOW": "funcadapt.shadow"}

_V = TypeVar("_V")


class FrozenDict(dict[str, _V]):
    """A dict that cannot change, so that a config that holds one is hashable."""

    def _refuse(self, *args: object, **kwargs: object) -> Any:
        raise TypeError("A config is immutable. Build a new one with dataclasses.replace(config, ...).")

    __setitem__ = __delitem__ = pop = popitem = clear = update = setdefault = __ior__ = _refuse  # pyright: ignore

    def __hash__(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Hash of the items, whatever their order."""
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and deepcopy through the constructor, as the contents cannot be set afterwards."""
        return FrozenDict, (dict(self),)


def freeze(value: Any) -> Any:
    """Lists and sets become tuples (sets sorted), dicts become `FrozenDict`, all the way down."""
    if isinstance(value, Mapping):
        items: Mapping[Any, Any] = value  # pyright: ignore[reportUnknownVariableType]
        return FrozenDict({str(k): freeze(v) for k, v in items.items()})
    if isinstance(value, set | frozenset):
        return tuple(sorted(value))  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    if isinstance(value, list | tuple):
        return tuple(freeze(v) for v in value)  # pyright: ignore[reportUnknownVariableType]
    return value


def thaw(value: Any) -> Any:
    """The inverse of `freeze` for JSON: tuples become lists, `FrozenDict` becomes dict."""
    if isinstance(value, dict):
        return {k: thaw(v) for k, v in value.items()}  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, tuple):
        return [thaw(v) for v in value]  # pyright: ignore[reportUnknownVariableType]
    return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What every config has: PEFT's common fields.

    A method's config derives from this class, sets the default of `peft_type`, and adds PEFT's fields. Lists,
    sets and dicts are frozen on construction, so that a config is hashable and safe to share.

    Attributes:
        task_type: PEFT's task name, such as "CAUSAL_LM". Written to checkpoints; it only matters to PEFT.
        peft_type: the method's name in PEFT.
        auto_mapping: PEFT's bookkeeping.
        peft_version: the PEFT version that wrote a checkpoint.
        base_model_name_or_path: the model that the adapter was trained on.
        revision: the revision of that model.
        inference_mode: PEFT's bookkeeping; always true in a file.
        target_parameters: names of plain parameters to adapt: matrices, (out, in), and stacks of experts, 3-D. In PEFT
            only LoRA's config has it, here every config. It is in a file only where it says something.
    """

    task_type: str | None = None
    peft_type: str = ""
    auto_mapping: Mapping[str, Any] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    target_parameters: Sequence[str] | None = None

    # field -> the per-site pattern dict that overrides it, e.g. {"r": "rank_pattern"}
    patterned: ClassVar[Mapping[str, str]] = {}
    # fields of PEFT that this version has no implementation for: any value but the default raises
    unsupported: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Register the class under its `peft_type`, for files and for `torch.export`."""
        super().__init_subclass__(**kwargs)
        if name := cls.__dict__.get("peft_type"):
            _configs[name] = cls
            # a value like any other: exported programs hold it in their example inputs
            add_safe_globals([cls, FrozenDict])

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            value = getattr(value, "value", value) if field.name in ("task_type", "peft_type") else value
            object.__setattr__(self, field.name, freeze(value))
            _check_type(self, field.name)
            if field.name in self.unsupported and getattr(self, field.name) != freeze(_default(field)):
                raise NotImplementedError(
                    f"{type(self).__name__}.{field.name}={value!r} is not implemented yet; leave it at "
                    f"{_default(field)!r}."
                )
        if self.task_type is not None and self.task_type not in _TASKS:
            raise ValueError(f"Invalid task type: {self.task_type!r}. It is one of {', '.join(_TASKS)}, or None.")
        _check_patterns(self)

    def at(self, path: str) -> Self:
        r"""This config with the per-site patterns resolved for one site.

        PEFT's rule: the first pattern that matches `(.*\.)?(pattern)$` against the site path wins.

        Args:
            path: the path of a site.

        Returns:
            The config whose patterned fields (`r`, `lora_alpha`, ...) hold for that site.
        """
        changes: dict[str, Any] = {}
        for field, patterns in self.patterned.items():
            table: Mapping[str, Any] = getattr(self, patterns)
            key = matching_pattern(table, path) if table else None
            if key is not None and table[key] != getattr(self, field):
                changes[field] = table[key]
        return dataclasses.replace(self, **changes) if changes else self

    def for_model(self, model_type: str | None) -> Self:
        """This config with the defaults of a model type filled in, as PEFT writes it to a checkpoint.

        Args:
            model_type: transformers' model type ("llama"), or None.

        Returns:
            A config whose `target_modules` is set, unless it targets parameters only.

        Raises:
            TargetError: if there is no default for that type.
        """
        names = {f.name for f in dataclasses.fields(self)}
        if "target_modules" not in names or getattr(self, "target_modules") is not None:  # noqa: B009
            return self
        if getattr(self, "target_parameters", None):
            # PEFT adds the model type's default modules, except where it knows the type as a mixture of experts.
            # Here parameters alone mean parameters alone; the empty list makes PEFT read the file so, too.
            return dataclasses.replace(self, target_modules=())
        return dataclasses.replace(self, target_modules=default_targets(self, model_type))

    def label(self) -> str:
        """The method's name for people."""
        return self.peft_type.lower()

    def rank(self, leaves: Mapping[str, Tensor]) -> int:
        """The rank that the leaves of one site have; 0 if the method has none."""
        return 0

    def to_dict(self) -> dict[str, Any]:
        """The content of PEFT's `adapter_config.json`: every field that PEFT has, in JSON types."""
        values = {f.name: thaw(getattr(self, f.name)) for f in dataclasses.fields(self)}
        if self.target_parameters is None and not self._peft_has_parameters():
            del values["target_parameters"]
        return values

    @classmethod
    def _peft_has_parameters(cls) -> bool:
        """Whether PEFT's config has `target_parameters`: then it is declared again."""
        lineage = cls.__mro__[: cls.__mro__.index(AdapterConfig)]
        return any("target_parameters" in inspect.get_annotations(c) for c in lineage)


@functools.cache
def _hints(cls: type[AdapterConfig]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls)
    except NameError:  # a config class that was defined inside a function, with types of that function
        return {}


def _check_type(config: AdapterConfig, name: str) -> None:
    """A value of the declared type. PEFT takes any: `use_dora="no"` is true, `modules_to_save="head"` five letters."""
    value, hint = getattr(config, name), _hints(type(config)).get(name, Any)
    if not _fits(value, hint):
        declared = next(f.type for f in dataclasses.fields(config) if f.name == name)
        raise TypeError(f"`{name}` of {type(config).__name__} must be {declared}, got {value!r}.")


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in arguments)
    if origin is typing.Literal:
        return value in arguments
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(
            _fits(k, arguments[0]) and _fits(v, arguments[1])
            for k, v in value.items()  # pyright: ignore[reportUnknownVariableType]
        )
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return isinstance(value, tuple) and all(_fits(v, arguments[0]) for v in value)  # pyright: ignore[reportUnknownVariableType]
    if hint in (int, float):
        number = numbers.Integral if hint is int else numbers.Real
        return isinstance(value, number) and not isinstance(value, bool)  # pyright: ignore[reportUnnecessaryIsInstance]
    return hint is Any or not isinstance(hint, type) or isinstance(value, hint)


def _check_patterns(config: AdapterConfig) -> None:
    """Regular expressions compile: here, where the message can name the field, and not at the first model."""
    found = [(name, value) for name in _REGEX_FIELDS if isinstance(value := getattr(config, name, None), str)]
    found += [(name, key) for name in config.patterned.values() for key in getattr(config, name) or ()]
    layers: Any = getattr(config, "layers_pattern", None) or ()
    found += [("layers_pattern", key) for key in ((layers,) if isinstance(layers, str) else layers)]
    for name, pattern in found:
        try:
            re.compile(rf"(.*\.)?({pattern})$")
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"`{name}` has {pattern!r}, which is no regular expression: {error}") from error


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def matching_pattern(patterns: Iterable[str], path: str) -> str | None:
    """The first of PEFT's rank or alpha patterns that matches a site path, or None."""
    return next((p for p in patterns if re.match(rf"(.*\.)?({p})$", path)), None)


def config_from_dict(values: Mapping[str, Any]) -> AdapterConfig:
    """The config that a dict in the form of `adapter_config.json` describes.

    Args:
        values: the content of the file. `peft_type` says which class it is for.

    Returns:
        The config.

    Raises:
        AdapterFileError: if the type is unknown, a field is unknown (near matches are listed; an unknown field
            that is switched off, as a newer PEFT writes it, only warns), or a value is refused.
        NotImplementedError: if a field asks for a part of PEFT that funcadapt does not have.

    Example:
        >>> config_from_dict({"peft_type": "LORA", "r": 4, "lora_alpa": 8})
        Traceback (most recent call last):
        funcadapt.errors.AdapterFileError: LoraConfig has no field 'lora_alpa'. Did you mean 'lora_alpha', ...
    """
    peft_type = values.get("peft_type")
    cls = _configs.get(peft_type) if isinstance(peft_type, str) else None
    if cls is None:
        if module := _ELSEWHERE.get(str(peft_type)):
            raise AdapterFileError(f"{peft_type} is no single adapter but a value of its own: use {module}.load.")
        what = "No 'peft_type' in the config" if peft_type is None else f"Unknown peft_type {peft_type!r}"
        raise AdapterFileError(f"{what}.{did_you_mean(str(peft_type), _configs)}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    kept: dict[str, Any] = {}
    for name, value in values.items():
        if name in fields:
            _check_number(cls, fields[name], value)
            kept[name] = value
        elif name in _BOOKKEEPING:
            continue
        elif value in (None, False, {}, []):  # a newer PEFT writes its new switches, switched off
            warnings.warn(f"{cls.__name__} has no field {name!r}; it is {value!r} here and is ignored.", stacklevel=2)
        else:
            raise AdapterFileError(f"{cls.__name__} has no field {name!r}.{did_you_mean(name, fields)}")
    try:
        return cls(**kept)
    except (TypeError, ValueError, RecursionError) as error:
        raise AdapterFileError(f"The values do not make a {cls.__name__}: {error}") from error


def _check_number(cls: type[AdapterConfig], field: dataclasses.Field[Any], value: Any) -> None:
    """A number where the default is a number: a file may say anything, and `r: "8"` must not get further."""
    default = _default(field)
    if isinstance(default, bool) or not isinstance(default, int | float):
        return
    number = isinstance(value, int | float) and not isinstance(value, bool)
    real = isinstance(default, float) or _hints(cls).get(field.name) is float
    whole = number and (real or isinstance(value, int) or field.name.endswith("alpha"))
    if not (whole and math.isfinite(value) and abs(value) < 2**31):
        kind = "a number" if real else "an integer"
        raise AdapterFileError(f"{cls.__name__}.{field.name} must be {kind}, got {value!r}.")
