"""Layers that bitsandbytes and torchao quantised, and one that is packed as GPTQ's are: alone and in models."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes
import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from cases import tree_close
from torch import Tensor, nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

import funcadapt as fa
from funcadapt.quantised import dequantised

IN, OUT = 64, 96


class Packed(nn.Module):
    """As the layers of GPTQ are: no `nn.Linear`, no `weight`, features in and out, buffers."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        scales = layer.weight.detach().abs().amax(1, keepdim=True) / 7
        self.register_buffer("qweight", (layer.weight.detach() / scales).round().to(torch.int32))
        self.register_buffer("scales", scales)
        self.register_buffer("bias", layer.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.qweight * self.scales, self.bias)


def _bits(kind: type[nn.Linear], **options: Any) -> Any:
    def make(layer: nn.Linear) -> nn.Module:
        made = kind(IN, OUT, **options)
        made.load_state_dict(layer.state_dict())
        return made.to("cpu")  # which quantises it

    return make


def _torchao(config: Any) -> Any:
    def make(layer: nn.Linear) -> nn.Module:
        model = nn.Sequential(layer)
        quantize_(model, config)
        return model[0]

    return make


# How a float layer is quantised, and how far the forward pass is from the product with the dequantised weight: kernels
# that work in 16 bits, or round the input, too.
LAYERS = {
    "nf4": (_bits(bitsandbytes.nn.Linear4bit, quant_type="nf4"), 1e-2),
    "fp4-nested": (_bits(bitsandbytes.nn.Linear4bit, quant_type="fp4", compress_statistics=True), 1e-2),
    "llm-int8": (_bits(bitsandbytes.nn.Linear8bitLt, has_fp16_weights=False), 3e-2),
    "torchao-int8": (_torchao(Int8WeightOnlyConfig()), 1e-5),
    "torchao-dynamic": (_torchao(Int8DynamicActivationInt8WeightConfig()), 3e-2),
    "packed": (Packed, 1e-5),
}


def _model(name: str) -> nn.Sequential:
    torch.manual_seed(0)
    layer = LAYERS[name][0](nn.Linear(IN, OUT))
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(OUT, 3)).requires_grad_(False)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("training", [True, False])
def test_the_dequantised_weight(name: str, training: bool) -> None:
    layer: Any = _model(name).train(training)[0]
    x, tolerance = torch.randn(5, IN), LAYERS[name][1]
    for _ in range(2):  # bitsandbytes repacks in the first forward pass
        found = F.linear(x, dequantised(layer), layer.bias)
        torch.testing.assert_close(found, layer(x), rtol=0, atol=tolerance)


METHODS = {
    "lora": fa.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False),
    "dora": fa.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False, use_dora=True),
    "boft": fa.BOFTConfig(boft_block_size=4, target_modules=["0"], init_weights=False),
    "osf": fa.OSFConfig(effective_rank=8, target_modules=["0"]),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("method", METHODS)
def test_transforms(name: str, method: str) -> None:
    """Gradients, per-sample gradients and jvp are those of the model with the dequantised weight, forward close."""
    model = _model(name).train()
    floats = nn.Sequential(nn.Linear(IN, OUT), *list(model)[1:])
    floats[0].weight, floats[0].bias = nn.Parameter(dequantised(model[0])), nn.Parameter(model[0].bias)  # type: ignore
    adapter = fa.init(model, METHODS[method])
    tree_close(adapter.params, fa.init(floats, METHODS[method]).params, rtol=0, atol=1e-4)
    x = torch.randn(4, IN)

    def loss(model: nn.Module, params: Any, x: Tensor) -> Tensor:
        return fa.functional_call(model, adapter.replace(params=params), (x,)).square().sum()

    per_sample = partial(torch.func.vmap, in_dims=(None, 0))
    close = partial(tree_close, rtol=1e-4, atol=1e-4)
    close(*(torch.func.grad(partial(loss, m))(adapter.params, x) for m in (model, floats)))
    close(*(per_sample(torch.func.grad(partial(loss, m)))(adapter.params, x) for m in (model, floats)))
    close(*(torch.func.jvp(partial(loss, m, adapter.params), (x,), (x,)) for m in (model, floats)))
    found, expected = (fa.functional_call(m, adapter, (x,)) for m in (model, floats))
    torch.testing.assert_close(found, expected, rtol=0, atol=3 * LAYERS[name][1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


def _load(folder: Path, **options: Any) -> Any:
    options = {"bnb_4bit_quant_type": "nf4", **options}
    config = transformers.BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.float32, **options)
    model = transformers.LlamaForCausalLM.from_pretrained(
        folder, quantization_config=config, device_map={"": "cpu"}, dtype=torch.float32
    )
    return model.train()


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's
@pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")
def test_a_quantised_model_of_transformers(folder: Path, tmp_path: Path, bits: str, use_dora: bool) -> None:
    model, ids = _load(folder, **{bits: True}), torch.randint(0, 64, (3, 7))
    config = fa.LoraConfig(
        r=4, target_modules="all-linear", init_lora_weights=False, use_dora=use_dora, task_type="CAUSAL_LM"
    )
    adapter = fa.init(model, config, expect=14)
    fa.save(adapter, tmp_path)
    theirs = peft.PeftModel.from_pretrained(_load(folder, **{bits: True}), tmp_path, is_trainable=True).train()
    expected = theirs(ids, labels=ids)
    torch.testing.assert_close(fa.functional_call(model, adapter, (ids,)).logits, expected.logits, rtol=0, atol=1e-5)

    def loss(params: Any, row: Tensor) -> Tensor:
        out = fa.functional_call(model, adapter.replace(params=params), (row[None],), {"labels": row[None]})
        return out.loss

    with fa.math_attention():
        rows = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(adapter.params, ids)
    expected.loss.backward()
    name = "base_model.model.model.layers.{}.self_attn.q_proj.lora_B.default.weight"
    for i in range(2):
        want = theirs.get_parameter(name.format(i)).grad
        found = rows[f"model.layers.{i}.self_attn.q_proj"]["lora_B"].mean(0)
        error = (found - want).norm() / want.norm()
        assert error < (2e-2 if bits == "load_in_8bit" else 1e-4), error  # LLM.int8 rounds its input to 8 bits


def test_dora_reads_a_repacked_weight(folder: Path) -> None:
    """bitsandbytes repacks a weight in the first forward in eval mode on processors with AVX512-BF16."""
    model, ids = _load(folder, load_in_4bit=True).eval(), torch.randint(0, 64, (3, 7))
    config = fa.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, use_dora=True)
    adapter = fa.init(model, config)
    floats = transformers.LlamaForCausalLM.from_pretrained(folder)
    for path, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            floats.get_submodule(path).weight.data = dequantised(module)
    expected = fa.functional_call(floats, adapter, (ids,)).logits
    for _ in range(2):
        found = fa.functional_call(model, adapter, (ids,)).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-2)
