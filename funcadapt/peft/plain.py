"""What PEFT's low-level API lacks, as functions over any live model; `funcadapt.peft.functional` has all of them."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

from torch import nn

from funcadapt import algebra
from funcadapt.errors import AdapterError, AdapterFileError
from funcadapt.keys import PREFIX
from funcadapt.peft.config import PeftConfig
from funcadapt.peft.undoing import as_they_are, undone_on_failure
from funcadapt.peft.utils.save_and_load import config_of, get_peft_model_state_dict, set_peft_model_state_dict
from funcadapt.peft.utils.weights import load_peft_weights, write_adapter
from funcadapt.view import adapter_of, materialize, merging, state
from funcadapt.view.entries import Entries
from funcadapt.view.walking import layers, root_of, unwrapped, view_state

_M = TypeVar("_M", bound=nn.Module)


def save_pretrained(
    model: Any,
    directory: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    state_dict: Mapping[str, Any] | None = None,
    save_embedding_layers: bool | Literal["auto"] = "auto",
) -> None:
    """Write one adapter of a model as a PEFT checkpoint, which PEFT, `from_pretrained` and `fa.load` read.

    Args:
        model: any model with adapters in it.
        directory: the folder, made if need be. Both files are written, or none.
        adapter_name: the adapter's name.
        state_dict: the model's state dict, if it had to be gathered first.
        save_embedding_layers: as in `get_peft_model_state_dict`.

    Raises:
        KeyError: if there is no such adapter.
        ValueError: if the directory is a file.

    Example:
        >>> import tempfile, torch
        >>> import funcadapt as fa
        >>> from funcadapt.peft import LoraConfig, functional
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2))
        >>> _ = functional.inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), model)
        >>> folder = tempfile.mkdtemp()
        >>> functional.save_pretrained(model, folder)
        >>> fa.load(folder)
        Adapter(lora, 1 site, r=2, 12 parameters, float32)
    """
    tensors = get_peft_model_state_dict(model, state_dict, adapter_name, save_embedding_layers=save_embedding_layers)
    config = copy.deepcopy(config_of(model, adapter_name))
    config.inference_mode = True
    base = root_of(model)
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = getattr(base, "name_or_path", None) or None
    mapping = None
    if config.task_type is None:
        mapping = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    prefixed = {key if key.startswith(PREFIX) else PREFIX + key: value for key, value in tensors.items()}
    write_adapter(directory, prefixed, config, mapping)


def from_pretrained(
    model: _M,
    directory: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    is_trainable: bool = False,
    low_cpu_mem_usage: bool = False,
    autocast_adapter_dtype: bool = True,
    key_mapping: Mapping[str, str] | None = None,
    device: str | None = None,
    **hub: Any,
) -> _M:
    """Put a saved adapter into a model, in place. It becomes the only active one.

    Args:
        model: any model.
        directory: the adapter's folder, or its repository on the Hub.
        adapter_name: the name that it gets.
        is_trainable: whether it is trained further; otherwise it is frozen.
        low_cpu_mem_usage: whether no weights are made before those in the file.
        autocast_adapter_dtype: whether its tensors in half precision (or less) become float32.
        key_mapping: regular expressions by which keys of the file are renamed.
        device: where the file is read to, as in `load_peft_weights`.
        **hub: `subfolder`, and what `huggingface_hub.hf_hub_download` takes.

    Returns:
        The same model.

    Raises:
        AdapterFileError: if the file has other keys than the adapter. The model is unchanged then.
        ValueError: if a file is missing, or the config fits nothing in the model. The model is unchanged then.
        RuntimeError: if a tensor does not fit. The model is unchanged then.
    """
    from funcadapt.peft.functional import inject_adapter_in_model

    config = PeftConfig.from_pretrained(os.fspath(directory), **hub)
    config.inference_mode = not is_trainable
    tensors = load_peft_weights(directory, device, key_mapping, **hub)
    with undone_on_failure(model, adapter_name):
        inject_adapter_in_model(config, model, adapter_name, low_cpu_mem_usage)
        own = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False).keys()
        result = set_peft_model_state_dict(model, tensors, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
        entries = Entries(model, adapter_name)
        every = [*(entry.keys for entry in entries.own), entries.shared]
        held = {key for keys in every for _, key in keys.values()}
        missing = [key for key in result.missing_keys if key in held or key in own]
        # with bias="all" PEFT saves some biases under names that it cannot read
        unknown = [key for key in result.unexpected_keys if key not in own and key.removeprefix(PREFIX) not in own]
        for what, keys in (("lacks", missing), ("has the unknown key", unknown)):
            if keys:
                raise AdapterFileError(
                    f"{os.fspath(directory)} {what} {keys[0]!r} ({len(keys)} such keys). Was the adapter made for "
                    "another model, or another config?"
                )
        state.cast_adapter_dtype(model, adapter_name, autocast_adapter_dtype)
    return model


def disable_adapters(model: nn.Module) -> contextlib.AbstractContextManager[nn.Module]:
    """The model without its adapters for the duration of a block; afterwards everything is as it was.

    Args:
        model: any model with adapters in it.

    Returns:
        A context manager.

    Example:
        >>> import torch
        >>> from funcadapt.peft import LoraConfig, functional
        >>> bare = torch.nn.Linear(4, 2)
        >>> config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        >>> model, x = functional.inject_adapter_in_model(config, torch.nn.Sequential(bare)), torch.randn(3, 4)
        >>> with functional.disable_adapters(model):
        ...     torch.equal(model(x), bare(x))
        True
        >>> torch.equal(model(x), bare(x))
        False
    """
    return state.disabled(model)


def merge_adapters(model: nn.Module, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
    """Write adapters into the base weights; `unmerge_adapters` takes them out again.

    Args:
        model: any model with adapters in it.
        adapter_names: which; None for the active ones.
        safe_merge: whether to refuse results that are not finite.

    Raises:
        ValueError: if there is no such adapter, or a weight cannot be merged into. Nothing is merged then.
    """
    state.check_names(model, adapter_names or ())
    merging.merge(model, adapter_names, safe_merge)


def unmerge_adapters(model: nn.Module) -> None:
    """Take all merged adapters out of the base weights.

    Args:
        model: any model with adapters in it.
    """
    merging.unmerge(model)


def merge_and_unload(
    model: nn.Module, adapter_names: Sequence[str] | None = None, safe_merge: bool = False
) -> nn.Module:
    """Write adapters into the base weights, for good, and take everything else of them out of the model.

    Args:
        model: any model with adapters in it.
        adapter_names: which; None for the active ones.
        safe_merge: whether to refuse results that are not finite.

    Returns:
        The bare model: the same one, or the one in the `PeftModel`.

    Raises:
        ValueError: if there is no such adapter, or a weight cannot be merged into. Nothing is changed then.

    Example:
        >>> import torch
        >>> from funcadapt.peft import LoraConfig, functional
        >>> config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        >>> model = functional.inject_adapter_in_model(config, torch.nn.Sequential(torch.nn.Linear(4, 2)))
        >>> x = torch.randn(3, 4)
        >>> y = model(x)
        >>> torch.allclose(functional.merge_and_unload(model)(x), y, atol=1e-6)
        True
        >>> model
        Sequential(
          (0): Linear(in_features=4, out_features=2, bias=True)
        )
    """
    state.check_names(model, adapter_names or ())
    return merging.unload(model, merge_first=True, safe_merge=safe_merge, names=adapter_names)


def unload(model: nn.Module) -> nn.Module:
    """Take the adapters out of a model, unmerged. `fa.dematerialize` also gives them back, as values.

    Args:
        model: any model with adapters in it.

    Returns:
        The bare model.
    """
    return merging.unload(model)


def add_weighted_adapter(
    model: nn.Module,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str = "svd",
    **options: Any,
) -> None:
    """Put the weighted combination of adapters into the model as a new one. Which ones are active does not change.

    Args:
        model: any model with adapters in it.
        adapters: their names.
        weights: a weight for each.
        adapter_name: the new adapter's name.
        combination_type: how they are combined, see `fa.algebra.combine`.
        **options: `svd_rank`, `density`, `seed` and the other options of `fa.algebra.combine`.

    Raises:
        AdapterError: if there is no such adapter, the new name is taken, the adapters do not go together, or any is
            merged. It is a ValueError.

    Example:
        >>> import torch
        >>> from funcadapt.peft import LoraConfig, functional
        >>> config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        >>> model = functional.inject_adapter_in_model(config, torch.nn.Sequential(torch.nn.Linear(4, 2)), "a")
        >>> x = torch.randn(3, 4)
        >>> y = model(x)
        >>> functional.add_weighted_adapter(model, ["a"], [1.0], "copy")
        >>> functional.set_adapter(model, "copy")
        >>> torch.allclose(model(x), y, atol=1e-6)
        True
    """
    merged = sorted({name for _, layer in layers(model) for name in layer.merged_adapters})
    if merged:
        raise AdapterError(f"add_weighted_adapter: {merged} are merged. Call unmerge_adapters(model) first.")
    root = root_of(model)
    values = [adapter_of(root, name).map(lambda leaf: leaf.detach()) for name in adapters]
    with unwrapped(root):
        made = algebra.combine(values, weights, combination_type, model=root, **options)
    active = state.active_adapters(root)
    known = state.parts(root)
    with as_they_are(known):
        materialize(root, made, adapter_name)
    state.set_requires_grad(root, adapter_name, False)
    for part in state.parts(root):
        if part not in known:
            part.set_adapter([name for name in active if name in part._get_available_adapters()])
    configs: Any = getattr(root, "peft_config", None)
    if configs is not None:
        configs[adapter_name] = PeftConfig.from_funcadapt(view_state(root).configs[adapter_name])
