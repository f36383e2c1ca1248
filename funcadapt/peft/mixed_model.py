"""`PeftMixedModel`: adapters of several types in one model, for inference."""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from torch import nn

from funcadapt.peft.checks import check_injectable, input_requires_grad, is_checkpointing
from funcadapt.peft.config import PeftConfig
from funcadapt.peft.model_files import FilesMixin
from funcadapt.peft.tuner import BaseTuner
from funcadapt.peft.tuner_merging import DUMMY_MODEL_CONFIG

COMPATIBLE_TUNER_TYPES = ("LORA", "LOHA", "LOKR", "ADALORA", "OFT", "SHIRA")


class MixedModel(BaseTuner):
    """A tuner whose adapters may be of different types, see BaseTuner. `get_peft_model(..., mixed=True)` makes one."""

    def _check_new_adapter_config(self, config: PeftConfig) -> None:
        if config.peft_type not in COMPATIBLE_TUNER_TYPES:
            raise TypeError(
                f"{type(self).__name__} only supports {COMPATIBLE_TUNER_TYPES} configs, but got {type(config)}."
            )
        super()._check_new_adapter_config(config)


def _check_compatible(config: Any) -> None:
    check_injectable(config)
    if config.peft_type not in COMPATIBLE_TUNER_TYPES:
        raise ValueError(
            f"The provided `peft_type` '{config.peft_type.value}' is not compatible with the `PeftMixedModel`. "
            f"Compatible types are: {COMPATIBLE_TUNER_TYPES}"
        )


class PeftMixedModel(FilesMixin):
    """A model with adapters of several types, of which several can be active at once. It can load, but not save.

    Args:
        model: the model; it is changed in place.
        peft_config: the first adapter's config.
        adapter_name: its name.

    Attributes:
        base_model: the tuner, which holds the model.
        config: the model's config.
        modules_to_save: the names of the modules that are trained in full, or None.
    """

    base_model: MixedModel

    def __init__(self, model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default") -> None:
        super().__init__()
        _check_compatible(peft_config)
        if is_checkpointing(model):
            input_requires_grad(model)
        self.base_model = MixedModel(model, {adapter_name: peft_config}, adapter_name)
        self.config: Any = getattr(model, "config", DUMMY_MODEL_CONFIG)
        if hasattr(self.config, "pretraining_tp"):
            self.config.pretraining_tp = 1

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapters as they were set."""
        return self.base_model.active_adapter

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output."""
        return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's `generate`."""
        return self.base_model.generate(*args, **kwargs)

    @contextmanager
    def disable_adapter(self) -> Generator[None, None, None]:
        """The model is the base model, for the duration of a block.

        Yields:
            Nothing.
        """
        try:
            self.base_model.disable_adapter_layers()
            yield
        finally:
            self.base_model.enable_adapter_layers()

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Inject one more adapter, of any compatible type. It becomes neither active nor trainable.

        Args:
            adapter_name: its name.
            peft_config: its config.
            low_cpu_mem_usage: whether it is made on the meta device, for weights that are loaded next.
            autocast_adapter_dtype: whether its weights in half precision (or less) become float32.

        Raises:
            ValueError: if the name is taken, or the type cannot be mixed.
        """
        if adapter_name in self.peft_config:
            raise ValueError(f"Adapter with name '{adapter_name}' already exists.")
        _check_compatible(peft_config)
        self.base_model._inject_new(adapter_name, peft_config, low_cpu_mem_usage)
        self.base_model._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make adapters the active ones, and the only trainable ones.

        Args:
            adapter_name: a name, or several.
            inference_mode: whether they stay frozen.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self.base_model.set_adapter(names, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Forget adapters.

        Args:
            adapter_name: a name, or several.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self.base_model._check_known(names)
        for name in names:
            self.base_model.delete_adapter(name)

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Write adapters into the base weights and remove every trace of them, see BaseTuner."""
        return self.base_model.merge_and_unload(*args, **kwargs)

    def unload(self) -> nn.Module:
        """The model without its adapters."""
        return self.base_model.unload()

    def get_layer_status(self) -> NoReturn:
        """Not supported, as in PEFT.

        Raises:
            TypeError: always.
        """
        raise TypeError(f"get_layer_status is not supported for {type(self).__name__}.")

    def get_model_status(self) -> NoReturn:
        """Not supported, as in PEFT.

        Raises:
            TypeError: always.
        """
        raise TypeError(f"get_model_status is not supported for {type(self).__name__}.")

    @classmethod
    def _make(cls, model: nn.Module, config: PeftConfig, adapter_name: str, options: dict[str, Any]) -> Any:
        return cls(model, config, adapter_name)

    def load_adapter(self, model_id: str | os.PathLike[str], adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """Read an adapter into the model, see `PeftModel.load_adapter`. The active adapters stay what they are.

        Args:
            model_id: the folder, or the repository on the Hub.
            adapter_name: the name that it gets.
            *args: as of `PeftModel.load_adapter`.
            **kwargs: as of `PeftModel.load_adapter`.

        Returns:
            The missing and unexpected keys.
        """
        result = super().load_adapter(model_id, adapter_name, *args, **kwargs)
        self.set_adapter(self.active_adapters)
        return result

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str]) -> NoReturn:
        """Not supported, as in PEFT.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(f"Model card creation is not supported for {type(self).__name__} (yet).")

    def save_pretrained(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not supported, as in PEFT.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(f"Saving is not supported for {type(self).__name__} (yet).")
