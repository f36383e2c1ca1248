"""The classes of layers, generated: one family for every PEFT package, one class in it for every kind of layer."""

from __future__ import annotations

import functools
from typing import Any

from funcadapt.errors import AdapterError, did_you_mean
from funcadapt.method import Method, View, methods
from funcadapt.view.holding import DERIVED, is_derived, standard_containers, view_of
from funcadapt.view.layer import AdapterLayer
from funcadapt.view.own import OwnModule, OwnTokens
from funcadapt.view.through import AttentionLayer, ParameterLayer
from funcadapt.view.tokens import TrainableTokensLayer

_NAMES = {
    "linear": "Linear",
    "hf_conv1d": "Linear",
    "embedding": "Embedding",
    "conv1d": "Conv1d",
    "conv2d": "Conv2d",
    "conv3d": "Conv3d",
    "mha": "MultiheadAttention",
    "parameter": "ParamWrapper",
    "experts": "ParamWrapper",
}
_MIXINS: dict[str, type[AdapterLayer]] = {
    "mha": AttentionLayer,
    "parameter": ParameterLayer,
    "experts": ParameterLayer,
}


def packages() -> tuple[str, ...]:
    """The names of the packages under `peft.tuners` for which there are methods."""
    return tuple(dict.fromkeys(view_of(method).package for method in methods()))


def view_named(package: str) -> View:
    """The view of a package's methods.

    Args:
        package: its name, "lora".

    Returns:
        The view.

    Raises:
        AdapterError: if there is none; near matches are listed.
    """
    for method in methods():
        if view_of(method).package == package:
            return view_of(method)
    raise AdapterError(f"No method has the package {package!r}.{did_you_mean(package, packages())}")


def family(package: str) -> type[Any]:
    """The class that all layers of a package derive from, e.g. `LoraLayer` for "lora".

    Args:
        package: the package's name.

    Returns:
        The class.

    Example:
        >>> import funcadapt as fa
        >>> family("lora").__name__
        'LoraLayer'
    """
    view = view_named(package)
    own = next((m for m in methods() if view_of(m) is view and (m.whole or m.rows)), None)
    if own is None:
        return _family(view)
    return own_class(own) if own.whole else TrainableTokensLayer


@functools.cache
def own_class(method: Method) -> type[Any]:
    """The class of what holds the adapters of a method without layers.

    Args:
        method: the method.

    Returns:
        The class, `peft.tuners.ln_tuning.LNTuningLayer` for LN tuning.

    Example:
        >>> import funcadapt as fa
        >>> own_class(fa.method_of(fa.LNTuningConfig())).__name__
        'LNTuningLayer'
    """
    if method.rows:
        return OwnTokens
    view = view_of(method)
    doc = f"A module that is trained in full, with the copies of {view.name}, see OwnModule."
    names = {"adapter_layer_names": (method.whole,), "kept_as": method.whole}
    return _class(f"{view.name}Layer", (OwnModule,), view, doc, **names)


@functools.cache
def _family(view: View) -> type[AdapterLayer]:
    others = (*view.attributes, *view.derived, *((view.dropout,) if view.dropout else ()))
    others += (DERIVED,) if is_derived(view) else ()
    return _class(
        f"{view.name}Layer",
        (family(view.extends) if view.extends else AdapterLayer,),
        view,
        f"A layer with adapters of {view.name}, see AdapterLayer.",
        adapter_layer_names=standard_containers(view),
        other_param_names=others,
    )


def layer_class(method: Method, kind: str) -> type[AdapterLayer]:
    """The class of the layers that wrap a kind of layer for a method.

    Args:
        method: the method.
        kind: the site's kind.

    Returns:
        The class, `peft.tuners.lora.layer.Linear` for LoRA at a linear layer.

    Example:
        >>> import funcadapt as fa
        >>> layer_class(fa.method_of(fa.LoraConfig()), "conv2d").__name__
        'Conv2d'
    """
    view = view_of(method)
    return _layer_class(view, view.classes.get(kind, _NAMES[kind]), _MIXINS.get(kind))


@functools.cache
def _layer_class(view: View, name: str, mixin: type[AdapterLayer] | None) -> type[AdapterLayer]:
    bases = (_family(view),) if mixin is None else (mixin, _family(view))
    return _class(name, bases, view, f"{name} with adapters of {view.name}, see AdapterLayer.")


def _class(name: str, bases: tuple[type[Any], ...], view: View, doc: str, **attributes: Any) -> type[Any]:
    # the module under which code written for PEFT finds it, and pickle too: funcadapt.peft makes it on import
    module = f"funcadapt.peft.tuners.{view.package}.layer"
    own = {"__module__": module, "__qualname__": name, "__doc__": doc, "view": view}
    return type(name, bases, {**own, **attributes})
