"""`convert_to_lora` and `save_as_lora`: an adapter in a model as the checkpoint of a LoRA, by `funcadapt.convert`."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from funcadapt._torch import named_modules
from funcadapt.adapter import Adapter
from funcadapt.approximation import Change, change_of, new_leaves
from funcadapt.binding import TOKEN_INDICES
from funcadapt.errors import AdapterError, SiteError
from funcadapt.keys import PREFIX, encode
from funcadapt.method import method_of
from funcadapt.methods import lora
from funcadapt.peft.method_configs import config_class
from funcadapt.peft.utils.weights import write_adapter
from funcadapt.targeting import is_saved
from funcadapt.view import adapter_of
from funcadapt.view.holding import view_of
from funcadapt.view.layer import AdapterLayer
from funcadapt.view.walking import layers, root_of

# PEFT converts the linear layers of these, and of no others
_CONVERTED = frozenset(
    [
        *("c3a", "delora", "fourierft", "gralora", "loha", "lokr", "lora", "miss", "psoft", "randlora", "tinylora"),
        *("unilora", "vblora", "vera", "waveft"),
    ]
)
_NO_CONV1D = frozenset(["fourierft", "waveft"])


def is_converted(layer: AdapterLayer, adapter_name: str) -> bool:
    """Whether PEFT converts an adapter at a layer; `fa.convert` converts more.

    Args:
        layer: the layer.
        adapter_name: the adapter's name.

    Returns:
        Whether it does.
    """
    held = layer.adapters.get(adapter_name)
    if held is None or layer.site.kind not in ("linear", "hf_conv1d"):
        return False
    package = view_of(held.method).package
    if held.method.name == "kasa" or (package in _NO_CONV1D and layer.site.kind == "hf_conv1d"):
        return False
    return package in _CONVERTED


def convert_to_lora(
    model: Any,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: Mapping[str, Any] | None = None,
) -> tuple[Any, dict[str, Tensor]]:
    """An adapter in a model as a LoRA: the best approximation of a rank of what it adds to each weight.

    The model is not changed. Only those methods and layers are converted that PEFT converts; `fa.convert` takes more.
    Where PEFT is wrong this is right: it leaves out DoRA's magnitudes, the bias of `lora_bias`, the buffers of modules
    that are saved whole, trained token rows and `exclude_modules`.

    Args:
        model: the model, a `PeftModel` or one with an adapter injected.
        rank: the rank; or, as a float in (0, 1], the share of the squared singular values that each layer's is to hold.
            A MiSS adapter keeps its own rank, except in its form "bat".
        adapter_name: the adapter's name.
        progressbar: accepted, nothing is shown.
        compile_kwargs: accepted, nothing is compiled.

    Returns:
        The LoRA's config, with a scaling of 1, and the tensors of its checkpoint.

    Raises:
        TypeError: if a layer cannot be converted, or there is none.
        ValueError: if the rank is 0, is no share, or is larger than a weight, or if the adapter trains biases.

    Example:
        >>> import torch
        >>> from funcadapt.peft import LoHaConfig, convert_to_lora, get_peft_model
        >>> config = LoHaConfig(r=4, target_modules=["0"], init_weights=False)
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(6, 5)), config)
        >>> lora, tensors = convert_to_lora(model, rank=2)
        >>> {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        {'base_model.model.0.lora_A.weight': (2, 6), 'base_model.model.0.lora_B.weight': (5, 2)}
    """
    if isinstance(rank, float) and not 0 < rank <= 1:
        raise ValueError(
            f"If rank is a float, it is interpreted as a threshold. It must be between 0 and 1 but got {rank}."
        )
    if rank == 0:
        raise ValueError("Passing a rank of 0 doesn't make sense, please pass a valid value.")
    found = [layer for _, layer in layers(model) if adapter_name in layer.adapters]
    unsupported = {repr(type(layer)) for layer in found if not is_converted(layer, adapter_name)}
    if unsupported:
        raise TypeError(
            f"Some module types on this model do not support LoRA conversion: {', '.join(sorted(unsupported))}."
        )
    if not found:
        raise TypeError("Could not detect any layer that supports LoRA conversion.")
    theirs: Any = getattr(model, "peft_config", {}).get(adapter_name)
    if theirs is not None and theirs.peft_type == "LORA":
        warnings.warn(
            "Converting a PEFT adapter to LoRA that is already a LoRA adapter. There is typically no need for that.",
            stacklevel=2,
        )
    bias = getattr(theirs, "bias", getattr(theirs, "lora_bias", "none"))
    if bias != "none" or getattr(theirs, "lora_bias", False):
        what = f"bias={bias}" if bias != "none" else "lora_bias=True"
        raise ValueError(f"The adapter's config sets {what}, this is not supported right now.")
    params: dict[str, dict[str, Tensor]] = {}
    ranks: dict[str, int] = {}
    for layer in found:
        path = layer.site.path
        params[path] = _leaves(layer, adapter_name, rank)
        ranks[path] = params[path]["lora_A"].shape[0]
    config = _config(theirs, rank, ranks)
    root = root_of(model)
    prefix = next((path for path, module in named_modules(model) if module is root), "")
    tensors = _tensors(adapter_of(model, adapter_name), config, params)
    prefix = f"{prefix}." if prefix else ""
    return config, {prefix + key.removeprefix(PREFIX): value for key, value in tensors.items()}


def _leaves(layer: AdapterLayer, name: str, rank: int | float) -> dict[str, Tensor]:
    site, held = layer.site, layer.adapters[name]
    if view_of(held.method).package == "miss" and getattr(held.config, "init_weights", None) != "bat":
        rank = getattr(held.config, "r", rank)
    if not isinstance(rank, float) and rank > min(site.shape):
        raise ValueError(
            f"The chosen rank {rank} is larger than the weight shape ({min(site.shape)}), please choose a lower rank."
        )
    below = {
        f"{site.owner}.{short}" if site.owner else short: kept.value for short, kept in layer.kept.items()
    }  # what was there before adapters were merged into it
    with torch.no_grad():
        try:
            (level,) = layer.levels([name])
            change: Change = change_of(level, site, layer.get_base_layer(), below)
        except SiteError as error:
            raise TypeError(
                f"Some module types on this model do not support LoRA conversion: {type(layer)!r}. {error}"
            ) from error
        at = lora.LoraConfig(r=1, lora_alpha=1) if isinstance(rank, float) else lora.LoraConfig(r=rank, lora_alpha=rank)
        leaves = new_leaves(site, change, at, rank if isinstance(rank, float) else None)
        leaves = leaves or new_leaves(site, change, at, None)  # nothing changes: PEFT gives it rank 1
    assert leaves is not None
    return {key: leaves[key].detach().contiguous().clone() for key in ("lora_A", "lora_B")}


def _config(theirs: Any, rank: int | float, ranks: Mapping[str, int]) -> Any:
    """PEFT's config of the LoRA: as the adapter's says what is adapted, with the ranks that came out."""
    r = 1 if isinstance(rank, float) else rank
    targets: Any = copy.copy(getattr(theirs, "target_modules", None))
    fields: dict[str, Any] = {"exclude_modules": copy.copy(getattr(theirs, "exclude_modules", None)) or set()}
    for name in ("base_model_name_or_path", "layers_pattern", "layers_to_transform", "modules_to_save"):
        if (value := getattr(theirs, name, None)) is not None:
            fields[name] = copy.copy(value)
    if tokens := getattr(theirs, "trainable_token_indices", None):
        fields["trainable_token_indices"] = copy.copy(tokens)
    if not isinstance(targets, str):
        known = set(targets or ())
        alike = {path for path, k in ranks.items() if k == rank}
        # without a config of the model, the names are all that says where the adapter is
        targets = known | (alike if theirs is not None else set(ranks))
    patterns = {path: k for path, k in ranks.items() if isinstance(targets, str) or k != rank}
    return config_class(lora.LoraConfig)(
        r=r, lora_alpha=r, target_modules=targets, rank_pattern=patterns, alpha_pattern=dict(patterns), **fields
    )


def _tensors(adapter: Adapter, config: Any, params: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The checkpoint: LoRA's leaves, and what the adapter holds in full."""
    frozen, method = config.to_funcadapt(), method_of(adapter.config)
    trees: tuple[dict[str, Any], dict[str, Any]] = ({path: dict(p) for path, p in params.items()}, {})
    for path, leaves in adapter.params.items():
        whole = {n: t.detach() for n, t in leaves.items() if n not in method.keys and n not in method.shared}
        if whole:
            trees[0].setdefault(path, {}).update(whole)
    for path, leaves in adapter.buffers.items():
        if is_saved(frozen, path) or TOKEN_INDICES in leaves:
            trees[1][path] = dict(leaves)
    return encode(Adapter(*trees, frozen), lora.METHOD)[0]


def save_as_lora(
    path: str | os.PathLike[str],
    model: nn.Module,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: Mapping[str, Any] | None = None,
) -> None:
    """`convert_to_lora`, written as a checkpoint that PEFT and `fa.load` read.

    Args:
        path: the folder, made if need be. Both files are written, or none.
        model: as in `convert_to_lora`.
        rank: likewise.
        adapter_name: likewise.
        progressbar: likewise.
        compile_kwargs: likewise.

    Raises:
        AdapterError: if the path is a file.
    """
    config, tensors = convert_to_lora(model, rank, adapter_name, progressbar, compile_kwargs)
    if os.path.isfile(path):
        raise AdapterError(f"Provided path ({path}) should be a directory, not a file")
    prefixed = {key if key.startswith(PREFIX) else PREFIX + key: value for key, value in tensors.items()}
    write_adapter(path, prefixed, config)
