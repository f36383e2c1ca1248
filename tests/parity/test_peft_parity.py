"""The same weights in PEFT and here: outputs, gradients, merged weights. float64, so that nothing hides in rounding."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_tools import configs, get_peft_model_state_dict, layer_model, logits, peft_save, tiny, tokens, wrap
from torch import nn
from torch.utils import _pytree as pytree

import funcadapt as fa
from funcadapt.keys import encode

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")  # PEFT's advice

KINDS = [
    "linear",
    "linear_no_bias",
    "hf_conv1d",
    "embedding",
    "conv1d",
    "conv2d",
    "conv2d_1x1",
    "conv2d_grouped",
    "conv3d",
]
PARAMETERS = ["parameter", "experts", "transposed"]
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    **{f"lora-{k}": ("lora", k, {"r": 4, "lora_alpha": 6}) for k in (*KINDS, *PARAMETERS)},
    **{
        f"rslora-{k}": ("lora", k, {"r": 4, "lora_alpha": 5, "use_rslora": True})
        for k in ("linear", "conv2d", "embedding")
    },
    **{f"lora_bias-{k}": ("lora", k, {"r": 4, "lora_bias": True}) for k in ("linear", "hf_conv1d", "conv1d", "conv2d")},
    **{f"bias-{k}": ("lora", k, {"r": 2, "bias": "all"}) for k in ("linear", "conv2d")},
    **{f"dora-{k}": ("dora", k, {"r": 4, "lora_alpha": 6}) for k in KINDS if k != "conv2d_grouped"},
    **{f"dora_rslora-{k}": ("dora", k, {"r": 4, "use_rslora": True}) for k in ("linear", "conv2d")},
    **{
        f"ia3{'_ff' * ff}-{k}": ("ia3", k, {"feedforward_modules": ["layer"] * ff})
        for k in ("linear", "linear_no_bias", "hf_conv1d", "conv2d", "conv2d_grouped", "conv3d")
        for ff in (False, True)
    },
}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama-lora": ("llama", "lora", {"target_modules": "all-linear", "r": 3}),
    "llama-dora": ("llama", "dora", {"target_modules": ["q_proj", "down_proj", "embed_tokens", "lm_head"]}),
    "llama-ia3": ("llama", "ia3", {}),
    "llama-saved": ("llama", "lora", {"target_modules": ["v_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "llama-tokens": ("llama_tied", "lora", {"target_modules": ["v_proj"], "trainable_token_indices": [3, 5]}),
    "gpt2-lora": ("gpt2", "lora", {"target_modules": ["c_attn", "c_proj"], "bias": "lora_only"}),
    "gpt2-ia3": ("gpt2", "ia3", {}),
    "bert-dora": ("bert", "dora", {"target_modules": ["query", "dense"]}),
    "bert-bias": ("bert_cls", "lora", {"target_modules": ["query"], "bias": "all", "task_type": "SEQ_CLS"}),
    "mixtral-lora": (
        "mixtral",
        "lora",
        {"target_modules": ["q_proj"], "target_parameters": ["gate_up_proj", "down_proj", "mlp.gate.weight"]},
    ),
}
ALL = {**CASES, **MODELS}


def _model(name: str) -> nn.Module:
    model: Any = tiny(name).double()
    if name == "mixtral":
        model.set_experts_implementation("eager")  # torch's grouped_mm has no float64
    return model


class Pair:
    """One adapter, in PEFT and here, in float64."""

    def __init__(self, case: str, folder: Path, **fields: Any) -> None:
        name, self.method, base_fields = ALL[case][1], ALL[case][0], ALL[case][2]
        if case in MODELS:
            name, self.method = ALL[case][0], ALL[case][1]
            self.make = lambda: _model(name)
            self.inputs: dict[str, Any] = tokens(name)
            target: dict[str, Any] = {}
        else:
            _, x, target = layer_model(name)
            self.make = lambda: layer_model(name)[0].double().eval()
            self.inputs = {"x": x.double() if x.is_floating_point() else x}
        theirs, _ = configs(self.method, **base_fields, **target, **fields)
        self.wrapped = wrap(self.make(), theirs).double()
        self.model = self.make()
        self.adapter = fa.load(peft_save(self.wrapped, folder), model=self.model)
        assert next(self.adapter.tensors()).dtype == torch.float64

    def theirs(self) -> torch.Tensor:
        return logits(self.wrapped(**self.inputs))

    def ours(self, adapter: fa.Adapter | None = None) -> torch.Tensor:
        return logits(fa.functional_call(self.model, adapter or self.adapter, (), self.inputs))

    def peft_gradients(self) -> dict[str, torch.Tensor]:
        """The gradients under the keys of a checkpoint: PEFT's own code names them, once they stand for the weights."""
        probe = torch.randn(self.theirs().shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        self.wrapped.zero_grad()
        (self.theirs() * probe).sum().backward()
        kept = {}
        for parameter in self.wrapped.parameters():
            if parameter.requires_grad:
                kept[parameter] = parameter.data
                parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        named = {k: v.clone() for k, v in get_peft_model_state_dict(self.wrapped).items()}
        for parameter, data in kept.items():
            parameter.data = data
        return named

    def our_gradients(self) -> dict[str, torch.Tensor]:
        params = pytree.tree_map(lambda t: t.clone().requires_grad_(), self.adapter.params)
        adapter = self.adapter.replace(params=params)
        out = self.ours(adapter)
        probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        leaves, spec = pytree.tree_flatten(params)
        got = torch.autograd.grad((out * probe).sum(), leaves, allow_unused=True)
        filled = [torch.zeros_like(p) if g is None else g for p, g in zip(leaves, got, strict=True)]
        gradients = self.adapter.replace(params=pytree.tree_unflatten(filled, spec))
        return encode(gradients, fa.method_of(self.adapter.config))[0]


def close(a: torch.Tensor, b: torch.Tensor, what: str = "") -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10, msg=lambda m: f"{what}: {m}")


@pytest.mark.parametrize("case", ALL)
def test_outputs(case: str, tmp_path: Path) -> None:
    pair = Pair(case, tmp_path)
    with torch.no_grad():
        base = logits(pair.make()(**pair.inputs))
        theirs = pair.theirs()
        assert (theirs - base).abs().max() > 1e-3  # else there is nothing to compare
        close(pair.ours(), theirs)
        if "bias" not in ALL[case][2]:  # PEFT trains the model's own biases, which nothing gives back
            with pair.wrapped.disable_adapter():
                close(pair.theirs(), base)
        off = fa.functional_call(pair.model, {"a": pair.adapter}, (), pair.inputs, weights={"a": 0.0})
        close(logits(off), base)


@pytest.mark.parametrize("case", ALL)
def test_gradients(case: str, tmp_path: Path) -> None:
    """Of every leaf; in training mode where the base model has no dropout of its own."""
    pair = Pair(case, tmp_path)
    if not any(isinstance(m, nn.Dropout) and m.p > 0 for m in pair.model.modules()):
        pair.wrapped.train()
        pair.model.train()
    theirs, ours = pair.peft_gradients(), pair.our_gradients()
    # PEFT also saves frozen weights: those of embeddings, and copies of the biases of saved modules
    frozen = (".base_layer.weight", ".original_module.bias", ".modules_to_save.bias")
    names = {k for k in theirs if not k.endswith(frozen)}
    assert names == set(ours) & names
    assert max(theirs[k].abs().max() for k in names) > 1e-3
    for name in names:
        close(ours[name], theirs[name], name)


@pytest.mark.parametrize(
    "case", [c for c in ALL if not c.startswith(("lora_bias", "llama-tokens")) and "grouped" not in c]
)
def test_merged_weights(case: str, tmp_path: Path) -> None:
    pair = Pair(case, tmp_path)
    merged = fa.merge(pair.model, pair.adapter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = dict(pair.wrapped.merge_and_unload().named_parameters(remove_duplicate=False))
    base = dict(pair.make().named_parameters(remove_duplicate=False))
    changed = {name for name in base if not torch.equal(theirs[name], base[name])}
    assert changed
    assert changed <= set(merged)
    for name, weight in merged.items():
        close(weight, theirs[name], name)


@pytest.mark.parametrize("case", ["lora-grouped", "lora_bias-linear", "lora_bias-conv2d", "ia3-conv2d_grouped"])
def test_merged_weights_of_the_odd_cases(case: str, tmp_path: Path) -> None:
    """A bias of B merges into the layer's; LoRA on grouped convolutions merges nowhere."""
    if case == "lora-grouped":
        pair = Pair("lora-conv2d_grouped", tmp_path)
        with pytest.raises(fa.SiteError, match="no dense form"):
            fa.merge(pair.model, pair.adapter)
        with pytest.raises(NotImplementedError):
            pair.wrapped.merge_and_unload()
        return
    pair = Pair(case, tmp_path)
    merged = fa.merge(pair.model, pair.adapter)
    theirs = dict(pair.wrapped.merge_and_unload().named_parameters())
    assert any(name.endswith("bias") for name in merged)
    for name, weight in merged.items():
        close(weight, theirs[name], name)


DROPPED = [
    "lora-linear",
    "lora-hf_conv1d",
    "lora-conv2d",
    "dora-linear",
    "dora-hf_conv1d",
    "dora-conv1d",
    "dora-conv2d",
]


@pytest.mark.parametrize("case", [*DROPPED, "lora_bias-linear", "llama-lora", "dora_rslora-linear"])
def test_training_with_dropout(case: str, tmp_path: Path) -> None:
    """Equal seeds give equal masks, as both draw one mask a site in the order of the forward pass."""
    pair = Pair(case, tmp_path, lora_dropout=0.4)
    pair.wrapped.train()
    pair.model.train()
    torch.manual_seed(3)
    theirs = pair.theirs()
    torch.manual_seed(3)
    ours = pair.ours()
    close(ours, theirs)
    torch.manual_seed(4)
    assert not torch.allclose(pair.ours(), ours)  # it did drop
    pair.model.eval()
    pair.wrapped.eval()
    close(pair.ours(), pair.theirs())


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize(
    ("method", "fields"),
    [("lora", {"r": 4}), ("dora", {"r": 4}), ("ia3", {"feedforward_modules": ["up_proj"]})],
)
def test_bfloat16_base(method: str, fields: dict[str, Any], autocast: bool, tmp_path: Path) -> None:
    """With `autocast_adapter_dtype` PEFT keeps the adapter in float32; outputs agree to bfloat16's rounding."""
    theirs, _ = configs(method, target_modules=["q_proj", "up_proj"], **fields)
    wrapped = wrap(tiny("llama").bfloat16(), theirs, autocast_adapter_dtype=autocast)
    model = tiny("llama").bfloat16()
    adapter = fa.load(peft_save(wrapped, tmp_path), model=model)
    assert next(adapter.tensors()).dtype == (torch.float32 if autocast else torch.bfloat16)
    with torch.no_grad():
        expected = logits(wrapped(**tokens("llama")))
        got = logits(fa.functional_call(model, adapter, (), tokens("llama")))
        exact = logits(fa.functional_call(tiny("llama").double(), adapter.to(torch.float64), (), tokens("llama")))
    assert got.dtype == expected.dtype == torch.bfloat16
    # no further from the exact answer than PEFT is, give or take a rounding of the largest logit
    step = exact.abs().max() * 2**-8
    assert (got - exact).abs().max() <= (expected - exact).abs().max() + step
    assert (got.double() - expected.double()).abs().max() <= 4 * step


@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_float32_outputs(method: str, tmp_path: Path) -> None:
    fields = {"feedforward_modules": []} if method == "ia3" else {"r": 4}
    wrapped = wrap(tiny("llama"), configs(method, target_modules=["q_proj", "up_proj"], **fields)[0])
    model = tiny("llama")
    adapter = fa.load(peft_save(wrapped, tmp_path), model=model)
    ids = tokens("llama")
    torch.testing.assert_close(
        logits(fa.functional_call(model, adapter, (), ids)), logits(wrapped(**ids)), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("alpha", [1, 0.5, 32])
@pytest.mark.parametrize("r", [1, 3, 16])
@pytest.mark.parametrize("rslora", [False, True])
def test_scalings_are_exact(alpha: float, r: int, rslora: bool) -> None:
    fields: dict[str, Any] = {"r": r, "lora_alpha": alpha, "use_rslora": rslora, "target_modules": ["layer"]}
    theirs, ours = configs("lora", **fields)
    wrapped = wrap(layer_model("linear")[0], theirs)
    adapter = fa.init(layer_model("linear")[0].double(), ours)
    expected = wrapped.base_model.model.inner["layer"].scaling["default"]
    assert float(adapter.buffers["inner.layer"]["scaling"]) == expected
