"""PEFT's functions for the inits CorDA and LoRA-GA, over `funcadapt.recipes.inits`."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from funcadapt._torch import linalg
from funcadapt.layer import Layer
from funcadapt.parts import lora_inits
from funcadapt.recipes.inits import context, gradients
from funcadapt.recipes.inits.common import LINEAR
from funcadapt.sites import Site
from funcadapt.targeting import sites


def _linear(model: nn.Module, config: Any) -> list[Site]:
    return [site for site in sites(model, config) if site.kind in LINEAR]


# -- CorDA ------------------------------------------------------------------------------------------------


@dataclass
class CordaEigens:
    """What CorDA decomposed a weight into, cut to the rank: U S V^T, V times the inverse of the inputs' moments."""

    S_WC: Tensor
    U_WC: Tensor
    V_WC: Tensor


def _targets(model: nn.Module, lora_config: Any) -> dict[str, tuple[nn.Module, Site, Any]]:
    config = lora_config.to_funcadapt()
    config = config.for_model(getattr(getattr(model, "config", None), "model_type", None))
    return {s.path: (model.get_submodule(s.path), s, config.at(s.path)) for s in _linear(model, config)}


def _moments(model: nn.Module, paths: Iterable[str], run_model: Callable[[], None]) -> dict[str, Tensor]:
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    handles: list[Any] = []
    model.eval()
    for path in paths:

        def hook(_: nn.Module, args: tuple[Any, ...], path: str = path) -> None:
            x: Tensor = args[0].detach()
            found = context.covariance(x.reshape(-1, x.shape[-1]))
            sums[path] = sums[path] + found if path in sums else found
            counts[path] = counts.get(path, 0) + 1

        handles.append(model.get_submodule(path).register_forward_pre_hook(hook))  # pyright: ignore
    try:
        run_model()
    finally:
        for handle in handles:
            handle.remove()
    return {path: total / counts[path] for path, total in sums.items()}


def _exists(file: str | None) -> bool:
    return file is not None and os.path.exists(file) and os.path.getsize(file) > 0


def _write(file: str | None, tensors: Mapping[str, Tensor]) -> None:
    if file is not None:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        torch.save(dict(tensors), file)


@torch.no_grad()
def preprocess_corda(
    model: nn.Module,
    lora_config: Any,
    run_model: Callable[[], None] | None = None,
    hooked_model: nn.Module | None = None,
) -> None:
    """Decompose the weights for CorDA, before `get_peft_model`, with data that `run_model` runs through the model.

    Args:
        model: the model. Its layers get an attribute `eigens` until the adapter is made.
        lora_config: the config with `corda_config`.
        run_model: runs the model on data.
        hooked_model: the model that is run, if it is another one.

    Raises:
        ValueError: if there is neither data nor a file of it.
    """
    given = lora_config.corda_config
    table = _targets(model, lora_config)
    found: dict[str, CordaEigens] = {}
    if _exists(given.cache_file):
        cache = torch.load(given.cache_file, map_location="cpu", weights_only=True)
        for path in table:
            found[path] = CordaEigens(*(cache[f"{path}.eigens.{name}"] for name in ("S_WC", "U_WC", "V_WC")))
    else:
        if _exists(given.covariance_file):
            moments = torch.load(given.covariance_file, map_location="cpu", weights_only=True)
        elif run_model is None:
            raise ValueError("run_model must be specified when covariance file and cache file aren't built.")
        else:
            moments = _moments(model if hooked_model is None else hooked_model, table, run_model)
            _write(given.covariance_file, moments)
        for path, (module, site, at) in table.items():
            weight = Layer(site, module, at).weight.detach().float()
            a, b = context.decomposed(weight, moments[path].to(weight), at.r, 1.0, given.corda_method)
            # A = S^(1/2) V^T, B = U S^(1/2), the columns of U of norm 1
            root: Tensor = linalg.vector_norm(b, dim=0)
            found[path] = CordaEigens(root.square(), b / root, (a / root[:, None]).T)
        named = {f"{p}.eigens.{n}": getattr(e, n) for p, e in found.items() for n in ("S_WC", "U_WC", "V_WC")}
        _write(given.cache_file, named)
    for path, (module, _, _) in table.items():
        owner: Any = module
        owner.eigens = found[path]
        lora_inits.prepare(owner.weight, _from_eigens(weakref.ref(module)))


def _from_eigens(module: weakref.ref[nn.Module]) -> Callable[[Any, float], tuple[Tensor, Tensor]]:
    def factors(config: Any, scaling: float) -> tuple[Tensor, Tensor]:
        owner: Any = module()
        eigens = owner.eigens
        if eigens.S_WC.shape[0] != config.r:
            raise ValueError(
                f"Matrix S size mismatch: {tuple(eigens.S_WC.shape)} vs. ({config.r},). Please make sure the "
                "`lora_config` and `model` argument of `preprocess_corda` is consistent with `get_peft_model`."
            )
        del owner.eigens
        root = (eigens.S_WC / scaling).sqrt()
        return root[:, None] * eigens.V_WC.T, eigens.U_WC * root

    return factors


# -- LoRA-GA ----------------------------------------------------------------------------------------------


def preprocess_loraga(
    model: nn.Module, lora_config: Any, train_step: Callable[[], None], cache_file: str | None = None
) -> None:
    """Take the gradients for LoRA-GA, before `get_peft_model`, from what `train_step` does with the model.

    Args:
        model: the model. Its layers get an attribute `_peft_loraga_grad` until the adapter is made.
        lora_config: the config with `lora_ga_config`.
        train_step: runs the model forward and backward, as often as it likes: the mean over the backward passes counts.
        cache_file: where the gradients are kept.

    Raises:
        ValueError: if the config is missing, or there is no linear layer among the targets.
    """
    if lora_config.lora_ga_config is None:
        raise ValueError(
            "If you want to use LoRA-GA, please initialize the LoraConfig with init_lora_weights='lora_ga' and "
            "lora_ga_config=LoraGAConfig(...)."
        )
    table = _targets(model, lora_config)
    if not table:
        raise ValueError("No supported layers found for LoRA-GA initialization: it needs nn.Linear or Conv1D layers.")
    if _exists(cache_file):
        cache = torch.load(str(cache_file), map_location="cpu", weights_only=True)
        found = {path: cache[f"{path}._peft_loraga_grad"] for path in table}
    else:
        found = _mean_gradients(model, {path: module for path, (module, _, _) in table.items()}, train_step)
        _write(cache_file, {f"{path}._peft_loraga_grad": g for path, g in found.items()})
    for path, gradient in found.items():
        module, site, _ = table[path]
        owner: Any = module
        owner._peft_loraga_grad = gradient.to(owner.weight.device)
        lora_inits.prepare(owner.weight, _from_gradient(weakref.ref(module), site.transposed))


def _mean_gradients(model: nn.Module, modules: Mapping[str, Any], train_step: Callable[[], None]) -> dict[str, Tensor]:
    training, flags = model.training, {p: p.requires_grad for p in model.parameters()}
    kept = {path: m.weight.grad for path, m in modules.items()}
    counts = dict.fromkeys(modules, 0)
    handles: list[Any] = []
    model.train().requires_grad_(False)
    try:
        for path, module in modules.items():
            module.weight.requires_grad_(True)
            module.weight.grad = None

            def count(_: Tensor, path: str = path) -> None:
                counts[path] += 1

            handles.append(module.weight.register_hook(count))
        with torch.enable_grad():
            train_step()
        return {p: m.weight.grad.detach() / counts[p] for p, m in modules.items() if counts[p]}
    finally:
        for handle in handles:
            handle.remove()
        for path, module in modules.items():
            module.weight.grad = kept[path]
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        model.train(training)


def _from_gradient(module: weakref.ref[nn.Module], transposed: bool) -> Callable[[Any, float], tuple[Tensor, Tensor]]:
    def factors(config: Any, scaling: float) -> tuple[Tensor, Tensor]:
        owner: Any = module()
        gradient, weight = owner._peft_loraga_grad, owner.weight.detach()
        if transposed:
            gradient, weight = gradient.T, weight.T
        if config.lora_ga_config is None:
            raise ValueError(
                "lora_ga_config must be provided when init_lora_weights='lora_ga'. Please pass "
                "lora_ga_config=LoraGAConfig(...) to LoraConfig."
            )
        del owner._peft_loraga_grad
        given = gradients.settings(gradients.Settings, config.lora_ga_config, "lora_ga_config")
        return gradients.decomposed(gradient, weight, config.r, scaling, given)

    return factors
