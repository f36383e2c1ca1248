"""TinyLoRA: groups of layers, projections from a seed, and ranks that small layers do not have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft_tools import raw
from torch import nn

import funcadapt as fa
from funcadapt.methods.tinylora import groups


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(3, 3), nn.Linear(3, 2)).double()


TARGETS = ["0", "1", "2", "3"]


@pytest.mark.parametrize(
    ("n", "tying", "expected"),
    [
        (4, 0.0, [0, 1, 2, 3]),
        (4, 1.0, [0, 0, 0, 0]),
        (4, 0.5, [0, 0, 1, 1]),
        (5, 0.3, [0, 1, 2, 3, 3]),
        (7, 0.6, [0, 0, 1, 1, 2, 2, 2]),
        (1, 1.0, [0]),
    ],
)
def test_the_groups_are_pefts(n: int, tying: float, expected: list[int]) -> None:
    assert groups(n, tying) == expected


def test_layers_of_a_group_train_one_vector() -> None:
    base, x = model(), torch.randn(5, 4, dtype=torch.float64)
    config = fa.TinyLoraConfig(u=3, weight_tying=0.5, target_modules=TARGETS, init_weights="uniform")
    adapter = fa.init(base, config)
    assert sorted(adapter.params) == [""]
    assert sorted(adapter.params[""]) == ["tinylora_v.0", "tinylora_v.1"]
    assert adapter.num_parameters() == 6
    leaves = {name: v.clone().requires_grad_() for name, v in adapter.params[""].items()}
    fa.functional_call(base, adapter.replace(params={"": leaves}), x).pow(2).sum().backward()
    assert all(v.grad is not None and v.grad.abs().min() > 0 for v in leaves.values())
    # the second group has the last two layers
    changed = {"tinylora_v.0": adapter.params[""]["tinylora_v.0"], "tinylora_v.1": torch.zeros(3, dtype=torch.float64)}
    out = fa.functional_call(base, adapter.replace(params={"": changed}), x)
    merged = fa.merge(base, adapter.replace(params={"": changed}))
    assert torch.equal(merged["2.weight"], base[2].weight)
    assert not torch.equal(merged["1.weight"], base[1].weight)
    torch.testing.assert_close(out, torch.func.functional_call(base, merged, (x,)))


def test_projections_follow_from_the_seed_and_the_number_of_the_layer(tmp_path: Path) -> None:
    base, x = model(), torch.randn(5, 4, dtype=torch.float64)
    for save in (True, False):
        config = fa.TinyLoraConfig(u=3, target_modules=TARGETS, init_weights="uniform", save_projection=save)
        adapter = fa.init(base, config)
        fa.save(adapter, tmp_path)
        assert any("tinylora_P" in key for key in raw(tmp_path)) == save
        again = fa.load(tmp_path, model=base)
        assert torch.equal(fa.functional_call(base, again, x), fa.functional_call(base, adapter, x))
        generator = torch.Generator().manual_seed(42 + 2)
        expected = torch.normal(0.0, 1 / 2**0.5, (3, 2, 2), generator=generator).double()
        assert torch.equal(again.buffers["2"]["tinylora_P"], expected)


def test_a_small_layer_has_the_rank_that_it_can_have(tmp_path: Path) -> None:
    base, x = model(), torch.randn(5, 4, dtype=torch.float64)
    config = fa.TinyLoraConfig(r=5, u=3, target_modules=TARGETS, init_weights="uniform")
    adapter = fa.init(base, config)
    ranks = [adapter.config.rank(adapter.leaves(path)) for path in TARGETS]
    assert ranks == [4, 3, 3, 2]
    fa.save(adapter, tmp_path)
    assert torch.equal(fa.functional_call(base, fa.load(tmp_path, model=base), x), fa.functional_call(base, adapter, x))
    # the whole weight is between A and B then
    p = adapter.buffers["3"]
    torch.testing.assert_close(p["tinylora_B"] @ p["tinylora_A"], base[3].weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "fields",
    [{"r": 0}, {"u": 0}, {"weight_tying": 1.5}, {"init_weights": "normal"}, {"bias": "lora_only"},
     {"tinylora_dropout": 1.0}, {"layers_pattern": "h"}],
    ids=str,
)  # fmt: skip
def test_what_contradicts_itself_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        fa.TinyLoraConfig(**fields)  # pyright: ignore[reportArgumentType]
