"""`funcadapt.peft.utils` against `peft.utils`: names, constants and helpers."""

from __future__ import annotations

import copy
import importlib
import inspect
import sys
import threading
from types import ModuleType, SimpleNamespace
from typing import Any

import peft
import peft.utils
import peft.utils.constants
import peft.utils.integrations
import peft.utils.other
import pytest
import torch
from torch import nn

import funcadapt as fa
import funcadapt.peft.utils as utils
import funcadapt.peft.utils.constants as constants
import funcadapt.peft.utils.integrations as integrations
import funcadapt.peft.utils.other as other
import funcadapt.peft.utils.quantization_utils as quantization_utils

# What puts wrappers into a model, which only a tuner of PEFT calls.
NOT_THERE = {"_set_trainable", "set_additional_trainable_modules"}


# -- names ------------------------------------------------------------------------------------------------------


def test_every_name_of_peft_utils_is_there() -> None:
    assert set(peft.utils.__all__) - set(utils.__all__) == NOT_THERE
    for name in utils.__all__:
        assert getattr(utils, name) is not None
        assert name in dir(utils)
    scope: dict[str, Any] = {}
    exec("from funcadapt.peft.utils import *", scope)
    assert set(utils.__all__) <= set(scope)
    with pytest.raises(AttributeError, match="no_such_name"):
        getattr(utils, "no_such_name")
    with pytest.raises(AttributeError, match="no_such_name"):
        getattr(other, "no_such_name")


def test_constants_are_those_of_peft() -> None:
    for name, want in vars(peft.utils.constants).items():
        if name.isupper():
            assert getattr(constants, name) == want, name
            assert getattr(other, name) == want, name
    tables = [name for name in vars(constants) if name.startswith("TRANSFORMERS_")]
    assert set(tables) == {name for name in vars(peft.utils.constants) if name.startswith("TRANSFORMERS_")}
    constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING["llama"].append("x")
    try:  # a copy: what is changed in it changes no default
        assert fa.LoraConfig().for_model("llama").target_modules == ("q_proj", "v_proj")
    finally:
        constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING["llama"].pop()


@pytest.mark.parametrize("module", ["other", "integrations", "quantization_utils", "loftq_utils"])
def test_signatures_are_those_of_peft(module: str) -> None:
    ours, theirs = (importlib.import_module(f"{root}.utils.{module}") for root in ("funcadapt.peft", "peft"))
    compared = 0
    for name, function in vars(theirs).items():
        if inspect.isfunction(function) and function.__module__ == theirs.__name__ and hasattr(ours, name):
            want, got = (list(inspect.signature(f).parameters.items()) for f in (function, getattr(ours, name)))
            assert [(n, p.default, p.kind) for n, p in got] == [(n, p.default, p.kind) for n, p in want], name
            compared += 1
    assert compared >= 2


def test_errors_are_caught_under_peft_s_names() -> None:
    for cls in (utils.NoMatchingPeftModuleError, utils.PeftError, ValueError):
        with pytest.raises(cls):
            fa.sites(nn.ModuleDict({"up": nn.Linear(2, 2)}), fa.LoraConfig(target_modules=["down"]))
    assert issubclass(utils.PeftWarning, UserWarning)


def test_what_is_not_done_says_so() -> None:
    with pytest.raises(ValueError, match="bitsandbytes"):
        utils.replace_lora_weights_loftq(nn.Linear(2, 2))
    for cls in (NotImplementedError, ValueError):
        with pytest.raises(cls, match="prompt learning"):
            utils._prepare_prompt_learning_config(peft.PrefixTuningConfig(), {})


# -- modules, names, tokens -------------------------------------------------------------------------------------


def test_submodules() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 3)))
    for key in ("0.0", "0"):
        assert utils._get_submodules(model, key) == peft.utils._get_submodules(model, key)
        assert other._get_submodules_with_grandparent(model, key) == peft.utils.other._get_submodules_with_grandparent(
            model, key
        )
    with pytest.raises(AttributeError):
        utils._get_submodules(model, "0.7")


def test_freezing_an_adapter_is_about_its_name_alone() -> None:
    model = peft.get_peft_model(nn.ModuleDict({"default_block": nn.Linear(2, 2)}), _lora("default_block"), "ault")
    assert peft.utils.other._freeze_adapter(copy.deepcopy(model), "ault") is None
    model.add_adapter("other", _lora("default_block"))
    for parameter in model.parameters():
        parameter.requires_grad = True
    utils._freeze_adapter(model, "ault")
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {f"base_model.model.default_block.lora_{x}.ault.weight" for x in "AB"}
    theirs = copy.deepcopy(model)  # PEFT: every name with these letters in it
    peft.utils.other._freeze_adapter(theirs, "ault")
    assert not any(p.requires_grad for p in theirs.parameters())


def _lora(*names: str) -> peft.LoraConfig:
    return peft.LoraConfig(r=2, target_modules=list(names))


def test_leaves_alone_are_frozen() -> None:
    layer = nn.Linear(2, 2)
    other._set_layer_requires_grad(layer, False)
    assert not any(p.requires_grad for p in layer.parameters())
    derived = torch.ones(2, requires_grad=True) * 2
    other._set_layer_requires_grad(derived, False)
    assert derived.requires_grad


def test_the_input_embedding_is_found(llama: nn.Module) -> None:
    for model in (llama, nn.Linear(2, 2)):
        for default in (None, "x"):
            want = peft.utils.other._get_input_embeddings_name(model, default)
            assert utils._get_input_embeddings_name(model, default) == want


def test_the_active_adapter_of_modules_that_are_saved() -> None:
    model = nn.Sequential(utils.ModulesToSaveWrapper(nn.Linear(2, 2), "a"), nn.Linear(2, 2))
    model[0].update("b")
    for names, want in ((["b"], ["b"]), (["a", "c"], ["a"]), ("b", ["b"]), (["c"], [])):
        utils._set_adapter(model, names)
        assert model[0].active_adapters == want
    assert isinstance(model[0], other.AuxiliaryTrainingWrapper)


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_transpose(fan_in_fan_out: bool) -> None:
    for weight in (torch.randn(2, 3), nn.Parameter(torch.randn(2, 3))):
        got, want = (library.transpose(weight, fan_in_fan_out) for library in (utils, peft.utils))
        assert torch.equal(got, want)
        assert type(got) is type(want)


def test_patterns() -> None:
    keys = ["k_proj", r"layers\.0\..*", "q_proj", ""]
    for path in ("q_proj", "layers.0.q_proj", "layers.1.q_proj", "xq_proj", "a.layers.0.b", "v", "a."):
        assert other.get_pattern_key(keys, path) == peft.utils.other.get_pattern_key(keys, path)
        assert utils._is_valid_match(path, "q_proj") == peft.utils._is_valid_match(path, "q_proj")
        assert bool(other.match_target_against_key(".*q_proj", path)) == path.endswith("q_proj")


def test_storage_and_device() -> None:
    weight = torch.randn(4, 4)
    assert utils.id_tensor_storage(weight[1:]) == peft.utils.id_tensor_storage(weight)
    assert utils.infer_device() == peft.utils.infer_device()
    for value in ("yes", "0", "True", "OFF"):
        assert other.str_to_bool(value) == peft.utils.other.str_to_bool(value)
    with pytest.raises(ValueError, match="maybe"):
        other.str_to_bool("maybe")


def test_tokens() -> None:
    ids = torch.tensor([[4, -100, 6, 7], [-100, 2, 3, 1]])
    assert torch.equal(utils.shift_tokens_right(ids, 0, 9), peft.utils.shift_tokens_right(ids, 0, 9))
    with pytest.raises(ValueError, match="pad_token_id"):
        utils.shift_tokens_right(ids, None, 9)  # type: ignore[arg-type]
    assert utils._get_batch_size(ids, None) == utils._get_batch_size(None, torch.zeros(2, 4, 8)) == 2
    with pytest.raises(ValueError, match="input_ids"):
        utils._get_batch_size(None, None)


def test_prefixes_of_old_models() -> None:
    layers = [torch.randn(2, 3, 4, 5, 6) for _ in range(4)]
    got, want = (lib.bloom_model_postprocess_past_key_value(layers) for lib in (utils, peft.utils))
    assert len(got) == len(want) == 4
    for ours, theirs in zip(got, want, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    past = [torch.randn(2, 3, 1, 5, 6) for _ in range(2)]
    got = constants.starcoder_model_postprocess_past_key_value(past)
    want = peft.utils.constants.starcoder_model_postprocess_past_key_value(past)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_file_on_the_hub_when_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert other.check_file_exists_on_hf_hub("a/b", "config.json") is None
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    answers = {"yes": True, "no": False}
    monkeypatch.setattr("huggingface_hub.file_exists", lambda repo, file, **_: answers[file])
    assert other.check_file_exists_on_hf_hub("a/b", "yes") is True
    assert other.check_file_exists_on_hf_hub("a/b", "no") is False
    with pytest.warns(UserWarning, match="Unable to fetch remote file"):
        assert other.check_file_exists_on_hf_hub("a/b", "broken") is None


# -- preparing --------------------------------------------------------------------------------------------------


def test_casting_for_mixed_precision() -> None:
    ours = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).half())
    ours[0].requires_grad_(False)
    theirs = copy.deepcopy(ours)
    utils.cast_mixed_precision_params(ours, torch.bfloat16)
    peft.utils.cast_mixed_precision_params(theirs, torch.bfloat16)
    assert [p.dtype for p in ours.parameters()] == [p.dtype for p in theirs.parameters()]


PEFT_USES_OLD_NAMES = pytest.mark.filterwarnings(r"ignore:`(is_)?gradient_checkpointing.*deprecated:FutureWarning")


@PEFT_USES_OLD_NAMES
@pytest.mark.parametrize("method", [None, "gptq", "bitsandbytes"])
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("options", [None, {"use_reentrant": False}])
def test_preparing_for_kbit_training(llama: nn.Module, method: Any, checkpointing: bool, options: Any) -> None:
    models = []
    for library in (utils, peft.utils):
        model: Any = copy.deepcopy(llama).to(torch.bfloat16).requires_grad_(True)
        model.lm_head.float()
        if method:
            model.quantization_method = method
        if method == "bitsandbytes":
            model.is_loaded_in_4bit = True
        assert library.prepare_model_for_kbit_training(model, checkpointing, options) is model
        models.append(model)
    ours, theirs = models
    assert [(p.dtype, p.requires_grad) for p in ours.parameters()] == [
        (p.dtype, p.requires_grad) for p in theirs.parameters()
    ]
    assert ours.is_activation_checkpointing == theirs.is_activation_checkpointing
    hooks = [len(m.get_input_embeddings()._forward_hooks) for m in models]
    assert hooks[0] == hooks[1]


def test_checkpointing_under_its_present_name(llama: nn.Module) -> None:
    model: Any = copy.deepcopy(llama)
    model.quantization_method = "gptq"
    utils.prepare_model_for_kbit_training(model)  # without transformers' warning, which would be an error here
    assert model.is_activation_checkpointing


def test_checkpointing_of_a_model_that_takes_no_options() -> None:
    class Old(nn.Module):
        is_loaded_in_8bit = True
        on = False

        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(3, 2)

        def get_input_embeddings(self) -> nn.Module:
            return self.embed

        def gradient_checkpointing_enable(self) -> None:
            self.on = True

    model = Old()
    with pytest.warns(FutureWarning, match="gradient_checkpointing_kwargs"):
        utils.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": True})
    assert model.on
    assert model.embed(torch.tensor([1])).requires_grad


@PEFT_USES_OLD_NAMES
def test_fsdp_wraps_blocks_and_trained_leaves(llama: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    model = peft.get_peft_model(copy.deepcopy(llama), _lora("q_proj"))
    ours, theirs = utils.fsdp_auto_wrap_policy(model), peft.utils.other.fsdp_auto_wrap_policy(model)
    wrapped = set()
    for name, module in model.named_modules():
        for recurse in (True, False):
            got = ours(module, recurse=recurse, nonwrapped_numel=1)
            assert got == theirs(module, recurse=recurse, nonwrapped_numel=1), name
        wrapped |= {type(module).__name__} if got else set()
    assert wrapped == {"LlamaDecoderLayer", "Linear"}
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "LlamaMLP")
    assert utils.fsdp_auto_wrap_policy(model)(model.base_model.model.model.layers[0].mlp, False, 1)
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "NoSuchBlock")
    with pytest.raises(TypeError, match="NoSuchBlock"):
        utils.fsdp_auto_wrap_policy(model)


def test_quantization_configs() -> None:
    model: Any = nn.Linear(2, 2)
    assert utils.get_quantization_config(model, "gptq") is None
    model.quantization_method, model.config = "gptq", SimpleNamespace(quantization_config={"bits": 4})
    for method in ("gptq", "awq"):
        assert utils.get_quantization_config(model, method) == peft.utils.get_quantization_config(model, method)
    assert utils.get_gptqmodel_quant_linear(None) is None
    assert utils.get_gptqmodel_quant_linear(SimpleNamespace(bits=4)) is None  # GPT-QModel is not installed
    assert not other.is_gptqmodel_quant_linear(model)
    assert utils.get_auto_gptq_quant_linear is utils.get_gptqmodel_quant_linear


# -- quantised layers, meta device ------------------------------------------------------------------------------


def test_weights_in_floating_point() -> None:
    layer: Any = nn.Linear(2, 2)
    assert integrations.dequantize_module_weight(layer) is layer.weight
    hqq: Any = nn.Module()
    hqq.W_q, hqq.dequantize = torch.zeros(1), lambda: torch.ones(2)
    assert torch.equal(integrations.dequantize_module_weight(hqq), torch.ones(2))
    with pytest.raises(TypeError, match="no tensor"):
        integrations.dequantize_module_weight(SimpleNamespace(weight=[1]))  # type: ignore[arg-type]


def _fake_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> tuple[type, type, ModuleType]:
    class Int8Params(nn.Parameter):
        SCB: Any = None

    class Params4bit(nn.Parameter):
        quant_state: Any = 3.0

    library = ModuleType("bitsandbytes")
    library.functional = SimpleNamespace(dequantize_4bit=lambda data, state: data.float() * state)
    monkeypatch.setitem(sys.modules, "bitsandbytes", library)
    return Int8Params, Params4bit, library


def test_weights_of_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    int8, four, _ = _fake_bitsandbytes(monkeypatch)
    layer: Any = nn.Linear(2, 2)
    layer.weight = four(torch.ones(2, 2), requires_grad=False)
    assert integrations.get_bnb_param_type(layer.weight) == "4bit"
    assert torch.equal(integrations.dequantize_module_weight(layer), torch.full((2, 2), 3.0))
    layer.weight = int8(torch.full((2, 2), 64, dtype=torch.int8), requires_grad=False)
    layer.weight.SCB = torch.tensor([127.0, 254.0])
    with pytest.raises(ValueError, match="state"):
        integrations.dequantize_module_weight(layer)
    layer.state = SimpleNamespace(SCB=None)
    want = peft.utils.integrations.dequantize_bnb_weight(layer.weight, layer.state)
    torch.testing.assert_close(integrations.dequantize_module_weight(layer), want)
    assert integrations.get_bnb_param_type(nn.Parameter(torch.zeros(1))) is False


def test_what_quantised_a_layer() -> None:
    assert utils.resolve_quantization_backend(nn.Linear(2, 2)) is None
    cases = {
        ("bitsandbytes.nn.modules", "Linear8bitLt"): "bnb 8bit",
        ("bitsandbytes.nn.modules", "Linear4bit"): "bnb 4bit",
        ("hqq.core.quantize", "HQQLinear"): "hqq",
        ("gptqmodel.nn_modules.qlinear", "X"): "gptq",
        ("eetq", "EetqLinear"): "eetq",
    }
    for (module, name), want in cases.items():
        layer = type(name, (nn.Linear,), {"__module__": module})(2, 2)
        backend = utils.resolve_quantization_backend(layer)
        assert backend == quantization_utils.QuantizationBackend(want)
        assert not backend.supports_merge
        with pytest.raises(TypeError, match=want):
            backend.set_base_weight(layer, torch.zeros(2, 2))
        if want in ("gptq", "eetq"):
            with pytest.raises(TypeError, match=want):
                backend.get_base_weight(layer)
        x = torch.zeros(1)
        assert (backend.maybe_clone_base_result(x) is x) == (want != "bnb 4bit")
        layer.quantization_backend = backend
        assert utils.quantization_extra_repr(layer) == peft.utils.quantization_extra_repr(layer)
    awq = type("X", (nn.Linear,), {"__module__": "gptqmodel.x", "SUPPORTS_METHODS": [SimpleNamespace(value="awq")]})
    assert utils.resolve_quantization_backend(awq(2, 2)).backend_name == "awq"
    assert utils.get_quantization_kwargs(nn.Linear(2, 2)) == {}
    model: Any = nn.Linear(2, 2)
    model.hf_quantizer = SimpleNamespace(quantization_config=SimpleNamespace(get_apply_tensor_subclass=len))
    assert utils.get_quantization_kwargs(model) == {"get_apply_tensor_subclass": len}


@pytest.mark.parametrize("include_buffers", [None, True])
def test_empty_weights(include_buffers: bool | None) -> None:
    class Scaled(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 2)
            self.register_buffer("scale", torch.ones(2))
            self.bias.requires_grad_(False)
            self.frozen = nn.Parameter(torch.zeros(2, dtype=torch.float16), requires_grad=False)

    made, outside = [], nn.Parameter(torch.zeros(1))
    for library in (integrations, peft.utils.integrations):
        with library.init_empty_weights(include_buffers):
            made.append(Scaled())
            made[-1].register_parameter("kept", None)
            library.skip_init_on_device(made[-1].register_parameter)("real", outside)
    ours, theirs = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in made)
    assert {n: (t.device, t.dtype, t.requires_grad) for n, t in ours.items()} == {
        n: (t.device, t.dtype, t.requires_grad) for n, t in theirs.items()
    }
    assert ours["weight"].is_meta
    assert not ours["real"].is_meta
    assert ours["scale"].is_meta == bool(include_buffers)
    assert not nn.Linear(2, 2).weight.is_meta
    with pytest.raises(KeyError), integrations.init_empty_weights():
        raise KeyError
    assert not nn.Linear(2, 2).weight.is_meta


def test_skipping_is_a_thread_s_own() -> None:
    """PEFT's flag is global: while one thread skips, another one's empty weights are full."""
    inside, done, found = threading.Event(), threading.Event(), []

    @integrations.skip_init_on_device
    def wait() -> None:
        inside.set()
        done.wait(10)

    def make() -> None:
        inside.wait(10)
        with integrations.init_empty_weights():
            found.append(nn.Linear(2, 2).weight.is_meta)
        done.set()

    threads = [threading.Thread(target=wait), threading.Thread(target=make)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True]


def test_zero3_is_off() -> None:
    assert not integrations.check_deepspeed_zero3_enabled()
    with integrations.gather_params_ctx(nn.Parameter(torch.zeros(1))) as nothing:
        assert nothing is None


def test_layers_on_devices() -> None:
    from transformers import DynamicCache

    model = SimpleNamespace(config=SimpleNamespace(num_hidden_layers=2))
    for device_map in ({"": "cpu:0"}, {"model.embed": 0, "model.layers.0": 0, "model.layers.1": "cpu"}):
        model.hf_device_map = device_map
        assert integrations.get_layer_device_map(model) == peft.utils.integrations.get_layer_device_map(model)
    model.hf_device_map = {"model.layers.0": 0}
    with pytest.raises(RuntimeError, match="layer 1"):
        integrations.get_layer_device_map(model)
    cache = DynamicCache()
    for layer in range(2):
        cache.update(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), layer)
    model.hf_device_map = {"layers.0.x": "meta", "layers.1.x": "meta"}
    utils.map_cache_to_layer_device_map(model, SimpleNamespace(self_attention_cache=cache))
    assert all(layer.keys.is_meta and layer.values.is_meta for layer in cache.layers)
    del model.hf_device_map
    utils.map_cache_to_layer_device_map(model, cache)
