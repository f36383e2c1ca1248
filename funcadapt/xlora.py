"""X-LoRA: several LoRAs, and a classifier that says for every token how much of each acts.

A call is two passes. The first, of the bare model, gives the last hidden state h of every token; the classifier, an MLP
with ReLU, makes of it the scalings, and in the second pass the LoRAs act with them:

    s = softmax(MLP(h) / temperature)            (rows, tokens, layers, experts)
    y = W x + b + g * sum_e s_e (LoRA_e)(x)      s of this layer, g = global_scaling_weight

Without `layerwise_scalings` all layers have the same. `top_k_lora` keeps the largest scalings, `enable_softmax_topk`
takes the softmax of those. No gradient goes through the first pass.

An `XLora` is a value: the experts, adapters as any other, the classifier's tensors under PEFT's names, and the config.
It is a pytree, and `call` a pure function of it: differentiate with respect to `classifier`, or to the experts, too.
The model is one of transformers (it takes `output_hidden_states`), without a cache. Checkpoints are PEFT's: they hold
the classifier, and the config says where the experts are.

Source: Buehler and Buehler 2024, arXiv:2402.07148. Differs from PEFT: experts may have any names (PEFT's calls fail
unless they are "0", "1" and so on); a checkpoint has the whole classifier (PEFT's lacks each layer whose number is also
an expert's, so always the first one, and reads such a file without a word); with a `scaling_pass_value` of 0 the first
pass leaves the experts out rather than to multiply by 0.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from funcadapt._torch import named_modules
from funcadapt.adapter import Adapter
from funcadapt.call import functional_call
from funcadapt.checkpoint import CONFIG, WEIGHTS, read_config, write_all
from funcadapt.checkpoint import load as load_adapter
from funcadapt.config import AdapterConfig, config_from_dict, freeze
from funcadapt.errors import AdapterError, AdapterFileError
from funcadapt.method import method_of
from funcadapt.methods import lora
from funcadapt.pytrees import register_pytree

PREFIX = "base_model.internal_xlora_classifier."


@dataclasses.dataclass(frozen=True, kw_only=True)
class XLoraConfig(AdapterConfig):
    """Config of X-LoRA, with PEFT's fields, defaults and meanings.

    Attributes:
        hidden_size: the width of the model's hidden states; 4096 if None.
        adapters: name -> folder or repository of each expert.
        enable_softmax: whether the scalings of a token sum to 1.
        enable_softmax_topk: whether those that `top_k_lora` keeps do.
        layerwise_scalings: whether each layer has scalings of its own.
        xlora_depth: how many linear layers the classifier has.
        xlora_size: the width between them.
        xlora_dropout_p: dropout between them.
        use_trainable_adapters: whether the experts are trained, too. In functional form, what is differentiated is.
        softmax_temperature: of the softmax.
        top_k_lora: how many experts a token uses; None for all.
        scaling_pass_value: how much each expert acts in the first pass.
        global_scaling_weight: a factor of all experts in the second.

    Raises:
        ValueError: if the classifier has no layer.
    """

    peft_type: str = "XLORA"
    hidden_size: int | None = None
    adapters: Mapping[str, str] | None = None
    enable_softmax: bool = True
    enable_softmax_topk: bool = False
    layerwise_scalings: bool = False
    xlora_depth: int = 1
    xlora_size: int = 2048
    xlora_dropout_p: float = 0.2
    use_trainable_adapters: bool = False
    softmax_temperature: float = 1.0
    top_k_lora: int | None = None
    scaling_pass_value: float = 0.0
    global_scaling_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.xlora_depth <= 0:
            raise ValueError("X-LoRA depth must be strictly positive.")
        for name, value in filled(self).items():
            object.__setattr__(self, name, freeze(value))
        if self.enable_softmax_topk and self.top_k_lora is None:
            _warn("`enable_softmax_topk` enabled `top_k_lora` is not set")
        if self.enable_softmax_topk and self.enable_softmax:
            _warn("`enable_softmax_topk` and `enable_softmax` are both enabled. This will result in worse performance.")
        if self.top_k_lora is not None and self.top_k_lora < 1:
            _warn("`top_k_lora` value must be at least 1.")


def filled(config: Any) -> dict[str, Any]:
    """What stands for the fields that are None, with PEFT's warnings."""
    missing = {
        "hidden_size": (4096, "set to 4096 by default"),
        "adapters": (dict[str, str](), "set to empty"),
    }
    found: dict[str, Any] = {}
    for name, (value, what) in missing.items():
        if getattr(config, name) is None:
            found[name] = value
            _warn(f"No value was provided for `{name}`. This will be {what}, please ensure that this is correct.")
    return found


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=4)


@dataclasses.dataclass(frozen=True, eq=False)
class XLora:
    """The experts, the classifier and the config.

    Attributes:
        experts: plain LoRAs by name.
        classifier: "layers.0.weight" and so on, as in PEFT's `nn.Sequential` -> tensor.
        config: the config.
    """

    experts: Mapping[str, Adapter]
    classifier: Mapping[str, Tensor]
    config: XLoraConfig

    def replace(self, **changes: Any) -> XLora:
        """A copy with `experts`, `classifier` or `config` replaced."""
        return dataclasses.replace(self, **changes)


def _from_dict(values: Any) -> Any:
    return config_from_dict(values)


register_pytree(
    XLora,
    ("experts", "classifier"),
    lambda x: ([dict(x.experts), dict(x.classifier)], x.config),
    lambda children, config: XLora(children[0], children[1], config),
    lambda config: config.to_dict(),
    _from_dict,
)


# -- making one -------------------------------------------------------------------------------------------


def xlora(model: nn.Module, experts: Mapping[str, Adapter], config: XLoraConfig, *, seed: int = 0) -> XLora:
    """Trained LoRAs with a new classifier.

    Args:
        model: the model that they are for.
        experts: the LoRAs by name.
        config: the config; its `adapters` are only written to files.
        seed: of the classifier's init, that of `nn.Linear`.

    Returns:
        The value.

    Raises:
        AdapterError: if there is no expert, or one is no plain LoRA.
    """
    _check(experts)
    generator = torch.Generator().manual_seed(seed)
    like = next(p for p in model.parameters() if p.is_floating_point())
    made: dict[str, Tensor] = {}
    for name, shape in classifier_shapes(config, len(experts), len(layers(model, experts))).items():
        fan_in = shape[1] if len(shape) > 1 else made[name.replace("bias", "weight")].shape[1]
        value = (torch.rand(shape, generator=generator) * 2 - 1) / math.sqrt(fan_in)
        made[name] = value.to(dtype=like.dtype, device=like.device)
    return XLora(dict(experts), made, config)


def _check(experts: Mapping[str, Adapter]) -> None:
    if not experts:
        raise AdapterError("X-LoRA needs at least one adapter.")
    for name, adapter in experts.items():
        if method_of(adapter.config) is not lora.METHOD:
            raise AdapterError(f"X-LoRA: {name!r} is no plain LoRA.")


def layers(model: nn.Module, experts: Mapping[str, Adapter]) -> tuple[str, ...]:
    """The paths of the adapted layers in the order in which PEFT numbers them: the model's."""
    paths = {path for adapter in experts.values() for path in adapter.params}
    return tuple(path for path, _ in named_modules(model) if path in paths)


def classifier_shapes(config: XLoraConfig, experts: int, layers: int) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the classifier's tensors.

    Args:
        config: the config.
        experts: how many there are.
        layers: how many adapted layers the model has.

    Returns:
        Name -> shape.
    """
    last = experts * layers if config.layerwise_scalings else experts
    assert config.hidden_size is not None
    widths = [config.hidden_size, *[config.xlora_size] * (config.xlora_depth - 1), last]
    step = 3 if config.xlora_dropout_p > 0 else 2  # a ReLU is numbered, too, and a dropout module
    found: dict[str, tuple[int, ...]] = {}
    for i, (fan_in, out) in enumerate(itertools.pairwise(widths)):
        found |= {f"layers.{i * step}.weight": (out, fan_in), f"layers.{i * step}.bias": (out,)}
    return found


# -- a call -----------------------------------------------------------------------------------------------


def scalings(value: XLora, hidden: Tensor, layers: int, *, training: bool = False) -> Tensor:
    """What the classifier says.

    Args:
        value: the X-LoRA.
        hidden: the last hidden state, (rows, tokens, hidden_size).
        layers: how many adapted layers there are.
        training: whether dropout acts.

    Returns:
        (rows, tokens, layers, experts).
    """
    config, p = value.config, value.classifier
    numbers = sorted({int(name.split(".")[1]) for name in p})
    h = hidden.to(p[f"layers.{numbers[0]}.weight"].dtype)
    for i in numbers:
        h = F.linear(h, p[f"layers.{i}.weight"], p[f"layers.{i}.bias"])
        if i != numbers[-1]:
            h = torch.relu(h)
            h = torch.dropout(h, config.xlora_dropout_p, True) if training and config.xlora_dropout_p else h
    n = len(value.experts)
    shape = (*h.shape[:2], layers, n)
    h = h.reshape(shape) if config.layerwise_scalings else h.unsqueeze(2).expand(shape)
    return torch.softmax(h / config.softmax_temperature, -1) if config.enable_softmax else h


def gates(found: Tensor, config: XLoraConfig) -> Tensor:
    """How much each expert acts: the scalings, or what `top_k_lora` and `enable_softmax_topk` make of them.

    Args:
        found: the scalings, (..., experts).
        config: the config.

    Returns:
        Of the same shape, without the global weight.
    """
    if config.top_k_lora is not None:
        index = found.topk(config.top_k_lora, -1).indices
        found = found * torch.zeros_like(found).scatter(-1, index, torch.ones_like(found))
    if config.enable_softmax_topk:
        on = found != 0
        soft = torch.softmax(torch.where(on, found, float("-inf")), -1)
        found = torch.where(on, soft, 0.0)
    return found


def predict(model: nn.Module, value: XLora, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Tensor:
    """The first pass: the scalings for a call.

    Args:
        model: the model, not changed.
        value: the X-LoRA.
        args: positional arguments of the model; a tuple, or a single one.
        kwargs: keyword arguments of the model.

    Returns:
        (rows, tokens, layers, experts).
    """
    positional: tuple[Any, ...] = args if isinstance(args, tuple) else (args,)  # pyright: ignore
    named = {**(kwargs or {}), "output_hidden_states": True, "return_dict": True}
    paths, config = layers(model, value.experts), value.config
    with torch.no_grad():
        if config.scaling_pass_value:
            tokens = rows_and_tokens(positional, named)
            same = tokens.new_full((*tokens.shape[:2], len(paths), len(value.experts)), 0.0, dtype=torch.float32)
            first = _second_pass(model, value, paths, same + config.scaling_pass_value, positional, named)
        else:
            first = model(*positional, **named)
    return scalings(value, first.hidden_states[-1].detach(), len(paths), training=model.training)


def rows_and_tokens(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The input of a call that has an axis of rows and one of tokens."""
    found: Any = next(
        (kwargs[n] for n in ("input_ids", "inputs_embeds") if kwargs.get(n) is not None), args[0] if args else None
    )
    if not isinstance(found, Tensor) or found.ndim < 2:
        raise AdapterError("X-LoRA needs input_ids or inputs_embeds, rows and tokens first.")
    return found


def call(
    model: nn.Module,
    value: XLora,
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    scalings: Tensor | None = None,
) -> Any:
    """Call a model of transformers with X-LoRA. The model is never changed.

    Args:
        model: the model, without a cache (`use_cache=False`).
        value: the X-LoRA.
        args: positional arguments of the model; a tuple, or a single one.
        kwargs: keyword arguments of the model.
        scalings: those of `predict`, if they are there already.

    Returns:
        What the model returns.
    """
    positional: tuple[Any, ...] = args if isinstance(args, tuple) else (args,)  # pyright: ignore
    found = predict(model, value, positional, kwargs) if scalings is None else scalings
    return _second_pass(model, value, layers(model, value.experts), found, positional, kwargs or {})


def _second_pass(
    model: nn.Module,
    value: XLora,
    paths: Sequence[str],
    found: Tensor,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    config = value.config
    w = gates(found, config) * config.global_scaling_weight
    if not config.layerwise_scalings:  # the same at all layers
        weights: dict[str, Any] = {name: w[:, :, 0, e] for e, name in enumerate(value.experts)}
        return functional_call(model, value.experts, args, kwargs, weights=weights)
    adapters: dict[str, Adapter] = {}
    weights = {}
    for e, (name, adapter) in enumerate(value.experts.items()):
        for i, path in enumerate(paths):
            if path in adapter.params:
                part = f"{name} at {path}"
                trees = ({path: tree[path]} if path in tree else {} for tree in (adapter.params, adapter.buffers))
                adapters[part] = adapter.replace(**dict(zip(("params", "buffers"), trees, strict=True)))
                weights[part] = w[:, :, i, e]
    return functional_call(model, adapters, args, kwargs, weights=weights)


# -- files ------------------------------------------------------------------------------------------------


def save(value: XLora, directory: str | os.PathLike[str]) -> None:
    """Write a PEFT checkpoint: the classifier and the config. The experts are saved by `fa.save`, each by itself.

    Args:
        value: the X-LoRA.
        directory: the folder, made if need be.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {PREFIX + name: leaf.detach().cpu().contiguous() for name, leaf in value.classifier.items()}
    values = {**value.config.to_dict(), "inference_mode": True}
    text = json.dumps(dict(sorted(values.items())), indent=2)
    write_all(folder, {WEIGHTS: to_bytes(tensors, {"format": "pt"}), CONFIG: text.encode()})


def load(directory: str | os.PathLike[str], experts: Mapping[str, Adapter] | None = None) -> XLora:
    """Read a PEFT checkpoint.

    Args:
        directory: the folder.
        experts: the LoRAs in the config's order; by default they are read from the folders that it names.

    Returns:
        The value.

    Raises:
        AdapterFileError: if the files are no X-LoRA, or do not fit the experts.
    """
    folder = Path(directory)
    config: Any = read_config(folder)
    if not isinstance(config, XLoraConfig):
        raise AdapterFileError(f"{folder} holds a {config.peft_type} adapter, not X-LoRA.")
    found = load_file(folder / WEIGHTS)
    named = {name: load_adapter(path) for name, path in (config.adapters or {}).items()} if experts is None else experts
    _check(named)
    classifier = {re.sub(r"^(.*\.)?internal_xlora_classifier\.", "", key): leaf for key, leaf in found.items()}
    paths = {path for adapter in named.values() for path in adapter.params}
    expected = classifier_shapes(config, len(named), len(paths))
    shapes = {name: tuple(leaf.shape) for name, leaf in classifier.items()}
    if shapes != expected:
        raise AdapterFileError(f"{folder / WEIGHTS} has {shapes}; {len(named)} experts at {len(paths)} layers need "
                               f"{expected}.")  # fmt: skip
    return XLora(dict(named), classifier, config)
