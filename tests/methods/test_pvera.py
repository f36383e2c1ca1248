"""PVeRA: what it draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_tools import layer_model, peft_save, wrap
from torch import nn

import funcadapt as fa

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def _moved(model: nn.Module, **fields: Any) -> fa.Adapter:
    adapter = fa.init(model, fa.PveraConfig(r=3, target_modules=["0"], **fields))
    generator = torch.Generator().manual_seed(1)
    params = {
        path: {n: t + 0.5 * torch.randn(t.shape, generator=generator).to(t.dtype) for n, t in leaves.items()}
        for path, leaves in adapter.params.items()
    }
    return adapter.replace(params=params)


@pytest.mark.parametrize("seed", [None, 5])
def test_sampling_at_inference_is_peft_s(seed: int | None, tmp_path: Path) -> None:
    """Call after call."""
    model, x, target = layer_model("linear")
    fields = {**target, "r": 3, "sample_at_inference": True, "generator_seed": seed}
    theirs: Any = wrap(model, peft.PveraConfig(**fields))
    bare = layer_model("linear")[0].eval()
    adapter = fa.load(peft_save(theirs, tmp_path))
    outs = []
    for call in (lambda: theirs(x), lambda: fa.functional_call(bare, adapter, x)):
        torch.manual_seed(3)
        outs.append([call().detach() for _ in range(3)])
    for a, b in zip(*outs, strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.allclose(outs[1][0], outs[1][1])


@pytest.mark.parametrize(
    "layer", [nn.Linear(4, 6), nn.Conv2d(4, 6, 3, groups=2), nn.Conv1d(4, 6, 3), nn.Embedding(9, 6)], ids=str
)
def test_moments(layer: nn.Module) -> None:
    """The mean is the dense form; the variance is that of independent numbers with the variances that it computes."""
    model = nn.Sequential(layer).double().train()
    adapter = _moved(model)
    shape = {"Linear": (1, 4), "Conv2d": (1, 4, 4, 4), "Conv1d": (1, 4, 5)}.get(type(layer).__name__)
    x = torch.tensor([3]) if shape is None else torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        expected = torch.func.functional_call(model, fa.merge(model, adapter), (x,))
        torch.manual_seed(0)
        outs = torch.stack([fa.functional_call(model, adapter, x) for _ in range(3000)])
        # the log-variance is what a layer of A's other half gives
        p, r = adapter.leaves("0") | adapter.leaves(""), 3
        columns = torch.Size(layer.weight.shape[1:]).numel() if shape is not None else 9  # pyright: ignore
        half = (p["pvera_lambda_d"].reshape(-1, 1) * p["pvera_A"][:, :columns])[r:]
        squares = (p["pvera_lambda_b"].reshape(-1, 1) * p["pvera_B"]) ** 2
        groups = getattr(layer, "groups", 1)
        if isinstance(layer, nn.Embedding):
            variance = (half[:, x].exp().t()) @ squares.t()
        elif isinstance(layer, nn.Linear):
            variance = (x @ half.t()).exp() @ squares.t()
        else:
            kernel: Any = layer.weight
            convolve = torch.nn.functional.conv1d if kernel.ndim == 3 else torch.nn.functional.conv2d
            parts = [convolve(part, half.reshape(r, *kernel.shape[1:])).exp() for part in x.chunk(groups, 1)]
            per_group = [s @ v.flatten(2) for s, v in zip(squares.chunk(groups), parts, strict=True)]
            variance = torch.cat(per_group, 1).reshape(expected.shape)
    spread = variance.sqrt()
    assert ((outs.mean(0) - expected).abs() < 5 * spread / 3000**0.5).all()
    assert ((outs.var(0) / variance - 1).abs() < 0.2).all()


def test_a_layer_that_is_used_by_its_weight_is_refused() -> None:
    model = nn.Sequential(nn.MultiheadAttention(8, 2, batch_first=True))
    with pytest.raises(fa.SiteError, match=r"pvera cannot adapt '0\.in_proj_weight'"):
        fa.init(model, fa.PveraConfig(r=3, target_modules=["0"]))


def test_many_adapters_draw_for_themselves() -> None:
    model = nn.Sequential(nn.Linear(4, 6)).train()
    stack, x = fa.stack([_moved(model)] * 3), torch.randn(6, 4)
    torch.manual_seed(0)
    a, b, c = fa.functional_call(model, fa.grouped(stack, expand=True), x).split(6)
    assert not torch.allclose(a, b)
    assert not torch.allclose(b, c)
