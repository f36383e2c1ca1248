"""Pairs of a model and a config, and the models that PEFT and `funcadapt.peft` make of them."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import peft
import torch
from peft_tools import layer_model, logits, tiny, tokens
from torch import Tensor, nn

import funcadapt.peft as shim

LIBRARIES: tuple[Any, Any] = (peft, shim)
seed = torch.default_generator.manual_seed  # torch.manual_seed looks for CUDA, slowly


@dataclasses.dataclass(frozen=True)
class Pair:
    """A model and a config.

    Attributes:
        model: a layer kind of `layer_model`, or a model of `tiny`.
        name: what the config is about.
        method: "lora", "dora", "ia3" or "adalora".
        fields: the config's fields, less the targets of a layer kind.
        dtype: the base model's.
        autocast: whether adapters of a narrow base are widened, as `get_peft_model` does by default.
    """

    model: str
    name: str
    method: str
    fields: dict[str, Any]
    dtype: torch.dtype = torch.float32
    autocast: bool = True

    def __str__(self) -> str:
        return f"{self.model}-{self.method}-{self.name}"

    @property
    def exact(self) -> torch.dtype:
        """In which the numbers are compared: as wide as the model runs, unless narrow is the point."""
        if self.dtype == torch.bfloat16:
            return torch.bfloat16
        return torch.float32 if self.model == "mixtral" else torch.float64  # grouped_mm

    @property
    def rounded(self) -> tuple[str, ...]:
        """Parts of the keys of tensors that a formula gives, so that they agree but for rounding."""
        how = self.fields.get("init_lora_weights")
        found = ("lora_magnitude_vector",) if self.method == "dora" else ()
        return (*found, "base_layer.weight") if isinstance(how, str) and "pissa" in how else found


# -- the table --------------------------------------------------------------------------------------------

CONVOLUTIONS = ("conv1d", "conv2d", "conv2d_1x1", "conv2d_grouped", "conv3d")
PRODUCTS = ("linear", "linear_no_bias", "hf_conv1d")
LAYERS = (*PRODUCTS, "embedding", *CONVOLUTIONS)
PARAMETERS = ("experts", "transposed", "parameter")

LORA: dict[str, dict[str, Any]] = {
    "plain": {"r": 2},
    "alpha": {"r": 4, "lora_alpha": 5},
    "rslora": {"r": 2, "use_rslora": True, "lora_alpha": 3},
    "random": {"r": 2, "init_lora_weights": False},
    "gaussian": {"r": 2, "init_lora_weights": "gaussian"},
    "dropout": {"r": 2, "lora_dropout": 0.4},
    "bias_all": {"r": 2, "bias": "all"},
    "bias_only": {"r": 2, "bias": "lora_only"},
    "patterns": {"r": 2, "rank_pattern": {"layer": 4}, "alpha_pattern": {"inner.layer": 3}},
}
WITH_BIAS: dict[str, dict[str, Any]] = {
    "b": {"r": 2, "lora_bias": True},
    "b_random": {"r": 2, "lora_bias": True, "init_lora_weights": False},
}
INITS: dict[str, dict[str, Any]] = {
    how: {"r": 2, "init_lora_weights": how} for how in ("pissa", "pissa_niter_4", "olora", "orthogonal")
}
DORA: dict[str, dict[str, Any]] = {
    "plain": {"r": 2},
    "dropout": {"r": 2, "lora_dropout": 0.4},
    "random_rslora": {"r": 4, "use_rslora": True, "init_lora_weights": False},
}
ADALORA: dict[str, dict[str, Any]] = {
    "plain": {"init_r": 3, "target_r": 2, "total_step": 9, "tinit": 1, "tfinal": 1},
    "alpha": {"init_r": 3, "target_r": 1, "total_step": 4, "lora_alpha": 5, "lora_dropout": 0.3},
    "random": {"init_r": 2, "target_r": 1, "total_step": 9, "init_lora_weights": False, "lora_alpha": 1},
    "bias": {"init_r": 3, "target_r": 2, "total_step": 9, "bias": "all"},
}
IA3: dict[str, dict[str, Any]] = {
    "output": {"feedforward_modules": []},
    "input": {"feedforward_modules": ["layer"]},
    "output_random": {"feedforward_modules": [], "init_ia3_weights": False},
    "input_random": {"feedforward_modules": ["layer"], "init_ia3_weights": False},
}
QV = ["q_proj", "v_proj"]
WHOLE: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "default": {"r": 2},
        "names": {"r": 2, "target_modules": ["q_proj", "down_proj"]},
        "suffix": {"r": 2, "target_modules": ["self_attn.q_proj", "model.layers.1.mlp.up_proj"]},
        "all_linear": {"r": 2, "target_modules": "all-linear"},
        "all_linear_dropout": {"r": 2, "target_modules": "all-linear", "lora_dropout": 0.3, "use_rslora": True},
        "regex": {"r": 2, "target_modules": r".*\.layers\.1\..*_proj"},
        "excluded": {"r": 2, "target_modules": [*QV, "o_proj"], "exclude_modules": ["layers.0.self_attn.o_proj"]},
        "excluded_regex": {"r": 2, "target_modules": QV, "exclude_modules": r".*\.1\..*q_proj"},
        "layers": {"r": 2, "target_modules": QV, "layers_to_transform": [1]},
        "layers_pattern": {"r": 2, "target_modules": QV, "layers_to_transform": 0, "layers_pattern": "layers"},
        "patterns": {
            "r": 2,
            "target_modules": [*QV, "o_proj"],
            "rank_pattern": {"q_proj": 4, r"^model.layers.1.self_attn.v_proj": 1},
            "alpha_pattern": {r"layers\.0.*v_proj": 1, "o_proj": 7},
        },
        "head": {"r": 2, "target_modules": ["lm_head"]},
        "embedding": {"r": 2, "target_modules": ["embed_tokens", "q_proj"]},
        "saved_head": {"r": 2, "target_modules": QV, "modules_to_save": ["lm_head"]},
        "saved_two": {"r": 2, "target_modules": QV, "modules_to_save": ["embed_tokens", "norm"]},
        "saved_regex": {"r": 2, "target_modules": QV, "modules_to_save": ["layers.1.mlp"]},
        "tokens": {"r": 2, "target_modules": QV, "trainable_token_indices": [0, 3, 9]},
        "tokens_of": {"r": 2, "trainable_token_indices": {"embed_tokens": [1], "lm_head": [2, 30]}},
        "tokens_saved": {"r": 2, "trainable_token_indices": [5], "modules_to_save": ["lm_head"]},
        "pissa": {"r": 2, "target_modules": QV, "init_lora_weights": "pissa"},
        "olora": {"r": 2, "target_modules": QV, "init_lora_weights": "olora"},
        "orthogonal": {"r": 2, "target_modules": QV, "init_lora_weights": "orthogonal"},
        "b": {"r": 2, "target_modules": QV, "lora_bias": True},
        "optimised": {
            "r": 2,
            "target_modules": [f"model.layers.{i}.self_attn.{n}_proj" for i in (0, 1) for n in "qkvo"]
            + [f"model.layers.{i}.mlp.{n}_proj" for i in (0, 1) for n in ("up", "down", "gate")]
            + [f"model.layers.{i}.self_attn.rotary{n}" for i in (0, 1) for n in range(6)],
        },
    },
    "llama_tied": {
        "default": {"r": 2},
        "both": {"r": 2, "target_modules": ["embed_tokens", "lm_head"]},
        "saved_embedding": {"r": 2, "target_modules": QV, "modules_to_save": ["embed_tokens"]},
        "saved_head": {"r": 2, "target_modules": QV, "modules_to_save": ["lm_head"]},
        "tokens": {"r": 2, "target_modules": QV, "trainable_token_indices": [0, 3, 9]},
        "tokens_of": {"r": 2, "target_modules": QV, "trainable_token_indices": {"embed_tokens": [4, 2]}},
        "tokens_both": {"r": 2, "target_modules": QV, "trainable_token_indices": {"embed_tokens": [4], "lm_head": [4]}},
    },
    "llama_cls": {
        "score": {"r": 2, "target_modules": QV, "modules_to_save": ["score"]},
        "all_linear": {"r": 2, "target_modules": "all-linear"},
    },
    "gpt2": {
        "default": {"r": 2},
        "all_linear": {"r": 2, "target_modules": "all-linear"},
        "bias_all": {"r": 2, "target_modules": ["c_proj"], "bias": "all"},
        "bias_only": {"r": 2, "target_modules": ["c_proj"], "bias": "lora_only"},
        "fan": {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True},
        "positions": {"r": 2, "target_modules": ["wpe", "c_fc"]},
        "saved": {"r": 2, "modules_to_save": ["ln_f", "wte"]},
        "tokens": {"r": 2, "trainable_token_indices": [2, 11]},
        "pissa": {"r": 2, "target_modules": ["c_attn", "c_proj"], "init_lora_weights": "pissa"},
        "random": {"r": 4, "target_modules": ["c_attn"], "init_lora_weights": False, "lora_bias": True},
    },
    "bert": {
        "default": {"r": 2},
        "all_linear": {"r": 2, "target_modules": "all-linear"},
        "bias_all": {"r": 2, "bias": "all"},
        "bias_only": {"r": 2, "bias": "lora_only"},
        "embeddings": {"r": 2, "target_modules": ["word_embeddings", "position_embeddings", "decoder"]},
        "saved": {"r": 2, "modules_to_save": ["predictions.transform"]},
        "bias_saved": {"r": 2, "bias": "all", "modules_to_save": ["pooler", "transform"]},
        "tokens": {"r": 2, "trainable_token_indices": [3, 4, 5]},
    },
    "bert_cls": {
        "classifier": {"r": 2, "target_modules": ["query"], "modules_to_save": ["classifier"]},
        "dense": {"r": 2, "target_modules": ["output.dense"], "bias": "lora_only"},
    },
    "t5": {
        "default": {"r": 2},
        "all_linear": {"r": 2, "target_modules": "all-linear"},
        "shared": {"r": 2, "target_modules": ["shared", "q"]},
        "tokens": {"r": 2, "trainable_token_indices": [7, 8]},
    },
    "opt": {
        "default": {"r": 2},
        "bias_all": {"r": 2, "bias": "all"},
        "bias_only": {"r": 2, "bias": "lora_only"},
        "layers": {"r": 2, "target_modules": ["fc1"], "layers_to_transform": [0]},
        "saved": {"r": 2, "modules_to_save": ["final_layer_norm"]},
        "tokens": {"r": 2, "trainable_token_indices": [7, 8]},
    },
    "mixtral": {
        "names": {"r": 2, "target_modules": QV},
        "parameters": {"r": 2, "target_modules": [], "target_parameters": ["gate_up_proj", "experts.down_proj"]},
        "one_parameter": {"r": 2, "target_modules": QV, "target_parameters": ["mlp.experts.down_proj"]},
        "router": {"r": 2, "target_modules": QV, "target_parameters": ["gate.weight"]},
    },
}
WHOLE_DORA: dict[str, dict[str, dict[str, Any]]] = {
    model: {name: WHOLE[model][name] for name in names}
    for model, names in {
        "llama": ("default", "all_linear_dropout", "patterns", "embedding", "tokens"),
        "gpt2": ("default", "bias_all", "positions"),
        "bert": ("default", "bias_only"),
        "t5": ("shared",),
    }.items()
}
WHOLE_IA3: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "default": {},
        "named": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
        "all_linear": {"target_modules": "all-linear", "feedforward_modules": []},
        "regex": {"target_modules": r".*_proj", "feedforward_modules": r".*down_proj"},
        "excluded": {"target_modules": QV, "feedforward_modules": [], "exclude_modules": ["layers.1.self_attn.q_proj"]},
        "random": {"init_ia3_weights": False},
        "saved": {"modules_to_save": ["lm_head"]},
    },
    "gpt2": {
        "default": {},
        "named": {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"]},
    },
    "bert": {"default": {}},
    "t5": {"default": {}},
    "opt": {"default": {}},
}
WHOLE_ADALORA: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "default": ADALORA["plain"],
        "all_linear": {**ADALORA["plain"], "target_modules": "all-linear"},
        "saved": {**ADALORA["plain"], "modules_to_save": ["lm_head"]},
    },
    "gpt2": {"default": ADALORA["plain"]},
    "bert": {"default": {**ADALORA["plain"], "lora_dropout": 0.2}, "bias": ADALORA["bias"]},
    "opt": {"default": ADALORA["plain"]},
}


def _pairs() -> Iterator[Pair]:
    for kind in LAYERS:
        for name, fields in LORA.items():
            yield Pair(kind, name, "lora", fields)
        for name, fields in WITH_BIAS.items() if kind != "embedding" else ():
            yield Pair(kind, name, "lora", fields)
        for name, fields in DORA.items() if kind != "conv2d_grouped" else ():
            yield Pair(kind, name, "dora", fields)
        yield Pair(kind, "bf16", "lora", {"r": 2}, torch.bfloat16)
        yield Pair(kind, "bf16_narrow", "lora", {"r": 2}, torch.bfloat16, autocast=False)
    for kind in PRODUCTS:
        for name, fields in ADALORA.items():
            yield Pair(kind, name, "adalora", fields)
        for name, fields in INITS.items():
            if (kind, name) != ("hf_conv1d", "olora"):  # B15
                yield Pair(kind, name, "lora", fields)
    for kind in PARAMETERS:
        for name in ("plain", "alpha", "rslora", "random", "gaussian", "bias_all"):
            yield Pair(kind, name, "lora", LORA[name])
    for kind in (*PRODUCTS, "conv2d", "conv2d_1x1", "conv2d_grouped", "conv3d"):
        for name, fields in IA3.items():
            yield Pair(kind, name, "ia3", fields)
    for method, table in (("lora", WHOLE), ("dora", WHOLE_DORA), ("ia3", WHOLE_IA3), ("adalora", WHOLE_ADALORA)):
        for model, named in table.items():
            for name, fields in named.items():
                yield Pair(model, name, method, fields)
    for model in ("llama", "gpt2", "mixtral"):
        fields = {"r": 2, "target_modules": QV} if model == "mixtral" else {"r": 2}
        yield Pair(model, "bf16", "lora", fields, torch.bfloat16)
    yield Pair("llama", "bf16_saved", "lora", {"r": 2, "modules_to_save": ["lm_head"]}, torch.bfloat16)
    yield Pair("llama", "bf16_tokens", "lora", {"r": 2, "trainable_token_indices": [3]}, torch.bfloat16)
    yield Pair("llama", "bf16", "ia3", {}, torch.bfloat16)


PAIRS = list(_pairs())

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 8 * 2**-7}


# -- twins ------------------------------------------------------------------------------------------------


@functools.cache
def original(name: str) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """A base model, its inputs, and the fields that target it."""
    if name in (*LAYERS, *PARAMETERS, "mha"):
        model, x, target = layer_model(name)
        return model.eval(), {"x": x}, target
    return tiny(name), tokens(name), {}


def fresh(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A copy of a base model. Configs are shared, which nothing changes."""
    base: Any = original(name)[0]
    shared = [getattr(base, field, None) for field in ("config", "generation_config")]
    return copy.deepcopy(base, {id(value): value for value in shared if value is not None}).to(dtype)


def config_of(library: Any, method: str, fields: dict[str, Any]) -> Any:
    fields = copy.deepcopy(fields)  # PEFT writes into what it is given
    if method == "ia3":
        return library.IA3Config(**fields)
    if method == "adalora":
        return library.AdaLoraConfig(**fields)
    return library.LoraConfig(**fields, use_dora=method == "dora")


class Twins:
    """A model with an adapter, as PEFT makes it and as we do.

    Attributes:
        theirs: PEFT's `PeftModel`.
        ours: the shim's.
        bare: the output of the base model, once it is as wide as it gets.
    """

    bare: Tensor

    def __init__(self, pair: Pair) -> None:
        _, self.inputs, self.target = original(pair.model)
        self.pair = pair
        made: list[Any] = []
        for library in LIBRARIES:
            seed(3)
            config = config_of(library, pair.method, {**self.target, **pair.fields})
            made.append(
                library.get_peft_model(fresh(pair.model, pair.dtype), config, autocast_adapter_dtype=pair.autocast)
            )
        self.theirs, self.ours = made

    def run(self, model: nn.Module) -> Tensor:
        dtype = next(model.parameters()).dtype
        inputs = {key: x.to(dtype) if x.is_floating_point() else x for key, x in self.inputs.items()}
        return logits(model(**inputs))

    def both(self, act: Callable[[Any], Any] | None = None) -> tuple[Any, Any]:
        return (act or self.run)(self.theirs), (act or self.run)(self.ours)

    def widen(self) -> None:
        """Everything in the widest dtype, and equal, and the output without the adapter noted."""
        if self.pair.exact == torch.float64:
            self.both(lambda model: model.double())
        self.ours.load_state_dict(self.theirs.state_dict())  # what is rounded otherwise
        with self.ours.disable_adapter(), torch.no_grad():
            self.bare = self.run(self.ours)

    def saved(self, **kwargs: Any) -> list[dict[str, Tensor]]:
        """What a checkpoint has of an adapter, copied: theirs, ours."""
        both = zip(LIBRARIES, (self.theirs, self.ours), strict=True)
        found = [library.get_peft_model_state_dict(model, **kwargs) for library, model in both]
        return [{key: value.clone() for key, value in tensors.items()} for tensors in found]

    def randomise(self, number: int = 5) -> None:
        """The same random numbers in everything that adapters have."""
        for model in (self.theirs, self.ours):
            generator = torch.Generator().manual_seed(number)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if parameter.requires_grad or ".other" in name:
                        parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))

    def close(self, theirs: Any, ours: Any) -> None:
        size = max((t.abs().max().item() for t in _tensors(theirs)), default=1.0)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=max(1.0, size) * TOLERANCE[self.pair.exact])


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, dict):
        yield from (item for item in value.values() if item is not None)
    else:
        yield value


def flags(model: nn.Module) -> list[tuple[str, bool]]:
    return [(name, p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)]


def ordered_flags(model: nn.Module) -> list[tuple[str, bool]]:
    """In an order of their own: a forward pass of PEFT's parametrisations changes that of a module's parameters."""
    return sorted(flags(model))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def surface(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What the layers say about their adapters."""
    names = ("r", "lora_alpha", "scaling", "active_adapters", "merged_adapters", "in_features", "out_features")
    found = {path: m for path, m in model.named_modules() if hasattr(m, "adapter_layer_names") and hasattr(m, "merged")}
    return {path: {name: getattr(m, name, None) for name in names} for path, m in found.items()}
