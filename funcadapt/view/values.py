"""Adapters of a live model as values, and the way back to the bare model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from funcadapt._torch import named_modules
from funcadapt.adapter import Adapter
from funcadapt.binding import TOKEN_INDICES, TOKENS
from funcadapt.errors import AdapterError, did_you_mean
from funcadapt.method import method_of
from funcadapt.sharing import SHARED
from funcadapt.tying import tie
from funcadapt.view.auxiliary import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TokensHolder
from funcadapt.view.holding import DERIVED
from funcadapt.view.layer import AdapterLayer
from funcadapt.view.merging import merged_parts
from funcadapt.view.walking import auxiliaries, bare, layers, root_of, set_view_state, unwrapped, view_state, wrapped


def adapter_of(model: nn.Module, name: str) -> Adapter:
    """One adapter of a model as a value. Its tensors are the live ones: `.map(torch.clone)` gives a snapshot.

    Args:
        model: the model.
        name: the adapter's name.

    Returns:
        The adapter, with the config that its leaves say.

    Raises:
        AdapterError: if there is no adapter of that name; near matches are listed.
    """
    state = view_state(model)
    if name not in state.configs:
        raise AdapterError(f"Adapter {name} not found.{did_you_mean(name, state.configs)}")
    root, config = root_of(model), state.configs[name]
    method = method_of(config)
    params: dict[str, dict[str, Tensor]] = {}
    buffers: dict[str, dict[str, Tensor]] = {}
    owners: dict[int, str] = {}
    for layer in _innermost_first(root):
        if name in layer.adapters:
            leaves, path = layer.leaves(name), layer.site.path
            if layer.site.experts:
                one = layer.site.experts == 1  # then there is no expert axis in a value, see binding.bind
                for leaf, t in leaves.items():
                    leaves[leaf] = t[0] if t.ndim and (one or leaf in method.shared) else t
            frozen = layer.view.frozen | layer.view.buffers | set(layer.view.derived)
            frozen |= {a.leaf for a in layer.addresses_of(name, layer.adapters[name]) if a.container == DERIVED}
            for leaf, tensor in leaves.items():
                if leaf in method.tied:
                    first = owners.setdefault(id(tensor), path)
                    if first != path:
                        buffers.setdefault(path, {})[tie(leaf, first)] = torch.zeros((), device=tensor.device).long()
                        continue
                tree = buffers if leaf in frozen or method.is_constant(leaf) else params
                tree.setdefault(SHARED if leaf in method.shared or leaf in method.inputs else path, {})[leaf] = tensor
    with unwrapped(root):
        paths = {id(module): path for path, module in named_modules(root)}
        owners_of_biases = _bias_owners(root, config, {**buffers, **params})
        biases = [(path, root.get_submodule(path)._parameters["bias"]) for path in owners_of_biases]
    for _, wrapper in auxiliaries(root):
        if name in wrapper.available_adapters:
            _auxiliary_leaves(wrapper, name, paths, params, buffers)
    for path, bias in biases:
        if bias is not None and not any(path == p or path.startswith(f"{p}.") for p in _saved(root, name, paths)):
            params.setdefault(path, {})["bias"] = bias
    if SHARED in params:
        params = {SHARED: params.pop(SHARED), **params}
    found = Adapter(params, {path: leaves for path, leaves in buffers.items() if leaves}, config)
    return found.replace(config=method.describe(config, {path: found.leaves(path) for path in params}))


def _innermost_first(root: nn.Module) -> list[AdapterLayer]:
    """Every layer. Those of several parameters of one module nest, and a file says by the depth which is which."""
    nested: dict[int, list[AdapterLayer]] = {}
    for _, layer in layers(root):
        nested.setdefault(id(layer.get_base_layer()), []).insert(0, layer)
    return [layer for group in nested.values() for layer in group]


def _bias_owners(root: nn.Module, config: Any, adapted: Mapping[str, Any]) -> list[str]:
    which = getattr(config, "bias", "none")
    if which == "none":
        return []
    owners = [path for path, module in named_modules(root) if module._parameters.get("bias") is not None]
    return owners if which == "all" else [path for path in owners if path in adapted]


def _saved(root: nn.Module, name: str, paths: Mapping[int, str]) -> list[str]:
    return [
        paths[id(bare(wrapper))]
        for _, wrapper in auxiliaries(root)
        if isinstance(wrapper, ModulesToSaveWrapper) and name in wrapper.available_adapters
    ]


def _auxiliary_leaves(
    wrapper: AuxiliaryTrainingWrapper,
    name: str,
    paths: Mapping[int, str],
    params: dict[str, dict[str, Tensor]],
    buffers: dict[str, dict[str, Tensor]],
) -> None:
    path = paths[id(bare(wrapper))]
    if isinstance(wrapper, TokensHolder):
        layer: Any = wrapper.token_adapter
        if layer.tied_adapter is None:
            params.setdefault(path, {})[TOKENS] = layer.trainable_tokens_delta[name]
            index = torch.tensor(list(layer.token_indices[name]), dtype=torch.long)
            buffers.setdefault(path, {})[TOKEN_INDICES] = index.to(layer.trainable_tokens_delta[name].device)
        elif wrapper.kept_as:
            device = layer.trainable_tokens_delta[name].device
            first = tie(TOKENS, paths[id(layer.tied_adapter.get_base_layer())])
            buffers.setdefault(path, {})[first] = torch.zeros((), dtype=torch.long, device=device)
        return
    assert isinstance(wrapper, ModulesToSaveWrapper)
    copy = wrapper.copy_of(name)
    for below, module in named_modules(copy):
        where = f"{path}.{below}" if below else path
        for short, parameter in module._parameters.items():
            if parameter is not None:
                params.setdefault(where, {})[short] = parameter
        for short, buffer in module._buffers.items():
            if buffer is not None and short not in module._non_persistent_buffers_set:
                buffers.setdefault(where, {})[short] = buffer


def dematerialize(model: nn.Module) -> dict[str, Adapter]:
    """Take all adapters out of a model, which becomes what it was before the first came.

    Merged weights are restored, and so are trained biases and the parameters' `requires_grad`. (What an init such as
    PiSSA took out of the base weights stays out: the adapter stands for the rest.)

    Args:
        model: the model, changed in place.

    Returns:
        The adapters by name, in the order in which they came.
    """
    root, state = root_of(model), view_state(model)
    for part in merged_parts(root):
        part.unmerge()
    adapters = {name: adapter_of(root, name).map(lambda t: t.detach()) for name in state.configs}
    if state.biases:  # they are the model's own parameters
        adapters = {name: adapter.map(lambda t: t.clone()) for name, adapter in adapters.items()}
    remove_wrappers(root)
    for full, flag in state.requires_grad.items():
        root.get_parameter(full).requires_grad_(flag)
    for full, value in state.biases.items():
        root.get_parameter(full).data.copy_(value)
    return adapters


def remove_wrappers(root: nn.Module) -> None:
    """Put the bare modules back into their places, and forget the view.

    Args:
        root: the module into which adapters were injected.
    """
    state = view_state(root)
    for parent, name, wrapper in wrapped(root):
        parent._modules[name] = bare(wrapper)
    for path, switch in state.fast_paths.items():
        root.get_submodule(path).__dict__["activation_relu_or_gelu"] = switch
    set_view_state(root, None)
    root.__dict__.pop("peft_config", None)
