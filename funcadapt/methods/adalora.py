"""AdaLoRA: a low-rank update in the form of an SVD, whose rank is given to the layers that need it while it trains.

    y = W x + b + s / (n + 1e-5) * B (E * A) drop(x)        s = lora_alpha if that is positive, else r

Leaves: `lora_A` (r, in), `lora_E` (r, 1), `lora_B` (out, r); 0-d buffers `scaling` (s) and `ranknum` (n = init_r, also
where rows were pruned). Convolutions: `lora_A` (r, in channels / groups * kernel). Experts: a leading axis on each.
Init: A and B normal with deviation 0.02, E zero: the identity.
Cost: r (in + out + 1) parameters a layer; LoRA's flops, and r in for E * A.

The rank moves between layers in training: `funcadapt.allocation`.

Source: Zhang et al. 2023, arXiv:2303.10512. Differs from PEFT: every kind of layer; padding modes and groups of
convolutions are right; `ranknum` is never trained (in PEFT it is where the base is not float32, and is not saved);
without an alpha, a pruned adapter keeps its scaling when it is read. PEFT adds the penalty to the loss of models with
a task type only.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from funcadapt import targets
from funcadapt.layer import Layer, dropout
from funcadapt.method import Draw, Fresh, Leaf, Method, register
from funcadapt.methods.lora import LoraConfig
from funcadapt.parts import lora_forms, lora_leaves
from funcadapt.parts.adalora_leaves import (
    LEAVES,
    buffers,
    check,
    describe,
    layout,
    pack,
    scale,
    stored,
    unpack,
    with_rank,
)
from funcadapt.parts.adalora_view import VIEW
from funcadapt.parts.forms import KINDS, refuse_dropout
from funcadapt.sites import Site


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaLoraConfig(LoraConfig):
    """Config of AdaLoRA, with PEFT's fields, defaults and meanings.

    LoRA's fields say what is adapted. `r`, `use_rslora`, `lora_bias` and `alpha_pattern` are not used, as in PEFT.

    Attributes:
        target_r: the average rank at the end.
        init_r: the rank of each layer at the start.
        tinit: steps before the budget falls.
        tfinal: steps at the end in which the ranks stay.
        deltaT: steps from one allocation to the next.
        beta1: how fast the mean of the sensitivities forgets.
        beta2: how fast the mean of their deviations forgets.
        orth_reg_weight: the weight of `orthogonality`.
        total_step: all steps. It must be given.
        rank_pattern: site path and ".lora_E" -> which of the first init_r triplets are left; `prune` sets it.

    Raises:
        ValueError: if the values contradict each other, `total_step` is missing, or DoRA or LoftQ is asked for.
    """

    peft_type: str = "ADALORA"
    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1  # noqa: N815 (PEFT's name)
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None
    rank_pattern: Mapping[str, Sequence[bool]] | None = None  # pyright: ignore[reportIncompatibleVariableOverride]

    patterned: ClassVar[Mapping[str, str]] = {}
    target_table: ClassVar[targets.Targets] = targets.ADALORA

    def __post_init__(self) -> None:
        for field, name in (("use_dora", "DoRA"), ("loftq_config", "LOFTQ")):
            if getattr(self, field):
                raise ValueError(f"{self.peft_type} does not support {name}.")
        super().__post_init__()
        if self.total_step is None or self.total_step <= 0:
            raise ValueError("AdaLoRA does not work when `total_step` is None, supply a value > 0.")
        if not 0 <= self.orth_reg_weight < math.inf:
            raise ValueError("`orth_reg_weight` should be greater than or equal to 0, but the value passed is "
                             f"{self.orth_reg_weight}")  # fmt: skip
        if self.tinit >= self.total_step - self.tfinal:
            raise ValueError(
                "The supplied schedule values don't allow for a budgeting phase. Decrease `tfinal`/`tinit` or increase "
                f"`total_step`: {self.tinit} steps before it and {self.tfinal} after it are {self.total_step} or more."
            )
        for field, least in (("init_r", 1), ("target_r", 0), ("deltaT", 1), ("tinit", 0), ("tfinal", 0)):
            if getattr(self, field) < least:
                raise ValueError(
                    f"`{field}` should be at least {least}, but the value passed is {getattr(self, field)}."
                )
        for field in ("beta1", "beta2"):
            if not 0 < getattr(self, field) < 1:
                raise ValueError(
                    f"`{field}` should be between 0 and 1, but the value passed is {getattr(self, field)}."
                )
        ignored = {"use_rslora": self.use_rslora, "lora_bias": self.lora_bias, "alpha_pattern": self.alpha_pattern}
        ignored["init_lora_weights"] = isinstance(self.init_lora_weights, str)
        if self.r != 8:
            warnings.warn(
                "Note that `r` is not used in AdaLora and will be ignored. If you intended to set the initial rank, "
                "use `init_r` instead.",
                stacklevel=3,
            )
        for field in (name for name, given in ignored.items() if given):
            warnings.warn(f"Note that `{field}` is not used in AdaLora and will be ignored.", stacklevel=3)

    def label(self) -> str:
        """The method's name for people."""
        return "adalora"

    def rank(self, leaves: Mapping[str, Tensor]) -> int:
        """The rank of one site's leaves."""
        return leaves["lora_E"].shape[-2] if "lora_E" in leaves else 0


def init(site: Site, config: AdaLoraConfig, draw: Draw, weight: Callable[[], Tensor]) -> Fresh:
    """A and B small, E zero; or all three normal if `init_lora_weights` is false."""
    refuse_dropout(site, "lora_dropout", config.lora_dropout)
    r, std = config.init_r, 0.02 if config.init_lora_weights else 1.0
    params = {
        "lora_A": draw.normal(*site.stack, r, math.prod(site.shape[1:]), std=std),
        "lora_E": (draw.zeros if config.init_lora_weights else draw.normal)(*site.stack, r, 1),
        "lora_B": draw.normal(*site.stack, site.out_features, r, std=std),
    }
    if draw.generator is None and not config.init_lora_weights:  # torch's own: PEFT draws `ranknum`, too
        draw.normal(1)
    numbers = {name: draw.cast(value) for name, value in buffers(config).items()}
    if draw.abstract:  # no file brings it: where weights are loaded next, it has its value now
        numbers["ranknum"] = buffers(config)["ranknum"].to(draw.dtype)
    return Fresh(params, numbers)


def as_lora(p: Leaf) -> dict[str, Tensor]:
    """The leaves of a LoRA that does the same: E * A, B, and s / (n + 1e-5)."""
    a = p["lora_A"]
    scaled = a * p["lora_E"].reshape(*a.shape[:-1], 1)  # reshaped: an E of another size must not broadcast
    return {"lora_A": scaled, "lora_B": p["lora_B"], "scaling": scale(p)}


def after(layer: Layer, p: Leaf, x: Tensor, y: Tensor) -> Tensor:
    """Y + s / (n + 1e-5) * B (E * A) drop(x), in y's dtype."""
    config: Any = layer.config
    if config.lora_dropout:
        x = dropout(layer, x, config.lora_dropout)
    site, r = layer.site, p["lora_A"].shape[0]
    # reshaped to the site's sizes, so that a wrong one raises
    a, b = p["lora_A"].reshape(r, *site.shape[1:]), p["lora_B"]
    b = b.reshape(site.out_features, b.shape[1])
    strength = p["lora_E"].reshape(r) * scale(p)  # on A x, which is less than A
    if not site.kind.startswith("conv"):
        return lora_forms.add_delta(layer, {"lora_A": a, "lora_B": b, "scaling": strength}, x, y).to(y.dtype)
    # all of A reads each group of channels: to the first product, groups are rows
    spatial = len(site.shape) - 2
    lead = x.shape[: -spatial - 1]
    rows = x.to(a.dtype).reshape(math.prod(lead) * site.groups, site.shape[1], *x.shape[-spatial:])
    h = layer.linear(rows, a) * strength.reshape(r, *(1,) * spatial)
    h = h.reshape(*lead, site.groups * h.shape[1], *h.shape[-spatial:])
    return (y + layer.pointwise(h, b.reshape(*b.shape, *(1,) * spatial))).to(y.dtype)


def grouped(layer: Layer, p: Leaf, x: Tensor, y: Tensor) -> Any:
    """`after` for N adapters at once, as LoRA's; NotImplemented where the layer is no plain product."""
    return NotImplemented if layer.site.kind.startswith("conv") else lora_forms.grouped(layer, as_lora(p), x, y)


def masked(layer: Layer, p: Leaf, x: Tensor, y: Tensor, choice: Tensor) -> Any:
    """`after` for groups of rows that choose among N adapters, as LoRA's; NotImplemented as in `grouped`."""
    return NotImplemented if layer.site.kind.startswith("conv") else lora_forms.masked(layer, as_lora(p), x, y, choice)


def weight(layer: Layer, p: Leaf, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """W + s / (n + 1e-5) * B (E * A); the bias stays."""
    same = as_lora(p)
    delta = (same["lora_B"] * same["scaling"]) @ same["lora_A"]
    return (weight + delta.reshape(weight.shape)).to(weight.dtype), bias


METHOD = register(
    Method(
        name="adalora",
        config=AdaLoraConfig,
        kinds=KINDS,
        keys={name: name for name in LEAVES},
        init=init,
        inits_experts=True,
        after=after,
        weight=weight,
        buffers=buffers,
        describe=describe,
        stored=stored,
        check=check,
        layout=layout,
        pack=pack,
        unpack=unpack,
        dropout=lambda config: config.lora_dropout,
        reads=frozenset(),
        rank_field="init_r",
        with_rank=with_rank,
        neutral=lora_leaves.neutral,
        grouped=grouped,
        masked=masked,
        view=VIEW,
    )
)
