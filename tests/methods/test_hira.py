"""HiRA: what PEFT gets wrong, embeddings without a matrix of their size, and errors."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import funcadapt as fa


def random(model: nn.Module, config: fa.AdapterConfig) -> fa.Adapter:
    return fa.init(model, config).map(lambda t: torch.randn_like(t) if t.ndim else t)


def theirs(model: nn.Module, **fields: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, peft.HiraConfig(target_modules=["0"], **fields))


def test_the_rank_pattern_acts_and_pefts_files_that_ignore_it_can_be_read(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"r": 3, "rank_pattern": {"0": 2}}
    model = nn.Sequential(nn.Linear(4, 6))
    adapter = fa.init(model, fa.HiraConfig(target_modules=["0"], **fields))
    assert adapter.params["0"]["hira_A"].shape == (2, 4)
    fa.save(adapter, tmp_path / "ours")
    assert fa.load(tmp_path / "ours", model=model).config.rank_pattern == {"0": 2}  # pyright: ignore

    wrapped = theirs(nn.Sequential(nn.Linear(4, 6)), **fields)
    assert wrapped.base_model.model[0].hira_A["default"].shape == (3, 4)
    wrapped.save_pretrained(tmp_path / "theirs")
    read = fa.load(tmp_path / "theirs", model=model)
    assert read.params["0"]["hira_A"].shape == (3, 4)
    fa.save(read, tmp_path / "again")  # with the config that the leaves say
    config: Any = fa.load(tmp_path / "again", model=model).config
    assert config.at("0").r == 3


@pytest.mark.parametrize("layer", [
    nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"),
    nn.Conv2d(4, 6, 3, padding=1, groups=2),
    nn.Conv3d(4, 6, (1, 1, 3)),
], ids=str)  # fmt: skip
def test_convolutions_that_peft_gets_wrong_or_refuses(layer: nn.Module) -> None:
    model = nn.Sequential(layer).double()
    x = torch.randn(2, 4, *(5,) * (layer.weight.ndim - 2)).double()  # pyright: ignore
    adapter = random(model, fa.HiraConfig(r=2, target_modules=["0"]))
    a, b = adapter.params["0"]["hira_A"], adapter.params["0"]["hira_B"]
    weight: Tensor = layer.weight * (1 + torch.einsum("or,ri->oi", b.flatten(1), a.flatten(1)).view_as(layer.weight))  # pyright: ignore
    expected = torch.func.functional_call(model, {"0.weight": weight}, (x,))
    out = fa.functional_call(model, adapter, (x,))
    torch.testing.assert_close(out, expected)
    try:
        wrapped = theirs(nn.Sequential(layer), r=2)
        wrapped.base_model.model[0].hira_A["default"].data = a
        wrapped.base_model.model[0].hira_B["default"].data = b
        assert not torch.allclose(wrapped(x), expected)
    except (NotImplementedError, RuntimeError):
        pass


@pytest.mark.parametrize("scale", [None, 3.0])
def test_an_embedding_builds_no_matrix(scale: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Scaled(nn.Embedding):
        embed_scale = scale

        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * (scale or 1.0)

    model = nn.Sequential(Scaled(10, 6, padding_idx=3)).double()
    adapter, x = random(model, fa.HiraConfig(r=2, target_modules=["0"])), torch.tensor([[0, 3, 9], [3, 5, 0]])
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in adapter.params["0"].items()}
    moved = adapter.replace(params={"0": leaves})
    expected = torch.func.functional_call(model, fa.merge(model, moved), (x,))
    slope = torch.randn(2, 3, 6).double()
    right = torch.autograd.grad((expected * slope).sum(), [leaves["hira_embedding_A"]])
    monkeypatch.setattr("funcadapt.methods.hira.ratio", lambda *_: pytest.fail("built a matrix"))
    out = fa.functional_call(model, moved, (x,))
    torch.testing.assert_close(out, expected)
    got = torch.autograd.grad((out * slope).sum(), [leaves["hira_embedding_A"]])
    torch.testing.assert_close(got, right)
    assert not got[0][:, 3].any()


def test_the_update_can_have_full_rank() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False)).double()
    adapter = random(model, fa.HiraConfig(r=1, target_modules=["0"]))
    delta = fa.merge(model, adapter)["0.weight"] - model[0].weight
    assert torch.linalg.matrix_rank(delta) == 8


@pytest.mark.parametrize(
    ("fields", "match"),
    [({"r": 0}, "`r`"), ({"rank_pattern": {"a": 0}}, "`r`.*'a'"), ({"hira_dropout": 1.0}, "hira_dropout"),
     ({"init_weights": "pissa"}, "init_weights"), ({"target_modules": "a", "layers_pattern": "h"}, "layers_pattern"),
     ({"target_modules": "a", "layers_to_transform": 1}, "layers_to_transform")],
    ids=str,
)  # fmt: skip
def test_values_that_make_no_config(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        fa.HiraConfig(**fields)


@pytest.mark.parametrize("change", [
    lambda p: {k: v for k, v in p.items() if k != "hira_B"},
    lambda p: {**p, "hira_embedding_A": torch.zeros(2, 4)},
    lambda p: {**p, "hira_B": torch.zeros(6, 3)},
    lambda p: {**p, "hira_B": torch.zeros(6, 2, 1)},
])  # fmt: skip
def test_leaves_that_do_not_fit_are_refused(change: Any, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 6))
    adapter = fa.init(model, fa.HiraConfig(target_modules=["0"], r=2))
    fa.save(adapter.replace(params={"0": change(adapter.params["0"])}), tmp_path)
    with pytest.raises(fa.AdapterFileError, match="0"):
        fa.load(tmp_path)
