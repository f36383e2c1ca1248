"""The part of a tuner that merges: into the base weights, out of them again, and for good."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from funcadapt.view import merging

DUMMY_MODEL_CONFIG = {"model_type": "custom"}
_EMBEDDINGS = ("embed_tokens", "lm_head")


class MergingMixin:
    """Merging, for a class that has `model` and `targeted_module_names`."""

    if TYPE_CHECKING:
        model: nn.Module
        targeted_module_names: list[str]

    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Write adapters into the base weights, and keep them.

        Args:
            adapter_names: which; None for the active ones.
            safe_merge: whether to check that the result is finite, before anything is written.
        """
        self._check_merge_allowed()
        merging.merge(self.model, adapter_names, safe_merge=safe_merge)

    def unmerge_adapter(self) -> None:
        """Take the merged adapters out of the base weights again."""
        merging.unmerge(self.model)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: Sequence[str] | None = None
    ) -> nn.Module:
        """Write adapters into the base weights and remove every trace of them.

        Args:
            progressbar: accepted, nothing is shown.
            safe_merge: whether to check that the result is finite, before anything is written.
            adapter_names: which; None for the active ones.

        Returns:
            The model.
        """
        self._check_merge_allowed()
        model = self._unload(merge_first=True, safe_merge=safe_merge, names=adapter_names)
        _settle_ties(model)
        return model

    def unload(self) -> nn.Module:
        """The model without its adapters."""
        return self._unload()

    def _unload(self, **options: Any) -> nn.Module:
        model = merging.unload(self.model, **options)
        if "peft_config" in model.__dict__:
            del model.peft_config
        return model

    def _check_merge_allowed(self) -> None:
        tied = [name for name in self.targeted_module_names if name.rpartition(".")[2] in _EMBEDDINGS]
        if tied and self.get_model_config(self.model).get("tie_word_embeddings"):
            warnings.warn(
                f"Model with `tie_word_embeddings=True` and the tied_target_modules={tied} are part of the adapter. "
                "This can lead to complications. You can opt to merge the adapter after cloning the weights (to untie "
                "the embeddings), by loading the model with `tie_word_embeddings=False`.",
                stacklevel=3,
            )

    @staticmethod
    def get_model_config(model: nn.Module) -> Any:
        """A model's config as a dict.

        Args:
            model: the model.

        Returns:
            The dict; `{"model_type": "custom"}` if it has no config.
        """
        config: Any = getattr(model, "config", DUMMY_MODEL_CONFIG)
        if hasattr(config, "to_dict"):
            return config.to_dict()
        return dataclasses.asdict(config) if dataclasses.is_dataclass(config) else config  # pyright: ignore


def _settle_ties(model: Any) -> None:
    """An embedding and a head that merging made different are saved and loaded as two; PEFT's merge changes both."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "tie_word_embeddings", None) is not True or not hasattr(model, "get_output_embeddings"):
        return
    weights = [
        getattr(module, "weight", None) for module in (model.get_input_embeddings(), model.get_output_embeddings())
    ]
    if all(weight is not None for weight in weights) and weights[0] is not weights[1]:
        config.tie_word_embeddings = False
        warnings.warn(
            "Input and output embeddings are no longer tied after merging. Setting `tie_word_embeddings=False` in the "
            "model config.",
            stacklevel=4,
        )
