"""Adapters in any live `torch.nn.Module`, by functions over it: no `PeftModel` is needed.

The first seven are PEFT's (`peft.functional`). The others are what its low-level API lacks: files, switching off,
merging, weighted combination.

    inject_adapter_in_model(LoraConfig(...), model)
    ...
    save_pretrained(model, "folder")
    with disable_adapters(model): ...
    merge_and_unload(model)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

from funcadapt.peft.config import PeftConfig
from funcadapt.peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from funcadapt.peft.plain import (
    add_weighted_adapter,
    disable_adapters,
    from_pretrained,
    merge_adapters,
    merge_and_unload,
    save_pretrained,
    unload,
    unmerge_adapters,
)
from funcadapt.peft.undoing import as_they_are, delete
from funcadapt.peft.utils.save_and_load import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from funcadapt.view import state
from funcadapt.view.walking import layers

__all__ = [
    "add_weighted_adapter",
    "cast_adapter_dtype",
    "delete",
    "delete_adapter",
    "disable_adapters",
    "from_pretrained",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "load_peft_weights",
    "merge_adapters",
    "merge_and_unload",
    "save_pretrained",
    "set_adapter",
    "set_peft_model_state_dict",
    "set_requires_grad",
    "unload",
    "unmerge_adapters",
]

_M = TypeVar("_M", bound=nn.Module)


def inject_adapter_in_model(
    peft_config: Any,
    model: _M,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Any] | None = None,
) -> _M:
    """Put a new adapter into a model, in place. It becomes the only active one.

    Failure leaves no trace on the model. (PEFT's leaves the config, and layers that it came to: its defect B17.) A
    second adapter that trains a module which the first one trains, too (`modules_to_save`, trained rows), acts there at
    once. (PEFT's does not, nor is it trained, until `set_adapter` is called.)

    Args:
        peft_config: its config.
        model: the model.
        adapter_name: its name.
        low_cpu_mem_usage: whether its tensors are made on the meta device, for `set_peft_model_state_dict` to set.
        state_dict: a checkpoint whose keys say which modules to adapt; the values are not used.

    Returns:
        The same model.

    Raises:
        TypeError: if `peft_config` is no config.
        ValueError: if the config is for prompt learning, or of a method that there is not or that needs a `PeftModel`;
            if it fits nothing in the model; or if the model has an adapter of that name. (PEFT then draws that one's
            weights anew, without a word.)

    Example:
        >>> import torch
        >>> from funcadapt.peft import LoraConfig, inject_adapter_in_model
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2))
        >>> inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), model)
        Sequential(
          (0): lora.Linear(
            (base_layer): Linear(in_features=4, out_features=2, bias=True)
            (lora_dropout): ModuleDict(
              (default): Identity()
            )
            (lora_A): ModuleDict(
              (default): Linear(in_features=4, out_features=2, bias=False)
            )
            (lora_B): ModuleDict(
              (default): Linear(in_features=2, out_features=2, bias=False)
            )
            (lora_embedding_A): ParameterDict()
            (lora_embedding_B): ParameterDict()
            (lora_magnitude_vector): ModuleDict()
          )
        )
    """
    if not isinstance(peft_config, PeftConfig):
        raise TypeError(f"Expected a PeftConfig such as LoraConfig(...), got {type(peft_config).__name__}.")
    if peft_config.is_prompt_learning or peft_config.is_adaption_prompt or type(peft_config).__name__ == "ShadowConfig":
        raise ValueError("`create_and_replace` does not support prompt learning, adaption prompt and shadow yet.")
    if peft_config.peft_type is None or peft_config.peft_type not in PEFT_TYPE_TO_TUNER_MAPPING:
        raise ValueError(
            f"`inject_adapter_in_model` does not support {peft_config.peft_type} yet. Please use `get_peft_model`."
        )
    tuner: Any = PEFT_TYPE_TO_TUNER_MAPPING[peft_config.peft_type]
    made = tuner(model, peft_config, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage, state_dict=state_dict)
    return made.model


def set_adapter(
    model: nn.Module,
    adapter_name: str | Sequence[str],
    inference_mode: bool = False,
    layer_cls: type[Any] | None = None,
) -> None:
    """Make adapters the active ones, and the only trainable ones.

    Args:
        model: the model.
        adapter_name: a name, or several.
        inference_mode: whether they stay frozen.
        layer_cls: only layers of this class are changed, and auxiliary wrappers.

    Raises:
        ValueError: if there is no such adapter (PEFT takes any name, and the model is the base model then), or if
            several of them train one module in full.
    """
    others = [layer for _, layer in layers(model) if layer_cls is not None and not isinstance(layer, layer_cls)]
    with as_they_are(others):
        state.set_adapter(model, adapter_name, inference_mode)


def delete_adapter(
    model: nn.Module, adapter_name: str, prefix: str = "", layer_cls: type[Any] | None = None
) -> list[str] | None:
    """Take an adapter out of a model's layers. Its entry in `model.peft_config` stays, as in PEFT: `delete` does both.

    What is deleted is read off the modules. (PEFT leaves out all those whose path contains the prefix, such as a block
    called "my_lora_block": its defect B12.)

    Args:
        model: the model.
        adapter_name: the adapter's name.
        prefix: accepted, not needed.
        layer_cls: accepted, not needed: an adapter's name is that of one adapter.

    Returns:
        The adapters that are active now, or None if the model has no adapter layer.

    Raises:
        ValueError: if there is no such adapter.
    """
    any_layer = next(layers(model), None) is not None
    left = state.delete_adapter(model, adapter_name)
    return left if any_layer else None


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Turn an adapter's tensors in half precision (or less) into float32.

    Args:
        model: the model.
        adapter_name: the adapter's name.
        autocast_adapter_dtype: nothing is done if false.
    """
    state.cast_adapter_dtype(model, adapter_name, autocast_adapter_dtype)


def set_requires_grad(model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Freeze or unfreeze adapters.

    Args:
        model: the model.
        adapter_names: a name, or several.
        requires_grad: whether they are trained.

    Raises:
        ValueError: if there is no such adapter.
    """
    state.set_requires_grad(model, adapter_names, requires_grad)
