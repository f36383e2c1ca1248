"""Riemannian preconditioning of LoRA's gradients.

    dA <- (B^T B + reg I)^+ dA        dB <- dB (A A^T + reg I)^+

Source: Zhang and Pilanci 2024, arXiv:2402.02347.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from funcadapt.peft.optimizers.pairs import Factors, damped_inverse, experts_by_layer, lora_pairs


def create_riemannian_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, reg: float = 1e-2, **kwargs: Any
) -> Optimizer:
    """An optimiser of a subclass of `optimizer_cls`, which preconditions the gradients of A and B before each step.

    Pairs of matrices `lora_A` and `lora_B`, both trained, are preconditioned; all other trained parameters
    (embeddings, convolutions, magnitudes, biases) are updated as they are. The matrices are made in float32 or wider.

    Of experts (`target_parameters`), each one's factors are preconditioned by its own r x r matrix. PEFT takes the
    factors of all E experts as one pair of rank r E, in which the rows of A and the columns of B do not correspond.
    And hooks of the optimiser run once in a step, not twice.

    Args:
        model: the model, in PEFT's layout.
        optimizer_cls: the class of the optimiser.
        lr: the learning rate.
        reg: the damping.
        **kwargs: passed on to `optimizer_cls`.

    Returns:
        The optimiser. Its `step` takes no closure.

    Raises:
        TypeError: if `optimizer_cls` is no optimiser.
        ValueError: if the model has no pair to precondition, or the optimiser needs a closure.

    Example:
        >>> import torch
        >>> from funcadapt.peft.optimizers import create_riemannian_optimizer
        >>> layer = torch.nn.ModuleDict({
        ...     "lora_A": torch.nn.ModuleDict({"default": torch.nn.Linear(8, 2, bias=False)}),
        ...     "lora_B": torch.nn.ModuleDict({"default": torch.nn.Linear(2, 8, bias=False)}),
        ... })
        >>> model = torch.nn.ModuleDict({"layer": layer})
        >>> create_riemannian_optimizer(model, torch.optim.SGD, lr=1e-2).param_groups[0]["lr"]
        0.01
    """
    if not (isinstance(optimizer_cls, type) and issubclass(optimizer_cls, Optimizer)):  # pyright: ignore
        raise TypeError(f"optimizer_cls must be a subclass of torch.optim.Optimizer, got {optimizer_cls!r}.")
    closure = inspect.signature(optimizer_cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"{optimizer_cls.__name__}.step needs a closure and evaluates the loss again in each step, which would "
            "overwrite the preconditioned gradients. Use an optimizer with an optional closure (SGD, AdamW, ...)."
        )
    pairs = _trained_pairs(model)
    if not pairs:
        raise ValueError(
            "create_riemannian_optimizer did not find any trainable lora_A/lora_B parameter pairs on the model, e.g. "
            "'layers.0.q_proj.lora_A.default.weight'. It only applies to LoRA; check that the adapter is active and "
            "not in inference mode."
        )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return _with_preconditioning(optimizer_cls, pairs, reg)(trained, lr=lr, **kwargs)


_Trained = tuple[nn.Parameter, nn.Parameter, int]


def _trained_pairs(model: nn.Module) -> list[_Trained]:
    parameters = dict(model.named_parameters())
    experts = experts_by_layer(model)
    found: list[_Trained] = []
    for pair in lora_pairs(name for name in parameters if "lora_embedding_" not in name):
        a, b = parameters[pair.a], parameters[pair.b]
        if a.ndim == b.ndim == 2 and a.requires_grad and b.requires_grad:
            found.append((a, b, experts.get(pair.layer, 1)))
    return found


def _with_preconditioning(optimizer_cls: type[Optimizer], pairs: Sequence[_Trained], reg: float) -> type[Any]:
    base: Any = optimizer_cls

    class RiemannianPreconditionedOptimizer(base):
        @torch.no_grad()
        def step(self, closure: Callable[[], float] | None = None) -> Any:
            if closure is not None:
                raise ValueError(
                    "The Riemannian-preconditioned optimizer does not support closures: they would overwrite the "
                    "preconditioned gradients. Compute the loss and its gradients before step()."
                )
            for a, b, experts in pairs:
                _precondition(a, b, experts, reg)
            step = base.step
            # torch wraps `step` of a class to run the hooks, and here has wrapped the subclass: once is enough
            return (step.__wrapped__ if getattr(step, "hooked", False) else step)(self)

    return RiemannianPreconditionedOptimizer


def _precondition(a: Tensor, b: Tensor, experts: int, reg: float) -> None:
    wide = torch.promote_types(a.dtype, torch.float32)
    factors = Factors(a.to(wide), b.to(wide), experts)
    if (grad := a.grad) is not None:
        inverse = damped_inverse(factors.b.mT @ factors.b, reg)
        grad.copy_(factors.join_a(inverse @ factors.split_a(grad.to(wide)), grad))
    if (grad := b.grad) is not None:
        inverse = damped_inverse(factors.a @ factors.a.mT, reg)
        grad.copy_(factors.join_b(factors.split_b(grad.to(wide)) @ inverse, grad))
