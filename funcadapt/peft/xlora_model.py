"""`XLoraModel`: X-LoRA in place, see `funcadapt.xlora`. The experts are adapters "0", "1" ... of a `LoraModel`."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from funcadapt import xlora
from funcadapt.peft.config import PeftConfig
from funcadapt.peft.tuner import BaseTuner, tuner_class
from funcadapt.peft.utils.save_and_load import set_peft_model_state_dict
from funcadapt.peft.utils.weights import load_peft_weights
from funcadapt.view import state
from funcadapt.view.walking import layers


class XLoraClassifier(nn.Module):
    """The classifier, and the log of what it said.

    Args:
        model: the model, whose dtype it gets.
        config: the config.
        n_classes: how many experts there are.
        n_layers: how many adapted layers there are.
        device: where it is.
    """

    def __init__(self, model: nn.Module, config: Any, n_classes: int, n_layers: int, device: Any) -> None:
        super().__init__()
        self.n_classes, self.n_layers, self.config = n_classes, n_layers, config
        self.log_scalings: list[Tensor] = []
        self.scalings_logging = False
        self.dtype = next(model.parameters()).dtype
        shapes = xlora.classifier_shapes(config, n_classes, n_layers)
        parts: list[nn.Module] = []
        for out, fan_in in (shape for shape in shapes.values() if len(shape) == 2):
            if parts:
                parts += [nn.ReLU(), *[nn.Dropout(config.xlora_dropout_p)] * (config.xlora_dropout_p > 0)]
            parts.append(nn.Linear(fan_in, out).to(device).to(self.dtype))
        self.layers = nn.Sequential(*parts)

    def forward(self, hidden: Tensor) -> Tensor:
        """The scalings, (rows, tokens, layers, experts)."""
        own = {f"layers.{name}": value for name, value in self.layers.named_parameters()}
        value = xlora.XLora({str(i): None for i in range(self.n_classes)}, own, self.config)  # pyright: ignore
        found = xlora.scalings(value, hidden, self.n_layers, training=self.training)
        if self.scalings_logging:
            self.log_scalings.append(found)
        return found


def _one(config: Any, name: str) -> Any:
    return config if isinstance(config, PeftConfig) else config[name]


class XLoraModel(BaseTuner):
    """A model with several LoRAs, and a classifier that weighs them for every token.

    Args:
        model: the model; it is changed in place, and must not use a cache.
        config: an `XLoraConfig`, or configs by adapter name. Its `adapters` are read.
        adapter_name: the name of the whole.
        torch_device: where the experts are read to.
        autocast_adapter_dtype: whether weights of experts in half precision become float32.
        **kwargs: what `hf_hub_download` takes.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        **kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)
        conf = _one(config, adapter_name)
        if getattr(getattr(model, "config", None), "use_cache", False):
            raise ValueError("`use_cache` must be False")
        if not conf.adapters:
            raise ValueError("X-LoRA needs at least one adapter in `adapters`.")
        inner: Any = None
        for i, path in enumerate(conf.adapters.values()):
            expert = PeftConfig.from_pretrained(path, **kwargs)
            expert.inference_mode = False
            if inner is None:
                inner = tuner_class("lora")(model, expert, "0")
            else:
                inner._inject_new(str(i), expert)
            tensors = load_peft_weights(path, device=torch_device, **kwargs)
            set_peft_model_state_dict(model, tensors, adapter_name=str(i))
            inner._cast_adapter_dtype(str(i), autocast_adapter_dtype)
        self.lora_model = inner
        self.xlora_config: Any = conf
        experts = dict(inner.peft_config)
        inner.peft_config.clear()
        inner.peft_config.update({adapter_name: conf, **experts})
        self._experts = list(experts)
        inner.set_adapter(self._experts)
        self._maybe_freeze_all_adapters()
        self._weighed = [layer for _, layer in layers(model)]
        device = next(self._weighed[0].parameters()).device
        self.internal_xlora_classifier = XLoraClassifier(model, conf, len(experts), len(self._weighed), device)
        self.internal_xlora_scalings: Tensor | None = None
        self.disabled = False
        self.eval()

    @property
    def model(self) -> nn.Module:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The model."""
        return self.lora_model.model

    @property
    def peft_config(self) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The config, and those of the experts, by name."""
        return self.lora_model.peft_config

    @property
    def active_adapter(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The names of the experts."""
        return self._experts

    def __getattr__(self, name: str) -> Any:
        """What the `LoraModel` has."""
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            if name == "lora_model":  # not initialised yet
                raise
            return getattr(self.lora_model, name)

    # -- calls ------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output."""
        return self.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's `generate`, without a cache."""
        return self.lora_model.generate(*args, **{**kwargs, "use_cache": False})

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Generator[None, None, None]:
        """Every call of the model in the block is preceded by one that gives the scalings."""
        if self.disabled:
            yield
            return
        handle = self.model.register_forward_pre_hook(self._first_pass, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
            self._weigh(None)

    def _first_pass(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled() and any(m.training and getattr(m, "gradient_checkpointing", False)
                                           for m in module.modules()):  # fmt: skip
            # the recomputation in the backward pass comes when the scalings are gone; PEFT's gradients are wrong then
            raise RuntimeError(
                "X-LoRA cannot run with activation checkpoints. Call model.activation_checkpointing_disable() "
                "(gradient_checkpointing_disable() in older transformers)."
            )
        passed = self.xlora_config.scaling_pass_value
        if passed:
            tokens = xlora.rows_and_tokens(args, kwargs)
            shape = (*tokens.shape[:2], len(self._weighed), len(self._experts))
            self._weigh(torch.full(shape, passed, device=tokens.device))
        with torch.no_grad(), nullcontext() if passed else state.disabled(self.model):
            named = {**kwargs, "output_hidden_states": True, "return_dict": True}
            hidden: Tensor = module.forward(*args, **named).hidden_states[-1]
        self.internal_xlora_scalings = self.internal_xlora_classifier(hidden.detach())
        self._weigh(self.internal_xlora_scalings)

    def _weigh(self, scalings: Tensor | None) -> None:
        config = self.xlora_config
        for i, layer in enumerate(self._weighed):
            if scalings is None:
                layer.__dict__.pop("weights", None)
                continue
            w = xlora.gates(scalings[:, :, i], config) * config.global_scaling_weight
            layer.__dict__["weights"] = {name: w[:, :, e] for e, name in enumerate(self._experts)}

    # -- switches ---------------------------------------------------------------------------------------

    def _maybe_freeze_all_adapters(self) -> None:
        if not self.xlora_config.use_trainable_adapters:
            state.set_requires_grad(self.model, self._experts, False)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """The experts have theirs already."""

    def enable_adapter_layers(self) -> None:
        """Switch X-LoRA on."""
        self.disabled = False
        state.enable_adapters(self.model, True)
        self._maybe_freeze_all_adapters()

    def disable_adapter_layers(self) -> None:
        """Switch X-LoRA off: the model is the base model."""
        self.disabled = True
        state.enable_adapters(self.model, False)

    def set_topk_lora(self, value: int | None) -> None:
        """Let a token use so many experts; None for all."""
        self.xlora_config.top_k_lora = value

    def set_global_scaling_weight(self, weight: float) -> None:
        """Set the factor of all experts."""
        self.xlora_config.global_scaling_weight = weight

    def get_global_scaling_weight(self) -> float:
        """The factor of all experts."""
        return self.xlora_config.global_scaling_weight

    def set_scaling_pass_value(self, value: float | None) -> None:
        """Set how much each expert acts in the first pass; None for one part each."""
        self.xlora_config.scaling_pass_value = 1 / len(self._experts) if value is None else value

    # -- the log ----------------------------------------------------------------------------------------

    def get_latest_scalings(self) -> Tensor | None:
        """The last scalings, (rows, tokens, layers, experts)."""
        return self.internal_xlora_scalings

    def enable_scalings_logging(self) -> None:
        """Keep the scalings of every call."""
        self.internal_xlora_classifier.scalings_logging = True

    def disable_scalings_logging(self) -> None:
        """Keep no more; the log stays."""
        self.internal_xlora_classifier.scalings_logging = False

    def get_scalings_log(self) -> list[Tensor]:
        """The scalings that were kept, in a new list."""
        return list(self.internal_xlora_classifier.log_scalings)

    def clear_scalings_log(self) -> None:
        """Forget them."""
        self.internal_xlora_classifier.log_scalings.clear()

    def get_bucketed_scalings_log(self) -> dict[int, tuple[list[int], list[Tensor]]]:
        """The log by the number of tokens: places in the log, and the scalings there."""
        found: dict[int, tuple[list[int], list[Tensor]]] = {}
        for i, scalings in enumerate(self.internal_xlora_classifier.log_scalings):
            places, tensors = found.setdefault(scalings.shape[1], ([], []))
            places.append(i)
            tensors.append(scalings)
        return found

    # -- files ------------------------------------------------------------------------------------------

    def own_state_dict(self, adapter_name: str) -> dict[str, Tensor]:
        """What a checkpoint holds: the classifier, which all adapters share."""
        own = self.internal_xlora_classifier.state_dict()
        return {xlora.PREFIX + name: value for name, value in own.items()}

    def load_own_state_dict(self, tensors: Mapping[str, Tensor], adapter_name: str, ignore_mismatched: bool) -> Any:
        """Read a checkpoint.

        Args:
            tensors: key -> tensor.
            adapter_name: of no meaning here.
            ignore_mismatched: likewise; every tensor must fit.

        Returns:
            The missing keys and the unexpected ones.
        """
        own = {key.rpartition("internal_xlora_classifier.")[2]: value for key, value in tensors.items()}
        result: Any = self.internal_xlora_classifier.load_state_dict(own, strict=False)
        missing = [xlora.PREFIX + name for name in result.missing_keys]
        return SimpleNamespace(missing_keys=missing, unexpected_keys=list(result.unexpected_keys))
