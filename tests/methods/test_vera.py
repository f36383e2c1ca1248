"""VeRA and the other methods whose layers share projections: what the laws cannot say."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from oracles import dense_weights
from peft_tools import peft_load, peft_save, raw, tiny, tokens, wrap
from safetensors.torch import save_file
from torch import Tensor, nn

import funcadapt as fa
import funcadapt.peft as shim
from funcadapt.sharing import SHARED
from funcadapt.view.layer import AdapterLayer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

# name -> config class, fields
ALL: dict[str, tuple[str, dict[str, Any]]] = {
    "vera": ("VeraConfig", {"r": 3}),
    "pvera": ("PveraConfig", {"r": 3}),
    "vblora": ("VBLoRAConfig", {"r": 3, "num_vectors": 5, "vector_length": 2, "init_vector_bank_bound": 1.0}),
    "randlora": ("RandLoraConfig", {"r": 3, "randlora_alpha": 6}),
}
FROZEN = [name for name in ALL if name != "vblora"]


def config(name: str, package: Any = fa, **fields: Any) -> Any:
    cls, own = ALL[name]
    return getattr(package, cls)(**{**own, **fields})


class Net(nn.Module):
    """Layers of many kinds and widths."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(12, 6), nn.Linear(6, 10), nn.Linear(10, 4)
        self.conv, self.split = nn.Conv1d(4, 8, 3, padding=1), nn.Conv1d(8, 4, 3, groups=2)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.down(torch.tanh(self.up(self.embed(ids))))
        return self.split(torch.tanh(self.conv(h.transpose(1, 2))))


IDS = torch.tensor([[0, 3, 9, 1], [11, 5, 0, 2]])
LAYERS = ["embed", "up", "down", "conv", "split"]


def moved(adapter: fa.Adapter, seed: int = 1) -> fa.Adapter:
    """An adapter whose trained leaves are random."""
    generator = torch.Generator().manual_seed(seed)
    params = {
        path: {name: t + 0.5 * torch.randn(t.shape, generator=generator).to(t.dtype) for name, t in leaves.items()}
        for path, leaves in adapter.params.items()
    }
    return adapter.replace(params=params)


@pytest.mark.parametrize("name", ALL)
def test_layers_of_different_widths_use_their_part(name: str) -> None:
    model = Net().double().eval()
    adapter = moved(fa.init(model, config(name, target_modules=LAYERS)))
    out = fa.functional_call(model, adapter, IDS)
    assert (out - model(IDS)).abs().max() > 0.01
    weights = dense_weights(model, adapter, name)
    torch.testing.assert_close(torch.func.functional_call(model, weights, (IDS,)), out)
    torch.testing.assert_close(fa.merge(model, adapter), weights)
    if name != "vblora":  # the widest input is the convolution's, the widest output the linear layer's
        a, b = adapter.buffers[SHARED].values()
        assert (a.shape[-1], b.shape[0]) == ((12, 10) if name != "randlora" else (10, 12))


@pytest.mark.parametrize("fields", [{}, {"projection_prng_key": 5}, {"sparse": True}, {"very_sparse": True}], ids=str)
@pytest.mark.parametrize("name", FROZEN)
def test_the_projections_are_peft_s_bit_for_bit(name: str, fields: dict[str, Any]) -> None:
    if "sparse" in str(fields) and name != "randlora":
        return
    given = {**fields, "r": 5, "target_modules": ["q_proj", "k_proj", "down_proj", "up_proj"]}
    theirs = wrap(tiny("llama"), config(name, peft, **given)).base_model
    ours = fa.init(tiny("llama"), config(name, **given), seed=3).buffers[SHARED]
    for leaf, value in ours.items():
        assert torch.equal(value, getattr(theirs, leaf)["default"])


def _views(model: nn.Module) -> list[AdapterLayer]:
    return [module for module in model.modules() if isinstance(module, AdapterLayer)]


@pytest.mark.parametrize("name", ALL)
def test_injection_into_a_plain_model(name: str, tmp_path: Path) -> None:
    """PEFT refuses all but RandLoRA, as the model has no place for what layers share."""
    model = Net().eval()
    given = config(name, target_modules=["up", "down"])
    if name != "randlora":
        with pytest.raises(ValueError, match="inject_adapter_in_model"):
            peft.inject_adapter_in_model(config(name, peft, target_modules=["up", "down"]), model)
    bare = model(IDS)
    own = config(name, shim, target_modules=["up", "down"])
    model = shim.inject_adapter_in_model(own, model)
    if name != "vblora":
        assert torch.equal(model(IDS), bare)
    first, second = _views(model)
    shared = {"vblora": ["vblora_vector_bank"]}.get(name, [f"{name}_A", f"{name}_B"])
    assert all(getattr(first, part) is getattr(second, part) for part in shared)

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)
    before = {n: p.clone() for n, p in model.named_parameters()}
    for _ in range(2):
        optimizer.zero_grad()
        model(IDS).square().sum().backward()
        optimizer.step()
    trained = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert trained == {n for n, p in model.named_parameters() if p.requires_grad}
    out = model(IDS)
    assert (out - bare).abs().max() > 1e-4
    twin = copy.deepcopy(model)
    assert torch.equal(twin(IDS), out)
    assert getattr(_views(twin)[0], shared[0]) is getattr(_views(twin)[1], shared[0])

    state = shim.get_peft_model_state_dict(model)
    assert set(shared) <= state.keys()
    other = shim.inject_adapter_in_model(own, Net().eval())
    other.load_state_dict(
        {k: v for k, v in model.state_dict().items() if "base_layer" in k or ".up" not in k}, strict=False
    )
    shim.set_peft_model_state_dict(other, state)
    assert torch.equal(shim.get_peft_model_state_dict(other)[shared[0]], state[shared[0]])
    adapters = fa.dematerialize(model)
    fa.save(adapters["default"], tmp_path)
    again = fa.load(tmp_path)
    torch.testing.assert_close(fa.functional_call(model, again, IDS), out)
    assert given.r == again.config.r  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("name", FROZEN)
def test_what_is_not_saved_is_drawn_again(name: str, tmp_path: Path) -> None:
    model = Net().eval()
    given = config(name, target_modules=LAYERS, save_projection=False, projection_prng_key=11)
    adapter = moved(fa.init(model, given))
    fa.save(adapter, tmp_path)
    assert not any("_A" in key or "_B" in key for key in raw(tmp_path))
    with pytest.raises(fa.AdapterFileError, match="model=model"):
        fa.load(tmp_path)
    again = fa.load(tmp_path, model=model)
    for leaf, value in adapter.buffers[SHARED].items():
        assert torch.equal(again.buffers[SHARED][leaf], value)
    assert torch.equal(fa.functional_call(model, again, IDS), fa.functional_call(model, adapter, IDS))

    # a file that holds them all the same: as in PEFT they are drawn again
    tensors = raw(tmp_path)
    others = {f"base_model.{leaf}": value + 1 for leaf, value in adapter.buffers[SHARED].items()}
    save_file(tensors | others, tmp_path / "adapter_model.safetensors")
    with pytest.warns(UserWarning, match="save_projection=True"):
        again = fa.load(tmp_path, model=model)
    assert torch.equal(fa.functional_call(model, again, IDS), fa.functional_call(model, adapter, IDS))


@pytest.mark.parametrize("name", ALL)
def test_a_file_without_what_is_shared(name: str, tmp_path: Path) -> None:
    model = Net().eval()
    fa.save(moved(fa.init(model, config(name, target_modules=LAYERS))), tmp_path)
    shared = [f"{name}_A", f"{name}_B"] if name != "vblora" else ["vblora_vector_bank"]
    tensors = {k: v for k, v in raw(tmp_path).items() if k.rpartition(".")[2] not in shared}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    for given in (None, model):
        with pytest.raises(fa.AdapterFileError, match=f"lacks '{shared[0]}', which all sites share"):
            fa.load(tmp_path, model=given)
    if name in FROZEN:
        wrapped = shim.get_peft_model(model, config(name, shim, target_modules=LAYERS))
        with pytest.raises(ValueError, match=f"lacks '{shared[0]}'"):
            shim.set_peft_model_state_dict(wrapped, tensors)


@pytest.mark.parametrize("name", ALL)
def test_shared_leaves_of_a_wrong_size(name: str) -> None:
    model = Net().eval()
    adapter = moved(fa.init(model, config(name, target_modules=LAYERS)))
    tree = "params" if name == "vblora" else "buffers"
    for leaf, value in getattr(adapter, tree)[SHARED].items():
        for axis in range(value.ndim):
            if value.shape[axis] == 1:
                continue
            wrong = value.narrow(axis, 0, 1)
            other = {**getattr(adapter, tree), SHARED: {**getattr(adapter, tree)[SHARED], leaf: wrong}}
            with pytest.raises((fa.AdapterError, RuntimeError)):
                fa.functional_call(model, adapter.replace(**{tree: other}), IDS)


@pytest.mark.parametrize("name", ALL)
def test_stacks_and_banks(name: str, tmp_path: Path) -> None:
    model = Net().eval().requires_grad_(False)
    given = config(name, target_modules=["up", "down"])
    adapters = {str(i): moved(fa.init(model, given, seed=i), i) for i in range(3)}
    if name != "vblora":
        stack = fa.stack(adapters.values())
        assert all(leaf.stride(0) == 0 for leaf in stack.buffers[SHARED].values())  # they share what is frozen
    bank = fa.AdapterBank(model, given, capacity=4)
    for i, adapter in adapters.items():
        if i == "2":
            fa.save(adapter, tmp_path)
            bank.add(i, fa.load(tmp_path))
        else:
            bank.add(i, adapter)
    expected = [fa.functional_call(model, adapters[i], row) for i, row in zip("20", IDS.split(1), strict=True)]
    with bank.use(["2", "0"]) as index:
        out = fa.functional_call(model, fa.routed(bank.stack, index), IDS)
    torch.testing.assert_close(out, torch.cat(expected))


@pytest.mark.parametrize("name", ALL)
def test_biases_of_the_adapted_layers(name: str, tmp_path: Path) -> None:
    given = {"target_modules": ["fc1"], "bias": f"{name}_only"}
    wrapped: Any = wrap(tiny("opt"), config(name, peft, **given))
    adapter = fa.load(peft_save(wrapped, tmp_path), model=tiny("opt"))
    with torch.no_grad():
        theirs = wrapped(**tokens("opt")).logits
        ours = fa.functional_call(tiny("opt"), adapter, (), tokens("opt")).logits
    torch.testing.assert_close(ours, theirs)
    assert all("bias" in leaves for path, leaves in adapter.params.items() if path)
    assert sum("bias" in leaves for leaves in adapter.params.values()) == 2
    fa.save(adapter, tmp_path / "again")
    with torch.no_grad():
        torch.testing.assert_close(peft_load(tiny("opt"), tmp_path / "again")(**tokens("opt")).logits, theirs)


@pytest.mark.parametrize("name", ALL)
def test_errors(name: str) -> None:
    with pytest.raises(ValueError, match="`r` should be a positive integer"):
        config(name, r=0)
    with pytest.raises(ValueError, match="`layers_to_transform` must also be specified"):
        config(name, layers_pattern="h")
    with pytest.raises(ValueError, match=f"`bias` must be 'none', 'all' or '{name}_only'"):
        config(name, bias="lora_only")
    with pytest.raises(ValueError, match=rf"`{name}_dropout` must be in \[0, 1\)"):
        config(name, **{f"{name}_dropout": 1.0})


def test_default_targets() -> None:
    assert fa.VeraConfig().for_model("phi").target_modules == ("q_proj", "v_proj")
    assert fa.PveraConfig().for_model("dinov2").target_modules == ("query", "value")
    assert fa.VBLoRAConfig().for_model("roberta").target_modules == ("query", "value")
    assert fa.RandLoraConfig().for_model("phi").target_modules == ("q_proj", "v_proj", "fc1", "fc2")


@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("name", ALL)
def test_state_dicts_and_loading(name: str, save: bool, tmp_path: Path) -> None:
    """The keys of PEFT's model, what all layers share once more for the tuner; and models that are loaded."""
    fields = {"save_only_topk_weights" if name == "vblora" else "save_projection": save, "target_modules": ["up_proj"]}
    x = tokens("llama")
    theirs: Any = wrap(tiny("llama"), config(name, peft, **fields))
    ours: Any = shim.get_peft_model(tiny("llama"), config(name, shim, **fields))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    peft_save(theirs, tmp_path)
    with torch.no_grad():
        expected = theirs(**x).logits
        for low in (True, False):
            ours = shim.PeftModel.from_pretrained(tiny("llama"), str(tmp_path), low_cpu_mem_usage=low).eval()
            torch.testing.assert_close(ours(**x).logits, expected)
            result = ours.load_adapter(str(tmp_path), "second", low_cpu_mem_usage=low)
            assert not [key for key in result.missing_keys if name in key]
            assert not result.unexpected_keys
            ours.delete_adapter("default")
            ours.set_adapter("second")
            torch.testing.assert_close(ours(**x).logits, expected)
            torch.testing.assert_close(ours.merge_and_unload()(**x).logits, expected)
