"""`get_layer_status` and `get_model_status`: what a model with adapters is doing, layer by layer and as a whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from funcadapt._torch import named_modules
from funcadapt.view.auxiliary import AuxiliaryTrainingWrapper, TrainableTokensWrapper
from funcadapt.view.layer import AdapterLayer

Irregular = Literal["irregular"]
_T = TypeVar("_T")


@dataclasses.dataclass
class TunerLayerStatus:
    """One adapter layer: what it has, what is active and merged, and where its tensors are.

    Attributes:
        name: the layer's path.
        module_type: its kind, e.g. "lora.Linear".
        enabled: whether its adapters are enabled.
        active_adapters: the active ones.
        merged_adapters: those in the base weight.
        requires_grad: adapter -> whether its tensors are trained, "irregular" if only some are.
        available_adapters: all that the layer has.
        devices: adapter -> the device types of its tensors.
        quantization_backend: the name of the quantisation, if the base layer is quantised.
    """

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclasses.dataclass
class TunerModelStatus:
    """A whole model; a value is "irregular" where the layers disagree.

    Attributes:
        base_model_type: the base model's class.
        adapter_model_type: the tuner's class, "None" without a `PeftModel`.
        peft_types: adapter -> its type.
        trainable_params: how many numbers are trained.
        total_params: how many there are.
        num_adapter_layers: how many adapter layers there are.
        enabled: whether the adapters are enabled.
        active_adapters: the active ones.
        merged_adapters: those in the base weights.
        requires_grad: adapter -> whether it is trained.
        available_adapters: all that the model has.
        devices: adapter -> the device types of its tensors.
        quantization_backend: the name of the quantisation, if there is one.
    """

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


def status_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers that a status tells of: tuner layers and trained copies, by path.

    A `TrainableTokensWrapper` is left out: the layer inside it is what holds the adapter.

    Args:
        model: the model.

    Yields:
        The path and the layer.
    """
    for name, module in named_modules(model):
        # a block of Shadow's is no layer with a weight
        told = isinstance(module, AdapterLayer | AuxiliaryTrainingWrapper) or type(module).__name__ == "ShadowLayer"
        if told and not isinstance(module, TrainableTokensWrapper):
            yield name, module


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """How many parameters a model trains, and how many it has.

    Args:
        model: any module.

    Returns:
        The two numbers. A 4-bit weight counts the numbers that it packs, a weight that DeepSpeed has sharded the
        whole one's.

    Example:
        >>> count_parameters(nn.Linear(3, 2))
        (8, 8)
    """
    trained = total = 0
    for parameter in model.parameters():
        size: int = parameter.numel() or getattr(parameter, "ds_numel", 0)
        if type(parameter).__name__ == "Params4bit":
            size *= 2 * parameter.element_size()
        total += size
        trained += size if parameter.requires_grad else 0
    return trained, total


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """The status of each adapter layer.

    Args:
        model: a `PeftModel`, or any model with injected adapters.

    Returns:
        One status a layer, in the order of the model; of a `PeftModel`, paths start below `base_model`.

    Raises:
        ValueError: if there is no adapter layer.
    """
    found = [_layer_status(name, layer) for name, layer in status_layers(_inside(model))]
    if not found:
        raise ValueError(
            "No adapter layers found in the model, please ensure that it's a PEFT model or that you have PEFT adapters "
            "injected in the model."
        )
    return found


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The status of a whole model.

    Args:
        model: a `PeftModel`, or any model with injected adapters.

    Returns:
        The status; what the layers disagree on is "irregular", which usually is a mistake.
    """
    layers = get_layer_status(model)
    inside = _inside(model)
    wrapped = inside is not model
    trained, total = count_parameters(model)
    configs: dict[str, Any] = getattr(inside, "peft_config", {}) if wrapped else {}
    merged = {name for layer in layers for name in layer.merged_adapters}
    torn = any(merged & (set(layer.available_adapters) - set(layer.merged_adapters)) for layer in layers)
    active = _agreed(tuple(layer.active_adapters) for layer in layers)
    grads = _by_adapter(layer.requires_grad for layer in layers)
    devices = _by_adapter(layer.devices for layer in layers)
    base: Any = getattr(inside, "model", None)
    return TunerModelStatus(
        base_model_type=type(base).__name__ if wrapped else _plain_type(model),
        adapter_model_type=type(inside).__name__ if wrapped else "None",
        peft_types={name: str(getattr(c.peft_type, "value", c.peft_type)) for name, c in configs.items()},
        trainable_params=trained,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=_agreed(layer.enabled for layer in layers),
        active_adapters=active if isinstance(active, str) else list(active),
        merged_adapters="irregular" if torn else sorted(merged),
        requires_grad={name: _agreed(values) for name, values in grads.items()},
        available_adapters=sorted({name for layer in layers for name in layer.available_adapters}),
        devices={name: sorted({d for some in lists for d in some}) for name, lists in devices.items()},
        quantization_backend=_agreed(layer.quantization_backend for layer in layers),
    )


def _inside(model: nn.Module) -> nn.Module:
    from funcadapt.peft.model import PeftModel

    return model.base_model if isinstance(model, PeftModel) else model


def _plain_type(model: nn.Module) -> str:
    """The class of a transformers model, "other" for any other: PEFT's rule, without importing transformers."""
    return type(model).__name__ if any(c.__name__ == "PreTrainedModel" for c in type(model).__mro__) else "other"


def _layer_status(name: str, layer: Any) -> TunerLayerStatus:
    trained: dict[str, list[bool]] = {}
    devices: dict[str, set[str]] = {}
    for container in (*layer.adapter_layer_names, *layer.other_param_names):
        for adapter, tensors in _tensors(_attribute(layer, container)):
            devices.setdefault(adapter, set()).update(t.device.type for t in tensors)
            if tensors and container in layer.adapter_layer_names:
                trained.setdefault(adapter, []).extend(t.requires_grad for t in tensors)
    backend: Any = getattr(layer, "quantization_backend", None)
    return TunerLayerStatus(
        name=name,
        module_type=repr(layer).partition("(")[0],
        enabled=not layer.disable_adapters,
        active_adapters=list(layer.active_adapters),
        merged_adapters=list(layer.merged_adapters),
        requires_grad={adapter: _agreed(flags) for adapter, flags in trained.items()},
        available_adapters=sorted(layer._get_available_adapters()),
        devices={adapter: sorted(kinds) for adapter, kinds in devices.items()},
        quantization_backend=None if backend is None else backend.backend_name,
    )


def _attribute(layer: Any, path: str) -> Any:
    for name in path.split("."):
        layer = getattr(layer, name)
    return layer


def _tensors(container: Any) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """The tensors in a container that is keyed by adapter; nothing of a dict of numbers, such as the ranks."""
    if isinstance(container, nn.ModuleDict):
        for adapter, module in container.items():
            yield adapter, list(module.parameters())
    elif isinstance(container, nn.Module) and hasattr(container, "items"):  # a ParameterDict or BufferDict
        items: Any = container
        for adapter, tensor in items.items():
            yield adapter, [tensor]


def _by_adapter(tables: Iterable[dict[str, _T]]) -> dict[str, list[_T]]:
    joined: dict[str, list[_T]] = {}
    for table in tables:
        for adapter, value in table.items():
            joined.setdefault(adapter, []).append(value)
    return joined


def _agreed(values: Iterable[_T]) -> _T | Irregular:
    found = set(values)
    return found.pop() if len(found) == 1 else "irregular"
