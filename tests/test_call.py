"""The engine: composition, weights, overridden parameters, other people's hooks, and what can be wrong in a call."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import Snapshot
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.utils import _pytree as pytree

import funcadapt as fa

EXACT = {"rtol": 0.0, "atol": 1e-12}


class Net(nn.Module):
    """Two layers and a head tied to the first, the smallest model with everything in it."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 6)
        self.norm = nn.LayerNorm(6)
        self.down = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.norm(self.up(x))))


@pytest.fixture
def net() -> Net:
    return Net().double()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 5, 4, dtype=torch.float64)


def lora(model: nn.Module, *targets: str, seed: int = 0, **fields: Any) -> fa.Adapter:
    config = fa.LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False, **fields)
    return fa.init(model, config, seed=seed)


def ia3(model: nn.Module, *targets: str, seed: int = 0) -> fa.Adapter:
    return fa.init(
        model, fa.IA3Config(target_modules=list(targets), feedforward_modules=[], init_ia3_weights=False), seed=seed
    )


def delta(model: nn.Module, adapter: fa.Adapter, x: Tensor) -> Tensor:
    return fa.functional_call(model, adapter, (x,)) - model(x)


# -- composition ------------------------------------------------------------------------------------------


def test_additive_adapters_sum(net: Net, x: Tensor) -> None:
    model = nn.Sequential(net.up)
    a, b, c = (lora(model, "0", seed=i) for i in range(3))
    out = fa.functional_call(model, {"a": a, "b": b, "c": c}, (x,))
    expected = model(x) + delta(model, a, x) + delta(model, b, x) + delta(model, c, x)
    torch.testing.assert_close(out, expected, **EXACT)


def test_the_first_adapter_is_innermost(net: Net, x: Tensor) -> None:
    model = nn.Sequential(net.up)
    scale, add = ia3(model, "0"), lora(model, "0")
    vector = scale.params["0"]["ia3_l"].flatten()
    added = delta(model, add, x)
    torch.testing.assert_close(
        fa.functional_call(model, {"add": add, "scale": scale}, (x,)), (model(x) + added) * vector, **EXACT
    )
    torch.testing.assert_close(
        fa.functional_call(model, {"scale": scale, "add": add}, (x,)), model(x) * vector + added, **EXACT
    )


def test_no_adapters_is_the_bare_model(net: Net, x: Tensor) -> None:
    assert torch.equal(fa.functional_call(net, {}, (x,)), net(x))


# -- weights ----------------------------------------------------------------------------------------------


def test_a_number_and_a_scalar_tensor_scale_the_adapter(net: Net, x: Tensor) -> None:
    model = nn.Sequential(net.up)
    a = lora(model, "0")
    expected = model(x) + 0.3 * delta(model, a, x)
    for w in (0.3, torch.tensor(0.3, dtype=torch.float64)):
        torch.testing.assert_close(fa.functional_call(model, a, (x,), weights=w), expected, **EXACT)
        torch.testing.assert_close(fa.functional_call(model, {"a": a}, (x,), weights={"a": w}), expected, **EXACT)


def test_weights_zero_and_one_are_exact(net: Net, x: Tensor) -> None:
    a, b = lora(net, "up", "down"), lora(net, "up", "down", seed=1)
    assert torch.equal(fa.functional_call(net, a, (x,), weights=0.0), net(x))
    torch.testing.assert_close(fa.functional_call(net, a, (x,), weights=1.0), fa.functional_call(net, a, (x,)), **EXACT)
    out = fa.functional_call(net, {"a": a, "b": b}, (x,), weights={"a": 0.0})
    torch.testing.assert_close(out, fa.functional_call(net, b, (x,)), **EXACT)


def test_weights_are_differentiable(net: Net, x: Tensor) -> None:
    a, b = lora(net, "up", "down"), ia3(net, "up", "down", seed=1)

    def loss(w: dict[str, Tensor]) -> Tensor:
        return fa.functional_call(net, {"a": a, "b": b}, (x,), weights=w).pow(2).sum()

    at = {"a": torch.tensor(0.4, dtype=torch.float64), "b": torch.tensor(-0.7, dtype=torch.float64)}
    g = grad(loss)(at)
    for name in at:
        h = 1e-5
        up, down = ({**at, name: at[name] + step} for step in (h, -h))
        torch.testing.assert_close(g[name], (loss(up) - loss(down)) / (2 * h), rtol=1e-6, atol=1e-6)
        assert g[name].abs() > 0


def test_a_vector_weighs_rows_and_a_matrix_tokens(net: Net, x: Tensor) -> None:
    model = nn.Sequential(net.up)
    for a in (lora(model, "0"), ia3(model, "0"), lora(model, "0", use_dora=True)):
        change = delta(model, a, x)
        rows, tokens = torch.randn(3, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
        out = fa.functional_call(model, a, (x,), weights=rows)
        torch.testing.assert_close(out, model(x) + rows[:, None, None] * change, **EXACT)
        out = fa.functional_call(model, a, (x,), weights=tokens)
        torch.testing.assert_close(out, model(x) + tokens[..., None] * change, **EXACT)


def test_row_weights_mix_adapters_through_a_whole_model(net: Net, x: Tensor) -> None:
    """One-hot rows choose: row i is what its own adapter gives."""
    adapters = {str(i): lora(net, "up", "down", seed=i) for i in range(3)}
    weights = {str(i): torch.eye(3, dtype=torch.float64)[i] for i in range(3)}
    out = fa.functional_call(net, adapters, (x,), weights=weights)
    for i in range(3):
        torch.testing.assert_close(out[i], fa.functional_call(net, adapters[str(i)], (x,))[i], **EXACT)


def test_the_wrong_weights_are_errors(net: Net, x: Tensor) -> None:
    a = lora(net, "up")
    with pytest.raises(fa.AdapterError, match=r"unknown adapter 'stile'.*'style'"):
        fa.functional_call(net, {"style": a}, (x,), weights={"stile": 1.0})
    with pytest.raises(fa.AdapterError, match="without a name"):
        fa.functional_call(net, a, (x,), weights={"style": 1.0})
    with pytest.raises(fa.AdapterError, match="must be a dict"):
        fa.functional_call(net, {"style": a}, (x,), weights=0.5)
    with pytest.raises(fa.AdapterError, match=r"'up'.*\(4,\).*\(3, 5, 6\)"):
        fa.functional_call(net, a, (x,), weights=torch.ones(4))
    with pytest.raises(TypeError, match="expected an Adapter"):
        fa.functional_call(net, {"style": a.params}, (x,))  # pyright: ignore
    with pytest.raises(TypeError, match="dict"):
        fa.functional_call(net, [a], (x,))  # pyright: ignore


# -- the base's own parameters ----------------------------------------------------------------------------


def test_base_and_adapter_are_differentiated_together(net: Net, x: Tensor) -> None:
    a = lora(net, "up", "down")
    base = {name: p.detach() for name, p in net.named_parameters()}

    def loss(params: Any, base: Any) -> Tensor:
        return fa.functional_call(net, a.replace(params=params), (x,), parameters=base).pow(2).sum()

    g, g_base = grad(loss, argnums=(0, 1))(a.params, base)
    assert sorted(g_base) == sorted(base)
    net.zero_grad()
    leaves = a.map(lambda t: t.clone().requires_grad_())
    fa.functional_call(net, leaves, (x,)).pow(2).sum().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(g_base[name], p.grad, **EXACT)
    torch.testing.assert_close(g["up"]["lora_B"], leaves.params["up"]["lora_B"].grad, **EXACT)


def test_overridden_parameters_are_used(net: Net, x: Tensor) -> None:
    a = lora(net, "up")
    new = {"up.weight": torch.randn_like(net.up.weight), "norm.bias": torch.randn_like(net.norm.bias)}
    other = Net().double()
    other.load_state_dict({**net.state_dict(), **new})
    before = Snapshot(net)
    out = fa.functional_call(net, a, (x,), parameters=new)
    assert torch.equal(out, fa.functional_call(other, a, (x,)))
    # DoRA looks at the base weight, so the override must reach it
    d = fa.init(net, fa.LoraConfig(r=2, target_modules=["up"], use_dora=True, init_lora_weights=False))
    assert torch.equal(fa.functional_call(net, d, (x,), parameters=new), fa.functional_call(other, d, (x,)))
    before.check()
    with pytest.raises(fa.AdapterError, match=r"'up.wieght'.*'up.weight'"):
        fa.functional_call(net, a, (x,), parameters={"up.wieght": new["up.weight"]})
    before.check()


def test_buffers_can_be_overridden() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    a, x = lora(model, "0"), torch.randn(3, 4)
    mean = torch.randn(4)
    out = fa.functional_call(model, a, (x,), parameters={"1.running_mean": mean})
    plain = fa.functional_call(model, a, (x,))
    norm: Any = model[1]
    torch.testing.assert_close(out, plain - (mean - norm.running_mean) / (norm.running_var + norm.eps).sqrt())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embed(ids))))


def test_tied_parameters_are_overridden_together() -> None:
    model, ids = Tied(), torch.tensor([[0, 3, 6]])
    a, new = lora(model, "mix"), torch.randn(7, 4)
    out = fa.functional_call(model, a, (ids,), parameters={"embed.weight": new})
    again = fa.functional_call(model, a, (ids,), parameters={"head.weight": new})
    assert torch.equal(out, again)
    only_one = fa.functional_call(
        model, a, (ids,), parameters={"embed.weight": new, "head.weight": model.head.weight.detach()}
    )
    assert not torch.equal(out, only_one)
    assert model.head.weight is model.embed.weight


def test_tied_weights_under_merge() -> None:
    ids = torch.tensor([[0, 3, 6]])
    model = Tied()
    a = fa.init(model, fa.LoraConfig(r=2, target_modules=["embed"], init_lora_weights=False))
    out = fa.functional_call(model, a, (ids,))
    with pytest.raises(fa.AdapterError, match=r"'embed.weight' is tied to 'head.weight'"):
        fa.merge(model, a)
    untied = fa.merge(model, a, tied="untie")
    assert untied["head.weight"] is model.head.weight
    merged = torch.func.functional_call(model, untied, (ids,), tie_weights=False)
    torch.testing.assert_close(merged, out, rtol=0, atol=1e-5)
    shared = fa.merge(model, a, tied="share")
    assert shared["head.weight"] is shared["embed.weight"]
    with pytest.raises(fa.AdapterError, match="'error', 'untie' or 'share'"):
        fa.merge(model, a, tied="both")  # pyright: ignore

    before = Snapshot(model)
    with pytest.raises(fa.AdapterError, match="tied"):
        fa.merge_(model, a)
    before.check()
    fa.merge_(model, a, tied="untie")
    assert model.head.weight is not model.embed.weight
    torch.testing.assert_close(model(ids), out, rtol=0, atol=1e-5)

    model = Tied()
    shared = fa.merge(model, a, tied="share")
    fa.merge_(model, a, tied="share")
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.head.weight, shared["head.weight"])


def test_a_safe_merge_with_nan_leaves_the_model_unchanged(net: Net) -> None:
    a = lora(net, "up", "down")
    bad = a.replace(params={**a.params, "down": pytree.tree_map(lambda t: t * float("nan"), a.params["down"])})
    before = Snapshot(net)
    with pytest.raises(fa.AdapterError, match=r"'down.weight'.*nothing was merged"):
        fa.merge_(net, bad, safe=True)
    before.check()
    fa.merge_(net, a, safe=True)
    with pytest.raises(AssertionError):
        before.check()  # the snapshot sees a merge


def test_a_computed_weight_is_adapted_but_not_merged_into() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    model, x = nn.ModuleDict({"lin": layer}), torch.randn(2, 4)
    model.forward = lambda x: layer(x)  # pyright: ignore
    a = lora(model, "lin")
    p, s = a.params["lin"], a.buffers["lin"]["scaling"]
    expected = F.linear(x, layer.weight + s * p["lora_B"] @ p["lora_A"], layer.bias)
    torch.testing.assert_close(fa.functional_call(model, a, (x,)), expected)
    with pytest.raises(fa.SiteError, match=r"'lin'.*remove_parametrizations"):
        fa.merge(model, a)


# -- nesting ----------------------------------------------------------------------------------------------


def test_applied_is_functional_call(net: Net, x: Tensor) -> None:
    a, before = lora(net, "up", "down"), Snapshot(net)
    with fa.applied(net, a, weights=0.5, parameters={"up.bias": torch.zeros(6, dtype=torch.float64)}) as inside:
        assert inside is net
        out = net(x)
    before.check()
    expected = fa.functional_call(
        net, a, (x,), weights=0.5, parameters={"up.bias": torch.zeros(6, dtype=torch.float64)}
    )
    assert torch.equal(out, expected)


def test_nested_blocks_are_one_composition(net: Net, x: Tensor) -> None:
    add, scale = lora(net, "up", "down"), ia3(net, "up", "down", seed=1)
    dora = lora(net, "up", "down", seed=2, use_dora=True)
    expected = fa.functional_call(net, {"1": add, "2": scale, "3": dora}, (x,))
    before = Snapshot(net)
    with fa.applied(net, add), fa.applied(net, scale):
        out = fa.functional_call(net, dora, (x,))
    before.check()
    torch.testing.assert_close(out, expected, **EXACT)


def test_dora_on_lora_is_dense_nesting(net: Net, x: Tensor) -> None:
    inner, outer = lora(net, "up"), lora(net, "up", seed=1, use_dora=True)
    other = Net().double()
    other.load_state_dict({**net.state_dict(), **fa.merge(net, inner)})
    expected = fa.functional_call(other, outer, (x,))
    torch.testing.assert_close(fa.functional_call(net, {"i": inner, "o": outer}, (x,)), expected, **EXACT)
    with fa.applied(net, inner), fa.applied(net, outer):
        torch.testing.assert_close(net(x), expected, **EXACT)


class ReEntrant(nn.Module):
    """A model that itself calls functional_call on a part of it."""

    def __init__(self, adapter: Any) -> None:
        super().__init__()
        self.part = Net().double()
        self.adapter = adapter

    def forward(self, x: Tensor) -> Tensor:
        return self.part(fa.functional_call(self.part, self.adapter, (x,)))


def test_a_model_may_call_functional_call_on_a_part(x: Tensor) -> None:
    model = ReEntrant(None)
    inner, outer = lora(model.part, "up", seed=1), lora(model, "part.up", seed=2)
    model.adapter = inner
    on_part = fa.Adapter({"up": outer.params["part.up"]}, {"up": outer.buffers["part.up"]}, outer.config)
    before = Snapshot(model)
    out = fa.functional_call(model, outer, (x,))
    before.check()
    # inside, both act: the outer call's adapter is below the inner one's
    h = fa.functional_call(model.part, {"outer": on_part, "inner": inner}, (x,))
    expected = fa.functional_call(model.part, on_part, (h,))
    torch.testing.assert_close(out, expected, **EXACT)


def test_an_exception_in_a_nested_block_restores_both(net: Net, x: Tensor) -> None:
    a, before = lora(net, "up"), Snapshot(net)
    with pytest.raises(ZeroDivisionError), fa.applied(net, a), fa.applied(net, a):
        1 / 0
    before.check()
    with pytest.raises(KeyboardInterrupt), fa.applied(net, a):  # not an Exception
        raise KeyboardInterrupt
    before.check()


# -- other people's code ----------------------------------------------------------------------------------


class ByName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(input=x)


@pytest.mark.parametrize("w", [None, 0.5])
def test_the_input_may_come_by_name(w: float | None) -> None:
    model, x = ByName(), torch.randn(2, 4)
    a = lora(model, "lin")
    expected = model(x) + (w or 1.0) * F.linear(F.linear(x, a.params["lin"]["lora_A"]), a.params["lin"]["lora_B"]) * 4
    torch.testing.assert_close(fa.functional_call(model, a, (x,), weights=w), expected)


def test_forward_hooks_keep_firing(net: Net, x: Tensor) -> None:
    a, seen = lora(net, "up"), []
    net.up.register_forward_pre_hook(lambda module, args: seen.append("pre"))
    net.up.register_forward_hook(lambda module, args, out: seen.append(out))
    whole = fa.functional_call(net, a, (x,))
    assert seen[0] == "pre"
    # The hook sees the adapted layer's output.
    torch.testing.assert_close(seen[1] - net.up(x), delta(nn.ModuleDict({"up": net.up})["up"], _at_root(a), x), **EXACT)
    assert whole.shape == x.shape


def _at_root(a: fa.Adapter) -> fa.Adapter:
    return fa.Adapter({"": a.params["up"]}, {"": a.buffers["up"]}, a.config)


def test_accelerate_wrapped_forwards_work_and_are_restored(net: Net, x: Tensor) -> None:
    hooks = pytest.importorskip("accelerate.hooks")

    class Double(hooks.ModelHook):
        def post_forward(self, module: nn.Module, output: Any) -> Any:
            return output * 2

    a = lora(net, "up")
    model = nn.Sequential(net.up)
    on_model = fa.Adapter({"0": a.params["up"]}, {"0": a.buffers["up"]}, a.config)
    plain, change = model(x), delta(model, on_model, x)
    hooks.add_hook_to_module(net.up, Double())
    before = Snapshot(model)
    torch.testing.assert_close(fa.functional_call(model, on_model, (x,)), 2 * plain + change, **EXACT)
    before.check()
    assert torch.equal(model(x), 2 * plain)
    hooks.remove_hook_from_module(net.up)
    torch.testing.assert_close(fa.functional_call(model, on_model, (x,)), plain + change, **EXACT)


@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
@pytest.mark.parametrize("targets", [["linear1", "linear2"], ["self_attn"], ["linear1", "self_attn"]], ids="-".join)
def test_a_transformer_encoder_layer_is_never_bypassed(mode: str, targets: list[str]) -> None:
    """In eval mode without gradients, the layer reads its parts' weights in one fused kernel."""
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).train(mode == "train")
    x = torch.randn(2, 5, 8)
    a = lora(model, *targets)
    merged = fa.merge(model, a)
    with torch.set_grad_enabled(mode != "no_grad"), warnings.catch_warnings():
        warnings.simplefilter("error")
        out = fa.functional_call(model, a, (x,), strict=True)
        expected = torch.func.functional_call(model, merged, (x,))
        assert (out - model(x)).abs().max() > 1e-2
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


# -- bypasses ---------------------------------------------------------------------------------------------


class Reader(nn.Module):
    """A parent that reads its child's weight without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.lin = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.first(x), self.lin.weight)


def test_a_bypassed_layer_is_reported() -> None:
    model, x = Reader(), torch.randn(2, 4)
    a = lora(model, "first", "lin")
    with pytest.warns(fa.BypassWarning, match=r"'lin' never ran.*target_parameters.*'lin.weight'"):
        fa.functional_call(model, a, (x,))
    with pytest.raises(fa.AdapterError, match="'lin' never ran"):
        fa.functional_call(model, a, (x,), strict=True)
    with pytest.warns(fa.BypassWarning, match="'lin' never ran"), fa.applied(model, a):
        model(x)


def test_the_advice_of_the_warning_works() -> None:
    model, x = Reader(), torch.randn(2, 4)
    a = fa.init(model, fa.LoraConfig(r=2, target_modules=[], target_parameters=["lin.weight"], init_lora_weights=False))
    out = fa.functional_call(model, a, (x,), strict=True)
    expected = torch.func.functional_call(model, fa.merge(model, a), (x,))
    torch.testing.assert_close(out, expected)
    assert not torch.allclose(out, model(x))


class Router(nn.Module):
    def __init__(self, choose: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.choose = choose

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[self.choose](x)


def test_an_expert_without_a_token_is_no_bypass() -> None:
    model, x = Router(1), torch.randn(2, 4)
    a = lora(model, "experts.0", "experts.1", "experts.2")
    fa.functional_call(model, a, (x,), strict=True)
    only = lora(model, "experts.0", "experts.2")
    with pytest.warns(fa.BypassWarning, match="'experts.0', 'experts.2'"):
        fa.functional_call(model, only, (x,))


# -- leaves that are whole parameters ---------------------------------------------------------------------


def test_modules_to_save_replace_the_parameters(net: Net, x: Tensor) -> None:
    a = lora(net, "up", modules_to_save=["norm"])
    assert set(a.params["norm"]) == {"weight", "bias"}
    trained = a.replace(params={**a.params, "norm": {k: v + 1 for k, v in a.params["norm"].items()}})
    other = Net().double()
    other.load_state_dict({**net.state_dict(), "norm.weight": net.norm.weight + 1, "norm.bias": net.norm.bias + 1})
    before = Snapshot(net)
    out = fa.functional_call(net, trained, (x,))
    before.check()
    assert torch.equal(out, fa.functional_call(other, lora(net, "up"), (x,)))
    g = grad(lambda p: fa.functional_call(net, a.replace(params=p), (x,)).sum())(a.params)
    assert g["norm"]["weight"].abs().max() > 0
    assert sorted(fa.merge(net, trained)) == ["norm.bias", "norm.weight", "up.weight"]
    # the copy is the adapter's own
    assert a.params["norm"]["weight"].data_ptr() != net.norm.weight.data_ptr()


@pytest.mark.parametrize(("bias", "expected"), [("all", ["down", "norm", "up"]), ("lora_only", ["up"]), ("none", [])])
def test_biases_are_trained_as_configured(net: Net, x: Tensor, bias: str, expected: list[str]) -> None:
    a = lora(net, "up", bias=bias)
    assert sorted(path for path, leaves in a.params.items() if "bias" in leaves) == expected
    moved = a.replace(params={p: {k: v + (k == "bias") for k, v in leaves.items()} for p, leaves in a.params.items()})
    other = Net().double()
    other.load_state_dict({k: v + (k.endswith("bias") and k[:-5] in expected) for k, v in net.state_dict().items()})
    assert torch.equal(fa.functional_call(net, moved, (x,)), fa.functional_call(other, lora(net, "up"), (x,)))


def test_trained_token_rows_reach_a_tied_head() -> None:
    model, ids = Tied(), torch.tensor([[0, 3, 6]])
    config = fa.LoraConfig(r=2, target_modules=["mix"], trainable_token_indices={"embed": [3, 5]})
    a = fa.init(model, config)
    assert torch.equal(fa.functional_call(model, a, (ids,)), model(ids))
    rows = a.params["embed"]["trainable_tokens_delta"] + 1
    a = a.replace(params={**a.params, "embed": {"trainable_tokens_delta": rows}})
    other = Tied()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        other.embed.weight[[3, 5]] = rows
    before = Snapshot(model)
    assert torch.equal(fa.functional_call(model, a, (ids,)), other(ids))
    before.check()
    merged = torch.func.functional_call(model, fa.merge(model, a), (ids,))
    torch.testing.assert_close(merged, other(ids))
    fa.merge_(model, a)
    assert model.head.weight is model.embed.weight  # still tied
    torch.testing.assert_close(model(ids), other(ids))
    g = grad(lambda p: fa.functional_call(model, a.replace(params=p), (ids,))[..., 5].sum())(a.params)
    assert (g["embed"]["trainable_tokens_delta"].abs().amax(1) > 0).all()  # 3 is read, 5 only predicted


# -- adapters that do not fit -----------------------------------------------------------------------------


def test_an_adapter_for_another_model_is_an_error(net: Net, x: Tensor) -> None:
    wider = nn.ModuleDict({"up": nn.Linear(9, 6), "down": nn.Linear(6, 4)}).double()
    before = Snapshot(net)
    with pytest.raises(fa.SiteError, match=r"'up'.*lora_A.*\(2, 9\).*expected \(2, 4\)"):
        fa.functional_call(net, lora(wider, "up"), (x,))
    deeper = nn.ModuleDict({"up_proj": nn.Linear(4, 6)}).double()
    with pytest.raises(fa.SiteError, match=r"'up_proj'.*'up'"):
        fa.functional_call(net, lora(deeper, "up_proj"), (x,))
    on_norm = fa.Adapter({"norm": lora(net, "up").params["up"]}, lora(net, "up").buffers, lora(net, "up").config)
    with pytest.raises(fa.SiteError, match=r"'norm'.*LayerNorm"):
        fa.functional_call(net, on_norm, (x,))
    before.check()


def test_an_unknown_or_missing_leaf_is_an_error(net: Net, x: Tensor) -> None:
    a = lora(net, "up")
    odd = a.replace(params={"up": {**a.params["up"], "lora_C": torch.zeros(1)}})
    with pytest.raises(fa.SiteError, match=r"'up'.*'lora_C'.*'lora_A'"):
        fa.functional_call(net, odd, (x,))
    half = a.replace(params={"up": {"lora_A": a.params["up"]["lora_A"]}})
    with pytest.raises(fa.SiteError, match=r"'up'.*lora_B"):
        fa.functional_call(net, half, (x,))


def test_a_leaf_that_would_broadcast_is_an_error(net: Net, x: Tensor) -> None:
    a = ia3(net, "up")
    one = a.replace(params={"up": {"ia3_l": torch.ones(1, 1, dtype=torch.float64)}})
    with pytest.raises(fa.SiteError, match=r"'up'.*ia3_l.*\(1, 1\).*\(6, 1\)"):
        fa.functional_call(net, one, (x,))
    a = lora(net, "up", use_dora=True)
    leaves = {**a.params["up"], "lora_magnitude_vector": torch.ones(1, dtype=torch.float64)}
    with pytest.raises(fa.SiteError, match=r"'up'.*lora_magnitude_vector.*\(1,\).*\(6,\)"):
        fa.functional_call(net, a.replace(params={"up": leaves}), (x,))


def test_a_stack_without_vmap_is_an_error(net: Net, x: Tensor) -> None:
    stack = pytree.tree_map(lambda *t: torch.stack(t), lora(net, "up"), lora(net, "up", seed=1))
    with pytest.raises(fa.SiteError, match="'up'"):
        fa.functional_call(net, stack, (x,))


def test_a_compiled_model_is_an_error(net: Net, x: Tensor) -> None:
    with pytest.raises(fa.AdapterError, match=r"torch.compile\(lambda adapter"):
        fa.functional_call(torch.compile(net, backend="eager"), lora(net, "up"), (x,))  # pyright: ignore
    with (
        pytest.raises(fa.AdapterError, match=r"torch.compile"),
        fa.applied(torch.compile(net, backend="eager"), lora(net, "up")),
    ):  # pyright: ignore
        pass


# -- dtypes -----------------------------------------------------------------------------------------------


def test_autocast() -> None:
    model, x = Net(), torch.randn(3, 4)
    for a in (lora(model, "up", "down"), lora(model, "up", "down", use_dora=True), ia3(model, "up", "down")):
        expected = fa.functional_call(model, a, (x,))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = fa.functional_call(model, a, (x,))
            assert out.dtype == model(x).dtype == torch.bfloat16
        torch.testing.assert_close(out.float(), expected, rtol=0, atol=32 * 2**-8)


def test_a_bfloat16_base_with_a_float32_adapter() -> None:
    model, x = Net().to(torch.bfloat16), torch.randn(3, 4, dtype=torch.bfloat16)
    wide = Net()
    wide.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    for a in (lora(model, "up", "down"), lora(model, "up", "down", use_dora=True), ia3(model, "up", "down")):
        a = a.to(torch.float32)
        out = fa.functional_call(model, a, (x,))
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.float(), fa.functional_call(wide, a, (x.float(),)), rtol=0, atol=32 * 2**-8)
        leaves = a.map(lambda t: t.clone().requires_grad_())
        fa.functional_call(model, leaves, (x,)).float().sum().backward()
        assert {t.grad.dtype for p in leaves.params.values() for t in p.values()} == {torch.float32}  # pyright: ignore


# -- dropout ----------------------------------------------------------------------------------------------


def test_dropout_acts_exactly_where_the_site_trains(net: Net, x: Tensor) -> None:
    a = lora(net, "up", "down", lora_dropout=0.5)
    plain = lora(net, "up", "down")
    net.eval()
    assert torch.equal(fa.functional_call(net, a, (x,)), fa.functional_call(net, plain, (x,)))
    net.up.train()  # the model stays in eval mode; only this site trains
    first, second = fa.functional_call(net, a, (x,)), fa.functional_call(net, a, (x,))
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    first = fa.functional_call(net, a, (x,))
    torch.manual_seed(3)
    assert torch.equal(first, fa.functional_call(net, a, (x,)))
    net.train()
    net.up.eval()
    net.down.eval()
    assert torch.equal(fa.functional_call(net, a, (x,)), fa.functional_call(net, plain, (x,)))


@pytest.mark.parametrize("use_dora", [False, True])
def test_dropout_is_unbiased(use_dora: bool) -> None:
    model, x = nn.Sequential(nn.Linear(4, 3)).double(), torch.randn(4, dtype=torch.float64)
    a = fa.init(
        model, fa.LoraConfig(r=2, target_modules=["0"], lora_dropout=0.25, use_dora=use_dora, init_lora_weights=False)
    )
    mean = fa.functional_call(model, a, (x.expand(40000, 4),)).mean(0)
    torch.testing.assert_close(mean, fa.functional_call(model.eval(), a, (x,)), rtol=0, atol=0.05)


def test_dropout_respects_vmap_randomness(net: Net, x: Tensor) -> None:
    a = lora(net, "up", lora_dropout=0.5)
    stack = pytree.tree_map(lambda t: torch.stack([t, t, t]), a)

    def f(adapter: fa.Adapter) -> Tensor:
        return fa.functional_call(net, adapter, (x,))

    same = vmap(f, randomness="same")(stack)
    assert torch.equal(same[0], same[1])
    different = vmap(f, randomness="different")(stack)
    assert not torch.equal(different[0], different[1])
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(f)(stack)


# -- init -------------------------------------------------------------------------------------------------


def test_draws_depend_on_seed_and_path_alone(net: Net) -> None:
    both, one = lora(net, "up", "down"), lora(net, "down")
    assert torch.equal(both.params["down"]["lora_A"], one.params["down"]["lora_A"])
    assert torch.equal(lora(net, "down", "up").params["up"]["lora_A"], both.params["up"]["lora_A"])
    assert not torch.equal(lora(net, "up", seed=1).params["up"]["lora_A"], both.params["up"]["lora_A"])
    state = torch.get_rng_state()
    lora(net, "up")
    assert torch.equal(state, torch.get_rng_state())  # the global stream is not touched


def test_init_on_the_meta_device_makes_shapes() -> None:
    with torch.device("meta"):
        model = Net()
    for fields in ({}, {"use_dora": True}, {"init_lora_weights": "gaussian"}, {"modules_to_save": ["norm"]}):
        a = fa.init(model, fa.LoraConfig(r=2, target_modules=["up"], **fields))  # pyright: ignore
        assert {t.device.type for t in a.tensors()} == {"meta"}
        real = fa.init(Net(), fa.LoraConfig(r=2, target_modules=["up"], **fields))  # pyright: ignore
        assert pytree.tree_map(lambda t: t.shape, a.params) == pytree.tree_map(lambda t: t.shape, real.params)
    on_cpu = fa.init(model, fa.LoraConfig(r=2, target_modules=["up"]), device="cpu")
    assert torch.equal(
        on_cpu.params["up"]["lora_A"], fa.init(Net(), fa.LoraConfig(r=2, target_modules=["up"])).params["up"]["lora_A"]
    )


@pytest.mark.parametrize("how", ["pissa", "pissa_niter_4", "olora"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_inits_that_take_from_the_base_reproduce_its_output(net: Net, x: Tensor, how: str, use_dora: bool) -> None:
    config = fa.LoraConfig(r=2, lora_alpha=4, target_modules=["up", "down"], init_lora_weights=how, use_dora=use_dora)
    before = Snapshot(net)
    a, base = fa.init_with_base(net, config)
    before.check()
    assert sorted(base) == ["down.weight", "up.weight"]
    torch.testing.assert_close(fa.functional_call(net, a, (x,), parameters=base), net(x), rtol=0, atol=1e-10)
    assert not torch.allclose(fa.functional_call(net, a, (x,)), net(x))
    with pytest.raises(fa.AdapterError, match="init_with_base"):
        fa.init(net, config)


# -- any shape and rank -----------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(
    sizes=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    batch=st.lists(st.integers(0, 3), max_size=3),
    r=st.integers(1, 9),
    fields=st.sampled_from([{}, {"use_dora": True}, {"use_rslora": True}, {"lora_bias": True}]),
    bias=st.booleans(),
)
def test_any_shape_and_rank(
    sizes: tuple[int, int], batch: list[int], r: int, fields: dict[str, Any], bias: bool
) -> None:
    """Ranks above the layer's size, empty batches, single features: apply equals the formula."""
    model = nn.Sequential(nn.Linear(*sizes, bias=bias)).double()
    a = fa.init(model, fa.LoraConfig(r=r, target_modules=["0"], init_lora_weights=False, **fields))
    x = torch.randn(*batch, sizes[0], dtype=torch.float64)
    p, s = a.params["0"], a.buffers["0"]["scaling"]
    w: Any = model[0].weight.detach() + s * p["lora_B"] @ p["lora_A"]  # pyright: ignore
    if "use_dora" in fields:
        w = w * (p["lora_magnitude_vector"] / w.norm(dim=1))[:, None]
    expected = F.linear(x, w, model[0].bias)  # pyright: ignore
    if "lora_bias" in fields:
        expected = expected + s * p["lora_B_bias"]
    torch.testing.assert_close(fa.functional_call(model, a, (x,)), expected, rtol=1e-9, atol=1e-9)
    assert fa.sites(model, a.config)[0].shape == (sizes[1], sizes[0])
