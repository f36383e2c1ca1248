"""PEFT's constants: names of files and layers, and the default target modules of model types.

The tables are those of `funcadapt.targets`, and for methods that are not there yet what PEFT 0.21.2 has. They are
copies with lists in them, as in PEFT: changing one changes no default here. Give `target_modules` in the config.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from funcadapt import targets

WEIGHTS_NAME = "adapter_model.bin"
SAFETENSORS_WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
EMBEDDING_LAYER_NAMES = ["embed_tokens", "lm_head"]
SEQ_CLS_HEAD_NAMES = ["score", "classifier"]
INCLUDE_LINEAR_LAYERS_SHORTHAND = "all-linear"
DUMMY_TARGET_MODULES = "dummy-target-modules"
DUMMY_MODEL_CONFIG = {"model_type": "custom"}
COMMON_LAYERS_PATTERN = ["layers", "h", "block", "blocks", "layer"]  # gone from PEFT since 0.11, but not from code
MIN_TARGET_MODULES_FOR_OPTIMIZATION = 20
ALLOWED_COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
UPCAST_DTYPES = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")

Table = dict[str, Any]
"""Model type -> a list of names, or a regular expression."""


def _lists(table: Mapping[str, str | Sequence[str]]) -> Table:
    return {key: value if isinstance(value, str) else list(value) for key, value in table.items()}


def _like(table: Mapping[str, Any], **changes: str) -> Table:
    """A copy of a table, with other targets for some model types."""
    return _lists(table) | {key: value.split() for key, value in changes.items()}


def _by_targets(**model_types: str) -> Table:
    """A table, from targets (joined by two underscores) -> model types that have them."""
    return {key: targets.split("__") for targets, keys in model_types.items() for key in keys.split()}


_MLP = {"gpt2": "mlp.c_proj", "gpt_bigcode": "mlp.c_proj"}

TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING = _lists(targets.LORA)
TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING = _lists(targets.IA3)
TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING = _lists(targets.IA3_FEEDFORWARD)
TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING = _lists(targets.ADALORA)
TRANSFORMERS_MODELS_TO_ADAMSS_TARGET_MODULES_MAPPING = _like(targets.LORA, vit="query value")
TRANSFORMERS_MODELS_TO_BOFT_TARGET_MODULES_MAPPING = _like(targets.LORA)
TRANSFORMERS_MODELS_TO_C3A_TARGET_MODULES_MAPPING = _like(targets.LORA, **_MLP)
TRANSFORMERS_MODELS_TO_DEFT_TARGET_MODULES_MAPPING = _like(targets.LORA)
TRANSFORMERS_MODELS_TO_DELORA_TARGET_MODULES_MAPPING = _like(targets.LORA)
TRANSFORMERS_MODELS_TO_FOURIERFT_TARGET_MODULES_MAPPING = _like(targets.LORA, **_MLP)
TRANSFORMERS_MODELS_TO_FROD_TARGET_MODULES_MAPPING = _like(targets.LORA, phi="q_proj v_proj", vit="query value")
TRANSFORMERS_MODELS_TO_GLORA_TARGET_MODULES_MAPPING = _like(targets.LORA)
TRANSFORMERS_MODELS_TO_GRALORA_TARGET_MODULES_MAPPING = _like(targets.LORA)
TRANSFORMERS_MODELS_TO_HIRA_TARGET_MODULES_MAPPING = _like(targets.LORA)
TRANSFORMERS_MODELS_TO_HRA_TARGET_MODULES_MAPPING = _like(targets.LORA)
TRANSFORMERS_MODELS_TO_LILY_TARGET_MODULES_MAPPING = _like(targets.LORA)
TRANSFORMERS_MODELS_TO_LOHA_TARGET_MODULES_MAPPING = _like(targets.LORA)
TRANSFORMERS_MODELS_TO_LOKR_TARGET_MODULES_MAPPING = _like(targets.LORA)
TRANSFORMERS_MODELS_TO_MISS_TARGET_MODULES_MAPPING = _like(targets.LORA)
TRANSFORMERS_MODELS_TO_OFT_TARGET_MODULES_MAPPING = _like(targets.LORA)
TRANSFORMERS_MODELS_TO_PEANUT_TARGET_MODULES_MAPPING = _like(targets.LORA)
TRANSFORMERS_MODELS_TO_POLY_TARGET_MODULES_MAPPING = _like(targets.LORA)
TRANSFORMERS_MODELS_TO_PSOFT_TARGET_MODULES_MAPPING = _like(targets.LORA)
TRANSFORMERS_MODELS_TO_PVERA_TARGET_MODULES_MAPPING = _like(targets.LORA, phi="q_proj v_proj", dinov2="query value")
TRANSFORMERS_MODELS_TO_RANDLORA_TARGET_MODULES_MAPPING = _like(targets.LORA)
TRANSFORMERS_MODELS_TO_ROAD_TARGET_MODULES_MAPPING = _like(targets.LORA)
TRANSFORMERS_MODELS_TO_SHIRA_TARGET_MODULES_MAPPING = _like(targets.LORA, phi="q_proj v_proj")
TRANSFORMERS_MODELS_TO_SUPERTUNING_TARGET_MODULES_MAPPING = _like(targets.LORA)
TRANSFORMERS_MODELS_TO_TINYLORA_TARGET_MODULES_MAPPING = _like(targets.LORA)
TRANSFORMERS_MODELS_TO_UNILORA_TARGET_MODULES_MAPPING = _like(targets.LORA)
TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING = _like(targets.LORA, phi="q_proj v_proj")
TRANSFORMERS_MODELS_TO_WAVEFT_TARGET_MODULES_MAPPING = _like(
    {key: value for key, value in targets.LORA.items() if key not in ("btlm", "rwkv", "rwkv7")}, **_MLP
)
TRANSFORMERS_MODELS_TO_BEFT_TARGET_MODULES_MAPPING = _by_targets(
    v="t5 mt5",
    value="roberta bert",
    v_proj="opt gptj gpt_neo bart llama llama4 mistral mixtral phi gemma gemma2 gemma3_text qwen2 qwen3",
    value_proj="deberta-v2",
)
TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING = _by_targets(
    input_layernorm__post_attention_layernorm__norm="llama mistral gemma",
    input_layernorm__post_attention_layernorm__ln_f="bloom falcon",
    multi_modal_projector__input_layernorm__post_attention_layernorm__norm__embed_tokens__lm_head="llava",
    layer_norm__final_layer_norm="t5 mt5",
    self_attn_layer_norm__encoder_attn_layer_norm__final_layer_norm="bart",
    ln_1__ln_2__ln_f="gpt2",
    layernorm__LayerNorm__final_layer_norm__self_attn_layer_norm="blip-2",
    ln_1__ln_f="gptj",
    input_layernorm__final_layernorm="phi",
    input_layernorm__post_attention_layernorm__pre_feedforward_layernorm__post_feedforward_layernorm__norm=(
        "gemma2 gemma3_text"
    ),
    post_attention_layernorm="qwen2 qwen3",
)
TRANSFORMERS_MODELS_TO_OSF_TARGET_MODULES_MAPPING = _by_targets(
    q_proj__k_proj__v_proj__o_proj__gate_proj__down_proj__up_proj=(
        "llama llama4 mistral mixtral gemma gemma2 gemma3_text qwen2 qwen3 phi"
    ),
    c_attn__c_proj="gpt2 gpt_bigcode",
    query_key_value__dense_4h_to_h="bloom gpt_neox falcon",
    q_proj__k_proj__v_proj__out_proj__fc1__fc2="opt",
    q_proj__k_proj__v_proj__out_proj__fc_in__fc_out="gptj",
)
TRANSFORMERS_MODELS_TO_VBLORA_TARGET_MODULES_MAPPING = _like(targets.ADALORA, roberta="query value")

# Only transformers before 4.54 need an entry.
TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING: dict[str, Callable[..., Any]] = {}


def bloom_model_postprocess_past_key_value(past_key_values: Sequence[Tensor]) -> tuple[tuple[Tensor, Tensor], ...]:
    """The cache of a prefix, in the form that Bloom's model had before transformers 4.44.

    Args:
        past_key_values: tensors that together are (2 * layers, batch, heads, tokens, head size), keys first.

    Returns:
        For each layer the keys (batch * heads, head size, tokens) and the values (batch * heads, tokens, head size).
        The keys are the numbers of (batch, tokens, heads, head size) in that shape, as prefixes were trained.
    """
    keys, values = torch.cat(tuple(past_key_values)).chunk(2)
    layers, batch, heads, tokens, size = keys.shape
    keys = keys.transpose(2, 3).reshape(layers, batch * heads, size, tokens)
    return tuple(zip(keys, values.flatten(1, 2), strict=True))


def starcoder_model_postprocess_past_key_value(past_key_values: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The cache of a prefix, in the form that GPTBigCode's model had before transformers 4.54.

    Args:
        past_key_values: for each layer (2, batch, heads, tokens, head size), of which the first head is taken.

    Returns:
        For each layer (batch, tokens, 2 * head size).
    """
    return tuple(layer[:, :, 0].permute(1, 2, 0, 3).flatten(-2) for layer in past_key_values)
