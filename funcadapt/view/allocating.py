"""AdaLoRA's allocation of ranks on the modules of a live model."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from funcadapt.allocation import RankState, orthogonality, own, start, update
from funcadapt.methods.adalora import AdaLoraConfig
from funcadapt.view.values import adapter_of
from funcadapt.view.walking import view_state


def update_and_allocate(tuner: Any, global_step: int) -> None:
    """PEFT's `AdaLoraModel.update_and_allocate`: one step of the allocation, on the modules of a live model.

    Call it after `optimizer.step()` and before `optimizer.zero_grad()`.

    Args:
        tuner: the tuner model; it keeps the state in its attribute `rank_states`, by adapter name.
        global_step: the step, from 0.
    """
    states: dict[str, RankState] = tuner.__dict__.setdefault("rank_states", {})
    for name in tuner.active_adapters:
        config = view_state(tuner.model).configs.get(name)
        if not isinstance(config, AdaLoraConfig) or tuner.peft_config[name].inference_mode:
            continue
        params = adapter_of(tuner.model, name).params
        grads = {path: {leaf: t.grad for leaf, t in p.items()} for path, p in own(params).items()}
        state = states[name] if name in states else start(config, params)
        values, states[name], pattern = update(config, state, params, grads, global_step)
        with torch.no_grad():
            for path, value in values.items():
                params[path]["lora_E"].copy_(value)
        if pattern is not None:
            tuner.peft_config[name].rank_pattern = pattern
            view_state(tuner.model).configs[name] = dataclasses.replace(config, rank_pattern=pattern)


def live_orthogonality(model: nn.Module, name: str) -> Tensor | None:
    """`orthogonality` of an adapter of a live model.

    Args:
        model: the model.
        name: the adapter's name.

    Returns:
        0-d; None if it is no AdaLoRA.

    Raises:
        ValueError: if the config's weight is not positive.
    """
    config = view_state(model).configs.get(name)
    if not isinstance(config, AdaLoraConfig):
        return None
    if config.orth_reg_weight <= 0:
        raise ValueError("orth_reg_weight should be greater than 0. ")
    return orthogonality(config, adapter_of(model, name).params)
