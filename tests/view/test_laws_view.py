"""The laws of the in-place view, for every case: it computes what the functional call does, and leaves no trace."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import FIRST, REFERENCE, SLOW, Case, PlainParameter, tolerance, tree_close
from oracles import Snapshot
from peft_tools import tiny, tokens
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.func import functional_call, grad, vmap
from torch.utils import _pytree as pytree

import funcadapt as fa
import funcadapt.peft  # pickles find the generated classes in it
from funcadapt.view import merging
from funcadapt.view import state as switches
from funcadapt.view.inject import inject
from funcadapt.view.layer import AdapterLayer
from funcadapt.view.mixed import mixed_batch
from funcadapt.view.values import adapter_of
from funcadapt.view.walking import layers


def with_view(case: Case, seed: int = 0, name: str = "default") -> tuple[nn.Module, fa.Adapter, Tensor]:
    """A model with an adapter in it, the adapter, and an input."""
    model, x = case.model(), case.inputs()
    adapter = case.adapter(model, seed)
    return fa.materialize(model, adapter, name), adapter, x


def close(a: Any, b: Any, scale: float = 1.0) -> None:
    sizes = [t.abs().max().item() for t in pytree.tree_leaves(b) if t.numel()]
    tree_close(a, b, **tolerance(pytree.tree_leaves(b)[0].dtype, max(sizes) * scale, roundings=64))


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert list(a) == list(b)
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


@pytest.mark.parametrize("case", FIRST, ids=str)
def test_the_view_equals_the_functional_call(case: Case) -> None:
    """Its output, and the gradients of its parameters, are those of the pure function."""
    bare, x = case.model(), case.inputs()
    adapter = case.adapter(bare)
    expected = fa.functional_call(bare, adapter, (x,))
    model = fa.materialize(case.model(), adapter)
    out = model(x)
    close(out, expected)

    slope = case.slope(bare, x)
    (out * slope).sum().backward()
    grads = grad(lambda p: (fa.functional_call(bare, adapter.replace(params=p), (x,)) * slope).sum())(adapter.params)
    # gradients are an adapter like any other, whose view has them under the names of the parameters
    truth = fa.materialize(case.model(), adapter.replace(params=grads))
    acts = {n: p for n, p in model.named_parameters() if n.rpartition(".")[2] not in case.variant.idle}
    found = {name: p.grad for name, p in acts.items() if p.requires_grad}
    assert found
    assert all(g is not None and g.abs().max() > 0 for g in found.values())
    close(found, {name: truth.get_parameter(name).detach() for name in found})
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("case", FIRST, ids=str)
def test_merging_equals_applying_and_is_undone_bit_for_bit(case: Case) -> None:
    model, _, x = with_view(case)
    before, modules = bits(model), [*model.modules()]
    expected = model(x)
    if case.no_dense:
        with pytest.raises(fa.SiteError, match="0"):
            merging.merge(model)
    else:
        merging.merge(model)
        assert all(layer.merged for _, layer in layers(model))
        assert any(not torch.equal(t, before[name]) for name, t in model.state_dict().items())
        close(model(x), expected)
        with switches.disabled(model):
            close(model(x), case.model()(x))
        close(model(x), expected)
        merging.unmerge(model)
    assert not any(layer.merged for _, layer in layers(model))
    assert modules == [*model.modules()]
    same_bits(bits(model), before)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("case", FIRST, ids=str)
def test_dematerialising_gives_back_the_adapter_and_the_model(case: Case) -> None:
    model, x = case.model(), case.inputs()
    first = next(model.parameters())
    first.requires_grad_(False)
    adapter, before, printed, expected = case.adapter(model), Snapshot(model), repr(model), model(x)
    fa.materialize(model, adapter)
    assert printed != repr(model)
    model(x)
    if not case.no_dense:
        merging.merge(model)
    (name, found), *rest = fa.dematerialize(model).items()
    assert (name, rest) == ("default", [])
    before.check()
    assert printed == repr(model)
    assert torch.equal(model(x), expected)

    assert found.params.keys() == adapter.params.keys()
    for path in adapter.params:
        same_bits(found.params[path], adapter.params[path])
    leaves = {path: adapter.leaves(path) for path in adapter.params}
    assert found.config == case.method.describe(adapter.config, leaves)
    close(fa.functional_call(model, found, (x,)), fa.functional_call(model, adapter, (x,)))


@pytest.mark.parametrize("case", FIRST, ids=str)
def test_two_active_adapters_nest_as_in_the_functional_call(case: Case) -> None:
    model, x = case.model(), case.inputs()
    a, b = case.adapter(model, 0), case.adapter(model, 1)
    alone, both = fa.functional_call(model, b, (x,)), fa.functional_call(model, {"a": a, "b": b}, (x,))
    other = fa.functional_call(model, {"b": b, "a": a}, (x,))
    fa.materialize(model, a, "a")
    fa.materialize(model, b, "b")
    close(model(x), alone)
    for names, expected in ((["a", "b"], both), (["b", "a"], other), ("b", alone)):
        switches.set_adapter(model, names)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        active = {layer.parameters_of(name)[0] for _, layer in layers(model) for name in names}
        assert {model.get_parameter(name) for name in trained} >= active
        close(model(x), expected)
    switches.set_adapter(model, ["a", "b"])
    if not case.no_dense:
        merging.merge(model)
        close(model(x), both)
        merging.unmerge(model)
    assert switches.delete_adapter(model, "a") == ["b"]
    close(model(x), alone)
    assert [*fa.dematerialize(model)] == ["b"]


@pytest.mark.parametrize("case", SLOW, ids=str)
def test_disabling(case: Case) -> None:
    model, _, x = with_view(case)
    expected, bare, flags = model(x), case.model()(x), [p.requires_grad for p in model.parameters()]
    with switches.disabled(model):
        assert torch.equal(model(x), bare)
    assert torch.equal(model(x), expected)
    assert [p.requires_grad for p in model.parameters()] == flags
    with pytest.raises(ArithmeticError), switches.disabled(model):
        raise ArithmeticError
    assert torch.equal(model(x), expected)
    switches.enable_adapters(model, False)
    assert torch.equal(model(x), bare)
    switches.enable_adapters(model, True)
    assert torch.equal(model(x), expected)


def _saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@pytest.mark.parametrize("again", [copy.deepcopy, _saved, lambda m: pickle.loads(pickle.dumps(m))],
                         ids=["deepcopy", "torch_save", "pickle"])  # fmt: skip
@pytest.mark.parametrize("case", SLOW, ids=str)
def test_copies(case: Case, again: Callable[[nn.Module], nn.Module]) -> None:
    """They do the same, share nothing, and can be taken apart as the original."""
    model, adapter, x = with_view(case)
    twin = again(model)
    assert torch.equal(twin(x), model(x))
    assert repr(twin) == repr(model)
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in model.parameters()}
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    close(model(x), fa.functional_call(case.model(), adapter, (x,)))
    fa.dematerialize(twin)
    assert not any(isinstance(module, AdapterLayer) for module in twin.modules())
    assert any(isinstance(module, AdapterLayer) for module in model.modules())


# the others differ in what their functions compute, which tests/laws compile
COMPILED = ("linear", "hf_conv1d", "embedding", "conv2d", "mha", "parameter", "experts_linear", "experts_bmm")


@pytest.mark.parametrize("case", [case for case in REFERENCE if case.kind.name in COMPILED], ids=str)
def test_compile_sees_one_frame(case: Case) -> None:
    """With other values of the parameters, too, and with its gradients."""
    torch._dynamo.reset()
    counter = CompileCounter()
    model, _, x = with_view(case)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for factor in (1, 2, 3):
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.mul_(factor)
        expected, out = model(x), compiled(x)
        close(out, expected)
        truth = torch.autograd.grad(expected.pow(2).sum(), [*parameters.values()])
        close(torch.autograd.grad(out.pow(2).sum(), [*parameters.values()]), truth)
    assert counter.frame_count == 1


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # vmap of grouped_mm
@pytest.mark.parametrize("case", FIRST, ids=str)
def test_its_parameters_are_functional(case: Case) -> None:
    """`torch.func.functional_call`, `grad` and `vmap` over the parameters of the view."""
    model, _, x = with_view(case)
    others = [{n: p.detach() for n, p in with_view(case, seed)[0].named_parameters()} for seed in (0, 1)]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    own = [{name: t for name, t in other.items() if name in trained} for other in others]
    # what follows from the config is the first adapter's
    expected = []
    for parameters in own:
        twin = copy.deepcopy(model)
        twin.load_state_dict(parameters, strict=False)
        out = twin(x)
        named = {name: p for name, p in twin.named_parameters() if p.requires_grad}
        expected.append(
            (
                out.detach(),
                dict(
                    zip(
                        named,
                        torch.autograd.grad(out.pow(2).sum(), [*named.values()], materialize_grads=True),
                        strict=True,
                    )
                ),
            )
        )

    def loss(parameters: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        out = functional_call(model, parameters, (x,))
        return out.pow(2).sum(), out

    stack = pytree.tree_map(lambda *t: torch.stack(t), *own)
    grads, outs = vmap(grad(loss, has_aux=True))(stack)
    for i, (out, gradients) in enumerate(expected):
        close(outs[i], out)
        close({name: grads[name][i] for name in gradients}, gradients)


@pytest.mark.parametrize("case", SLOW, ids=str)
def test_failures_leave_no_trace(case: Case) -> None:
    """Where there is no adapter yet, and where there is one."""
    model, x = case.model(), case.inputs()
    adapter = case.adapter(model)
    (path, leaves), *_ = adapter.params.items()
    wrong_shape = {leaf: torch.randn(*(n + 1 for n in t.shape), dtype=t.dtype) for leaf, t in leaves.items()}
    bad = {
        "shape": adapter.replace(params={**adapter.params, path: wrong_shape}),
        "path": adapter.replace(params={**adapter.params, "0.no_such": leaves}),
        "leaf": adapter.replace(params={**adapter.params, path: {"no_such": next(iter(leaves.values()))}}),
    }
    for taken in (False, True):
        if taken:
            fa.materialize(model, adapter)
        before, printed, expected = Snapshot(model), repr(model), model(x)
        for wrong in bad.values():
            with pytest.raises((fa.AdapterError, RuntimeError)):
                fa.materialize(model, wrong, "other")
            before.check()
        for name in ("", "with.dot", *(["default"] if taken else ())):
            with pytest.raises(ValueError if name == "default" else KeyError):
                fa.materialize(model, adapter, name)
            before.check()
        with pytest.raises(TypeError):
            fa.materialize(model, {"0": leaves}, "other")  # pyright: ignore[reportArgumentType]
        before.check()
        assert repr(model) == printed
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("case", [c for c in SLOW if not c.no_dense], ids=str)
def test_a_safe_merge_refuses_what_is_not_finite(case: Case) -> None:
    model, _, x = with_view(case)
    with torch.no_grad():
        for _, layer in layers(model):
            layer.parameters_of("default")[0].flatten()[0] = torch.nan
    before, expected = Snapshot(model), model(x)
    with pytest.raises(ValueError, match=r"NaNs detected in the merged weights\. The adapter default seems to be"):
        merging.merge(model, safe_merge=True)
    before.check()
    torch.testing.assert_close(model(x), expected, equal_nan=True)


# in the others the place of a row in the batch decides which expert it uses
ROWS_ALONE = [
    case for case in FIRST if case.kind.name not in ("experts_bmm", "experts_grouped") and not case.method.couples
]


@pytest.mark.parametrize("case", ROWS_ALONE, ids=str)
def test_mixed_batches_equal_row_by_row(case: Case) -> None:
    model, x = case.model().eval(), case.inputs()
    adapters = {name: case.adapter(model, seed) for seed, name in enumerate(("a", "b"))}
    x = torch.cat([x, x.flip(0)])
    names = [("a", "__base__", "b")[i % 3] for i in range(len(x))]
    expected = []
    for row, name in zip(x, names, strict=True):
        one = row.unsqueeze(0)
        expected.append(model(one) if name == "__base__" else fa.functional_call(model, adapters[name], (one,)))
    for name, adapter in adapters.items():
        fa.materialize(model, adapter, name)
    before = model(x)
    with mixed_batch(model, names):
        close(model(x), torch.cat(expected))
    assert torch.equal(model(x), before)


# -- what adapters hold beside their layers ---------------------------------------------------------------

LORA: dict[str, Any] = {"r": 2, "init_lora_weights": False}
WHOLE: dict[str, tuple[str, dict[str, Any]]] = {
    "saved": ("llama", {"modules_to_save": ["embed_tokens", "layers.1.mlp"]}),
    "saved_tied": ("llama_tied", {"modules_to_save": ["lm_head"]}),
    "rows": ("llama", {"trainable_token_indices": {"embed_tokens": [3, 1], "lm_head": [0, 5]}}),
    "rows_tied": ("llama_tied", {"trainable_token_indices": [7, 3, 12, 30]}),
    "rows_saved": ("llama", {"trainable_token_indices": [3], "modules_to_save": ["lm_head"]}),
    "bias": ("opt", {"bias": "all"}),
    "bias_saved": ("opt", {"bias": "lora_only", "modules_to_save": ["layers.1.fc1", "final_layer_norm"]}),
    "tied": ("llama_tied", {"target_modules": ["embed_tokens"]}),
    "tied_head": ("llama_tied", {"target_modules": ["lm_head", "q_proj"]}),
    "tied_both": ("llama_tied", {"target_modules": ["embed_tokens", "lm_head"]}),
    "t5": ("t5", {"target_modules": ["lm_head", "wo"]}),
}


@pytest.mark.parametrize("name", WHOLE)
def test_whole_models(name: str) -> None:
    """Modules that are saved whole, trained rows and biases, tied weights: the same laws."""
    kind, fields = WHOLE[name]
    model, inputs = tiny(kind).double(), tokens(kind)
    next(model.parameters()).requires_grad_(False)
    before, printed, bare = Snapshot(model), repr(model), model(**inputs).logits
    inject(model, fa.LoraConfig(**LORA, **fields))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    adapter = adapter_of(model, "default").map(torch.clone)
    expected = model(**inputs).logits
    with torch.no_grad():
        assert (expected - bare).abs().max() > 0.05
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    close(fa.functional_call(tiny(kind).double(), adapter, (), inputs).logits, expected)

    live = bits(model)
    merging.merge(model)
    merged = bits(model)
    close(model(**inputs).logits, expected)
    with switches.disabled(model):
        if "bias" not in fields:  # they are the model's own
            close(model(**inputs).logits, bare)
    same_bits(bits(model), merged)
    merging.unmerge(model)
    same_bits(bits(model), live)
    assert trained == {n for n, p in model.named_parameters() if p.requires_grad}
    assert torch.equal(model(**inputs).logits, expected)

    merging.merge(model)
    (found,) = fa.dematerialize(model).values()
    before.check()
    assert repr(model) == printed
    assert torch.equal(model(**inputs).logits, bare)
    assert found.config == adapter.config
    for path, leaves in adapter.params.items():
        same_bits(dict(found.params[path]), dict(leaves))
    close(fa.materialize(model, found)(**inputs).logits, expected)
    twin = copy.deepcopy(model)
    close(merging.unload(model, merge_first=True)(**inputs).logits, expected)
    assert not [*layers(model)]
    if "modules_to_save" not in fields and "bias" not in fields:  # those stay, as in PEFT
        merging.merge(twin)
        close(merging.unload(twin)(**inputs).logits, bare)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj", "lm_head"]}),
        ({"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}),
        ({"target_modules": ["embed_tokens"]}, {"trainable_token_indices": [1]}),
        ({"trainable_token_indices": [1]}, {"target_modules": ["q_proj", "embed_tokens"]}),
        ({"modules_to_save": ["norm", "lm_head"]}, {"modules_to_save": ["norm"], "target_modules": ["lm_head"]}),
    ],
)
def test_an_injection_that_fails_halfway_leaves_no_trace(first: dict[str, Any], second: dict[str, Any]) -> None:
    model, inputs = tiny("llama"), tokens("llama")
    inject(model, fa.LoraConfig(**LORA, **first), "first")
    before, printed, expected = Snapshot(model), repr(model), model(**inputs).logits
    with pytest.raises((ValueError, TypeError), match=r"lm_head|embed_tokens"):
        inject(model, fa.LoraConfig(**LORA, **second), "second")
    before.check()
    assert repr(model) == printed
    assert torch.equal(model(**inputs).logits, expected)


# -- models that do not call what they have ---------------------------------------------------------------


def test_encoder_layers_have_no_fast_path_around_their_adapters() -> None:
    """In eval mode torch's own encoder reads the weights of its children, and calls none of them."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)).eval().requires_grad_(False)
    x = torch.randn(2, 5, 8)
    config = fa.LoraConfig(**LORA, target_modules=["linear1", "linear2", "self_attn"])
    adapter, before = fa.init(model, config), Snapshot(model)
    expected = fa.functional_call(model, adapter, (x,))
    assert not torch.allclose(expected, model(x), atol=0.1)
    fa.materialize(model, adapter)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)
        merging.merge(model)
        torch.testing.assert_close(model(x), expected)
    fa.dematerialize(model)
    before.check()


def test_a_module_in_two_places_is_wrapped_once() -> None:
    shared = nn.Linear(4, 4)
    model, x = nn.Sequential(shared, nn.Tanh(), shared), torch.randn(3, 4)
    adapter, before = fa.init(model, fa.LoraConfig(**LORA, target_modules=["0"])), Snapshot(model)
    expected = fa.functional_call(model, adapter, (x,))
    fa.materialize(model, adapter)
    assert model[0] is model[2]
    torch.testing.assert_close(model(x), expected)
    merging.merge(model)
    torch.testing.assert_close(model(x), expected)
    fa.dematerialize(model)
    before.check()


def test_the_model_itself_cannot_be_wrapped() -> None:
    model = PlainParameter()
    adapter, before = fa.init(model, fa.LoraConfig(r=2, target_parameters=["w"])), Snapshot(model)
    with pytest.raises(fa.AdapterError, match="top-level module cannot be wrapped in place"):
        fa.materialize(model, adapter)
    before.check()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks(reentrant: bool) -> None:
    inner, x = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)), torch.randn(3, 4, requires_grad=True)
    adapter = fa.init(inner, fa.LoraConfig(**LORA, target_modules=["0", "2"], lora_dropout=0.5))
    fa.materialize(inner, adapter)
    found = []
    for on in (False, True):
        torch.manual_seed(0)
        out = torch.utils.checkpoint.checkpoint(inner, x, use_reentrant=reentrant) if on else inner(x)  # pyright: ignore
        inner.zero_grad()
        out.pow(2).sum().backward()
        found.append({name: p.grad for name, p in inner.named_parameters() if p.requires_grad})
    assert all(g.abs().max() > 0 for g in found[0].values())
    tree_close(found[1], found[0], rtol=0, atol=0)


# -- merged weights that somebody touched -----------------------------------------------------------------

TOUCHES: dict[str, tuple[Callable[[Any], Any], float]] = {
    "deepcopy": (copy.deepcopy, 1e-12),
    "saved": (_saved, 1e-12),
    "cast": (lambda model: model.float().double(), 1e-5),
}


@pytest.mark.parametrize("touch", TOUCHES)
@pytest.mark.parametrize("kind", ["llama", "llama_tied"])
def test_merged_models_can_be_copied_and_cast(kind: str, touch: str) -> None:
    act, rough = TOUCHES[touch]
    model, inputs = tiny(kind).double(), tokens(kind)
    bare = model(**inputs).logits
    inject(model, fa.LoraConfig(**LORA, target_modules=["q_proj", "embed_tokens"]))
    expected = model(**inputs).logits
    merging.merge(model)
    model = act(model)
    allowed = {"rtol": 0, "atol": rough * expected.abs().max().item()}
    torch.testing.assert_close(model(**inputs).logits, expected, **allowed)
    merging.unmerge(model)
    torch.testing.assert_close(model(**inputs).logits, expected, **allowed)
    with switches.disabled(model):
        torch.testing.assert_close(model(**inputs).logits, bare, **allowed)


def test_a_merged_weight_that_was_trained_keeps_its_training() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4)).double(), torch.randn(3, 4, dtype=torch.float64)
    bare = model(x)
    fa.materialize(model, fa.init(model, fa.LoraConfig(**LORA, target_modules=["0"])))
    delta = model(x) - bare
    merging.merge(model)
    with torch.no_grad():
        model.get_parameter("0.base_layer.weight").add_(1)
    step = x.sum(1, keepdim=True)
    torch.testing.assert_close(model(x), bare + delta + step)
    merging.unmerge(model)
    with switches.disabled(model):
        torch.testing.assert_close(model(x), bare + step)
    torch.testing.assert_close(model(x), bare + delta + step)


def test_values_are_live() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    fa.materialize(model, fa.init(model, fa.LoraConfig(r=2, target_modules=["0"])))
    adapter_of(model, "default").params["0"]["lora_B"].data.fill_(7)
    assert model.get_parameter("0.lora_B.default.weight").eq(7).all()


def test_several_parameters_of_a_module_are_saved_as_they_nest(tmp_path: Path) -> None:
    """PEFT's keys say by the depth which parameter is which: innermost is the one that was registered first."""
    model = nn.Sequential(nn.ParameterDict({"a": torch.randn(4, 4), "b": torch.randn(4, 4)}))
    config = fa.LoraConfig(r=2, target_modules=[], target_parameters=["0.a", "0.b"], init_lora_weights=False)
    adapter = fa.init(model, config)
    fa.materialize(model, adapter)
    found = fa.dematerialize(model)["default"]
    assert [*found.params] == [*adapter.params]
    for folder, value in (("a", adapter), ("b", found)):
        fa.save(value, tmp_path / folder)
    same_bits(*(load_file(tmp_path / folder / "adapter_model.safetensors") for folder in "ab"))
