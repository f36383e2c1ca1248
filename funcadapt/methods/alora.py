"""aLoRA, Activated LoRA: LoRA that acts from its invocation on, the last place where certain tokens stand.

    y_t = W x_t + b + s * B A drop(x_t)     for the last k tokens of a row, k its offset
    y_t = W x_t + b                         for all tokens before

What the base model has computed for a text, its key-value cache too, can be kept when the adapter is invoked at the end
of it. The offset of each row is an input of the call, and `offsets` finds it:

    inputs = {"alora_offsets": offsets(input_ids, adapter.config)}
    fa.functional_call(model, adapter, (input_ids,), inputs=inputs)

It is (rows) of integers, as PEFT counts: from the start of the last invocation to the end of the row; 0 where there is
none. With a cache, the tokens of later calls come after the invocation, and the same offsets are right for them. A
layer sees rows and tokens as its first two axes, or flattened to one.

Leaves, init and parameters: LoRA's. There is no dense form, as a weight would act on all tokens.
Cost: LoRA's; the mask is multiplied into the r-wide intermediate.

Source: Greenewald et al. 2025, arXiv:2504.12397. Differs from PEFT: also on embeddings; offsets of beams and returned
sequences are repeated (PEFT refuses beam search); a call without offsets raises (PEFT is silently the base model);
dropout draws for all tokens, so that equal seeds give other numbers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from funcadapt.errors import SiteError
from funcadapt.layer import Layer, dropout
from funcadapt.method import Leaf, Method, register
from funcadapt.methods import lora
from funcadapt.parts import lora_forms, lowrank
from funcadapt.parts.lora_variants import asks

INPUT = "alora_offsets"


def offsets(input_ids: Tensor, config: lora.LoraConfig) -> Tensor:
    """How many tokens at the end of each row the adapter acts on: those from its last invocation on.

    Args:
        input_ids: token ids (rows, tokens), or (tokens).
        config: the config, which has the `alora_invocation_tokens`.

    Returns:
        (rows), or 0-d; 0 where they do not occur.

    Example:
        >>> import torch
        >>> import funcadapt as fa
        >>> from funcadapt.methods.alora import offsets
        >>> config = fa.LoraConfig(target_modules=["0"], alora_invocation_tokens=[5, 6])
        >>> offsets(torch.tensor([[5, 6, 5, 6, 1], [5, 1, 6, 5, 5]]), config)
        tensor([3, 0])
    """
    wanted = torch.tensor(list(config.alora_invocation_tokens or ()), dtype=input_ids.dtype, device=input_ids.device)
    tokens, size = input_ids.shape[-1], wanted.shape[0]
    if not size or size > tokens:
        return torch.zeros(input_ids.shape[:-1], dtype=torch.long, device=input_ids.device)
    found = (input_ids.unfold(-1, size, 1) == wanted).all(-1)
    places = torch.arange(tokens - size + 1, device=input_ids.device)
    last = torch.where(found, places, -1).amax(-1)
    return torch.where(last >= 0, tokens - last, 0)


def active(layer: Layer, p: Leaf, y: Tensor) -> Tensor:
    """Where the adapter acts: bool, of y's shape without features, (rows) or (rows, tokens, ...)."""
    given, path = p.get(INPUT), layer.site.path
    if given is None:
        raise SiteError(
            f"aLoRA at {path!r} needs to know where it begins: fa.functional_call(..., inputs={{{INPUT!r}: offsets}}), "
            "see funcadapt.methods.alora.offsets. In a PeftModel they follow from `input_ids`; pass `alora_offsets` "
            "where it has none."
        )
    rows = y.shape[0] if y.ndim > 1 else 0
    times = rows // max(1, given.numel())
    if given.ndim != 1 or given.shape[0] * times != rows:
        raise SiteError(
            f"aLoRA at {path!r} got {INPUT} of shape {tuple(given.shape)} for an output of shape {tuple(y.shape)}: "
            "expected one offset for each row."
        )
    k = given.to(y.device).unsqueeze(1)
    if y.ndim == 2:  # rows and tokens are one axis
        return (torch.arange(times, device=y.device) >= times - k).reshape(rows)
    on = torch.arange(y.shape[1], device=y.device) >= y.shape[1] - k
    # beams and return sequences: each entry is for consecutive rows
    on = on if times == 1 else on.repeat_interleave(times, 0)
    return on.reshape(*on.shape, *(1,) * (y.ndim - 3)).expand(y.shape[:-1])


def after(layer: Layer, p: Leaf, x: Tensor, y: Tensor) -> Tensor:
    """Y + s * B A drop(x), for the tokens from the invocation on."""
    config: Any = layer.config
    if not y.numel():
        return y
    on, x = active(layer, p, y), dropout(layer, x, config.lora_dropout)
    if layer.site.kind == "embedding":
        return torch.where(on.unsqueeze(-1), lora_forms.add_delta(layer, p, x, y).to(y.dtype), y)
    a, b = p["lora_A"], p["lora_B"]
    s = on.reshape(-1, 1) * p["scaling"]
    h = F.linear(x.to(a.dtype), a).reshape(s.shape[0], a.shape[0]) * s
    if "lora_B_bias" in p:
        return (y + (F.linear(h, b) + p["lora_B_bias"] * s).view(y.shape)).to(y.dtype)
    if h.dtype != y.dtype or b.dtype != y.dtype:
        return (y + F.linear(h, b).view(y.shape)).to(y.dtype)
    return torch.addmm(y.reshape(-1, y.shape[-1]), h, b.t()).view(y.shape)


def weight(layer: Layer, p: Leaf, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """There is none.

    Args:
        layer: the layer.
        p: the leaves.
        weight: its weight.
        bias: its bias.

    Raises:
        SiteError: always.
    """
    raise SiteError(
        f"aLoRA at {layer.site.path!r} does not support merging: it acts on the tokens from its invocation on, and a "
        "weight acts on all."
    )


METHOD = register(
    Method(
        name="alora",
        config=lora.LoraConfig,
        when=asks("alora_invocation_tokens"),
        kinds=frozenset({"linear", "hf_conv1d", "embedding"}),
        keys=lora.METHOD.keys,
        init=lora.init,
        after=after,
        weight=weight,
        buffers=lora.buffers,
        describe=lora.describe,
        check=lora.check,
        inputs=frozenset({INPUT}),
        layout=lora.layout,
        residual=lora.residual,
        dropout=lora.METHOD.dropout,
        reads=frozenset(),
        with_rank=lora.with_rank,
        neutral=lora.neutral,
        algebra=lowrank.ALGEBRA,
        view=lora.VIEW,
    )
)
