"""`peft.utils`: what code outside PEFT imports from it. See `funcadapt.peft` for the rest."""

from __future__ import annotations

import importlib
from typing import Any

from funcadapt.peft.utils import constants
from funcadapt.peft.utils.error import NoMatchingPeftModuleError as NoMatchingPeftModuleError
from funcadapt.peft.utils.error import PeftError as PeftError
from funcadapt.peft.utils.warning import PeftWarning as PeftWarning

# Where the other names are. They are looked up on first use: most are from modules that import this one.
_PLACES: dict[str, tuple[str, ...]] = {
    "integrations": ("map_cache_to_layer_device_map",),
    "loftq_utils": ("replace_lora_weights_loftq",),
    "other": (
        "AuxiliaryTrainingWrapper",
        "ModulesToSaveWrapper",
        "TrainableTokensWrapper",
        "_freeze_adapter",
        "_get_batch_size",
        "_get_input_embeddings_name",
        "_get_submodules",
        "_is_valid_match",
        "_prepare_prompt_learning_config",
        "_set_adapter",
        "cast_mixed_precision_params",
        "fsdp_auto_wrap_policy",
        "get_auto_gptq_quant_linear",
        "get_gptqmodel_quant_linear",
        "get_quantization_config",
        "id_tensor_storage",
        "infer_device",
        "prepare_model_for_kbit_training",
        "shift_tokens_right",
        "transpose",
    ),
    "peft_types": ("PeftType", "TaskType", "register_peft_method"),
    "quantization_utils": ("get_quantization_kwargs", "quantization_extra_repr", "resolve_quantization_backend"),
    "save_and_load": (
        "get_base_model_state_dict",
        "get_peft_model_state_dict",
        "load_peft_weights",
        "set_base_model_state_dict",
        "set_peft_model_state_dict",
    ),
}
_PLACE = {name: module for module, names in _PLACES.items() for name in names}
_CONSTANTS = (
    "ALLOWED_COMPUTE_DTYPES",
    "CONFIG_NAME",
    "INCLUDE_LINEAR_LAYERS_SHORTHAND",
    "SAFETENSORS_WEIGHTS_NAME",
    "UPCAST_DTYPES",
    "WEIGHTS_NAME",
    "bloom_model_postprocess_past_key_value",
    *(name for name in vars(constants) if name.startswith("TRANSFORMERS_")),
)

__all__ = [  # pyright: ignore[reportUnsupportedDunderAll]
    "NoMatchingPeftModuleError",
    "PeftError",
    "PeftWarning",
    *_PLACE,  # pyright: ignore
    *_CONSTANTS,
]


def __getattr__(name: str) -> Any:
    if name in _CONSTANTS:
        return getattr(constants, name)
    if name not in _PLACE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACE[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
