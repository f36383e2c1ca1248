"""What holds leaves in the in-place view where PEFT has a module of its own for them, which computes nothing here."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping

from torch import Tensor, nn

from funcadapt.sites import Site

Holder = Callable[[Site, nn.Module, str, Mapping[str, Tensor]], nn.Module]


def holder(label: str, buffers: Container[str] = ()) -> Holder:
    """The `holder` of a view whose ModuleDicts hold modules of one class of PEFT's.

    Args:
        label: the class name, which they print.
        buffers: the leaves that are buffers of theirs.

    Returns:
        The function.
    """

    def made(site: Site, base: nn.Module, container: str, parts: Mapping[str, Tensor]) -> nn.Module:
        from funcadapt.view.holding import Entry  # it builds on the methods

        entry = Entry(label)
        for name, value in parts.items():
            if name in buffers:
                entry.register_buffer(name, value)
            else:
                entry.register_parameter(name, nn.Parameter(value))
        return entry

    return made
