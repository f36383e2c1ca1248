"""LoftQ: a weight of few bits and a LoRA, fitted to each other, see `funcadapt.loftq`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from funcadapt.errors import AdapterError, AdapterFileError, did_you_mean
from funcadapt.loftq import decomposed, factors
from funcadapt.quantised import dequantised
from funcadapt.view.layer import AdapterLayer

_PREFIX = "base_model.model."
_FILE = "model.safetensors"


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
    peft_model: Any,
    model_path: str | None = None,
    adapter_name: str = "default",
    callback: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """Give the LoRA of a model that bitsandbytes holds in 4 bits what the quantisation took away from its weights.

        scaling B A = the best approximation of W - Q of rank r

    W is read from the safetensors of the full model, one layer at a time; Q is what the layer multiplies with.
    Differs from PEFT, whose B A is right for a scaling of 1 only; which needs a GPU; and which makes every factor
    float32, where here a factor keeps its dtype.

    Args:
        peft_model: the model with the adapter.
        model_path: the folder of the full model, or its file; None: the one that transformers has downloaded.
        adapter_name: the adapter.
        callback: (model, path of the layer), called after each layer: whether its new factors stay.

    Raises:
        ValueError: if no layer is of bitsandbytes' 4 bits, or the path cannot be told.
        AdapterError: if there is no such adapter.
        TypeError: if the model is no `PeftModel`.
        FileNotFoundError: if there is no such file.
        AdapterFileError: if the file lacks a weight or has it in another shape. Nothing was changed then.
    """
    layers = {name: module for name, module in peft_model.named_modules() if _is_4bit(module)}
    if not layers:
        raise ValueError(
            "No bnb LoRA module found on the model: replace_lora_weights_loftq is for layers that bitsandbytes has "
            "quantised in 4 bits. For a full-precision model use `init_lora_weights='loftq'`."
        )
    if not all(name.startswith(_PREFIX) for name in layers):
        raise TypeError("The passed model does not appear to be a valid PeftModel")
    known = {adapter for layer in layers.values() for adapter in layer.lora_A}
    if adapter_name not in known:
        raise AdapterError(f"The layers have no adapter {adapter_name!r}.{did_you_mean(adapter_name, known)}")
    layers = {name.removeprefix(_PREFIX): layer for name, layer in layers.items() if adapter_name in layer.lora_A}
    weights = _Weights(peft_model, model_path)
    for name, layer in layers.items():
        weights.check(f"{name}.weight", layer.site.shape)
    for name, layer in layers.items():
        a, b = (held[adapter_name].weight.data for held in (layer.lora_A, layer.lora_B))
        before = a.clone(), b.clone()
        new = _factors(layer, weights.read(f"{name}.weight"), adapter_name)
        for held, value in zip((a, b), new, strict=True):
            held.copy_(value)
        keep = False
        try:
            keep = callback is None or callback(peft_model, name)
        finally:
            for held, old in zip((a, b), before, strict=True) if not keep else ():
                held.copy_(old)


def _is_4bit(module: nn.Module) -> bool:
    """Whether a layer has a LoRA around a weight of bitsandbytes in 4 bits."""
    if not isinstance(module, AdapterLayer) or not hasattr(module, "lora_A"):
        return False
    base: Any = module.get_base_layer()
    weight = getattr(base, "weight", None)
    return (getattr(weight, "quant_state", None) or getattr(base, "quant_state", None)) is not None


@torch.no_grad()
def _factors(layer: Any, weight: Tensor, adapter: str) -> tuple[Tensor, Tensor]:
    """A and B of what is between a weight and the layer's own."""
    own = dequantised(layer.get_base_layer())
    a, b = factors(weight.to(own.device, torch.float32) - own.float(), layer.r[adapter])
    root = layer.scaling[adapter] ** 0.5
    return a / root, b / root


class _Weights:
    """The tensors of a model's safetensors, in one file or several, with the prefix of the base model or without."""

    def __init__(self, peft_model: Any, path: str | None) -> None:
        path = _downloaded(peft_model) if path is None else os.fspath(path)
        self.path = path if path.endswith(_FILE) else os.path.join(path, _FILE)
        prefix = getattr(peft_model.get_base_model(), "base_model_prefix", None)
        self.prefix = f"{prefix}." if prefix else ""
        index = f"{self.path}.index.json"
        if os.path.exists(self.path):
            with safe_open(self.path, framework="pt") as file:  # pyright: ignore[reportUnknownVariableType]
                self.files: Mapping[str, str] = dict.fromkeys(file.keys(), self.path)  # pyright: ignore
        elif os.path.exists(index):
            folder = os.path.dirname(self.path)
            with open(index, encoding="utf-8") as file:
                table: Mapping[str, str] = json.load(file)["weight_map"]
            self.files = {key: os.path.join(folder, name) for key, name in table.items()}
        else:
            raise FileNotFoundError(
                f"Could not find file for {self.path}, ensure that there is a (sharded) safetensors file of the model."
            )

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise AdapterFileError unless there is a tensor of a name and shape."""
        key = self._key(name)
        with safe_open(self.files[key], framework="pt") as file:  # pyright: ignore[reportUnknownVariableType]
            got = tuple(file.get_slice(key).get_shape())  # pyright: ignore
        if got != shape:
            raise AdapterFileError(f"{self.files[key]} has {key!r} of shape {got}, expected {shape}.")

    def read(self, name: str) -> Tensor:
        """A tensor."""
        key = self._key(name)
        with safe_open(self.files[key], framework="pt") as file:  # pyright: ignore[reportUnknownVariableType]
            return file.get_tensor(key)  # pyright: ignore

    def _key(self, name: str) -> str:
        key = next((key for key in (name, name.removeprefix(self.prefix)) if key in self.files), None)
        if key is None:
            raise AdapterFileError(f"{self.path} lacks {name!r}.{did_you_mean(name, self.files)}")
        return key


def _downloaded(peft_model: Any) -> str:
    """The folder into which the Hub's client has downloaded a model."""
    hub: Any = import_module("huggingface_hub")
    try:
        return hub.snapshot_download(peft_model.base_model.config._name_or_path, local_files_only=True)
    except hub.errors.LocalEntryNotFoundError as error:
        raise ValueError("The model.safetensors file must be present on disk, but it could not be found.") from error
    except (AttributeError, hub.errors.HFValidationError) as error:
        raise ValueError(
            "The provided model does not appear to be a transformers model or is a local model. In this case, you must "
            "pass the model_path argument that points to the safetensors file."
        ) from error
