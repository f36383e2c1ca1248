"""The loss of a causal language model, a value for each row, without a copy of the logits."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from funcadapt.errors import AdapterError


class _TokenNLL(torch.autograd.Function):
    """The negative log-likelihood of each token, in at least float32, one row of the batch at a time.

    Nothing of the size of the logits is kept but the logits, and nothing of that size is made but their gradient.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        wide = torch.promote_types(logits.dtype, torch.float32)
        total = torch.stack([row.to(wide).logsumexp(-1) for row in logits])
        own = logits.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1).to(wide)
        ctx.save_for_backward(logits, targets, total)
        return (total - own).masked_fill(targets < 0, 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        logits, targets, total = ctx.saved_tensors
        grad = grad.masked_fill(targets < 0, 0.0)
        out = torch.empty_like(logits)
        for row, goal, norm, g, into in zip(logits, targets, total, grad, out, strict=True):
            p = torch.sub(row.to(norm.dtype), norm.unsqueeze(-1), out=into if into.dtype == norm.dtype else None)
            p.exp_().scatter_add_(-1, goal.clamp(min=0).unsqueeze(-1), p.new_full((len(goal), 1), -1.0))
            p.mul_(g.unsqueeze(-1))
            if p.data_ptr() != into.data_ptr():
                into.copy_(p)
        return out, None


def token_loss(output: Any, batch: Any) -> Tensor:
    """The loss of a causal language model, for each row: the mean negative log-likelihood of its tokens.

    Args:
        output: what the model returned: has `logits`, (rows, length, vocabulary).
        batch: token ids, (rows, length); or a dict with `input_ids`, and perhaps `labels` (-100 is left out) or an
            `attention_mask` (0 is left out).

    Returns:
        The losses, (rows,), in at least float32.

    Raises:
        AdapterError: if there are no logits or no ids.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> from funcadapt import sweep
        >>> sweep.token_loss(SimpleNamespace(logits=torch.zeros(2, 3, 10)), torch.zeros(2, 3, dtype=torch.long))
        tensor([2.3026, 2.3026])
    """
    logits: Any = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)  # pyright: ignore
    fields = typing.cast("Mapping[str, Any]", batch if isinstance(batch, Mapping) else {"input_ids": batch})
    labels = fields.get("labels", fields.get("input_ids"))
    if not isinstance(logits, Tensor) or logits.ndim != 3 or not isinstance(labels, Tensor):
        raise AdapterError(
            "The default loss is for causal language models: an output with `logits`, and a batch of token ids or a "
            "dict with `input_ids`. Pass loss=, a function of (output, batch) that returns one loss for each row."
        )
    if "labels" not in fields and fields.get("attention_mask") is not None:
        labels = labels.masked_fill(fields["attention_mask"] == 0, -100)
    targets = torch.cat([labels[:, 1:], labels.new_full((len(labels), 1), -100)], 1)  # the last token predicts nothing
    nll = typing.cast("Tensor", _TokenNLL.apply(logits, targets))  # pyright: ignore[reportUnknownMemberType]
    return nll.sum(1) / (targets >= 0).sum(1).clamp(min=1)
