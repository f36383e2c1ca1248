"""Checks of configs and of models that `PeftModel` and `PeftMixedModel` share."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from funcadapt.peft.config import PeftConfig
from funcadapt.peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING


def is_checkpointing(model: Any) -> bool:
    """Whether a model recomputes activations, as far as it tells; True if it does not, as in PEFT.

    Args:
        model: the model.

    Returns:
        Whether it does.
    """
    # the name that transformers 5 has, then the one that it warns of
    for name in ("is_activation_checkpointing", "is_gradient_checkpointing"):
        if (found := getattr(model, name, None)) is not None:
            return bool(found)
    return True


def input_requires_grad(model: Any) -> None:
    """Make the output of a model's embeddings require gradients; for a quantised model, k-bit training does that.

    Args:
        model: the model; one without `get_input_embeddings` is left as it is.
    """
    if any(getattr(model, name, False) for name in ("is_loaded_in_8bit", "is_loaded_in_4bit", "is_quantized")):
        return
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
    elif hasattr(model, "get_input_embeddings"):
        model.get_input_embeddings().register_forward_hook(_require_grad)


def _require_grad(module: nn.Module, inputs: Any, output: Any) -> None:
    output.requires_grad_(True)


def check_injectable(config: Any) -> None:
    """A config of a method that is injected into layers.

    Args:
        config: the config.

    Raises:
        TypeError: if it is no config.
        NotImplementedError: if it is one of prompt learning.
    """
    if not isinstance(config, PeftConfig):
        raise TypeError(f"Expected a PeftConfig such as LoraConfig(...), got {type(config).__name__}.")
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise NotImplementedError(
            f"{type(config).__name__}: prompt learning and adaption prompts are out of scope of funcadapt, which "
            "adapts layers. Use Hugging Face PEFT for it."
        )


def warn_of_prefix(adapter_name: str, config: PeftConfig) -> None:
    """Warn of a name that is a part of the prefix of the method's parameters."""
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type or "")
    if prefix and adapter_name in prefix:
        warnings.warn(
            f"Adapter name '{adapter_name}' should not be contained in the prefix '{prefix}'. "
            "This may lead to reinitialization of the adapter weights during loading.",
            stacklevel=3,
        )


def print_trainable(trained: int, total: int) -> None:
    """Print PEFT's line about the number of parameters.

    Args:
        trained: how many are trained.
        total: how many there are.

    Example:
        >>> print_trainable(1000, 400000)
        trainable params: 1,000 || all params: 400,000 || trainable%: 0.2500
    """
    print(f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / total:.4f}")
