"""Adapters into a live model, and out of it again."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from funcadapt.adapter import Adapter
from funcadapt.binding import bind, check_shapes, state_of
from funcadapt.config import AdapterConfig
from funcadapt.errors import AdapterError, TargetError, did_you_mean
from funcadapt.init import initialise, with_defaults
from funcadapt.method import Draw, method_of
from funcadapt.sharing import SHARED
from funcadapt.sites import Site
from funcadapt.targeting import sites
from funcadapt.view.holding import view_of
from funcadapt.view.layer import AdapterLayer
from funcadapt.view.placing import Bare, Placing, Transaction
from funcadapt.view.walking import (
    STATE,
    ViewState,
    auxiliaries,
    layers,
    root_of,
    unwrapped,
    view_state,
)


class TorchDraw(Draw):
    """Numbers from torch's own generator, drawn by the calls that PEFT makes: a seed gives what it gives there."""

    def uniform(self, *shape: int, bound: float) -> Tensor:
        """Uniform in (-bound, bound)."""
        if self.abstract:
            return self.zeros(*shape)
        return self.cast(torch.empty(shape).uniform_(-bound, bound))

    def normal(self, *shape: int, std: float = 1.0) -> Tensor:
        """Normal with mean 0."""
        if self.abstract:
            return self.zeros(*shape)
        return self.cast(torch.empty(shape).normal_(0.0, std))


def inject(
    model: nn.Module,
    config: AdapterConfig,
    name: str = "default",
    *,
    state_dict: Mapping[str, Any] | None = None,
    low_cpu_mem_usage: bool = False,
    activate: bool = True,
    inference_mode: bool = False,
) -> AdapterConfig:
    """A new adapter into a live model, with the numbers that PEFT would draw from the same seed.

    Args:
        model: the model, changed in place.
        config: what to adapt, and how; targeting is as lenient as PEFT's.
        name: the adapter's name.
        state_dict: a checkpoint whose keys say what to adapt, instead of the config.
        low_cpu_mem_usage: whether the leaves are left on the meta device, to be set later.
        activate: whether it becomes the only active adapter.
        inference_mode: whether its parameters are frozen.

    Returns:
        The config with the model's defaults filled in.

    Raises:
        ValueError: if the name is taken, `state_dict` comes with `target_parameters`, or the config fits nothing.
        KeyError: if the name cannot be the name of a module.

    Failure leaves the model as it was, the base weights that PiSSA and OLoRA change included.
    """
    state = _prepare(model, name)
    with unwrapped(model):
        if state_dict is not None:
            table, config = _sites_of_keys(model, config, state_dict)
        else:
            table = sites(model, config, strict=False)
            config = with_defaults(config, model)
        adapter, base = fresh(model, config, table, torch.device("meta") if low_cpu_mem_usage else None)
        own = dict(model.named_parameters(remove_duplicate=False))
    with Transaction() as change:
        _place(model, adapter, name, state, change, copy=False, activate=activate, inference_mode=inference_mode)
        for full, corrected in base.items():
            if not corrected.is_meta:
                old = own[full].data
                change.on_failure(lambda p=own[full], old=old: setattr(p, "data", old))
                own[full].data = corrected
    return config


def fresh(
    model: nn.Module, config: AdapterConfig, table: Sequence[Site], device: torch.device | None = None
) -> tuple[Adapter, dict[str, Tensor]]:
    """A new adapter with the numbers that PEFT would draw from torch's own generator.

    Args:
        model: the bare model, not changed.
        config: the config, with the model's defaults filled in.
        table: the sites.
        device: where the leaves are; by default where the weights are.

    Returns:
        The adapter, and the base weights that it changes, by name.
    """
    view = view_of(method_of(config))
    drawn: dict[str, Tensor] = {}

    def draw_of(site: Site, at: Any) -> Draw:
        draw = TorchDraw(None, site.dtype, device or site.device)
        if not draw.abstract:
            drawn.update(view.warm(site, at, draw) or {})
        return draw

    def shared_draw(site: Site) -> Draw:
        return TorchDraw(None, site.dtype, device or site.device)

    adapter, base = initialise(model, config, table, draw_of, shared_draw=shared_draw, strict=False)
    if drawn:
        adapter = adapter.replace(params={**adapter.params, SHARED: {**adapter.params[SHARED], **drawn}})
    return adapter, base


def materialize(model: nn.Module, adapter: Adapter, name: str = "default") -> nn.Module:
    """An adapter as PEFT's in-place module: the model's layers are wrapped, its class and methods stay.

    The layers have PEFT's layout, names and print, hold the adapter's values as parameters, and call the same pure
    functions as `fa.functional_call`. As in PEFT the base parameters are frozen, and the newest adapter of a kind (such
    as LoRA and DoRA) is the active one; call again with another name for several. `fa.dematerialize` undoes all of it.

    Args:
        model: the model, changed in place.
        adapter: the adapter; its tensors are copied.
        name: its name in the model.

    Returns:
        The same model.

    Raises:
        AdapterError: if the name is taken, or the adapter does not fit the model, or is a stack.
        TypeError: if it is no adapter.
        KeyError: if the name cannot be the name of a module.

    Example:
        >>> import torch
        >>> import funcadapt as fa
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2))
        >>> adapter = fa.init(model, fa.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
        >>> x = torch.randn(3, 4)
        >>> y = fa.functional_call(model, adapter, x)
        >>> torch.allclose(fa.materialize(model, adapter)(x), y)
        True
        >>> list(model.state_dict())
        ['0.base_layer.weight', '0.base_layer.bias', '0.lora_A.default.weight', '0.lora_B.default.weight']
        >>> fa.dematerialize(model)
        {'default': Adapter(lora, 1 site, r=2, 12 parameters, float32)}
        >>> list(model.state_dict())
        ['0.weight', '0.bias']
    """
    if not isinstance(adapter, Adapter):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"materialize: expected an Adapter, got {type(adapter).__name__}.")
    if adapter.members is not None:
        raise AdapterError("materialize: a stack is no single adapter. Materialise each of fa.unstack(stack) by name.")
    state = _prepare(model, name)
    with Transaction() as change:
        _place(model, adapter, name, state, change, copy=True)
    return model


def _prepare(model: nn.Module, name: str) -> ViewState:
    """The state, or a new one; a name that can be used."""
    if not name or "." in name:
        raise KeyError(f"An adapter's name becomes a module's name: it can't be empty or contain \".\", got {name!r}")
    state = view_state(model)
    if name in state.configs:
        raise AdapterError(
            f"The model has an adapter {name!r} already. Give the new one another name, or delete the old one first."
        )
    return state


def _place(
    model: nn.Module,
    adapter: Adapter,
    name: str,
    state: ViewState,
    change: Transaction,
    *,
    copy: bool,
    activate: bool = True,
    inference_mode: bool = False,
) -> None:
    root = root_of(model)
    with unwrapped(root):
        bound = bind(root, [("", adapter, None)], state_of(root))
        if copy:  # a value from elsewhere; what was just made fits
            check_shapes(bound)
            leaves = {path: adapter.leaves(path) for path in adapter.params}
            adapter = adapter.replace(config=method_of(adapter.config).describe(adapter.config, leaves))
        found = Bare(root, bound)
        parameters = dict(root.named_parameters(remove_duplicate=False))
    if not state.configs:
        state.requires_grad = {full: p.requires_grad for full, p in parameters.items()}
    placing = Placing(name, adapter, bound, found, state, change, copy, root)
    trained = [b.module._parameters[b.name] for b in bound.replaced if placing.is_trained_in_place(b.path)]
    placing.place()
    if not state.configs:  # the first one freezes the model
        for full, parameter in parameters.items():
            change.on_failure(lambda p=parameter, flag=state.requires_grad[full]: p.requires_grad_(flag))
            parameter.requires_grad_(False)
    change.set(state.configs, name, adapter.config)
    change.set(root.__dict__, STATE, state)
    view = view_of(method_of(adapter.config))
    for _, layer in layers(root):
        if layer.view is view:  # another kind of adapter stays active
            _switch(layer, name, change, activate, inference_mode)
    for _, wrapper in auxiliaries(root):
        active = wrapper.active_adapters
        if activate and active != [name]:
            change.on_failure(lambda w=wrapper, a=active: w.set_adapter(a))
            flags = [(parameter, parameter.requires_grad) for parameter in wrapper.parameters()]
            # the original module acts where the new adapter has nothing
            wrapper.set_adapter(name if name in wrapper.available_adapters else [])
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
        wrapper.set_requires_grad(name, activate and not inference_mode)
    if activate and getattr(adapter.config, "bias", "none") != "none":
        for parameter in trained:
            if parameter is not None:
                parameter.requires_grad_(not inference_mode)


def _switch(layer: AdapterLayer, name: str, change: Transaction, activate: bool, inference_mode: bool) -> None:
    """The newest adapter is the only active one; whether the others are trained does not change, as in PEFT."""
    layer.set_requires_grad(name, activate and not inference_mode)
    if activate:
        change.set(layer.__dict__, "_active_adapter", [name])
    elif "_active_adapter" not in layer.__dict__:
        layer._active_adapter = []


def _sites_of_keys(
    model: nn.Module, config: AdapterConfig, state_dict: Mapping[str, Any]
) -> tuple[Sequence[Site], AdapterConfig]:
    """The sites whose leaves a checkpoint has, with a warning where the config says something else."""
    if getattr(config, "target_parameters", None):
        raise AdapterError(
            "Trying to inject an adapter from a state_dict but the config uses `target_parameters`, whose names the "
            "keys do not tell. Inject it without the state_dict."
        )
    prefix = view_of(method_of(config)).prefix
    paths = {key.rsplit(f".{prefix}", 1)[0].removeprefix("_orig_mod.") for key in state_dict if f".{prefix}" in key}
    paths = {p.removeprefix("base_model.model.").replace(".base_layer.out_proj", ".out_proj") for p in paths}
    known = dict(model.named_modules())  # pyright: ignore
    inner = {path for path in paths if isinstance(known.get(path.rpartition(".")[0]), nn.MultiheadAttention)}
    chosen = sorted(path for path in paths - inner if path in known)
    if not chosen:
        raise TargetError(
            f"The keys of the state_dict name no module of the model: {sorted(paths)[:3]}."
            + did_you_mean(next(iter(sorted(paths)), ""), known)
        )
    exact: Any = config
    table = sites(model, dataclasses.replace(exact, target_modules=chosen, exclude_modules=None), strict=False)
    if exact.target_modules is not None:
        try:
            expected = {site.owner for site in sites(model, config, strict=False)}
        except (AdapterError, ValueError):
            expected = set[str]()
        _warn_if_different(expected, {site.owner for site in table})
    else:
        config = dataclasses.replace(exact, target_modules=chosen)
    return table, config


def _warn_if_different(config: Iterable[str], keys: Iterable[str]) -> None:
    more, less = sorted(set(config) - set(keys)), sorted(set(keys) - set(config))
    if not more and not less:
        return
    message = (
        "While injecting the PEFT adapters, an inconsistency was discovered between the PEFT config and the provided "
        "state_dict. This is not necessarily an issue and can be ignored if this was the intent. "
    )
    if more:
        message += f"The PEFT config contained these additional target modules: {more}. "
    if less:
        message += f"The state_dict contained these additional target modules: {less}. "
    warnings.warn(message, RuntimeWarning, stacklevel=5)
