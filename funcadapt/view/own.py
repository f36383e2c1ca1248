"""What holds the adapters of methods that have no layers: of whole modules, and of rows of embeddings.

PEFT's module layout and names, where `LNTuningConfig` or `TrainableTokensConfig` says what is trained:

    LNTuningLayer:        base_layer, ln_tuning_layers.<adapter>
    TrainableTokensLayer: base_layer, trainable_tokens_delta.<adapter>

To the view they are auxiliary wrappers like those of `modules_to_save` and `trainable_token_indices`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from funcadapt.binding import TOKENS
from funcadapt.method import View
from funcadapt.view.auxiliary import ModulesToSaveWrapper, TokensHolder
from funcadapt.view.switches import TunerLayer
from funcadapt.view.tokens import TrainableTokensLayer
from funcadapt.view.wrapper import AuxiliaryTrainingWrapper


class OwnModule(ModulesToSaveWrapper, TunerLayer):
    """A module of which each adapter has its own copy. There is a subclass for each method, see `classes.own_class`.

    While an adapter is merged, its copy and the module have changed places, as in PEFT; `original_module` and `copy_of`
    find them.
    """

    view: ClassVar[View]
    _several: ClassVar[bool] = True  # they can be set, and not called
    base_layer: nn.Module
    merged_adapters: list[str]  # pyright: ignore[reportIncompatibleVariableOverride]

    def _wrap(self, module: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        self.base_layer = module
        self._modules[self.kept_as] = nn.ModuleDict()
        self.merged_adapters = []  # pyright: ignore[reportIncompatibleVariableOverride]

    def __repr__(self) -> str:
        """PEFT's form, "ln_tuning.LNTuningLayer(...)"."""
        return self.view.label + super().__repr__()

    @property
    def modules_to_save(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The dict of the copies."""
        return self._modules[self.kept_as]

    @property
    def original_module(self) -> nn.Module:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The module that is wrapped, wherever it is."""
        return self.modules_to_save[self.merged_adapters[0]] if self.merged_adapters else self.base_layer

    def copy_of(self, name: str) -> nn.Module:
        """An adapter's copy of the module, wherever it is."""
        return self.base_layer if name in self.merged_adapters else self.modules_to_save[name]

    def _field(self) -> str:
        return "target_modules"

    def _acting(self) -> list[str]:
        return list(self.merged_adapters) if self.merged and not self._disable_adapters else super()._acting()

    def _run(self, names: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        if len(names) > 1:
            raise ValueError(
                f"Trying to run forward with {len(names)} active adapters, but {self.view.name} does not allow "
                f"inference with more than one adapter at a time: {', '.join(names)}. Set one of them."
            )
        if self.merged and self._disable_adapters:
            self.unmerge()
        return super()._run(names, *args, **kwargs)

    def chosen(self, names: Sequence[str]) -> list[str]:
        """Those of some adapters that are here."""
        return [name for name in names if name in self._adapters]

    def delete_adapter(self, adapter_name: str, new_active_adapters: Sequence[str] | None = None) -> None:
        """Drop an adapter; if it was the only active one, the first of the others is active."""
        if adapter_name in self.merged_adapters:
            self.unmerge()
        if adapter_name in self._adapters:
            self._adapters.discard(adapter_name)
            self._drop(adapter_name)
        self._leave(adapter_name)

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Put an adapter's copy in the place of the module.

        Args:
            safe_merge: nothing can go wrong.
            adapter_names: the adapter; by default the active one.

        Raises:
            ValueError: if there are several.
        """
        wanted = self.active_adapters if adapter_names is None else adapter_names
        names = [name for name in wanted if name in self._adapters and name not in self.merged_adapters]
        if not names:
            return
        if len(names) > 1:
            raise ValueError(
                f"Trying to merge {len(names)} adapters, but {self.view.name} does not allow merging more than one "
                f"adapter at a time: {', '.join(names)}."
            )
        if self.merged:
            warnings.warn(f"Already merged with {set(self.merged_adapters)}. Unmerging first.", stacklevel=2)
            self.unmerge()
        self._swap(names[0])
        self.merged_adapters.append(names[0])

    def unmerge(self) -> None:
        """Put the module back into its place."""
        if not self.merged_adapters:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._swap(self.merged_adapters.pop())

    def _swap(self, name: str) -> None:
        copies = self.modules_to_save
        self.base_layer, copies[name] = copies[name], self.base_layer

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """The copy's keys."""
        if adapter_name not in self._adapters:
            return {}
        place = "base_layer" if adapter_name in self.merged_adapters else f"{self.kept_as}.{adapter_name}"
        return {f"{self.kept_as}.{key}": f"{place}.{key}" for key in self.copy_of(adapter_name).state_dict()}

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The active copy if merging, else the module as it was.

        Args:
            merge: whether to merge.
            safe_merge: nothing can go wrong.
            adapter_names: which adapter is merged; by default the active one.

        Returns:
            The module.
        """
        if merge:
            self.merge(safe_merge, adapter_names)
        return self.base_layer if merge else self.original_module


class OwnTokens(TrainableTokensLayer, TokensHolder):
    """An embedding of which some rows are trained, or a head that is tied to one, without a wrapper around the layer.

    Args:
        base_layer: the embedding, or the head.
        adapter_name: the first adapter.
        token_indices: its rows.
        tied_adapter: the layer whose rows it shares.
        values: the rows' values, `{"trainable_tokens_delta": (tokens, width)}`; by default those of the base.

    Example:
        >>> import torch
        >>> list(OwnTokens(torch.nn.Embedding(4, 2), "default", [1]).state_dict())
        ['base_layer.weight', 'trainable_tokens_delta.default']
    """

    merged_adapters: list[str]  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        token_indices: Sequence[int] = (),
        tied_adapter: TrainableTokensLayer | None = None,
        *,
        values: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(base_layer, adapter_name, token_indices, tied_adapter, values=values)
        self.training = base_layer.training

    def _get_name(self) -> str:
        return "TrainableTokensLayer"

    @property
    def token_adapter(self) -> TrainableTokensLayer:  # pyright: ignore[reportIncompatibleVariableOverride]
        """This layer."""
        return self

    @property
    def weight(self) -> Tensor:
        """The weight with the rows that act now: models read it, to tie it or to multiply with it."""
        active = [] if self.merged else self._acting()
        return self.get_merged_weights(active) if active else self._base_weight

    def rows_key(self, adapter_name: str) -> str:
        """The key of an adapter's rows in the state dict of this module."""
        return f"{TOKENS}.{adapter_name}"

    def _field(self) -> str:
        return "target_modules"

    def _acting(self) -> list[str]:
        return [] if self._disable_adapters else self.chosen(self.active_adapters)

    def _attribute(self, name: str) -> Any:
        return getattr(self.base_layer, name)

    def chosen(self, names: Sequence[str]) -> list[str]:
        """Those of some adapters that are here."""
        return [name for name in names if name in self.trainable_tokens_delta]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The layer with the rows of the active adapters, or of those that `adapter_names` says for each row of x."""
        return AuxiliaryTrainingWrapper.forward(self, x, *args, **kwargs)

    def update(
        self,
        adapter_name: str,
        *,
        token_indices: Sequence[int] = (),
        values: Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Give an adapter its rows, unless this layer has those of another one.

        Args:
            adapter_name: the adapter.
            token_indices: the rows.
            values: their values; by default those of the base.
            **kwargs: what the other wrappers need.
        """
        if adapter_name not in self.trainable_tokens_delta:
            self.update_layer(adapter_name, token_indices=token_indices, values=values)

    def delete_adapter(self, adapter_name: str, new_active_adapters: Sequence[str] | None = None) -> None:
        """Drop an adapter; if it was the only active one, the first of the others is active."""
        super().delete_adapter(adapter_name)
