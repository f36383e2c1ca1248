"""GLoRA: what its forms cost, and files that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import funcadapt as fa

VECTORS: dict[str, Any] = {"config_A_B": "vector", "config_C": "none", "config_D_E": "vector"}


def random(model: nn.Module, config: fa.AdapterConfig) -> fa.Adapter:
    adapter = fa.init(model, config)
    moved = {path: {name: torch.randn_like(leaf) for name, leaf in p.items()} for path, p in adapter.params.items()}
    return adapter.replace(params=moved)


class Scaled(nn.Embedding):
    """An embedding with a scale, as Gemma's."""

    embed_scale = 3.0

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.embed_scale


@pytest.mark.parametrize("layer", [
    nn.Linear(4, 6), nn.Linear(4, 6, bias=False), nn.Embedding(10, 6, padding_idx=3), Scaled(10, 6),
    nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"), nn.Conv2d(4, 6, 3, stride=2),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("form", ["vector", "constant"])
def test_vectors_build_no_matrix(layer: nn.Module, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(layer).double()
    spatial = (5,) * (layer.weight.ndim - 2)  # pyright: ignore
    x = torch.tensor([[0, 3, 9]]) if isinstance(layer, nn.Embedding) else torch.randn(2, 4, *spatial).double()
    adapter = random(model, fa.GloraConfig(**{**VECTORS, "config_A_B": form}, target_modules=["0"]))
    expected = torch.func.functional_call(model, fa.merge(model, adapter), (x,))
    monkeypatch.setattr("funcadapt.methods.glora.weight_change", lambda *_: pytest.fail("built a matrix"))
    torch.testing.assert_close(fa.functional_call(model, adapter, (x,)), expected)


def test_without_c_vectors_do_not_read_the_weight() -> None:
    class Opaque(nn.Linear):
        """A layer whose weight is not what it multiplies with, as a quantised one's."""

        def forward(self, input: Tensor) -> Tensor:
            return torch.nn.functional.linear(input, 2 * self.weight, self.bias)

    model, x = nn.Sequential(Opaque(4, 6)).double(), torch.randn(3, 4).double()
    adapter = random(model, fa.GloraConfig(**VECTORS, target_modules=["0"]))
    plain = nn.Sequential(nn.Linear(4, 6)).double()
    plain.load_state_dict({"0.weight": 2 * model[0].weight, "0.bias": model[0].bias})
    torch.testing.assert_close(fa.functional_call(model, adapter, (x,)), fa.functional_call(plain, adapter, (x,)))


def test_nothing_at_all() -> None:
    none = {"config_A_B": "none", "config_C": "none", "config_D_E": "none"}
    with pytest.raises(fa.TargetError, match="nothing to train"):
        fa.init(nn.Sequential(nn.Linear(4, 6)), fa.GloraConfig(**none, target_modules=["0"]))


def test_c_needs_a_bias() -> None:
    with_bias, without = (nn.Sequential(nn.Linear(4, 6, bias=bias)) for bias in (True, False))
    adapter = random(with_bias, fa.GloraConfig(r=2, target_modules=["0"]))
    for use in (lambda: fa.functional_call(without, adapter, (torch.randn(3, 4),)), lambda: fa.merge(without, adapter)):
        with pytest.raises(fa.SiteError, match="no bias"):
            use()
    made = fa.init(without, fa.GloraConfig(r=2, target_modules=["0"]))
    assert sorted(made.buffers["0"]) == ["glora_C.zeros", "glora_D.zeros", "glora_E.zeros"]


def test_the_view_has_pefts_parts() -> None:
    model = fa.materialize(
        nn.Sequential(nn.Linear(4, 6)),
        fa.init(nn.Sequential(nn.Linear(4, 6)), fa.GloraConfig(r=2, config_C="none", target_modules=["0"])),
    )
    printed = repr(model)
    for name in ("GloraLoraPath()", "GloraEmptyPath()", "GloraScalarPath()"):
        assert name in printed
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "glora" in name}
    assert {name.rpartition(".")[2] for name in trained} == {"Xd", "Xu", "X"}
    assert "0.glora_C.default.zeros" in model.state_dict()


@pytest.mark.parametrize(
    ("fields", "match"),
    [({"r": 0}, "`r`"), ({"config_A_B": "matrix"}, "config_A_B"), ({"config_C": "constant"}, "config_C"),
     ({"config_D_E": "lora"}, "config_D_E"), ({"bias": "lora_only"}, "bias")],
    ids=str,
)  # fmt: skip
def test_values_that_make_no_config(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        fa.GloraConfig(**fields)


@pytest.mark.parametrize("change", [
    lambda p: {k: v for k, v in p.items() if k != "glora_A.Xu"},
    lambda p: {k: v for k, v in p.items() if k != "glora_D.X"},
    lambda p: {**p, "glora_B.X": torch.zeros(6, 1)},
    lambda p: {**p, "glora_A.Xd": torch.zeros(6, 3)},
    lambda p: {**p, "glora_C.Xu": torch.zeros(3, 1)},
])  # fmt: skip
def test_leaves_that_do_not_fit_the_config_are_refused(change: Any, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 6))
    adapter = fa.init(model, fa.GloraConfig(target_modules=["0"], r=2))
    fa.save(adapter.replace(params={"0": change(adapter.params["0"])}), tmp_path)
    with pytest.raises(fa.AdapterFileError, match="0"):
        fa.load(tmp_path)
