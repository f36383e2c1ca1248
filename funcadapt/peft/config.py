"""PEFT's configs: mutable dataclasses. This is their base; `LoraConfig` and so on are generated of funcadapt's."""

from __future__ import annotations

import dataclasses
import inspect
import json
import numbers
import os
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from funcadapt import shadow as shadow  # registers its config
from funcadapt.config import AdapterConfig
from funcadapt.peft import left_out, lora_parts
from funcadapt.peft.hub import HubMixin, hub_arguments, local_or_downloaded
from funcadapt.peft.types import PEFT_VERSION, PeftType, TaskType, as_peft_type
from funcadapt.xlora import filled

CONFIG_NAME = "adapter_config.json"

# PEFT turns lists into sets in these fields, but for three methods
_SET_FIELDS = ("target_modules", "exclude_modules", "feedforward_modules")
_LISTS_KEPT = ("LN_TUNING", "OSF", "TRAINABLE_TOKENS")


@dataclass
class PeftConfigMixin(HubMixin):
    """What every config of PEFT has: reading and writing `adapter_config.json`.

    Attributes:
        task_type: the task, a `TaskType` or its name.
        peft_type: the method, a `PeftType`. A config of a method sets it by itself.
        auto_mapping: the classes of a base model that is none of transformers' auto classes.
        peft_version: the version of PEFT whose format this is.
    """

    task_type: TaskType | str | None = None
    peft_type: PeftType | str | None = None
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None

    def __post_init__(self) -> None:
        if self.task_type is not None and self.task_type not in list(TaskType):
            known = ", ".join(task.value for task in TaskType)
            raise ValueError(
                f"Invalid task type: '{self.task_type}'. Must be one of the following task types: {known}."
            )
        if self.peft_version is None:
            self.peft_version = PEFT_VERSION

    def to_dict(self) -> dict[str, Any]:
        """All fields, nested configs as dicts; what is only valid at runtime is left out.

        Returns:
            A copy of the fields.
        """
        values = dataclasses.asdict(self)
        values.pop("runtime_config", None)
        return values

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write `adapter_config.json`.

        Args:
            save_directory: the directory; it is made if need be.
            **kwargs: `auto_mapping_dict`, which is written as `auto_mapping`. The rest is ignored, as in PEFT.

        Raises:
            AssertionError: if the path is a file.
        """
        if os.path.isfile(save_directory):
            raise AssertionError(f"Provided path ({save_directory}) should be a directory, not a file")
        values = self.to_dict()
        if (auto_mapping := kwargs.get("auto_mapping_dict")) is not None:
            values["auto_mapping"] = auto_mapping
        # a set has no order of its own: sorted, the same config gives the same file
        values = {k: sorted(v) if isinstance(v, set) else v for k, v in values.items()}  # pyright: ignore
        os.makedirs(save_directory, exist_ok=True)
        Path(save_directory, CONFIG_NAME).write_text(json.dumps(values, indent=2, sort_keys=True), encoding="utf-8")

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> Any:
        """A config from the fields of a file; `peft_type` among them says of which class.

        Fields that the class does not have are dropped with a warning, as PEFT does: they come from another version.

        Args:
            **kwargs: the fields.

        Returns:
            The config; of the calling class if there is no `peft_type`.

        Raises:
            TypeError: if there are unknown fields and no `peft_type`.
        """
        from funcadapt.peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

        target: type[Any] = PEFT_TYPE_TO_CONFIG_MAPPING[kwargs["peft_type"]] if "peft_type" in kwargs else cls
        # a class without fields of its own is a stand-in, which refuses whatever it is given
        fields = (
            {f.name for f in dataclasses.fields(target)} if "__dataclass_fields__" in target.__dict__ else set(kwargs)
        )
        unknown = sorted(set(kwargs) - fields)
        if unknown and "peft_type" not in kwargs:
            raise TypeError(
                f"The {cls.__name__} config that is trying to be loaded is missing required keys: peft_type."
            )
        if unknown:
            warnings.warn(
                f"Unexpected keyword arguments {unknown} for class {target.__name__}, these are ignored. This probably "
                "means that you're loading a configuration file that was saved using a higher version of the library "
                "and additional parameters have been introduced since. It is highly recommended to upgrade the PEFT "
                "version before continuing (e.g. by running `pip install -U peft`).",
                stacklevel=3,
            )
        return target(**{k: v for k, v in kwargs.items() if k in fields})

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any
    ) -> Any:
        """Read a config from a directory or from the Hub.

        Args:
            pretrained_model_name_or_path: the directory, or the id of a repository.
            subfolder: the folder in it.
            **kwargs: what `huggingface_hub.hf_hub_download` takes: `revision`, `token`, `cache_dir` ...

        Returns:
            The config, of the class that the file's `peft_type` says.

        Raises:
            ValueError: if there is no `adapter_config.json`, or its values are refused.

        Example:
            >>> import tempfile
            >>> from funcadapt.peft import LoraConfig, PeftConfig
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     LoraConfig(r=4, target_modules=["q"]).save_pretrained(folder)
            ...     PeftConfig.from_pretrained(folder).r
            4
        """
        path = os.fspath(pretrained_model_name_or_path)
        file = local_or_downloaded(path, CONFIG_NAME, subfolder, kwargs)
        # PEFT: the calling class's own fields can be given, and the file's values win
        own = inspect.get_annotations(cls).keys() - {"revision"}
        given = {name: value for name, value in kwargs.items() if name in own}
        return cls.from_peft_type(**cls.check_kwargs(**{**given, **cls.from_json_file(file)}))

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike[str], **kwargs: Any) -> dict[str, Any]:
        """The fields that a file has.

        Args:
            path_json_file: the file.
            **kwargs: ignored, as in PEFT.

        Returns:
            The fields.
        """
        values: dict[str, Any] = json.loads(Path(path_json_file).read_text(encoding="utf-8"))
        if "runtime_config" in values:
            warnings.warn(
                "The configuration file contains a `runtime_config` key. This is ignored. Runtime configurations are "
                "only valid at runtime.",
                stacklevel=2,
            )
            del values["runtime_config"]
        return values

    @classmethod
    def _split_kwargs(cls, kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Arguments for the Hub, for the config, and others."""
        hub, own = hub_arguments(), inspect.get_annotations(cls)
        parts: tuple[dict[str, Any], dict[str, Any], dict[str, Any]] = ({}, {}, {})
        for name, value in kwargs.items():
            parts[0 if name in hub else 1 if name in own else 2][name] = value
        return parts

    @classmethod
    def _get_peft_type(cls, model_id: str | os.PathLike[str], **hf_hub_download_kwargs: Any) -> str:
        """The `peft_type` that the config of a directory or repository says."""
        arguments = dict(hf_hub_download_kwargs)
        file = local_or_downloaded(os.fspath(model_id), CONFIG_NAME, arguments.pop("subfolder", None), arguments)
        return cls.from_json_file(file)["peft_type"]

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """The fields of a file, as they are.

        Args:
            **kwargs: the fields.

        Returns:
            The same.
        """
        return kwargs

    @property
    def is_prompt_learning(self) -> bool:
        """Whether this is for prompt learning, which funcadapt does not have."""
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        """Whether this is for adaption prompts, which funcadapt does not have."""
        return False


@dataclass
class PeftConfig(PeftConfigMixin):
    """A config of PEFT. Those of methods derive from it.

    Attributes:
        base_model_name_or_path: the model that the adapter was trained on.
        revision: the revision of that model.
        peft_type: the method.
        task_type: the task.
        inference_mode: whether the adapter's parameters are made without gradients.
    """

    base_model_name_or_path: str | None = None
    revision: str | None = None
    peft_type: PeftType | str | None = None
    task_type: TaskType | str | None = None
    inference_mode: bool = False

    _funcadapt: ClassVar[type[AdapterConfig] | None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self._funcadapt is None:
            return
        self.peft_type = as_peft_type(self._funcadapt.peft_type)
        if self.peft_type not in _LISTS_KEPT:
            for name in _SET_FIELDS:
                if isinstance(names := getattr(self, name, None), list):
                    setattr(self, name, set(names))  # pyright: ignore[reportUnknownArgumentType]
        for cls in reversed(type(self).__mro__):
            if adjust := _ADJUSTMENTS.get(cls.__name__):
                adjust(self)
        left_out.warn_when_made(self)
        self._frozen()  # it checks the values, and warns

    def to_funcadapt(self) -> Any:
        """The frozen config of funcadapt with these values.

        Returns:
            E.g. an `fa.LoraConfig`.

        Raises:
            TypeError: if this is no config of a method, or a value is of the wrong type.
            ValueError: if the values contradict each other.
            NotImplementedError: if they ask for a part of PEFT that funcadapt does not have.

        Example:
            >>> from funcadapt.peft import LoraConfig
            >>> LoraConfig(r=4, target_modules={"v", "q"}).to_funcadapt().target_modules
            ('q', 'v')
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the constructor gave them
            return self._frozen()

    def _frozen(self) -> Any:
        if self._funcadapt is None:
            raise TypeError(f"{type(self).__name__} is for no method; use the method's own, such as LoraConfig.")
        names = [f.name for f in dataclasses.fields(self._funcadapt)]
        return self._funcadapt(**{name: _plain(getattr(self, name)) for name in names if hasattr(self, name)})

    @staticmethod
    def from_funcadapt(config: AdapterConfig) -> Any:
        """PEFT's config with the values of one of funcadapt's.

        Args:
            config: the config.

        Returns:
            The config, of the generated class of the same name.

        Example:
            >>> import funcadapt as fa
            >>> PeftConfig.from_funcadapt(fa.LoraConfig(r=4, target_modules=["q"])).target_modules
            {'q'}
        """
        from funcadapt.peft.method_configs import config_class

        values = config.to_dict()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nothing is new here
            return config_class(type(config))(**values)

    def _register_custom_module(self, mapping: Mapping[type[Any], type[Any]]) -> None:
        """PEFT's experimental custom LoRA layers.

        Args:
            mapping: a type of module -> the LoRA layer for it.

        Raises:
            NotImplementedError: always; a method of one's own is a `funcadapt.Method`.
        """
        raise NotImplementedError(
            f"Custom layers ({', '.join(cls.__name__ for cls in mapping)}) are not supported by {type(self).__name__}. "
            "Register a method of your own with funcadapt.register(funcadapt.Method(...))."
        )


@dataclass
class PromptLearningConfig(PeftConfig):
    """The base of PEFT's configs for prompt learning, for `isinstance`: funcadapt has no prompt learning.

    Attributes:
        num_virtual_tokens: as in PEFT, like all fields.
        token_dim: ...
        num_transformer_submodules: ...
        num_attention_heads: ...
        num_layers: ...
        modules_to_save: ...
    """

    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    modules_to_save: list[str] | None = None

    @property
    def is_prompt_learning(self) -> bool:
        """True."""
        return True


def _plain(value: Any) -> Any:
    """A value as funcadapt's configs take it: nested configs, and OmegaConf's and numpy's values, as built-in types."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, set | frozenset | str | bytes):
        return value  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, Collection):
        return [_plain(v) for v in value]  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value


def _adjust_supertuning(config: Any) -> None:
    if config.lora_alpha is None and isinstance(config.r, int):
        config.lora_alpha = 2 * config.r


# class -> what it does after construction, beyond what its fields say
_ADJUSTMENTS: dict[str, Callable[[Any], None]] = {
    "LoraConfig": lora_parts.adjust_lora,
    "SupertuningConfig": _adjust_supertuning,
    "XLoraConfig": lambda config: config.__dict__.update(filled(config)),
}


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # the configs of methods are made by another module, and are of this one for pickle
    from funcadapt.peft.method_configs import config_named

    return lora_parts.CLASSES[name] if name in lora_parts.CLASSES else config_named(name)
