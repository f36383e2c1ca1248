"""What the layers of a model see: the inputs of sites in a call, for inits and states that depend on data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from funcadapt.call import functional_call
from funcadapt.copying import structural_copy
from funcadapt.errors import AdapterError

if TYPE_CHECKING:
    from funcadapt.adapter import Adapter


def watched(model: nn.Module, paths: Iterable[str], see: Callable[[str, Tensor], None]) -> nn.Module:
    """A structural copy of a model that reports the first input of modules, without a gradient, in every call.

    Args:
        model: the model, not changed.
        paths: the paths of the modules.
        see: called with the path and the input.

    Returns:
        The copy.
    """
    copy = structural_copy(model)
    for path in paths:
        module = copy.get_submodule(path)

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: str = path) -> None:
            with torch.no_grad():
                see(path, (args[0] if args else next(iter(kwargs.values()))).detach())

        module.register_forward_pre_hook(hook, with_kwargs=True)  # pyright: ignore[reportUnknownMemberType]
    return copy


def inputs_of(
    model: nn.Module,
    paths: Iterable[str],
    see: Callable[[str, Tensor], None],
    args: Any,
    kwargs: Mapping[str, Any] | None = None,
    *,
    adapter: Adapter | None = None,
) -> None:
    """Run a model, and report the inputs of modules.

    Args:
        model: the model, not changed.
        paths: the paths of the modules.
        see: called with the path and the input, in the order of the call.
        args: the model's arguments, a tuple or a single one.
        kwargs: its keyword arguments.
        adapter: an adapter that acts in the call.

    Raises:
        AdapterError: if a module was not called.
    """
    listed = list(paths)
    missing = set(listed)

    def note(path: str, x: Tensor) -> None:
        missing.discard(path)
        see(path, x)

    copy = watched(model, listed, note)
    with torch.no_grad():
        functional_call(copy, {} if adapter is None else adapter, args, kwargs)
    if missing:
        raise AdapterError(f"The call did not reach {sorted(missing)[0]!r} ({len(missing)} modules in all).")
