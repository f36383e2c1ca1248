"""`BaseTuner`: what `PeftModel.base_model` is, one class for every method; `LoraModel` and so on are generated."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

from torch import nn

from funcadapt.method import View, method_of
from funcadapt.peft.advice import advise
from funcadapt.peft.config import PeftConfig
from funcadapt.peft.lora_conversion import is_converted
from funcadapt.peft.mixing import named_rows
from funcadapt.peft.settling import settle
from funcadapt.peft.tuner_merging import MergingMixin
from funcadapt.peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from funcadapt.peft.weighting import add_weighted_adapter
from funcadapt.view import state
from funcadapt.view.classes import family, view_named
from funcadapt.view.holding import held_by, shared_containers
from funcadapt.view.inject import inject
from funcadapt.view.layer import AdapterLayer
from funcadapt.view.walking import auxiliaries, layers, view_state


class BaseTuner(MergingMixin, nn.Module):
    """A model with adapters injected in place, and what can be done with them.

    It is what `PeftModel.base_model` is, and can be used without one: `LoraModel(model, config, "default")`. Attributes
    that it does not have are the model's. All of its work is done by functions over the model
    (`funcadapt.view`), for every method alike; a method adds its own through `View.tuner` and `View.loss`.

    Args:
        model: the model; it is changed in place.
        peft_config: the config, or configs by adapter name.
        adapter_name: which of them to inject.
        low_cpu_mem_usage: whether the adapter is made on the meta device, for weights that are loaded next.
        state_dict: a checkpoint whose keys say which modules to adapt, whatever the config says.

    Attributes:
        model: the model.
        peft_config: adapter name -> config; the same dict is `model.peft_config`.
        active_adapter: the active adapter's name, or a list of names.
        targeted_module_names: the modules that adapters were injected into.
        targeted_parameter_names: the parameters that adapters were injected at.
        prefix: what the names of the method's parts begin with, e.g. "lora_".
        tuner_layer_cls: the class of its layers.
    """

    prefix: ClassVar[str] = ""
    tuner_layer_cls: ClassVar[type[AdapterLayer]] = AdapterLayer
    view: ClassVar[View | None] = None
    model: nn.Module

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | Mapping[str, PeftConfig],
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.targeted_module_names: list[str] = []
        self.targeted_parameter_names: list[str] = []
        held: dict[str, PeftConfig] | None = getattr(model, "peft_config", None)
        if held is not None:
            warnings.warn(
                "Already found a `peft_config` attribute in the model. This will lead to having multiple adapters"
                " in the model. Make sure to know what you are doing!",
                stacklevel=3,
            )
        self.peft_config: dict[str, PeftConfig] = {} if held is None else held
        new = {adapter_name: peft_config} if isinstance(peft_config, PeftConfig) else dict(peft_config)
        before = dict(self.peft_config)
        self.active_adapter: str | list[str] = adapter_name
        try:
            self.peft_config.update(new)
            self.inject_adapter(model, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage, state_dict=state_dict)
        except BaseException:  # a failed injection leaves no trace; PEFT keeps the config (its defect B17)
            self.peft_config.clear()
            self.peft_config.update(before)
            raise
        model.peft_config = self.peft_config  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]

    def __getattr__(self, name: str) -> Any:
        """The model's attributes, where this has none."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":  # not initialised yet
                raise
            return getattr(self.model, name)

    @property
    def active_adapters(self) -> list[str]:
        """The names of the active adapters."""
        return [self.active_adapter] if isinstance(self.active_adapter, str) else self.active_adapter

    # -- calls ------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output; a method's own loss is added to its `loss`, as AdaLoRA's orthogonality penalty is."""
        inputs = {name: kwargs.pop(name) for name in self.call_inputs & kwargs.keys()}
        with state.given(self.model, inputs):
            outputs = self.model(*args, **kwargs)
        loss = None if self.view is None else getattr(outputs, "loss", None)
        if loss is not None:
            assert self.view is not None
            for name in self.active_adapters:
                # PEFT looks for the one adapter in training and raises AttributeError where a loaded one is evaluated
                config = self.peft_config.get(name)
                extra = None if config is None or config.inference_mode else self.view.loss(self.model, name)
                loss = loss if extra is None else loss + extra
            if loss is not outputs.loss:
                outputs.loss = loss
        return outputs

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Generator[None, None, None]:
        """Rows use the adapters that `adapter_names` names, for the duration of a block: for every method.

        What a method needs of every call, such as Poly's `task_ids`, reaches its layers in the same way.
        """
        names: Sequence[str] | None = kwargs.pop("adapter_names", None)
        inputs = {name: kwargs.pop(name) for name in self.inputs_of(names) & kwargs.keys()}
        with state.given(self.model, inputs), self._rows(names, kwargs, inputs):
            yield

    @property
    def call_inputs(self) -> frozenset[str]:
        """The names of what the methods of the active adapters need of every call."""
        return self.inputs_of(None)

    def inputs_of(self, names: Sequence[str] | None) -> frozenset[str]:
        """The names of what the methods of adapters need of every call.

        Args:
            names: the adapters; None for the active ones.

        Returns:
            The names of the inputs.
        """
        configs = view_state(self.model).configs
        own = [method_of(configs[name]).inputs for name in names or self.active_adapters if name in configs]
        return frozenset[str]().union(*own)

    @contextmanager
    def _rows(
        self, names: Sequence[str] | None, kwargs: Mapping[str, Any], inputs: Mapping[str, Any]
    ) -> Generator[None, None, None]:
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        unknown = sorted({name for name in names if name != "__base__"} - self.peft_config.keys())
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        with named_rows(self.model, names, kwargs, inputs):
            yield

    # -- injection --------------------------------------------------------------------------------------

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: Mapping[str, Any] | None = None,
    ) -> None:
        """Inject the adapter whose config is in `peft_config`.

        Args:
            model: the model, as in PEFT; it is always the tuner's own.
            adapter_name: the adapter's name.
            autocast_adapter_dtype: as in PEFT, of no effect here; see `PeftModel`.
            low_cpu_mem_usage: whether it is made on the meta device.
            state_dict: a checkpoint whose keys say which modules to adapt.
        """
        config = self.peft_config[adapter_name]
        self._check_new_adapter_config(config)
        # adapters that were trained on other layers of the same architecture: its experts in transformers 4
        convert_peft_config_for_transformers(config, self.model)
        resolved = inject(
            self.model,
            config.to_funcadapt(),
            adapter_name,
            state_dict=state_dict,
            low_cpu_mem_usage=low_cpu_mem_usage,
            activate=adapter_name in self.active_adapters,
            inference_mode=config.inference_mode,
        )
        self._settle(adapter_name, resolved)
        advise(self.model, resolved, adapter_name)

    def _settle(self, adapter_name: str, resolved: Any) -> None:
        """Record what was adapted, and what the config came to mean."""
        for _, layer in layers(self.model):
            if isinstance(layer, self.tuner_layer_cls):
                layer._active_adapter = list(self.active_adapters)  # a new layer, too, that the active ones are not at
                self._modules.update({name: held_by(layer, name) for name in shared_containers(layer.view)})
            if adapter_name in layer.adapters:
                if layer._read_by_parent:  # the out-projection of an attention, which is one target
                    continue
                plain = layer.site.kind in ("parameter", "experts")
                names = self.targeted_parameter_names if plain else self.targeted_module_names
                path = layer.site.path if plain else layer.site.owner
                if path not in names:
                    names.append(path)
        for _, wrapper in auxiliaries(self.model):
            if adapter_name in wrapper.active_adapters and adapter_name not in self.active_adapters:
                wrapper.set_adapter([])  # a new one
        settle(self.model, self.peft_config[adapter_name], adapter_name, resolved)

    def _inject_new(self, adapter_name: str, config: PeftConfig, low_cpu_mem_usage: bool = False) -> None:
        """Inject an adapter that is not in `peft_config` yet; it is not there either if that fails."""
        self.peft_config[adapter_name] = config
        try:
            self.inject_adapter(self.model, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
        except BaseException:
            self.peft_config.pop(adapter_name, None)
            raise

    def _check_new_adapter_config(self, config: PeftConfig) -> None:
        biased = [c for c in self.peft_config.values() if getattr(c, "bias", "none") != "none"]
        if len(self.peft_config) > 1 and len(biased) > 1:
            raise ValueError(
                f"{type(self).__name__} supports only 1 adapter with bias. When using multiple adapters, "
                "set bias to 'none' for all adapters."
            )

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        state.cast_adapter_dtype(self.model, adapter_name, autocast_adapter_dtype)

    # -- switches ---------------------------------------------------------------------------------------

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make adapters the active ones, and the only trainable ones.

        Args:
            adapter_name: a name, or several.
            inference_mode: whether they stay frozen.

        Raises:
            ValueError: if there is no such adapter. (PEFT takes any name, and the model then is the base model.)
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self._check_known(names)
        state.set_adapter(self.model, names, inference_mode=inference_mode)
        self.active_adapter = adapter_name if isinstance(adapter_name, str) else names

    def _check_known(self, names: Sequence[str]) -> None:
        unknown = sorted(set(names) - self.peft_config.keys())
        if unknown:
            raise ValueError(f"Adapter(s) {unknown} not found, available adapters: {sorted(self.peft_config)}")

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Freeze or unfreeze adapters.

        Args:
            adapter_names: a name, or several.
            requires_grad: whether they are trained.
        """
        state.set_requires_grad(self.model, adapter_names, requires_grad)

    def enable_adapter_layers(self) -> None:
        """Switch the adapters on."""
        state.enable_adapters(self.model, True)

    def disable_adapter_layers(self) -> None:
        """Switch the adapters off: the model is the base model, but for biases that were trained with them."""
        for name in self.active_adapters:
            bias = getattr(self.peft_config.get(name), "bias", "none")
            if bias != "none":
                warnings.warn(
                    f"Careful, disabling adapter layers with bias configured to be '{bias}' does not produce the same "
                    "output as the base model would without adaption.",
                    stacklevel=2,
                )
        state.enable_adapters(self.model, False)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter; the first one left becomes active if it was.

        Args:
            adapter_name: its name.

        Raises:
            ValueError: if there is none, or if it is merged now.
        """
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} does not exist")
        if any(adapter_name in m.merged_adapters for m in self.model.modules() if isinstance(m, AdapterLayer)):
            raise ValueError(
                f"Cannot delete adapter(s) [{adapter_name!r}] while they are merged. Please unmerge them first."
            )
        left = state.delete_adapter(self.model, adapter_name)
        self.peft_config.pop(adapter_name, None)
        self.active_adapter = left or []

    add_weighted_adapter = add_weighted_adapter

    # -- the rest ---------------------------------------------------------------------------------------

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether `convert_to_lora` takes the adapters: they add matrices, and to linear layers only.

        Args:
            adapter_name: as in PEFT; the adapters of all layers are asked.

        Returns:
            Whether all of them do.
        """
        return all(is_converted(layer, name) for _, layer in layers(self.model) for name in layer.adapters)


@functools.cache
def tuner_class(package: str) -> type[BaseTuner]:
    """The tuner of a PEFT package, e.g. `LoraModel` for "lora".

    Args:
        package: its name under `peft.tuners`.

    Returns:
        The class.

    Example:
        >>> import funcadapt as fa
        >>> tuner_class("lora").__name__
        'LoraModel'
    """
    view = view_named(package)
    body: dict[str, Any] = {
        "__module__": f"funcadapt.peft.tuners.{package}.model",
        "__qualname__": f"{view.name}Model",
        "__doc__": f"A model with adapters of {view.name}, see BaseTuner.",
        "prefix": view.prefix,
        "tuner_layer_cls": family(package),
        "view": view,
        **view.tuner,
    }
    return type(f"{view.name}Model", (BaseTuner,), body)
