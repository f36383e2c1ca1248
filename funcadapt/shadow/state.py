"""What rides along in Shadow, see `funcadapt.shadow`: the state from block to block, and the cache of both networks."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from funcadapt.errors import AdapterError
from funcadapt.shadow.backbone import ShadowConfig

Leaves = Mapping[str, Tensor]


def block_shapes(config: ShadowConfig, width: int) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a block's leaves.

    Args:
        config: the config.
        width: the model's width.

    Returns:
        Name -> shape.
    """
    r, u = config.r, config.update_hidden_size or config.r
    found: dict[str, tuple[int, ...]] = {"shadow_down.weight": (r, width), "shadow_up.weight": (width, r)}
    for name in ("shadow_update_transform", "shadow_update_gate"):
        found |= {f"{name}.0.weight": (u, width), f"{name}.0.bias": (u,)}
        found |= {f"{name}.2.weight": (width, u), f"{name}.2.bias": (width,)}
    return found


# -- at a block -------------------------------------------------------------------------------------------


def inject(p: Leaves, h: Tensor, s: Tensor, alpha: float, dropout: float = 0.0) -> Tensor:
    """The corrected input of a block: h + alpha W_up drop(W_down (h - s)).

    Args:
        p: the block's leaves.
        h: the input, (..., d).
        s: the shadow state, of the same shape.
        alpha: the strength.
        dropout: the rate; 0 outside of training.

    Returns:
        Of the same shape and dtype.
    """
    down, up = p["shadow_down.weight"], p["shadow_up.weight"]
    delta = (h - s).to(down.dtype)
    delta = F.dropout(delta, dropout) if dropout else delta
    return h + (alpha * F.linear(F.linear(delta, down), up)).to(h.dtype)


def advance(p: Leaves, out: Tensor, s: Tensor) -> Tensor:
    """The next shadow state: (1 - g) s + g T(out), g = sigmoid(G(out)).

    Args:
        p: the block's leaves.
        out: the block's output, (..., d).
        s: the shadow state, of the same shape.

    Returns:
        Of the same shape and dtype.
    """
    x = out.to(p["shadow_update_transform.0.weight"].dtype)
    g = torch.sigmoid(_mlp(p, "shadow_update_gate", x))
    return ((1.0 - g) * s.to(x.dtype) + g * _mlp(p, "shadow_update_transform", x)).to(s.dtype)


def _mlp(p: Leaves, name: str, x: Tensor) -> Tensor:
    x = F.gelu(F.linear(x, p[f"{name}.0.weight"], p[f"{name}.0.bias"]))
    return F.linear(x, p[f"{name}.2.weight"], p[f"{name}.2.bias"])


class Run:
    """Where a call stands: the shadow state, and the number of the block that it comes from."""

    __slots__ = ("last", "state")

    def __init__(self) -> None:
        self.state: Tensor | None = None
        self.last = -1

    def through(
        self,
        place: tuple[str, int],
        block: Callable[..., Any],
        leaves: Leaves,
        rates: tuple[float, float],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """Run a block, its input corrected, and move the shadow state on.

        Args:
            place: its path and its number.
            block: its forward.
            leaves: its leaves.
            rates: alpha, and the rate of dropout, 0 outside of training.
            args: positional arguments of the block.
            kwargs: keyword arguments of the block.

        Returns:
            What the block returns.

        Raises:
            AdapterError: if the model does not run its blocks as a decoder does.
        """
        path, number = place
        h: Any = args[0] if args else kwargs.get("hidden_states")
        s = self.state
        if not isinstance(h, Tensor):
            raise AdapterError(f"Shadow: the block {path!r} was called without hidden states.")
        if s is None or self.last >= number:
            why = "its model was not called" if s is None else "it is not the next one"
            raise AdapterError(
                f"Shadow: the block {path!r} ran out of turn ({why}). The whole model must be called, and run each of "
                "its blocks once, in order. (With activation checkpoints outside of transformers: pass "
                "context_fn=fa.checkpoint_context.)"
            )
        if h.shape != s.shape:
            raise AdapterError(
                f"Shadow: the shadow state of shape {tuple(s.shape)} does not match the hidden states of shape "
                f"{tuple(h.shape)} at {path!r}: the model's input is not what the shadow backbone saw."
            )
        x = inject(leaves, h, s, *rates)
        out: Any = block(x, *args[1:], **kwargs) if args else block(**{**kwargs, "hidden_states": x})
        self.state, self.last = advance(leaves, _hidden_states(out), s), number
        return out


def _hidden_states(out: Any) -> Tensor:
    """Those that a block returns: by themselves, in a tuple, or in an output with names."""
    found: Any = out
    if isinstance(out, tuple):
        found = next(iter(out), None)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    elif not isinstance(out, Tensor):
        found = next((t for n in ("hidden_states", "last_hidden_state") if (t := getattr(out, n, None)) is not None), 0)
    if not isinstance(found, Tensor):
        kind = type(found).__name__  # pyright: ignore[reportUnknownArgumentType]
        raise TypeError(f"Unsupported decoder block output type: {kind}. Expected a Tensor or a tuple.")
    return found


# -- caches -----------------------------------------------------------------------------------------------

_BOTH = ("reset", "reorder_cache", "crop", "batch_repeat_interleave", "batch_select_indices")


def split_cache(past: Any) -> tuple[Any, Any]:
    """The model's cache and the shadow's.

    Args:
        past: `past_key_values` of a call.

    Returns:
        The two.

    Raises:
        AdapterError: if the shadow's half is missing although there are tokens in the model's.
    """
    pair = getattr(past, "shadow_pair", False) is True
    base, own = (past.__dict__["base"], past.__dict__["shadow"]) if pair else (past, None)
    length: Any = getattr(base, "get_seq_length", None)
    if base is not None and own is None and (length is None or length() > 0):
        raise AdapterError(
            f"Shadow: past_key_values is a filled {type(base).__name__} without the shadow's own cache. Pass on the "
            "`past_key_values` of the last output, which holds both, or use_cache=False and all tokens."
        )
    return base, own


def join_caches(output: Any, own: Any) -> None:
    """Make the cache in an output one of both networks, if there is any."""
    base: Any = getattr(output, "past_key_values", None)
    if base is not None and hasattr(base, "get_seq_length"):
        output.past_key_values = _pair_class(base.__class__)(base, own)


@functools.cache
def _pair_class(cls: type[Any]) -> type[Any]:
    """A class of caches, of the kind of transformers' `Cache`, that are two: what moves rows or tokens acts on both."""
    root = next((c for c in cls.__mro__ if c.__name__ == "Cache"), cls)
    body: dict[str, Any] = {"__doc__": "The caches of a model and of its shadow.", "shadow_pair": True}

    def start(self: Any, base: Any, shadow: Any) -> None:
        self.__dict__.update(base=base, shadow=shadow)

    def get(self: Any, name: str) -> Any:
        if "base" not in self.__dict__:  # not initialised yet
            raise AttributeError(name)
        return getattr(self.__dict__["base"], name)

    for name in dir(root):
        held = inspect.getattr_static(root, name)
        if name.startswith("_") and name not in ("__len__", "__getitem__", "__iter__"):
            continue
        if isinstance(held, property):
            body[name] = property(functools.partial(_attribute, name=name))
        elif inspect.isfunction(held):
            body[name] = _method(name)
    compileable = property(_never)  # the two are of different sizes
    body |= {"__init__": start, "__getattr__": get, "is_compileable": compileable}
    return type("ShadowCache", (root,), body)


def _never(_: Any) -> bool:
    return False


def _attribute(pair: Any, name: str) -> Any:
    return getattr(pair.__dict__["base"], name)


def _method(name: str) -> Callable[..., Any]:
    def act(self: Any, *args: Any, **kwargs: Any) -> Any:
        if name in _BOTH and self.__dict__["shadow"] is not None:
            getattr(self.__dict__["shadow"], name)(*args, **kwargs)
        return getattr(self.__dict__["base"], name)(*args, **kwargs)

    return act
