"""LoftQ: an init that quantises the base model. Not implemented yet: the names can be imported, and say so."""

from __future__ import annotations

from typing import Any, NoReturn

_MESSAGE = (
    "LoftQ is not implemented in funcadapt yet. Use `init_lora_weights='pissa'` or 'olora' in LoraConfig, or make the "
    "adapter with PEFT and load its checkpoint."
)


def loftq_init(weight: Any, num_bits: int, reduced_rank: int, num_iter: int = 1) -> NoReturn:
    """PEFT's LoftQ of one weight: the quantised weight and two factors.

    Args:
        weight: the weight.
        num_bits: 2, 4 or 8.
        reduced_rank: the rank.
        num_iter: how many times quantisation and factors are fitted to each other.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError(_MESSAGE)


def replace_lora_weights_loftq(
    peft_model: Any, model_path: str | None = None, adapter_name: str = "default", callback: Any = None
) -> NoReturn:
    """PEFT's LoftQ of a model that is quantised with bitsandbytes.

    Args:
        peft_model: the model with the adapter.
        model_path: where its full weights are.
        adapter_name: the adapter.
        callback: decides for each layer whether its new factors stay.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError(_MESSAGE)
