"""`Adapter`: an immutable value."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
from typing import Any

import optree
import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import funcadapt as fa


@pytest.fixture
def adapter() -> fa.Adapter:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    return fa.init(model, fa.LoraConfig(r=2, target_modules=["0", "1"], rank_pattern={"1": 3}))


def equal(a: fa.Adapter, b: fa.Adapter) -> bool:
    """Same paths, names, bits and config."""
    (leaves_a, spec_a), (leaves_b, spec_b) = pytree.tree_flatten(a), pytree.tree_flatten(b)
    return spec_a == spec_b and all(map(torch.equal, leaves_a, leaves_b))


def test_it_cannot_be_changed(adapter: fa.Adapter) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        adapter.params = {}  # pyright: ignore
    with pytest.raises(dataclasses.FrozenInstanceError):
        adapter.config.r = 4  # pyright: ignore
    with pytest.raises(TypeError, match="immutable"):
        adapter.config.rank_pattern["0"] = 4  # pyright: ignore


def test_replace_and_map_return_new_values(adapter: fa.Adapter) -> None:
    before = {id(t): t.clone() for t in adapter.tensors()}
    doubled = adapter.map(lambda t: t * 2)
    assert torch.equal(doubled.params["0"]["lora_A"], 2 * adapter.params["0"]["lora_A"])
    assert torch.equal(doubled.buffers["0"]["scaling"], 2 * adapter.buffers["0"]["scaling"])
    assert adapter.replace(buffers={}).params is adapter.params
    with pytest.raises(TypeError):
        adapter.replace(parms={})
    assert all(torch.equal(t, before[id(t)]) for t in adapter.tensors())


def test_it_says_what_it_is(adapter: fa.Adapter) -> None:
    assert repr(adapter) == "Adapter(lora, 2 sites, r=2..3, 44 parameters, float32)"
    assert adapter.num_parameters() == 2 * (4 + 6) + 3 * (6 + 2)
    assert sorted(adapter.leaves("0")) == ["lora_A", "lora_B", "scaling"]
    assert adapter.leaves("nowhere") == {}
    assert "bfloat16" in repr(adapter.to(torch.bfloat16))
    assert "meta" in repr(adapter.to(device="meta"))
    # a tree of in_dims prints, too
    assert repr(pytree.tree_map(lambda t: 0, adapter)).startswith("Adapter(params={'0': {'lora_A': 0")


def test_adapters_are_arithmetic_values(adapter: fa.Adapter) -> None:
    doubled = pytree.tree_map(torch.add, adapter, adapter)
    assert equal(doubled, adapter.map(lambda t: t * 2))
    with_optree: Any = optree.tree_map(torch.add, adapter, adapter)  # pyright: ignore
    assert equal(with_optree, doubled)


def test_other_configs_are_other_structures(adapter: fa.Adapter) -> None:
    other = adapter.replace(config=dataclasses.replace(adapter.config, lora_alpha=3))  # pyright: ignore
    with pytest.raises(ValueError, match=r"(?i)node|type|context"):
        pytree.tree_map(torch.add, adapter, other)


@pytest.mark.parametrize(
    "clone", [copy.copy, copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))], ids=["copy", "deepcopy", "pickle"]
)
def test_copies_are_equal(adapter: fa.Adapter, clone: Any) -> None:
    assert equal(clone(adapter), adapter)
    assert hash(clone(adapter).config) == hash(adapter.config)


def test_torch_load_trusts_an_adapter(adapter: fa.Adapter) -> None:
    """Exported programs and optimiser checkpoints hold adapters; `weights_only` loading accepts the plain value."""
    file = io.BytesIO()
    torch.save(adapter, file)
    file.seek(0)
    assert equal(torch.load(file, weights_only=True), adapter)


def test_the_spec_is_json(adapter: fa.Adapter) -> None:
    _, spec = pytree.tree_flatten(adapter)
    again = pytree.treespec_loads(pytree.treespec_dumps(spec))
    assert again == spec


def test_integer_leaves_keep_their_dtype() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4))
    config = fa.LoraConfig(r=2, target_modules=["1"], trainable_token_indices={"0": [1, 3]})
    adapter = fa.init(model, config).to(torch.float64)
    dtypes = {name: t.dtype for path in ("0", "1") for name, t in adapter.leaves(path).items()}
    assert dtypes["token_indices"] == torch.int64
    assert dtypes["trainable_tokens_delta"] == dtypes["lora_A"] == dtypes["scaling"] == torch.float64


def test_leaves_may_be_parameters_for_an_optimiser(adapter: fa.Adapter) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    trained = adapter.map(nn.Parameter)
    optimiser = torch.optim.SGD([t for leaves in trained.params.values() for t in leaves.values()], lr=0.1)
    x, target = torch.randn(8, 4), torch.randn(8, 2)

    def loss() -> Tensor:
        return (fa.functional_call(model, trained, (x,)) - target).pow(2).mean()

    first = loss()
    for _ in range(5):
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()
    assert loss() < first
