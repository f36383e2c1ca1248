"""What the generated modules have: tables from names to functions that get the object, made of what is registered.

Nothing is imported before it is asked for, and a method that is registered later is in the tables at once.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from funcadapt.method import Method, methods
from funcadapt.peft import absent, lora_parts
from funcadapt.peft.homes import HOMES
from funcadapt.peft.method_configs import config_class, config_named
from funcadapt.view.classes import family, layer_class
from funcadapt.view.holding import view_of
from funcadapt.view.switches import TunerLayer

Table = dict[str, Callable[[], Any]]

_AVAILABILITY = {  # function of peft.import_utils -> the package that it is about
    "is_aqlm_available": "aqlm",
    "is_bnb_4bit_available": "bitsandbytes",
    "is_bnb_available": "bitsandbytes",
    "is_diffusers_available": "diffusers",
    "is_eetq_available": "eetq",
    "is_gptqmodel_available": "gptqmodel",
    "is_hqq_available": "hqq",
    "is_inc_available": "neural_compressor",
    "is_optimum_available": "optimum",
    "is_te_available": "transformer_engine",
    "is_torchao_available": "torchao",
}


_EVA = (  # of peft.tuners.lora.eva
    "forward_fn_dict",
    "get_eva_state_dict",
    "initialize_lora_eva_weights",
    "prepare_layer_inputs_fn_language_modeling",
    "prepare_model_inputs_fn_language_modeling",
)


def at(module: str, *names: str) -> Table:
    """Names that are in a module, imported when they are asked for.

    Args:
        module: the module; relative to this package if it starts with a dot.
        *names: the names.

    Returns:
        The table.
    """
    return {name: partial(_get, module, name) for name in names}


def _get(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module, "funcadapt.peft"), name)


def tuners() -> Table:
    """What `peft.tuners` has: the configs and tuners of all methods, and some functions; no layers."""
    return _tuners(methods())


@functools.lru_cache(maxsize=4)
def _tuners(registered: tuple[Method, ...]) -> Table:
    table = {name: get for package in packages() for name, get in of_package(package).items()}
    layers = {row.layer for row in absent.ROWS} | {f"{view_of(m).name}Layer" for m in registered}
    layers |= {name for package in packages() for name in _layer_classes(package)}
    return {**{name: get for name, get in table.items() if name not in layers}, **at(".mixed_model", "MixedModel")}


def packages() -> tuple[str, ...]:
    """The packages under `peft.tuners`: PEFT's, and those of other registered methods."""
    known = (row.package for row in absent.ROWS)
    return tuple(dict.fromkeys((*known, *(view_of(method).package for method in methods()))))


def of_package(package: str) -> Table:
    """What `peft.tuners.<package>` has, and all modules in it.

    Args:
        package: its name.

    Returns:
        The table. What is registered comes from there; the rest of PEFT's names are stand-ins that raise when used.
    """
    return _of_package(package, methods())


@functools.lru_cache(maxsize=128)
def _of_package(package: str, registered: tuple[Method, ...]) -> Table:
    others = absent.others(package)
    table: Table = {}
    if row := absent.row_of(package):
        table |= {name: partial(_absent, name, package) for name in (row.model, row.layer, *others) if name}
        table[row.config] = partial(config_named, row.config)
    table |= {name: partial(absent.enumeration, name) for name, (home, _) in absent.ENUMS.items() if home == package}
    if package == "lora":
        table |= {name: partial(getattr, lora_parts, name) for name in lora_parts.CLASSES}
        table |= at(".lora_conversion", "convert_to_lora", "save_as_lora") | at(
            ".intruders", "reduce_intruder_dimension"
        )
        table |= at(".arrow_model", "create_arrow_model")
        table |= at(".eva", *_EVA)
        table |= at(".data_inits", "CordaEigens", "preprocess_corda", "preprocess_loraga")
    if package == "xlora":
        table |= at(".xlora_model", "XLoraModel")
    if package == "shadow":
        table |= at(".shadow_model", "ShadowModel", "ShadowLayer", "DetachedShadowModel")
    if package == "trainable_tokens":
        table |= at("funcadapt.view.auxiliary", "TrainableTokensLayer")
    for method in (m for m in registered if view_of(m).package == package):
        # what PEFT has in the package beside classes of configs, tuners and layers, the method's file may have, too
        source = sys.modules[method.init.__module__]
        table |= {name: partial(getattr, source, name) for name in others if hasattr(source, name)}
        name = view_of(method).name
        table[method.config.__name__] = partial(config_class, method.config)
        table[f"{name}Model"] = partial(_tuner_class, package)
        table[f"{name}Layer"] = partial(family, package)
    return table | _layer_classes(package)


def _tuner_class(package: str) -> type[Any]:
    from funcadapt.peft.tuner import tuner_class

    return tuner_class(package)


def _layer_classes(package: str) -> Table:
    """The classes of layers by name: Linear, Embedding, Conv2d and so on."""
    mine = [method for method in methods() if view_of(method).package == package]
    kinds = [(method, kind) for method in mine for kind in sorted(method.kinds)]
    return {layer_class(method, kind).__name__: partial(layer_class, method, kind) for method, kind in kinds}


@functools.cache
def _absent(name: str, package: str) -> Any:
    containers: dict[str, Any] = {"adapter_layer_names": (), "other_param_names": ()} if name.endswith("Layer") else {}
    return absent.stand_in(name, package, **containers)


def in_tuners_utils() -> Table:
    """What `peft.tuners.tuners_utils` has."""
    return {
        **at(".tuner", "BaseTuner"),
        "BaseTunerLayer": lambda: TunerLayer,
        **at(".functional", "cast_adapter_dtype", "delete_adapter", "set_adapter", "set_requires_grad"),
        **at(".targets", "check_target_module_exists"),
    }


def in_peft_model() -> Table:
    """What `peft.peft_model` has."""
    return {name: get for home in ("model", "tasks", "status") for name, get in at(f".{home}", *HOMES[home]).items()}


def in_import_utils() -> Table:
    """What `peft.import_utils` has: functions that say whether a package is there."""
    return {name: partial(_asks_for, package) for name, package in _AVAILABILITY.items()}


@functools.cache
def _asks_for(package: str) -> Callable[[], bool]:
    return partial(_is_installed, package)


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
