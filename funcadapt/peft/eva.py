"""PEFT's functions for the init EVA, over `funcadapt.recipes.inits.variance`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any, cast

import torch
from torch import Tensor, nn

from funcadapt.init import init
from funcadapt.method import method_of
from funcadapt.recipes.inits import variance
from funcadapt.recipes.inits.common import LINEAR
from funcadapt.targeting import sites
from funcadapt.view import materialize, state
from funcadapt.view.walking import layers, root_of, unwrapped


def forward_fn_dict(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """The model with a dict of keyword arguments."""
    return model(**inputs)


def prepare_model_inputs_fn_language_modeling(model_input: Any, peft_config: Any) -> Tensor:
    """Which tokens of a batch count: the indices of those that are attended to and have a label.

    Args:
        model_input: the batch, a dict.
        peft_config: the config.

    Returns:
        (tokens, 2).

    Raises:
        TypeError: if the batch is no dict.
    """
    if not isinstance(model_input, dict):
        raise TypeError("When using `prepare_model_inputs_fn_language_modeling` inputs must be a dictionary")
    batch: dict[str, Tensor] = model_input  # pyright: ignore[reportUnknownVariableType]
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    if peft_config.eva_config.use_label_mask and "labels" in batch:
        mask = mask & (batch["labels"] != peft_config.eva_config.label_mask_value)
    return mask.nonzero()


def prepare_layer_inputs_fn_language_modeling(layer_input: Any, model_input: Tensor, layer_name: str) -> Tensor:
    """The rows of a layer's input at given indices.

    Args:
        layer_input: the input, or a tuple that starts with it.
        model_input: the indices.
        layer_name: the layer.

    Returns:
        (tokens, in).
    """
    x = cast(Tensor, layer_input[0] if isinstance(layer_input, tuple | list) else layer_input)
    return x[model_input.T.unbind()]


def _bare(model: Any) -> nn.Module:
    return root_of(model) if hasattr(model, "peft_config") else model


def _same_device(batch: Any, device: torch.device) -> Any:
    if hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {k: _same_device(v, device) for k, v in batch.items()}  # pyright: ignore[reportUnknownVariableType]
    return type(batch)(_same_device(v, device) for v in batch) if isinstance(batch, tuple | list) else batch  # pyright: ignore


class _Moved:
    """A data loader whose batches are on the model's device, as often as it is gone through."""

    def __init__(self, loader: Iterable[Any], device: torch.device) -> None:
        self.loader, self.device = loader, device

    def __iter__(self) -> Iterator[Any]:
        return (_same_device(batch, self.device) for batch in self.loader)


def get_eva_state_dict(
    model: Any,
    dataloader: Iterable[Any],
    peft_config: Any = None,
    forward_fn: Callable[[Any, Any], Any] = forward_fn_dict,
    prepare_model_inputs_fn: Any = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Any = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, Tensor]:
    """The components that EVA gives each layer, as PEFT's function: see `funcadapt.recipes.inits.variance`.

    Args:
        model: a model, with an adapter or without.
        dataloader: the batches.
        peft_config: the config; that of the adapter if there is one.
        forward_fn: (model, batch): calls the model.
        prepare_model_inputs_fn: (batch, config) -> what the next function gets; None: the batch.
        prepare_layer_inputs_fn: (layer's input, that, layer's name) -> the rows that count; or one for each layer by
            name; None: all rows.
        adapter_name: the adapter.
        gather_distributed_inputs: whether the inputs of all ranks count, where `torch.distributed` is initialised.
        show_progress_bar: of no effect.

    Returns:
        Name of a module -> components, (rank, in).

    Raises:
        ValueError: if there is no config or no data, or a function for a layer that is not there.
    """
    adapted = hasattr(model, "peft_config")
    peft_config = model.peft_config[adapter_name] if adapted and peft_config is None else peft_config
    if peft_config is None:
        raise ValueError("peft_config is required if model is not a PeftModel")
    if isinstance(dataloader, Sized) and not len(dataloader):
        raise ValueError("dataloader is empty")
    root, config = _bare(model), peft_config.to_funcadapt()
    names = {id(m): name for name, m in model.named_modules()}
    wrapped = {layer.site.path: names[id(layer)] for _, layer in layers(root)} if adapted else {}
    last: list[Any] = [None, None]
    given: Any = prepare_layer_inputs_fn
    by_name: Any = None if given is None or callable(given) else given

    def rows(x: Tensor, batch: Any, path: str) -> Tensor:
        if batch is not last[0]:
            last[:] = batch, prepare_model_inputs_fn(batch, peft_config) if prepare_model_inputs_fn else batch
        of_layer = given if by_name is None else by_name.get(wrapped.get(path, path))
        found: Any = x if of_layer is None else of_layer(x, last[1], wrapped.get(path, path))
        return found.reshape(-1, found.shape[-1])

    with unwrapped(root):
        config = config.for_model(getattr(getattr(root, "config", None), "model_type", None))
        table = [site for site in sites(root, config) if site.kind in LINEAR]
        unknown: list[str] = sorted(set(by_name or ()) - {wrapped.get(site.path, site.path) for site in table})
        if unknown:
            raise ValueError(
                "prepare_layer_inputs_fn is a mapping but the following module names were not found in the model: "
                f"{unknown}"
            )
        device = table[0].device
        moved = _Moved(dataloader, device)
        gather = gather_distributed_inputs
        found = variance.components(root, config, moved, forward=forward_fn, rows=rows, gather=gather, sites=table)
    return {wrapped.get(path, path): a for path, a in found.items()}


def initialize_lora_eva_weights(
    model: Any,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: Mapping[str, Tensor] | None = None,
    forward_fn: Callable[[Any, Any], Any] = forward_fn_dict,
    prepare_model_inputs_fn: Any = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Any = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Give the layers of a new adapter the init and the ranks of EVA, in place.

    Args:
        model: the model with the adapter.
        dataloader: the batches, if the components are not given.
        eva_state_dict: the components, of `get_eva_state_dict`.
        forward_fn: as there.
        prepare_model_inputs_fn: as there.
        prepare_layer_inputs_fn: as there.
        adapter_name: as there.
        gather_distributed_inputs: as there.
        show_progress_bar: as there.

    Raises:
        ValueError: if the model has no such adapter, several are active, its init is not "eva", or there is no data.
    """
    if not hasattr(model, "peft_config"):
        raise ValueError("model must be a PeftModel")
    if len(model.active_adapters) > 1:
        raise ValueError("`initialize_lora_eva_weights` currently only works with a single active adapter")
    peft_config = model.peft_config[adapter_name]
    if peft_config.init_lora_weights != "eva":
        raise ValueError("`initialize_lora_eva_weights` can only be used with `init_lora_weights='eva'`")
    if eva_state_dict is None:
        if dataloader is None:
            raise ValueError("dataloader is required if eva_state_dict is not provided")
        functions = (forward_fn, prepare_model_inputs_fn, prepare_layer_inputs_fn)
        gather = gather_distributed_inputs
        eva_state_dict = get_eva_state_dict(model, dataloader, None, *functions, adapter_name, gather)
    root = _bare(model)
    names = {id(m): name for name, m in model.named_modules()}
    wrapped = {names[id(layer)]: layer.site.path for _, layer in layers(root) if adapter_name in layer.adapters}
    found = {wrapped[name]: a for name, a in eva_state_dict.items() if name in wrapped}
    missing = [path for path in wrapped.values() if path not in found]
    given = variance.settings(variance.Settings, peft_config.to_funcadapt().eva_config or {}, "eva_config")
    config = variance.redistributed(peft_config.to_funcadapt(), found, given, missing)
    with unwrapped(root):
        adapter = init(root, config)
    method = method_of(config)
    params = {
        path: method.layout({**p, "lora_A": found[path].to(p["lora_A"])}) if path in found else p
        for path, p in adapter.params.items()
    }
    state.delete_adapter(root, adapter_name)
    materialize(root, adapter.replace(params=params), adapter_name)
    peft_config.target_modules = set(config.target_modules)
    for field in ("rank_pattern", "alpha_pattern"):  # plain paths, as PEFT writes them
        setattr(peft_config, field, {key.replace("\\", ""): value for key, value in getattr(config, field).items()})
    if missing:
        warnings.warn(
            "the following layers were initialized with init_lora_weights=True because they were not found in the eva "
            f"state_dict: {missing}",
            stacklevel=2,
        )
