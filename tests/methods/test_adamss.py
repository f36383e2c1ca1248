"""AdaMSS: what the laws cannot say. What needs PEFT's own is skipped without scikit-learn, which PEFT's needs."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft_tools import raw, tiny, tokens
from safetensors.torch import save_file
from torch import Tensor, nn

import funcadapt as fa
from funcadapt.parts import kmeans, subspace_allocation

# -- clusters ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "k"), [(5, 5), (6, 1), (24, 7), (1000, 12), (40, 39)])
def test_the_first_centers_are_numpys_choice(n: int, k: int) -> None:
    p = np.ones(n, dtype=np.float32) / np.float32(n)
    expected = np.random.RandomState(123456789).choice(n, size=k, replace=False, p=p / p.sum(dtype=np.float64))
    assert kmeans._choice(n, k) == expected.tolist()


def test_clusters_are_found() -> None:
    generator = torch.Generator().manual_seed(0)
    centers = 10 * torch.eye(3).repeat_interleave(5, 0)
    labels = kmeans.clusters(centers + 0.1 * torch.randn(15, 3, generator=generator), 3)
    assert [len(set(part.tolist())) for part in labels.split(5)] == [1, 1, 1]
    assert len(set(labels.tolist())) == 3


def _matrices() -> list[tuple[Tensor, int]]:
    generator = torch.Generator().manual_seed(0)
    found: list[tuple[Tensor, int]] = []
    for n, d, k in [(6, 3, 2), (6, 5, 5), (24, 8, 3), (64, 16, 5), (300, 40, 5)] * 4:
        x = torch.randn(n, d, generator=generator)
        if len(found) % 3 == 2:
            x[n // 2 :] = x[: n - n // 2]  # duplicates, and so empty clusters
        found.append((x, k))
    return found


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_clusters_are_those_of_scikit_learn() -> None:
    cluster: Any = import_module("sklearn.cluster")
    for x, k in _matrices():
        means = cluster.KMeans(n_clusters=k, init="random", n_init=1, max_iter=10, random_state=123456789)
        assert kmeans.clusters(x, k).tolist() == means.fit_predict(x.numpy()).tolist()


# -- files ------------------------------------------------------------------------------------------------


def test_a_file_of_other_clusters_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 6))
    fa.save(fa.init(model, fa.AdamssConfig(r=3, num_subspaces=2, target_modules=["0"])), tmp_path)
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(6, 4, generator=torch.Generator().manual_seed(4)))
    with pytest.raises(fa.AdapterError, match=r"adamss_B"):
        fa.functional_call(model, fa.load(tmp_path, model=model), (torch.ones(1, 4),))
    tensors = raw(tmp_path)
    del tensors["base_model.model.0.adamss_B.1"]
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(fa.AdapterFileError, match="for every subspace"):
        fa.load(tmp_path, model=model)


def test_errors() -> None:
    assert fa.AdamssConfig(init_weights=False).init_weights is None
    with pytest.raises(ValueError, match="must be 'orthogonal' or None"):
        fa.AdamssConfig(init_weights="gaussian")
    with pytest.raises(ValueError, match="`r` must be a positive integer, got 0"):
        fa.AdamssConfig(r=0)
    for fields, message in (
        ({"mask_interval": 0}, "mask_interval"),
        ({"asa_target_subspaces": 0}, "asa_target_subspaces"),
        ({"asa_schedule_exponent": 0.0}, "asa_schedule_exponent"),
        ({"init_warmup": 5, "final_warmup": 5}, "smaller than `final_warmup`"),
    ):
        fa.AdamssConfig(**fields)  # it matters only with ASA
        with pytest.raises(ValueError, match=message):
            fa.AdamssConfig(use_asa=True, **fields)


# -- ASA --------------------------------------------------------------------------------------------------

ASA: dict[str, Any] = {
    "r": 4,
    "num_subspaces": 3,
    "target_modules": ["q_proj", "v_proj"],
    "init_weights": None,
    "use_asa": True,
    "asa_target_subspaces": 4,
    "init_warmup": 1,
    "final_warmup": 9,
    "mask_interval": 2,
}


def _grads(model: nn.Module, adapter: fa.Adapter) -> Any:
    def loss(params: Any) -> Tensor:
        out = fa.functional_call(model, adapter.replace(params=params), (), tokens("llama"))
        return out.logits.logsumexp(-1).mean()

    return torch.func.grad(loss)(adapter.params)


def test_subspaces_are_left_out_down_to_the_target() -> None:
    model = tiny("llama")
    adapter = fa.init(model, fa.AdamssConfig(**ASA))
    state, counts = subspace_allocation.start(adapter.params), list[int]()
    for step in range(11):
        grads = _grads(model, adapter)
        stepped = torch.utils._pytree.tree_map(lambda p, g: p - 0.1 * g, adapter.params, grads)
        params = subspace_allocation.keep(state, adapter.params, stepped)
        for path, on in state.active.items():
            for i, trained in enumerate(on.tolist()):
                same = torch.equal(params[path][f"adamss_B.{i}"], adapter.params[path][f"adamss_B.{i}"])
                assert same != trained
        adapter = adapter.replace(params=params)
        state = subspace_allocation.update(adapter.config, state, adapter.params, grads, step)
        counts.append(sum(int(on.sum()) for on in state.active.values()))
    assert counts == [12, 12, 9, 9, 5, 5, 4, 4, 4, 4, 4]
    assert counts[2::2] == [subspace_allocation.budget(adapter.config, step, 12) for step in (2, 4, 6, 8)] + [4]


def test_the_allocation_goes_through_vmap() -> None:
    model = tiny("llama")
    adapters = [fa.init(model, fa.AdamssConfig(**ASA), seed=seed) for seed in range(2)]
    every = [_grads(model, adapter) for adapter in adapters]
    config = adapters[0].config

    def run(params: Any, grads: Any) -> Any:
        state = subspace_allocation.update(config, subspace_allocation.start(params), params, grads, 1)
        return subspace_allocation.update(config, state, params, grads, 2).active

    stacks = (torch.utils._pytree.tree_map(lambda *t: torch.stack(t), *each) for each in
              ([a.params for a in adapters], every))  # fmt: skip
    found = torch.func.vmap(run)(*stacks)
    for i, (adapter, grads) in enumerate(zip(adapters, every, strict=True)):
        for path, on in run(adapter.params, grads).items():
            assert torch.equal(found[path][i], on)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # PEFT's use of transformers
def test_the_live_model_is_allocated_as_in_peft() -> None:
    """But for one subspace: PEFT wants more than the smallest score that may stay, and leaves that one out, too."""
    import funcadapt.peft as shim

    models: list[Any] = []
    for package in (peft, shim):
        torch.manual_seed(3)
        models.append(package.get_peft_model(tiny("llama"), package.AdamssConfig(**ASA)))
    for step in range(3):
        flags: list[set[str]] = []
        for model in models:
            model.zero_grad()
            model(**tokens("llama")).logits.logsumexp(-1).mean().backward()
            with torch.no_grad():
                for p in model.parameters():
                    if p.grad is not None:
                        p -= 0.1 * p.grad
            model.base_model.update_and_allocate(step)
            flags.append({name for name, p in model.named_parameters() if p.requires_grad})
        theirs, ours = flags
        assert theirs <= ours
        assert [len(theirs), len(ours)] == ([24, 24] if step < 2 else [16, 18])  # an A and a B each
