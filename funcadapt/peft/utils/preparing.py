"""Preparing models for training: quantised ones, and those under FSDP."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import os
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

_QUANTIZED = frozenset({"gptq", "aqlm", "eetq", "torchao", "hqq"})


def prepare_model_for_kbit_training(
    model: Any,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> Any:
    """Prepare a quantised transformers model for training.

    All its parameters are frozen; those of 16 bits (norms, heads) are cast to float32, unless GPTQ, AQLM, EETQ, HQQ or
    torchao quantised it; and gradient checkpointing is switched on if it is quantised at all.

    Args:
        model: the model, changed in place.
        use_gradient_checkpointing: whether to.
        gradient_checkpointing_kwargs: what `torch.utils.checkpoint` is called with.
        auto_clear_cache: whether to give the memory of the 16-bit parameters back to the device.

    Returns:
        The model.
    """
    options = gradient_checkpointing_kwargs or {}
    is_hqq = bool(getattr(model, "hqq_quantized", False))
    otherwise = getattr(model, "quantization_method", None) in _QUANTIZED or is_hqq
    in_bits = getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False)
    for parameter in model.parameters():
        parameter.requires_grad = False
        is_half = parameter.dtype in (torch.float16, torch.bfloat16) and type(parameter).__name__ != "Params4bit"
        if is_half and not otherwise:
            parameter.data = parameter.data.to(torch.float32)
    if auto_clear_cache and not otherwise:
        for device in (torch.cuda, torch.xpu):
            if device.is_available():
                device.empty_cache()
    if use_gradient_checkpointing and (in_bits or otherwise):
        _checkpoint(model, options)
    return model


def _checkpoint(model: Any, options: dict[str, Any]) -> None:
    if options.get("use_reentrant", True):  # then the input of a block must require gradients
        if hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()
        else:
            model.get_input_embeddings().register_forward_hook(_require_grad)
    # transformers has another name for it since 5.23, and warns of the older one
    new, old = "activation_checkpointing_{}", "gradient_checkpointing_{}"
    name = new if hasattr(model, new.format("enable")) else old
    enable = getattr(model, name.format("enable"))
    if name.format("kwargs") in inspect.signature(enable).parameters:
        enable(**{name.format("kwargs"): options})
        return
    if options:
        warnings.warn(
            f"{type(model).__name__}.gradient_checkpointing_enable takes no gradient_checkpointing_kwargs: they are "
            "ignored. Upgrade transformers to use them.",
            FutureWarning,
            stacklevel=3,
        )
    enable()


def _require_grad(module: nn.Module, inputs: Any, output: Tensor) -> None:
    output.requires_grad_(True)


def fsdp_auto_wrap_policy(model: nn.Module) -> Callable[..., bool]:
    """The policy by which FSDP 1 wraps a model with adapters: its blocks, and each leaf with a trained weight.

    The blocks are those that `model._no_split_modules` names, or the environment variable
    `FSDP_TRANSFORMER_CLS_TO_WRAP` (names joined by commas).

    Args:
        model: the model.

    Returns:
        The `auto_wrap_policy`.

    Raises:
        TypeError: if a named block is not in the model.
    """
    from torch.distributed.fsdp import wrap

    rules: Any = wrap  # untyped
    named: Iterable[str] = getattr(model, "_no_split_modules", None) or ()
    chosen = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP")
    blocks: set[type[nn.Module]] = set()
    for name in filter(None, named if chosen is None else chosen.split(",")):
        cls = next((type(module) for module in model.modules() if type(module).__name__ == name), None)
        if cls is None:
            raise TypeError(f"Could not find the transformer layer class {name!r} to wrap in the model.")
        blocks.add(cls)
    policies = [
        functools.partial(rules.lambda_auto_wrap_policy, lambda_fn=_is_trained_leaf),
        functools.partial(rules.transformer_auto_wrap_policy, transformer_layer_cls=blocks),
    ]
    return functools.partial(rules._or_policy, policies=policies)


def _is_trained_leaf(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return weight is not None and weight.requires_grad and not any(True for _ in module.children())


def get_quantization_config(model: Any, method: str) -> Any:
    """The quantisation config of a transformers model, if a method quantised it."""
    if getattr(model, "quantization_method", None) != method:
        return None
    return getattr(getattr(model, "config", None), "quantization_config", None)


def is_gptqmodel_quant_linear(module: nn.Module | None) -> bool:
    """Whether GPT-QModel quantised a layer."""
    if module is None or importlib.util.find_spec("gptqmodel") is None:
        return False
    return isinstance(module, importlib.import_module("gptqmodel.nn_modules.qlinear").BaseQuantLinear)


def get_gptqmodel_quant_linear(gptq_quantization_config: Any, device_map: Any = None) -> Any:
    """The class of layers that GPT-QModel has for a config.

    Args:
        gptq_quantization_config: the config.
        device_map: where the model is.

    Returns:
        The class; None without a config or without GPT-QModel.
    """
    config = gptq_quantization_config
    if config is None or importlib.util.find_spec("gptqmodel") is None:
        return None
    library, importer, quantization = (
        importlib.import_module(f"gptqmodel{rest}") for rest in ("", ".utils.importer", ".quantization")
    )
    return importer.hf_select_quant_linear_v2(
        bits=config.bits,
        group_size=config.group_size,
        desc_act=config.desc_act,
        sym=config.sym,
        device_map=device_map,
        format=getattr(config, "checkpoint_format", "gptq"),
        quant_method=quantization.METHOD.GPTQ,
        meta=getattr(config, "meta", None),
        backend=library.BACKEND.AUTO_TRAINABLE,
        pack=False,
    )


get_auto_gptq_quant_linear = get_gptqmodel_quant_linear  # its name in PEFT before 0.18
