"""LoftQ: a weight of few bits and a LoRA, fitted to each other, see `funcadapt.loftq`."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor

from funcadapt.loftq import decomposed


def loftq_init(weight: Any, num_bits: int, reduced_rank: int, num_iter: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """PEFT's LoftQ of one weight. It needs neither bitsandbytes nor a GPU here.

    Args:
        weight: the weight.
        num_bits: 4 or 8.
        reduced_rank: the rank.
        num_iter: how many times quantisation and factors are fitted to each other.

    Returns:
        The quantised weight, in the given one's dtype, A and B.

    Raises:
        ValueError: if the number of bits or of iterations cannot be.
    """
    if num_bits not in (4, 8):
        raise ValueError("Only nf4 and int8 quantization is supported")
    q, a, b = decomposed(weight, num_bits, reduced_rank, num_iter)
    return q.to(weight.dtype), a, b


def replace_lora_weights_loftq(
    peft_model: Any, model_path: str | None = None, adapter_name: str = "default", callback: Any = None
) -> NoReturn:
    """PEFT's LoftQ of a model that is quantised with bitsandbytes in 4 bits, which no layer is here.

    Args:
        peft_model: the model with the adapter.
        model_path: where its full weights are.
        adapter_name: the adapter.
        callback: decides for each layer whether its new factors stay.

    Raises:
        ValueError: always: layers of bitsandbytes are not adapted yet.
    """
    raise ValueError(
        "replace_lora_weights_loftq: bitsandbytes must be installed and the model must be quantized in 4bits. "
        "funcadapt does not adapt layers of bitsandbytes yet; for a full-precision model use "
        "`init_lora_weights='loftq'`, which needs neither."
    )
