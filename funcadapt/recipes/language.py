"""Training, measuring and sampling adapters of causal language models, in the plainest way."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import funcadapt as fa


def train(
    model: Any,
    adapter: fa.Adapter,
    ids: Tensor,
    *,
    learning_rate: float,
    report: Callable[[float], None],
) -> fa.Adapter:
    """Trains an adapter with AdamW; the model and the adapter that was passed stay as they are.

    Args:
        model: a frozen causal language model.
        adapter: where to start.
        ids: token ids, `(steps, batch, length)`.
        learning_rate: the learning rate at the start; it falls linearly to zero.
        report: called with the loss after every step.

    Returns:
        The trained adapter.
    """
    params = {
        path: {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
        for path, leaves in adapter.params.items()
    }
    live = adapter.replace(params=params)
    flat = [leaf for leaves in params.values() for leaf in leaves.values()]
    optimizer = torch.optim.AdamW(flat, lr=learning_rate)
    for step, rows in enumerate(ids):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (1 - step / len(ids))
        loss = fa.functional_call(model, live, (rows,), {"labels": rows, "use_cache": False}).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()  # pyright: ignore[reportUnknownMemberType]
        report(loss.item())
    return live.map(Tensor.detach)


@torch.no_grad()
def perplexity(model: Any, adapter: fa.Adapter | None, ids: Tensor) -> float:
    """Measures how well a model, with or without an adapter, predicts a text.

    Args:
        model: a causal language model.
        adapter: the adapter; None for the bare model.
        ids: token ids, `(windows, length)`.

    Returns:
        The exponential of the mean negative log-likelihood of a token.
    """
    kwargs = {"labels": ids, "use_cache": False}
    out = model(ids, **kwargs) if adapter is None else fa.functional_call(model, adapter, (ids,), kwargs)
    return math.exp(out.loss.item())


@torch.no_grad()
def continue_prompt(
    model: Any,
    tokenizer: Any,
    adapters: Mapping[str, fa.Adapter],
    mixtures: Mapping[str, Mapping[str, float]],
    *,
    prompt: str,
    new_tokens: int,
) -> dict[str, str]:
    """Continues one prompt under several mixtures of adapters, greedily.

    All of them are one batch: the weight of an adapter may be a vector over the rows.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        adapters: the adapters, by name.
        mixtures: the rows, by name; each says how much of which adapter it gets, `{}` being none.
        prompt: the text to continue.
        new_tokens: how many tokens to add at most.

    Returns:
        The continuation in each row, without the prompt.
    """
    weights = {name: torch.tensor([mixture.get(name, 0.0) for mixture in mixtures.values()]) for name in adapters}
    ids = torch.tensor([tokenizer(prompt)["input_ids"]]).expand(len(mixtures), -1)
    with fa.applied(model, adapters, weights=weights):
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            repetition_penalty=1.2,  # a small model soon goes round in circles without one
            pad_token_id=tokenizer.eos_token_id,
        )
    texts = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    return dict(zip(mixtures, texts, strict=True))
