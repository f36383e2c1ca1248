"""LoRA+: B learns faster than A.

Source: Hayou et al. 2024, arXiv:2402.12354.
"""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn
from torch.optim import Optimizer

from funcadapt._torch import named_modules

_EIGHT_BIT = frozenset({"Adam8bit", "AdamW8bit", "PagedAdam8bit", "PagedAdamW8bit"})


def create_loraplus_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, loraplus_lr_ratio: float, **kwargs: Any
) -> Optimizer:
    """An optimiser whose learning rate for B is `loraplus_lr_ratio` times that for A.

    Four groups, in this order: A and whatever else is trained (`lr`); the LoRA layers of embeddings
    (`loraplus_lr_embedding`, 1e-6); B (`lr * loraplus_lr_ratio`); and at the rate of B, without weight decay, biases
    and the parameters in layer norms that count as B. A parameter with one axis counts as B.

    Args:
        model: the model, in PEFT's layout.
        optimizer_cls: the class of the optimiser. With an 8-bit one of bitsandbytes, embeddings keep 32 bits.
        lr: the learning rate of A.
        loraplus_lr_ratio: how much faster B learns; 1 or more.
        **kwargs: passed on to `optimizer_cls`, but for `loraplus_weight_decay` (0.0) and `loraplus_lr_embedding`.

    Returns:
        The optimiser.

    Example:
        >>> import torch
        >>> from funcadapt.peft.optimizers import create_loraplus_optimizer
        >>> layer = torch.nn.ModuleDict({
        ...     "lora_A": torch.nn.ModuleDict({"default": torch.nn.Linear(8, 2, bias=False)}),
        ...     "lora_B": torch.nn.ModuleDict({"default": torch.nn.Linear(2, 8, bias=False)}),
        ... })
        >>> optimizer = create_loraplus_optimizer(layer, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16.0)
        >>> [(len(group["params"]), group["lr"]) for group in optimizer.param_groups]
        [(1, 0.0001), (0, 1e-06), (1, 0.0016), (0, 0.0016)]
    """
    decay: float = kwargs.pop("loraplus_weight_decay", 0.0)
    embedding_lr: float = kwargs.pop("loraplus_lr_embedding", 1e-6)
    groups: dict[str, dict[str, Any]] = {
        "a": {"params": [], "weight_decay": decay, "lr": lr},
        "embedding": {"params": [], "weight_decay": decay, "lr": embedding_lr},
        "b": {"params": [], "weight_decay": decay, "lr": lr * loraplus_lr_ratio},
        "b without decay": {"params": [], "weight_decay": 0.0, "lr": lr * loraplus_lr_ratio},
    }
    modules = dict(named_modules(model, remove_duplicate=False))
    decaying = _outside_norms(model)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        parts = name.split(".")
        if len(parts) > 2 and _adapts_an_embedding(modules.get(".".join(parts[:-2]))):
            group = "embedding"
        elif "lora_B" in parts or parameter.ndim == 1:
            group = "b" if name in decaying and "bias" not in name else "b without decay"
        else:
            group = "a"
        groups[group]["params"].append(parameter)
    make: Any = optimizer_cls
    optimizer: Optimizer = make(list(groups.values()), lr=lr, **kwargs)
    if optimizer_cls.__name__ in _EIGHT_BIT:
        _keep_embeddings_precise(model)
    return optimizer


def _adapts_an_embedding(module: nn.Module | None) -> bool:
    """Whether a module is a LoRA layer around an embedding: the one that has `lora_embedding_A` filled."""
    return len(getattr(module, "lora_embedding_A", ())) > 0


def _outside_norms(model: nn.Module) -> set[str]:
    """The names of the parameters that are not in (or below) a layer norm, in transformers' sense."""
    try:
        from transformers.pytorch_utils import ALL_LAYERNORM_LAYERS
    except ImportError:
        norms: tuple[type[nn.Module], ...] = (nn.LayerNorm,)
    else:
        norms = tuple(ALL_LAYERNORM_LAYERS)
    names: set[str] = set()

    def visit(module: nn.Module, prefix: str) -> None:
        names.update(prefix + name for name in module._parameters)
        for name, child in module.named_children():
            if not isinstance(child, norms):
                visit(child, f"{prefix}{name}.")

    visit(model, "")
    return names


def _keep_embeddings_precise(model: nn.Module) -> None:
    manager: Any = importlib.import_module("bitsandbytes").optim.GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})
