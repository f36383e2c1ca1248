"""BEFT: what the laws cannot say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft_tools import raw, tiny
from safetensors.torch import save_file
from torch import Tensor, nn

import funcadapt as fa


class Scaled(nn.Embedding):
    """Gemma's."""

    def __init__(self) -> None:
        super().__init__(5, 3)
        self.register_buffer("embed_scale", torch.tensor(4.0), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.embed_scale


def test_a_scaled_embedding_is_merged_rightly() -> None:
    model, ids = nn.Sequential(Scaled()), torch.tensor([[1, 4, 0]])
    adapter = fa.init(model, fa.BeftConfig(target_modules=["0"], init_weights=False))
    out = fa.functional_call(model, adapter, (ids,))
    torch.testing.assert_close(out, model(ids) + adapter.params["0"]["beft_bias"])
    torch.testing.assert_close(torch.func.functional_call(model, fa.merge(model, adapter), (ids,)), out)


def test_the_values_are_the_default_targets() -> None:
    model = tiny("llama")
    assert [site.path for site in fa.sites(model, fa.BeftConfig())] == [
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.self_attn.v_proj",
    ]
    with pytest.raises(fa.SiteError, match="no bias to hold it"):  # PEFT: a ValueError
        fa.merge(model, fa.init(model, fa.BeftConfig()))


def test_a_file_with_another_shape_is_refused(tmp_path: Path) -> None:
    fa.save(fa.init(nn.Sequential(nn.Linear(2, 3)), fa.BeftConfig(target_modules=["0"])), tmp_path)
    save_file({k: t.flatten() for k, t in raw(tmp_path).items()}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(fa.AdapterFileError, match=r"expected \(1, out\)"):
        fa.load(tmp_path)
