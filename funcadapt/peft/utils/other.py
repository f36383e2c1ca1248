"""`peft.utils.other`: helpers that code outside PEFT imports from it."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from funcadapt._torch import named_modules
from funcadapt.config import matching_pattern
from funcadapt.peft.absent import OutOfScopeError
from funcadapt.peft.utils import constants
from funcadapt.peft.utils.preparing import (
    fsdp_auto_wrap_policy,
    get_auto_gptq_quant_linear,
    get_gptqmodel_quant_linear,
    get_quantization_config,
    is_gptqmodel_quant_linear,
    prepare_model_for_kbit_training,
)
from funcadapt.view.auxiliary import ModulesToSaveWrapper, TrainableTokensWrapper
from funcadapt.view.wrapper import AuxiliaryTrainingWrapper

__all__ = [
    "AuxiliaryTrainingWrapper",
    "ModulesToSaveWrapper",
    "TrainableTokensWrapper",
    "_freeze_adapter",
    "_get_batch_size",
    "_get_input_embeddings_name",
    "_get_submodules",
    "_get_submodules_with_grandparent",
    "_is_valid_match",
    "_prepare_prompt_learning_config",
    "_set_adapter",
    "_set_layer_requires_grad",
    "cast_mixed_precision_params",
    "check_file_exists_on_hf_hub",
    "fsdp_auto_wrap_policy",
    "get_auto_gptq_quant_linear",
    "get_gptqmodel_quant_linear",
    "get_pattern_key",
    "get_quantization_config",
    "id_tensor_storage",
    "infer_device",
    "is_gptqmodel_quant_linear",
    "match_target_against_key",
    "prepare_model_for_kbit_training",
    "shift_tokens_right",
    "str_to_bool",
    "transpose",
]


def __getattr__(name: str) -> Any:
    """The constants, which PEFT has here, too."""
    try:
        return getattr(constants, name)
    except AttributeError as error:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from error


# -- modules and parameters ---------------------------------------------------------------------------------


def _get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """The parent of the module at a path, the module, and its name in the parent."""
    parent, _, name = key.rpartition(".")
    return model.get_submodule(parent), model.get_submodule(key), name


def _get_submodules_with_grandparent(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module | None, nn.Module, str]:
    """`_get_submodules`, with the parent's parent as the second; a module just below the model has the model there."""
    parent, target, name = _get_submodules(model, key)
    return parent, model.get_submodule(".".join(key.split(".")[:-2])), target, name


def _freeze_adapter(model: nn.Module, adapter_name: str) -> None:
    """Freeze the parameters of an adapter: those with its name between the dots of theirs.

    PEFT freezes all whose name has the adapter's anywhere in it: "a" is every `lora_A.b.weight` of a `layers.0.attn`.
    """
    for name, parameter in model.named_parameters():
        if adapter_name in name.split("."):
            parameter.requires_grad = False


def _set_layer_requires_grad(layer: nn.Module | Tensor, requires_grad: bool) -> None:
    """Train or freeze a tensor, or the parameters of a module; those that are no leaves (FSDP) are left alone."""
    for tensor in [layer] if isinstance(layer, Tensor) else layer.parameters():
        if tensor.is_leaf:
            tensor.requires_grad_(requires_grad)


def _set_adapter(model: nn.Module, adapter_name: str | list[str], inference_mode: bool = False) -> None:
    """Choose the active adapter of the modules that are trained in full, and of trainable tokens."""
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            name = module.check_set_adapter(adapter_name)
            has = name is not None and name in module.available_adapters
            module.set_adapter(name if has else [], inference_mode=inference_mode)  # pyright: ignore[reportArgumentType]


def _get_input_embeddings_name(model: nn.Module, default: str | None = None) -> str | None:
    """The path of a transformers model's input embedding."""
    find: Any = getattr(model, "get_input_embeddings", None)
    embedding = find() if find else None
    return next((path for path, module in named_modules(model) if module is embedding), default) if find else default


def transpose(weight: Tensor, fan_in_fan_out: bool) -> Tensor:
    """A weight, transposed if it is stored as (in, out); a parameter stays one."""
    if not fan_in_fan_out:
        return weight
    return nn.Parameter(weight.T) if isinstance(weight, nn.Parameter) else weight.T


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast what is frozen to a dtype, and what is trained to float32.

    Args:
        model: the model, changed in place.
        dtype: float16 or bfloat16.

    Example:
        >>> import torch
        >>> from funcadapt.peft.utils import cast_mixed_precision_params
        >>> layer = torch.nn.Linear(2, 2)
        >>> _ = layer.weight.requires_grad_(False)
        >>> cast_mixed_precision_params(layer, torch.bfloat16)
        >>> layer.weight.dtype, layer.bias.dtype
        (torch.bfloat16, torch.float32)
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)


def id_tensor_storage(tensor: Tensor) -> tuple[torch.device, int, int]:
    """What identifies a tensor's storage: its device, address and size. Tensors on meta all have the same address."""
    storage = tensor.untyped_storage()
    return tensor.device, storage.data_ptr(), storage.nbytes()


def infer_device() -> str:
    """The kind of device that PEFT loads adapters to: "cuda", or another accelerator, or "cpu"."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else accelerator.type


# -- names --------------------------------------------------------------------------------------------------


def match_target_against_key(target_pattern: str, key: str) -> re.Match[str] | None:
    """Whether a `target_modules` that is a regular expression matches a path."""
    return re.fullmatch(target_pattern, key)


def get_pattern_key(pattern_keys: Sequence[str], key_to_match: str) -> str:
    """The first of the keys of `rank_pattern` or `alpha_pattern` that matches a path.

    Args:
        pattern_keys: the keys.
        key_to_match: the path.

    Returns:
        The key, or the path if there is none.

    Example:
        >>> from funcadapt.peft.utils.other import get_pattern_key
        >>> get_pattern_key(["k_proj", "layers.0.*"], "layers.0.q_proj")
        'layers.0.*'
    """
    found = matching_pattern(pattern_keys, key_to_match)
    return key_to_match if found is None else found


def _is_valid_match(key: str, target_key: str) -> bool:
    """Whether a path is, or ends after a dot in, another."""
    return key == target_key or key.endswith(f".{target_key}")


def str_to_bool(value: str) -> int:
    """A switch as people write it.

    Args:
        value: y, yes, t, true, on, 1, n, no, f, false, off or 0.

    Returns:
        1 or 0.

    Raises:
        ValueError: for anything else.
    """
    if value.lower() in ("y", "yes", "t", "true", "on", "1"):
        return 1
    if value.lower() in ("n", "no", "f", "false", "off", "0"):
        return 0
    raise ValueError(f"invalid truth value {value}")


def check_file_exists_on_hf_hub(repo_id: str, filename: str, **kwargs: Any) -> bool | None:
    """Whether a repository on the Hub has a file.

    Args:
        repo_id: the repository.
        filename: the file.
        **kwargs: for `huggingface_hub.file_exists`.

    Returns:
        Whether it does; None if that cannot be found out, as offline.
    """
    if str_to_bool(os.environ.get("HF_HUB_OFFLINE", "0")):
        return None
    from huggingface_hub import file_exists
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    try:
        return bool(file_exists(repo_id, filename, **kwargs))
    except (HFValidationError, EntryNotFoundError):
        return None
    except Exception as error:
        warnings.warn(
            f"Unable to fetch remote file due to the following error {error} - silently ignoring the lookup for the "
            f"file {filename} in {repo_id}.",
            stacklevel=2,
        )
        return None


# -- tokens -------------------------------------------------------------------------------------------------


def shift_tokens_right(input_ids: Tensor, pad_token_id: int, decoder_start_token_id: int) -> Tensor:
    """The inputs of a decoder, from its labels: the start token, and all but the last; -100 becomes the pad token.

    Args:
        input_ids: (batch, length).
        pad_token_id: the pad token.
        decoder_start_token_id: the start token.

    Returns:
        A tensor of the same shape.

    Raises:
        ValueError: if there is no pad token.

    Example:
        >>> import torch
        >>> from funcadapt.peft.utils import shift_tokens_right
        >>> shift_tokens_right(torch.tensor([[5, 6, -100, 7]]), pad_token_id=0, decoder_start_token_id=1)
        tensor([[1, 5, 6, 0]])
    """
    if pad_token_id is None:  # pyright: ignore[reportUnnecessaryComparison] - what a model's config has
        raise ValueError("self.model.config.pad_token_id has to be defined.")
    start = torch.full_like(input_ids[:, :1], decoder_start_token_id)
    shifted = torch.cat((start, input_ids[:, :-1]), dim=1)
    return shifted.masked_fill(shifted == -100, pad_token_id)


def _get_batch_size(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> int:
    """The number of rows of a batch, from whichever of the two there is."""
    given = inputs_embeds if input_ids is None else input_ids
    if given is None:
        raise ValueError("You have to provide either input_ids or inputs_embeds")
    return given.shape[0]


def _prepare_prompt_learning_config(peft_config: Any, model_config: Any) -> NoReturn:
    """Prompt learning is out of scope: it adapts no layer."""
    raise OutOfScopeError(
        f"{type(peft_config).__name__} is a config of prompt learning, which funcadapt does not do: it adapts layers. "
        "Use PEFT for it, or LoraConfig."
    )
