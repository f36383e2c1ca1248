"""`ShadowModel`: Shadow in place, see `funcadapt.shadow`, with PEFT's names of modules and parameters.

Differs from PEFT as the value does; and an adapter that is added to a model in eval mode is in eval mode (PEFT's
dropout acts there); one that is loaded for inference is frozen as a whole (PEFT trains its backbone); the copy of
`unload_shadow(copy=True)` reads the embeddings wherever the model keeps them (PEFT's GPT-2 reads random ones); and
`last_shadow_loss` is there before the first call.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from funcadapt import shadow
from funcadapt._torch import named_modules
from funcadapt.peft.tuner import BaseTuner
from funcadapt.view.auxiliary import ModulesToSaveWrapper
from funcadapt.view.switches import TunerLayer

_BLOCK = ("shadow_down", "shadow_up", "shadow_update_transform", "shadow_update_gate")
_NO_MERGE = (
    "ShadowPEFT cannot be merged into the base model: the adaptation is an input-dependent, layer-space trajectory, "
    "not a static weight-space delta. Use `unload()` to recover the plain base model, or "
    "`unload_shadow()` for a standalone shadow model."
)


class ShadowLayer(TunerLayer):
    """A decoder block whose input the shadow corrects.

    Args:
        base_layer: the block.
        path: where it is.
        run: where a call of the model stands.

    Attributes:
        shadow_r: adapter name -> rank.
        shadow_alpha: adapter name -> strength.
    """

    adapter_layer_names = (*_BLOCK, "shadow_dropout")
    other_param_names = ("shadow_r", "shadow_alpha")

    def __init__(self, base_layer: nn.Module, path: str, run: shadow.Run) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.merged_adapters = []
        self.shadow_r: dict[str, int] = {}
        self.shadow_alpha: dict[str, float] = {}
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ModuleDict())
        self.path, self.run = path, run
        self.training = base_layer.training

    def update_layer(self, adapter_name: str, config: Any, width: int, like: Tensor) -> None:
        """Add an adapter, its weights drawn as PEFT draws them.

        Args:
            adapter_name: its name.
            config: funcadapt's config.
            width: the model's width.
            like: a parameter of the model.
        """
        r, u = config.r, config.update_hidden_size or config.r
        self.shadow_r[adapter_name], self.shadow_alpha[adapter_name] = r, config.shadow_alpha
        parts: dict[str, nn.Module] = {name: nn.Linear(*sizes, bias=False) for name, sizes in
                                       (("shadow_down", (width, r)), ("shadow_up", (r, width)))}  # fmt: skip
        for name in _BLOCK[2:]:
            parts[name] = nn.Sequential(nn.Linear(width, u), nn.GELU(), nn.Linear(u, width))
        if config.init_weights:
            nn.init.zeros_(parts["shadow_up"].weight)  # pyright: ignore[reportArgumentType]
        rate = config.shadow_dropout
        parts["shadow_dropout"] = nn.Dropout(rate) if rate else nn.Identity()
        for name, part in parts.items():
            part.to(like.device, torch.promote_types(like.dtype, torch.float32)).train(self.training)
            getattr(self, name)[adapter_name] = part

    def leaves(self, adapter_name: str) -> dict[str, Tensor]:
        """An adapter's tensors as `funcadapt.shadow` names them."""
        found: dict[str, Tensor] = {}
        for name in _BLOCK:
            part: Any = getattr(self, name)[adapter_name]
            found |= {f"{name}.{key}": p for key, p in part.named_parameters()}
        return found

    def _get_available_adapters(self) -> set[str]:
        return set(self.shadow_r)

    def __repr__(self) -> str:
        return "shadow." + super().__repr__()

    def get_base_layer(self) -> nn.Module:
        """The block."""
        return self.base_layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the block returns."""
        names = self.active_adapters
        if self._disable_adapters or not names or names[0] not in self.shadow_alpha:
            return self.base_layer(*args, **kwargs)
        dropout: Any = getattr(self, "shadow_dropout")[names[0]]  # noqa: B009
        rates = self.shadow_alpha[names[0]], getattr(dropout, "p", 0.0) if self.training else 0.0
        place = self.path, int(self.path.rpartition(".")[2])
        return self.run.through(place, self.base_layer, self.leaves(names[0]), rates, args, kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Not possible."""
        raise NotImplementedError(_NO_MERGE)

    def unmerge(self) -> None:
        """Not possible."""
        raise NotImplementedError("ShadowPEFT does not support merging, so there is nothing to unmerge.")

    def __getattr__(self, name: str) -> Any:
        """What the block has: decoders read attributes of their blocks."""
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            if name == "base_layer" or "_modules" not in self.__dict__:
                raise
            return getattr(self.base_layer, name)


class ShadowModel(BaseTuner):
    """A decoder with a shadow network. One adapter is active at a time.

    Args:
        model: the model; it is changed in place.
        peft_config: the config, or configs by adapter name.
        adapter_name: which of them to inject.
        low_cpu_mem_usage: accepted; the weights are made on the CPU.
        state_dict: accepted, not needed.

    Attributes:
        last_shadow_loss: the shadow's own loss in the last call with labels, without its weight and gradient.
    """

    prefix = "shadow_"
    tuner_layer_cls = ShadowLayer  # pyright: ignore[reportAssignmentType]

    def __init__(
        self,
        model: nn.Module,
        peft_config: Any,
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: Mapping[str, Any] | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.model = model
        self.targeted_module_names: list[str] = []
        self.targeted_parameter_names: list[str] = []
        self.peft_config: dict[str, Any] = {}
        self.active_adapter: str | list[str] = adapter_name
        self.last_shadow_loss: Tensor | None = None
        self._run = shadow.Run()
        self._first: Tensor | None = None
        self._caches: tuple[Any, ...] = ()
        self._flags = {name: p.requires_grad for name, p in model.named_parameters()}
        for name in ("shadow_backbone", "shadow_projection", "shadow_head"):
            setattr(self, name, nn.ModuleDict())
        configs: Any = peft_config
        self._inject_new(adapter_name, configs[adapter_name] if isinstance(peft_config, Mapping) else configs)
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after),
        ]
        held: Any = model
        held.peft_config = self.peft_config

    # -- injection --------------------------------------------------------------------------------------

    def _inject_new(self, adapter_name: str, config: Any, low_cpu_mem_usage: bool = False) -> None:
        frozen = config.to_funcadapt()
        tasks = [other.task_type for other in (*self.peft_config.values(), config)]
        if len(tasks) > 1 and "SEQ_CLS" in tasks:
            raise ValueError(
                "ShadowPEFT does not support multiple adapters when any adapter uses sequence classification because "
                "the sequence classification adapter requires both a classifier in `modules_to_save` and a separate "
                "`shadow_head`."
            )
        model = self.model
        paths = shadow.block_paths(model, frozen)
        backbone = shadow.make_backbone(model, frozen)
        like = next(model.parameters())
        own, width = (shadow.size_of(m.config) for m in (backbone, model))  # pyright: ignore
        scores = shadow.classifier_of(model) if frozen.task_type == "SEQ_CLS" else None
        parts: dict[str, nn.Module | None] = {
            "shadow_backbone": backbone,
            "shadow_projection": nn.Identity() if own == width else nn.Linear(own, width, bias=False),
            "shadow_head": None if scores is None else copy.deepcopy(scores),
        }
        if not self.peft_config:
            model.requires_grad_(False)
        for name, part in parts.items():
            if part is not None:
                part.to(like.device, like.dtype).train(model.training)
                getattr(self, name)[adapter_name] = part
        for path in paths:
            layer = self._layer(path)
            layer.update_layer(adapter_name, frozen, width, like)
            if path not in self.targeted_module_names:
                self.targeted_module_names.append(path)
        self._save_modules(adapter_name, config)
        self.peft_config[adapter_name] = config
        if config.target_modules is None:
            names = set(paths)
            config.target_modules, config.layers_to_transform, config.layers_pattern = names, None, None
        active = self.active_adapters
        self._switch(active, self.peft_config[active[0]].inference_mode)

    def _layer(self, path: str) -> ShadowLayer:
        module = self.model.get_submodule(path)
        if isinstance(module, ShadowLayer):
            return module
        owner, _, name = path.rpartition(".")
        layer = ShadowLayer(module, path, self._run)
        self.model.get_submodule(owner)._modules[name] = layer
        return layer

    def _save_modules(self, adapter_name: str, config: Any) -> None:
        names = tuple(config.modules_to_save or ())
        for path, module in named_modules(self.model) if names else ():
            if isinstance(module, ModulesToSaveWrapper):
                if path.endswith(names):
                    module.update(adapter_name)
            elif path.endswith(names) and "original_module" not in path and "modules_to_save" not in path:
                owner, _, name = path.rpartition(".")
                self.model.get_submodule(owner)._modules[name] = ModulesToSaveWrapper(module, adapter_name)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """The blocks' parts are in float32 already, and the backbone has the model's dtype."""

    # -- calls ------------------------------------------------------------------------------------------

    def _layers(self) -> list[ShadowLayer]:
        return [module for module in self.model.modules() if isinstance(module, ShadowLayer)]

    def _shadow_path_active(self) -> bool:
        names = self.active_adapters
        return any(not layer._disable_adapters and names and names[0] in layer.shadow_r for layer in self._layers())

    def value_of(self, adapter_name: str) -> shadow.Shadow:
        """An adapter as a value of `funcadapt.shadow`; its tensors are the model's.

        Args:
            adapter_name: its name.

        Returns:
            The value.
        """
        blocks = {layer.path: layer.leaves(adapter_name) for layer in self._layers() if adapter_name in layer.shadow_r}
        parts: list[dict[str, Tensor]] = []
        for name in ("shadow_backbone", "shadow_projection", "shadow_head"):
            held: Any = getattr(self, name)
            parts.append(held[adapter_name].state_dict(keep_vars=True) if adapter_name in held else {})
        whole: dict[str, Tensor] = {}
        for path, module in named_modules(self.model):
            if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.available_adapters:
                own = module.modules_to_save[adapter_name]
                whole |= {f"{path}.{name}": tensor for name, tensor in own.state_dict(keep_vars=True).items()}
        return shadow.Shadow(blocks, parts[0], parts[1], parts[2], whole, self.peft_config[adapter_name].to_funcadapt())

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = shadow.named_arguments(module, args, kwargs)
        self._first, self._caches, self._run.state = None, (), None
        past = given.get("past_key_values")
        if not self._shadow_path_active():
            base = past.__dict__["base"] if getattr(past, "shadow_pair", False) is True else past
        else:
            base, own = shadow.split_cache(past)
            cached = shadow.uses_cache(module, given)
            name = self.active_adapters[0]
            backbone = self.shadow_backbone[name]
            config: Any = self.peft_config[name].to_funcadapt()
            projection = dict(self.shadow_projection[name].named_parameters())
            value = shadow.Shadow({}, {}, projection, {}, {}, config)
            bones = shadow.Skeleton(backbone, shadow.shares(backbone, module, config), 0, 0, {}, frozenset())
            self._first, own = shadow.first_state(module, value, bones, {**given, "use_cache": cached}, own)
            self._run.state, self._run.last = self._first, -1
            self._caches = (own,) if cached else ()
        return (args, kwargs) if base is past else ((), {**given, "past_key_values": base})

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        self._run.state = None
        if self._caches:
            shadow.join_caches(output, self._caches[0])
        self._caches = ()

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Generator[None, None, None]:
        """Nothing to do, but to refuse what PEFT ignores."""
        if kwargs.get("adapter_names") is not None:
            raise NotImplementedError("Shadow: rows of one batch cannot use different adapters (`adapter_names`).")
        yield

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output; with labels, its loss has the shadow's own loss in it."""
        output = self.model(*args, **kwargs)
        given = shadow.named_arguments(self.model, args, kwargs)
        self.last_shadow_loss, labels = None, given.get("labels")
        if labels is None or self._first is None:
            return output
        own = self.shadow_auxiliary_loss(labels, given.get("attention_mask"))
        if own is None:
            return output
        self.last_shadow_loss = own.detach()
        weight = self.peft_config[self.active_adapters[0]].auxiliary_loss_weight
        found: Any = shadow.with_loss(output, weight * own) if weight > 0 else output
        if hasattr(found, "loss"):
            found.shadow_loss = self.last_shadow_loss
        return found

    def shadow_auxiliary_loss(self, labels: Tensor, attention_mask: Tensor | None = None) -> Tensor | None:
        """The shadow's own loss in the last call, without its weight.

        Args:
            labels: those of the call.
            attention_mask: that of the call.

        Returns:
            The loss; None if the task has none, or there was no call.
        """
        name = self.active_adapters[0]
        config: Any = self.peft_config[name].to_funcadapt()
        if self._first is None:
            return None
        if name in self.shadow_head:
            logits = self.shadow_head[name](shadow.last_token(self._first, attention_mask))
        else:
            model: Any = self.model
            head = model.get_output_embeddings() if config.task_type == "CAUSAL_LM" else None
            logits = None if head is None else head(self._first)
        return shadow.loss_of(logits, labels, config)

    # -- switches ---------------------------------------------------------------------------------------

    def _switch(self, names: Sequence[str], inference_mode: bool) -> None:
        for layer in self._layers():
            layer._active_adapter = list(names)
        for module in self.model.modules():
            if isinstance(module, ModulesToSaveWrapper):
                module.set_adapter([name for name in names if name in module.available_adapters])
        for name in self.peft_config:
            self.set_requires_grad(name, name in names and not inference_mode)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make an adapter the active one, and the only trainable one.

        Args:
            adapter_name: its name.
            inference_mode: whether it stays frozen.

        Raises:
            ValueError: if there are several, or there is no such adapter.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        if len(names) != 1:
            raise ValueError(f"ShadowPEFT requires exactly one active adapter, but got {len(names)} adapters.")
        self._check_known(names)
        self.active_adapter = adapter_name if isinstance(adapter_name, str) else names
        self._switch(names, inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Freeze or unfreeze adapters."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            for tensor in shadow.to_tensors(self.value_of(name)).values():
                if isinstance(tensor, nn.Parameter):
                    tensor.requires_grad_(requires_grad)

    def enable_adapter_layers(self) -> None:
        """Switch the shadow on."""
        self._enable(True)

    def disable_adapter_layers(self) -> None:
        """Switch the shadow off: the model is the base model."""
        self._enable(False)

    def _enable(self, enabled: bool) -> None:
        for module in self.model.modules():
            if isinstance(module, ShadowLayer):
                module._disable_adapters = not enabled
            elif isinstance(module, ModulesToSaveWrapper):
                module.enable_adapters(enabled)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter; the first one left becomes active if it was.

        Args:
            adapter_name: its name.

        Raises:
            ValueError: if there is none.
        """
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} does not exist")
        left = [name for name in self.peft_config if name != adapter_name]
        active = self.active_adapters
        if adapter_name in active:
            active = left[:1]
            if active:
                text = f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to {active[0]}."
                warnings.warn(text, stacklevel=2)
        for layer in self._layers():
            if adapter_name in layer.shadow_r:
                for held in (*(layer._modules[n] for n in layer.adapter_layer_names), layer.shadow_r,
                             layer.shadow_alpha):  # fmt: skip
                    del held[adapter_name]  # pyright: ignore
        for part in (self.shadow_backbone, self.shadow_projection, self.shadow_head):
            if adapter_name in part:
                del part[adapter_name]
        for module in self.model.modules():
            if isinstance(module, ModulesToSaveWrapper):
                module.delete_adapter(adapter_name, [])
        del self.peft_config[adapter_name]
        self.active_adapter = active
        if active:
            self.set_adapter(active[0])
        self._switch(active, False)

    def unmerge_adapter(self) -> None:
        """Not possible."""
        raise NotImplementedError("ShadowPEFT does not support merging, so there is nothing to unmerge.")

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:  # pyright: ignore
        """Not possible: shadows do not combine."""
        raise NotImplementedError(
            "Shadow networks cannot be combined: the shadow state is not linear in their weights."
        )

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """False: the correction is no matrix."""
        return False

    def _check_merge_allowed(self) -> None:
        raise NotImplementedError(_NO_MERGE)

    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Not possible."""
        self._check_merge_allowed()

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Not possible."""
        raise NotImplementedError(_NO_MERGE)

    def unload(self) -> nn.Module:
        """Take the shadow out.

        Returns:
            The model as it was; of what `modules_to_save` names, the active copies.
        """
        for handle in self._handles:
            handle.remove()
        for path, module in named_modules(self.model):
            if isinstance(module, ShadowLayer | ModulesToSaveWrapper):
                owner, _, name = path.rpartition(".")
                left = module.base_layer if isinstance(module, ShadowLayer) else (
                    module.unload_and_optionally_merge_module(False, False, None))  # fmt: skip
                self.model.get_submodule(owner)._modules[name] = left
        for name, p in self.model.named_parameters():
            p.requires_grad_(self._flags.get(name, True))
        held: Any = self.model
        del held.peft_config
        return self.model

    def unload_shadow(self, adapter_name: str | None = None, copy: bool = False) -> Any:
        """The shadow network by itself: head(projection(backbone(x))), a model of transformers.

        Args:
            adapter_name: the adapter; the active one if None.
            copy: whether nothing is shared with this model. It is needed for `save_pretrained`: embeddings that are
                shared are no part of the network.

        Returns:
            A `DetachedShadowModel`. It generates, if it has a language-model head.

        Raises:
            ValueError: if there is no such adapter.
        """
        name = self.active_adapters[0] if adapter_name is None else adapter_name
        if name not in self.shadow_backbone:
            raise ValueError(f"No shadow backbone found for adapter '{name}'.")
        config: Any = self.peft_config[name].to_funcadapt()
        model: Any = self.model
        backbone: Any = self.shadow_backbone[name]
        held: Any = self.shadow_head
        head = held[name] if name in held else None  # noqa: SIM401 (a ModuleDict has no get)
        if head is None and config.task_type == "CAUSAL_LM":
            head = model.get_output_embeddings()
        embeddings: Any = model.get_input_embeddings()
        table = embeddings if shadow.shares(backbone, model, config) else None
        parts: list[Any] = [backbone, self.shadow_projection[name], head]
        if copy:
            *parts, table = _copies((*parts, table))
            children = shadow.backbone_of(model)._modules.items()
            place = next((child for child, module in children if module is embeddings), None)
            if table is not None and place is not None:
                parts[0]._modules[place], table = table, None
        return detached_class()(*parts, config.task_type == "SEQ_CLS", table)

    # -- files ------------------------------------------------------------------------------------------

    def own_state_dict(self, adapter_name: str) -> dict[str, Tensor]:
        """What a checkpoint holds of an adapter."""
        return {key: tensor.detach() for key, tensor in shadow.to_tensors(self.value_of(adapter_name)).items()}

    def load_own_state_dict(self, tensors: Mapping[str, Tensor], adapter_name: str, ignore_mismatched: bool) -> Any:
        """Read a checkpoint of an adapter. Nothing is written if anything does not fit.

        Args:
            tensors: key -> tensor.
            adapter_name: the adapter.
            ignore_mismatched: whether tensors of another shape are left out.

        Returns:
            The missing keys and the unexpected ones.

        Raises:
            RuntimeError: if a tensor is of another shape.
        """
        own = self.own_state_dict(adapter_name)
        wrong = [key for key, tensor in tensors.items() if key in own and own[key].shape != tensor.shape]
        if wrong and not ignore_mismatched:
            sizes = f"{tuple(tensors[wrong[0]].shape)}, the model needs {tuple(own[wrong[0]].shape)}"
            raise RuntimeError(f"size mismatch for {wrong[0]}: the checkpoint has {sizes}.")
        with torch.no_grad():
            for key in own.keys() & tensors.keys() - set(wrong):
                own[key].copy_(tensors[key])
        missing = [key.replace(".default.", f".{adapter_name}.") for key in own if key not in tensors]
        return SimpleNamespace(missing_keys=missing, unexpected_keys=[key for key in tensors if key not in own])


# -- the network by itself --------------------------------------------------------------------------------


def _copies(parts: tuple[Any, ...]) -> tuple[Any, ...]:
    return copy.deepcopy(parts)  # together: what is tied stays tied


@functools.cache
def detached_class() -> Any:
    """The class of the shadow network by itself, which needs transformers.

    Returns:
        `DetachedShadowModel`.
    """
    transformers: Any = import_module("transformers")
    outputs: Any = import_module("transformers.modeling_outputs")

    def start(
        self: Any,
        backbone: Any,
        projection: Any = None,
        head: Any = None,
        is_classification: bool = False,
        input_embeddings: Any = None,
    ) -> None:
        transformers.PreTrainedModel.__init__(self, backbone.config)
        self.backbone, self.head, self.is_classification = backbone, head, is_classification
        self.shadow_hidden_projection = nn.Identity() if projection is None else projection
        self._shared = [input_embeddings]  # in a list, so that it is no part of this model
        self.generation_config = getattr(backbone, "generation_config", None)
        if self.generation_config is None:
            self.generation_config = transformers.GenerationConfig.from_model_config(self.config)

    def forward(self: Any, input_ids: Any = None, attention_mask: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        named = {name: value for name, value in kwargs.items() if name not in ("logits_to_keep", "num_logits_to_keep")}
        if self._shared[0] is not None and named.get("inputs_embeds") is None:
            if input_ids is None:
                raise ValueError("Either `input_ids` or `inputs_embeds` must be provided.")
            named["inputs_embeds"], input_ids = self._shared[0](input_ids), None
        named["return_dict"] = True
        out = self.backbone(input_ids=input_ids, attention_mask=attention_mask, **named)
        hidden = self.shadow_hidden_projection(out.last_hidden_state)
        if self.head is None:
            return hidden
        task = "SEQ_CLS" if self.is_classification else "CAUSAL_LM"
        logits = self.head(shadow.last_token(hidden, attention_mask) if self.is_classification else hidden)
        loss = None
        if labels is not None:
            loss = shadow.loss_of(logits, labels, shadow.ShadowConfig(task_type=task))
        if self.is_classification:
            return outputs.SequenceClassifierOutput(loss=loss, logits=logits)
        past = getattr(out, "past_key_values", None)
        return outputs.CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past)

    def can_generate(self: Any) -> bool:  # asked before there is a head, too
        return getattr(self, "head", None) is not None and not self.is_classification

    def get_output(self: Any) -> Any:
        return None if getattr(self, "is_classification", False) else self.head

    def get_input(self: Any) -> Any:
        return self.backbone.get_input_embeddings() if self._shared[0] is None else self._shared[0]

    def set_input(self: Any, value: Any) -> None:
        if self._shared[0] is not None:
            self._shared[0] = value
        else:
            self.backbone.set_input_embeddings(value)

    body: dict[str, Any] = {
        "__module__": __name__,
        "__doc__": "A shadow network by itself: backbone, projection and head.",
        "main_input_name": "input_ids",
        "base_model_prefix": "backbone",
        **{f"_supports_{n}": True for n in ("sdpa", "flash_attn", "flex_attn", "attention_backend")},
        "__init__": start,
        "forward": forward,
        "can_generate": can_generate,
        "get_input_embeddings": get_input,
        "set_input_embeddings": set_input,
        "get_output_embeddings": get_output,
    }
    return type("DetachedShadowModel", (transformers.PreTrainedModel, transformers.GenerationMixin), body)


def __getattr__(name: str) -> Any:
    if name == "DetachedShadowModel":
        return detached_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
