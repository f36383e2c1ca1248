"""Quantised base layers: which library made one, and what can be done with it here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from funcadapt.peft.utils.integrations import dequantize_module_weight

# The root of the module that a quantised layer's class (or its weight's) is from -> its name in PEFT.
_BACKENDS: Mapping[str, str] = {
    "hqq": "hqq",
    "torchao": "torchao",
    "aqlm": "aqlm",
    "eetq": "eetq",
    "gptqmodel": "gptq",
    "neural_compressor": "inc",
    "transformer_engine": "te",
}
_READABLE = frozenset({"bnb 4bit", "bnb 8bit", "hqq", "torchao"})


@dataclasses.dataclass(frozen=True)
class QuantizationBackend:
    """The library that quantised a layer.

    Attributes:
        backend_name: its name.
        supports_merge: whether an adapter can be merged into the layer: not here.
        layer_type: the kind of layer.
    """

    backend_name: str
    supports_merge: bool = False
    layer_type: str = "linear"

    def get_base_weight(self, base_layer: nn.Module) -> Tensor:
        """The weight in floating point.

        Args:
            base_layer: the layer.

        Returns:
            The weight.

        Raises:
            TypeError: if the library cannot tell.
        """
        if self.backend_name not in _READABLE:
            raise TypeError(f"Dequantization is not supported for {self.backend_name} layers.")
        return dequantize_module_weight(base_layer)

    def set_base_weight(self, peft_layer: Any, weight_data: Tensor) -> None:
        """Quantise a new weight.

        Args:
            peft_layer: the adapted layer.
            weight_data: the weight.

        Raises:
            TypeError: always.
        """
        raise TypeError(f"Requantization is not supported for {self.backend_name} layers: nothing can be merged.")

    def maybe_clone_base_result(self, x: Tensor) -> Tensor:
        """A layer's output in a form that can be changed in place: a copy for 4 bits of bitsandbytes."""
        return x.clone() if self.backend_name == "bnb 4bit" else x


def resolve_quantization_backend(base_layer: nn.Module, **kwargs: Any) -> QuantizationBackend | None:
    """What quantised a layer, by the names of its class and of its weight's; no library is imported.

    Args:
        base_layer: the layer.
        **kwargs: what PEFT needs to quantise torchao's layers again; not used.

    Returns:
        The library, or None if the layer is not quantised.

    Example:
        >>> import torch
        >>> from funcadapt.peft.utils.quantization_utils import resolve_quantization_backend
        >>> resolve_quantization_backend(torch.nn.Linear(2, 2)) is None
        True
    """
    for thing in (base_layer, getattr(base_layer, "weight", None)):
        library = type(thing).__module__.partition(".")[0]
        if library == "bitsandbytes":
            return QuantizationBackend("bnb 8bit" if "8bit" in type(base_layer).__name__ else "bnb 4bit")
        if name := _BACKENDS.get(library):
            methods: Any = getattr(base_layer, "SUPPORTS_METHODS", ())
            is_awq = name == "gptq" and any(getattr(method, "value", method) == "awq" for method in methods)
            return QuantizationBackend("awq" if is_awq else name)
    return None


def quantization_extra_repr(module: nn.Module) -> str:
    """What a layer prints about the library that quantised it."""
    backend: Any = getattr(module, "quantization_backend", None)
    parts = [nn.Module.extra_repr(module), f"quantization_backend='{backend.backend_name}'" if backend else ""]
    return ", ".join(filter(None, parts))


def get_quantization_kwargs(model: nn.Module) -> dict[str, Any]:
    """What a model's quantiser has to say to its layers: torchao's `get_apply_tensor_subclass`.

    Args:
        model: the model.

    Returns:
        The keyword arguments for `resolve_quantization_backend`.
    """
    config: Any = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    name = "get_apply_tensor_subclass"
    return {name: getattr(config, name)} if hasattr(config, name) else {}
