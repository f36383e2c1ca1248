"""LN tuning and trainable tokens: methods without sites, under the laws that apply to them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from cases import stacked, tree_close
from oracles import Snapshot
from peft_tools import logits, peft_save, same_adapters, tiny, tokens, wrap
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.utils import _pytree as pytree

import funcadapt as fa

ROWS = tokens("llama")["input_ids"].unique()[:3].tolist()
CONFIGS: dict[str, tuple[str, Callable[[], fa.AdapterConfig]]] = {
    "norms": ("llama", lambda: fa.LNTuningConfig()),
    "gpt2_norms": ("gpt2", lambda: fa.LNTuningConfig()),
    "linear": ("llama", lambda: fa.LNTuningConfig(target_modules=["o_proj", "norm"])),
    "tokens": ("llama", lambda: fa.TrainableTokensConfig(token_indices=ROWS)),
    "tied_tokens": ("llama_tied", lambda: fa.TrainableTokensConfig(token_indices=ROWS)),
}
# forward mode and vmap of the gradient need the math kernel of attention
pytestmark = pytest.mark.parametrize("name", CONFIGS)


class Setting:
    """A model, what it is called with, and adapters that do something."""

    def __init__(self, name: str) -> None:
        kind, make = CONFIGS[name]
        self.model, self.inputs, self.config = tiny(kind).double(), tokens(kind), make()
        self.fresh = fa.init(self.model, self.config)
        self.adapters = [self.moved(seed) for seed in range(3)]

    def moved(self, seed: int) -> fa.Adapter:
        g = torch.Generator().manual_seed(seed)

        def move(t: Tensor) -> Tensor:
            return t + 0.3 * torch.randn(t.shape, generator=g, dtype=t.dtype)

        return self.fresh.replace(params=pytree.tree_map(move, self.fresh.params))

    def call(self, adapters: Any, inputs: Any = None, **kwargs: Any) -> Tensor:
        return logits(fa.functional_call(self.model, adapters, (), inputs or self.inputs, **kwargs))


def test_a_new_adapter_changes_nothing_and_another_does(name: str) -> None:
    s = Setting(name)
    before = Snapshot(s.model)
    bare = logits(s.model(**s.inputs))
    assert torch.equal(s.call(s.fresh), bare)
    assert (s.call(s.adapters[0]) - bare).abs().max() > 0.05
    before.check()


def test_merge_equals_apply(name: str) -> None:
    s = Setting(name)
    merged = fa.merge(s.model, s.adapters[0])
    out = logits(torch.func.functional_call(s.model, merged, (), s.inputs))
    torch.testing.assert_close(out, s.call(s.adapters[0]))


def test_vmap_grad_and_forward_mode(name: str) -> None:
    s = Setting(name)

    def loss(params: Any) -> Tensor:
        return s.call(s.fresh.replace(params=params)).pow(2).sum()

    each = [a.params for a in s.adapters]
    with fa.math_attention():
        outs = vmap(s.call)(stacked(s.adapters))
        torch.testing.assert_close(outs, torch.stack([s.call(a) for a in s.adapters]))
        grads = vmap(grad(loss))(pytree.tree_map(lambda *t: torch.stack(t), *each))
        tree_close(grads, pytree.tree_map(lambda *t: torch.stack(t), *(grad(loss)(p) for p in each)))
        step = pytree.tree_map(torch.randn_like, each[0])
        _, slope = jvp(loss, (each[0],), (step,))
        products = pytree.tree_map(lambda a, b: (a * b).sum(), grad(loss)(each[0]), step)
    # transformers' RMSNorm computes in float32
    torch.testing.assert_close(slope, sum(pytree.tree_leaves(products)), rtol=1e-4, atol=1e-4)


def test_grouped_and_routed_are_loops(name: str) -> None:
    s = Setting(name)
    stack, rows = fa.stack(s.adapters[:2]), torch.cat([s.inputs["input_ids"]] * 2)
    each = torch.cat([s.call(a) for a in s.adapters[:2]])
    torch.testing.assert_close(s.call(fa.grouped(stack), {"input_ids": rows}), each)
    index = torch.tensor([1, -1, 0, 1])
    out = s.call(fa.routed(stack, index), {"input_ids": rows})
    for row, which in enumerate(index.tolist()):
        one = {"input_ids": rows[row : row + 1]}
        expected = logits(s.model(**one)) if which < 0 else s.call(s.adapters[which], one)
        torch.testing.assert_close(out[row : row + 1], expected)


def test_files_and_the_view(name: str, tmp_path: Path) -> None:
    s = Setting(name)
    fa.save(s.adapters[0], tmp_path)
    again = fa.load(tmp_path, model=s.model)
    same_adapters(again, s.adapters[0])
    expected, before = s.call(again), Snapshot(s.model)
    fa.materialize(s.model, again)
    torch.testing.assert_close(logits(s.model(**s.inputs)), expected)
    assert {p.requires_grad for p in s.model.parameters()} == {True, False}
    found = fa.dematerialize(s.model)["default"]
    same_adapters(found, again)
    before.check()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning", "ignore::FutureWarning")  # PEFT's
def test_peft_reads_and_writes_the_same(name: str, tmp_path: Path) -> None:
    s = Setting(name)
    fields = {k: v for k, v in s.config.to_dict().items() if k in ("target_modules", "token_indices") and v is not None}
    wrapped: Any = wrap(tiny(CONFIGS[name][0]).double(), getattr(peft, type(s.config).__name__)(**fields)).double()
    adapter = fa.load(peft_save(wrapped, tmp_path / "theirs"), model=s.model)
    torch.testing.assert_close(s.call(adapter), logits(wrapped(**s.inputs)))
    fa.save(adapter, tmp_path / "ours")
    reread = peft.PeftModel.from_pretrained(tiny(CONFIGS[name][0]).double(), tmp_path / "ours").double()
    torch.testing.assert_close(logits(reread(**s.inputs)), logits(wrapped(**s.inputs)))
