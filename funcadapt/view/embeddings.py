"""Whether a checkpoint of an adapter has the model's embeddings, by PEFT's rules."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from torch import nn

from funcadapt._torch import named_modules

EMBEDDING_LAYER_NAMES = ("embed_tokens", "lm_head")

Lookup = Callable[[nn.Module, str], int | None]
"""(the model, the name or path of its base model) -> the size of the base model's vocabulary, None if unknown."""


def local_vocabulary(model: nn.Module, name: str) -> int | None:
    """The size of a base model's vocabulary, if it is a local folder.

    Args:
        model: the model.
        name: the folder, or anything else.

    Returns:
        The size, or None, with a warning if there is no such folder.
    """
    try:
        values: Any = json.loads((Path(name) / "config.json").read_bytes())
        size = values.get("vocab_size")
        return size if isinstance(size, int) else None
    except (OSError, ValueError, AttributeError):
        warn_unknown(name)
        return None


def warn_unknown(name: str) -> None:
    """Say that the size of a vocabulary could not be looked up."""
    warnings.warn(
        f"Could not find a config file in {name} - will assume that the vocabulary was not modified.", stacklevel=5
    )


def is_targeted(model: nn.Module, config: Any) -> bool:
    """Whether a config adapts an embedding layer, as far as its `target_modules` say.

    Args:
        model: the model.
        config: the config.

    Returns:
        Whether it does.
    """
    targets = getattr(config, "target_modules", None)
    if isinstance(targets, str):
        if targets == "all-linear":
            return False
        get_base: Any = getattr(model, "get_base_model", lambda: model)
        paths = [path for path, _ in named_modules(get_base()) if path.rpartition(".")[2] in EMBEDDING_LAYER_NAMES]
        return any(re.fullmatch(targets, path) is not None for path in paths)
    return any(name in (targets or ()) for name in EMBEDDING_LAYER_NAMES)


def is_embedding_saved(model: nn.Module, config: Any, wanted: bool | Literal["auto"], lookup: Lookup) -> bool:
    """Whether the embeddings are saved with an adapter.

    Args:
        model: the model.
        config: the adapter's config.
        wanted: what the user asked for.
        lookup: finds the size of the base model's vocabulary.

    Returns:
        Whether they are; in the automatic cases a warning says so.
    """
    if wanted != "auto":
        if wanted and not hasattr(model, "get_input_embeddings"):
            warnings.warn(
                "Could not identify embedding layer(s) because the model is not a 🤗 transformers model.", stacklevel=4
            )
        return bool(wanted)
    rows = getattr(config, "trainable_token_indices", None) is not None
    if not rows and getattr(config, "peft_type", None) != "TRAINABLE_TOKENS" and is_targeted(model, config):
        message = "Setting `save_embedding_layers` to `True` as embedding layers found in `target_modules`."
        warnings.warn(message, stacklevel=4)
        return is_embedding_saved(model, config, True, lookup)
    name = getattr(config, "base_model_name_or_path", None)
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    base = lookup(model, name) if name else None
    if not size or base is None or base == size:
        return False
    message = "Setting `save_embedding_layers` to `True` as the embedding layer has been resized during finetuning."
    warnings.warn(message, stacklevel=4)
    return is_embedding_saved(model, config, True, lookup)


def embedding_prefixes(model: Any, config: Any) -> Iterator[str]:
    """What the keys of a model's embeddings begin with.

    Args:
        model: the model.
        config: the adapter's config: of a layer that it adapts only the base is an embedding.

    Yields:
        The prefixes, with a dot at the end.
    """
    if not hasattr(model, "get_input_embeddings"):
        return
    targeted = is_targeted(model, config)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        base = getattr(layer, "base_layer", None)
        if targeted and not isinstance(base, nn.Linear | nn.Embedding):
            continue
        for path, module in named_modules(model):
            if (module is layer and not targeted) or (base is not None and module is base):
                yield f"{path}."
                break
