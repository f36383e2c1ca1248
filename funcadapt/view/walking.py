"""Finding the wrappers in a model, and looking at the model without them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Generator, Iterator
from typing import Any

from torch import Tensor, nn

from funcadapt._torch import named_modules
from funcadapt.config import AdapterConfig
from funcadapt.view.auxiliary import AuxiliaryTrainingWrapper
from funcadapt.view.layer import AdapterLayer

STATE = "_adapter_view"  # where a model keeps its state


@dataclasses.dataclass
class ViewState:
    """What a model with a view remembers. Plain data, so that copying the model copies it.

    Attributes:
        configs: adapter name -> config, in the order of injection.
        requires_grad: parameter name -> its flag before the first injection, by the names of the bare model.
        biases: bias name -> its value before an adapter with trained biases came.
        fast_paths: path of an encoder layer -> the switch of its fast path, which would bypass wrappers.
    """

    configs: dict[str, AdapterConfig] = dataclasses.field(default_factory=dict[str, AdapterConfig])
    requires_grad: dict[str, bool] = dataclasses.field(default_factory=dict[str, bool])
    biases: dict[str, Tensor] = dataclasses.field(default_factory=dict[str, Tensor])
    fast_paths: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])


def root_of(model: nn.Module) -> nn.Module:
    """The module into which adapters were injected: the model, or a part of it (the bare model of a `PeftModel`)."""
    if STATE in model.__dict__:
        return model
    return next((module for module in model.modules() if STATE in module.__dict__), model)


def view_state(model: nn.Module) -> ViewState:
    """What a model remembers of its view; empty if nothing was injected.

    Args:
        model: the model, or one that has it as a part.

    Returns:
        The state.
    """
    return root_of(model).__dict__.get(STATE) or ViewState()


def set_view_state(model: nn.Module, state: ViewState | None) -> None:
    """Set or forget the state of a model."""
    if state is None:
        model.__dict__.pop(STATE, None)
    else:
        model.__dict__[STATE] = state


def layers(model: nn.Module) -> Iterator[tuple[str, AdapterLayer]]:
    """Every layer with adapters and its path in the live model, outer before inner."""
    for path, module in named_modules(model):
        if isinstance(module, AdapterLayer):
            yield path, module


def auxiliaries(model: nn.Module) -> Iterator[tuple[str, AuxiliaryTrainingWrapper]]:
    """Every wrapper of a module that is trained in full or by rows, and its path in the live model."""
    for path, module in named_modules(model):
        if isinstance(module, AuxiliaryTrainingWrapper):
            yield path, module


def bare(module: nn.Module) -> nn.Module:
    """What is under all wrappers of a module."""
    while isinstance(module, AdapterLayer | AuxiliaryTrainingWrapper):
        module = module.base_layer if isinstance(module, AdapterLayer) else module.get_base_layer()
    return module


def wrapped(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """The outermost wrapper at each place: (the module that has it, its name there, the wrapper).

    Args:
        model: the model.

    Returns:
        The list; parents that are under wrappers themselves are bare modules.
    """
    found: list[tuple[nn.Module, str, nn.Module]] = []
    seen: set[int] = set()

    def walk(parent: nn.Module) -> None:
        if id(parent) in seen:
            return
        seen.add(id(parent))
        for name, child in parent._modules.items():
            if child is None:
                continue
            if isinstance(child, AdapterLayer | AuxiliaryTrainingWrapper):
                found.append((parent, name, child))
                child = bare(child)
            walk(child)

    walk(model)
    return found


@contextlib.contextmanager
def unwrapped(model: nn.Module) -> Generator[nn.Module, None, None]:
    """The bare model for the duration of a block: every wrapper is taken out of its parent, and put back.

    Inside, every function of funcadapt that takes a model works on the structure that the adapters' paths describe.

    Args:
        model: the model.

    Yields:
        The same model.
    """
    places = wrapped(model)
    for parent, name, wrapper in places:
        parent._modules[name] = bare(wrapper)
    try:
        yield model
    finally:
        for parent, name, wrapper in places:
            parent._modules[name] = wrapper
