"""LoRA-FA: A stays as it was drawn, and B moves as close to the full gradient as that allows.

    dB <- (1 / s^2) dB (A A^T)^+        then AdamW on B        s: the scaling of the layer

Source: Zhang et al. 2023, arXiv:2308.03303.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any, cast, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from funcadapt._torch import named_modules
from funcadapt.peft.optimizers.pairs import Factors, damped_inverse, experts_by_layer, lora_pairs
from funcadapt.peft.utils.other import infer_device

_DAMPING = 1e-8


class LoraFAOptimizer(Optimizer):
    """AdamW, with the preconditioned gradient for the B of every pair of LoRA factors.

    Each group has, beside its "params", their "names" and "scaling_factors" (a number or None each), and may have
    "experts" (how many experts' factors lie in a parameter). `create_lorafa_optimizer` makes them.

    PEFT pairs a parameter whose name has "lora" in it with the next one, and so fails or mixes up layers where a layer
    has more than one A and one B: a second adapter, a magnitude (DoRA), a bias in B. Here pairs are those of one layer
    and one adapter, and every other trained parameter gets AdamW. Factors of convolutions and of experts are taken in
    blocks, see `Factors`.

    Args:
        params: the groups.
        lr: the learning rate.
        betas: how fast the two means forget.
        eps: added to the denominator.
        weight_decay: how much parameters shrink after their step, in units of the learning rate.
        correct_bias: whether the means are corrected for their start at zero.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
    ) -> None:
        if lr < 0.0:
            raise ValueError(f"Invalid learning rate: {lr} - should be >= 0.0")
        for beta in betas:
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter: {beta} - should be in [0.0, 1.0)")
        if eps < 0.0:
            raise ValueError(f"Invalid epsilon value: {eps} - should be >= 0.0")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "correct_bias": correct_bias}
        super().__init__(params, defaults)
        self._warned = False

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step.

        Args:
            closure: computes the loss and the gradients anew.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        names: list[str] = group["names"]
        position = {name: i for i, name in enumerate(names)}
        parameters: list[Tensor] = group["params"]
        scalings = self._scalings(group)
        experts: list[int] = group.get("experts") or [1] * len(names)
        paired: set[str] = set()
        states: dict[str, dict[str, Any]] = cast("Any", self.state)  # by name, as in PEFT
        pairs = lora_pairs(names)
        layers = [pair.layer for pair in pairs]
        for pair in pairs:
            paired.update((pair.a, pair.b))
            a, b, i = parameters[position[pair.a]], parameters[position[pair.b]], position[pair.b]
            if b.grad is None:  # an adapter that is not active
                continue
            # PEFT's key, which has no adapter's name in it, where there is one adapter
            key = f"{pair.layer}.lora".removeprefix(".") + f".{pair.adapter}" * (layers.count(pair.layer) > 1)
            _adamw(b, _preconditioned(a, b, b.grad, scalings[i], experts[i]), states[key], "_B", group)
        for name, parameter in zip(names, parameters, strict=True):
            if name not in paired and parameter.grad is not None:
                _adamw(parameter, parameter.grad, states[name], "", group)

    def _scalings(self, group: dict[str, Any]) -> list[Any]:
        if "scaling_factors" not in group:
            if "scaling_factor" not in group:
                raise KeyError("Expected optimizer param group to define `scaling_factors`.")
            if not self._warned:
                self._warned = True
                warnings.warn(
                    "`scaling_factor` is deprecated and will be removed after 2026-11-01. Please use "
                    "`scaling_factors` instead.",
                    FutureWarning,
                    stacklevel=3,
                )
            return [group["scaling_factor"]] * len(group["params"])
        default = group.get("scaling_factor")
        return [default if factor is None else factor for factor in group["scaling_factors"]]


def create_lorafa_optimizer(
    model: nn.Module, r: int, lora_alpha: int, lr: float, weight_decay: float = 0.0, use_rslora: bool | None = None
) -> Optimizer:
    """An optimiser that trains the B of every LoRA layer with LoRA-FA, and freezes every A.

    Args:
        model: the model, in PEFT's layout.
        r: the rank, and
        lora_alpha: alpha: the scaling of a layer that does not tell its own.
        lr: the learning rate.
        weight_decay: how much parameters shrink, in units of the learning rate.
        use_rslora: deprecated: the config of the active adapters says it, and this must agree with it.

    Returns:
        The optimiser.

    Raises:
        ValueError: if `use_rslora` contradicts the config of an active adapter.

    Example:
        >>> import torch
        >>> from funcadapt.peft.optimizers import create_lorafa_optimizer
        >>> layer = torch.nn.ModuleDict({
        ...     "lora_A": torch.nn.ModuleDict({"default": torch.nn.Linear(8, 2, bias=False)}),
        ...     "lora_B": torch.nn.ModuleDict({"default": torch.nn.Linear(2, 8, bias=False)}),
        ... })
        >>> model = torch.nn.ModuleDict({"layer": layer})
        >>> optimizer = create_lorafa_optimizer(model, r=2, lora_alpha=4, lr=1e-3)
        >>> {name: p.requires_grad for name, p in model.named_parameters()}
        {'layer.lora_A.default.weight': False, 'layer.lora_B.default.weight': True}
    """
    root_scaled = _is_root_scaled(model, use_rslora)
    names = [name for name, _ in model.named_parameters()]
    parameters = dict(model.named_parameters())
    pairs = lora_pairs(names)
    for pair in pairs:
        parameters[pair.a].requires_grad_(False)
    modules, experts = dict(named_modules(model)), experts_by_layer(model)
    scaling: dict[str, Any] = {}
    for pair in pairs:
        table: Any = getattr(modules.get(pair.layer), "scaling", {})
        scaling[pair.b] = scaling[pair.a] = table[pair.adapter] if pair.adapter in table else None  # noqa: SIM401 - no dict in PEFT
    layer_of = {name: pair.layer for pair in pairs for name in (pair.a, pair.b)}
    group = {
        "params": list(parameters.values()),
        "lr": lr,
        "names": names,
        "scaling_factors": [scaling.get(name) for name in names],
        "scaling_factor": lora_alpha / math.sqrt(r) if root_scaled else lora_alpha / r,
        "experts": [experts.get(layer_of.get(name, ""), 1) for name in names],
        "betas": (0.9, 0.999),
        "weight_decay": weight_decay,
    }
    return LoraFAOptimizer([group])


def _is_root_scaled(model: nn.Module, use_rslora: bool | None) -> bool:
    """Whether the configs of the active adapters say rsLoRA, and whether the deprecated argument agrees."""
    configs: Any = getattr(model, "peft_config", {})
    active: Any = getattr(model, "active_adapters", ()) if configs else ()
    chosen: Any = active() if callable(active) else active
    names: list[str] = [name for name in chosen if name in configs]
    configured = {name: bool(getattr(configs[name], "use_rslora", False)) for name in names}
    if use_rslora is None:
        return bool(configured) and all(configured.values())
    if others := [name for name, flag in configured.items() if flag != use_rslora]:
        raise ValueError(
            f"`use_rslora={use_rslora}` was passed to create_lorafa_optimizer, but the following active adapters have "
            f"`use_rslora` set differently in the model config: {others}. Set it in LoraConfig, and drop the argument, "
            "which is deprecated."
        )
    warnings.warn(
        "`use_rslora` in create_lorafa_optimizer is deprecated and will be removed after 2026-11-01. Please configure "
        "rsLoRA via LoraConfig instead.",
        FutureWarning,
        stacklevel=3,
    )
    return use_rslora


def _preconditioned(a: Tensor, b: Tensor, grad: Tensor, scaling: Any, experts: int) -> Tensor:
    """(1 / s^2) dB (A A^T)^+. PEFT makes the product in bfloat16 where the device has it, and so does this."""
    factors = Factors(a, b, experts)
    inverse = damped_inverse(factors.a @ factors.a.mT, _DAMPING, torch.float32)
    with torch.autocast(infer_device(), dtype=torch.bfloat16, enabled=_has_bfloat16()):
        blocks = (1 / scaling**2) * (factors.split_b(grad) @ inverse)
    return factors.join_b(blocks, grad).to(grad.dtype)


def _has_bfloat16() -> bool:
    try:
        from accelerate.utils.imports import is_bf16_available
    except ImportError:
        return not torch.cuda.is_available() or torch.cuda.is_bf16_supported()
    return bool(is_bf16_available())  # pyright: ignore


def _adamw(parameter: Tensor, grad: Tensor, state: dict[str, Any], suffix: str, group: dict[str, Any]) -> None:
    """One step of AdamW, with the state under "exp_avg" + suffix and "exp_avg_sq" + suffix."""
    mean, square = f"exp_avg{suffix}", f"exp_avg_sq{suffix}"
    if not state:
        state |= {"step": 0, mean: torch.zeros_like(parameter), square: torch.zeros_like(parameter)}
    state["step"] += 1
    (beta1, beta2), size = group["betas"], group["lr"]
    state[mean].mul_(beta1).add_(grad, alpha=1.0 - beta1)
    state[square].mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
    if group["correct_bias"]:
        size = size * math.sqrt(1.0 - beta2 ** state["step"]) / (1.0 - beta1 ** state["step"])
    parameter.addcdiv_(state[mean], state[square].sqrt().add_(group["eps"]), value=-size)
    if group["weight_decay"] > 0.0:
        parameter.add_(parameter, alpha=-group["lr"] * group["weight_decay"])
