"""The backbone of Shadow, see `funcadapt.shadow`: the config, the blocks that it selects, the network beside them."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import re
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from funcadapt._torch import fork_rng, named_modules
from funcadapt.config import AdapterConfig
from funcadapt.errors import AdapterError, TargetError
from funcadapt.targeting import names_match

_STACKS = ("layers", "h")
_WIDTHS = ("hidden_size", "n_embd", "d_model")
# field of the config -> the names that it has in configs of models
_SIZES = {
    "shadow_num_hidden_layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "shadow_hidden_size": _WIDTHS,
    "shadow_intermediate_size": ("intermediate_size", "ffn_dim", "n_inner"),
    "shadow_num_attention_heads": ("num_attention_heads", "n_head", "num_heads"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShadowConfig(AdapterConfig):
    """Config of Shadow, with PEFT's fields, defaults and meanings.

    Attributes:
        target_modules: the decoder blocks, as names or a regular expression; None for all.
        exclude_modules: names or a regular expression to leave out.
        r: the rank of the correction.
        shadow_alpha: its strength.
        shadow_dropout: dropout on what it is computed from, in training.
        init_weights: whether it starts at zero.
        shadow_model: "mirror", a backbone like the model. PEFT also takes a checkpoint, which is not implemented.
        shadow_num_hidden_layers: the backbone's layers; 1 if None.
        shadow_hidden_size: its width; the model's if None.
        shadow_num_attention_heads: its heads; the model's if None.
        shadow_intermediate_size: its feed-forward width; the model's if None.
        share_embeddings: whether it reads the model's embeddings, if the widths are equal.
        update_hidden_size: the width inside T and G; r if None.
        auxiliary_loss_weight: the weight of the shadow's own loss.
        layers_to_transform: numbers of the blocks that names select.
        layers_pattern: the name of the list that holds them.
        modules_to_save: modules that are trained in full.

    Raises:
        ValueError: if fields contradict each other, as in PEFT, or `r` is not positive.
    """

    peft_type: str = "SHADOW"
    target_modules: Sequence[str] | str | None = None
    exclude_modules: Sequence[str] | str | None = None
    r: int = 8
    shadow_alpha: float = 0.1
    shadow_dropout: float = 0.2
    init_weights: bool = True
    shadow_model: str = "mirror"
    shadow_num_hidden_layers: int | None = None
    shadow_hidden_size: int | None = None
    shadow_num_attention_heads: int | None = None
    shadow_intermediate_size: int | None = None
    share_embeddings: bool = True
    update_hidden_size: int | None = None
    auxiliary_loss_weight: float = 0.05
    layers_to_transform: Sequence[int] | int | None = None
    layers_pattern: Sequence[str] | str | None = None
    modules_to_save: Sequence[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("`layers_to_transform` cannot be used when `target_modules` is a str.")
        if isinstance(self.target_modules, str) and self.layers_pattern is not None:
            raise ValueError("`layers_pattern` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")
        if self.r <= 0:
            raise ValueError(f"`r` should be a positive integer value but the value passed is {self.r}")
        given = [name for name in _SIZES if getattr(self, name) is not None]
        if self.shadow_model != "mirror" and given:
            raise ValueError(
                "Explicit `shadow_model` checkpoints define their architecture; unset these mirror-only overrides: "
                f"{', '.join(given)}."
            )


# -- the model's parts ------------------------------------------------------------------------------------


def size_of(config: Any, names: Sequence[str] = _WIDTHS) -> int:
    """A size that a model's config says, its width by default."""
    name = next((name for name in names if getattr(config, name, None) is not None), None)
    if name is None:
        raise TargetError(f"Shadow needs a model whose config says its size as one of {', '.join(names)}.")
    return int(getattr(config, name))


def _has_stack(module: Any) -> bool:
    return any(isinstance(getattr(module, name, None), nn.ModuleList) for name in _STACKS)


def backbone_of(model: nn.Module) -> nn.Module:
    """The module with the decoder's blocks, by PEFT's rules."""
    if isinstance(getattr(model, "single_transformer_blocks", None), nn.ModuleList) or (
        isinstance(getattr(model, "transformer_blocks", None), nn.ModuleList)
        and not isinstance(getattr(model, "layers", None), nn.ModuleList)
    ):
        raise NotImplementedError("Shadow for diffusion models is not implemented in funcadapt; use PEFT for it.")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise TargetError(f"Shadow is for decoders; {type(model).__name__} is an encoder-decoder.")
    for name in ("model", "transformer", "base_model", "decoder"):
        found = getattr(model, name, None)
        if isinstance(found, nn.Module):
            nested = getattr(found, "decoder", None)
            return nested if isinstance(nested, nn.Module) and _has_stack(nested) else found
    if _has_stack(model):
        return model
    raise TargetError(
        f"Shadow finds no transformer in {type(model).__name__}: no `model`, `transformer`, `base_model` or `decoder`, "
        "and no list of blocks called `layers` or `h`."
    )


def block_paths(model: nn.Module, config: ShadowConfig) -> tuple[str, ...]:
    """The paths of the blocks that a config selects: neighbours in one list of modules.

    Args:
        model: the model.
        config: the config.

    Returns:
        The paths, in order.

    Raises:
        TargetError: if there are none, or they are not contiguous.
    """
    backbone, modules = backbone_of(model), dict(named_modules(model))
    wanted = config.layers_to_transform
    numbers = (wanted,) if isinstance(wanted, int) else wanted
    patterns = (config.layers_pattern,) if isinstance(config.layers_pattern, str) else config.layers_pattern
    exact: Sequence[str] = ()
    if config.target_modules is None:
        prefix = next(path for path, module in modules.items() if module is backbone)
        stack = next((name for name in _STACKS if isinstance(getattr(backbone, name, None), nn.ModuleList)), None)
        if stack is None:
            raise TargetError(
                f"Shadow finds no list of blocks called `layers` or `h` in {type(backbone).__name__}. Name the blocks: "
                r"target_modules=r'.*\.layer\.\d+$', say."
            )
        found = [f"{prefix}.{stack}".lstrip(".") + f".{i}" for i in range(len(getattr(backbone, stack)))]
    else:
        found = [path for path in modules if path and names_match(config.target_modules, path)]
        exact = () if isinstance(config.target_modules, str) else config.target_modules
    chosen: list[str] = []
    for path in found:
        stack, _, number = path.rpartition(".")
        here = number.isdigit() and int(number) in (numbers or ()) and _ends_in(stack, patterns)
        if (not numbers or here or path in exact) and not names_match(config.exclude_modules or (), path):
            chosen.append(path)
    if not chosen:
        names = [path for path, module in modules.items() if isinstance(module, nn.ModuleList)]
        raise TargetError(
            f"Target modules {config.target_modules!r} not found in the base model. Please check the target modules "
            f"and try again (layers_to_transform={wanted}, exclude_modules={config.exclude_modules}). "
            f"Lists of blocks: {', '.join(names)}."
        )
    other = next((path for path in chosen if not isinstance(modules[path.rpartition(".")[0]], nn.ModuleList)), None)
    if other is not None:
        raise TargetError(f"Shadow adapts whole decoder blocks; {other!r} is no member of a list of modules.")
    chosen.sort(key=lambda path: int(path.rpartition(".")[2]))
    stack, _, first = chosen[0].rpartition(".")
    if chosen != [f"{stack}.{int(first) + i}" for i in range(len(chosen))]:
        raise TargetError(
            f"Shadow needs contiguous blocks of one list, as the shadow state rides from each to the next; got "
            f"{', '.join(map(repr, chosen[:6]))}."
        )
    return tuple(chosen)


def _ends_in(stack: str, patterns: Sequence[str] | None) -> bool:
    return not patterns or any(re.search(rf"(^|\.){pattern}$", stack) for pattern in patterns)


def classifier_of(model: Any) -> nn.Module | None:
    """The head of a model that classifies sequences."""
    heads = (getattr(model, name, None) for name in ("score", "classifier"))
    return next((head for head in heads if isinstance(head, nn.Module)), None)


# -- the backbone -----------------------------------------------------------------------------------------


class Skeleton(NamedTuple):
    """The shadow backbone's module without its parameters.

    Attributes:
        module: its parameters are on the meta device, its buffers are real.
        share: whether it reads the model's embeddings.
        width: the model's width.
        hidden: its own.
        shapes: the names and shapes of its state dict.
        frozen: those of them that are buffers.
    """

    module: nn.Module
    share: bool
    width: int
    hidden: int
    shapes: Mapping[str, tuple[int, ...]]
    frozen: frozenset[str]


class _Unallocated(TorchFunctionMode):
    """Memory that is not written to is not allocated: parameters, and no buffer that a formula gives."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **{**(kwargs or {}), **({"device": "meta"} if func is torch.empty else {})})


def make_backbone(model: nn.Module, config: ShadowConfig) -> nn.Module:
    """A new shadow backbone, PEFT's "mirror": the model's class with a smaller copy of its config.

    Args:
        model: the model.
        config: the config.

    Returns:
        The module, without embeddings if it reads the model's.

    Raises:
        NotImplementedError: if `shadow_model` is a checkpoint.
        TargetError: if the model's config has no such size.
        AdapterError: if the heads do not fit.
    """
    if config.shadow_model != "mirror":
        raise NotImplementedError(
            f"shadow_model={config.shadow_model!r}: backbones from checkpoints are not implemented in funcadapt. Use "
            "shadow_model='mirror', or PEFT."
        )
    base = backbone_of(model)
    small: Any = copy.deepcopy(base.config)
    for field, names in _SIZES.items():
        value = getattr(config, field)
        value = (value or 1) if field == "shadow_num_hidden_layers" else value
        name = next((name for name in names if hasattr(small, name)), None)
        if value is not None and name is None:
            raise TargetError(f"{field}={value}: the config of {type(base).__name__} has none of {', '.join(names)}.")
        if value is not None and name is not None:
            setattr(small, name, int(value))
    layers = getattr(small, "num_hidden_layers", None)
    if layers is not None:
        kinds = getattr(small, "layer_types", None)
        if kinds is not None:
            kinds = list(kinds)[:layers] or ["full_attention"]
            small.layer_types = kinds + kinds[-1:] * (layers - len(kinds))
        window = getattr(small, "max_window_layers", None)
        if window is not None and window > layers:
            small.max_window_layers = layers
    heads, keys = (getattr(small, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    if heads and keys and heads % keys:
        raise AdapterError(
            f"The shadow backbone would have {heads} attention heads for the model's {keys} key-value heads: "
            f"shadow_num_attention_heads must be a multiple of {keys}."
        )
    made: nn.Module = type(base)(small)
    if shares(made, model, config) and isinstance(getattr(made, "embed_tokens", None), nn.Module):
        del made.embed_tokens
    return made


def shares(backbone: nn.Module, model: nn.Module, config: ShadowConfig) -> bool:
    """Whether a shadow backbone reads the model's embeddings."""
    takes = "inputs_embeds" in inspect.signature(type(backbone).forward).parameters
    return config.share_embeddings and takes and size_of(backbone.config) == size_of(getattr(model, "config", None))


_skeletons: weakref.WeakKeyDictionary[nn.Module, dict[Any, Skeleton]] = weakref.WeakKeyDictionary()


def skeleton(
    model: nn.Module, config: ShadowConfig, dtype: torch.dtype = torch.float32, device: Any = "cpu"
) -> Skeleton:
    """The shadow backbone's module without parameters, made once for a model.

    Args:
        model: the model.
        config: the config.
        dtype: of the buffers.
        device: of the buffers.

    Returns:
        The skeleton. What calls it holds the model's lock.
    """
    key = (config.share_embeddings, config.shadow_model, *(getattr(config, n) for n in _SIZES), dtype, str(device))
    kept = _skeletons.setdefault(model, {})
    if key not in kept:
        # in a thread of its own: what is kept is no part of the transform or inference mode that the caller is in
        with ThreadPoolExecutor(1) as threads:
            kept[key] = threads.submit(_skeleton, model, config, dtype, device).result()
    return kept[key]


def _skeleton(model: nn.Module, config: ShadowConfig, dtype: torch.dtype, device: Any) -> Skeleton:
    with torch.device("cpu"), fork_rng(devices=[]):
        with _Unallocated():
            module = make_backbone(model, config)
        if any(buffer.is_meta for buffer in module.buffers()):
            module = make_backbone(model, config)  # one that is allocated first and written to then
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    for part in module.modules():
        for name, p in part._parameters.items():
            part._parameters[name] = None if p is None else nn.Parameter(p.to("meta"), requires_grad=False)
        for name, b in part._buffers.items():  # PEFT's have the model's dtype, too
            floats = b is not None and b.is_floating_point()
            part._buffers[name] = None if b is None else b.to(device=device, dtype=dtype if floats else None)
    frozen = frozenset(shapes) - {name for name, _ in module.named_parameters()}
    width = size_of(getattr(model, "config", None))
    return Skeleton(module, shares(module, model, config), width, size_of(module.config), shapes, frozen)
