"""Operations for transformers' loading of checkpoints: the factors of experts, from one each to all in one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps


class StackFactors(ConversionOps):
    """The factors A or B of all experts as one, as they are for a 3-D parameter.

    Of an expert with fused weights [W0; W1], the update [B0 A0; B1 A1] is blockdiag(B0, B1) [A0; A1]. The result has
    A (E r, in) with the expert first and B (out, r E) with the expert last, where r is the sum of the ranks.

    Args:
        factor: "lora_A" or "lora_B".
    """

    def __init__(self, factor: str) -> None:
        self.factor = factor

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.factor!r})"

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        """Make one tensor of many.

        Args:
            input_dict: for each pattern, the tensors of the experts in their order.
            source_patterns: the patterns, in the order in which the weights are fused.
            target_patterns: the one name of the result.
            **kwargs: what other operations need.

        Returns:
            The tensor under its name.

        Raises:
            ValueError: if one of the fused weights has no factors in the checkpoint.
        """
        if missing := [pattern for pattern in source_patterns if pattern not in input_dict]:
            raise ValueError(f"The checkpoint has no tensors for {missing}, which are fused with {list(input_dict)}.")
        stacks = [torch.stack(list(input_dict[pattern])) for pattern in source_patterns]
        if self.factor == "lora_A":
            return {target_patterns[0]: torch.cat(stacks, dim=1).flatten(0, 1)}
        blocks: list[Tensor] = [torch.block_diag(*parts) for parts in zip(*stacks, strict=True)]  # pyright: ignore
        return {target_patterns[0]: torch.stack(blocks, dim=-1).flatten(1)}

    @property
    def reverse_op(self) -> ConversionOps:
        """There is none: an adapter is saved in its present form."""
        raise NotImplementedError("The factors of experts are saved together, not taken apart.")
