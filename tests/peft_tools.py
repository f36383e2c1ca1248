"""Tiny models, and the way between PEFT and funcadapt, for the tests that compare the two."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
import torch.nn.functional as F
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from torch import nn
from transformers.pytorch_utils import Conv1D

import funcadapt as fa

# What PEFT fills in by itself when it writes a config, and which never changes a result.
BOOKKEEPING = ("auto_mapping", "base_model_name_or_path", "peft_version", "inference_mode")


class Net(nn.Module):
    """A layer of some kind at `inner.layer`, between things that no test targets by accident."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"layer": layer})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.inner["layer"](x))


class Attend(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attn(x, x, x, need_weights=False)[0]


class Experts(nn.Module):
    """Parameters registered in an order that is not the alphabet's, so that PEFT's nesting order shows."""

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 5, 4))
        self.down = nn.Parameter(torch.randn(3, 4, 5))
        self.mix = nn.Parameter(torch.randn(4, 4))
        self.is_transposed = transposed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up, down = (self.down, self.up) if self.is_transposed else (self.up, self.down)
        eq = ("...i,eio->e...o", "e...i,eio->...o") if self.is_transposed else ("...i,eoi->e...o", "e...i,eoi->...o")
        return F.linear(torch.einsum(eq[1], torch.tanh(torch.einsum(eq[0], x, up)), down), self.mix)


def layer_model(kind: str) -> tuple[nn.Module, torch.Tensor, dict[str, Any]]:
    """A model with one layer of a kind, an input, and the config fields that target the layer."""
    torch.manual_seed(0)
    target: dict[str, Any] = {"target_modules": ["layer"]}
    if kind in ("experts", "transposed", "parameter"):
        names = {"parameter": ["layer.mix"]}.get(kind, ["layer.down", "layer.up"])
        return Net(Experts(kind == "transposed")), torch.randn(3, 4), {"target_modules": [], "target_parameters": names}
    if kind == "mha":
        return Attend(), torch.randn(2, 3, 8), {"target_modules": ["attn"]}
    layers: dict[str, Any] = {
        "linear": (lambda: nn.Linear(6, 5), torch.randn(3, 2, 6)),
        "linear_no_bias": (lambda: nn.Linear(6, 5, bias=False), torch.randn(3, 6)),
        "hf_conv1d": (lambda: Conv1D(5, 6), torch.randn(3, 2, 6)),
        "embedding": (lambda: nn.Embedding(11, 6, padding_idx=1), torch.randint(11, (3, 4))),
        "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), torch.randn(2, 4, 9)),
        "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=2, padding=1), torch.randn(2, 4, 7, 6)),
        "conv2d_1x1": (lambda: nn.Conv2d(4, 6, 1), torch.randn(2, 4, 7, 6)),
        "conv2d_grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), torch.randn(2, 4, 7, 6)),
        "conv3d": (lambda: nn.Conv3d(2, 4, 2, padding=1), torch.randn(2, 2, 4, 3, 5)),
    }
    make, x = layers[kind]
    return Net(make()), x, target


def tiny(name: str, seed: int = 0) -> nn.Module:
    """A randomly initialised model of a transformers family, in eval mode."""
    import transformers as tf

    torch.manual_seed(seed)
    common: dict[str, Any] = {"vocab_size": 32}
    llama = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1, "max_position_embeddings": 32}  # fmt: skip
    bert = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
            "max_position_embeddings": 32}  # fmt: skip
    make: dict[str, Any] = {
        "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**common, **llama)),
        "llama_tied": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**common, **llama, tie_word_embeddings=True)),
        "llama_cls": lambda: tf.LlamaForSequenceClassification(tf.LlamaConfig(**common, **llama, pad_token_id=0)),
        "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**common, **llama, num_local_experts=3)),
        "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**common, n_positions=32, n_embd=16, n_layer=2, n_head=2)),
        "bert": lambda: tf.BertForMaskedLM(tf.BertConfig(**common, **bert)),
        "bert_cls": lambda: tf.BertForSequenceClassification(tf.BertConfig(**common, **bert)),
        "t5": lambda: tf.T5ForConditionalGeneration(
            tf.T5Config(**common, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
        ),
        "opt": lambda: tf.OPTForCausalLM(
            tf.OPTConfig(
                **common,
                hidden_size=16,
                ffn_dim=24,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=32,
                word_embed_proj_dim=16,
            )
        ),
    }
    model = make[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and name != "t5":
                parameter.mul_(5)  # transformers' init is so small that the layers hardly matter
    model.config.name_or_path = model.name_or_path = ""
    return model


def tokens(name: str) -> dict[str, torch.Tensor]:
    """The inputs of a tiny model."""
    ids = torch.randint(2, 32, (2, 6), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "decoder_input_ids": ids} if name == "t5" else {"input_ids": ids}


def randomise(model: nn.Module, seed: int = 5) -> None:
    """Random numbers in everything that PEFT trains, so that no adapter is the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                parameter.add_(0.3 * noise.to(parameter.dtype))


def wrap(model: nn.Module, config: peft.PeftConfig, **kwargs: Any) -> peft.PeftModel:
    """`get_peft_model` with random adapter weights, PEFT's own warnings aside."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, config, **kwargs)
    randomise(wrapped)
    return wrapped.eval()


def peft_save(wrapped: peft.PeftModel, folder: Path, **kwargs: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.save_pretrained(folder, **kwargs)
    return folder


def peft_load(model: nn.Module, folder: Path) -> peft.PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(model, folder).eval()


def configs(method: str, **fields: Any) -> tuple[Any, Any]:
    """The same config, PEFT's and ours."""
    if method == "ia3":
        return peft.IA3Config(**fields), fa.IA3Config(**fields)
    if method == "dora":
        fields["use_dora"] = True
    return peft.LoraConfig(**fields), fa.LoraConfig(**fields)


def raw(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint's file."""
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def config_file(folder: Path) -> dict[str, Any]:
    """The config of a checkpoint, less what PEFT keeps for itself."""
    values = json.loads((folder / "adapter_config.json").read_text())
    for key in ("target_modules", "exclude_modules", "feedforward_modules", "target_parameters"):
        if isinstance(values.get(key), list):
            values[key] = sorted(values[key])  # sets in PEFT, in any order
    return {k: v for k, v in values.items() if k not in BOOKKEEPING}


def same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """The same keys, and bit for bit the same tensors."""
    assert sorted(a) == sorted(b)
    for key in a:
        assert a[key].dtype == b[key].dtype, key
        assert a[key].shape == b[key].shape, key
        assert torch.equal(a[key], b[key]), key


def same_adapters(a: fa.Adapter, b: fa.Adapter) -> None:
    """Equal configs and bit for bit equal trees."""
    assert a.config == b.config
    for one, other in ((a.params, b.params), (a.buffers, b.buffers)):
        assert sorted(one) == sorted(other)
        for path in one:
            same_tensors(dict(one[path]), dict(other[path]))


def logits(output: Any) -> torch.Tensor:
    return output.logits if hasattr(output, "logits") else output


def attention_truth(model: nn.Module, adapter: fa.Adapter, x: torch.Tensor) -> torch.Tensor:
    """What a LoRA on `Attend` must give: torch's own attention with each weight adapted once (PEFT defect B1)."""
    dense = {}
    for path, weight in (("attn.in_proj_weight", "attn.in_proj_weight"), ("attn.out_proj", "attn.out_proj.weight")):
        p = adapter.leaves(path)
        delta = p["scaling"] * p["lora_B"] @ p["lora_A"]
        dense[weight] = model.get_parameter(weight) + delta
    return torch.func.functional_call(model, dense, (x,)).detach()


def peft_sites(wrapped: nn.Module) -> dict[str, tuple[int, float]]:
    """The paths that PEFT adapted, in our names, with rank and scaling (0 where the method has none)."""
    from peft.tuners.lora.layer import LoraLayer, ParamWrapper
    from peft.tuners.tuners_utils import BaseTunerLayer

    found: dict[str, tuple[int, float]] = {}
    for name, module in wrapped.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        path = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if isinstance(module, ParamWrapper):
            path += f".{module.parameter_name}"
        if isinstance(module.get_base_layer(), nn.MultiheadAttention):
            path += ".in_proj_weight"
        lora = isinstance(module, LoraLayer)
        found[path] = (module.r["default"], module.scaling["default"]) if lora else (0, 0.0)
    return found


def our_sites(model: nn.Module, config: Any, **kwargs: Any) -> dict[str, tuple[int, float]]:
    """The same for funcadapt."""
    adapter = fa.init(model, config, **kwargs)
    method = fa.method_of(adapter.config)
    found: dict[str, tuple[int, float]] = {}
    for path, leaves in adapter.params.items():
        if any(name in method.keys for name in leaves):
            every = adapter.leaves(path)
            found[path] = (adapter.config.rank(every), float(every["scaling"]) if "scaling" in every else 0.0)
    return found


__all__ = [name for name in dir() if not name.startswith("_")] + ["get_peft_model_state_dict"]
