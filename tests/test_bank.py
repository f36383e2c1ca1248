"""`AdapterBank`: slots and names, exact values, strict errors, files, compiled code and threads."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import FIRST, Case
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import funcadapt as fa
from funcadapt import bank as bank_module
from funcadapt import bulk, checkpoint, slots
from funcadapt.bank import AdapterBank
from funcadapt.checkpoint import CONFIG, WEIGHTS


class Net(nn.Module):
    """Two linear layers and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(10, 6), nn.Linear(6, 8), nn.Linear(8, 5, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(self.embed(ids))))


@pytest.fixture
def net() -> Net:
    return Net().eval().requires_grad_(False)


IDS = torch.tensor([[0, 3, 9], [3, 5, 0], [1, 1, 2], [8, 7, 6]])
ALL = ("embed", "up", "down")


def config(*targets: str, **fields: Any) -> fa.LoraConfig:
    return fa.LoraConfig(target_modules=[*(targets or ALL)], **{"r": 4, "init_lora_weights": False, **fields})


def lora(model: nn.Module, *targets: str, seed: int = 0, **fields: Any) -> fa.Adapter:
    return fa.init(model, config(*targets, **fields), seed=seed)


def bits(t: Tensor) -> bytes:
    return bytes(t.detach().contiguous().flatten().view(torch.uint8).tolist())


def state(bank: AdapterBank) -> Any:
    """Everything that can be seen of a bank, and every bit of its stack."""
    return (bank.names, [bank.index([n]).item() for n in bank.names], len(bank._free), set(bank._leaving),
            [bits(t) for t in bank.stack.tensors()])  # fmt: skip


def same(a: fa.Adapter, b: fa.Adapter) -> None:
    """Equal, to the bit."""
    assert a.config == b.config
    assert a.members is b.members is None
    for x, y in ((a.params, b.params), (a.buffers, b.buffers)):
        assert {p: set(v) for p, v in x.items()} == {p: set(v) for p, v in y.items()}
        for path, leaves in x.items():
            for name, leaf in leaves.items():
                other = y[path][name]
                assert (leaf.dtype, leaf.shape) == (other.dtype, other.shape)
                # frozen leaves are as they were made, those that are trained in the layout in which hooks are fastest
                assert leaf.stride() == other.stride() or x is a.buffers
                assert torch.equal(leaf, other), (path, name)


def call(model: nn.Module, bank: AdapterBank, names: list[str | None], x: Tensor = IDS) -> Tensor:
    with bank.use(names) as index:
        return fa.functional_call(model, fa.routed(bank.stack, index), (x,))


def check_rows(model: nn.Module, bank: AdapterBank, adapters: dict[str, fa.Adapter], names: list[str | None]) -> None:
    """Each row is what its adapter gives alone."""
    out = call(model, bank, names)
    for i, name in enumerate(names):
        alone = fa.functional_call(model, adapters[name] if name else {}, (IDS,))
        torch.testing.assert_close(out[i], alone[i], rtol=0, atol=2e-5)
        if not name:
            assert torch.equal(out[i], model(IDS)[i])


# -- slots and names --------------------------------------------------------------------------------------


def test_an_empty_bank(net: Net) -> None:
    bank = AdapterBank(net, config(), capacity=3)
    assert (len(bank), bank.capacity, bank.names, "a" in bank) == (0, 3, (), False)
    assert repr(bank) == "AdapterBank(0 of 3 slots, lora, 3 sites, r=4, float32)"
    assert not any(t.any() for t in bank.stack.tensors())
    assert bank.index([None, ""]).tolist() == [-1, -1]
    assert torch.equal(call(net, bank, [None] * 4), net(IDS))


def test_the_stack_is_what_fa_stack_makes(net: Net) -> None:
    adapters = [lora(net, seed=i) for i in range(3)]
    bank, stack = AdapterBank(net, config(), capacity=3), fa.stack(adapters)
    for i, adapter in enumerate(adapters):
        bank.add(str(i), adapter)
    for path in stack.params:
        assert list(stack.leaves(path)) == list(bank.stack.leaves(path))
        for name, leaf in stack.leaves(path).items():
            ours = bank.stack.leaves(path)[name]
            assert (ours.shape, ours.stride(), ours.dtype) == (leaf.shape, leaf.stride(), leaf.dtype)
            assert torch.equal(ours, leaf)
    assert bank.stack.members == dataclasses.replace(stack.members, ranks={})  # pyright: ignore
    for got, want in zip(fa.unstack(bank.stack), adapters, strict=True):
        same(got, want)


def test_names_and_index(net: Net) -> None:
    bank = AdapterBank(net, config(), capacity=3)
    for name in "abc":
        bank.add(name, lora(net))
    assert bank.names == ("a", "b", "c")
    assert bank.index(["b", None, "a", "", "b"]).tolist() == [1, -1, 0, -1, 1]
    assert bank.index(n for n in "cc").dtype == torch.long
    bank.remove("b")
    assert bank.names == ("a", "c")
    assert "b" not in bank
    assert repr(bank).startswith("AdapterBank(2 of 3 slots")
    bank.add("d", lora(net))
    assert bank.index("d" for _ in range(1)).tolist() == [1]
    with pytest.raises(TypeError, match="one name for each row"):
        bank.index("abc")


def test_unknown_names_list_near_matches(net: Net) -> None:
    bank = AdapterBank(net, config(), capacity=2)
    bank.add("french", lora(net))
    for use in (lambda: bank.index(["frensh"]), lambda: bank.remove("frensh"), lambda: bank.get("frensh")):
        with pytest.raises(fa.AdapterError, match=r"no adapter 'frensh'\. Did you mean 'french'"):
            use()
    with pytest.raises(fa.AdapterError, match="frensh"), bank.use(["french", "frensh"]):
        pass
    assert bank._pins == [0, 0]
    with pytest.raises(fa.AdapterError, match="bare base model"):
        bank.get("")


@pytest.mark.parametrize("capacity", [0, -1])
def test_capacity_is_positive(net: Net, capacity: int) -> None:
    with pytest.raises(fa.AdapterError, match="capacity"):
        AdapterBank(net, config(), capacity=capacity)


@pytest.mark.parametrize("capacity", [True, 1.0, "4"])
def test_capacity_is_an_integer(net: Net, capacity: Any) -> None:
    with pytest.raises(TypeError, match="capacity"):
        AdapterBank(net, config(), capacity=capacity)


def test_dtype_and_device(net: Net) -> None:
    bank = AdapterBank(net.to(torch.bfloat16), config(), capacity=2)
    assert {t.dtype for t in bank.stack.tensors()} == {torch.bfloat16}
    bank = AdapterBank(net, config(), capacity=2, dtype=torch.float64, device="cpu")
    assert {t.dtype for t in bank.stack.tensors()} == {torch.float64}
    with pytest.raises(TypeError, match="floating"):
        AdapterBank(net, config(), capacity=2, dtype=torch.int64)
    with pytest.raises(fa.AdapterError, match="meta"):
        AdapterBank(net.to("meta"), config(), capacity=2)
    AdapterBank(net, config(), capacity=2, device="cpu").add("a", lora(Net()))


def test_memory_is_taken_when_a_slot_is_written() -> None:
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("needs /proc")
    pages = lambda: int(statm.read_text().split()[1]) * 4096  # noqa: E731
    model = nn.Sequential(nn.Linear(1000, 1000))
    before = pages()
    bank = AdapterBank(model, config("0", r=64), capacity=2000)  # 1 GB
    assert sum(t.nbytes for t in bank.stack.tensors()) > 1e9
    bank.add("a", lora(model, "0", r=64))
    with torch.no_grad():
        x = torch.randn(1, 1000)
        with bank.use(["a"]) as index:
            fa.functional_call(model, fa.routed(bank.stack, index), (x,))
    assert pages() - before < 50e6


# -- values -----------------------------------------------------------------------------------------------


def bank_of(case: Case, model: nn.Module, capacity: int = 2, **changes: Any) -> AdapterBank:
    field = "target_parameters" if case.kind.is_parameter else "target_modules"
    config = case.variant.config(**{field: [case.kind.target]})
    return AdapterBank(model, dataclasses.replace(config, **changes), capacity)


def has(case: Case, field: str) -> bool:
    return any(f.name == field for f in dataclasses.fields(case.method.config))


SELECTED = [
    case
    for case in FIRST
    if (not case.kind.is_parameter or has(case, "target_parameters"))
    and not case.variant.inputs
    and case.method.shapes is None  # a bank is made from shapes alone
]


@pytest.mark.parametrize("case", SELECTED, ids=str)
def test_every_method_and_layer(case: Case, tmp_path: Path) -> None:
    model = case.model()
    bank, adapter = bank_of(case, model), case.adapter(model)
    bank.add("a", adapter)
    same(bank.get("a"), adapter)
    fa.save(adapter, tmp_path)
    for name in ("b", "c"):  # the plain way, then by plan where there is one
        bank.load(name, tmp_path, model=model)
        same(bank.get(name), fa.load(tmp_path, model=model))
        bank.remove(name)


@pytest.mark.parametrize("case", [case for case in SELECTED if case.method.with_rank is not None], ids=str)
def test_smaller_ranks_are_padded_exactly(case: Case, tmp_path: Path) -> None:
    model, x = case.model(), case.inputs()
    bank, adapter = bank_of(case, model, **{case.method.rank_field: 6}), case.adapter(model)
    bank.add("a", adapter)
    same(bank.get("a"), adapter)
    fa.save(adapter, tmp_path)
    bank.load("a", tmp_path, overwrite=True, model=model)
    bank.load("a", tmp_path, overwrite=True, model=model)
    same(bank.get("a"), fa.load(tmp_path, model=model))
    out = fa.functional_call(model.eval(), fa.select(bank.stack, int(bank.index(["a"]))), (x,))
    torch.testing.assert_close(out, fa.functional_call(model, bank.get("a"), (x,)), rtol=0, atol=1e-5)


def test_rows_are_what_each_adapter_gives_alone(net: Net) -> None:
    adapters = {
        "full": lora(net, r=4, seed=1),
        "low": lora(net, r=1, lora_alpha=5, seed=2),
        "mixed": lora(net, r=3, rank_pattern={"up": 2}, alpha_pattern={"down": 30}, use_rslora=True, seed=3),
        "one": lora(net, "up", r=2, seed=4),
        "other": lora(net, "down", "embed", seed=5),
    }
    bank = AdapterBank(net, config(), capacity=6)
    for name, adapter in adapters.items():
        bank.add(name, adapter)
        same(bank.get(name), adapter)
    check_rows(net, bank, adapters, ["full", "low", None, "mixed"])
    check_rows(net, bank, adapters, ["one", "other", "one", ""])


def test_ranks_may_differ_between_the_banks_sites(net: Net) -> None:
    bank = AdapterBank(net, config(r=2, rank_pattern={"up": 5}), capacity=2)
    assert "r=2..5" in repr(bank)
    adapter = lora(net, r=1, rank_pattern={"up": 5})
    bank.add("a", adapter)
    same(bank.get("a"), adapter)
    with pytest.raises(fa.SiteError, match="rank 5 at 'embed'"):
        bank.add("b", lora(net, r=5))


def test_nothing_of_the_last_adapter_is_left_in_a_slot(net: Net, tmp_path: Path) -> None:
    small = lora(net, "up", r=1, seed=3)
    fa.save(small, tmp_path)
    clean, used = AdapterBank(net, config(), capacity=1), AdapterBank(net, config(), capacity=1)
    clean.add("a", small)
    for _ in range(3):
        for put in (lambda: used.add("a", small), lambda: used.load("a", tmp_path)):
            used.add("big", lora(net, seed=2))
            used.remove("big")
            put()
            for x, y in zip(clean.stack.tensors(), used.stack.tensors(), strict=True):
                assert torch.equal(x, y)
            used.remove("a")


def test_values_are_copied(net: Net) -> None:
    bank, adapter = AdapterBank(net, config(), capacity=2), lora(net).map(lambda t: t.clone().requires_grad_())
    bank.add("a", adapter)
    kept = adapter.map(lambda t: t.detach().clone())
    for t in adapter.tensors():
        t.data.zero_()
    got = bank.get("a")
    assert all(torch.equal(a, b) for a, b in zip(got.tensors(), kept.tensors(), strict=True))
    assert not any(t.requires_grad for t in (*bank.stack.tensors(), *got.tensors()))
    for t in got.tensors():
        t.zero_()
    assert all(torch.equal(a, b) for a, b in zip(bank.get("a").tensors(), kept.tensors(), strict=True))


def test_inference_mode(net: Net, tmp_path: Path) -> None:
    fa.save(lora(net), tmp_path)
    with torch.inference_mode():
        bank = AdapterBank(net, config(), capacity=4)
        bank.add("a", lora(net, seed=1))
        bank.load("b", tmp_path)
        bank.load("c", tmp_path)
    with torch.inference_mode():
        call(net, bank, ["a", "b", "c", None])
        got = bank.get("a")
    assert not any(t.is_inference() for t in (*bank.stack.tensors(), *got.tensors()))
    bank.add("a", lora(net, seed=2), overwrite=True)
    bank.load("b", tmp_path, overwrite=True)


def test_other_dtypes_are_converted(net: Net) -> None:
    bank = AdapterBank(net, config(), capacity=4)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        adapter = lora(net).to(dtype)
        bank.add(str(dtype), adapter)
        same(bank.get(str(dtype)), adapter.to(torch.float32))


def test_whole_modules_can_be_in_a_bank(net: Net, tmp_path: Path) -> None:
    own = config("up", modules_to_save=["down"])
    bank = AdapterBank(net, own, capacity=2)
    adapters = {name: fa.init(net, own, seed=i).map(lambda t: t + 0.1) for i, name in enumerate("ab")}
    for name, adapter in adapters.items():
        fa.save(adapter, tmp_path / name)
        bank.add(name, adapter)
        same(bank.get(name), adapter)
        bank.load(name, tmp_path / name, overwrite=True)
        same(bank.get(name), fa.load(tmp_path / name))
    with pytest.raises(fa.SiteError, match="nothing at 'down'"):
        bank.add("a", lora(net, "up"), overwrite=True)


# -- errors -----------------------------------------------------------------------------------------------


def with_leaf(adapter: fa.Adapter, path: str, name: str, leaf: Tensor | None) -> fa.Adapter:
    params = {p: dict(v) for p, v in adapter.params.items()}
    if leaf is None:
        del params[path][name]
    else:
        params.setdefault(path, {})[name] = leaf
    return adapter.replace(params=params)


def spoiled(adapter: fa.Adapter, value: float) -> fa.Adapter:
    leaf = adapter.params["up"]["lora_B"].clone()
    leaf[3, 1] = value
    return with_leaf(adapter, "up", "lora_B", leaf)


BAD: dict[str, tuple[Callable[[Net], Any], type[Exception], str]] = {
    "no adapter": (lambda net: net, TypeError, "Net"),
    "stack": (lambda net: fa.stack([lora(net)]), fa.AdapterError, "unstack"),
    "other method": (lambda net: fa.init(net, fa.IA3Config(target_modules=["up"], feedforward_modules=[])),
                     fa.AdapterError, "bank is for lora, the adapter is ia3"),
    "dora": (lambda net: lora(net, use_dora=True), fa.AdapterError, "dora"),
    "unknown site": (lambda net: with_leaf(lora(net), "upp", "lora_A", torch.zeros(1)), fa.SiteError,
                     "no site 'upp'. Did you mean 'up'"),
    "larger rank": (lambda net: lora(net, r=5), fa.SiteError, "rank 5 at 'embed'"),
    "lacks a leaf": (lambda net: with_leaf(lora(net), "up", "lora_B", None), fa.SiteError, "lacks 'lora_B' at 'up'"),
    "has a leaf": (lambda net: lora(net, "up", lora_bias=True), fa.SiteError, "'lora_B_bias' at 'up'"),
    "shape": (lambda net: with_leaf(lora(net), "up", "lora_A", torch.zeros(4, 7)), fa.SiteError, "'lora_A' at 'up'"),
    "padded shape": (lambda net: with_leaf(lora(net, r=2), "up", "lora_A", torch.zeros(2, 7)), fa.SiteError,
                     "'lora_A' at 'up'"),
    "ranks differ": (lambda net: with_leaf(lora(net, r=2), "up", "lora_A", torch.zeros(3, 6)), fa.SiteError, "at 'up'"),
    "dimensions": (lambda net: with_leaf(lora(net), "up", "lora_A", torch.zeros(6)), fa.SiteError, "'lora_A' at 'up'"),
    "0-d": (lambda net: with_leaf(lora(net, r=2), "up", "lora_A", torch.zeros(())), fa.SiteError, "'lora_A' at 'up'"),
    "empty": (lambda net: with_leaf(lora(net, r=2), "up", "lora_B", torch.zeros(8, 0)), fa.SiteError, "at 'up'"),
    "integers": (lambda net: with_leaf(lora(net), "up", "lora_A", torch.zeros(4, 6, dtype=torch.long)), fa.SiteError,
                 "torch.int64"),
    "meta": (lambda net: fa.init(net, config(), device="meta"), fa.SiteError, "meta device"),
    "nan": (lambda net: spoiled(lora(net), float("nan")), fa.SiteError, "'lora_B' at 'up' has numbers that are not"),
    "inf": (lambda net: spoiled(lora(net), float("-inf")), fa.SiteError, "'lora_B' at 'up' has numbers that are not"),
    "too large": (lambda net: spoiled(lora(net).to(torch.float64), 1e300), fa.SiteError, "too large for torch.float32"),
    "infinite scaling": (lambda net: lora(net, lora_alpha=1e299).to(torch.float64), fa.SiteError, "'scaling' at"),
}  # fmt: skip


@pytest.mark.parametrize("why", BAD)
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_does_not_fit_is_refused(net: Net, why: str, overwrite: bool) -> None:
    make, error, message = BAD[why]
    bank = AdapterBank(net, config(), capacity=2)
    bank.add("a", lora(net, seed=1))
    before, bad = state(bank), make(net)
    with pytest.raises(error, match=message):
        bank.add("a" if overwrite else "b", bad, overwrite=overwrite)
    assert state(bank) == before


def test_a_field_that_the_hooks_read_must_be_the_same(net: Net) -> None:
    def ia3(*names: str) -> fa.IA3Config:
        return fa.IA3Config(target_modules=["up", "down"], feedforward_modules=names)

    bank = AdapterBank(net, ia3("down"), capacity=2)
    bank.add("a", fa.init(net, ia3("down")))
    with pytest.raises(fa.AdapterError, match=r"feedforward_modules=\('up',\).*\('down',\)"):
        bank.add("b", fa.init(net, ia3("up")))


def test_a_method_without_a_neutral_value_needs_every_site(net: Net) -> None:
    bank = AdapterBank(net, config("up", "down", use_dora=True), capacity=2)
    bank.add("a", lora(net, "up", "down", r=2, use_dora=True))
    with pytest.raises(fa.SiteError, match="nothing at 'down', and dora has no neutral"):
        bank.add("b", lora(net, "up", use_dora=True))


@pytest.mark.parametrize("name", ["", None, 3])
def test_a_name_is_a_string(net: Net, name: Any) -> None:
    bank = AdapterBank(net, config(), capacity=2)
    with pytest.raises(fa.AdapterError, match="name must be"):
        bank.add(name, lora(net))


def test_taken_names_and_full_banks(net: Net, tmp_path: Path) -> None:
    bank, adapter = AdapterBank(net, config(), capacity=2), lora(net)
    fa.save(adapter, tmp_path)
    bank.add("a", adapter)
    for put in (lambda n: bank.add(n, adapter), lambda n: bank.load(n, tmp_path)):
        with pytest.raises(fa.AdapterError, match="'a' already"):
            put("a")
    bank.add("b", adapter)
    before = state(bank)
    for put in (lambda n: bank.add(n, adapter, overwrite=True), lambda n: bank.load(n, tmp_path)):
        with pytest.raises(fa.AdapterError, match=r"no free slot for 'c' among 2\. Remove one"):
            put("c")
    assert state(bank) == before


# -- replacing, and calls that run ------------------------------------------------------------------------


def test_replacing(net: Net) -> None:
    bank = AdapterBank(net, config(), capacity=2)
    versions = [lora(net, seed=i, r=1 + i % 4, lora_alpha=i + 1) for i in range(5)]
    for i, version in enumerate(versions):
        bank.add("a", version, overwrite=bool(i))
        same(bank.get("a"), version)
    bank.add("b", versions[0])  # full: from now on in place
    for version in versions:
        slot = bank.index(["a"])
        bank.add("a", version, overwrite=True)
        assert torch.equal(bank.index(["a"]), slot)
        same(bank.get("a"), version)
        same(bank.get("b"), versions[0])
    assert bank.names == ("a", "b")


def test_a_slot_in_use_is_not_reused(net: Net) -> None:
    bank, a, b = AdapterBank(net, config(), capacity=1), lora(net, seed=1), lora(net, seed=2)
    bank.add("a", a)
    with bank.use(["a", None]) as outer, bank.use(["a", "a"]) as inner:
        bank.remove("a")
        with pytest.raises(fa.AdapterError, match="among 1, 1 of them held for running"):
            bank.add("b", b)
        out = fa.functional_call(net, fa.routed(bank.stack, outer), (IDS[:2],))
    assert outer.tolist() == [0, -1]
    assert inner.tolist() == [0, 0]
    torch.testing.assert_close(out[0], fa.functional_call(net, a, (IDS,))[0], rtol=0, atol=1e-5)
    bank.add("b", b)
    same(bank.get("b"), b)


def test_a_running_call_sees_the_adapter_it_began_with(net: Net) -> None:
    bank, old, new = AdapterBank(net, config(), capacity=2), lora(net, seed=1), lora(net, seed=2)
    bank.add("a", old)
    with bank.use(["a"]) as index:
        bank.add("a", new, overwrite=True)
        with bank.use(["a"]) as later:
            assert index.item() != later.item()
            for i, adapter in ((index, old), (later, new)):
                out = fa.functional_call(net, fa.routed(bank.stack, i), (IDS[:1],))
                alone = fa.functional_call(net, adapter, (IDS[:1],))
                torch.testing.assert_close(out, alone, rtol=0, atol=1e-5)
            with pytest.raises(fa.AdapterError, match="full"):  # one slot is the old one's, one is in use
                bank.add("a", old, overwrite=True)
    bank.add("b", old)
    assert not bank._leaving


def test_an_error_in_a_block_releases_its_slots(net: Net) -> None:
    bank = AdapterBank(net, config(), capacity=1)
    bank.add("a", lora(net))

    def block() -> None:
        with bank.use(["a"]):
            bank.remove("a")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        block()
    assert bank._free == [0]


def test_a_write_that_fails(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    bank, adapter = AdapterBank(net, config(), capacity=2), lora(net, seed=1)
    bank.add("a", adapter)

    def fails(self: slots.Slots, slot: int, values: dict[Any, Tensor]) -> None:
        write(self, slot, dict([*values.items()][:-1]))  # the copy stops in the middle

    write = slots.Slots.write
    monkeypatch.setattr(slots.Slots, "write", fails)
    with pytest.raises(KeyError):
        bank.add("a", lora(net, seed=2), overwrite=True)
    same(bank.get("a"), adapter)
    assert len(bank._free) == 1
    monkeypatch.undo()
    bank.add("b", adapter)
    monkeypatch.setattr(slots.Slots, "write", fails)
    with pytest.raises(KeyError):
        bank.add("a", lora(net, seed=2), overwrite=True)
    assert bank.names == ("b",)  # half of each: nobody gets to see it
    monkeypatch.undo()
    bank.add("a", lora(net, seed=2))


# -- files ------------------------------------------------------------------------------------------------


@pytest.fixture
def no_plain_load(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From now on, only plans may be used."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the plan was not used")

    return lambda: monkeypatch.setattr(bank_module, "load", refuse)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fields", [{}, {"r": 2, "lora_alpha": 3}, {"rank_pattern": {"up": 1}}], ids=str)
def test_a_plan_gives_the_bits_of_the_plain_way(
    net: Net, tmp_path: Path, no_plain_load: Callable[[], None], stored: torch.dtype, kept: torch.dtype, fields: Any
) -> None:
    adapters = [lora(net, seed=i, **fields).to(stored) for i in range(4)]
    plain, fast = (AdapterBank(net, config(), capacity=3, dtype=kept) for _ in range(2))
    for i, adapter in enumerate(adapters):
        fa.save(adapter, tmp_path / str(i))
    for i in range(1, 4):
        plain.add(str(i), fa.load(tmp_path / str(i)))
    fast.load("1", tmp_path / "0")
    fast.remove("1")
    no_plain_load()
    for i in range(1, 4):
        fast.load(str(i), tmp_path / str(i))
    assert plain.names == fast.names
    for a, b in zip(plain.stack.tensors(), fast.stack.tensors(), strict=True):
        assert bits(a) == bits(b)
    for i in range(1, 4):
        same(fast.get(str(i)), plain.get(str(i)))


def test_fewer_sites_by_plan(net: Net, tmp_path: Path, no_plain_load: Callable[[], None]) -> None:
    banks = [AdapterBank(net, config(), capacity=2, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    for i in range(3):
        fa.save(lora(net, "down", r=3, lora_alpha=5, seed=i), tmp_path / str(i))
    for bank in banks:
        bank.load("a", tmp_path / "0")
    no_plain_load()
    for i in range(3):
        for bank in banks:
            bank.load("a", tmp_path / str(i), overwrite=True)
            same(bank.get("a"), fa.load(tmp_path / str(i), dtype=next(bank.stack.tensors()).dtype))


def test_a_plan_that_cannot_be_made(net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(bulk, "_plan", fails)
    bank = AdapterBank(net, config(), capacity=1)
    fa.save(lora(net), tmp_path)
    for _ in range(2):
        bank.load("a", tmp_path, overwrite=True)
        same(bank.get("a"), fa.load(tmp_path))


def test_configs_that_differ_in_who_made_them_share_a_plan(
    net: Net, tmp_path: Path, no_plain_load: Callable[[], None]
) -> None:
    bank = AdapterBank(net, config(), capacity=4)
    adapters = [lora(net, seed=i, lora_alpha=a) for i, a in enumerate((8, 16, 8, 16))]
    for i, adapter in enumerate(adapters):
        own = dataclasses.replace(adapter.config, base_model_name_or_path=f"user/{i}", task_type="CAUSAL_LM",
                                  target_modules=tuple(random.Random(i).sample(ALL, 3)))  # fmt: skip
        fa.save(adapter.replace(config=own), tmp_path / str(i))
        if i == 2:
            no_plain_load()
        bank.load(str(i), tmp_path / str(i))
        same(bank.get(str(i)), adapter.replace(config=own))
    assert len(bank._plans._plans) == 2  # one for each alpha


def test_plans_are_not_kept_without_end(net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "_PLANS_KEPT", 2)
    monkeypatch.setattr(bulk, "_CONFIGS_KEPT", 3)
    bank = AdapterBank(net, config(), capacity=1)
    for i in range(5):
        fa.save(lora(net, lora_alpha=i + 1), tmp_path / str(i))
    for i in (*range(5), *range(5)):
        bank.load("a", tmp_path / str(i), overwrite=True)
        same(bank.get("a"), fa.load(tmp_path / str(i)))
        assert len(bank._plans._plans) <= 2
        assert len(bank._plans._configs) <= 3
    assert len(bank._plans._idle) <= 1


def test_a_file_of_another_layout_after_a_plan(net: Net, tmp_path: Path) -> None:
    bank = AdapterBank(net, config(), capacity=1)
    for round_ in range(3):
        for i, fields in enumerate(({}, {"r": 1}, {"rank_pattern": {"down": 2}})):
            adapter = lora(net, seed=10 * round_ + i, **fields)
            fa.save(adapter, tmp_path)  # the same folder, written again
            bank.load("a", tmp_path, overwrite=True)
            same(bank.get("a"), adapter)


def spoil(folder: Path, how: str) -> None:
    path = folder / WEIGHTS
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    if how.startswith("cut"):
        path.write_bytes(content[: {"cut 0": 0, "cut 4": 4, "cut header": 8 + size // 2, "cut all": 8 + size}[how]])
    elif how == "cut one byte":
        path.write_bytes(content[:-1])
    elif how == "longer":
        path.write_bytes(content + b"\0")
    elif how == "huge header":
        path.write_bytes((2**62).to_bytes(8, "little") + content[8:])
    elif how == "no json":
        path.write_bytes(content[:8] + b"x" * size + content[8 + size :])
    elif how == "pickle":
        path.rename(folder / "adapter_model.bin")
    elif how == "no weights":
        path.unlink()
    elif how == "no config":
        (folder / CONFIG).unlink()
    elif how == "config":
        (folder / CONFIG).write_text("{")
    elif how == "unknown field":
        values = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**values, "lora_alpa": 3}))
    elif how == "rank":
        values = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**values, "r": 3}))
    else:
        raise AssertionError(how)


SPOILED = ["cut 0", "cut 4", "cut header", "cut all", "longer", "huge header", "no json", "pickle", "no weights",
           "no config", "config", "unknown field", "rank"]  # fmt: skip


@pytest.mark.parametrize("known", [False, True], ids=["first", "by plan"])
@pytest.mark.parametrize("how", SPOILED)
def test_a_spoiled_file_is_refused(net: Net, tmp_path: Path, how: str, known: bool) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    fa.save(lora(net), good)
    shutil.copytree(good, bad)
    spoil(bad, how)
    bank = AdapterBank(net, config(), capacity=2)
    if known:
        bank.load("a", good)
        bank.load("a", good, overwrite=True)
    before = state(bank)
    with pytest.raises(fa.AdapterFileError):
        bank.load("b", bad)
    with pytest.raises(fa.AdapterFileError):
        fa.load(bad)
    assert state(bank) == before
    bank.load("b", good)
    same(bank.get("b"), fa.load(good))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_in_a_file_are_finite(net: Net, tmp_path: Path, value: float) -> None:
    fa.save(lora(net), tmp_path / "good")
    fa.save(spoiled(lora(net), value), tmp_path / "bad")
    bank = AdapterBank(net, config(), capacity=2)
    for _ in range(2):
        before = state(bank)
        with pytest.raises(fa.SiteError, match="'lora_B' at 'up' has numbers that are not finite"):
            bank.load("b", tmp_path / "bad")
        assert state(bank) == before
        bank.load("a", tmp_path / "good", overwrite=True)


@pytest.mark.parametrize("how", ["nan", "longer", "cut"])
@pytest.mark.parametrize("part", [32_000, 40, 1])
@pytest.mark.parametrize("capacity", [1, 2])
def test_a_bad_file_of_a_known_layout_changes_no_adapter(
    net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, part: int, capacity: int
) -> None:
    """Also where it would be written over the old one, and when all but its last numbers were read."""
    monkeypatch.setattr(bulk, "_PART", part)
    adapters = [lora(net, seed=i) for i in range(3)]
    for i, adapter in enumerate(adapters):
        fa.save(adapter, tmp_path / str(i))
    weights = tmp_path / "2" / WEIGHTS
    content = weights.read_bytes()
    bad = {"nan": content[:-4] + b"\0\0\xc0\x7f", "longer": content + b"\0", "cut": content[:-1]}[how]
    bank = AdapterBank(net, config(), capacity)
    for i in (0, 1, 0):
        bank.load("a", tmp_path / str(i), overwrite=True)
        same(bank.get("a"), adapters[i])
    head = bulk.Head.read(tmp_path / "2")
    weights.write_bytes(bad)
    monkeypatch.setattr(bulk.Head, "read", lambda folder: head)  # it changes after that
    with pytest.raises((fa.SiteError, fa.AdapterFileError)):
        bank.load("a", tmp_path / "2", overwrite=True)
    same(bank.get("a"), adapters[0])
    weights.write_bytes(content)
    bank.load("a", tmp_path / "2", overwrite=True)
    same(bank.get("a"), adapters[2])


def test_large_numbers_whose_sum_overflows(net: Net, tmp_path: Path) -> None:
    large = lora(net).replace(params={p: {k: torch.full_like(t, 3e38) for k, t in v.items()}
                                      for p, v in lora(net).params.items()})  # fmt: skip
    fa.save(large, tmp_path / "large")
    bank = AdapterBank(net, config(), capacity=2)
    for _ in range(2):
        bank.load("a", tmp_path / "large", overwrite=True)
        same(bank.get("a"), large)
    bank.add("b", large)
    narrow = AdapterBank(net, config(), capacity=2, dtype=torch.float16)
    fa.save(lora(net), tmp_path / "good")
    for _ in range(2):
        before = state(narrow)
        with pytest.raises(fa.SiteError, match=r"too large for torch\.float16"):
            narrow.load("b", tmp_path / "large")
        assert state(narrow) == before
        narrow.load("a", tmp_path / "good", overwrite=True)


def test_an_adapter_that_does_not_fit_the_bank(net: Net, tmp_path: Path) -> None:
    bank = AdapterBank(net, config("up"), capacity=2)
    fa.save(lora(net, "down"), tmp_path / "site")
    fa.save(lora(net, "up", r=8), tmp_path / "rank")
    before = state(bank)
    for _ in range(2):
        with pytest.raises(fa.SiteError, match="no site 'down'"):
            bank.load("a", tmp_path / "site")
        with pytest.raises(fa.SiteError, match="rank 8 at 'up'"):
            bank.load("a", tmp_path / "rank")
    assert state(bank) == before


def test_files_in_any_order_and_without_the_prefix(net: Net, tmp_path: Path, no_plain_load: Callable[[], None]) -> None:
    adapters = [lora(net, seed=i) for i in range(2)]
    for i, adapter in enumerate(adapters):
        folder = tmp_path / str(i)
        fa.save(adapter, folder)
        tensors = load_file(folder / WEIGHTS)
        shuffled = sorted(tensors, key=lambda key: key[::-1])
        save_file({key.removeprefix("base_model.model."): tensors[key] for key in shuffled}, folder / WEIGHTS)
    bank = AdapterBank(net, config(), capacity=2)
    bank.load("0", tmp_path / "0")
    no_plain_load()
    bank.load("1", tmp_path / "1")
    for i, adapter in enumerate(adapters):
        same(bank.get(str(i)), adapter)


def test_a_file_of_two_dtypes(net: Net, tmp_path: Path) -> None:
    fa.save(lora(net), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    first = next(iter(tensors))
    tensors[first] = tensors[first].to(torch.bfloat16)
    save_file(tensors, tmp_path / WEIGHTS)
    bank = AdapterBank(net, config(), capacity=1)
    for _ in range(3):
        bank.load("a", tmp_path, overwrite=True)
        same(bank.get("a"), fa.load(tmp_path).to(torch.float32))


def test_a_method_that_computes_with_its_leaves_has_no_plan(
    net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan copies; what a method does to the numbers when they are read must not be lost."""
    from funcadapt.methods import lora as method

    doubled = dataclasses.replace(method.METHOD, layout=lambda p: method.layout({k: 2 * t for k, t in p.items()}))
    fa.save(lora(net), tmp_path)
    for module in (bulk, slots, checkpoint):
        monkeypatch.setattr(module, "method_of", lambda config: doubled)
    bank = AdapterBank(net, config(), capacity=1)
    for _ in range(3):
        bank.load("a", tmp_path, overwrite=True)
        slot, plain = fa.select(bank.stack, 0), fa.load(tmp_path)
        for path in plain.params:
            for name, leaf in plain.leaves(path).items():
                assert torch.equal(slot.leaves(path)[name], leaf)
    assert list(bank._plans._plans.values()) == [None]


# -- compiled code ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning")
def test_one_frame_while_adapters_come_and_go(net: Net, tmp_path: Path) -> None:
    torch._dynamo.reset()
    bank, counter = AdapterBank(net, config("up", "down"), capacity=3), CompileCounter()

    @torch.no_grad()
    def step(stack: fa.Adapter, index: Tensor, ids: Tensor) -> Tensor:
        return fa.functional_call(net, fa.routed(stack, index), (ids,))

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    adapters: dict[str, fa.Adapter] = {}
    for i in range(6):
        name = f"a{i}"
        adapters[name] = lora(net, "up", "down", seed=i, r=1 + i % 4, lora_alpha=3 * i + 1, lora_dropout=0.1 * (i % 3))
        if i % 2:
            fa.save(adapters[name], tmp_path / name)
            bank.load(name, tmp_path / name)
        else:
            bank.add(name, adapters[name])
        names = [name, None, bank.names[0], name]
        with bank.use(names) as index:
            out = compiled(bank.stack, index, IDS)
        for row, n in enumerate(names):
            alone = fa.functional_call(net, adapters[n] if n else {}, (IDS,))
            torch.testing.assert_close(out[row], alone[row], rtol=0, atol=1e-5)
        if len(bank) == 3:
            bank.remove(bank.names[0])
    assert counter.frame_count == 1


# -- threads ----------------------------------------------------------------------------------------------


def constant(like: fa.Adapter, value: float) -> fa.Adapter:
    return like.map(lambda t: torch.full_like(t, value))


def expect(error: Exception, *parts: str) -> None:
    if not any(part in str(error) for part in parts):
        raise error


def run_for(seconds: float, *works: Callable[[random.Random], None]) -> None:
    """Repeat each in a thread of its own; the first exception is raised here."""
    end, errors = time.monotonic() + seconds, []

    def run(work: Callable[[random.Random], None], seed: int) -> None:
        rng = random.Random(seed)
        try:
            while time.monotonic() < end and not errors:
                work(rng)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work, i)) for i, work in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.usefixtures("_frequent_switches")
def test_threads(net: Net, tmp_path: Path) -> None:
    """A slot in use holds one adapter, whole, whatever other threads do. Each adapter is one number everywhere."""
    bank, like = AdapterBank(net, config("up"), capacity=4), lora(net, "up")
    leaves = list(bank.stack.tensors())
    for i in range(1, 9):
        fa.save(constant(like, i).replace(buffers=like.buffers), tmp_path / str(i))
    names = [f"n{i}" for i in range(6)]
    counts = dict.fromkeys(("used", "put", "full", "unknown"), 0)

    def reader(rng: random.Random) -> None:
        wanted = [rng.choice([*names, None]) for _ in range(3)]
        try:
            with bank.use(wanted) as index:
                seen = [[t[i].clone() for t in leaves[:2]] for i in index.tolist()]
                time.sleep(0)
                for i, slot in enumerate(index.tolist()):
                    if slot < 0:
                        continue
                    value = seen[i][0].flatten()[0]
                    assert value > 0
                    for t, copied in zip(leaves[:2], seen[i], strict=True):
                        assert (t[slot] == value).all()
                        assert (copied == value).all()
            counts["used"] += 1
        except fa.AdapterError as error:
            expect(error, "no adapter")
            counts["unknown"] += 1

    def writer(rng: random.Random) -> None:
        name, value = rng.choice(names), rng.randrange(1, 9)
        try:
            if rng.random() < 0.3:
                bank.remove(name)
            elif rng.random() < 0.5:
                bank.load(name, tmp_path / str(value), overwrite=rng.random() < 0.7)
            else:
                bank.add(name, constant(like, value), overwrite=rng.random() < 0.7)
            counts["put"] += 1
        except fa.AdapterError as error:
            expect(error, "already", "full", "no adapter")
            counts["full" if "full" in str(error) else "unknown"] += 1

    run_for(2.0, reader, reader, reader, writer, writer, writer)
    assert min(counts.values()) > 0, counts
    assert not any(bank._pins)
    assert not bank._leaving
    slots = [*(int(bank.index([n])) for n in bank.names), *bank._free]
    assert sorted(slots) == list(range(4))
    assert len(bank._plans._idle) <= 3


@pytest.mark.usefixtures("_frequent_switches")
def test_calls_while_adapters_are_replaced(net: Net) -> None:
    versions = [lora(net, seed=i) for i in range(4)]
    answers = [fa.functional_call(net, a, (IDS,)) for a in versions]
    bank = AdapterBank(net, config(), capacity=3)
    bank.add("a", versions[0])
    models = [fa.structural_copy(net) for _ in range(2)]

    def caller(model: nn.Module) -> Callable[[random.Random], None]:
        @torch.no_grad()
        def work(rng: random.Random) -> None:
            out = call(model, bank, ["a", "a", None, "a"])
            near = [(out[[0, 1, 3]] - answer[[0, 1, 3]]).abs().max() < 1e-4 for answer in answers]
            assert sum(near) == 1

        return work

    def writer(rng: random.Random) -> None:
        try:
            bank.add("a", rng.choice(versions), overwrite=True)
        except fa.AdapterError as error:
            expect(error, "full")

    run_for(1.5, *map(caller, models), writer, writer)


# -- a model of it ----------------------------------------------------------------------------------------

NAMES = st.sampled_from(["a", "b", "c", "d", "e"])
NET = Net().eval().requires_grad_(False)
SOME = [lora(NET, *t, seed=i, r=r, lora_alpha=i + 1)
        for i, (t, r) in enumerate([((), 4), (("up",), 2), (("down", "embed"), 1), ((), 3)])]  # fmt: skip


class Machine(RuleBasedStateMachine):
    """Add, remove, load and use, against a dict."""

    blocks = Bundle("blocks")

    @initialize(capacity=st.integers(1, 4))
    def start(self, capacity: int) -> None:
        self.bank = AdapterBank(NET, config(), capacity)
        self.model: dict[str, fa.Adapter] = {}
        self.open: dict[int, tuple[Any, list[int], list[Any]]] = {}  # a block -> how to end it, its slots, their bits
        self.count = 0

    def bits(self, slots: list[int]) -> list[Any]:
        return [[bits(t[i]) for t in self.bank.stack.tensors()] for i in slots]

    @rule(name=NAMES, which=st.integers(0, 3), overwrite=st.booleans(), load=st.booleans())
    def put(self, name: str, which: int, overwrite: bool, load: bool) -> None:
        adapter = SOME[which]
        held = {slot for _, slots, _ in self.open.values() for slot in slots}
        mine = {int(self.bank.index([n])) for n in self.model}
        taken = name in self.model and not overwrite
        room = len(mine | held) < self.bank.capacity
        room = room or (name in self.model and int(self.bank.index([name])) not in held)
        try:
            if load:
                self.bank.load(name, FOLDERS[which], overwrite=overwrite)
            else:
                self.bank.add(name, adapter, overwrite=overwrite)
            self.model[name] = adapter
        except fa.AdapterError:
            refused = True
        else:
            refused = False
        assert refused == (taken or not room)

    @rule(name=NAMES)
    def remove(self, name: str) -> None:
        try:
            self.bank.remove(name)
        except fa.AdapterError:
            assert name not in self.model
        else:
            del self.model[name]

    @rule(target=blocks, names=st.lists(st.none() | NAMES, max_size=3))
    def begin(self, names: list[str | None]) -> int:
        block = self.bank.use(names)
        self.count += 1
        try:
            index = block.__enter__().tolist()
        except fa.AdapterError:
            assert any(n and n not in self.model for n in names)
            return self.count
        assert [i < 0 for i in index] == [n is None for n in names]
        slots = [i for i in index if i >= 0]
        self.open[self.count] = (block, slots, self.bits(slots))
        return self.count

    @rule(block=blocks)
    def end(self, block: int) -> None:
        if block in self.open:
            self.open.pop(block)[0].__exit__(None, None, None)

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "bank"):
            return
        assert set(self.bank.names) == set(self.model)
        assert len(self.bank) == len(self.model)
        for name, adapter in self.model.items():
            same(self.bank.get(name), adapter)
        for _, held, before in self.open.values():
            assert self.bits(held) == before

    def teardown(self) -> None:
        for block, *_ in getattr(self, "open", {}).values():
            block.__exit__(None, None, None)


FOLDERS: list[Path] = []


@pytest.fixture(scope="module", autouse=True)
def _folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    for i, adapter in enumerate(SOME):
        FOLDERS.append(tmp_path_factory.mktemp(f"adapter{i}"))
        fa.save(adapter, FOLDERS[-1])
    yield
    FOLDERS.clear()


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
