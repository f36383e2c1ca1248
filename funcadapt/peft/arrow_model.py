"""`create_arrow_model`: trained LoRAs in one `PeftModel`, and a router among them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from funcadapt.methods import lora
from funcadapt.parts import arrow_leaves, lora_forms
from funcadapt.view.holding import put
from funcadapt.view.layer import AdapterLayer
from funcadapt.view.walking import layers, view_state

TASK_ADAPTER_PREFIX = "task_"
GKS_ADAPTER_PREFIX = "gks_"
ROUTER = "arrow_router"


def create_arrow_model(
    base_model: nn.Module,
    task_specific_adapter_paths: Sequence[str],
    arrow_config: Any,
    general_adapter_paths: Sequence[str] | None = None,
    **adapter_kwargs: Any,
) -> Any:
    """A model with trained LoRAs, of which every token uses the few that fit it: the adapter "arrow_router".

    An adapter that is added or deleted later becomes, or is no longer, an expert with the next call. The router has
    copies of the experts' weights, less what is general if `use_gks` is set; they themselves stay as they were, and
    a checkpoint of the router holds all that it needs. (PEFT's holds weights that nothing reads.)

    Args:
        base_model: the model; it is changed in place.
        task_specific_adapter_paths: folders or repositories of the experts, "user/name/subfolder" too.
        arrow_config: an `ArrowConfig`; it gets the names of the experts.
        general_adapter_paths: those of the adapters of which the mean is subtracted from the experts.
        **adapter_kwargs: arguments of `PeftModel.from_pretrained` and `load_adapter`.

    Returns:
        The `PeftModel`, in which the router is active.

    Raises:
        ValueError: if paths are missing, or the adapters differ in their ranks or layers.
        TypeError: if an adapter is at a layer that is not linear.
    """
    from funcadapt.peft import LoraConfig, PeftModel  # they build on this file

    if not task_specific_adapter_paths:
        raise ValueError("`task_specific_adapter_paths` should contain at least one adapter path")
    if arrow_config.use_gks and not general_adapter_paths:
        raise ValueError("You should provide general LoRA paths if you want to use GenKnowSub.")
    paths = {f"{TASK_ADAPTER_PREFIX}{i}": path for i, path in enumerate(task_specific_adapter_paths)}
    tasks = list(paths)
    if arrow_config.use_gks:
        paths |= {f"{GKS_ADAPTER_PREFIX}{i}": path for i, path in enumerate(general_adapter_paths or ())}
    model: Any = None
    for name, path in paths.items():
        source, subfolder = _source(path)
        options = {**({} if subfolder is None else {"subfolder": subfolder}), **adapter_kwargs}
        if model is None:
            model = PeftModel.from_pretrained(base_model, source, adapter_name=name, **options)
        else:
            model.load_adapter(source, adapter_name=name, **options)
    arrow_config.task_adapter_names = tasks
    arrow_config.gks_adapter_names = [name for name in paths if name not in tasks]
    targets, r = _agreed(model, list(paths))
    model.add_adapter(ROUTER, LoraConfig(arrow_config=arrow_config, target_modules=targets, r=r))
    model.set_adapter(ROUTER)
    _route(model, ROUTER, model.peft_config[ROUTER], tasks)
    return model


def refresh(model: Any, name: str) -> None:
    """Let a router follow the adapters that its model has now.

    Args:
        model: the `PeftModel`.
        name: an adapter; nothing is done if it is no router.
    """
    config = model.peft_config.get(name)
    found = getattr(config, "arrow_config", None)
    if found is None or found.task_adapter_names is None:
        return
    others = [n for n, c in model.peft_config.items() if n != name and getattr(c, "arrow_config", None) is None]
    tasks = [n for n in others if not _is_general(n)]
    if sorted(tasks) != sorted(found.task_adapter_names):
        if not tasks:
            return  # a router that was loaded by itself has its experts with it
        _agreed(model, tasks)
        found.task_adapter_names = tasks
        _route(model, name, config, tasks)


def _is_general(name: str) -> bool:
    number = name.removeprefix(GKS_ADAPTER_PREFIX)
    return number != name and number.isdigit()


def _source(path: str) -> tuple[str, str | None]:
    """The folder or repository of an adapter, and the subfolder in it."""
    if os.path.isdir(path):
        if not os.path.isfile(os.path.join(path, "adapter_config.json")):
            raise ValueError(f"Local adapter path '{path}' does not contain 'adapter_config.json'.")
        return path, None
    parts = path.strip("/").split("/")
    return "/".join(parts[:2]) if len(parts) > 1 else path, "/".join(parts[2:]) or None


def _agreed(model: nn.Module, names: Sequence[str]) -> tuple[list[str], int]:
    """The modules that all adapters are at, by the last parts of their names, and their rank."""
    first: tuple[str, Any] | None = None
    for name in names:
        own = [(path, layer) for path, layer in layers(model) if name in layer.adapters]
        wrong = [(path, type(layer.get_base_layer()).__name__) for path, layer in own if not _fits(layer, name)]
        if wrong:
            listed = "\n".join(f"  - adapter {name!r} on module {path!r} of type {kind}" for path, kind in wrong)
            raise TypeError(f"Arrow's experts must be plain LoRAs at linear layers. Found:\n{listed}")
        shapes = {path: layer.leaves(name)["lora_A"].shape for path, layer in own}
        if first is None:
            first = name, shapes
        elif _ranks(shapes) != _ranks(first[1]):
            raise ValueError(f"[{name}] rank mismatch with {first[0]}.")
        elif shapes != first[1]:
            other = sorted(path for path in {*shapes, *first[1]} if shapes.get(path) != first[1].get(path))
            raise ValueError(f"[{name}] target_modules mismatch with {first[0]}: they differ at {', '.join(other)}.")
    assert first is not None
    ranks = _ranks(first[1])
    if len(ranks) > 1:
        raise ValueError(f"[{first[0]}] has different ranks: {sorted(ranks)}.")
    return sorted({path.rpartition(".")[2] for path in first[1]}), ranks.pop()


def _ranks(shapes: Mapping[str, torch.Size]) -> set[int]:
    return {shape[0] for shape in shapes.values()}


def _fits(layer: AdapterLayer, name: str) -> bool:
    held = layer.adapters[name]
    plain = held.method is lora.METHOD and not getattr(held.config, "lora_bias", False)
    return plain and layer.site.kind in lora_forms.PRODUCTS


def _route(model: nn.Module, name: str, config: Any, tasks: Sequence[str]) -> None:
    """Give a router the weights of the experts."""
    given = config.arrow_config
    state = view_state(model)
    settings = dataclasses.asdict(given)
    state.configs[name] = dataclasses.replace(state.configs[name], arrow_config=settings)  # pyright: ignore
    for _, layer in layers(model):
        held = layer.adapters.get(name)
        if held is None:
            continue
        held.config, held.quiet = dataclasses.replace(held.config, arrow_config=settings), None  # pyright: ignore
        before, number = layer.leaves(name), layer.__dict__["scaling"][name]
        found: list[Mapping[str, Any]] = [layer.leaves(task) for task in tasks]
        if given.use_gks:
            general = [layer.leaves(n) for n in given.gks_adapter_names or ()]
            found = [arrow_leaves.without_general(p, general) for p in found]
        leaves = {leaf: value.detach() for leaf, value in arrow_leaves.stacked(found, number, given.rng_seed).items()}
        put(layer, held.method, layer.site, layer.get_base_layer(), name, leaves)
        for leaf, value in layer.leaves(name).items():
            if value.is_leaf and leaf in before:
                value.requires_grad_(before[leaf].requires_grad)
