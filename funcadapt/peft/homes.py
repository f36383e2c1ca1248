"""Where the names that `peft` itself has are in this package, but for those of methods."""

from __future__ import annotations

# module of this package -> the names that `peft` itself has of it
HOMES: dict[str, tuple[str, ...]] = {
    "config": ("PeftConfig", "PromptLearningConfig"),
    "types": ("PeftType", "TaskType"),
    "mapping": (
        "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
        "PEFT_TYPE_TO_CONFIG_MAPPING",
        "PEFT_TYPE_TO_MIXED_MODEL_MAPPING",
        "PEFT_TYPE_TO_TUNER_MAPPING",
        "get_peft_config",
    ),
    "functional": (
        "get_peft_model_state_dict",
        "inject_adapter_in_model",
        "load_peft_weights",
        "set_peft_model_state_dict",
    ),
    "model": ("PeftModel", "get_peft_model"),
    "tasks": (
        "PeftModelForCausalLM",
        "PeftModelForFeatureExtraction",
        "PeftModelForQuestionAnswering",
        "PeftModelForSeq2SeqLM",
        "PeftModelForSequenceClassification",
        "PeftModelForTokenClassification",
    ),
    "mixed_model": ("PeftMixedModel",),
    "auto": (
        "AutoPeftModel",
        "AutoPeftModelForCausalLM",
        "AutoPeftModelForFeatureExtraction",
        "AutoPeftModelForQuestionAnswering",
        "AutoPeftModelForSeq2SeqLM",
        "AutoPeftModelForSequenceClassification",
        "AutoPeftModelForTokenClassification",
    ),
    "status": ("get_layer_status", "get_model_status"),
    "helpers": ("find_kappa_target_modules",),
    "utils": (
        "NoMatchingPeftModuleError",
        "PeftError",
        "PeftWarning",
        "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING",
        "bloom_model_postprocess_past_key_value",
        "cast_mixed_precision_params",
        "get_base_model_state_dict",
        "prepare_model_for_kbit_training",
        "replace_lora_weights_loftq",
        "set_base_model_state_dict",
        "shift_tokens_right",
    ),
}

HOME_OF: dict[str, str] = {name: home for home, names in HOMES.items() for name in names}
