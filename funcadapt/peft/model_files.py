"""Files of a `PeftModel`: folders of adapters, PEFT's two files each, and the Hub."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from torch import Tensor, nn

from funcadapt.peft.around import AroundTuner
from funcadapt.peft.card import write_model_card
from funcadapt.peft.config import PeftConfig
from funcadapt.peft.functional import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from funcadapt.peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from funcadapt.peft.settling import as_held
from funcadapt.peft.subtraction import doubled_config, subtract_initial
from funcadapt.peft.utils.weights import write_adapter

_HUB = (
    "subfolder",
    "revision",
    "cache_dir",
    "token",
    "use_auth_token",
    "local_files_only",
    "force_download",
    "repo_type",
)
_MUTATING = {"pissa": "PiSSA", "corda": "CorDA", "olora": "OLoRA"}


class FilesMixin(AroundTuner):
    """Reading and writing adapters, for classes that have `add_adapter`."""

    if TYPE_CHECKING:
        add_adapter: Any
        set_requires_grad: Any
        delete_adapter: Any

    # -- writing ----------------------------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: bool | Literal["auto"] = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write adapters as PEFT does: "default" into the folder, every other one into a folder of its name there.

        Args:
            save_directory: the folder, made if need be.
            safe_serialization: must be true: funcadapt writes safetensors only.
            selected_adapters: which adapters; None for all.
            save_embedding_layers: whether to write the embeddings, too; "auto" if they are targets, or were resized.
            is_main_process: whether to write at all. Other processes only help to gather what is sharded.
            path_initial_model_for_weight_conversion: the folder of the same adapter before training, whose init took
                itself out of the base weights (PiSSA, OLoRA). What is written is a LoRA of twice the rank for the
                original base weights.
            **kwargs: `state_dict`, if not the model's own.

        Raises:
            ValueError: if the path is a file, an adapter is unknown, or `safe_serialization` is false.
        """
        if os.path.isfile(save_directory):
            raise ValueError(f"Provided path ({save_directory}) should be a directory, not a file")
        if not safe_serialization:
            raise ValueError(
                "safe_serialization=False asks for a pickle, which funcadapt neither writes nor reads: whoever opens "
                "one runs its code. Leave it out; PEFT reads safetensors files as well."
            )
        names = list(self.peft_config) if selected_adapters is None else list(selected_adapters)
        if not set(names) <= self.peft_config.keys():
            raise ValueError(
                "You passed an invalid `selected_adapters` arguments, current supported adapter names are "
                f"{list(self.peft_config)} - got {names}."
            )
        if is_main_process:
            os.makedirs(save_directory, exist_ok=True)
            self.create_or_update_model_card(save_directory)
        for name in names:
            tensors: dict[str, Tensor] = get_peft_model_state_dict(
                self,
                state_dict=kwargs.get("state_dict"),
                adapter_name=name,
                save_embedding_layers=save_embedding_layers,
            )
            if is_main_process:
                folder = Path(save_directory) if name == "default" else Path(save_directory, name)
                self._write(folder, name, tensors, path_initial_model_for_weight_conversion)

    def _write(
        self, folder: Path, name: str, tensors: dict[str, Tensor], initial: str | os.PathLike[str] | None
    ) -> None:
        base: nn.Module = self.base_model.model
        config: Any = self.peft_config[name]
        if config.base_model_name_or_path is None:
            config.base_model_name_or_path = base.__dict__.get("name_or_path", None) or None
        written: Any = copy.deepcopy(as_held(base, config, name))
        if initial is not None:
            tensors = subtract_initial(tensors, load_peft_weights(os.fspath(initial), device="cpu"), written)
            written = doubled_config(written)
        written.inference_mode = True
        mapping = None
        if written.task_type is None:
            mapping = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
        write_adapter(folder, tensors, written, mapping)

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str]) -> None:
        """Write the folder's README.md, the model card of the Hub, or complete the one that is there.

        Args:
            output_dir: the folder.
        """
        write_model_card(self, output_dir)

    # -- reading ----------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> Self:
        """Put a saved adapter into a model.

        Args:
            model: the model; it is changed in place.
            model_id: the adapter's folder, or its repository on the Hub.
            adapter_name: the name that it gets.
            is_trainable: whether it is trained further; otherwise it is frozen, and the model in eval mode.
            config: its config, if not the one in the folder.
            autocast_adapter_dtype: whether its weights in half precision (or less) become float32.
            ephemeral_gpu_offload: accepted; nothing is offloaded here.
            low_cpu_mem_usage: whether no weights are made before those in the file.
            key_mapping: regular expressions by which keys of the file are renamed.
            **kwargs: `subfolder`, and what `hf_hub_download` takes.

        Returns:
            The `PeftModel` of the config's task.

        Raises:
            ValueError: if `config` is no config, or there is none in the folder.
        """
        hub = _hub_arguments(kwargs)
        if config is None:
            config = PeftConfig.from_pretrained(model_id, **hub)
        elif not isinstance(config, PeftConfig):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"The input config must be a PeftConfig, got {type(config)}")
        assert config is not None
        config.inference_mode = not is_trainable
        if key_mapping is None:
            key_mapping = getattr(model, "_checkpoint_conversion_mapping", None) or {}
        options = {"autocast_adapter_dtype": autocast_adapter_dtype, "low_cpu_mem_usage": low_cpu_mem_usage}
        wrapped: Any = cls._make(model, config, adapter_name, options)
        result = wrapped.load_adapter(
            model_id, adapter_name, is_trainable=is_trainable, key_mapping=key_mapping, **options, **kwargs
        )
        if result.missing_keys:
            message = f"Found missing adapter keys while loading the checkpoint: {result.missing_keys}."
            prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type or "")
            if prefix and adapter_name in prefix:
                message = (
                    f"Adapter name '{adapter_name}' should not be contained in the prefix '{prefix}'. This could be "
                    f"the potential reason for missing adapter keys. {message}"
                )
            warnings.warn(message, stacklevel=2)
        return wrapped

    @classmethod
    def _make(cls, model: nn.Module, config: PeftConfig, adapter_name: str, options: dict[str, Any]) -> Any:
        from funcadapt.peft.tasks import MODEL_TYPE_TO_PEFT_MODEL_MAPPING

        made: Any = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type or "", cls)
        return made(model, config, adapter_name, **options)

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Read a saved adapter into the model. A new one does not become active.

        If the model has an adapter of that name, its weights are replaced. If reading fails, the model is what it was;
        PEFT's keeps the new adapter, with random weights.

        Args:
            model_id: the adapter's folder, or its repository on the Hub.
            adapter_name: the name that it gets.
            is_trainable: whether it is trained further; otherwise it is frozen, and the model in eval mode.
            torch_device: the device to which the file is read; None for the accelerator, if there is one.
            autocast_adapter_dtype: whether its weights in half precision (or less) become float32.
            ephemeral_gpu_offload: accepted; nothing is offloaded here.
            low_cpu_mem_usage: whether no weights are made before those in the file.
            key_mapping: regular expressions by which keys of the file are renamed.
            **kwargs: `subfolder`, `ignore_mismatched_sizes`, and what `hf_hub_download` takes.

        Returns:
            The missing keys of this adapter, and the unexpected ones of the file.
        """
        hub = _hub_arguments(kwargs)
        added = adapter_name not in self.peft_config
        if added:
            config: Any = PeftConfig.from_pretrained(model_id, **hub)
            self._check_new_adapter_config(config, is_trainable=is_trainable)
            config.inference_mode = not is_trainable
            self.add_adapter(
                adapter_name,
                config,
                low_cpu_mem_usage=low_cpu_mem_usage,
                autocast_adapter_dtype=autocast_adapter_dtype,
            )
        try:
            tensors = load_peft_weights(os.fspath(model_id), device=torch_device, key_mapping=key_mapping, **hub)
            result = set_peft_model_state_dict(
                self,
                tensors,
                adapter_name=adapter_name,
                ignore_mismatched_sizes=kwargs.get("ignore_mismatched_sizes", False),
                low_cpu_mem_usage=low_cpu_mem_usage,
            )
        except BaseException:
            if added:
                self.delete_adapter(adapter_name)
            raise
        if added and is_trainable:
            self.base_model.set_requires_grad(adapter_name)
        prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(self.peft_config[adapter_name].peft_type or "", "")
        result.missing_keys[:] = [key for key in result.missing_keys if prefix in key and adapter_name in key]
        self.base_model._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if not is_trainable:
            self.eval()
        return result

    def _check_new_adapter_config(self, peft_config: Any, is_trainable: bool) -> None:
        """Warn of an init that changed the base weights, in which no other adapter then is right."""
        inits = [getattr(config, "init_lora_weights", None) for config in (peft_config, *self.peft_config.values())]
        found = next((init for init in _MUTATING if init in inits), None) if len(inits) > 1 else None
        if found is not None:
            name = _MUTATING[found]
            warnings.warn(
                f"{name} changes the base weights of the model and should thus not be used with other adapters. "
                f"Consider converting the {name} adapter into a normal LoRA adapter, with "
                "`save_pretrained(..., path_initial_model_for_weight_conversion=...)`.",
                stacklevel=4,
            )

    @classmethod
    def _split_kwargs(cls, kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        hub = _hub_arguments(kwargs)
        return hub, {name: value for name, value in kwargs.items() if name not in hub}


def _hub_arguments(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: kwargs[name] for name in _HUB if kwargs.get(name) is not None}
