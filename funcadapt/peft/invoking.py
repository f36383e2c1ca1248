"""aLoRA in a `PeftModel`: where each row invokes its adapter follows from the tokens of the call."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from funcadapt.methods.alora import INPUT, offsets


def calculate_alora_offsets(
    peft_config: Mapping[str, Any],
    active_adapter: str,
    input_ids: Tensor | None,
    adapter_names: Sequence[str] | None = None,
) -> list[int | None]:
    """How many tokens at the end of each row its adapter acts on, in PEFT's form.

    Args:
        peft_config: the configs by adapter name.
        active_adapter: the adapter of all rows.
        input_ids: (rows, tokens).
        adapter_names: the adapter of each row, where they differ.

    Returns:
        A number for each row, or None where nothing is invoked: the row is one of the base model.
    """
    if input_ids is None:
        return []
    names = adapter_names or [active_adapter] * input_ids.shape[0]
    found: list[int | None] = [None] * input_ids.shape[0]
    for name in dict.fromkeys(names):
        config = peft_config.get(name)
        if not getattr(config, "alora_invocation_tokens", None):
            continue
        for row, k in enumerate(offsets(input_ids, config).tolist()):  # pyright: ignore
            if row < len(names) and names[row] == name:
                found[row] = k or None
    return found


def with_offsets(
    configs: Mapping[str, Any], active: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of a call with the offsets of its rows, as a tensor.

    Args:
        configs: the configs by adapter name.
        active: the active adapter.
        args: the positional arguments of `forward` or `generate`.
        kwargs: the others.

    Returns:
        The keyword arguments with "alora_offsets", unless there is nothing from which to tell: then those given.
    """
    given: Any = kwargs.get(INPUT)
    embedded: Any = kwargs.get("inputs_embeds")
    tokens: Any = next((kwargs[name] for name in ("input_ids", "inputs") if kwargs.get(name) is not None), None)
    if tokens is None and args and isinstance(args[0], Tensor) and not args[0].is_floating_point():
        tokens = args[0]
    if given is None and tokens is not None:
        tokens = tokens.unsqueeze(0) if tokens.ndim == 1 else tokens
        given = calculate_alora_offsets(configs, active, tokens, kwargs.get("adapter_names"))
    elif given is None and embedded is not None:
        warnings.warn(
            "Cannot calculate aLoRA offsets when only inputs_embeds are provided. Disabling aLoRA for this forward "
            "pass.",
            stacklevel=4,
        )
        given = [None] * embedded.shape[0]
    if given is None:
        return {name: value for name, value in kwargs.items() if name != INPUT}
    if not isinstance(given, Tensor):
        device = next((t.device for t in (tokens, embedded) if t is not None), None)
        given = torch.tensor([k or 0 for k in given], dtype=torch.long, device=device)
    return {**kwargs, INPUT: given}
