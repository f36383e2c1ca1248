"""LoftQ beside bitsandbytes and PEFT. PEFT's own code runs on the CPU here: where it says "cuda", it reads "cpu"."""

from __future__ import annotations

import importlib
import json
import types
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
from peft.utils import loftq_utils as theirs_on_cuda
from safetensors.torch import save_file
from torch import Tensor, nn

import funcadapt as fa
import funcadapt.peft as shim
from funcadapt import loftq
from funcadapt.peft.utils.loftq_utils import loftq_init, replace_lora_weights_loftq

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def theirs() -> Any:
    """PEFT's module with another device in it."""
    source = Path(str(theirs_on_cuda.__file__)).read_text()
    assert source.count('"cuda"') == 2
    module = types.ModuleType("loftq_utils_on_cpu")
    exec(compile(source.replace('"cuda"', '"cpu"'), "loftq_utils_on_cpu", "exec"), vars(module))
    return module


@pytest.mark.parametrize("shape", [(1, 64), (64, 64), (30, 50), (7, 40), (1, 1)])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 0.0])
def test_nf4_is_that_of_bitsandbytes(shape: tuple[int, int], scale: float) -> None:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * scale
    packed, state = bnb.functional.quantize_4bit(w, blocksize=64, quant_type="nf4")
    assert torch.equal(loftq.quantised(w, 4), bnb.functional.dequantize_4bit(packed, state))


def test_int8_is_that_of_bitsandbytes() -> None:
    """Which rounds the weight to 16 bits before anything else; a weight that has no more is rounded to the same."""
    w = torch.randn(30, 50, generator=torch.Generator().manual_seed(1)).half()
    codes, scales, _ = bnb.functional.int8_vectorwise_quant(w)
    ours = loftq.quantised(w.float(), 8)
    torch.testing.assert_close(ours, bnb.functional.int8_vectorwise_dequant(codes, scales), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("iterations", [1, 4])
def test_the_whole_init_is_peft_s(bits: int, iterations: int, theirs: Any) -> None:
    w = torch.randn(48, 64, generator=torch.Generator().manual_seed(1))
    want, got = theirs.loftq_init(w, bits, 5, iterations), loftq_init(w, bits, 5, iterations)
    if bits == 4:
        assert torch.equal(got[0], want[0])
        torch.testing.assert_close(got[2] @ got[1], want[2] @ want[1], rtol=0, atol=1e-5)
        for a, b in zip(got[1:], want[1:], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
        return
    # PEFT's 8 bits go through 16-bit floats: the scale is another one by 2^-11, and a number between two integers may
    # go the other way
    step = w.abs().amax(1, keepdim=True) / 127
    if iterations == 1:
        assert ((got[0] - want[0]).abs() <= (1 + 127 / 2**11) * step).all()
    errors = [(q + b @ a - w).norm().item() for q, a, b in (got, want)]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)


# -- replace_lora_weights_loftq --------------------------------------------------------------------------------


class Model(nn.Module):
    """Two linear layers, under a prefix that a file may lack."""

    base_model_prefix = "model"

    def __init__(self, linear: Any) -> None:
        super().__init__()
        self.model = nn.Sequential(linear(64, 128), nn.ReLU(), linear(128, 64, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def full() -> Model:
    torch.manual_seed(0)
    return Model(nn.Linear)


def quantised(**fields: Any) -> Model:
    given = {"quant_type": "nf4", "compute_dtype": torch.float32, **fields}
    model: Any = Model(lambda *sizes, bias=True: bnb.nn.Linear4bit(*sizes, bias=bias, **given))
    model.load_state_dict(full().state_dict())
    model.is_loaded_in_4bit = True  # by which PEFT knows
    return model.to("cpu").eval()


def adapted(lib: Any, **fields: Any) -> Any:
    config = lib.LoraConfig(r=4, lora_alpha=4, target_modules=["0", "2"], **fields)
    return lib.get_peft_model(quantised(), config)


def factors(model: Any, name: str = "default") -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in model.named_parameters() if f".{name}." in k}


def saved(folder: Path, model: nn.Module, *, prefix: str = "", shards: bool = False) -> Path:
    tensors = {key.removeprefix(prefix): value for key, value in model.state_dict().items()}
    folder.mkdir(exist_ok=True)
    if not shards:
        save_file(tensors, folder / "model.safetensors")
        return folder
    files = {key: f"model-{i}.safetensors" for i, key in enumerate(tensors)}
    for key, file in files.items():
        save_file({key: tensors[key]}, folder / file)
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("how", ["folder", "file", "no prefix", "shards"])
def test_replacing_is_peft_s(how: str, theirs: Any, tmp_path: Path) -> None:
    path = saved(tmp_path, full(), prefix="model." if how == "no prefix" else "", shards=how == "shards")
    where = str(path / "model.safetensors" if how == "file" else path)
    models = [adapted(lib) for lib in (peft, shim)]
    theirs.replace_lora_weights_loftq(models[0], where)
    replace_lora_weights_loftq(models[1], where)
    want, got = (factors(model) for model in models)
    assert sorted(got) == sorted(want)
    for key, value in want.items():
        assert value.abs().sum() > 0
        torch.testing.assert_close(got[key], value, rtol=0, atol=1e-5, msg=key)
    for key, layer in full().named_modules():
        if isinstance(layer, nn.Linear):
            found = models[1].get_submodule(f"base_model.model.{key}")
            base = bnb.functional.dequantize_4bit(found.weight, found.weight.quant_state)
            update = found.lora_B["default"].weight @ found.lora_A["default"].weight
            best = torch.linalg.svdvals(layer.weight - base)[4:].norm()
            torch.testing.assert_close((base + update - layer.weight).norm(), best)
    x = torch.randn(5, 64)
    torch.testing.assert_close(models[1](x), models[0](x), rtol=0, atol=1e-4)


@torch.no_grad()
def test_after_a_call(tmp_path: Path) -> None:
    """Where a CPU has AVX512-BF16, bitsandbytes reorders a weight in eval mode, and then dequantises it wrongly."""
    path, x, models = str(saved(tmp_path, full())), torch.randn(5, 64), (adapted(shim), adapted(shim))
    models[1].eval()(x)
    for model in models:
        replace_lora_weights_loftq(model, path)
    products = [
        [m.lora_B["default"].weight @ m.lora_A["default"].weight for m in model.modules() if hasattr(m, "lora_A")]
        for model in models
    ]
    assert len(products[0]) == 2
    for ours, theirs in zip(*products, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)  # it then multiplies in bfloat16


def test_the_scaling_counts(tmp_path: Path) -> None:
    """PEFT's factors are too large by the scaling, and then worse than none."""
    path, models = str(saved(tmp_path, full())), (adapted(shim), adapted(shim, use_rslora=True))
    for model in models:
        replace_lora_weights_loftq(model, path)
    x = torch.randn(5, 64)
    assert models[1].base_model.model.model[0].scaling == {"default": 2.0}
    torch.testing.assert_close(models[1](x), models[0](x), rtol=0, atol=1e-5)


def test_the_callback_decides(theirs: Any, tmp_path: Path) -> None:
    path = str(saved(tmp_path, full()))
    states: list[dict[str, Tensor]] = []
    for lib, replace in ((peft, theirs.replace_lora_weights_loftq), (shim, replace_lora_weights_loftq)):
        torch.manual_seed(3)
        model, names = adapted(lib), list[str]()

        def keep(given: Any, name: str, model: Any = model, names: list[str] = names) -> bool:
            assert given is model
            assert factors(model)[f"base_model.model.{name}.lora_B.default.weight"].abs().sum() > 0
            names.append(name)
            return name == "model.2"

        replace(model, model_path=path, callback=keep)
        assert names == ["model.0", "model.2"]
        states.append(factors(model))
    for key, value in states[0].items():
        assert bool(value.abs().sum() > 0) == ("lora_A" in key or ".2." in key)
        torch.testing.assert_close(states[1][key], value, rtol=0, atol=1e-5, msg=key)

    def fail(model: Any, name: str) -> bool:
        raise RuntimeError("no")

    model = adapted(shim)
    before = factors(model)
    with pytest.raises(RuntimeError, match="no"):
        replace_lora_weights_loftq(model, path, callback=fail)
    assert all(torch.equal(value, before[key]) for key, value in factors(model).items())


def test_other_adapters_and_dtypes_stay(tmp_path: Path) -> None:
    path, model = str(saved(tmp_path, full())), adapted(shim)
    model.add_adapter("other", shim.LoraConfig(r=2, lora_alpha=2, target_modules=["2"]))
    for parameter in model.get_submodule("base_model.model.model.2").lora_A.parameters():
        parameter.data = parameter.data.bfloat16()
    before = factors(model)
    replace_lora_weights_loftq(model, path, "other")
    assert all(torch.equal(value, before[key]) for key, value in factors(model).items())
    layer = model.get_submodule("base_model.model.model.2")
    assert layer.lora_A["other"].weight.dtype == torch.bfloat16
    assert layer.lora_B["other"].weight.abs().sum() > 0


def test_what_cannot_be(tmp_path: Path) -> None:
    path = str(saved(tmp_path / "full", full()))
    with pytest.raises(ValueError, match="No bnb LoRA module found on the model"):
        replace_lora_weights_loftq(shim.get_peft_model(full(), shim.LoraConfig(target_modules=["0"])), path)
    with pytest.raises(ValueError, match=r"no adapter 'defualt'.* Did you mean 'default'"):
        replace_lora_weights_loftq(adapted(shim), path, "defualt")
    bare = quantised()
    shim.inject_adapter_in_model(shim.LoraConfig(target_modules=["0"]), bare)
    with pytest.raises(TypeError, match="does not appear to be a valid PeftModel"):
        replace_lora_weights_loftq(bare, path)
    with pytest.raises(FileNotFoundError, match="Could not find file for"):
        replace_lora_weights_loftq(adapted(shim), str(tmp_path))
    with pytest.raises(ValueError, match="you must pass the model_path argument"):
        replace_lora_weights_loftq(adapted(shim))
    model, lacking = adapted(shim), full()
    before = factors(model)
    lacking.model[2] = nn.Linear(128, 49)  # pyright: ignore
    with pytest.raises(fa.AdapterFileError, match=r"'model.2.weight' of shape \(49, 128\), expected \(64, 128\)"):
        replace_lora_weights_loftq(model, str(saved(tmp_path / "other", lacking)))
    del lacking.model[2]  # pyright: ignore
    with pytest.raises(fa.AdapterFileError, match=r"lacks 'model.2.weight'"):
        replace_lora_weights_loftq(model, str(saved(tmp_path / "less", lacking)))
    assert all(torch.equal(value, before[key]) for key, value in factors(model).items())  # nothing was written


def test_it_is_where_peft_has_it() -> None:
    assert importlib.import_module("funcadapt.peft").replace_lora_weights_loftq is replace_lora_weights_loftq
