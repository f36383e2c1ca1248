"""Which adapters of a live model act, which are trained, and taking one out."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from funcadapt.errors import AdapterError, did_you_mean
from funcadapt.view.auxiliary import AuxiliaryTrainingWrapper, TokensHolder
from funcadapt.view.layer import AdapterLayer
from funcadapt.view.merging import merged_parts
from funcadapt.view.switches import TunerLayer
from funcadapt.view.walking import auxiliaries, layers, root_of, unwrapped, view_state

_FLOAT8 = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")
_NARROW = frozenset({torch.float16, torch.bfloat16, *(getattr(torch, name) for name in _FLOAT8)})


def parts(model: nn.Module) -> list[AdapterLayer | AuxiliaryTrainingWrapper]:
    """Everything in a model that has adapters: layers and auxiliary wrappers."""
    return [part for _, part in (*layers(model), *auxiliaries(model))]


def check_names(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse names that the model does not have; PEFT accepts them, and the adapters then do nothing.

    Args:
        model: the model.
        names: the names.

    Raises:
        AdapterError: for the first unknown one; near matches are listed.
    """
    known = view_state(model).configs
    for name in names:
        if name not in known:
            raise AdapterError(f"Adapter {name} not found.{did_you_mean(name, known)}")


def set_adapter(model: nn.Module, names: str | Sequence[str], inference_mode: bool = False) -> None:
    """Make adapters of a model the active ones, and the only trainable ones.

    Args:
        model: the model.
        names: their names; several nest in that order, the first innermost.
        inference_mode: whether they stay frozen.

    Raises:
        AdapterError: if a name is unknown.
        ValueError: if several are given that all train one module in full.
    """
    listed = [names] if isinstance(names, str) else list(names)
    check_names(model, listed)
    # auxiliary wrappers may refuse: they are asked first, so that a failure changes nothing
    for _, wrapper in auxiliaries(model):
        wrapper.chosen(listed)
    for part in parts(model):
        if isinstance(part, TunerLayer) and part.merged:
            warnings.warn("Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=2)
            part.unmerge()
        if isinstance(part, AdapterLayer):
            part.set_adapter(listed, inference_mode)
        else:
            part.set_adapter(part.chosen(listed), inference_mode=inference_mode)


def active_adapters(model: nn.Module) -> list[str]:
    """The names of the active adapters of a model, in the order in which they nest."""
    found: dict[str, None] = {}
    known = view_state(model).configs
    for part in parts(model):
        found |= dict.fromkeys(name for name in part.active_adapters if name in known)
    return list(found)


def set_requires_grad(model: nn.Module, names: str | Iterable[str], requires_grad: bool = True) -> None:
    """Freeze or unfreeze the parameters of adapters.

    Args:
        model: the model.
        names: their names.
        requires_grad: whether they are trained.

    Raises:
        AdapterError: if a name is unknown.
    """
    listed = [names] if isinstance(names, str) else list(names)
    check_names(model, listed)
    for part in parts(model):
        part.set_requires_grad(listed, requires_grad)


def enable_adapters(model: nn.Module, enabled: bool) -> None:
    """Switch all adapters of a model on or off.

    Args:
        model: the model.
        enabled: whether they act.
    """
    for part in parts(model):
        part.enable_adapters(enabled)


@contextlib.contextmanager
def disabled(model: nn.Module) -> Generator[nn.Module, None, None]:
    """The model without its adapters for the duration of a block; afterwards everything is as it was.

    (PEFT's switch turns the gradients of frozen active adapters on when the block ends; this one does not.)

    Args:
        model: the model.

    Yields:
        The model.
    """
    every = parts(model)
    merged = [(part, list(part.merged_adapters)) for part in merged_parts(model)]
    switches = [(part, part._disable_adapters) for part in every]
    try:
        for part, _ in merged:
            part.unmerge()
        for part in every:
            part._disable_adapters = True
        yield model
    finally:
        for part, switch in switches:
            part._disable_adapters = switch
        for part, names in reversed(merged):
            part.merge(adapter_names=names)


@contextlib.contextmanager
def given(model: nn.Module, inputs: Mapping[str, Tensor]) -> Generator[nn.Module, None, None]:
    """What methods need of every call beside the layers' inputs (Poly's "task_ids"), for the duration of a block.

    Args:
        model: the model.
        inputs: by name, rows first, as `fa.functional_call` takes them.

    Yields:
        The model.
    """
    if not inputs:
        yield model
        return
    with _held([layer for _, layer in layers(model)], inputs), _recomputed(model, inputs):
        yield model


@contextlib.contextmanager
def _held(found: Iterable[AdapterLayer], inputs: Mapping[str, Tensor]) -> Generator[None, None, None]:
    slots = [(layer.__dict__, layer.__dict__.get("inputs")) for layer in found]
    try:
        for slot, _ in slots:
            slot["inputs"] = dict(inputs)
        yield
    finally:
        for slot, old in slots:
            if old is None:
                slot.pop("inputs", None)
            else:
                slot["inputs"] = old


@contextlib.contextmanager
def _recomputed(model: nn.Module, inputs: Mapping[str, Tensor]) -> Generator[None, None, None]:
    """Hugging Face's activation checkpoints recompute in the backward pass, with the inputs of the forward pass."""
    name, swapped = "_gradient_checkpointing_func", list[tuple[dict[str, Any], Any]]()

    def around(original: Callable[..., Any], below: Sequence[AdapterLayer]) -> Callable[..., Any]:
        def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            def again(*args: Any, **kwargs: Any) -> Any:
                with _held(below, inputs):
                    return function(*args, **kwargs)

            return original(again, *args, **kwargs)

        return checkpoint

    try:
        for module in model.modules() if model.training and torch.is_grad_enabled() else ():
            slot: Any = module.__dict__
            if name in slot and getattr(module, "gradient_checkpointing", False):
                swapped.append((slot, slot[name]))
                slot[name] = around(slot[name], [m for m in module.modules() if isinstance(m, AdapterLayer)])
        yield
    finally:
        for slot, original in swapped:
            slot[name] = original


def delete_adapter(model: nn.Module, name: str) -> list[str]:
    """Take one adapter out of a model. Its layers stay, as in PEFT, also where they have no other adapter.

    Args:
        model: the model.
        name: the adapter's name.

    Returns:
        The adapters that are active afterwards.

    Raises:
        AdapterError: if the name is unknown.
    """
    check_names(model, [name])
    root, state = root_of(model), view_state(model)
    with warnings.catch_warnings(record=True) as caught:  # one warning for the model, not one a layer
        warnings.simplefilter("always")
        for part in [part for part in parts(root) if isinstance(part, TunerLayer)]:
            part.delete_adapter(name)
        active = active_adapters(root)
        active = [other for other in active if other != name]
        for _, wrapper in auxiliaries(root):
            if not isinstance(wrapper, TunerLayer):
                wrapper.delete_adapter(name, active)
    for warning in caught[:1]:
        warnings.warn(warning.message, stacklevel=2)
    config = state.configs.pop(name)
    if getattr(config, "bias", "none") != "none":
        with unwrapped(root):
            for full, value in state.biases.items():
                root.get_parameter(full).data.copy_(value)
        state.biases.clear()
    return active


def cast_adapter_dtype(model: nn.Module, name: str, autocast_adapter_dtype: bool = True) -> None:
    """Turn half-precision parameters of an adapter into float32, as PEFT does for training under autocast.

    Args:
        model: the model.
        name: the adapter's name.
        autocast_adapter_dtype: nothing is done if false.
    """
    if not autocast_adapter_dtype:
        return
    held = [tensor for _, layer in layers(model) for tensor in layer.tensors_of(name)]
    for _, wrapper in auxiliaries(model):
        if isinstance(wrapper, TokensHolder) and name in wrapper.available_adapters:
            tokens = wrapper.token_adapter
            held += [tokens.trainable_tokens_delta[name], tokens.trainable_tokens_original[name]]
    for tensor in held:
        if tensor.dtype in _NARROW:
            tensor.data = tensor.data.to(torch.float32)
