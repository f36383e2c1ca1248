"""A LoRA whose init took itself out of the base weights, as a plain LoRA for the weights as they were."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from funcadapt.errors import AdapterError


def subtract_initial(trained: Mapping[str, Tensor], initial: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """The tensors of a LoRA of twice the rank that is the difference of a trained adapter and its own start.

    With B0 A0 taken out of the base weight, the trained model has W - s B0 A0 + s B A = W + s [B, -B0] [A; A0].
    Embeddings are converted, too, and modules that were trained in full are kept: PEFT leaves both out of the file.

    Args:
        trained: the adapter's tensors, by their keys in a checkpoint.
        initial: those of the same adapter before training.
        config: its config, of PEFT.

    Returns:
        The tensors by the same keys.

    Raises:
        AdapterError: a ValueError, if the method is no LoRA whose update is one product, or the two do not match.
    """
    if config.peft_type != "LORA":
        raise AdapterError(
            f"Passing `path_initial_model_for_weight_conversion` to `save_pretrained` is not supported for "
            f"{config.peft_type.value}: only LoRA's inits change the base weights."
        )
    if config.use_dora:
        raise AdapterError(
            "Passing `path_initial_model_for_weight_conversion` to `save_pretrained` is not supported for DoRA, whose "
            "weight is no sum of the base weight and a product."
        )
    if config.use_rslora and (config.rank_pattern or config.alpha_pattern):
        raise AdapterError(
            "Passing `path_initial_model_for_weight_conversion` to `save_pretrained` is not supported when using "
            "`rank_pattern` or `alpha_pattern` at the same time as `use_rslora=True`."
        )
    done: dict[str, Tensor] = {}
    for key, tensor in trained.items():
        part = key.removesuffix(".weight").rpartition(".")[2]
        if part not in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"):
            done[key] = tensor
            continue
        if key not in initial or initial[key].shape != tensor.shape:
            raise AdapterError(f"The initial adapter has no tensor {key!r} of shape {tuple(tensor.shape)}.")
        start = initial[key].to(tensor)
        first = part.endswith("_A")
        done[key] = torch.cat([tensor, start if first else -start], dim=0 if first else 1)
    return done


def doubled_config(config: Any) -> Any:
    """The config of that LoRA: twice the rank, the same scaling, and an init that changes nothing.

    Args:
        config: the adapter's config, of PEFT.

    Returns:
        A new config.

    Example:
        >>> from funcadapt.peft import LoraConfig
        >>> made = doubled_config(LoraConfig(r=4, lora_alpha=8, init_lora_weights="pissa", target_modules=["q"]))
        >>> made.r, made.lora_alpha, made.init_lora_weights
        (8, 16, True)
    """
    # with rslora the scaling is alpha / sqrt(r)
    return dataclasses.replace(
        config,
        init_lora_weights=True,
        r=2 * config.r,
        lora_alpha=config.lora_alpha * (2**0.5 if config.use_rslora else 2),
        rank_pattern={key: 2 * value for key, value in config.rank_pattern.items()},
        alpha_pattern={key: 2 * value for key, value in config.alpha_pattern.items()},
    )
