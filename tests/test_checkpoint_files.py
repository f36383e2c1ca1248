"""PEFT's files, in both directions and bit for bit; and what happens to files that are not right."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_tools import (
    Experts,
    Net,
    attention_truth,
    config_file,
    configs,
    layer_model,
    logits,
    peft_load,
    peft_save,
    raw,
    same_adapters,
    same_tensors,
    tiny,
    tokens,
    wrap,
)
from safetensors.torch import load_file, save_file
from torch import nn

import funcadapt as fa
import funcadapt.peft as shim

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::RuntimeWarning:peft")


def both_ways(make: Any, inputs: dict[str, Any], tmp_path: Path, method: str, fields: dict[str, Any]) -> fa.Adapter:
    """PEFT -> funcadapt -> PEFT: outputs, keys, bytes and configs stay what they were."""
    peft_config, _ = configs(method, **fields)
    wrapped = wrap(make(), peft_config)
    theirs = peft_save(wrapped, tmp_path / "theirs")
    with torch.no_grad():
        expected = logits(wrapped(**inputs))
        base = logits(make().eval()(**inputs))
    assert not torch.allclose(expected, base, atol=1e-3), "the adapter does nothing: the test could not fail"

    model = make().eval()
    adapter = fa.load(theirs, model=model)
    with torch.no_grad():
        got = logits(fa.functional_call(model, adapter, (), inputs))
    if isinstance(getattr(model, "attn", None), nn.MultiheadAttention):
        expected_here = attention_truth(model, adapter, inputs["x"])  # PEFT defect B1
    else:
        expected_here = expected
    torch.testing.assert_close(got, expected_here, atol=1e-5, rtol=1e-4)

    fa.save(adapter, tmp_path / "ours")
    same_tensors(raw(theirs), raw(tmp_path / "ours"))
    assert config_file(theirs) == config_file(tmp_path / "ours")
    same_adapters(adapter, fa.load(tmp_path / "ours"))

    again = peft_load(make(), tmp_path / "ours")
    with torch.no_grad():
        assert torch.equal(logits(again(**inputs)), expected)
    return adapter


LORA_KINDS = [
    "linear", "linear_no_bias", "hf_conv1d", "embedding", "conv1d", "conv2d", "conv2d_1x1", "conv2d_grouped", "conv3d",
    "mha", "parameter", "experts", "transposed",
]  # fmt: skip
LAYERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    **{f"lora-{kind}": ("lora", kind, {"r": 4, "lora_alpha": 6}) for kind in LORA_KINDS},
    **{
        f"lora_bias-{kind}": ("lora", kind, {"r": 4, "lora_bias": True, "use_rslora": True, "bias": "all"})
        for kind in LORA_KINDS
        if kind not in ("embedding", "mha", "parameter", "experts", "transposed")
    },
    **{
        f"dora-{kind}": ("dora", kind, {"r": 4, "lora_alpha": 6})
        for kind in LORA_KINDS
        if kind not in ("conv2d_grouped", "mha", "parameter", "experts", "transposed")
    },
    **{
        f"ia3{'-ff' * ff}-{kind}": ("ia3", kind, {"feedforward_modules": ["layer"] * ff})
        for kind in ("linear", "linear_no_bias", "hf_conv1d", "conv2d", "conv2d_grouped", "conv3d")
        for ff in (False, True)
    },
}


@pytest.mark.parametrize("case", LAYERS)
def test_every_layer_kind_both_ways(case: str, tmp_path: Path) -> None:
    method, kind, fields = LAYERS[case]
    _, x, target = layer_model(kind)
    both_ways(lambda: layer_model(kind)[0], {"x": x}, tmp_path, method, {**fields, **target})


MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "defaults": ("llama", "lora", {"task_type": "CAUSAL_LM"}),
    "ia3 defaults": ("gpt2", "ia3", {}),
    "ia3 suffix ff": ("bert", "ia3", {}),
    "t5 dora": ("t5", "dora", {}),
    "all-linear": ("llama", "lora", {"target_modules": "all-linear"}),
    "regex": ("llama", "lora", {"target_modules": r".*\.(q|v)_proj"}),
    "rank and alpha patterns": (
        "llama",
        "lora",
        {
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "rank_pattern": {"q_proj": 4, r".*layers\.0\.mlp.*": 2},
            "alpha_pattern": {"v_proj": 1, "layers.1.mlp.down_proj": 0.5},
            "use_rslora": True,
        },
    ),
    "bias all": ("bert", "lora", {"target_modules": ["query"], "bias": "all"}),
    "bias lora_only": ("bert", "lora", {"target_modules": ["query"], "bias": "lora_only"}),
    "saved modules": ("llama", "lora", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "model.norm"]}),
    # PEFT's rule has no dot before the name: "norm" also names every input_layernorm
    "saved by ending": ("llama", "lora", {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
    "saved nested": ("bert", "lora", {"target_modules": ["query"], "modules_to_save": ["cls"]}),
    "saved by task": ("bert_cls", "lora", {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
    "saved tied": ("llama_tied", "lora", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "tokens": ("llama", "lora", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5, 7]}),
    "tokens dict": ("llama", "lora", {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3]}}),
    "tokens tied": ("gpt2", "lora", {"target_modules": ["c_attn"], "trainable_token_indices": [3, 5, 7]}),
    "embedding": ("llama", "lora", {"target_modules": ["embed_tokens", "lm_head"]}),
    "embedding tied": ("llama_tied", "dora", {"target_modules": ["embed_tokens", "q_proj"]}),
    "experts": (
        "mixtral",
        "lora",
        # not in the order in which the module registered them, which is PEFT's nesting order
        {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj", "experts.gate_up_proj"]},
    ),
    "experts patterns": (
        "mixtral",
        "lora",
        {
            "target_parameters": ["mlp.gate.weight", "down_proj", "gate_up_proj"],
            "rank_pattern": {"experts.down_proj": 2},
            "alpha_pattern": {"experts.gate_up_proj": 3},
        },
    ),
    "layers": ("llama", "lora", {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),
    "everything": (
        "llama",
        "dora",
        {"target_modules": ["q_proj", "lm_head"], "trainable_token_indices": [3], "modules_to_save": ["model.norm"]},
    ),
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")  # PEFT's advice about embeddings and ties
@pytest.mark.parametrize("case", MODELS)
def test_models_both_ways(case: str, tmp_path: Path) -> None:
    name, method, fields = MODELS[case]
    both_ways(partial(tiny, name), tokens(name), tmp_path, method, fields)


def test_batch_norm_buffers_both_ways(tmp_path: Path) -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.lin, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.lin(x))

    wrapped = wrap(Normed(), configs("lora", target_modules=["lin"], modules_to_save=["norm"])[0])
    x = torch.randn(8, 4)
    wrapped.train()(x)  # moves the running statistics of the copy
    wrapped.eval()
    model = Normed().eval()
    adapter = fa.load(peft_save(wrapped, tmp_path / "theirs"), model=model)
    assert set(adapter.buffers["norm"]) == {"running_mean", "running_var", "num_batches_tracked"}
    torch.testing.assert_close(fa.functional_call(model, adapter, (x,)), wrapped(x))
    fa.save(adapter, tmp_path / "ours")
    same_tensors(raw(tmp_path / "theirs"), raw(tmp_path / "ours"))
    same_adapters(adapter, fa.load(tmp_path / "ours"))


def test_other_buffers_both_ways(tmp_path: Path) -> None:
    """A saved module with a float buffer of its own: nothing in PEFT's key says that it is no parameter."""

    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.lin = nn.Linear(4, 4)
            self.register_buffer("table", torch.ones(4))
            self.register_buffer("scratch", torch.ones(4), persistent=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.lin(x) * self.table * self.scratch

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.lin, self.gate = nn.Linear(4, 4), Gate()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.gate(self.lin(x))

    wrapped = wrap(Gated(), configs("lora", target_modules=["gated", "lin"], modules_to_save=["gate"])[0])
    wrapped.base_model.model.gate.modules_to_save["default"].table.mul_(3)
    peft_save(wrapped, tmp_path / "theirs")
    x, model = torch.randn(2, 4), Gated().eval()
    for adapter in (fa.load(tmp_path / "theirs"), fa.load(tmp_path / "theirs", model=model)):
        torch.testing.assert_close(fa.functional_call(model, adapter, (x,)), wrapped(x))
        fa.save(adapter, tmp_path / "ours")
        same_tensors(raw(tmp_path / "theirs"), raw(tmp_path / "ours"))
    assert set(adapter.buffers["gate"]) == {"table"}
    same_adapters(adapter, fa.load(tmp_path / "ours"))


def test_keys_without_the_prefix(tmp_path: Path) -> None:
    """`inject_adapter_in_model` and get_peft_model_state_dict write no prefix."""
    adapter = fa.init(tiny("llama"), fa.LoraConfig(target_modules=["q_proj"]))
    fa.save(adapter, tmp_path)
    save_file({key.removeprefix(PREFIX): value for key, value in raw(tmp_path).items()}, tmp_path / WEIGHTS)
    same_adapters(fa.load(tmp_path), adapter)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
def test_peft_s_extra_biases_of_saved_modules(tmp_path: Path) -> None:
    """With bias="all", PEFT writes a saved module's bias three times: the trained one, its copy, and the old one."""
    wrapped = wrap(tiny("bert_cls"), configs("lora", target_modules=["query"], bias="all", task_type="SEQ_CLS")[0])
    extra = {f"{PREFIX}classifier.{part}.bias" for part in ("modules_to_save", "original_module")}
    theirs = raw(peft_save(wrapped, tmp_path / "theirs"))
    assert extra < set(theirs)
    model = tiny("bert_cls")
    adapter = fa.load(tmp_path / "theirs", model=model)
    ids = tokens("bert")
    torch.testing.assert_close(fa.functional_call(model, adapter, (), ids).logits, wrapped(**ids).logits)
    fa.save(adapter, tmp_path / "ours")
    same_tensors({k: v for k, v in theirs.items() if k not in extra}, raw(tmp_path / "ours"))


def test_both_spellings_of_one_key_are_refused(tmp_path: Path) -> None:
    """With and without the prefix, one of the two tensors would silently win."""
    fa.save(fa.init(Net(nn.Linear(3, 2)), fa.LoraConfig(target_modules=["layer"])), tmp_path)
    tensors = raw(tmp_path)
    key = next(iter(tensors))
    save_file({**tensors, key.removeprefix(PREFIX): tensors[key] + 1}, tmp_path / WEIGHTS)
    with pytest.raises(fa.AdapterFileError, match="twice"):
        fa.load(tmp_path)


# -- load(save(a)) == a ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [*LAYERS, "dora-mha", "dora-parameter", "dora-experts", "ia3-mha", "ia3-embedding"])
def test_round_trip_of_what_init_makes(case: str, tmp_path: Path) -> None:
    """Also of what PEFT cannot make: DoRA on experts, IA3 on embeddings."""
    method, kind = (LAYERS[case][0], LAYERS[case][1]) if case in LAYERS else tuple(case.split("-"))
    fields = dict(LAYERS[case][2]) if case in LAYERS else {}
    model, _, target = layer_model(kind)
    fields.setdefault("feedforward_modules", []) if method == "ia3" else fields.setdefault("r", 4)
    adapter = fa.init(model, configs(method, **fields, **target)[1], seed=3)
    adapter = adapter.replace(params=torch.utils._pytree.tree_map(lambda t: t + 0.1, adapter.params))
    fa.save(adapter, tmp_path)
    same_adapters(fa.load(tmp_path, model=model), adapter)
    same_adapters(fa.load(tmp_path), adapter)


@pytest.mark.parametrize("experts", [1, 2, 4])
@pytest.mark.parametrize("r", [1, 2, 4])
def test_experts_of_any_count_and_rank(experts: int, r: int, tmp_path: Path) -> None:
    """Also where rank and number of experts are equal, so that the axes could be mistaken for each other."""

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.w = nn.Parameter(torch.randn(experts, 4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.einsum("bi,eoi->bo", x, self.w)

    fields = {"r": r, "lora_alpha": 3, "target_modules": [], "target_parameters": ["layer.w"]}
    both_ways(lambda: Net(Stack()), {"x": torch.randn(3, 4)}, tmp_path, "lora", fields)


@pytest.mark.parametrize("scaling", [0.3, 1.0 / 3.0, 7.25])
def test_a_swept_scaling_becomes_alpha(scaling: float, tmp_path: Path) -> None:
    model = tiny("llama")
    adapter = fa.init(model, fa.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    first = next(iter(adapter.buffers))
    swept = adapter.replace(
        buffers={**adapter.buffers, first: {"scaling": torch.tensor(scaling)}},
    )
    fa.save(swept, tmp_path)
    back = fa.load(tmp_path, model=model)
    assert {p: float(b["scaling"]) for p, b in back.buffers.items()} == {
        p: float(b["scaling"]) for p, b in swept.buffers.items()
    }
    ids = tokens("llama")
    with torch.no_grad():
        ours = fa.functional_call(model, swept, (), ids).logits
        theirs = peft_load(tiny("llama"), tmp_path)(**ids).logits
    torch.testing.assert_close(ours, theirs)
    assert not torch.allclose(ours, fa.functional_call(model, adapter, (), ids).logits, atol=1e-4)


def test_mixed_ranks_are_described(tmp_path: Path) -> None:
    """An adapter whose leaves have other ranks than its config, as truncation makes it."""
    model = tiny("llama")
    config = fa.LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapter = fa.init(model, config)
    params = {
        path: {"lora_A": p["lora_A"][:2], "lora_B": p["lora_B"][:, :2].contiguous()} if "0.self_attn.q" in path else p
        for path, p in adapter.params.items()
    }
    mixed = adapter.replace(params=params)
    fa.save(mixed, tmp_path)
    back = fa.load(tmp_path, model=model)
    for path in params:
        same_tensors(dict(params[path]), dict(back.params[path]))
        assert float(back.buffers[path]["scaling"]) == 1.0
    ids = tokens("llama")
    torch.testing.assert_close(
        peft_load(tiny("llama"), tmp_path)(**ids).logits, fa.functional_call(model, mixed, (), ids).logits
    )


@pytest.mark.parametrize("method", ["lora", "loha"])
def test_a_path_with_which_others_end_is_described(method: str, tmp_path: Path) -> None:
    """PEFT matches a pattern with the end of a path, so that "q" is "a.q", too."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.q = nn.Linear(3, 3)
            self.a, self.b = (nn.Sequential(OrderedDict(q=nn.Linear(3, 3))) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(self.q(x)))

    fields: dict[str, Any] = {"init_lora_weights": False} if method == "lora" else {"init_weights": False}
    cls = fa.LoraConfig if method == "lora" else fa.LoHaConfig
    adapter = fa.init(Model(), cls(r=2, target_modules=["q"], **fields))
    swept = adapter.replace(buffers={**adapter.buffers, "q": {"scaling": torch.tensor(0.3)}})
    fa.save(swept, tmp_path)
    back, x = fa.load(tmp_path, model=Model()), torch.randn(2, 3)
    assert {path: float(b["scaling"]) for path, b in back.buffers.items()} == {
        path: float(b["scaling"]) for path, b in swept.buffers.items()
    }
    torch.testing.assert_close(peft_load(Model(), tmp_path)(x), fa.functional_call(Model(), swept, (x,)))


def test_the_order_of_patterns_survives(tmp_path: Path) -> None:
    """The first match wins, so PEFT's sorted JSON changes what a config means; PEFT then cannot load its own file."""
    fields = {"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 4, r".*layers\.0\..*": 2}}
    theirs, ours = configs("lora", **fields)
    peft_save(wrap(tiny("llama"), theirs), tmp_path / "theirs")
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft_load(tiny("llama"), tmp_path / "theirs")
    with pytest.raises(fa.AdapterFileError, match=r"layers\.0\.self_attn\.q_proj.*rank"):
        fa.load(tmp_path / "theirs")

    adapter = fa.init(tiny("llama"), ours)
    fa.save(adapter, tmp_path / "ours")
    same_adapters(fa.load(tmp_path / "ours"), adapter)
    peft_load(tiny("llama"), tmp_path / "ours")  # and PEFT reads ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_survive(dtype: torch.dtype, tmp_path: Path) -> None:
    adapter = fa.init(tiny("llama"), fa.LoraConfig(r=3, target_modules=["q_proj"], lora_alpha=5), dtype=dtype)
    fa.save(adapter, tmp_path)
    same_adapters(fa.load(tmp_path), adapter)
    assert next(fa.load(tmp_path, dtype=torch.float32).tensors()).dtype == torch.float32


def test_non_contiguous_and_shared_leaves(tmp_path: Path) -> None:
    adapter = fa.init(Net(nn.Linear(4, 4)), fa.LoraConfig(r=4, target_modules=["layer"]))
    square = torch.randn(4, 4)
    adapter = adapter.replace(params={"inner.layer": {"lora_A": square.t(), "lora_B": square}})
    fa.save(adapter, tmp_path)
    same_adapters(fa.load(tmp_path), adapter)


# -- strictness --------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    fa.save(fa.init(tiny("llama"), fa.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])), tmp_path)
    return tmp_path


def rewrite(folder: Path, change: Any) -> None:
    tensors = raw(folder)
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / WEIGHTS, {"format": "pt"})


Q0 = f"{PREFIX}model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{Q0}.lora_B.weight"), r"layers\.0\.self_attn\.q_proj' lacks 'lora_B'"),
        (lambda t: t.update({f"{Q0}.lora_C.weight": torch.ones(2)}), r"Unexpected key .*lora_C.*Did you mean"),
        (lambda t: t.update({f"{Q0}.lora_magnitude_vector": torch.ones(16)}), r"Unexpected .*lora_magnitude_vector"),
        (lambda t: t.update({f"{Q0}.lora_B.bias": torch.ones(16)}), r"q_proj' has 'lora_B_bias', which the config"),
        (lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(3, 16)}), r"q_proj' has lora_A of shape \(3, 16\)"),
        (lambda t: t.update({f"{Q0}.lora_B.weight": torch.ones(16, 3)}), r"q_proj' has .* lora_B of shape \(16, 3\)"),
        (lambda t: t.update({f"{PREFIX}lm_head.bias": torch.ones(3)}), r"Unexpected key .*lm_head.bias"),
        (lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(4, 16, dtype=torch.int64)}), r"q_proj'.*int64"),
        (lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(4, 16, dtype=torch.complex64)}), r"C64|complex64"),
    ],
)
def test_bad_keys_name_the_site(saved: Path, change: Any, message: str) -> None:
    rewrite(saved, change)
    with pytest.raises(fa.AdapterFileError, match=message):
        fa.load(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: [t.pop(f"{Q0}.lora_{ab}.weight") for ab in "AB"],
            r"lacks the site 'model\.layers\.0\.self_attn\.q_proj'",
        ),
        (
            lambda t: t.update({f"{Q0[:-6]}o_proj.lora_{ab}.weight": torch.ones(4, 4) for ab in "AB"}),
            r"has the site 'model\.layers\.0\.self_attn\.o_proj', which the config does not select",
        ),
        (lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(4, 17)}), r"q_proj': lora_A has shape \(4, 17\)"),
        (lambda t: t.update({f"{Q0}.lora_B.weight": torch.ones(15, 4)}), r"q_proj': lora_B has shape \(15, 4\)"),
    ],
)
def test_loading_with_a_model_checks_the_sites(saved: Path, change: Any, message: str) -> None:
    rewrite(saved, change)
    fa.load(saved)  # consistent in itself
    with pytest.raises(fa.AdapterFileError, match=message):
        fa.load(saved, model=tiny("llama"))


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"modules_to_save": ["cls"]}, "cls.predictions.transform.dense.weight"),
        ({"bias": "all"}, "bert.embeddings.LayerNorm.bias"),
        ({"bias": "lora_only"}, "bert.encoder.layer.0.attention.self.query.base_layer.bias"),
    ],
)
def test_missing_whole_parameters(fields: dict[str, Any], key: str, tmp_path: Path) -> None:
    """Only the model knows that they should be there."""
    model = tiny("bert")
    fa.save(fa.init(model, fa.LoraConfig(target_modules=["query"], **fields)), tmp_path)
    fa.load(tmp_path, model=model)
    rewrite(tmp_path, lambda t: t.pop(PREFIX + key))
    with pytest.raises(fa.AdapterFileError, match=key.replace(".base_layer", "").rpartition(".")[0]):
        fa.load(tmp_path, model=model)


def test_a_checkpoint_of_another_model(saved: Path) -> None:
    with pytest.raises(fa.AdapterFileError, match="q_proj"):
        fa.load(saved, model=tiny("bert"))


def test_ambiguous_experts_ask_for_the_model(tmp_path: Path) -> None:
    _, _, target = layer_model("experts")
    wrapped = wrap(layer_model("experts")[0], configs("lora", r=2, **target)[0])
    peft_save(wrapped, tmp_path)
    with pytest.raises(fa.AdapterFileError, match=r"Pass the model: fa\.load\(directory, model=model\)"):
        fa.load(tmp_path)
    assert set(fa.load(tmp_path, model=layer_model("experts")[0]).params) == {"inner.layer.up", "inner.layer.down"}


def test_a_module_and_a_parameter_of_one_name(tmp_path: Path) -> None:
    """As in models with dense and expert layers: both are called "down_proj"."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.dense = nn.ModuleDict({"down": nn.Linear(4, 4)})
            self.moe = Experts()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.moe(self.dense["down"](x))

    x = torch.randn(3, 4)
    for targets in (["down"], "all-linear", r".*\.down"):
        folder = tmp_path / str(targets)
        config = fa.LoraConfig(r=2, target_modules=targets, target_parameters=["down"], init_lora_weights=False)
        adapter = fa.init(Mixed(), config)
        assert list(adapter.params) == ["dense.down", "moe.down"]
        fa.save(adapter, folder)
        same_adapters(fa.load(folder), adapter)
        same_adapters(fa.load(folder, model=Mixed()), adapter)

        torch.testing.assert_close(peft_load(Mixed(), folder)(x), fa.functional_call(Mixed(), adapter, (x,)))


def test_missing_files_and_pickles(tmp_path: Path, saved: Path) -> None:
    with pytest.raises(fa.AdapterFileError, match=r"Can't find 'adapter_config\.json'"):
        fa.load(tmp_path / "nowhere")
    (saved / WEIGHTS).unlink()
    with pytest.raises(fa.AdapterFileError, match=r"Can't find 'adapter_model\.safetensors'"):
        fa.load(saved)
    (saved / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/pwned'\ntR.")
    with pytest.raises(fa.AdapterFileError, match="a pickle, which funcadapt does not open"):
        fa.load(saved)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(fa.AdapterFileError, match="directory, not a file"):
        fa.save(fa.init(tiny("llama"), fa.LoraConfig()), file)
    with pytest.raises(fa.AdapterFileError):
        fa.load(file)


def test_unknown_fields(saved: Path) -> None:
    values = json.loads((saved / CONFIG).read_text())
    (saved / CONFIG).write_text(json.dumps({**values, "lora_alpa": 3}))
    with pytest.raises(fa.AdapterFileError, match=r"no field 'lora_alpa'\. Did you mean 'lora_alpha'"):
        fa.load(saved)
    (saved / CONFIG).write_text(json.dumps({**values, "use_something_new": False}))
    with pytest.warns(UserWarning, match="no field 'use_something_new'"):
        fa.load(saved)
    (saved / CONFIG).write_text(json.dumps({**values, "layer_replication": [[0, 1]]}))
    with pytest.raises(NotImplementedError, match="layer_replication"):
        fa.load(saved)


def test_config_file_has_peft_s_fields(tmp_path: Path) -> None:
    """For equal configs, adapter_config.json is PEFT's but for BOOKKEEPING."""
    theirs, ours = configs("lora", r=4, target_modules=["q_proj", "v_proj"], alpha_pattern={"v_proj": 1})
    peft_save(wrap(tiny("llama"), theirs), tmp_path / "theirs")
    fa.save(fa.init(tiny("llama"), ours), tmp_path / "ours")
    assert config_file(tmp_path / "theirs") == config_file(tmp_path / "ours")
    values = json.loads((tmp_path / "ours" / CONFIG).read_text())
    full = json.loads((tmp_path / "theirs" / CONFIG).read_text())
    assert set(values) == set(full)
    assert values["inference_mode"] is True
    assert values["peft_version"] == full["peft_version"]


# -- atomic writes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", ["fsync", "replace", "fdopen", "chmod"])
@pytest.mark.parametrize("after", [0, 1])
def test_a_failed_save_leaves_the_old_checkpoint(
    saved: Path, broken: str, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    real, calls = getattr(os, broken), []

    def fail(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == after + 1:
            raise OSError("No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(os, broken, fail)
    other = fa.init(tiny("llama"), fa.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    with pytest.raises(OSError, match="No space left"):
        fa.save(other, saved)
    monkeypatch.undo()
    assert len(calls) > after
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    fa.load(saved)


def test_files_are_readable_by_others(saved: Path) -> None:
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in saved.iterdir())


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", ["llama_tied", "gpt2"])
@pytest.mark.parametrize("named", [True, False])
def test_the_rows_of_a_tied_head_are_there_again(name: str, named: bool, tmp_path: Path) -> None:
    """Each file is PEFT's, byte for byte, whether a value is saved or a live model."""
    embedding = "embed_tokens" if name == "llama_tied" else "wte"
    fields: dict[str, Any] = {"token_indices": [1, 2], "target_modules": [embedding] if named else None}
    peft.get_peft_model(tiny(name), peft.TrainableTokensConfig(**fields)).save_pretrained(tmp_path / "theirs")
    shim.get_peft_model(tiny(name), shim.TrainableTokensConfig(**fields)).save_pretrained(tmp_path / "live")
    adapter = fa.init(tiny(name), fa.TrainableTokensConfig(**fields))
    fa.save(adapter, tmp_path / "value")
    fa.save(fa.load(tmp_path / "theirs"), tmp_path / "read")
    held = fa.materialize(tiny(name), adapter)
    fa.save(fa.dematerialize(held)["default"], tmp_path / "held")
    want = (tmp_path / "theirs" / "adapter_model.safetensors").read_bytes()
    for folder in ("live", "value", "read", "held"):
        assert (tmp_path / folder / "adapter_model.safetensors").read_bytes() == want, folder
        assert config_file(tmp_path / folder)["target_modules"] == config_file(tmp_path / "theirs")["target_modules"]
    for folder in ("theirs", "value"):
        assert fa.load(tmp_path / folder).buffers.keys() == adapter.buffers.keys()
    same_adapters(fa.load(tmp_path / "value", model=tiny(name)), fa.load(tmp_path / "value"))


def test_rows_of_a_tied_head_that_differ_are_refused(tmp_path: Path) -> None:
    model, config = tiny("llama_tied"), shim.TrainableTokensConfig(token_indices=[1, 2])
    live = shim.get_peft_model(model, config)
    live.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    shim.set_peft_model_state_dict(live, tensors)
    key = "base_model.model.lm_head.trainable_tokens_delta"
    with pytest.raises(RuntimeError, match=r"other trained rows for 'base_model.model.lm_head'"):
        shim.set_peft_model_state_dict(live, {**tensors, key: tensors[key] + 1})
    without = {k: v + 1 for k, v in tensors.items() if k != key}  # as funcadapt wrote it once
    shim.set_peft_model_state_dict(live, without)
    rows = live.base_model.model.lm_head.token_adapter.trainable_tokens_delta["default"]
    assert torch.equal(rows, next(iter(without.values())))


def test_a_model_without_the_head(tmp_path: Path) -> None:
    """The rows act on the embedding alone, as nothing else is there."""
    whole: Any = tiny("llama_tied")
    adapter = fa.init(whole, fa.TrainableTokensConfig(token_indices=[1, 2]))
    paths = {path.removeprefix("model."): leaves for path, leaves in adapter.params.items()}
    buffers = {
        path.removeprefix("model."): {name.replace("@model.", "@"): leaf for name, leaf in leaves.items()}
        for path, leaves in adapter.buffers.items()
    }
    inner = adapter.replace(params=paths, buffers=buffers)
    ids = tokens("llama_tied")
    out = fa.functional_call(whole.model, inner, (), ids)
    torch.testing.assert_close(out.last_hidden_state, whole.model(**ids).last_hidden_state)


def test_a_file_that_repeats_the_rows_of_two_tied_heads(tmp_path: Path) -> None:
    """A file of PEFT holds the rows of what is tied to the embedding again, as often as it is tied."""
    model = tiny("llama_tied")
    adapter = fa.init(model, fa.TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[1, 2]))
    fa.save(adapter, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    rows = tensors["base_model.model.model.embed_tokens.trainable_tokens_delta"]
    again = {**tensors, "base_model.model.a_head.trainable_tokens_delta": rows.clone()}
    save_file(again, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    loaded = fa.load(tmp_path)
    assert loaded.params.keys() == adapter.params.keys()
    assert loaded.buffers.keys() == {*adapter.buffers, "a_head"}
    fa.save(loaded, tmp_path)
    same_tensors(load_file(tmp_path / "adapter_model.safetensors"), again)


@pytest.mark.parametrize(("peft_type", "module"), [("XLORA", "xlora"), ("SHADOW", "shadow")])
def test_a_value_of_its_own_is_read_elsewhere(peft_type: str, module: str, tmp_path: Path) -> None:
    own = {"hidden_size": 8, "adapters": {"0": "x"}} if peft_type == "XLORA" else {}
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": peft_type, **own}))
    save_file({"a": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(fa.AdapterError, match=rf"funcadapt\.{module}"):  # also once the module was imported
        fa.load(tmp_path)
