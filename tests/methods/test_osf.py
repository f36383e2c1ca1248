"""OSF: what the laws cannot say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_tools import peft_save, tiny, wrap
from torch import nn
from transformers.pytorch_utils import Conv1D

import funcadapt as fa


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_a_step_leaves_the_large_directions_alone(shape: tuple[int, int]) -> None:
    model, x = nn.Sequential(nn.Linear(*shape)).double(), torch.randn(7, shape[0], dtype=torch.float64)
    adapter = fa.init(model, fa.OSFConfig(effective_rank=2, target_modules=["0"]))
    grads = torch.func.grad(lambda p: fa.functional_call(model, adapter.replace(params=p), (x,)).pow(2).sum())(
        adapter.params
    )["0"]
    u, _, v = torch.linalg.svd(model[0].weight.detach(), full_matrices=False)
    assert grads["osf_U_low"].abs().max() > 1e-2
    assert (u[:, :2].T @ grads["osf_U_low"]).abs().max() < 1e-5  # the decomposition is in float32
    assert grads["osf_V_low"].abs().max() > 1e-2
    assert (grads["osf_V_low"] @ v[:2].T).abs().max() < 1e-5


def test_several_adapters_add_up() -> None:
    """PEFT applies the first, and merges all (B6)."""
    model, x = nn.Sequential(nn.Linear(4, 6)).double(), torch.randn(3, 4, dtype=torch.float64)
    both = {
        str(seed): fa.init(model, fa.OSFConfig(target_modules=["0"], init_weights=False), seed=seed)
        for seed in range(2)
    }
    alone = [fa.functional_call(model, a, (x,)) - model(x) for a in both.values()]
    out = fa.functional_call(model, both, (x,))
    # the second one's decomposition is the one of the bare weight
    torch.testing.assert_close(out - model(x), sum(alone), rtol=0, atol=1e-12)
    merged = torch.func.functional_call(model, fa.merge(model, both), (x,))
    torch.testing.assert_close(merged, out, rtol=0, atol=1e-12)


def test_which_rank_is_kept() -> None:
    model = nn.ModuleDict({"up": nn.Linear(8, 12), "down": nn.Linear(12, 8), "one": nn.Linear(4, 1)})
    for rank, expected in ((None, 4), (3, 5), (0.25, 6), (100, 0)):
        adapter = fa.init(model, fa.OSFConfig(effective_rank=rank, target_modules=["up"]))
        assert adapter.config.rank(adapter.params["up"]) == expected
    config = fa.OSFConfig(effective_rank=2, rank_pattern={"ow": 7, "up|down": 1}, target_modules=["up", "down"])
    adapter = fa.init(model, config)
    assert [adapter.config.rank(adapter.params[name]) for name in ("up", "down")] == [7, 1]
    with pytest.raises(fa.SiteError, match=r"got None at 'one', whose weight is \(1, 4\)"):
        fa.init(model, fa.OSFConfig(target_modules=["one"]))
    with pytest.raises(ValueError, match="no regular expression"):
        fa.OSFConfig(rank_pattern={"(": 2})


def test_all_linear_layers_are_the_default_of_an_unknown_model() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Conv1D(4, 4), nn.LayerNorm(4))
    # PEFT skips transformers' Conv1D in silence
    assert [site.path for site in fa.sites(model, fa.OSFConfig())] == ["0", "1"]
    assert len(fa.sites(tiny("llama"), fa.OSFConfig())) == 14
    assert len(fa.sites(tiny("gpt2"), fa.OSFConfig())) == 6


def test_a_file_needs_the_model(tmp_path: Path) -> None:
    fields: Any = {"target_modules": ["q_proj"], "effective_rank": 0.5}
    folder = peft_save(wrap(tiny("llama"), peft.OSFConfig(**fields)), tmp_path)
    with pytest.raises(fa.AdapterFileError, match="Pass it"):
        fa.load(folder)
    assert len(fa.load(folder, model=tiny("llama")).params) == 2
