"""`PeftModel`: a model with adapters in it, PEFT's way. `get_peft_model` makes one."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from funcadapt.peft.around import AroundTuner
from funcadapt.peft.arrow_model import refresh
from funcadapt.peft.checks import (
    check_injectable,
    input_requires_grad,
    is_checkpointing,
    warn_of_prefix,
)
from funcadapt.peft.config import PeftConfig
from funcadapt.peft.getting import get_peft_model as get_peft_model
from funcadapt.peft.hub import HubMixin
from funcadapt.peft.invoking import INPUT, with_offsets
from funcadapt.peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from funcadapt.peft.model_files import FilesMixin
from funcadapt.peft.status import (
    TunerLayerStatus,
    TunerModelStatus,
    get_layer_status,
    get_model_status,
    status_layers,
)
from funcadapt.peft.tuner import BaseTuner


class PeftModel(FilesMixin, HubMixin):
    """A model with adapters in it.

    The model itself is `base_model.model`; it is changed in place, and attributes that this class does not have are
    its own. One adapter is active at a time; `base_model.set_adapter` takes several.

    Args:
        model: the model.
        peft_config: the first adapter's config.
        adapter_name: its name.
        autocast_adapter_dtype: whether adapter weights in half precision (or less) become float32.
        low_cpu_mem_usage: whether the adapter is made on the meta device, for weights that are loaded next.

    Attributes:
        base_model: the tuner, a `LoraModel` and the like, which holds the model.
        active_adapter: the active adapter's name.
        peft_type: the type of all of its adapters.
    """

    base_model: BaseTuner

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        super().__init__()
        check_injectable(peft_config)
        self.active_adapter: Any = adapter_name
        self.peft_type = peft_config.peft_type
        self.special_peft_forward_args = {"adapter_names", "alora_offsets"}
        self._is_prompt_learning = False
        tuner: type[BaseTuner] = PEFT_TYPE_TO_TUNER_MAPPING[peft_config.peft_type or ""]
        self.base_model = tuner(model, {adapter_name: peft_config}, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
        self.base_model._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if is_checkpointing(model):
            self.prepare_model_for_gradient_checkpointing(model)
        # models that simulate tensor parallelism would compute slices of the base weight
        if hasattr(getattr(model, "config", None), "pretraining_tp"):
            model.config.pretraining_tp = 1  # pyright: ignore
        self._adapters_disabled = False

    # -- what there is ----------------------------------------------------------------------------------

    @AroundTuner.peft_config.setter
    def peft_config(self, value: dict[str, PeftConfig]) -> None:
        """Replace the configs."""
        self.base_model.peft_config = value

    @property
    def active_peft_config(self) -> PeftConfig:
        """The active adapter's config."""
        return self.peft_config[self.active_adapter]

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether adapters act: they are not disabled, or none is active."""
        return not self._adapters_disabled or not self.active_adapters

    @property
    def base_model_torch_dtype(self) -> Any:
        """The model's dtype, None if it has no such attribute."""
        return getattr(self.base_model, "dtype", None)

    def get_base_model(self) -> nn.Module:
        """The model that the adapters are in."""
        return self.base_model.model

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """The status of each adapter layer."""
        return get_layer_status(self)

    def get_model_status(self) -> TunerModelStatus:
        """The status of the whole model."""
        return get_model_status(self)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether a LoRA can stand for the adapter.

        Args:
            adapter_name: as in PEFT; all layers are asked.

        Returns:
            Whether every layer says so.
        """
        return self.base_model.supports_lora_conversion(adapter_name)

    # -- calls ------------------------------------------------------------------------------------------

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Generator[None, None, None]:
        if not self.has_active_enabled_adapter:
            yield
            return
        refresh(self, self.active_adapter)
        if INPUT in self.base_model.inputs_of(kwargs.get("adapter_names")):
            kwargs = with_offsets(self.peft_config, self.active_adapter, args, kwargs)
        with self.base_model._enable_peft_forward_hooks(*args, **kwargs):
            yield

    def _without_special(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        special = self.special_peft_forward_args | self.base_model.call_inputs
        return {name: value for name, value in kwargs.items() if name not in special}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output, of rows that may use different adapters.

        `adapter_names`, a name for every row with "__base__" for the bare model, is honoured for every method; PEFT
        ignores it for most of them without a word (its defect B10).

        Args:
            *args: the model's.
            **kwargs: the model's, and `adapter_names`.

        Returns:
            The output.
        """
        with self._enable_peft_forward_hooks(*args, **kwargs):
            return self.get_base_model()(*args, **self._without_special(kwargs))

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's `generate`; `adapter_names` as in `forward`, repeated for beams and returned sequences."""
        return self._generate(self.get_base_model(), *args, **kwargs)

    def _generate(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        settings = dict(kwargs)
        if settings.get("generation_config") is None:  # the model's own settings can ask for beams, too
            settings["generation_config"] = getattr(model, "generation_config", None)
        with self._enable_peft_forward_hooks(*args, **settings):
            return model.generate(*args, **self._without_special(kwargs))

    # -- adapters ---------------------------------------------------------------------------------------

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Inject one more adapter. It becomes neither active nor trainable.

        Args:
            adapter_name: its name.
            peft_config: its config, of the same type as the others'.
            low_cpu_mem_usage: whether it is made on the meta device, for weights that are loaded next.
            autocast_adapter_dtype: whether its weights in half precision (or less) become float32.

        Raises:
            ValueError: if the name is taken, or the type differs.
        """
        if adapter_name in self.peft_config:
            raise ValueError(f"Adapter with name '{adapter_name}' already exists.")
        check_injectable(peft_config)
        warn_of_prefix(adapter_name, peft_config)
        if peft_config.peft_type != self.peft_type:
            raise ValueError(
                "Cannot combine adapters with different peft types. "
                f"Found {self.peft_type} and {peft_config.peft_type}."
            )
        self.base_model._inject_new(adapter_name, peft_config, low_cpu_mem_usage)
        self.base_model._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Make an adapter the active one, and the only trainable one.

        Args:
            adapter_name: its name.
            inference_mode: whether it stays frozen.

        Raises:
            TypeError: if it is no name.
            ValueError: if there is none of that name.
        """
        if not isinstance(adapter_name, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"PeftModel.set_adapter takes one name, got {adapter_name!r}. To make several adapters active at once, "
                "call model.base_model.set_adapter([...])."
            )
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} not found.")
        self.active_adapter = adapter_name
        self.base_model.set_adapter(adapter_name, inference_mode=inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Freeze or unfreeze adapters.

        Args:
            adapter_names: a name, or several.
            requires_grad: whether they are trained.
        """
        self.base_model.set_requires_grad(adapter_names, requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter; the first one left becomes active if it was.

        Without any adapter the model goes on as the base model. (PEFT's then fails with a KeyError.)

        Args:
            adapter_name: its name.
        """
        self.base_model.delete_adapter(adapter_name)
        active = self.active_adapters
        if len(active) == 1:
            self.active_adapter = active[0]

    @contextmanager
    def disable_adapter(self) -> Generator[None, None, None]:
        """The model is the base model, for the duration of a block (trained biases stay).

        Yields:
            Nothing.
        """
        was_disabled = self._adapters_disabled
        enabled = {not layer.disable_adapters for _, layer in status_layers(self.base_model)}
        if len(enabled) > 1:
            warnings.warn(
                "The model contains some adapter layers that are enabled and others that are disabled. This is most "
                "likely unintentional. After exiting the disable_adapter context, all adapters will be enabled",
                stacklevel=3,
            )
        try:
            self.base_model.disable_adapter_layers()
            self._adapters_disabled = True
            yield
        finally:
            if enabled != {False}:
                self.base_model.enable_adapter_layers()
            self._adapters_disabled = was_disabled

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> None:
        """Make the embeddings' output require gradients: a checkpointed block without any would have none either.

        Args:
            model: the model.
        """
        self._prepare_model_for_gradient_checkpointing(model)

    def _prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> nn.Module:
        input_requires_grad(model)
        return model
