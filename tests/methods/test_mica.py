"""MiCA: what the laws cannot say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_tools import layer_model, peft_save, raw
from torch import nn

import funcadapt as fa


@pytest.mark.parametrize("kind", ["linear", "hf_conv1d", "embedding"])
def test_the_directions_are_those_of_peft(kind: str, tmp_path: Path) -> None:
    """PEFT takes no float64. The sign of a direction is the SVD's own."""
    model, x, target = layer_model(kind)
    config: Any = {**target, "r": 2, "init_lora_weights": "mica"}
    fan_in_fan_out = kind == "hf_conv1d"
    wrapped: Any = peft.get_peft_model(layer_model(kind)[0], peft.LoraConfig(**config, fan_in_fan_out=fan_in_fan_out))
    folder = peft_save(wrapped, tmp_path)
    adapter = fa.init(model, fa.LoraConfig(**config))
    name = "lora_embedding_B" if kind == "embedding" else "lora_B"
    b = adapter.buffers["inner.layer"][name]
    theirs = next(t for key, t in raw(folder).items() if name in key)
    torch.testing.assert_close(b @ b.T, theirs @ theirs.T, rtol=0, atol=1e-5)
    assert name not in adapter.params["inner.layer"]
    loaded = fa.load(folder, model=model)
    assert torch.equal(loaded.buffers["inner.layer"][name], theirs)
    torch.testing.assert_close(fa.functional_call(model, loaded, x), model(x))


def test_they_are_orthogonal_to_all_others() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)).double()
    adapter = fa.init(model, fa.LoraConfig(r=2, target_modules=["0"], init_lora_weights="mica"))
    b, w = adapter.buffers["0"]["lora_B"].reshape(2, 3), model[0].weight.reshape(2, 3, -1)
    u = torch.linalg.svd(w)[0][..., -1]
    torch.testing.assert_close((b * u).sum(1).abs(), torch.ones(2, dtype=torch.float64))


def test_a_rank_above_that_of_the_weight_is_refused() -> None:
    with pytest.raises(fa.SiteError, match="'0' needs r <= 4, got r=5"):
        fa.init(nn.Sequential(nn.Linear(4, 6)), fa.LoraConfig(r=5, target_modules=["0"], init_lora_weights="mica"))
