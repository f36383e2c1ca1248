"""State dicts and files of adapters in a live model, with or without a `PeftModel`.

Where PEFT is wrong, this is right: an adapter that is called like a module takes nothing from other adapters'
checkpoints (its defect B11); AdaLoRA's ranks are kept without a `PeftModel`, too (B22); a model without a `PeftModel`
takes the keys of `modules_to_save` with the prefix `base_model.model.` as well; nothing is written if anything does
not fit; a tensor that is there twice is an error. Pickles (`adapter_model.bin`) are not opened.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from funcadapt.errors import AdapterFileError, SiteError
from funcadapt.keys import PREFIX
from funcadapt.method import method_of
from funcadapt.peft.config import PeftConfig
from funcadapt.peft.left_out import warn_when_read
from funcadapt.peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from funcadapt.peft.utils.other import check_file_exists_on_hf_hub
from funcadapt.peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
from funcadapt.peft.utils.warning import PeftWarning
from funcadapt.peft.utils.weights import load_peft_weights as load_peft_weights
from funcadapt.tying import ties, without_copies
from funcadapt.view.embeddings import warn_unknown
from funcadapt.view.entries import own_leaves
from funcadapt.view.loading import check_tensors
from funcadapt.view.state_dict import adapter_state_dict, load_adapter_state_dict
from funcadapt.view.values import adapter_of
from funcadapt.view.walking import root_of, unwrapped, view_state

_FACTORS = (".lora_A", ".lora_B")


# What is beside the layers rather than at them: their tuner models know what their checkpoints hold.
_BESIDE = ("XLORA", "SHADOW")


def config_of(model: Any, adapter_name: str) -> Any:
    """The config of an adapter of a model, in PEFT's form.

    Args:
        model: the model.
        adapter_name: the adapter's name.

    Returns:
        The config in `model.peft_config`; if the model has none, one with the values that it was materialised with.

    Raises:
        KeyError: if there is no such adapter.
        ValueError: if there is no method of its type.
    """
    configs: Mapping[str, Any] | None = getattr(model, "peft_config", None)
    if configs is None:
        configs = {name: PeftConfig.from_funcadapt(c) for name, c in view_state(model).configs.items()}
    if adapter_name not in configs:
        raise KeyError(f"{adapter_name!r} is no adapter of the model, which has {sorted(configs)}.")
    config = configs[adapter_name]
    if config.peft_type not in PEFT_TYPE_TO_TUNER_MAPPING:
        raise ValueError(f"Unknown PEFT type passed: {config.peft_type}")
    return config


# -- state dicts ------------------------------------------------------------------------------------------


def get_peft_model_state_dict(
    model: Any,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | Literal["auto"] = "auto",
) -> dict[str, Tensor]:
    """The tensors of one adapter, under the keys of a checkpoint: without the adapter's name.

    Args:
        model: a `PeftModel`, or a model with adapters in it.
        state_dict: the model's state dict, if it had to be gathered first.
        adapter_name: the adapter's name.
        unwrap_compiled: whether the model is what `torch.compile` returned.
        save_embedding_layers: whether the embeddings are saved, too; "auto" if they are targeted or were resized.

    Returns:
        Key -> tensor. The keys of a `PeftModel` begin with `base_model.model.`, those of other models do not.

    Raises:
        KeyError: if there is no such adapter, or `state_dict` lacks a module that it trains in full.
        ValueError: if its type is unknown.

    Example:
        >>> import torch
        >>> from funcadapt.peft import LoraConfig, get_peft_model, get_peft_model_state_dict
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 2)), LoraConfig(r=2, target_modules=["0"]))
        >>> sorted(get_peft_model_state_dict(model))
        ['base_model.model.0.lora_A.weight', 'base_model.model.0.lora_B.weight']
    """
    if unwrap_compiled:
        model = getattr(model, "_orig_mod", model)
    config = config_of(model, adapter_name)
    if config.peft_type in _BESIDE:
        return model.base_model.own_state_dict(adapter_name)
    found = adapter_state_dict(
        model, adapter_name, state_dict, save_embedding_layers, config=config.to_funcadapt(), lookup=_vocabulary
    )
    if config.peft_type == "ADALORA" and config.rank_pattern is not None:
        # a checkpoint does not know the adapter's name
        ending = f".{adapter_name}"
        config.rank_pattern = {key.removesuffix(ending): mask for key, mask in config.rank_pattern.items()}
    if state_dict is None and config.peft_type in ("LORA", "ADALORA"):
        _warn_of_shards(found, adapter_name)
    return found


def _warn_of_shards(tensors: Mapping[str, Tensor], adapter_name: str) -> None:
    bad = [
        (key, tuple(tensor.shape))
        for key, tensor in tensors.items()
        if any(factor in key for factor in _FACTORS) and (tensor.ndim < 2 or not tensor.numel())
        # a bias has one axis
        if not key.endswith(".bias")
    ]
    if bad:
        preview = ", ".join(f"{key}:{shape}" for key, shape in bad[:3]) + (f" (+{len(bad) - 3} more)" * (len(bad) > 3))
        warnings.warn(
            f"Adapter {adapter_name!r}: {len(bad)} LoRA tensor(s) have invalid shape: {preview}. A 1-D or zero-sized "
            "lora_A / lora_B tensor indicates that DeepSpeed ZeRO-3 / FSDP shards were not gathered before "
            "save_pretrained() and are therefore incomplete. Wrap the save in "
            "deepspeed.zero.GatheredParameters([...], modifier_rank=None) for ZeRO-3, or "
            "torch.distributed.fsdp.FullyShardedDataParallel.summon_full_params(model) for FSDP, before calling "
            "save_pretrained().",
            PeftWarning,
            stacklevel=3,
        )


def _vocabulary(model: Any, name: str) -> int | None:
    """The size of the vocabulary of a base model in a local folder or on the Hub."""
    exists = os.path.exists(os.path.join(name, "config.json")) or check_file_exists_on_hf_hub(name, "config.json")
    if exists is None:
        warn_unknown(name)
    config = getattr(model, "config", None)
    if not exists or not getattr(config, "vocab_size", None):
        return None
    return type(config).from_pretrained(name).vocab_size  # pyright: ignore


def set_peft_model_state_dict(
    model: Any,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> Any:
    """Give an adapter the values of a checkpoint; the inverse of `get_peft_model_state_dict`.

    Args:
        model: a `PeftModel`, or a model with adapters in it, which takes keys with and without `base_model.model.`.
        peft_model_state_dict: key -> tensor; it is not changed.
        adapter_name: the adapter's name.
        ignore_mismatched_sizes: whether tensors of another shape are left out, with a warning.
        low_cpu_mem_usage: whether the tensors replace the model's instead of being copied into them: for an adapter
            that was injected on the meta device.

    Returns:
        A named tuple: `missing_keys` of the whole model, the base model's among them, and `unexpected_keys`.

    Raises:
        KeyError: if there is no such adapter, or the checkpoint lacks a module that it trains in full.
        ValueError: if its type is unknown.
        AdapterFileError: if layers that have a leaf in common do not have the same numbers in it; PEFT takes the last.
        RuntimeError: if a tensor does not fit. The model is unchanged then.
    """
    config = config_of(model, adapter_name)
    if config.peft_type in _BESIDE:
        return model.base_model.load_own_state_dict(peft_model_state_dict, adapter_name, ignore_mismatched_sizes)
    tensors = dict(peft_model_state_dict)
    warn_when_read(config, tensors)
    tensors = convert_peft_adapter_state_dict_for_transformers(model, config, tensors, adapter_name)
    _check_ties(model, adapter_name, tensors)
    return load_adapter_state_dict(
        model,
        tensors,
        adapter_name,
        ignore_mismatched_sizes,
        low_cpu_mem_usage,
        config=config.to_funcadapt(),
    )


def _check_ties(model: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse other numbers in leaves that layers have in common, as `fa.load` does: one of them would be lost."""
    root = root_of(model)
    if not method_of(view_state(root).configs[name]).tied:
        return
    given: dict[str, dict[str, Tensor]] = {}
    for own in own_leaves(model, name):
        for leaf, (key, _) in own.keys.items():
            found = next((k for k in (key, PREFIX + key, key.removeprefix(PREFIX)) if k in tensors), None)
            if found is not None:
                given.setdefault(own.layer.site.path, {})[leaf] = tensors[found]
    for path, frozen in adapter_of(root, name).buffers.items():
        both = {
            tied: frozen[tied]
            for tied, leaf, other in ties(frozen)
            if leaf in given.get(path, {}) and leaf in given.get(other, {})
        }
        try:
            without_copies(given, {path: both}, same=True)
        except SiteError as error:
            raise AdapterFileError(f"The checkpoint of {name!r} does not fit. {error}") from error


class IncompatibleKeys(NamedTuple):
    """What a state dict and a model do not have in common."""

    missing_keys: list[str]
    unexpected_keys: list[str]


# -- the base model ---------------------------------------------------------------------------------------


def get_base_model_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the base model, under its own keys, as if there were no adapters.

    Args:
        model: a `PeftModel`, or a model with adapters in it.

    Returns:
        Key -> tensor.

    Example:
        >>> import torch
        >>> from funcadapt.peft import LoraConfig, get_peft_model
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 2)), LoraConfig(target_modules=["0"]))
        >>> list(get_base_model_state_dict(model))
        ['0.weight', '0.bias']
    """
    with unwrapped(root_of(model)) as base:
        return dict(base.state_dict())


def set_base_model_state_dict(
    model: nn.Module, state_dict: Mapping[str, Tensor], strict: bool = True
) -> IncompatibleKeys:
    """Load the weights of the base model, under its own keys. What was merged into them is lost.

    Args:
        model: a `PeftModel`, or a model with adapters in it.
        state_dict: key -> tensor.
        strict: whether missing and unexpected keys are an error.

    Returns:
        A named tuple of `missing_keys` and `unexpected_keys`.

    Raises:
        RuntimeError: if keys do not match, or a tensor does not fit. The model is unchanged then.
    """
    with unwrapped(root_of(model)) as base:
        held: dict[str, Any] = base.state_dict()
        missing = [key for key in held if key not in state_dict]
        unexpected = [key for key in state_dict if key not in held]
        lines: list[str] = []
        if strict and missing:
            lines.append(f"Missing key(s) in state_dict: {missing}")
        if strict and unexpected:
            lines.append(f"Unexpected key(s) in state_dict: {unexpected}")
        values = {key: value for key, value in state_dict.items() if key in held}
        check_tensors(base, values)
        lines += [
            f"size mismatch for {key}: got {tuple(value.shape)}, the model has {tuple(held[key].shape)}"
            for key, value in values.items()
            if isinstance(held[key], Tensor) and value.shape != held[key].shape
        ]
        if lines:
            raise RuntimeError("Error(s) in loading state_dict:\n\t" + "\n\t".join(lines))
        base.load_state_dict(values, strict=False)
    return IncompatibleKeys(missing, unexpected)
