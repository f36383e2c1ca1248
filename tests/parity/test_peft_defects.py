"""Where PEFT 0.21.2 is wrong: its answer, ours, and the dense truth. A fixed PEFT fails here and the test can go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from peft_tools import Experts, Net, attention_truth, configs, layer_model, peft_save, peft_sites, wrap
from torch import nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

import funcadapt as fa

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")


def test_b1_attention_adapts_the_out_projection_twice(tmp_path: Path) -> None:
    model, x, target = layer_model("mha")
    model, x = model.double().eval(), x.double()
    wrapped = wrap(layer_model("mha")[0].double(), configs("lora", r=4, **target)[0]).double()
    adapter = fa.load(peft_save(wrapped, tmp_path), model=model)
    theirs, ours = wrapped(x), fa.functional_call(model, adapter, (x,))

    torch.testing.assert_close(ours, attention_truth(model, adapter, x))
    out = adapter.leaves("attn.out_proj")
    doubled = adapter.replace(
        params={**adapter.params, "attn.out_proj": {"lora_A": out["lora_A"], "lora_B": 2 * out["lora_B"]}}
    )
    torch.testing.assert_close(theirs, attention_truth(model, doubled, x))
    assert not torch.allclose(theirs, ours, atol=1e-2)

    # PEFT's gradient is of neither: half of what its forward pass says
    theirs.sum().backward()
    theirs_b = wrapped.base_model.model.attn.base_layer.out_proj.lora_B["default"].weight.grad
    params = {p: {n: t.clone().requires_grad_() for n, t in leaves.items()} for p, leaves in adapter.params.items()}
    attention = fa.functional_call(model, adapter.replace(params=params), (x,))
    ours_b = torch.autograd.grad(attention.sum(), params["attn.out_proj"]["lora_B"])[0]
    torch.testing.assert_close(theirs_b, ours_b)  # in_proj is right, so the input of out_proj is the same


def test_b14_an_already_parametrised_parameter_accumulates(tmp_path: Path) -> None:
    class Doubled(nn.Module):
        def forward(self, w: torch.Tensor) -> torch.Tensor:
            return 2 * w

    def make() -> nn.Module:
        model, _, _ = layer_model("experts")
        parametrize.register_parametrization(model.inner["layer"], "up", Doubled())
        return model.eval()

    x = torch.randn(3, 4)
    fields: dict[str, Any] = {"r": 2, "target_modules": [], "target_parameters": ["layer.up"]}
    wrapped = wrap(layer_model("experts")[0].eval(), configs("lora", **fields)[0])
    owner = wrapped.base_model.model.inner["layer"].get_base_layer()
    parametrize.register_parametrization(owner, "up", Doubled())
    with torch.no_grad():
        first, second = wrapped(x), wrapped(x)
        third = wrapped(x)
    assert not torch.allclose(first, second)
    assert not torch.allclose(second, third)

    # Here a parametrised weight is no parameter of its module, and that is said
    with pytest.raises(fa.TargetError, match=r"'layer\.up', which matches no parameter"):
        fa.init(make(), fa.LoraConfig(**fields))


def test_b15_olora_on_transformers_conv1d() -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return Net(Conv1D(5, 6))

    fields: dict[str, Any] = {"r": 2, "target_modules": ["layer"], "init_lora_weights": "olora"}
    x = torch.randn(3, 6)
    with pytest.raises(RuntimeError):
        wrap(make(), configs("lora", **fields)[0])(x)
    model = make()
    adapter, base = fa.init_with_base(model, fa.LoraConfig(**fields))
    got = fa.functional_call(model, adapter, (x,), parameters=base)
    torch.testing.assert_close(got, model(x))  # the residual and the adapter make the weight
    assert not torch.allclose(torch.func.functional_call(model, base, (x,)), model(x))


@pytest.mark.parametrize("kind", ["embedding", "mha"])
def test_b16_dropout_that_is_never_applied(kind: str, tmp_path: Path) -> None:
    """Neither to token ids nor where a layer is used through its weight; PEFT says nothing in either case."""
    model, x, target = layer_model(kind)
    wrapped = wrap(layer_model(kind)[0], configs("lora", r=4, lora_dropout=0.9, **target)[0]).train()
    assert torch.equal(wrapped(x), wrapped(x))
    if kind == "embedding":  # ours is the same, as ids cannot be dropped
        adapter = fa.load(peft_save(wrapped, tmp_path), model=model)
        torch.testing.assert_close(fa.functional_call(model.train(), adapter, (x,)), wrapped(x))
        return
    adapter = fa.init(model, configs("lora", r=4, lora_dropout=0.9, **target)[1])
    with pytest.raises(fa.AdapterError, match="dropout"):
        fa.functional_call(model.train(), adapter, (x,))
    fa.functional_call(model.eval(), adapter, (x,))


def test_dora_on_grouped_convolutions_takes_the_norm_of_scrambled_numbers() -> None:
    """PEFT multiplies `lora_B.view(-1, r)` by A, which for groups > 1 pairs rows of different outputs."""
    _, x, target = layer_model("conv2d_grouped")
    wrapped = wrap(layer_model("conv2d_grouped")[0], configs("dora", r=4, **target)[0])
    merged_scale = wrapped(x)
    assert torch.isfinite(merged_scale).all()  # no error
    layer = wrapped.base_model.model.inner["layer"]
    with pytest.raises((NotImplementedError, RuntimeError)):
        layer.merge()
    with pytest.raises(fa.SiteError, match=r"DoRA cannot adapt the grouped convolution 'inner\.layer'"):
        fa.init(layer_model("conv2d_grouped")[0], configs("dora", r=4, **target)[1])


def _conv(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return Net(nn.Conv2d(3, 4, 3, **options)).double().eval()


def _conv_truth(model: Any, adapter: fa.Adapter, x: torch.Tensor) -> torch.Tensor:
    p = adapter.leaves("inner.layer")
    delta = p["scaling"] * torch.einsum("or,rikl->oikl", p["lora_B"][..., 0, 0], p["lora_A"])
    weight = model.inner["layer"].weight + delta
    return torch.func.functional_call(model, {"inner.layer.weight": weight}, (x,))


@pytest.mark.parametrize("mode", ["circular", "reflect"])
def test_padding_modes_are_ignored_by_peft(mode: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"padding": 1, "padding_mode": mode}
    wrapped = wrap(_conv(**options), configs("lora", r=2, target_modules=["layer"])[0]).double()
    model, x = _conv(**options), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    adapter = fa.load(peft_save(wrapped, tmp_path), model=model)
    truth = _conv_truth(model, adapter, x)
    torch.testing.assert_close(fa.functional_call(model, adapter, (x,)), truth)
    assert not torch.allclose(wrapped(x), truth, atol=1e-3)
    torch.testing.assert_close(wrapped.merge_and_unload()(x), truth)  # PEFT's own merged weight is right


def test_dilation_is_ignored_by_peft(tmp_path: Path) -> None:
    options: dict[str, Any] = {"padding": 2, "dilation": 2}
    wrapped = wrap(_conv(**options), configs("lora", r=2, target_modules=["layer"])[0]).double()
    model, x = _conv(**options), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="size"):
        wrapped(x)
    adapter = fa.load(peft_save(wrapped, tmp_path), model=model)
    torch.testing.assert_close(fa.functional_call(model, adapter, (x,)), _conv_truth(model, adapter, x))


def test_nesting_order_is_the_registration_order() -> None:
    """No defect, but not what PEFT's docs and the sorted set of names suggest: "up" is registered before "down"."""
    wrapped = wrap(layer_model("experts")[0], configs("lora", r=2, **layer_model("experts")[2])[0])
    outer = wrapped.base_model.model.inner["layer"]
    assert [n for n, _ in Experts().named_parameters()][:2] == ["up", "down"]
    assert (outer.parameter_name, outer.base_layer.parameter_name) == ("down", "up")
    assert set(peft_sites(wrapped)) == {"inner.layer.up", "inner.layer.down"}


def test_embed_scale_is_applied(tmp_path: Path) -> None:
    """Gemma's scaled embeddings: PEFT is right, and so are we."""

    class Scaled(nn.Embedding):
        def __init__(self) -> None:
            super().__init__(11, 6)
            self.register_buffer("embed_scale", torch.tensor(3.0), persistent=False)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return F.embedding(ids, self.weight) * self.embed_scale

    def make() -> nn.Module:
        torch.manual_seed(0)
        return Net(Scaled()).eval()

    x = torch.randint(11, (3, 4))
    for method in ("lora", "dora"):
        wrapped = wrap(make(), configs(method, r=2, target_modules=["layer"])[0])
        model = make()
        adapter = fa.load(peft_save(wrapped, tmp_path / method), model=model)
        torch.testing.assert_close(fa.functional_call(model, adapter, (x,)), wrapped(x))


def test_peft_is_the_version_that_this_is_about() -> None:
    assert peft.__version__ == "0.21.2"
