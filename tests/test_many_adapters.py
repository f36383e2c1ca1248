"""Many adapters at once: stacks as values, then `grouped` and `routed` on the shapes that real models have."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import optree
import pytest
import torch
import transformers as tf
from cases import FIRST, SLOW, Case, tree_close
from oracles import Snapshot
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.utils import _pytree as pytree

import funcadapt as fa
from funcadapt.config import AdapterConfig
from funcadapt.method import Draw, Fresh, Leaf, Method
from funcadapt.rows import choose
from funcadapt.sites import Site

pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop.* aten..?_grouped_mm:UserWarning"),
    pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning"),
]


def moved(adapter: fa.Adapter, seed: int = 0, size: float = 0.3) -> fa.Adapter:
    """No leaf at its initial value; the buffers as they are."""
    generator = torch.Generator().manual_seed(50 + seed)

    def move(leaf: Tensor) -> Tensor:
        new = leaf + size * torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype)
        return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype).copy_(new)

    return adapter.replace(params=pytree.tree_map(move, adapter.params))


def lora(model: nn.Module, *targets: str, seed: int = 0, **fields: Any) -> fa.Adapter:
    fields = {"r": 2, "target_modules": [*targets], "init_lora_weights": False, **fields}
    return moved(fa.init(model, fa.LoraConfig(**fields), seed=seed), seed)


def layout(leaf: Tensor) -> list[int]:
    """The axes from the outermost in memory to the innermost, without those of length 1."""
    return sorted((i for i, n in enumerate(leaf.shape) if n > 1), key=lambda i: -leaf.stride(i))


def same(a: fa.Adapter, b: fa.Adapter) -> None:
    """The same value: bits, dtypes, memory layout, paths in order, config."""
    assert a.config == b.config
    assert (a.members is None) == (b.members is None)
    for x, y in ((a.params, b.params), (a.buffers, b.buffers)):
        assert list(x) == list(y)
        for path in x:
            assert list(x[path]) == list(y[path])
            for name in x[path]:
                s, t = x[path][name], y[path][name]
                assert (s.dtype, s.shape) == (t.dtype, t.shape), (path, name)
                assert torch.equal(s, t), (path, name)
                assert layout(s) == layout(t), (path, name)


# -- stacks -----------------------------------------------------------------------------------------------


def of_ranks(case: Case, model: nn.Module, ranks: list[int]) -> list[fa.Adapter]:
    """Adapters of a case with other ranks and alphas."""

    def config(r: int, **targets: Any) -> fa.AdapterConfig:
        changes: dict[str, Any] = {case.method.rank_field: r, "lora_alpha": 3 * r + 1, "alpha": 3 * r + 1}
        made = case.variant.config(**targets)
        known = {field.name for field in dataclasses.fields(made)}
        return dataclasses.replace(made, **{name: value for name, value in changes.items() if name in known})

    adapters = []
    for seed, r in enumerate(ranks):
        variant = dataclasses.replace(case.variant, config=lambda r=r, **targets: config(r, **targets))
        adapters.append(moved(dataclasses.replace(case, variant=variant).new(model, seed), seed))
    return adapters


def groups_of(model: nn.Sequential) -> int:
    return getattr(model[0], "groups", 1)


RANKED = [case for case in FIRST if case.method.with_rank is not None]


@pytest.mark.parametrize("case", SLOW, ids=str)
def test_unstack_gives_back_what_went_in(case: Case) -> None:
    model = case.model()
    adapters = [moved(case.new(model, seed), seed) for seed in range(3)]
    stack = fa.stack(adapters)
    assert {leaf.shape[0] for leaf in stack.tensors()} == {3}
    assert repr(stack).startswith("Stack of 3(")
    for adapter, again in zip(adapters, fa.unstack(stack), strict=True):
        same(again, adapter)


@pytest.mark.parametrize("case", RANKED, ids=str)
def test_unstack_gives_back_mixed_ranks(case: Case) -> None:
    model = case.model()
    adapters = of_ranks(case, model, [r * groups_of(model) for r in (2, 1, 3)])
    stack = fa.stack(adapters)
    for adapter, again in zip(adapters, fa.unstack(stack), strict=True):
        same(again, adapter)
    same(fa.select(stack, 1), adapters[1])
    same(fa.select(stack, -1), adapters[2])
    for chosen in ([1], [1, 0], [2, 2, 1]):
        smaller = fa.select(stack, chosen)
        for i, again in zip(chosen, fa.unstack(smaller), strict=True):
            same(again, adapters[i])


@pytest.mark.parametrize("case", RANKED, ids=str)
def test_padding_changes_nothing(case: Case) -> None:
    model, x = case.model(), case.inputs()
    adapters = of_ranks(case, model, [r * groups_of(model) for r in (2, 1, 3)])
    out = vmap(lambda a: fa.functional_call(model, a, (x,)))(fa.stack(adapters))
    expected = torch.stack([fa.functional_call(model, a, (x,)) for a in adapters])
    eps = torch.finfo(out.dtype).eps
    torch.testing.assert_close(out, expected, rtol=0, atol=32 * eps * max(1.0, expected.abs().max().item()))


def test_the_layout_of_lora_b_survives() -> None:
    model = nn.Sequential(nn.Linear(4, 6))
    adapters = [lora(model, "0", r=r, seed=r) for r in (2, 3)]
    stack = fa.stack(adapters)
    assert stack.params["0"]["lora_B"].stride()[1:] == (1, 6)
    for some in (stack, fa.select(stack, [1, 0]), fa.select(stack, slice(0, 1))):
        assert [a.params["0"]["lora_B"].stride() for a in fa.unstack(some)] == [(1, 6)] * len(fa.unstack(some))


def test_select_takes_every_form_of_an_index() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    adapters = [lora(model, "0", "1", seed=i) for i in range(4)]
    stack = fa.stack(adapters)
    for index, chosen in (
        (slice(None), [0, 1, 2, 3]),
        (slice(1, 3), [1, 2]),
        (slice(None, None, 2), [0, 2]),
        (slice(None, None, -1), [3, 2, 1, 0]),
        (slice(-2, None), [2, 3]),
        ([3, 0, 0], [3, 0, 0]),
        ((-1, 1), [3, 1]),
        (torch.tensor([2, -3]), [2, 1]),
        (range(2), [0, 1]),
    ):
        for got, i in zip(fa.unstack(fa.select(stack, index)), chosen, strict=True):
            same(got, adapters[i])
    same(fa.select(stack, 2), adapters[2])
    same(fa.select(stack, torch.tensor(2)), adapters[2])
    same(fa.select(fa.select(stack, [3, 1]), 0), adapters[3])
    for wrong in (4, -5, [0, 4], torch.tensor([-5])):
        with pytest.raises(fa.AdapterError, match="out of range for a stack of 4"):
            fa.select(stack, wrong)
    for empty in ([], slice(2, 2)):
        with pytest.raises(fa.AdapterError, match="at least one"):
            fa.select(stack, empty)


def test_a_stack_is_made_of_adapters() -> None:
    model = nn.Sequential(nn.Linear(4, 6))
    adapter = lora(model, "0")
    with pytest.raises(fa.AdapterError, match="at least one"):
        fa.stack([])
    with pytest.raises(TypeError, match=r"adapters\[1\] is a dict"):
        fa.stack([adapter, dict(adapter.params)])  # pyright: ignore
    with pytest.raises(fa.AdapterError, match=r"adapters\[0\] is a stack already"):
        fa.stack([fa.stack([adapter])])
    for not_a_stack in (fa.unstack, lambda a: fa.select(a, 0)):
        with pytest.raises(fa.AdapterError, match="single one"):
            not_a_stack(adapter)
        with pytest.raises(TypeError, match="list"):
            not_a_stack([adapter])  # pyright: ignore
    same(fa.unstack(fa.stack([adapter]))[0], adapter)
    same(fa.unstack(fa.stack(a for a in [adapter]))[0], adapter)


def test_a_stack_of_the_wrong_size_is_an_error() -> None:
    model = nn.Sequential(nn.Linear(4, 6))
    stack = fa.stack([lora(model, "0", seed=i) for i in range(3)])
    with pytest.raises(fa.AdapterError, match=r"A stack of 3 has 'lora_A' of shape \(2, 2, 4\) at '0'"):
        fa.unstack(stack.map(lambda t: t[:2]))


def test_alphas_dropouts_and_configs_are_each_members_own() -> None:
    model = nn.Sequential(nn.Linear(4, 6))
    adapters = [
        lora(model, "0", seed=0, lora_alpha=3, lora_dropout=0.1),
        lora(model, "0", seed=1, lora_alpha=16, use_rslora=True, task_type="CAUSAL_LM"),
        lora(model, "0", seed=2, lora_alpha=5, lora_dropout=0.4, r=4, rank_pattern={"0": 3}),
    ]
    stack = fa.stack(adapters)
    assert stack.buffers["0"]["scaling"].shape == (3,)
    for adapter, again in zip(adapters, fa.unstack(stack), strict=True):
        same(again, adapter)


def test_adapters_on_different_layers_stack_where_a_method_can_be_neutral() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 3)).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    for adapters in (
        [lora(model, "0"), lora(model, "1", "2", seed=1, r=1), lora(model, "2", "0", seed=2, r=3)],
        [
            moved(fa.init(model, fa.IA3Config(target_modules=t, feedforward_modules=f), seed=i), i)
            for i, (t, f) in enumerate([(["0", "1"], ["1"]), (["1", "2"], ["1"]), (["1"], ["1"])])
        ],
    ):
        stack = fa.stack(adapters)
        assert sorted(stack.params) == ["0", "1", "2"]
        out = vmap(lambda a: fa.functional_call(model, a, (x,)))(stack)
        expected = torch.stack([fa.functional_call(model, a, (x,)) for a in adapters])
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
        for adapter, again in zip(adapters, fa.unstack(stack), strict=True):
            assert set(again.params) == set(adapter.params)
            for path in adapter.params:
                tree_close(again.leaves(path), adapter.leaves(path), rtol=0, atol=0)
            assert again.config == adapter.config
        for chosen in ([1, 2], [1]):
            for i, again in zip(chosen, fa.unstack(fa.select(stack, chosen)), strict=True):
                assert set(again.params) == set(adapters[i].params)


def test_whole_parameters_and_token_rows_stack() -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    adapters = [
        lora(model, "1", seed=i, trainable_token_indices={"0": rows}, modules_to_save=["3"], bias="all")
        for i, rows in enumerate([[0, 3], [5, 1]])
    ]
    stack = fa.stack(adapters)
    for adapter, again in zip(adapters, fa.unstack(stack), strict=True):
        same(again, adapter)
    ids = torch.tensor([[0, 1, 3, 5]])
    out = vmap(lambda a: fa.functional_call(model, a, (ids,)))(stack)
    expected = torch.stack([fa.functional_call(model, a, (ids,)) for a in adapters])
    torch.testing.assert_close(out, expected)


def test_what_does_not_go_together_is_an_error_that_names_the_place() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4), nn.LayerNorm(4))
    other = nn.Sequential(nn.Linear(4, 5))
    a = lora(model, "0")

    def ia3(*feedforward: str) -> fa.Adapter:
        return fa.init(model, fa.IA3Config(target_modules=["0", "1"], feedforward_modules=[*feedforward]))

    dora = [lora(model, target, use_dora=True) for target in ("0", "1")]
    saved = [lora(model, "0", modules_to_save=names) for names in (["2"], None)]
    for adapters, message in (
        ([a, lora(other, "0")], r"'lora_B' at '0' has shape \(5, 2\) in adapters\[1\], and \(6, 2\) before"),
        ([a, a.to(torch.bfloat16)], r"'lora_A' at '0' has dtype torch.bfloat16 in adapters\[1\]"),
        ([a, a.to(device="meta")], r"device meta in adapters\[1\]"),
        ([a, a, ia3()], r"adapters\[0\] is lora, adapters\[2\] is ia3"),
        ([a, dora[0]], r"adapters\[0\] is lora, adapters\[1\] is dora"),
        ([ia3("1"), ia3()], r"feedforward_modules=\('1',\) in adapters\[0\] and \(\) in adapters\[1\]"),
        (dora, r"adapters\[1\] has nothing at '0', and dora has no neutral value"),
        (saved, r"adapters\[1\] has nothing at '2'"),
        ([a, lora(model, "0", lora_bias=True)], r"adapters\[1\] has 'lora_B_bias' at '0'"),
        ([lora(model, "0", lora_bias=True), a], r"adapters\[1\] lacks 'lora_B_bias' at '0'"),
    ):
        with pytest.raises(fa.AdapterError, match=message):
            fa.stack(adapters)


def test_a_convolution_of_one_channel_is_no_stack_of_experts() -> None:
    """Its leaves have the shapes (r, 1, k) and (r, r, 1), from which ranks could be misread."""
    model = nn.Sequential(nn.Conv1d(1, 4, 3))
    adapters = [lora(model, "0", r=r, seed=r) for r in (4, 2)]
    for adapter, again in zip(adapters, fa.unstack(fa.stack(adapters)), strict=True):
        same(again, adapter)


# -- a method with a large frozen buffer that its adapters share ------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class BankConfig(AdapterConfig):
    """y = W x + bank (l * x), with a frozen bank that one projection key gives to all."""

    peft_type: str = "FUNCADAPT_TEST_BANK"
    target_modules: Any = None
    key: int = 0


def _bank_init(site: Site, config: BankConfig, draw: Draw, weight: Any) -> Fresh:
    generator = torch.Generator().manual_seed(config.key)
    bank = torch.randn(site.out_features, site.in_features, generator=generator, dtype=draw.dtype)
    return Fresh({"bank_l": draw.normal(site.in_features)}, {"bank": bank})


def _bank_after(layer: Any, p: Leaf, x: Tensor, y: Tensor) -> Tensor:
    return y + (x * p["bank_l"]) @ p["bank"].t()


BANK = Method(
    name="test-bank",
    config=BankConfig,
    kinds=frozenset({"linear"}),
    keys={"bank_l": "bank_l"},
    init=_bank_init,
    after=_bank_after,
    weight=lambda layer, p, weight, bias: (weight + p["bank"] * p["bank_l"], bias),
    reads=frozenset(),
)


@pytest.fixture
def bank() -> Iterator[Callable[..., fa.Adapter]]:
    fa.register(BANK)
    yield lambda model, seed=0, **fields: fa.init(model, BankConfig(target_modules=["0"], **fields), seed=seed)
    fa.method.unregister("test-bank")


def test_a_frozen_buffer_in_common_is_one_storage(bank: Callable[..., fa.Adapter]) -> None:
    model = nn.Sequential(nn.Linear(4, 6))
    adapters = [bank(model, seed=i) for i in range(3)]  # equal values in tensors of their own
    stack = fa.stack(adapters)

    def shared(some: fa.Adapter, n: int) -> None:
        leaf = some.buffers["0"]["bank"]
        assert leaf.shape == (n, 6, 4)
        assert leaf.stride(0) == 0 or n == 1
        assert leaf.untyped_storage().data_ptr() == stack.buffers["0"]["bank"].untyped_storage().data_ptr()
        assert leaf.untyped_storage().nbytes() == 6 * 4 * 4

    shared(stack, 3)
    for index, n in (([2, 0], 2), ([0, 1, 1, 2], 4), (slice(1, 3), 2), ([1], 1)):
        shared(fa.select(stack, index), n)
    shared(fa.select(fa.select(stack, [1]), [0, 0]), 2)
    for adapter, again in zip(adapters, fa.unstack(stack), strict=True):
        same(again, adapter)
    x = torch.randn(5, 4)
    out = vmap(lambda a: fa.functional_call(model, a, (x,)))(stack)
    torch.testing.assert_close(out, torch.stack([fa.functional_call(model, a, (x,)) for a in adapters]))
    assert "bank" not in {name for leaves in stack.params.values() for name in leaves}


def test_frozen_buffers_that_differ_are_not_shared(bank: Callable[..., fa.Adapter]) -> None:
    model = nn.Sequential(nn.Linear(4, 6))
    adapters = [bank(model, seed=i, key=i // 2) for i in range(3)]
    stack = fa.stack(adapters)
    assert stack.buffers["0"]["bank"].stride(0) == 24
    for adapter, again in zip(adapters, fa.unstack(stack), strict=True):
        same(again, adapter)


def test_a_method_without_a_neutral_value_stacks_the_same_layers_only(bank: Callable[..., fa.Adapter]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    other = fa.init(model, BankConfig(target_modules=["1"]))
    with pytest.raises(fa.AdapterError, match="has nothing at '0', and test-bank has no neutral value"):
        fa.stack([bank(model), other])


# -- a stack is a value -----------------------------------------------------------------------------------


@pytest.fixture
def pair() -> tuple[nn.Module, fa.Adapter]:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    return model, fa.stack([lora(model, "0", "2", seed=r, r=r, lora_alpha=r + 5) for r in (1, 3)])


def test_vmap_and_grad_over_a_stack(pair: tuple[nn.Module, fa.Adapter]) -> None:
    model, stack = pair
    x = torch.randn(5, 4, dtype=torch.float64)

    def loss(adapter: fa.Adapter) -> Tensor:
        return fa.functional_call(model, adapter, (x,)).pow(2).sum()

    members = fa.unstack(stack)
    torch.testing.assert_close(vmap(loss)(stack), torch.stack([loss(a) for a in members]), rtol=1e-13, atol=0)

    def of(adapter: fa.Adapter) -> Any:
        return grad(lambda p: loss(adapter.replace(params=p)))(adapter.params)

    g = vmap(of)(stack)
    padded = fa.stack([a.replace(params=of(a)) for a in members])
    tree_close(g, dict(padded.params), rtol=0, atol=1e-11)


def test_vmap_over_half_a_stack_is_an_error() -> None:
    """A member's params with everybody's scalings: with as many adapters as ranks the shapes would even broadcast."""
    model = nn.Sequential(nn.Linear(4, 6))
    stack = fa.stack([lora(model, "0", seed=i, lora_alpha=i + 1) for i in range(2)])
    x = torch.randn(5, 4)
    with pytest.raises(fa.AdapterError):
        vmap(lambda p: fa.functional_call(model, stack.replace(params=p), (x,)))(stack.params)


def test_a_stack_is_a_pytree(pair: tuple[nn.Module, fa.Adapter]) -> None:
    _, stack = pair
    leaves, spec = pytree.tree_flatten(stack)
    again = pytree.tree_unflatten(leaves, spec)
    assert again.members == stack.members
    same(again, stack)
    read = pytree.treespec_loads(pytree.treespec_dumps(spec))
    assert read == spec
    same(fa.unstack(pytree.tree_unflatten(leaves, read))[0], fa.unstack(stack)[0])
    flat, treespec = optree.tree_flatten(stack)  # pyright: ignore
    rebuilt: Any = optree.tree_unflatten(treespec, flat)
    assert rebuilt.members == stack.members
    for a, b in zip(fa.unstack(rebuilt), fa.unstack(stack), strict=True):
        assert a.config == b.config
        tree_close(dict(a.params), dict(b.params), rtol=0, atol=0)
    doubled = pytree.tree_map(torch.add, stack, stack)
    same(fa.unstack(doubled)[0], fa.unstack(stack)[0].map(lambda t: 2 * t))
    single = fa.select(stack, 0)
    with pytest.raises(ValueError, match=r"(?i)node|type|context"):
        pytree.tree_map(torch.add, stack, single)


@pytest.mark.parametrize(
    "clone", [copy.copy, copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))], ids=["copy", "deepcopy", "pickle"]
)
def test_copies_of_a_stack_are_stacks(pair: tuple[nn.Module, fa.Adapter], clone: Any) -> None:
    stack = pair[1]
    for a, b in zip(fa.unstack(clone(stack)), fa.unstack(stack), strict=True):
        same(a, b)


def test_torch_load_trusts_a_stack(pair: tuple[nn.Module, fa.Adapter]) -> None:
    file = io.BytesIO()
    torch.save(pair[1], file)
    file.seek(0)
    for a, b in zip(fa.unstack(torch.load(file, weights_only=True)), fa.unstack(pair[1]), strict=True):
        same(a, b)


def test_a_stack_converts(pair: tuple[nn.Module, fa.Adapter]) -> None:
    low = pair[1].to(torch.bfloat16)
    for a, b in zip(fa.unstack(low), fa.unstack(pair[1]), strict=True):
        same(a, b.to(torch.bfloat16))


class Vmapped(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, stack: fa.Adapter, x: Tensor) -> Tensor:
        return vmap(lambda a: fa.functional_call(self.model, a, (x,)))(stack)


def test_an_exported_program_takes_a_stack(pair: tuple[nn.Module, fa.Adapter]) -> None:
    model, stack = pair
    model.requires_grad_(False)
    x = torch.randn(5, 4, dtype=torch.float64)
    program = torch.export.export(
        Vmapped(model), (stack, x), strict=False
    )  # strict: torch clones parameters inside vmap
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    again = torch.export.load(file)
    other = stack.map(lambda t: 0.5 * t)
    expected = torch.stack([fa.functional_call(model, a, (x,)) for a in fa.unstack(other)])
    torch.testing.assert_close(again.module()(other, x), expected, rtol=0, atol=1e-12)
    (given, _), _ = pytree.tree_unflatten(pytree.tree_leaves((other, x)), again.call_spec.in_spec)
    assert given.members == stack.members


def test_compile_stacks_and_unstacks(pair: tuple[nn.Module, fa.Adapter]) -> None:
    model, stack = pair
    x = torch.randn(5, 4, dtype=torch.float64)

    def f(adapters: list[fa.Adapter], x: Tensor) -> Tensor:
        return vmap(lambda a: fa.functional_call(model, a, (x,)))(fa.stack(adapters))

    torch._dynamo.reset()
    out = torch.compile(f, fullgraph=True, backend="eager")(fa.unstack(stack), x)
    torch.testing.assert_close(out, f(fa.unstack(stack), x), rtol=0, atol=1e-12)


def test_a_stack_is_no_single_adapter(pair: tuple[nn.Module, fa.Adapter], tmp_path: Any) -> None:
    model, stack = pair
    x, before = torch.randn(5, 4, dtype=torch.float64), Snapshot(model)
    for call in (
        lambda: fa.functional_call(model, stack, (x,)),
        lambda: fa.functional_call(model, {"a": fa.unstack(stack)[0], "b": stack}, (x,)),
        lambda: fa.applied(model, stack).__enter__(),
        lambda: fa.merge(model, stack),
        lambda: fa.merge_(model, stack),
        lambda: fa.save(stack, tmp_path / "it"),
        lambda: fa.merge(model, fa.grouped(stack)),  # pyright: ignore
        lambda: fa.merge_(model, fa.routed(stack, [0])),  # pyright: ignore
        lambda: fa.save(fa.grouped(stack), tmp_path / "it"),  # pyright: ignore
    ):
        with pytest.raises((fa.AdapterError, TypeError), match=r"stack|Grouped"):
            call()
        before.check()
    assert not (tmp_path / "it").exists()


# -- grouped and routed on whole models -------------------------------------------------------------------


def close(out: Tensor, expected: Tensor, accuracy: float = 2e-5) -> None:
    """Equal up to the roundings of a few layers in float32."""
    torch.testing.assert_close(out, expected, rtol=0, atol=accuracy * max(1.0, expected.abs().max().item()))


def logits(model: nn.Module, adapters: Any, inputs: dict[str, Any]) -> Tensor:
    return fa.functional_call(model, adapters, (), inputs, strict=True)["logits"]


def rows_of(inputs: dict[str, Any], rows: Any) -> dict[str, Any]:
    return {name: value[rows] if isinstance(value, Tensor) else value for name, value in inputs.items()}


def check_model(model: nn.Module, adapters: list[fa.Adapter], inputs: dict[str, Any], accuracy: float = 2e-5) -> None:
    """Grouped and routed equal the loop, in value and in gradient, and the model is unchanged."""
    n, stack = len(adapters), fa.stack(adapters)
    count = len(next(iter(inputs.values())))
    size = count // n
    before = Snapshot(model)

    def loop(adapters: list[fa.Adapter]) -> Tensor:
        groups = [rows_of(inputs, slice(i * size, (i + 1) * size)) for i in range(n)]
        return torch.cat([logits(model, a, group) for a, group in zip(adapters, groups, strict=True)])

    with torch.no_grad():
        expected = loop(adapters)
        assert (expected - model(**inputs).logits).abs().max() > 1e-2
        close(logits(model, fa.grouped(stack), inputs), expected, accuracy)
        before.check()
        index = torch.tensor([n - 1, -1, 0, 0, n - 1]).repeat(count)[:count]
        one_by_one = [
            logits(model, {} if i < 0 else adapters[i], rows_of(inputs, slice(row, row + 1)))
            for row, i in enumerate(index.tolist())
        ]
        for how in (None, "gather", "sort"):
            close(logits(model, fa.routed(stack, index, how=how), inputs), torch.cat(one_by_one), accuracy)
        before.check()
    own, each = with_gradients(stack), [with_gradients(a) for a in adapters]
    slope = torch.randn_like(expected)
    (logits(model, fa.grouped(own), inputs) * slope).sum().backward()
    (loop(each) * slope).sum().backward()
    check_gradients(own, each, accuracy)
    own = with_gradients(stack)
    (logits(model, fa.routed(own, torch.arange(n).repeat_interleave(size)), inputs) * slope).sum().backward()
    check_gradients(own, each, accuracy)
    before.check()


def with_gradients(adapter: fa.Adapter) -> fa.Adapter:
    return adapter.replace(params=pytree.tree_map(lambda t: t.detach().clone().requires_grad_(), adapter.params))


def check_gradients(stack: fa.Adapter, each: list[fa.Adapter], accuracy: float) -> None:
    g = [pytree.tree_map(lambda t: torch.zeros_like(t) if t.grad is None else t.grad, a.params) for a in each]
    expected = fa.stack([a.replace(params=p) for a, p in zip(each, g, strict=True)]).params
    for path, leaves in expected.items():
        for name, leaf in leaves.items():
            got = stack.params[path][name].grad
            assert got is not None, (path, name)
            close(got, leaf, 10 * accuracy)


TEXT = torch.arange(6 * 5).reshape(6, 5).mul(7).remainder(38) + 1
SIZES: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "initializer_range": 0.2}


def new(model: type[nn.Module], config: Any) -> Any:
    torch.manual_seed(0)
    return model(config).eval().requires_grad_(False)


def tiny_gpt2() -> Any:
    return new(
        tf.GPT2LMHeadModel,
        tf.GPT2Config(
            vocab_size=40,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=16,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
            bos_token_id=0,
            eos_token_id=39,
            initializer_range=0.2,
        ),
    )


def tiny_bert() -> Any:
    config = tf.BertConfig(**SIZES, intermediate_size=32, num_attention_heads=2, max_position_embeddings=16)
    return new(tf.BertForSequenceClassification, config)


def tiny_t5() -> Any:
    config = tf.T5Config(
        vocab_size=40,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    return new(tf.T5ForConditionalGeneration, config)


def tiny_mixtral() -> Any:
    config = tf.MixtralConfig(
        **SIZES,
        intermediate_size=32,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        bos_token_id=None,
        eos_token_id=39,
    )
    return new(tf.MixtralForCausalLM, config)


def tiny_qwen3_moe() -> Any:
    config = tf.Qwen3MoeConfig(
        **SIZES,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        bos_token_id=None,
        eos_token_id=39,
    )
    return new(tf.Qwen3MoeForCausalLM, config)


def tiny_vit() -> Any:
    config = tf.ViTConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        initializer_range=0.2,
    )
    return new(tf.ViTForImageClassification, config)


def present(model: nn.Module, *names: str) -> list[str]:
    """Those of the names that this release of transformers has."""
    found = {path.rpartition(".")[2] for path, _ in model.named_modules()}
    return [name for name in names if name in found]


FIELDS: list[dict[str, Any]] = [{}, {"use_dora": True}]


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_llama_of_mixed_ranks(llama: Any, fields: dict[str, Any]) -> None:
    adapters = [
        lora(llama, "q_proj", "v_proj", "down_proj", "embed_tokens", "lm_head", seed=r, r=r, lora_alpha=2, **fields)
        for r in (2, 1, 3)
    ]
    check_model(llama, adapters, {"input_ids": TEXT})


def test_llama_with_padded_rows(llama: Any) -> None:
    mask = torch.ones_like(TEXT)
    mask[1, :3] = mask[4, :1] = 0
    adapters = [lora(llama, "q_proj", "o_proj", "up_proj", seed=i) for i in range(2)]
    check_model(llama, adapters, {"input_ids": TEXT, "attention_mask": mask})


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_gpt2_with_positions_that_all_rows_share(fields: dict[str, Any]) -> None:
    model = tiny_gpt2()
    adapters = [lora(model, "c_attn", "c_fc", "c_proj", "wte", "wpe", seed=i, **fields) for i in range(3)]
    check_model(model, adapters, {"input_ids": TEXT})


def test_ia3_on_gpt2() -> None:
    model = tiny_gpt2()
    config = fa.IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"])
    check_model(model, [moved(fa.init(model, config), i) for i in range(3)], {"input_ids": TEXT})


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_bert(fields: dict[str, Any]) -> None:
    model = tiny_bert()
    targets = ["query", "dense", "word_embeddings", "position_embeddings", "token_type_embeddings", "classifier"]
    adapters = [lora(model, *targets, seed=i, **fields) for i in range(3)]
    check_model(model, adapters, {"input_ids": TEXT, "attention_mask": torch.ones_like(TEXT)})


def test_t5() -> None:
    model = tiny_t5()
    adapters = [lora(model, "q", "v", "wi", "wo", "lm_head", seed=i) for i in range(3)]
    check_model(model, adapters, {"input_ids": TEXT, "decoder_input_ids": TEXT[:, :3]}, 1e-4)


def test_a_layer_without_an_axis_of_rows_is_never_mistaken_for_one_with() -> None:
    """T5's relative bias looks up (queries, keys), which all rows share: with as many queries as rows, too."""
    model = tiny_t5()
    adapters = [lora(model, "q", "relative_attention_bias", seed=i) for i in range(2)]
    for tokens in (5, 6, 12):
        ids = TEXT[:, :1].expand(6, tokens).contiguous()
        for many in (fa.grouped(fa.stack(adapters)), fa.routed(fa.stack(adapters), [0, 1, 0, 1, 0, 1])):
            with pytest.raises(fa.AdapterError, match="relative_attention_bias"):
                fa.functional_call(model, many, (), {"input_ids": ids, "decoder_input_ids": ids})


class Positions(nn.Module):
    """Learned positions as many write them: one vector of ids, shared by all rows through broadcasting."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe, self.head = nn.Embedding(40, 8), nn.Embedding(16, 8), nn.Linear(8, 40)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.wte(ids) + self.wpe(torch.arange(ids.shape[1])))


@pytest.mark.parametrize("tokens", [5, 6, 12])
def test_positions_without_an_axis_of_rows_are_right_or_refused(tokens: int) -> None:
    model = Positions()
    adapters = [lora(model, "wpe", "head", seed=i) for i in range(2)]
    ids = TEXT[:, :1].expand(6, tokens)
    expected = torch.cat([fa.functional_call(model, a, (g,)) for a, g in zip(adapters, ids.split(3), strict=True)])
    for many in (fa.grouped(fa.stack(adapters)), fa.routed(fa.stack(adapters), [0, 0, 0, 1, 1, 1])):
        try:
            out = fa.functional_call(model, many, (ids,))
        except fa.AdapterError:
            continue  # right or refused
        close(out, expected)


def test_vit() -> None:
    model = tiny_vit()
    targets = present(model, "projection", "q_proj", "query", "fc1", "classifier")
    images = torch.linspace(-1, 1, 6 * 3 * 8 * 8).reshape(6, 3, 8, 8).mul(9).sin()
    check_model(model, [lora(model, *targets, seed=i) for i in range(3)], {"pixel_values": images})


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("make", [tiny_mixtral, tiny_qwen3_moe], ids=["mixtral", "qwen3_moe"])
def test_mixtures_of_experts(make: Callable[[], Any], implementation: str) -> None:
    model = make()
    model.set_experts_implementation(implementation)
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    adapters = [lora(model, "q_proj", seed=r, r=r, target_parameters=parameters) for r in (2, 1, 3)]
    check_model(model, adapters, {"input_ids": TEXT}, 1e-4)


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


class ListOfExperts(nn.Module):
    """Experts that are modules of their own, each called with the rows that chose it."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(4, 3)
        self.experts = nn.ModuleList(Expert() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, 4)
        choice, out = self.router(flat).argmax(-1), torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            chosen = (choice == i).nonzero().flatten()
            if len(chosen):
                out = out.index_add(0, chosen, expert(flat[chosen]))
        return out.reshape(x.shape)


class Mixed(nn.Module):
    """A module with a weight of its own, and an argument whose first axis are the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor, mixing: Tensor) -> Tensor:
        return mixing @ (x @ self.w)


class Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixed = Mixed()

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.shape[1]
        return self.mixed(x, torch.arange(tokens * tokens, dtype=x.dtype).sin().reshape(tokens, tokens))


@pytest.mark.parametrize("n", [2, 6])
@pytest.mark.parametrize("tokens", [5, 6])
def test_an_argument_as_long_as_the_rows_is_right_or_refused(tokens: int, n: int) -> None:
    model = Mixing()
    adapters = [lora(model, seed=i, target_parameters=["mixed.w"]) for i in range(n)]
    x = torch.randn(6, tokens, 4)
    expected = torch.cat([fa.functional_call(model, a, (g,)) for a, g in zip(adapters, x.split(6 // n), strict=True)])
    try:
        out = fa.functional_call(model, fa.grouped(fa.stack(adapters)), (x,))
    except fa.AdapterError:
        return  # right or refused
    close(out, expected)


def test_experts_in_a_module_list() -> None:
    model = nn.Sequential(nn.Linear(4, 4), ListOfExperts()).double()
    x = torch.randn(6, 5, 4, dtype=torch.float64)
    targets = ["1.router", *(f"1.experts.{i}.{j}" for i in range(3) for j in ("up", "down"))]
    adapters = [lora(model, *targets, seed=i) for i in range(3)]
    stack = fa.stack(adapters)
    expected = torch.cat([fa.functional_call(model, a, (g,)) for a, g in zip(adapters, x.split(2), strict=True)])
    torch.testing.assert_close(fa.functional_call(model, fa.grouped(stack), (x,)), expected, rtol=0, atol=1e-12)
    index = [2, -1, 0, 0, 1, 2]
    rows = [fa.functional_call(model, {} if i < 0 else adapters[i], (x[r : r + 1],)) for r, i in enumerate(index)]
    for how in (None, "gather", "sort", "masked"):
        out = fa.functional_call(model, fa.routed(stack, index, how=how), (x,))
        torch.testing.assert_close(out, torch.cat(rows), rtol=0, atol=1e-12)


# -- leaves that are not the method's ---------------------------------------------------------------------


def test_token_rows_norms_and_biases_of_each_adapter() -> None:
    model = tiny_gpt2()  # with a tied head, and biases everywhere
    adapters = [
        lora(
            model,
            "c_attn",
            seed=i,
            modules_to_save=["ln_f"],
            bias="all",
            trainable_token_indices={"wte": [TEXT[0, 0].item(), TEXT[i, 3].item()]},
        )
        for i in range(3)
    ]
    check_model(model, adapters, {"input_ids": TEXT})


def test_whole_heads_of_each_adapter(llama: Any) -> None:
    adapters = [lora(llama, "q_proj", seed=i, modules_to_save=["lm_head", "input_layernorm"]) for i in range(2)]
    check_model(llama, adapters, {"input_ids": TEXT})
    model = tiny_bert()
    adapters = [lora(model, "query", seed=i, modules_to_save=["classifier"], bias="lora_only") for i in range(3)]
    check_model(model, adapters, {"input_ids": TEXT})


def test_overridden_parameters_are_under_every_adapter() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)).double()
    adapters = [lora(model, "0", "1", seed=i) for i in range(2)]
    x, base = torch.randn(4, 4, dtype=torch.float64), {"0.weight": torch.randn(6, 4, dtype=torch.float64)}

    def loss(many: Any, base: Any, x: Tensor) -> Tensor:
        return fa.functional_call(model, many, (x,), parameters=base).pow(2).sum()

    stack = fa.stack(adapters)
    g = grad(loss, argnums=1)(fa.grouped(stack), base, x)
    expected = [grad(loss, argnums=1)(a, base, part) for a, part in zip(adapters, x.split(2), strict=True)]
    torch.testing.assert_close(g["0.weight"], sum(e["0.weight"] for e in expected), rtol=0, atol=1e-11)


# -- generate ---------------------------------------------------------------------------------------------

GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def strong(model: nn.Module, seed: int) -> fa.Adapter:
    return lora(model, "q_proj", "v_proj", "down_proj", "lm_head", seed=seed, lora_alpha=16)


def generate(model: Any, adapters: Any, ids: Tensor, **options: Any) -> Tensor:
    with torch.no_grad(), fa.applied(model, adapters, strict=True):
        return model.generate(ids, attention_mask=torch.ones_like(ids), **{**GREEDY, **options})


def test_generate_of_many_is_generate_of_each(llama: Any) -> None:
    adapters = [strong(llama, i) for i in range(3)]
    stack, before = fa.stack(adapters), Snapshot(llama)
    alone = torch.cat([generate(llama, a, group) for a, group in zip(adapters, TEXT.split(2), strict=True)])
    assert torch.equal(generate(llama, fa.grouped(stack), TEXT), alone)
    index = [2, -1, 0, 1, -1, 2]
    rows = [generate(llama, {} if i < 0 else adapters[i], TEXT[r : r + 1]) for r, i in enumerate(index)]
    assert len({tuple(row[0, 5:].tolist()) for row in rows}) > 3
    for how in (None, "gather", "sort", "masked"):
        assert torch.equal(generate(llama, fa.routed(stack, index, how=how), TEXT), torch.cat(rows))
    before.check()


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"num_beams": 3, "num_return_sequences": 2}], ids=str)
def test_beams_and_return_sequences(llama: Any, options: dict[str, Any]) -> None:
    adapters = [strong(llama, i) for i in range(3)]
    stack, index = fa.stack(adapters), [2, -1, 0, 1, -1, 2]
    rows = [generate(llama, {} if i < 0 else adapters[i], TEXT[r : r + 1], **options) for r, i in enumerate(index)]
    assert torch.equal(generate(llama, fa.routed(stack, index), TEXT, **options), torch.cat(rows))
    groups = [generate(llama, a, group, **options) for a, group in zip(adapters, TEXT.split(2), strict=True)]
    assert torch.equal(generate(llama, fa.grouped(stack), TEXT, **options), torch.cat(groups))


def test_sampled_return_sequences(llama: Any) -> None:
    """Each prompt's sequences are its adapter's: with nothing left to chance, they are the greedy ones."""
    adapters = [strong(llama, i) for i in range(3)]
    stack, index = fa.stack(adapters), [2, -1, 0, 1, -1, 2]
    greedy = generate(llama, fa.routed(stack, index), TEXT)
    sampled = generate(llama, fa.routed(stack, index), TEXT, do_sample=True, top_k=1, num_return_sequences=2)
    assert torch.equal(sampled, greedy.repeat_interleave(2, 0))


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
def test_an_encoder_decoder_generates(options: dict[str, Any]) -> None:
    model = tiny_t5()
    adapters = [lora(model, "q", "v", "wo", "lm_head", seed=i, lora_alpha=16) for i in range(3)]
    stack, index = fa.stack(adapters), [2, -1, 0, 1, -1, 2]
    rows = [generate(model, {} if i < 0 else adapters[i], TEXT[r : r + 1], **options) for r, i in enumerate(index)]
    assert len({tuple(row[0].tolist()) for row in rows}) > 2
    assert torch.equal(generate(model, fa.routed(stack, index), TEXT, **options), torch.cat(rows))
    groups = [generate(model, a, group, **options) for a, group in zip(adapters, TEXT.split(2), strict=True)]
    assert torch.equal(generate(model, fa.grouped(stack), TEXT, **options), torch.cat(groups))
    with torch.no_grad(), fa.applied(model, fa.grouped(stack)):
        for _ in range(2):  # the encoder is called by itself, the second time after a decoder with beams
            out = model.generate(TEXT, attention_mask=torch.ones_like(TEXT), **{**GREEDY, **options})
            assert torch.equal(out, torch.cat(groups))


# -- one input for all ------------------------------------------------------------------------------------


def test_expand_repeats_every_argument_with_rows(llama: Any, ids: Tensor) -> None:
    adapters = [lora(llama, "q_proj", "embed_tokens", seed=i) for i in range(3)]
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    with torch.no_grad():
        out = fa.functional_call(llama, fa.grouped(fa.stack(adapters), expand=True), (), inputs)
        each = [fa.functional_call(llama, a, (), inputs) for a in adapters]
    assert out.logits.shape[0] == 6
    close(out.logits, torch.cat([e.logits for e in each]))
    close(out.loss, torch.stack([e.loss for e in each]).mean())
    single = fa.functional_call(llama, fa.grouped(fa.stack(adapters), expand=True), (ids[:1],)).logits
    close(single, torch.cat([logits(llama, a, {"input_ids": ids[:1]}) for a in adapters]))


def test_expand_leaves_arguments_without_rows_alone() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 3)

        def forward(self, x: Tensor, scale: Tensor, *, shift: Any, flag: str) -> dict[str, Any]:
            return {"y": self.lin(x) * scale + shift["by"], "flag": flag}

    model = Scaled()
    adapters = [lora(model, "lin", seed=i) for i in range(2)]
    x, scale, by = torch.randn(5, 4), torch.randn(3), torch.randn(5, 3)
    args, kwargs = (x, scale), {"shift": {"by": by}, "flag": "it"}
    out = fa.functional_call(model, fa.grouped(fa.stack(adapters), expand=True), args, kwargs)
    expected = torch.cat([fa.functional_call(model, a, args, kwargs)["y"] for a in adapters])
    close(out["y"], expected)
    assert out["flag"] == "it"


# -- dropout ----------------------------------------------------------------------------------------------


def visible(paths: int, *rates: float, **fields: Any) -> tuple[nn.Module, list[fa.Adapter]]:
    """Layers whose output for ones is the adapter's dropout mask."""
    model = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(paths)))
    for layer in model:
        layer.weight.data.zero_()
    adapters = []
    for rate in rates:
        targets = [str(i) for i in range(paths)]
        config = fa.LoraConfig(r=32, lora_alpha=32, target_modules=targets, lora_dropout=rate, **fields)
        new = fa.init(model, config)
        adapters.append(new.replace(params=pytree.tree_map(lambda t: torch.eye(32), new.params)))
    return model.train(), adapters


@pytest.mark.parametrize("seeds", [None, [3, 4, 5, 6]])
def test_every_adapter_has_its_own_rate_and_its_own_mask(seeds: list[int] | None) -> None:
    rates = (0.1, 0.5, 0.0, 0.5)
    model, adapters = visible(1, *rates)
    x = torch.ones(4 * 20, 10, 32)
    masks = fa.functional_call(model, fa.grouped(fa.stack(adapters), seeds=seeds), (x,)).unflatten(0, (4, 20))
    count = masks[0].numel()
    for mask, rate in zip(masks, rates, strict=True):
        dropped = (mask == 0).double().mean().item()
        assert abs(dropped - rate) <= 5 * (rate * (1 - rate) / count) ** 0.5
        torch.testing.assert_close(mask[mask != 0].unique(), torch.tensor([1 / (1 - rate)]), rtol=1e-6, atol=0)
        for axis in range(3):  # rows, tokens and features are dropped independently of each other
            assert rate == 0 or mask.ne(0).any(axis).ne(mask.ne(0).all(axis)).any()
    both = ((masks[1] == 0) & (masks[3] == 0)).double().mean().item()
    assert abs(both - 0.25) < 0.02
    with torch.no_grad():
        bare = fa.functional_call(model.eval(), fa.grouped(fa.stack(adapters), seeds=seeds), (x,))
    assert torch.equal(bare, x)


def test_seeds_decide_and_nothing_else_does() -> None:
    model, adapters = visible(2, 0.5, 0.5)
    x = torch.ones(4, 6, 32)
    first = nn.Sequential(model[0])
    one = [fa.Adapter({"0": a.params["0"]}, {"0": a.buffers["0"]}, a.config) for a in adapters]
    stack = fa.stack(one)

    def call(seeds: list[int] | None) -> Tensor:
        return fa.functional_call(first, fa.grouped(stack, seeds=seeds), (x,))

    a = call([1, 2])
    torch.manual_seed(99)
    assert torch.equal(call([1, 2]), a)
    b = call([2, 1])
    assert torch.equal(b[:2], a[2:])
    assert torch.equal(b[2:], a[:2])
    assert not torch.equal(a[:2], a[2:])
    same_seed = call([1, 1])
    assert torch.equal(same_seed[:2], same_seed[2:])
    # another site, another mask
    second = nn.Sequential(nn.Identity(), model[1])
    other = [fa.Adapter({"1": a.params["1"]}, {"1": a.buffers["1"]}, a.config) for a in adapters]
    assert not torch.equal(fa.functional_call(second, fa.grouped(fa.stack(other), seeds=[1, 2]), (x,)), a)
    # without seeds torch's generator decides
    assert not torch.equal(call(None), call(None))
    torch.manual_seed(5)
    before = call(None)
    torch.manual_seed(5)
    assert torch.equal(call(None), before)
    with pytest.raises(fa.AdapterError, match="3 seeds for a stack of 2"):
        fa.grouped(stack, seeds=[1, 2, 3])


@pytest.mark.parametrize("how", [None, "gather", "sort", "masked"])
def test_routed_rows_have_their_adapters_rate(how: str | None) -> None:
    model, adapters = visible(1, 0.1, 0.6, 0.0)
    index = torch.tensor([1, -1, 0, 2]).repeat(20)
    out = fa.functional_call(model, fa.routed(fa.stack(adapters), index, how=how), (torch.ones(80, 10, 32),))
    for i, rate in enumerate((0.1, 0.6, 0.0)):
        mask = out[index == i]
        assert abs((mask == 0).double().mean().item() - rate) <= 5 * (rate * (1 - rate) / mask.numel()) ** 0.5
        torch.testing.assert_close(mask[mask != 0].unique(), torch.tensor([1 / (1 - rate)]), rtol=1e-6, atol=0)
    assert not out[index == -1].any()


def test_dora_with_dropout_uses_one_mask_for_both_terms() -> None:
    """PEFT's form of DoRA's dropout, for each adapter with its own mask: the single-adapter formula."""
    model = nn.Sequential(nn.Linear(4, 6)).double().train()
    adapters = [lora(model, "0", seed=i, use_dora=True, lora_dropout=0.5) for i in range(2)]
    x = torch.randn(6, 4, dtype=torch.float64)
    seeds = [7, 8]
    out = fa.functional_call(model, fa.grouped(fa.stack(adapters), seeds=seeds), (x,))
    eye = torch.eye(4, dtype=torch.float64)
    plain = nn.Sequential(nn.Linear(4, 4, bias=False)).double().train()
    plain[0].weight.data.zero_()
    seen = [
        fa.Adapter(
            {"0": {"lora_A": eye, "lora_B": eye}},
            {"0": {"scaling": torch.tensor(1.0, dtype=torch.float64)}},
            fa.LoraConfig(r=4, target_modules=["0"], lora_dropout=0.5),
        )
        for _ in range(2)
    ]
    dropped = fa.functional_call(plain, fa.grouped(fa.stack(seen), seeds=seeds), (x,))  # the site's path is the same
    assert (dropped == 0).any()
    for i, rows in enumerate((slice(0, 3), slice(3, 6))):
        p, w, b = adapters[i].leaves("0"), model[0].weight, model[0].bias
        full = w + p["scaling"] * p["lora_B"] @ p["lora_A"]
        ratio = p["lora_magnitude_vector"] / full.norm(dim=1)
        y = x[rows] @ w.t() + b
        delta = p["scaling"] * dropped[rows] @ p["lora_A"].t() @ p["lora_B"].t()
        expected = y + (ratio - 1) * (dropped[rows] @ w.t()) + ratio * delta
        torch.testing.assert_close(out[rows], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seeds", [None, [1, 2]])
def test_dropout_in_one_graph(seeds: list[int] | None) -> None:
    model, adapters = visible(1, 0.5, 0.25)
    stack, x = fa.stack(adapters), torch.ones(40, 10, 32)
    torch._dynamo.reset()
    f = torch.compile(
        lambda stack, x: fa.functional_call(model, fa.grouped(stack, seeds=seeds), (x,)),
        fullgraph=True,
        backend="eager",
    )
    out = f(stack, x)
    for mask, rate in zip(out.split(20), (0.5, 0.25), strict=True):
        assert abs((mask == 0).double().mean().item() - rate) < 0.04
    if seeds is not None:
        assert torch.equal(out, fa.functional_call(model, fa.grouped(stack, seeds=seeds), (x,)))


def test_dropout_under_grad() -> None:
    model, adapters = visible(1, 0.5, 0.25)
    stack, x = fa.stack(adapters), torch.ones(8, 5, 32)

    def loss(params: Any) -> Tensor:
        return fa.functional_call(model, fa.grouped(stack.replace(params=params), seeds=[1, 2]), (x,)).pow(2).sum()

    own = with_gradients(stack)
    loss(own.params).backward()
    tree_close(grad(loss)(stack.params), pytree.tree_map(lambda t: t.grad, own.params), rtol=1e-5, atol=1e-4)


# -- activation checkpointing -----------------------------------------------------------------------------


@pytest.fixture
def trained(llama: Any) -> Any:
    return copy.deepcopy(llama).train()


@pytest.mark.parametrize("seeds", [None, [5, 6, 7]])
@pytest.mark.parametrize(
    "fields", [{}, {"use_dora": True}, {"lora_dropout": 0.3}, {"modules_to_save": ["input_layernorm"]}], ids=str
)
def test_hugging_face_checkpointing(trained: Any, fields: dict[str, Any], seeds: Any) -> None:
    stack = fa.stack([lora(trained, "q_proj", "down_proj", seed=r, r=r, **fields) for r in (2, 1, 3)])
    results = []
    for on in (False, True):
        if on:
            trained.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        own, before = with_gradients(stack), Snapshot(trained)
        torch.manual_seed(0)
        fa.functional_call(trained, fa.grouped(own, seeds=seeds), (TEXT,), {"labels": TEXT}).loss.backward()
        before.check()
        results.append(pytree.tree_map(lambda t: t.grad, own.params))
    tree_close(results[1], results[0], rtol=1e-6, atol=1e-7)


def test_two_calls_of_different_sizes_before_one_backward(trained: Any) -> None:
    """A recomputation is of its own call, whatever was called since."""
    stack = fa.stack([lora(trained, "q_proj", "down_proj", seed=i) for i in range(2)])
    results = []
    for on in (False, True):
        if on:
            trained.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        own = with_gradients(stack)
        with fa.applied(trained, fa.grouped(own)):
            first = trained(TEXT[:2], labels=TEXT[:2]).loss
            second = trained(TEXT, labels=TEXT).loss
            (first + second).backward()
        results.append(pytree.tree_map(lambda t: t.grad, own.params))
    tree_close(results[1], results[0], rtol=1e-6, atol=1e-7)


# -- attention --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
@pytest.mark.parametrize("targets", [["linear1", "linear2"], ["self_attn"], ["linear1", "self_attn"]], ids="-".join)
def test_a_transformer_encoder_layer_is_never_bypassed(mode: str, targets: list[str]) -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).train(mode == "train")
    x = torch.randn(6, 5, 8)
    padding = torch.zeros(6, 5, dtype=torch.bool)
    padding[::2, 3:] = True
    adapters = [lora(model, *targets, seed=i) for i in range(3)]
    stack, before = fa.stack(adapters), Snapshot(model)
    for kwargs in ({}, {"src_key_padding_mask": padding}):
        with torch.set_grad_enabled(mode != "no_grad"):
            out = fa.functional_call(model, fa.grouped(stack), (x,), kwargs, strict=True)
            expected = []
            for i, a in enumerate(adapters):
                rows = slice(2 * i, 2 * i + 2)
                mine = {name: mask[rows] for name, mask in kwargs.items()}
                expected.append(torch.func.functional_call(model, fa.merge(model, a), (x[rows],), mine))
            valid = ~padding if kwargs else torch.ones_like(padding)
            close(out[valid], torch.cat(expected)[valid], 1e-5)
            index = [2, -1, 0, 1, 1, 2]
            rows = []
            for r, i in enumerate(index):
                mine = {name: mask[r : r + 1] for name, mask in kwargs.items()}
                merged = {} if i < 0 else fa.merge(model, adapters[i])
                rows.append(torch.func.functional_call(model, merged, (x[r : r + 1],), mine))
            out = fa.functional_call(model, fa.routed(stack, index), (x,), kwargs, strict=True)
            close(out[valid], torch.cat(rows)[valid], 1e-5)
        before.check()


def test_a_whole_encoder_is_never_bypassed() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(6, 5, 8)
    targets = [f"layers.{i}.{name}" for i in range(2) for name in ("self_attn", "linear1")]
    adapters = [lora(model, *targets, seed=i) for i in range(3)]
    before = Snapshot(model)
    with torch.no_grad():
        out = fa.functional_call(model, fa.grouped(fa.stack(adapters)), (x,), strict=True)
        each = [fa.functional_call(model, a, (g,)) for a, g in zip(adapters, x.split(2), strict=True)]
    close(out, torch.cat(each), 1e-5)
    before.check()


def test_attention_with_masks_of_every_form() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mha = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, q: Tensor, kv: Tensor, **masks: Any) -> Any:
            return self.mha(q, kv, value=kv, **masks)

    model = Attention().double()
    q, kv = torch.randn(6, 3, 8, dtype=torch.float64), torch.randn(6, 4, 8, dtype=torch.float64)
    adapters = [lora(model, "mha", seed=i) for i in range(3)]
    stack, before = fa.stack(adapters), Snapshot(model)
    padding = torch.zeros(6, 4, dtype=torch.bool)
    padding[1::2, 3:] = True
    by_head = torch.randn(12, 3, 4, dtype=torch.float64)
    for masks, cut in (
        ({}, lambda r: {}),
        ({"attn_mask": torch.ones(3, 4, dtype=torch.bool).triu(2)}, lambda r: {}),
        ({"key_padding_mask": padding, "need_weights": False}, lambda r: {"key_padding_mask": padding[r]}),
        ({"attn_mask": by_head}, lambda r: {"attn_mask": by_head.unflatten(0, (6, 2))[r].flatten(0, 1)}),
    ):
        out, weights = fa.functional_call(model, fa.grouped(stack), (q, kv), masks)
        index = [2, -1, 0, 1, 1, 2]
        routed, routed_weights = fa.functional_call(model, fa.routed(stack, index), (q, kv), masks)
        for i, a in enumerate(adapters):
            r = slice(2 * i, 2 * i + 2)
            expected, w = fa.functional_call(model, a, (q[r], kv[r]), {**masks, **cut(r)})
            torch.testing.assert_close(out[r], expected, rtol=0, atol=1e-13)
            assert (w is None) == (weights is None)
            if w is not None:
                torch.testing.assert_close(weights[r], w, rtol=0, atol=1e-13)
        for row, i in enumerate(index):
            r = slice(row, row + 1)
            expected, w = fa.functional_call(model, {} if i < 0 else adapters[i], (q[r], kv[r]), {**masks, **cut(r)})
            torch.testing.assert_close(routed[r], expected, rtol=0, atol=1e-13)
            if w is not None:
                torch.testing.assert_close(routed_weights[r], w, rtol=0, atol=1e-13)
    before.check()


def test_sequence_first_attention_is_refused() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.mha = nn.Linear(8, 8), nn.MultiheadAttention(8, 2, batch_first=False)

        def forward(self, x: Tensor) -> Tensor:
            x = self.lin(x).transpose(0, 1)
            return self.mha(x, x, x)[0].transpose(0, 1)

    model = Attention()
    before = Snapshot(model)
    for target in ("mha", "lin"):
        stack = fa.stack([lora(model, target, seed=i) for i in range(2)])
        for many in (fa.grouped(stack), fa.routed(stack, [0, 1, 0, 1])):
            with pytest.raises(fa.AdapterError, match="batch_first=False"):
                fa.functional_call(model, many, (torch.randn(4, 4, 8),))
            before.check()


def test_unbatched_inputs_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    stack = fa.stack([lora(model, "0", seed=i) for i in range(2)])
    for many in (fa.grouped(stack), fa.routed(stack, [0, 1, 0, 1])):
        with pytest.raises(fa.AdapterError, match="'0'"):
            fa.functional_call(model, many, (torch.randn(4),))


# -- threads, autocast ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_frequent_switches")
def test_two_threads_with_different_routes(llama: Any) -> None:
    adapters = [lora(llama, "q_proj", "down_proj", seed=i) for i in range(3)]
    stack, before = fa.stack(adapters), Snapshot(llama)
    values = [fa.routed(stack, [0, 1, 2, -1, 0, 1]), fa.routed(stack, [2, 2, -1, 0, 1, 0]), fa.grouped(stack)]
    with torch.no_grad():
        expected = [logits(llama, v, {"input_ids": TEXT}) for v in values]
    wrong: list[Any] = []

    @torch.no_grad()
    def work(mine: int) -> None:
        try:
            for _ in range(10):
                out = logits(llama, values[mine], {"input_ids": TEXT})
                if not torch.equal(out, expected[mine]):
                    wrong.append(mine)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(mine,)) for mine in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    before.check()


def test_one_value_in_two_calls_at_once() -> None:
    """The value holds no state: an inner call on other rows does not disturb the outer one."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double()
    adapters = [lora(model, "0", "1", seed=i) for i in range(2)]
    many, x = fa.grouped(fa.stack(adapters)), torch.randn(4, 4, dtype=torch.float64)
    expected = fa.functional_call(model, many, (x,))
    other = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double()
    with fa.applied(model, many):
        fa.functional_call(other, many, (torch.cat([x, x]),))
        assert torch.equal(model(x), expected)
        model(torch.cat([x, x]))
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("how", ["grouped", None, "gather", "sort", "masked"])
def test_autocast_is_the_loops(how: str | None) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 8))
    adapters = [lora(model, "0", "2", seed=i) for i in range(3)]
    x, stack, index = torch.randn(6, 5, 16), fa.stack(adapters), torch.arange(3).repeat_interleave(2)
    many = fa.grouped(stack) if how == "grouped" else fa.routed(stack, index, how=how)
    with torch.autocast("cpu", torch.bfloat16):
        out = fa.functional_call(model, many, (x,))
        expected = torch.cat([fa.functional_call(model, a, (g,)) for a, g in zip(adapters, x.split(2), strict=True)])
    assert out.dtype == expected.dtype
    # the sums of products are rounded in another order
    torch.testing.assert_close(out, expected, rtol=0, atol=4 * 2**-7 * expected.abs().max().item())


def test_adapters_in_float32_around_a_model_in_bfloat16() -> None:
    model = nn.Sequential(nn.Linear(16, 8)).bfloat16()
    config = fa.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    adapters = [fa.init(model, config, seed=i, dtype=torch.float32) for i in range(3)]
    x, stack = torch.randn(6, 5, 16).bfloat16(), fa.stack(adapters)
    expected = torch.cat([fa.functional_call(model, a, (g,)) for a, g in zip(adapters, x.split(2), strict=True)])
    index = torch.arange(3).repeat_interleave(2)
    for many in (fa.grouped(stack), *(fa.routed(stack, index, how=how) for how in (None, "gather", "sort", "masked"))):
        out = fa.functional_call(model, many, (x,))
        assert out.dtype == expected.dtype == torch.bfloat16
        torch.testing.assert_close(out, expected, rtol=0, atol=2 * 2**-8 * expected.abs().max().item())


# -- the chooser ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shapes", "how"),
    [
        ((16, 1, 16, 9216, 1152), "sort"),  # decoding: the adapters are not copied, the few tokens are
        ((16, 64, 16, 9216, 1152), "gather"),  # prefill: copying an adapter is cheaper than moving its tokens
        ((512, 1, 64, 9216, 1152), "sort"),  # many rows for each adapter
        ((512, 1, 4, 9216, 1152), "masked"),  # few adapters: one product with all of them
        ((4, 1, 1000, 9216, 1152), "gather"),  # of many adapters only the few that are used are touched
    ],
)
def test_the_execution_follows_from_shapes(shapes: tuple[int, ...], how: str) -> None:
    groups, size, n, numbers, width = shapes
    assert choose(groups, size, n, numbers, width, masked=True, static=False) == how
    static = choose(groups, size, n, numbers, width, masked=True, static=True)
    assert static != "sort"  # it looks at values
    assert choose(groups, size, n, numbers, width, masked=False, static=True) == "gather"


def test_one_adapter_with_most_rows_is_not_padded_for() -> None:
    """The others' buckets would be as large as its own."""
    model = nn.Sequential(nn.Linear(64, 64)).double()
    adapters = [lora(model, "0", seed=i) for i in range(8)]
    index = torch.tensor([0] * 57 + [1, 2, 3, 4, 5, 6, 7])
    x = torch.randn(64, 64, dtype=torch.float64)
    expected = torch.cat([fa.functional_call(model, adapters[i], (x[r : r + 1],)) for r, i in enumerate(index)])
    for how in (None, "sort"):
        out = fa.functional_call(model, fa.routed(fa.stack(adapters), index, how=how), (x,))
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
