"""The two files of an adapter: reading the weights from a folder or the Hub, and writing both."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import torch as safetensors
from torch import Tensor

from funcadapt import __version__
from funcadapt.checkpoint import CONFIG, WEIGHTS, write_all
from funcadapt.errors import AdapterFileError
from funcadapt.keys import PREFIX
from funcadapt.peft.utils.other import check_file_exists_on_hf_hub, infer_device

_PICKLE = "adapter_model.bin"


def load_peft_weights(
    model_id: str | os.PathLike[str],
    device: str | torch.device | None = None,
    key_mapping: Mapping[str, str] | None = None,
    **hf_hub_download_kwargs: Any,
) -> dict[str, Tensor]:
    """Read `adapter_model.safetensors` from a folder or from the Hub.

    Args:
        model_id: the folder, or the repository.
        device: where the tensors go; by default the accelerator, if there is one.
        key_mapping: regular expressions and what replaces their matches in the keys, the prefix `base_model.model.`
            left out. The first that matches counts.
        **hf_hub_download_kwargs: `subfolder`, and what `huggingface_hub.hf_hub_download` takes.

    Returns:
        Key -> tensor.

    Raises:
        ValueError: if there is no such file, only a pickle, or a key without prefix is to be renamed.

    Example:
        >>> import tempfile, torch
        >>> import funcadapt as fa
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     fa.save(fa.init(model, fa.LoraConfig(r=2, target_modules=["0"])), folder)
        ...     sorted(load_peft_weights(folder))
        ['base_model.model.0.lora_A.weight', 'base_model.model.0.lora_B.weight']
    """
    hub = dict(hf_hub_download_kwargs)
    name = os.fspath(model_id)
    file = _weights_file(name, hub.pop("subfolder", None), hub)
    device = infer_device() if device is None else device
    on_mps = torch.device(device).type == "mps"  # safetensors cannot read to it
    tensors: dict[str, Tensor] = safetensors.load_file(file, device="cpu" if on_mps else str(device))  # pyright: ignore
    return _renamed(tensors, key_mapping) if key_mapping else tensors


def _weights_file(name: str, subfolder: str | None, hub: dict[str, Any]) -> str:
    folder = os.path.join(name, subfolder or "")
    local = os.path.join(folder, WEIGHTS)
    if os.path.exists(local):
        return local
    if os.path.exists(os.path.join(folder, _PICKLE)):
        raise AdapterFileError(_pickle_message(folder))
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    if "use_auth_token" in hub:
        hub.setdefault("token", hub.pop("use_auth_token"))
    hub.setdefault("user_agent", f"funcadapt/{__version__}")
    try:
        download: Any = huggingface_hub.hf_hub_download  # pyright: ignore
        return download(name, WEIGHTS, subfolder=subfolder, **hub)
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError as error:
        known = {key: hub[key] for key in ("revision", "repo_type", "token") if key in hub}
        pickled = check_file_exists_on_hf_hub(name, "/".join(filter(None, (subfolder, _PICKLE))), **known)
        if pickled:
            raise AdapterFileError(_pickle_message(name)) from error
        raise AdapterFileError(
            f"Can't find weights for {name} in {name} or in the Hugging Face Hub. Please check that the file {WEIGHTS} "
            f"is present at {name}."
        ) from error


def _pickle_message(place: str) -> str:
    return (
        f"{place} has {_PICKLE} and no {WEIGHTS}. That is a pickle, which runs code when it is opened, so funcadapt "
        "does not. Load it with PEFT where you trust it, and save it again with safe_serialization=True."
    )


def _renamed(tensors: Mapping[str, Tensor], key_mapping: Mapping[str, str]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for key, value in tensors.items():
        prefix = next((p for p in (PREFIX, "base_model.") if key.startswith(p)), None)
        if prefix is None:
            raise ValueError(
                f"key_mapping renames what follows the prefix {PREFIX!r}, and the key {key!r} does not have it. Was "
                "this file written by PEFT?"
            )
        short = key.removeprefix(prefix)
        matches = ((re.subn(pattern, new, short)) for pattern, new in key_mapping.items())
        renamed = prefix + next((new for new, count in matches if count), short)
        if renamed in found:
            raise ValueError(f"key_mapping renames two keys to {renamed!r}, {key!r} is one of them.")
        found[renamed] = value
    return found


def write_adapter(
    folder: str | os.PathLike[str], tensors: Mapping[str, Tensor], config: Any, auto_mapping: Any = None
) -> None:
    """Write PEFT's two files, both or none.

    Args:
        folder: the folder, made if need be.
        tensors: key -> tensor.
        config: PEFT's config, as it is to be written.
        auto_mapping: what is written as its `auto_mapping`, if not None.

    Raises:
        AdapterFileError: if the path is a file.
    """
    if os.path.isfile(folder):
        raise AdapterFileError(f"Provided path ({folder}) should be a directory, not a file")
    with tempfile.TemporaryDirectory() as scratch:
        config.save_pretrained(scratch, auto_mapping_dict=auto_mapping)
        text = (Path(scratch) / CONFIG).read_bytes()
    content: dict[str, Tensor] = {}
    seen: set[tuple[torch.device, int]] = set()
    for key, tensor in tensors.items():
        # safetensors stores no memory twice
        storage = (tensor.device, tensor.untyped_storage().data_ptr())
        value = tensor.detach().contiguous()
        content[key] = value.clone() if storage in seen and tensor.numel() else value
        seen.add(storage)
    os.makedirs(folder, exist_ok=True)
    write_all(Path(folder), {WEIGHTS: safetensors.save(content, {"format": "pt"}), CONFIG: text})
