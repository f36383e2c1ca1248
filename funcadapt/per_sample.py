"""Per-sample gradients of adapters: each row's own gradient, for all rows in one backward pass.

Every row is made a group of its own (`fa.grouped`) whose adapter is a view of the one adapter, so nothing is copied:

    grad[path][name][i] = d loss_i / d params[path][name]

For a low-rank leaf that gradient is itself small, r (in + out) numbers a row, and is computed directly as the
product of what autograd holds anyway: for LoRA (s B_i' g_i)' x_i and (s A x_i)' g_i, batched over rows. Methods without
a hand-written form run under `torch.func.vmap`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from funcadapt.adapter import Adapter
from funcadapt.call import functional_call
from funcadapt.errors import AdapterError
from funcadapt.many import grouped
from funcadapt.splitting import leading
from funcadapt.stacking import repeat

Loss = Callable[[Any], Tensor]
"""The model's output -> one loss for each row, (rows)."""

Grads = dict[str, dict[str, Tensor]]
"""Site path -> leaf name -> gradient of each row, (rows, *leaf.shape)."""


def grads(
    model: nn.Module,
    adapter: Adapter,
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    loss: Loss,
    inputs: Mapping[str, Tensor] | None = None,
) -> Grads:
    """The gradient of each row's loss with respect to the adapter.

    The model must treat rows independently (no batch norm in training mode), with the rows on the first axis. The
    model, the adapter and every `.grad` stay as they are.

    Args:
        model: the model.
        adapter: the adapter.
        args: positional arguments of the model; a tuple, or a single one.
        kwargs: keyword arguments of the model.
        loss: the model's output -> (rows).
        inputs: what the method needs of every row beside the model's arguments, as in `functional_call`.

    Returns:
        Path -> leaf name -> (rows, *leaf.shape), in the leaf's dtype.

    Raises:
        AdapterError: if there is no tensor with rows among the arguments, or the losses are not one for each row.

    Example:
        A step of DP-SGD (Abadi et al. 2016, arXiv:1607.00133): every row's gradient is clipped to norm C, the sum
        gets noise of scale sigma C, and the mean is the step.

        >>> import torch
        >>> import funcadapt as fa
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> config = fa.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        >>> adapter = fa.init(model, config)
        >>> x, target = torch.randn(8, 4), torch.randn(8, 3)
        >>> def loss(output):
        ...     return (output - target).pow(2).mean(1)
        >>> g = fa.per_sample.grads(model, adapter, x, loss=loss)
        >>> g["0"]["lora_A"].shape
        torch.Size([8, 2, 4])
        >>> C, sigma, lr = 0.1, 1.0, 0.5
        >>> factor = (C / fa.per_sample.norms_of(g)).clamp(max=1.0)
        >>> def private(p, g):
        ...     clipped = torch.einsum("i,i...->...", factor, g)
        ...     return p - lr * (clipped + sigma * C * torch.randn_like(p)) / len(factor)
        >>> adapter = adapter.replace(params=torch.utils._pytree.tree_map(private, adapter.params, g))

        An influence score in the manner of TRAK (Park et al. 2023, arXiv:2303.14186): gradients projected to k numbers,
        and the score of training row i for test row t is phi_t' (Phi' Phi)^-1 phi_i.

        >>> def features(x, target):
        ...     g = fa.per_sample.grads(model, adapter, x, loss=lambda y: (y - target).pow(2).mean(1))
        ...     flat = torch.cat([leaf.flatten(1) for leaves in g.values() for leaf in leaves.values()], 1)
        ...     k, seed = 6, torch.Generator().manual_seed(0)
        ...     return flat @ torch.randn(flat.shape[1], k, generator=seed) / k**0.5
        >>> train = features(x, target)
        >>> scores = features(x[:2], target[:2]) @ torch.linalg.pinv(train.T @ train) @ train.T
        >>> scores.shape
        torch.Size([2, 8])
    """
    leaves, _, total = _losses(model, adapter, args, kwargs, loss, inputs)
    flat = [leaf for named in leaves.values() for leaf in named.values()]
    found: list[Any] = [*torch.autograd.grad(total, flat, allow_unused=True)]
    result: Grads = {}
    for path, named in leaves.items():
        for name, leaf in named.items():
            gradient = found.pop(0)
            unused = gradient is None
            result.setdefault(path, {})[name] = leaf.new_zeros(leaf.shape) if unused else gradient
    return result


def norms(
    model: nn.Module,
    adapter: Adapter,
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    loss: Loss,
    inputs: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """The norm of each row's gradient over all leaves, without keeping the gradients: one leaf's at a time.

    Args:
        model: the model.
        adapter: the adapter.
        args: positional arguments of the model; a tuple, or a single one.
        kwargs: keyword arguments of the model.
        loss: the model's output -> (rows).
        inputs: as in `grads`.

    Returns:
        (rows), in float32, or float64 for float64 leaves.

    Raises:
        AdapterError: as in `grads`.

    Example:
        >>> import torch
        >>> import funcadapt as fa
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> adapter = fa.init(model, fa.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
        >>> x = torch.randn(8, 4)
        >>> def loss(output):
        ...     return output.pow(2).sum(1)
        >>> n = fa.per_sample.norms(model, adapter, x, loss=loss)
        >>> torch.allclose(n, fa.per_sample.norms_of(fa.per_sample.grads(model, adapter, x, loss=loss)))
        True
    """
    leaves, rows, total = _losses(model, adapter, args, kwargs, loss, inputs)
    flat = [leaf for named in leaves.values() for leaf in named.values()]
    squares = torch.zeros(rows, dtype=_wide(flat[0]), device=total.device)

    def fold(leaf: Tensor) -> None:
        nonlocal squares
        assert leaf.grad is not None
        squares = squares + _squares(leaf.grad).to(squares.device)
        leaf.grad = None

    for leaf in flat:
        leaf.register_post_accumulate_grad_hook(fold)  # pyright: ignore[reportUnknownMemberType]
    torch.autograd.backward(total, inputs=flat)
    return squares.sqrt()


def norms_of(gradients: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
    """The norm of each row's gradient, from the gradients.

    Args:
        gradients: path -> leaf name -> (rows, ...), as `grads` gives them.

    Returns:
        (rows), in float32, or float64 for float64 leaves.

    Example:
        >>> import torch
        >>> import funcadapt as fa
        >>> fa.per_sample.norms_of({"0": {"lora_A": torch.ones(2, 3, 3)}})
        tensor([3., 3.])
    """
    squares = [_squares(leaf) for leaves in gradients.values() for leaf in leaves.values()]
    return torch.stack([s.to(squares[0].device, squares[0].dtype) for s in squares]).sum(0).sqrt()


def _squares(gradient: Tensor) -> Tensor:
    return gradient.flatten(1).to(_wide(gradient)).pow(2).sum(1)


def _wide(leaf: Tensor) -> torch.dtype:
    return torch.promote_types(leaf.dtype, torch.float32)


def _losses(
    model: nn.Module, adapter: Adapter, args: Any, kwargs: Any, loss: Loss, inputs: Mapping[str, Tensor] | None
) -> tuple[Grads, int, Tensor]:
    """A view of every leaf for each row, the number of rows, and the sum of their losses."""
    positional: tuple[Any, ...] = args if isinstance(args, tuple) else (args,)  # pyright: ignore
    named: Mapping[str, Any] = {} if kwargs is None else kwargs
    first = leading(positional, named)
    if first is None:
        raise AdapterError("per_sample needs a tensor with rows on its first axis among the model's arguments.")
    rows = first.shape[0]
    many = repeat(adapter, rows)
    leaves = {
        path: {name: leaf.detach().requires_grad_() for name, leaf in named.items()}
        for path, named in many.params.items()
    }
    with torch.enable_grad():
        output = functional_call(model, grouped(many.replace(params=leaves)), positional, kwargs, inputs=inputs)
        losses = loss(output)
        total = losses.sum()
    if losses.shape != (rows,):
        raise AdapterError(
            f"per_sample: the loss has shape {tuple(losses.shape)}, expected ({rows},): one loss for each row. Do not "
            "average over the batch."
        )
    return leaves, rows, total
