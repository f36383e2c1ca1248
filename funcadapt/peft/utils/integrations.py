"""Other libraries: DeepSpeed's gathered parameters, quantised weights, device maps, empty weights."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
from collections.abc import Callable, Generator, Iterable
from typing import Any, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

_P = ParamSpec("_P")
_R = TypeVar("_R")


def check_deepspeed_zero3_enabled() -> bool:
    """Whether transformers runs under DeepSpeed's ZeRO-3."""
    try:
        from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
    except ImportError:
        return False
    return bool(is_deepspeed_zero3_enabled())  # pyright: ignore


@contextlib.contextmanager
def gather_params_ctx(
    param: nn.Parameter | Iterable[nn.Parameter], modifier_rank: int | None = 0, fwd_module: nn.Module | None = None
) -> Generator[None, None, None]:
    """Parameters in full inside, if DeepSpeed's ZeRO-3 has them in shards; otherwise nothing.

    Args:
        param: the parameters.
        modifier_rank: the rank whose changes to them are kept.
        fwd_module: the module whose forward they are gathered for.

    Yields:
        Nothing.
    """
    if not check_deepspeed_zero3_enabled():
        yield
        return
    deepspeed: Any = importlib.import_module("deepspeed")
    with deepspeed.zero.GatheredParameters(param, modifier_rank=modifier_rank, fwd_module=fwd_module):
        yield


def dequantize_module_weight(module: nn.Module) -> Tensor:
    """The weight of a layer in floating point: its own if it is, or what HQQ, torchao or bitsandbytes make of it.

    Args:
        module: the layer.

    Returns:
        The weight.

    Raises:
        TypeError: if its weight is no tensor.

    Example:
        >>> import torch
        >>> from funcadapt.peft.utils.integrations import dequantize_module_weight
        >>> layer = torch.nn.Linear(2, 2)
        >>> dequantize_module_weight(layer) is layer.weight
        True
    """
    if hasattr(module, "W_q"):  # HQQ
        return module.dequantize()  # pyright: ignore
    weight: Any = module.weight
    if type(weight).__module__.startswith("torchao."):
        return weight.dequantize()
    if not isinstance(weight, Tensor):
        raise TypeError(f"The weight of {type(module).__name__} is no tensor, but a {type(weight).__name__}.")
    if not get_bnb_param_type(weight):
        return weight
    device = weight.device
    dequantized = dequantize_bnb_weight(weight, state=getattr(module, "state", None))
    if device.type == "cpu" and get_bnb_param_type(weight) == "8bit":
        module.weight = module.weight.to(device)  # bitsandbytes moved it to the GPU  # pyright: ignore
    return dequantized


def dequantize_bnb_weight(weight: Tensor, state: Any = None) -> Tensor:
    """A weight of bitsandbytes, of 4 or 8 bits, in floating point.

    Args:
        weight: the weight.
        state: the `state` of its layer, which 8 bits need.

    Returns:
        The weight.

    Raises:
        ValueError: if the state is missing.
    """
    functional: Any = importlib.import_module("bitsandbytes").functional
    quantized: Any = weight
    if get_bnb_param_type(weight) == "4bit":
        return functional.dequantize_4bit(quantized.data, quantized.quant_state)
    if state is None:
        raise ValueError("Expected the `state` of the layer with the 8-bit weight of bitsandbytes, got None.")
    if state.SCB is None:
        state.SCB = quantized.SCB
    scales = state.SCB.to(quantized.data.device)
    if hasattr(functional, "int8_vectorwise_dequant"):
        return functional.int8_vectorwise_dequant(quantized.data, scales)
    return quantized.data * scales.view(-1, 1) / 127


def get_bnb_param_type(param: Tensor) -> Literal[False, "4bit", "8bit"]:
    """Whether a parameter is one of bitsandbytes, and which."""
    kinds: dict[str, Literal["4bit", "8bit"]] = {"Params4bit": "4bit", "Int8Params": "8bit"}
    return kinds.get(type(param).__name__, False)


def get_layer_device_map(model: Any) -> dict[int, int | str]:
    """The device on which each layer of a model with `hf_device_map` runs; one that is offloaded runs on the first GPU.

    Args:
        model: the model.

    Returns:
        Layer index -> device.

    Raises:
        RuntimeError: if a layer is not in the map.
    """
    stored: dict[str, int | str] = model.hf_device_map
    main = next(device for device in stored.values() if device not in ("cpu", "disk"))
    running = {path: main if device in ("cpu", "disk") else device for path, device in stored.items()}
    devices: dict[int, int | str] = {}
    for index in range(model.config.num_hidden_layers):
        here = [device for path, device in running.items() if f".{index}." in f"{path}."]
        if len(running) == 1 and "" in running:
            here = [running[""]]
        if not here:
            raise RuntimeError(f"layer {index} has not been mapped to a device.")
        devices[index] = here[-1]
    return devices


def map_cache_to_layer_device_map(model: Any, cache: Any) -> None:
    """Move the keys and values of transformers' cache to the devices of their layers.

    Args:
        model: the model; nothing happens without a `hf_device_map`.
        cache: the cache.
    """
    if not hasattr(model, "hf_device_map"):
        return
    if hasattr(cache, "self_attention_cache"):
        map_cache_to_layer_device_map(model, cache.self_attention_cache)
    elif hasattr(cache, "layers"):
        for index, device in get_layer_device_map(model).items():
            layer = cache.layers[index]
            layer.keys, layer.values = layer.keys.to(device), layer.values.to(device)


_real: contextvars.ContextVar[bool] = contextvars.ContextVar("real", default=False)


@contextlib.contextmanager
def init_empty_weights(include_buffers: bool | None = None) -> Generator[None, None, None]:
    """Parameters of modules that are made inside are on the meta device, without memory.

    Args:
        include_buffers: whether buffers are, too.

    Yields:
        Nothing.

    Example:
        >>> import torch
        >>> from funcadapt.peft.utils.integrations import init_empty_weights
        >>> with init_empty_weights():
        ...     layer = torch.nn.Linear(1000, 1000)
        >>> layer.weight.device
        device(type='meta')
    """

    def parameter(module: nn.Module, name: str, value: nn.Parameter) -> nn.Parameter | None:
        if _real.get():
            return None
        options = {**vars(value), "requires_grad": value.requires_grad}  # quantised ones have options of their own
        return type(value)(value.to("meta"), **options)

    def buffer(module: nn.Module, name: str, value: Tensor) -> Tensor:
        return value.to("meta")

    with contextlib.ExitStack() as stack:
        add: Any = torch_module.register_module_parameter_registration_hook
        stack.callback(add(parameter).remove)
        if include_buffers:
            add = torch_module.register_module_buffer_registration_hook
            stack.callback(add(buffer).remove)
            stack.enter_context(torch.device("meta"))
        yield


def skip_init_on_device(func: Callable[_P, _R]) -> Callable[_P, _R]:
    """A function in which `init_empty_weights` has no effect on parameters.

    Args:
        func: the function.

    Returns:
        The function, with that property.
    """

    @functools.wraps(func)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        token = _real.set(True)
        try:
            return func(*args, **kwargs)
        finally:
            _real.reset(token)

    return wrapper
