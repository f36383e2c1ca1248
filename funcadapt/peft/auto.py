"""`AutoPeftModel*`: the base model that a checkpoint names, with the adapter in it."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import Any, ClassVar, NoReturn

from funcadapt.peft.config import PeftConfig
from funcadapt.peft.model import PeftModel
from funcadapt.peft.tasks import (
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)

_TOKENIZER = "tokenizer_config.json"


def get_default_import_allowlist() -> list[str]:
    """The packages that a checkpoint's `auto_mapping` may have imported."""
    return ["diffusers", "lerobot", "megatron-core", "transformers"]


def check_import_allowlist(allowlist: Sequence[str], parent_name: str) -> bool:
    """Whether a module is in one of the allowed packages.

    Args:
        allowlist: the packages.
        parent_name: the module's name.

    Returns:
        Whether it is.

    Example:
        >>> check_import_allowlist(["transformers"], "transformers.models.llama"), check_import_allowlist(["os"], "osx")
        (True, False)
    """
    return any(parent_name == allowed or parent_name.startswith(f"{allowed}.") for allowed in allowlist)


class _BaseAutoPeftModel:
    _target_class: ClassVar[Any] = None
    _target_peft_class: ClassVar[type[PeftModel]] = PeftModel
    _auto_class: ClassVar[str] = ""  # the name of transformers' class for the task

    def __init__(self, *args: Any, **kwargs: Any) -> NoReturn:
        name = type(self).__name__
        raise OSError(
            f"{name} is designed to be instantiated using the `{name}.from_pretrained(pretrained_model_name_or_path)` "
            f"or `{name}.from_config(config)` methods."
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        import_allowlist: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load the base model that an adapter's config names, and the adapter into it.

        Args:
            pretrained_model_name_or_path: the adapter's folder, or its repository on the Hub.
            adapter_name: the name that the adapter gets.
            is_trainable: whether it is trained further.
            config: the adapter's config, if not the one in the folder.
            revision: the adapter's revision on the Hub.
            import_allowlist: the packages from which the base model's class may come, where the config names it.
            **kwargs: for the base model's `from_pretrained`, and for `PeftModel.from_pretrained`.

        Returns:
            The `PeftModel`.

        Raises:
            ValueError: if the config is of another task, or names no class that may be imported.
        """
        path = os.fspath(pretrained_model_name_or_path)
        found: Any = PeftConfig.from_pretrained(path, revision=revision, **kwargs)
        target = cls._base_class(found, import_allowlist)
        model = target.from_pretrained(found.base_model_name_or_path, revision=found.revision, **kwargs)
        _fit_vocabulary(model, path, revision, kwargs)
        return cls._target_peft_class.from_pretrained(
            model,
            path,
            adapter_name=adapter_name,
            is_trainable=is_trainable,
            config=config,
            revision=revision,
            **kwargs,
        )

    @classmethod
    def _base_class(cls, config: Any, allowlist: Sequence[str] | None) -> Any:
        task: str | None = config.task_type
        if task is not None:
            if not cls._auto_class and cls._target_class is None:
                raise ValueError(
                    "Cannot use `AutoPeftModel` with a task type, please use a specific class for your task type. "
                    "(e.g. `AutoPeftModelForCausalLM` for `task_type='CAUSAL_LM'`)"
                )
            expected = MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task].__name__
            if cls._target_peft_class.__name__ != expected:
                raise ValueError(
                    f"Expected target PEFT class: {expected}, but you have asked for: "
                    f"{cls._target_peft_class.__name__} make sure that you are loading the correct model for your task "
                    "type."
                )
            return cls._target_class or getattr(importlib.import_module("transformers"), cls._auto_class)
        mapping: Any = config.auto_mapping
        if mapping is None:
            raise ValueError(
                "Cannot infer the auto class from the config, please make sure that you are loading the correct model "
                "for your task type."
            )
        library: str = mapping["parent_library"]
        if not check_import_allowlist(get_default_import_allowlist() if allowlist is None else allowlist, library):
            raise ValueError(
                f"The auto mapping wants to import '{library}' which is not in the import allowlist. If you are sure "
                f"that importing this library is safe, specify `import_allowlist=['{library}']` in `from_pretrained()`."
            )
        return getattr(importlib.import_module(library), mapping["base_model_class"])


def _fit_vocabulary(model: Any, path: str, revision: str | None, kwargs: dict[str, Any]) -> None:
    """Enlarge the embeddings, if the checkpoint has a tokenizer of more tokens than the model knows."""
    token: Any = kwargs.get("token") or kwargs.get("use_auth_token")
    if not hasattr(model, "get_input_embeddings") or not _has_tokenizer(path, revision, token, kwargs):
        return
    transformers: Any = importlib.import_module("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        path, revision=revision, token=token, trust_remote_code=kwargs.get("trust_remote_code", False)
    )
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))


def _has_tokenizer(path: str, revision: str | None, token: Any, kwargs: dict[str, Any]) -> bool:
    if os.path.isdir(path):
        return os.path.exists(os.path.join(path, _TOKENIZER))
    from huggingface_hub import file_exists

    return file_exists(path, _TOKENIZER, revision=revision, repo_type=kwargs.get("repo_type"), token=token)


class AutoPeftModel(_BaseAutoPeftModel):
    """For an adapter without a task: the base model's class is the one in its config's `auto_mapping`."""


class AutoPeftModelForCausalLM(_BaseAutoPeftModel):
    """For adapters of models that continue text."""

    _target_peft_class = PeftModelForCausalLM
    _auto_class = "AutoModelForCausalLM"


class AutoPeftModelForSeq2SeqLM(_BaseAutoPeftModel):
    """For adapters of models that turn text into text."""

    _target_peft_class = PeftModelForSeq2SeqLM
    _auto_class = "AutoModelForSeq2SeqLM"


class AutoPeftModelForSequenceClassification(_BaseAutoPeftModel):
    """For adapters of models that classify sequences."""

    _target_peft_class = PeftModelForSequenceClassification
    _auto_class = "AutoModelForSequenceClassification"


class AutoPeftModelForTokenClassification(_BaseAutoPeftModel):
    """For adapters of models that classify tokens."""

    _target_peft_class = PeftModelForTokenClassification
    _auto_class = "AutoModelForTokenClassification"


class AutoPeftModelForQuestionAnswering(_BaseAutoPeftModel):
    """For adapters of models that answer questions by spans."""

    _target_peft_class = PeftModelForQuestionAnswering
    _auto_class = "AutoModelForQuestionAnswering"


class AutoPeftModelForFeatureExtraction(_BaseAutoPeftModel):
    """For adapters of models that give features."""

    _target_peft_class = PeftModelForFeatureExtraction
    _auto_class = "AutoModel"
