"""Wrappers of modules that are trained beside the adapters: whole modules, and rows of embeddings.

PEFT's `modules_to_save` and `trainable_token_indices`, with its module layout and state-dict names:

    ModulesToSaveWrapper:   original_module, modules_to_save.<adapter>
    TrainableTokensWrapper: token_adapter.base_layer, token_adapter.trainable_tokens_delta.<adapter>

What methods that train nothing else are held in is in `view.own`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from funcadapt.binding import TOKENS
from funcadapt.view.buffer_dict import BufferDict
from funcadapt.view.tokens import TrainableTokensLayer
from funcadapt.view.wrapper import AuxiliaryTrainingWrapper

__all__ = [
    "AuxiliaryTrainingWrapper",
    "BufferDict",
    "ModulesToSaveWrapper",
    "TrainableTokensLayer",
    "TrainableTokensWrapper",
]


class ModulesToSaveWrapper(AuxiliaryTrainingWrapper):
    """A module of which each adapter has its own copy, trained in full.

    Args:
        module_to_save: the module.
        adapter_name: the first adapter.
        tied_module: a module whose weight the copy shares: for a head that is tied to an embedding.
        values: the copy's parameters and buffers by their names in the module; those that are not there are copied.

    Example:
        >>> import torch
        >>> wrapper = ModulesToSaveWrapper(torch.nn.Linear(2, 1), "default")
        >>> wrapper
        ModulesToSaveWrapper(
          (original_module): Linear(in_features=2, out_features=1, bias=True)
          (modules_to_save): ModuleDict(
            (default): Linear(in_features=2, out_features=1, bias=True)
          )
        )
    """

    adapter_layer_names: ClassVar[tuple[str, ...]] = ("modules_to_save",)
    modules_to_save: nn.ModuleDict

    def __init__(
        self,
        module_to_save: nn.Module,
        adapter_name: str,
        tied_module: nn.Module | None = None,
        *,
        values: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(module_to_save, adapter_name, tied_module=tied_module, values=values)

    def _wrap(self, module: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        self.original_module = module
        self.modules_to_save = nn.ModuleDict()

    def _field(self) -> str:
        return "modules_to_save"

    def _get_available_adapters(self) -> set[str]:
        return set(self.modules_to_save.keys())

    def copy_of(self, name: str) -> nn.Module:
        """An adapter's copy of the module."""
        return self.modules_to_save[name]

    def _run(self, names: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        return (self.copy_of(names[0]) if names else self.original_module)(*args, **kwargs)

    def _attribute(self, name: str) -> Any:
        active = self._acting()
        return getattr(self.copy_of(active[0]) if active else self.original_module, name)

    def update(
        self,
        adapter_name: str,
        tied_module: nn.Module | None = None,
        *,
        values: Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Give an adapter its copy of the module, and freeze the original.

        Args:
            adapter_name: the adapter.
            tied_module: a module whose weight the copy shares.
            values: its parameters and buffers by their names in the module; by default those of the original.
            **kwargs: nothing, for what PEFT passes.

        Raises:
            ValueError: if the module lacks one of the names.
        """
        self._adapters.add(adapter_name)
        if adapter_name not in self.modules_to_save or values is not None:
            made = copy.deepcopy(self.original_module) if tied_module is None else _tied_linear(tied_module)
            for name, value in (values or {}).items():
                _set_tensor(made, name, value)
            self.modules_to_save[adapter_name] = made
        self.original_module.requires_grad_(False)
        if adapter_name == self._active_adapter:
            self._require_grad(adapter_name, True)

    def _require_grad(self, name: str, requires_grad: bool) -> None:
        for parameter in self.copy_of(name).parameters():
            if parameter.is_floating_point() or parameter.is_complex():
                parameter.requires_grad_(requires_grad)

    def _freeze_all_but(self, names: list[str], inference_mode: bool) -> None:
        for name in self.active_adapters:
            if name in self.modules_to_save:
                self._require_grad(name, False)
        for name in names:
            self._require_grad(name, not inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the copies on or off, and with them their gradients."""
        super().enable_adapters(enabled)
        for name in self.active_adapters if enabled else self.modules_to_save:
            self._require_grad(name, enabled)

    def _drop(self, adapter_name: str) -> None:
        del self.modules_to_save[adapter_name]

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Train, or freeze, the copies of some adapters."""
        for name in {adapter_names} if isinstance(adapter_names, str) else set(adapter_names):
            if name in self.modules_to_save:
                self._require_grad(name, requires_grad)

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """The copy's keys: those of the module itself -> those below `modules_to_save`."""
        if adapter_name not in self._adapters:
            return {}
        held = self.modules_to_save[adapter_name].state_dict()
        before = f"{self.kept_as}." if self.kept_as else ""
        return {before + key: f"modules_to_save.{adapter_name}.{key}" for key in held}

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The active copy, merging or not; the original if none is active.

        Args:
            merge: whether adapters in the copy itself are merged.
            safe_merge: whether to check that what they make is finite.
            adapter_names: which of them.

        Returns:
            The module.
        """
        names = [name for name in self.active_adapters if name in self.modules_to_save]
        module: Any = self.modules_to_save[names[0]] if names else self.original_module
        if hasattr(module, "base_layer"):
            if merge:
                module.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            module = module.get_base_layer()
        return module


def _tied_linear(module: nn.Module) -> nn.Linear:
    """A head that shares its weight with an embedding."""
    weight: Any = module.weight
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    made.weight = weight
    return made


def _set_tensor(module: nn.Module, name: str, value: Tensor) -> None:
    """Put a tensor in the place of a parameter or buffer, without a copy."""
    path, _, short = name.rpartition(".")
    owner = module.get_submodule(path)
    if short in owner._parameters:
        old = owner._parameters[short]
        kept = old is None or old.requires_grad
        owner._parameters[short] = nn.Parameter(value, requires_grad=kept and value.is_floating_point())
    elif short in owner._buffers:
        owner._buffers[short] = value
    else:
        raise ValueError(f"modules_to_save: {type(module).__name__} has no parameter or buffer {name!r}.")


class TokensHolder(AuxiliaryTrainingWrapper):
    """What has trained rows: a wrapper of the layer that holds them, or that layer itself.

    Attributes:
        token_adapter: the layer.
    """

    token_adapter: TrainableTokensLayer

    @property
    def is_tied(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the rows are those of another layer."""
        return self.token_adapter.tied_adapter is not None

    @property
    def original_module(self) -> nn.Module:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The module that is wrapped. Not a submodule: its place is in the token adapter."""
        return self.token_adapter.base_layer

    def rows_key(self, adapter_name: str) -> str:
        """The key of an adapter's rows in the state dict of this module."""
        return f"token_adapter.{TOKENS}.{adapter_name}"

    def _field(self) -> str:
        return "trainable_token_indices"

    def _run(self, names: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        return self.token_adapter.forward_adapters(args[0], names, *args[1:], **kwargs)

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """The rows; a tied head writes them only as a method's own adapter, as in PEFT."""
        held = self.token_adapter.trainable_tokens_delta
        if (self.is_tied and not self.kept_as) or adapter_name not in held:
            return {}
        return {self.kept_as or f"token_adapter.{TOKENS}": self.rows_key(adapter_name)}

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The embedding, with the rows in it or without.

        Args:
            merge: whether the rows are written into it.
            safe_merge: whether to check that they are finite.
            adapter_names: of which adapters; by default of the active ones.

        Returns:
            The embedding.
        """
        if merge:
            self.token_adapter.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.token_adapter.get_base_layer()


class TrainableTokensWrapper(TokensHolder):
    """An embedding of which some rows are trained, or a head that is tied to one.

    Args:
        module_to_save: the embedding, or the head.
        adapter_name: the first adapter.
        token_indices: its rows.
        tied_adapter: the layer whose rows it shares.
        values: the rows' values, `{"trainable_tokens_delta": (tokens, width)}`; by default those of the embedding.

    Example:
        >>> import torch
        >>> TrainableTokensWrapper(torch.nn.Embedding(4, 2), "default", [1])
        TrainableTokensWrapper(
          (original_module): None
          (token_adapter): TrainableTokensLayer(
            (base_layer): Embedding(4, 2)
            (trainable_tokens_delta): ParameterDict(  (default): Parameter containing: [torch.FloatTensor of size 1x2])
            (trainable_tokens_original): BufferDict(  (default): Buffer containing: [torch.FloatTensor of size 1x2])
          )
        )
    """

    adapter_layer_names: ClassVar[tuple[str, ...]] = (f"token_adapter.{TOKENS}",)
    other_param_names: ClassVar[tuple[str, ...]] = (
        "token_adapter.token_indices",
        "token_adapter.trainable_tokens_original",
    )
    _several: ClassVar[bool] = True  # of disjoint rows

    def __init__(
        self,
        module_to_save: nn.Module,
        adapter_name: str,
        token_indices: Sequence[int],
        tied_adapter: TrainableTokensLayer | None = None,
        *,
        values: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(
            module_to_save, adapter_name, token_indices=token_indices, tied_adapter=tied_adapter, values=values
        )

    def _wrap(self, module: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        self._modules["original_module"] = None  # it prints as in PEFT; the property below finds the module
        self.token_adapter = TrainableTokensLayer(module, adapter_name, **kwargs)
        self._adapters.add(adapter_name)

    def _get_available_adapters(self) -> set[str]:
        return self.token_adapter._get_available_adapters()

    def _attribute(self, name: str) -> Any:
        active = self._acting()
        # models read the weight of an embedding, to tie it or for its dtype
        if name == "weight" and active and not self.token_adapter.merged:
            return self.token_adapter.get_merged_weights(active)
        return getattr(self.original_module, name)

    def update(
        self,
        adapter_name: str,
        *,
        token_indices: Sequence[int] = (),
        tied_adapter: TrainableTokensLayer | None = None,
        values: Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Give an adapter its rows.

        Args:
            adapter_name: the adapter.
            token_indices: the rows.
            tied_adapter: the layer whose rows this one shares; it was given to the constructor.
            values: their values; by default those of the embedding.
            **kwargs: nothing, for what PEFT passes.
        """
        if adapter_name not in self._adapters:
            self.token_adapter.update_layer(adapter_name, token_indices=token_indices, values=values)
        self._adapters.add(adapter_name)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the rows on or off, and with them their gradients."""
        super().enable_adapters(enabled)
        self.token_adapter.enable_adapters(enabled)

    def _freeze_all_but(self, names: list[str], inference_mode: bool) -> None:
        self.token_adapter.set_adapter(names, inference_mode=inference_mode)

    def _drop(self, adapter_name: str) -> None:
        self.token_adapter.delete_adapter(adapter_name)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Train, or freeze, the rows of some adapters."""
        self.token_adapter.set_requires_grad(adapter_names, requires_grad)
