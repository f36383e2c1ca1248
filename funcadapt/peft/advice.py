"""PEFT's warnings about what a config asked for and an injection did not find."""

from __future__ import annotations

import re
import warnings
from typing import Any

from torch import nn

from funcadapt._torch import named_modules
from funcadapt.method import method_of
from funcadapt.sites import tied_names
from funcadapt.targeting import names_match
from funcadapt.view.walking import auxiliaries, layers, unwrapped

_EMBEDDINGS = ("embed_tokens", "lm_head")
_DUMMY = "dummy-target-modules"


def advise(model: nn.Module, config: Any, name: str) -> None:
    """Warn of names and patterns that had no effect, and of embeddings that are tied to what is not adapted.

    `fa.sites` and `fa.init` refuse such a config; PEFT takes it.

    Args:
        model: the model, with the adapter in it.
        config: funcadapt's config, as it was injected.
        name: the adapter's name.
    """
    found = [layer.site for _, layer in layers(model) if name in layer.adapters]
    modules = [site.owner for site in found if site.kind not in ("parameter", "experts")]
    targets, parameters = config.target_modules, getattr(config, "target_parameters", None)
    excluded: Any = getattr(config, "exclude_modules", None)
    if excluded:
        with unwrapped(model):
            used = any(path and names_match(excluded, path) for path, _ in named_modules(model))
        if not used:
            shown = excluded if isinstance(excluded, str) else set(excluded)
            _warn(
                f"You have passed exclude_modules={shown} but no modules were excluded. Please check that "
                "exclude_modules was set correctly.",
                UserWarning,
            )
    own = any(wrapper.kept_as and name in wrapper.available_adapters for _, wrapper in auxiliaries(model))
    if targets != _DUMMY and targets and not modules and not own:
        shown = targets if isinstance(targets, str) else set(targets)
        _warn(f"target_modules={shown} were set but no module was matched.")
    elif targets != _DUMMY and parameters and len(modules) == len(found):
        _warn(f"target_parameters={list(parameters)} were set but no parameter was matched.")
    for attribute in config.patterned.values():
        patterns = [re.compile(rf"(.*\.)?({key})$") for key in getattr(config, attribute)]
        keys = zip(getattr(config, attribute), patterns, strict=True)
        unused = sorted(key for key, pattern in keys if not any(pattern.match(path) for path in modules))
        if unused:
            _warn(f"The following {attribute} keys did not match any targeted module and were ignored: {unused}.")
    if not method_of(config).rows:  # those are tied, too
        _advise_of_ties(model, config)


def _advise_of_ties(model: nn.Module, config: Any) -> None:
    targets = config.target_modules
    by_target = _names_embedding(targets) if isinstance(targets, str) else _ends_in_embedding(targets)
    if not by_target and not _ends_in_embedding(getattr(config, "modules_to_save", None)):
        return
    if getattr(getattr(model, "config", None), "tie_word_embeddings", None) is not True:
        return
    with unwrapped(model):
        if not tied_names(model):
            return
    has = hasattr(config, "ensure_weight_tying")
    _warn(
        "Model has `tie_word_embeddings=True` and a tied layer is part of the adapter, "
        + (
            "but `ensure_weight_tying` is not set to True. "
            if has
            else "but no implementation exists to tie the adapters. "
        )
        + "This can lead to complications, for example when merging the adapter or converting your model to formats "
        "other than safetensors. Check the discussion here: https://github.com/huggingface/peft/issues/2777",
        UserWarning,
    )


def _names_embedding(pattern: str) -> bool:
    return any(re.fullmatch(pattern, embedding) for embedding in _EMBEDDINGS)


def _ends_in_embedding(names: Any) -> bool:
    return any(name.rpartition(".")[2] in _EMBEDDINGS for name in names or ())


def _warn(message: str, category: type[Warning] = RuntimeWarning) -> None:
    warnings.warn(message, category, stacklevel=6)
