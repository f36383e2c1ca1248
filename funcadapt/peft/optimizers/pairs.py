"""The factors A and B of LoRA layers, found by name, and their r x r matrices."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from funcadapt._torch import linalg, named_modules, unflatten
from funcadapt.sites import Site

_FACTOR_A = re.compile(r"(?P<start>(?:.*\.)?lora_(?:embedding_)?)A(?P<end>\.(?P<adapter>[^.]+)(?:\.weight)?)")


class Pair(NamedTuple):
    """The names of the two factors of one layer and one adapter."""

    layer: str
    adapter: str
    a: str
    b: str


def lora_pairs(names: Iterable[str]) -> list[Pair]:
    """The pairs of factors among the names of parameters, in the order of the A.

    Args:
        names: the names.

    Returns:
        The pairs of which both factors are there.

    Example:
        >>> from funcadapt.peft.optimizers.pairs import lora_pairs
        >>> lora_pairs(["up.lora_A.x.weight", "up.lora_B.x.weight", "up.lora_B.x.bias"])
        [Pair(layer='up', adapter='x', a='up.lora_A.x.weight', b='up.lora_B.x.weight')]
    """
    known = dict.fromkeys(names)
    pairs: list[Pair] = []
    for name in known:
        if (match := _FACTOR_A.fullmatch(name)) and (b := f"{match['start']}B{match['end']}") in known:
            layer = match["start"].removesuffix("embedding_").removesuffix("lora_").removesuffix(".")
            pairs.append(Pair(layer, match["adapter"], name, b))
    return pairs


def experts_by_layer(model: nn.Module) -> dict[str, int]:
    """How many experts' factors lie side by side in the A and B of a layer, for those with more than one."""
    return {path: count for path, module in named_modules(model) if (count := _experts(module)) > 1}


def _experts(module: Any) -> int:
    """What a layer says of its factors: the site of one here, `num_experts` of PEFT's `ParamWrapper`."""
    site = getattr(module, "site", None)
    count: Any = site.experts if isinstance(site, Site) else getattr(module, "num_experts", 1)
    return count if isinstance(count, int) else 1


class Factors:
    """One pair of factors as matrices: A (..., r, in) and B (..., out, r), with a leading axis if there are blocks.

    There are blocks in the factors of E experts, A (E r, in) with the expert first and B (out, r E) with the expert
    last, and in those of a convolution with groups, A (r, in, *kernel) and B (out, r / groups, 1, ...).
    """

    def __init__(self, a: Tensor, b: Tensor, experts: int = 1) -> None:
        self.experts = experts
        self.groups = 1 if experts > 1 else a.shape[0] // b.shape[1]
        self.a, self.b = self.split_a(a), self.split_b(b)

    def split_a(self, a: Tensor) -> Tensor:
        """A tensor of the shape of A, in blocks."""
        a = a.flatten(1)
        return unflatten(a, 0, (self.experts * self.groups, -1)) if self.experts * self.groups > 1 else a

    def split_b(self, b: Tensor) -> Tensor:
        """A tensor of the shape of B, in blocks."""
        b = b.flatten(1)
        if self.experts > 1:
            return unflatten(b, 1, (-1, self.experts)).movedim(2, 0)
        return unflatten(b, 0, (self.groups, -1)) if self.groups > 1 else b

    def join_a(self, blocks: Tensor, like: Tensor) -> Tensor:
        """The inverse of `split_a`."""
        return blocks.reshape(like.shape)

    def join_b(self, blocks: Tensor, like: Tensor) -> Tensor:
        """The inverse of `split_b`."""
        return (blocks.movedim(0, 2) if self.experts > 1 else blocks).reshape(like.shape)


def damped_inverse(gram: Tensor, damping: float, dtype: torch.dtype | None = None) -> Tensor:
    """(G + damping I)^+ for symmetric (..., r, r), well-behaved if G is (nearly) singular.

    Args:
        gram: G.
        damping: the damping.
        dtype: of the identity, by default that of G; the sum is made in the wider of the two.

    Returns:
        The pseudo-inverse.
    """
    eye = torch.eye(gram.shape[-1], device=gram.device, dtype=dtype or gram.dtype)
    return linalg.pinv(gram + damping * eye)
