"""Lily: rows that act on each other, and layers that have A and B in common."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from peft_tools import raw
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import vmap

import funcadapt as fa
import funcadapt.peft as shim
from funcadapt.init import _draw, fresh
from funcadapt.methods.lily import METHOD
from funcadapt.sites import describe
from funcadapt.tying import ties
from funcadapt.view.mixed import mixed_batch

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Layers(nn.Module):
    """Five layers of one target and shape, and two of another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(4, 4)}) for _ in range(5))
        self.ups = nn.ModuleList(nn.ModuleDict({"up_q": nn.Linear(4, 4)}) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.layers, *self.ups):
            (module,) = layer.values()  # pyright: ignore
            x = torch.tanh(module(x))
        return x


def make(seed: int = 0, **fields: object) -> tuple[Layers, fa.Adapter]:
    model = Layers().double()
    config = fa.LilyConfig(r=3, num_B=2, target_modules=["q", "up_q"], init_weights=False, **fields)  # pyright: ignore
    adapter = fa.init(model, config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    more = lambda t: t + torch.randn(t.shape, generator=generator).to(t.dtype)  # noqa: E731
    return model, adapter.replace(params={k: {n: more(t) for n, t in p.items()} for k, p in adapter.params.items()})


def x_of(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def naive(layer: nn.Linear, a: Tensor, b: Tensor, router: Tensor, x: Tensor, scaling: float) -> Tensor:
    count, r = router.shape
    out = layer(x)
    rows = x.reshape(-1, x.shape[-1])
    q = torch.stack([torch.softmax(router @ (a @ row), 0) for row in rows]).mean(0)
    for e in range(count):
        out = out + scaling * q[e] * x @ a.t() @ b[e * r : (e + 1) * r]
    return out


def test_the_formula() -> None:
    model, x = nn.Sequential(nn.Linear(4, 6)).double(), x_of(3, 2, 4)
    adapter = fa.init(model, fa.LilyConfig(r=2, num_B=3, scaling=0.7, target_modules=["0"], init_weights=False))
    p = adapter.params["0"]
    expected = naive(model[0], p["lily_A"], p["lily_B"], p["lily_router"], x, 0.7)
    torch.testing.assert_close(fa.functional_call(model, adapter, x), expected)
    # the rows act on each other: this is the method, not a defect
    assert (fa.functional_call(model, adapter, x[:1]) - expected[:1]).abs().max() > 1e-4


# -- many adapters ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [[0, 1, 2, 0, 1, 2], [2, -1, 2, 2, -1, 0], [-1] * 6, [1] * 6, [0, 2, 1, 2]], ids=str)
def test_routed_is_a_loop_over_adapters_each_with_all_its_rows(index: list[int]) -> None:
    model, adapters = make()[0], [make(seed)[1] for seed in range(3)]
    x, which = x_of(len(index) * 2, 3, 4), torch.tensor(index).repeat_interleave(2)
    expected = torch.empty_like(x)
    for i in range(-1, 3):
        rows = x[which == i]
        expected[which == i] = model(rows) if i < 0 else fa.functional_call(model, adapters[i], rows)
    stack = fa.stack(adapters)
    for how in (None, "masked"):
        torch.testing.assert_close(fa.functional_call(model, fa.routed(stack, index, how=how), x), expected)
    for how in ("gather", "sort"):
        with pytest.raises(fa.AdapterError, match="act on each other"):
            fa.functional_call(model, fa.routed(stack, index, how=how), x)


def test_routed_tokens_are_a_loop_over_adapters() -> None:
    model, x = nn.Sequential(nn.Linear(4, 6)).double(), x_of(2, 5, 4)
    config = fa.LilyConfig(r=2, target_modules=["0"], init_weights=False)
    adapters = [fa.init(model, config, seed=seed) for seed in range(3)]
    index = torch.tensor([[2, -1, 0, 2, 2], [0, 0, 2, -1, -1]])
    expected = model(x).detach()
    for i in (0, 2):
        expected[index == i] = fa.functional_call(model, adapters[i], x[index == i])
    out = fa.functional_call(model, fa.routed(fa.stack(adapters), index), x)
    torch.testing.assert_close(out, expected)


def test_gradients_of_routed_are_those_of_the_loop() -> None:
    model, x = make()[0], x_of(6, 4)
    stack = fa.stack([make(seed)[1] for seed in range(2)])
    index = torch.tensor([1, 0, 0, 1, -1, 1])

    def leaves() -> fa.Adapter:
        return stack.replace(
            params={k: {n: t.clone().requires_grad_() for n, t in p.items()} for k, p in stack.params.items()}
        )

    routed, loop = leaves(), leaves()
    fa.functional_call(model, fa.routed(routed, index), x).pow(2).sum().backward()
    for i, adapter in enumerate(fa.unstack(loop)):
        fa.functional_call(model, adapter, x[index == i]).pow(2).sum().backward()
    for a, b in zip(routed.params.values(), loop.params.values(), strict=True):
        for name in a:
            torch.testing.assert_close(a[name].grad, b[name].grad)


@pytest.mark.parametrize("kind", ["embedding", "conv1d", "conv2d"])
def test_routed_at_other_layers(kind: str) -> None:
    layer = {"embedding": nn.Embedding(9, 4), "conv1d": nn.Conv1d(4, 6, 3, padding=1),
             "conv2d": nn.Conv2d(4, 6, 3, groups=2)}[kind]  # fmt: skip
    model = nn.Sequential(layer).double()
    x = {"embedding": torch.randint(9, (6, 3)), "conv1d": x_of(6, 4, 5), "conv2d": x_of(6, 4, 5, 4)}[kind]
    config = fa.LilyConfig(r=2, num_B=3, target_modules=["0"], init_weights=False)
    adapters = [fa.init(model, config, seed=seed) for seed in range(2)]
    index = torch.tensor([1, 0, -1, 0, 0, 1])
    expected = model(x).detach()
    for i, adapter in enumerate(adapters):
        expected[index == i] = fa.functional_call(model, adapter, x[index == i])
    torch.testing.assert_close(fa.functional_call(model, fa.routed(fa.stack(adapters), index), x), expected)


# -- what layers have in common ---------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 2, 3, 9])
def test_layers_share_as_in_peft(stride: int) -> None:
    """B by target and shape, A by `stride_A` consecutive ones of these; "up_q" also ends in "q", the shorter target."""
    _, adapter = make(stride_A=stride)
    firsts = range(0, 5, stride)
    assert [i for i in range(5) if "lily_A" in adapter.params[f"layers.{i}.q"]] == [*firsts]
    assert [i for i in range(5) if "lily_B" in adapter.params[f"layers.{i}.q"]] == [0]
    assert [i for i in range(2) if "lily_A" in adapter.params[f"ups.{i}.up_q"]] == [*range(0, 2, stride)]
    for path, frozen in adapter.buffers.items():
        for _, leaf, other in ties(frozen):
            i = int(path.split(".")[1])
            assert other == path.replace(str(i), str(i // stride * stride if leaf == "lily_A" else 0))


@pytest.mark.parametrize("stride", [1, 2, 9])
def test_common_leaves_are_one_in_every_form(stride: int, tmp_path: Path) -> None:
    model, adapter = make(stride_A=stride)
    x = x_of(3, 4)
    h = x
    for i, (path, leaves) in enumerate(
        [(f"layers.{i}.q", i) for i in range(5)] + [(f"ups.{i}.up_q", i) for i in range(2)]
    ):
        head, _, tail = path.split(".")
        a = adapter.params[f"{head}.{leaves // stride * stride}.{tail}"]["lily_A"]
        b = adapter.params[f"{head}.0.{tail}"]["lily_B"]
        module = model.get_submodule(path)
        assert isinstance(module, nn.Linear), i
        h = torch.tanh(naive(module, a, b, adapter.params[path]["lily_router"], h, 1.0))
    expected = fa.functional_call(model, adapter, x)
    torch.testing.assert_close(expected, h)

    fa.save(adapter, tmp_path)  # each layer has its copy in a file
    assert len(raw(tmp_path)) == 7 * 3
    again = fa.load(tmp_path, model=model)
    assert torch.equal(fa.functional_call(model, again, x), expected)
    assert again.num_parameters() == adapter.num_parameters()
    with pytest.raises(fa.AdapterFileError, match="Pass it"):
        fa.load(tmp_path)

    stack = fa.stack([adapter, make(seed=1, stride_A=stride)[1]])
    both = vmap(lambda one: fa.functional_call(model, one, x))(stack)
    torch.testing.assert_close(both[0], expected)
    torch.testing.assert_close(fa.functional_call(model, fa.grouped(stack, expand=True), x), both.flatten(0, 1))

    live = fa.materialize(copy.deepcopy(model), adapter)
    torch.testing.assert_close(live(x), expected)
    trained = [p for p in live.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == adapter.num_parameters()
    assert len({id(p) for p in trained}) == sum(map(len, adapter.params.values()))
    torch.testing.assert_close(copy.deepcopy(live)(x), expected)
    back = fa.dematerialize(live)["default"]
    assert {k: [*p] for k, p in back.params.items()} == {k: [*p] for k, p in adapter.params.items()}
    assert torch.equal(fa.functional_call(model, back, x), expected)


def test_copies_that_differ_are_an_error(tmp_path: Path) -> None:
    model, adapter = make(stride_A=2)
    fa.save(adapter, tmp_path)
    tensors = raw(tmp_path)
    tensors["base_model.model.layers.1.q.lily_A.weight"] += 1
    save_file(tensors, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(fa.AdapterFileError, match=r"'layers\.1\.q' and 'layers\.0\.q' have 'lily_A' in common"):
        fa.load(tmp_path, model=model)


def test_a_missing_first_layer_is_an_error() -> None:
    model, adapter = make()
    less = {path: p for path, p in adapter.params.items() if path != "layers.0.q"}
    with pytest.raises(fa.SiteError, match=r"'layers\.1\.q' uses 'lily_B' of 'layers\.0\.q'"):
        fa.functional_call(model, adapter.replace(params=less), x_of(2, 4))


def test_a_second_adapter_shares_too() -> None:
    """PEFT ties the layers of the first adapter alone."""
    fields = {"r": 2, "target_modules": ["q"], "stride_A": 2}
    counts: list[int] = []
    for package in (peft, shim):
        model = package.get_peft_model(Layers(), package.LilyConfig(**fields))
        model.add_adapter("second", package.LilyConfig(**fields))
        counts.append(len({id(p) for n, p in model.named_parameters(remove_duplicate=False) if ".lily_B.second" in n}))
    assert counts == [5, 1]


def test_ranks_are_padded_where_a_layer_has_no_a_of_its_own() -> None:
    model, x = Layers().double(), x_of(4, 4)
    adapters = [
        fa.init(model, fa.LilyConfig(r=r, stride_A=2, target_modules=["q"], init_weights=False), seed=r) for r in (1, 3)
    ]
    out = fa.functional_call(model, fa.grouped(fa.stack(adapters)), x)
    expected = torch.cat([fa.functional_call(model, a, rows) for a, rows in zip(adapters, x.split(2), strict=True)])
    torch.testing.assert_close(out, expected)


def test_a_moved_scaling_is_saved_and_different_ones_are_refused(tmp_path: Path) -> None:
    model, adapter = make()
    scaled = {path: {n: t * 3 if n == "scaling" else t for n, t in b.items()} for path, b in adapter.buffers.items()}
    fa.save(adapter.replace(buffers=scaled), tmp_path)
    assert fa.load(tmp_path, model=model).config.scaling == 3.0  # pyright: ignore[reportAttributeAccessIssue]
    path = next(iter(scaled))
    with pytest.raises(fa.SiteError, match="different scalings"):
        fa.save(adapter.replace(buffers={**adapter.buffers, path: scaled[path]}), tmp_path)


def test_nothing_can_be_merged() -> None:
    model, adapter = make()
    with pytest.raises(fa.SiteError, match="no dense form"):
        fa.merge(model, adapter)
    assert "mha" not in METHOD.kinds


@pytest.mark.parametrize("fields", [{"r": 0}, {"stride_A": 0}, {"num_B": 1}, {"layers_pattern": "h"}], ids=str)
def test_what_contradicts_itself_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        fa.LilyConfig(**fields)  # pyright: ignore[reportArgumentType]


def test_mixed_batches_of_a_live_model() -> None:
    """Each adapter sees its own rows together, also where the adapters are at different layers."""
    model, x, fields = Layers().double(), x_of(6, 4), {"r": 2, "stride_A": 3, "init_weights": False}
    adapters = {
        "a": fa.init(model, fa.LilyConfig(target_modules=["q"], **fields), seed=1),  # pyright: ignore
        "b": fa.init(model, fa.LilyConfig(target_modules=r"layers\.[1-3]\.q", **fields), seed=2),  # pyright: ignore
    }
    names = ["a", "__base__", "b", "b", "a", "b"]
    expected = model(x).detach()
    for name, adapter in adapters.items():
        own = torch.tensor([n == name for n in names])
        expected[own] = fa.functional_call(model, adapter, x[own])
    for name, adapter in adapters.items():
        fa.materialize(model, adapter, name)
    with mixed_batch(model, names):
        torch.testing.assert_close(model(x), expected)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_experts_need_the_values_of_an_index() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(2, 6, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.w[0].t() + x @ self.w[1].t()

    model, x = nn.Sequential(Experts()).double(), x_of(4, 4)
    config = fa.LilyConfig(r=2, target_modules=["0"], init_weights=False)
    site, _ = describe(model, "0.w")
    made = [fresh(METHOD, site, config, _draw(site, seed, None, None), torch.zeros) for seed in range(2)]
    adapters = [fa.Adapter({"0.w": one.params}, {"0.w": one.buffers}, config) for one in made]
    stack, index = fa.stack(adapters), torch.tensor([1, 0, 1, 1])
    expected = torch.empty(4, 6, dtype=torch.float64)
    for i, adapter in enumerate(adapters):
        expected[index == i] = fa.functional_call(model, adapter, x[index == i])
    torch.testing.assert_close(fa.functional_call(model, fa.routed(stack, index), x), expected)
    with pytest.raises(fa.AdapterError, match="act on each other"):
        vmap(lambda x: fa.functional_call(model, fa.routed(stack, index), x))(x.expand(2, 4, 4))
