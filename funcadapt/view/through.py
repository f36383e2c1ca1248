"""Layers of the view whose adapters act through a weight: packed attention, and plain parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from funcadapt._torch import is_compiling
from funcadapt.binding import Place, state_of
from funcadapt.compose import Level
from funcadapt.swapping import Swaps, swap_weight
from funcadapt.view.layer import AdapterLayer


class ThroughWeight(AdapterLayer):
    """A module whose weight is the adapted one for the duration of its forward."""

    def _run(self, levels: Sequence[Level], *args: Any, **kwargs: Any) -> Any:
        module = self.get_base_layer()
        swaps = Swaps()
        # one thread at a time, as for functional calls; nothing is kept while compiling
        with contextlib.nullcontext() if is_compiling() else state_of(module).lock:
            place = Place(self.site.path, module, self.site, None, "", False)
            swap_weight(swaps, place, levels, factored=not is_compiling())
            swaps.enter()
            try:
                return self.base_layer(*args, **kwargs)
            finally:
                swaps.exit()

    def __getattr__(self, name: str) -> Any:
        """The wrapped module's own attributes, such as `embed_dim` and `batch_first` of attention."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.get_base_layer(), name)


class AttentionLayer(ThroughWeight):
    """`nn.MultiheadAttention`: its packed in-projection is adapted here, its out-projection by a layer of its own.

    PEFT applies the out-projection's update twice (its defect B1); here it acts once, and has its full gradient.
    """


class ParameterLayer(ThroughWeight):
    """A module with one plain parameter adapted. Several parameters of a module are several layers around it."""

    def extra_repr(self) -> str:
        """The parameter's name, as PEFT prints it."""
        return f"parameter_name={self.parameter_name!r},"

    @property
    def parameter_name(self) -> str:
        """The parameter's name in the module."""
        return self.site.parameter

    def get_param(self) -> Tensor:
        """The parameter."""
        return getattr(self.get_base_layer(), self.parameter_name)


def is_read_by_parent(parent: nn.Module) -> bool:
    """Whether a module multiplies with the weights of its children itself."""
    return isinstance(parent, nn.MultiheadAttention)
