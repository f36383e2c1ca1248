"""Quantised base layers: the weight that one multiplies with, and its forward under `torch.func`.

No library is imported here. bitsandbytes, torchao and HQQ are known by what their layers hold; of any other layer
(GPTQ, AWQ, EETQ, one's own) the weight is read off its forward pass: `W^T = f(I) - f(0)`, for an embedding `f(0..n)`.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funcadapt import _torch
from funcadapt.errors import SiteError

_DENSE = (Tensor, nn.Parameter, nn.Buffer)


def is_quantised(weight: Any) -> bool:
    """Whether a weight is none that a layer multiplies with as it is: packed in integers, or to be dequantised.

    Args:
        weight: the parameter, or None for a layer that has none of its name.

    Returns:
        Whether it is quantised.

    Example:
        >>> is_quantised(torch.nn.Linear(2, 2).weight), is_quantised(torch.zeros(4, 1, dtype=torch.uint8))
        (False, True)
    """
    if type(weight) in _DENSE:
        return not weight.is_floating_point()
    if not isinstance(weight, Tensor):
        return weight is None
    return not weight.is_floating_point() or type(weight).dequantize is not Tensor.dequantize


def dequantised(module: nn.Module, parameter: str = "weight") -> Tensor:
    """The weight of a quantised layer as its forward multiplies with it, computed anew on every call.

    Args:
        module: the layer.
        parameter: the name of its weight.

    Returns:
        The weight in floating point, stored as the layer's kind stores it: (out, in, *kernel), for an embedding
        (rows, width). Not differentiable.

    Raises:
        TypeError: if the layer does not tell: say so in a `dequantize()` of the module or of its weight.

    Example:
        >>> class Bytes(torch.nn.Linear):
        ...     def forward(self, x):
        ...         return torch.nn.functional.linear(x, self.packed / 8)
        >>> layer = Bytes(3, 2)
        >>> layer.packed, layer.weight = torch.tensor([[8, 4, 2], [1, 0, 8]], dtype=torch.int8), None
        >>> dequantised(layer)
        tensor([[1.0000, 0.5000, 0.2500],
                [0.1250, 0.0000, 1.0000]])
    """
    weight: Any = getattr(module, parameter, None)
    with torch.no_grad(), _torch.outside_functorch():
        if isinstance(weight, Tensor) and type(weight).dequantize is not Tensor.dequantize:  # torchao
            return weight.dequantize()
        state = getattr(weight, "quant_state", None) or getattr(module, "quant_state", None)
        # 4 bits of bitsandbytes; what it repacks for processors with AVX512-BF16 it cannot dequantise
        if state is not None and not getattr(state, "packing_format_for_cpu", False):
            state = copy.copy(state)
            state.dtype = torch.float32  # else it would be rounded to the dtype that it had, unlike in the forward pass
            return sys.modules["bitsandbytes"].functional.dequantize_4bit(weight.data, state)
        scales = getattr(weight, "SCB", None)
        scales = getattr(getattr(module, "state", None), "SCB", None) if scales is None else scales
        if scales is not None and weight.dtype == torch.int8:  # 8 bits of bitsandbytes: scaled by rows
            return weight.data * (scales.to(weight.device) / 127).unsqueeze(1)
        own: Any = getattr(module, "dequantize", None)
        if callable(own):  # HQQ
            return cast("Tensor", own())
        return _probed(module)


def _probed(module: nn.Module) -> Tensor:
    """The weight, read off the layer's own forward pass, whatever adapters are around it."""
    forward = cast("Callable[[nn.Module, Tensor], Tensor]", type(module).forward)
    like = next((t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()), None)
    dtype = torch.get_default_dtype() if like is None else like.dtype
    device = next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))
    if isinstance(module, nn.Embedding):
        return forward(module, torch.arange(module.num_embeddings, device=device))
    n = getattr(module, "in_features", None)
    if not isinstance(n, int):
        raise TypeError(
            f"Only of linear layers and embeddings can the weight be read off the forward pass, not of a "
            f"{type(module).__name__}. Give it a method dequantize() that returns the weight."
        )
    y = forward(module, torch.eye(n + 1, n, dtype=dtype, device=device))  # the last row is zero: the bias
    return (y[:-1] - y[-1]).t().contiguous()


class _Linear(torch.autograd.Function):
    """`x W^T` without keeping W for the backward pass: it is dequantised again there."""

    generate_vmap_rule = False

    @staticmethod
    def forward(x: Tensor, module: nn.Module) -> Tensor:
        return F.linear(x, dequantised(module).to(x.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, nn.Module], output: Tensor) -> None:
        ctx.module = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return F.linear(grads[0], dequantised(ctx.module).to(grads[0].dtype).t()), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return F.linear(tangents[0], dequantised(ctx.module).to(tangents[0].dtype))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, None], *args: Any) -> tuple[Tensor, int]:  # only x can be batched
        x, module = args
        return _linear(x.movedim(in_dims[0], 0), module), 0


_linear: Callable[[Tensor, nn.Module], Tensor] = _Linear.apply  # pyright: ignore


class Transformable:
    """The forward of a quantised linear layer that `torch.func` can transform: `x W^T + b` with the dequantised W.

    The kernels of bitsandbytes and others are `autograd.Function`s that no transform goes through. Where a library
    also rounds the input (LLM.int8, dynamic quantisation), this does not: it is the more exact of the two.

    Attributes:
        module: the layer.
    """

    __slots__ = ("module",)

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, x: Tensor) -> Tensor:
        """The layer's output, in the dtype of its input."""
        y = _linear(x, self.module)
        bias: Any = getattr(self.module, "bias", None)
        return y if bias is None else y + bias.to(y.dtype)


def transformable(model: nn.Module) -> list[tuple[nn.Module, Callable[..., Any]]]:
    """The quantised linear layers of a model, with the forwards to use under `torch.func`.

    Args:
        model: the model.

    Returns:
        (layer, forward) of each.
    """
    return [(module, Transformable(module)) for module in model.modules() if is_quantised_linear(module)]


def is_quantised_linear(module: Any) -> bool:
    """Whether a module says how many features go in and out, and holds tensors, but no weight to multiply with."""
    if not isinstance(getattr(module, "in_features", None), int) or not hasattr(module, "out_features"):
        return False
    held = any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False)))
    return held and is_quantised(getattr(module, "weight", None))


def requantise(module: nn.Module, parameter: str, value: Tensor) -> nn.Parameter:
    """Put a weight into a layer of bitsandbytes, quantised as the old one was, which is not changed.

    Args:
        module: the layer.
        parameter: the name of its weight.
        value: the new weight, (out, in).

    Returns:
        The new parameter.

    Raises:
        TypeError: if another library quantised the layer.
    """
    old: Any = getattr(module, parameter, None)
    state = getattr(old, "quant_state", None)
    if state is not None:
        names = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
        options = {"module": module, **{name: getattr(old, name) for name in names}}
        dtype = getattr(state, "original_dtype", state.dtype)
        made = type(old)(value.to(dtype), requires_grad=False, **options).to(old.device)  # which quantises it
    elif hasattr(old, "SCB"):
        made = type(old)(value.half(), requires_grad=False, has_fp16_weights=False).to(old.device)
    else:
        raise TypeError(f"a {type(module).__name__} cannot be quantised again here")
    put_back(module, parameter, made)
    return made


def put_back(module: nn.Module, parameter: str, quantised: nn.Parameter) -> None:
    """Give a layer of bitsandbytes a weight that it had, or a new one.

    Args:
        module: the layer.
        parameter: the name of its weight.
        quantised: the weight.
    """
    m, p = cast("Any", module), cast("Any", quantised)
    old, state = m._parameters[parameter], getattr(m, "state", None)
    if hasattr(m, "quant_state"):
        m.quant_state = p.quant_state
    if hasattr(p, "SCB") and state is not None:  # the first forward moves the scales into the layer's state
        if old.SCB is None:
            old.SCB = state.SCB
        state.CB, state.SCB = None, None
        p.CB = p.data
    m._parameters[parameter] = quantised


def check_writable(module: nn.Module, parameter: str, path: str) -> None:
    """Refuse to take something out of a quantised weight.

    Args:
        module: the layer.
        parameter: the name of its weight.
        path: where, for the message.

    Raises:
        SiteError: if the weight is quantised.
    """
    if is_quantised(weight := getattr(module, parameter, None)):
        kind = "packed" if weight is None else str(weight.dtype)
        raise SiteError(
            f"The weight at {path!r} is quantised ({kind}), and this init changes the base weight. Choose one that "
            "leaves it alone, such as init_lora_weights=True, or load the model without quantisation."
        )
