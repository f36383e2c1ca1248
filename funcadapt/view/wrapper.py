"""What the wrappers of modules that are trained beside the adapters have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from funcadapt.view.switches import AdapterHolder

_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)
_OWN = frozenset({"original_module", "modules_to_save", "token_adapter", "base_layer"})


class AuxiliaryTrainingWrapper(AdapterHolder):
    """What both wrappers have in common: which adapters they have, and which one is active.

    Attributes:
        original_module: the module that is wrapped.
        is_tied: whether it has what another one has.
        kept_as: what stands before the names in a checkpoint, where a method's own adapter is held in this way.
    """

    merged_adapters: Sequence[str] = ()
    is_tied: bool = False
    kept_as: str = ""
    original_module: Any
    _several: ClassVar[bool] = False  # whether adapters can act together

    def __init__(self, module_to_save: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        super().__init__()
        self._check_module(module_to_save)
        self._active_adapter = [adapter_name]
        self._disable_adapters = False
        self._adapters: set[str] = set()
        self._wrap(module_to_save, adapter_name, **kwargs)
        self.update(adapter_name, **kwargs)
        self.training = module_to_save.training

    # -- what a kind of wrapper says --------------------------------------------------------------------

    def _wrap(self, module: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        """Register the module, and empty containers."""
        raise NotImplementedError

    def _field(self) -> str:
        """The field of the config that made this wrapper, for messages."""
        return "training wrapper"

    def _get_available_adapters(self) -> set[str]:
        """The adapters that this wrapper has values for."""
        raise NotImplementedError

    def _run(self, names: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        """The forward with some adapters; none is the original module."""
        raise NotImplementedError

    def _attribute(self, name: str) -> Any:
        """An attribute of what acts now."""
        raise NotImplementedError

    def update(self, adapter_name: str, **kwargs: Any) -> None:
        """Add an adapter; the keywords are those of the constructor."""
        raise NotImplementedError

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """The keys of a checkpoint -> those of the state dict, both relative to this module; empty for nothing."""
        raise NotImplementedError

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The module that takes the wrapper's place when the model is unloaded, with what was trained or without."""
        raise NotImplementedError

    # -- the surface ------------------------------------------------------------------------------------

    def _check_module(self, module: nn.Module) -> None:
        if isinstance(module, _CONTAINERS) or hasattr(type(module), "adapter_layer_names"):
            raise TypeError(f"{self._field()} cannot be applied to modules of type {type(module)}")

    def get_base_layer(self) -> nn.Module:
        """The module that is wrapped."""
        return self.original_module

    @property
    def available_adapters(self) -> set[str]:
        """The adapters that this wrapper has values for."""
        return self._get_available_adapters()

    def _acting(self) -> list[str]:
        """The adapters that act in a forward now: all active ones, or none if one of them has nothing here."""
        names = self.active_adapters
        return [] if self._disable_adapters or any(name not in self._adapters for name in names) else names

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # what the wrapper is made of is not there yet, or anymore: do not look for it in itself
            if name in _OWN or name.startswith("__") or "_modules" not in self.__dict__:
                raise
        return self._attribute(name)

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The module as it was trained.

        Args:
            *args: the module's arguments.
            adapter_names: for each row of the first argument, the adapter that it uses; "__base__" for none.
            **kwargs: the module's keyword arguments.

        Returns:
            The module's output.
        """
        if adapter_names is None or self._disable_adapters:
            return self._run(self._acting(), *args, **kwargs)
        return self._run_mixed(list(adapter_names), *args, **kwargs)

    def _run_mixed(self, names: list[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if len(x) != len(names):
            raise ValueError(
                f"Length of `adapter_names` should be the same as the number of inputs, but got {len(names)} and "
                f"{len(x)} respectively."
            )
        outputs: list[Tensor] = []
        order: list[int] = []
        for name in dict.fromkeys(names):
            rows = [i for i, other in enumerate(names) if other == name]
            order += rows
            chosen = [name] if name in self._get_available_adapters() else []
            y = self._run(chosen, x[torch.tensor(rows, device=x.device)], *args, **kwargs)
            if not isinstance(y, Tensor) or len(y) != len(rows):
                raise TypeError(
                    f"Mixed batching needs a module that gives one row of output for each row of input, and "
                    f"{type(self.original_module).__name__} returned {type(y).__name__}."
                )
            outputs.append(y)
        return torch.cat(outputs)[torch.tensor(order, device=x.device).argsort()]

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the wrapper on or off."""
        self._disable_adapters = not enabled

    def check_set_adapter(self, adapter_name: str | Sequence[str]) -> str | None:
        """The one of some adapters that this wrapper has.

        Args:
            adapter_name: a name, or several.

        Returns:
            The name, or None if the wrapper has none of them. A single name is returned as it is.

        Raises:
            ValueError: if there is no name at all, or the wrapper has several of them: two modules cannot both be in
                one place.
        """
        if isinstance(adapter_name, str):
            return adapter_name
        if not adapter_name:
            raise ValueError("Please specify at least one adapter to set")
        found = [name for name in adapter_name if name in self._get_available_adapters()]
        if len(found) > 1:
            raise ValueError(f"Only one adapter can be set at a time for {self}, got {len(found)}")
        return found[0] if found else None

    def chosen(self, names: Sequence[str]) -> list[str]:
        """Those of some adapters that this wrapper can have active together, see `check_set_adapter`."""
        own = self.check_set_adapter(names)
        return [] if own is None else [own]

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Choose the active adapter.

        Args:
            adapter_names: its name; an empty list for none.
            inference_mode: whether it is frozen.

        Raises:
            ValueError: if there are several and they cannot act together, or the wrapper does not have it.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if len(names) > 1 and not self._several:
            raise ValueError(f"Attempted to set multiple ({names}) adapters at once for {self._field()}.")
        for name in names:
            if name not in self._adapters:
                raise ValueError(f"Adapter {name} not found in {self._adapters}")
        self._freeze_all_but(names, inference_mode)
        self._active_adapter = names[0] if len(names) == 1 else names

    def _freeze_all_but(self, names: list[str], inference_mode: bool) -> None:
        raise NotImplementedError

    def delete_adapter(self, adapter_name: str, new_active_adapters: Sequence[str] | None) -> None:
        """Drop an adapter.

        Args:
            adapter_name: its name; nothing happens if the wrapper does not have it.
            new_active_adapters: what the caller made active in its place, the same in every layer.

        Raises:
            ValueError: if these are several that the wrapper has.
        """
        if adapter_name not in self._adapters:  # a tied wrapper is told after the values are gone
            return
        chosen = list(new_active_adapters or ())
        if len(chosen) > 1:
            raise ValueError(
                f"Attempted to set multiple ({chosen}) adapters at once for {type(self).__name__}, which is not "
                "allowed."
            )
        self._adapters.discard(adapter_name)
        self._drop(adapter_name)
        if adapter_name in self.active_adapters or chosen != self.active_adapters:
            self.set_adapter([name for name in chosen if name in self._get_available_adapters()])

    def _drop(self, adapter_name: str) -> None:
        raise NotImplementedError

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Train, or freeze, some adapters; names that the wrapper does not have are ignored."""
        raise NotImplementedError

    def adapter_state_dict(self, adapter_name: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a checkpoint holds of this module.

        Args:
            adapter_name: the adapter.
            state_dict: the state dict of this module.

        Returns:
            Keys relative to this module, without the adapter's name -> tensors.
        """
        return {key: state_dict[held] for key, held in self.adapter_state_dict_load_map(adapter_name).items()}
