"""`get_peft_model`: the way to a `PeftModel`."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from funcadapt.peft.checks import check_injectable, warn_of_prefix
from funcadapt.peft.config import PeftConfig
from funcadapt.view.layer import AdapterLayer


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> Any:
    """Inject an adapter into a model, and wrap it in the `PeftModel` of its task.

    Args:
        model: the model; it is changed in place.
        peft_config: the adapter's config.
        adapter_name: its name.
        mixed: whether adapters of other types may follow.
        autocast_adapter_dtype: whether its weights in half precision (or less) become float32.
        revision: the base model's revision, for the config.
        low_cpu_mem_usage: whether it is made on the meta device, for weights that are loaded next.

    Returns:
        A `PeftModel`, or a `PeftMixedModel`. If anything fails, the model is what it was.

    Example:
        >>> import torch
        >>> from funcadapt.peft import LoraConfig
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> wrapped = get_peft_model(net, LoraConfig(r=2, target_modules=["0"]))
        >>> wrapped.print_trainable_parameters()
        trainable params: 14 || all params: 29 || trainable%: 48.2759
    """
    from funcadapt.peft.mixed_model import PeftMixedModel
    from funcadapt.peft.model import PeftModel
    from funcadapt.peft.tasks import MODEL_TYPE_TO_PEFT_MODEL_MAPPING

    check_injectable(peft_config)
    _name_base_model(model, peft_config, revision)
    warn_of_prefix(adapter_name, peft_config)
    if mixed:
        return PeftMixedModel(model, peft_config, adapter_name=adapter_name)
    wrapper = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(peft_config.task_type or "", PeftModel)
    return wrapper(
        model,
        peft_config,
        adapter_name=adapter_name,
        autocast_adapter_dtype=autocast_adapter_dtype,
        low_cpu_mem_usage=low_cpu_mem_usage,
    )


def _name_base_model(model: nn.Module, config: PeftConfig, revision: str | None) -> None:
    """Write the model's name and revision into the config, with PEFT's warnings."""
    old_name = config.base_model_name_or_path
    # a model of transformers that was made from a config is called ""
    new_name: str | None = model.__dict__.get("name_or_path", None) or None
    config.base_model_name_or_path = new_name
    if any(isinstance(module, AdapterLayer) for module in model.modules()):
        warnings.warn(
            "You are trying to modify a model with PEFT for a second time. If you want to reload the model with a "
            "different config, make sure to call `.unload()` before.",
            stacklevel=3,
        )
    if old_name is not None and old_name != new_name:
        warnings.warn(
            f"The PEFT config's `base_model_name_or_path` was renamed from '{old_name}' to '{new_name}'. "
            "Please ensure that the correct base model is loaded when loading this checkpoint.",
            stacklevel=3,
        )
    if revision is not None:
        if config.revision is not None and config.revision != revision:
            warnings.warn(
                f"peft config has already set base model revision to {config.revision}, overwriting with revision "
                f"{revision}",
                stacklevel=3,
            )
        config.revision = revision
