"""The names of parameters, buffers and keys of a live model are PEFT's, whatever was done to it."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import specs
import torch
from peft_tools import layer_model, logits, tiny, tokens
from torch import nn

import funcadapt as fa
import funcadapt.peft as shim
from funcadapt.method import method_named

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning", "ignore::FutureWarning")

LIBRARIES: tuple[Any, Any] = (peft, shim)
LAYERS = ("linear", "linear_no_bias", "hf_conv1d", "embedding", "conv1d", "conv2d", "conv2d_1x1", "conv2d_grouped",
          "conv3d", "mha")  # fmt: skip
ROWS = tokens("llama")["input_ids"][0, :2].unique().tolist()

# one model each
CASES = {
    f"{method}-{name}": (method, parity)
    for method, spec in specs.load().items()
    for name, parity in spec.parity.items()
}
# PEFT wraps a tied head once more for every adapter
TWO = [case for case in CASES if case != "trainable_tokens-tied"]


class Live:
    """A model with one adapter, in PEFT or here."""

    def __init__(self, library: Any, case: str, *, name: str = "default") -> None:
        method, parity = CASES[case]
        self.kind = parity.kinds[0]
        self.library, self.fields = library, dict(parity.config)
        if self.kind in LAYERS:
            base, x, target = layer_model(self.kind)
            self.fields, self.inputs = {**target, **self.fields}, {"x": x}
        else:
            base, self.inputs = tiny(self.kind), tokens(self.kind)
        self.config_name = parity.peft or method_named(method).config.__name__
        torch.manual_seed(11)
        self.model: Any = library.get_peft_model(base.eval(), self.config(), adapter_name=name).eval()

    def config(self) -> Any:
        return getattr(self.library, self.config_name)(**self.fields)

    def add(self, name: str) -> None:
        torch.manual_seed(12)
        self.model.add_adapter(name, self.config())

    def twin(self) -> Live:
        made = copy.copy(self)
        made.model = copy.deepcopy(self.model)
        return made

    def keys(self) -> list[str]:
        return list(self.model.state_dict())

    def trained(self) -> list[str]:
        return [name for name, p in self.model.named_parameters() if p.requires_grad]

    def out(self) -> torch.Tensor:
        with torch.no_grad():
            return logits(self.model(**self.inputs))


@pytest.mark.parametrize("case", TWO)
def test_two_adapters(case: str) -> None:
    """Each has its own names; what is trained is the active one's."""
    theirs, ours = (Live(library, case) for library in LIBRARIES)
    for live in (theirs, ours):
        live.add("two")
    assert ours.keys() == theirs.keys()
    if not case.startswith("lily"):  # PEFT's second adapter does not share what the first one shares
        assert [n for n, _ in ours.model.named_parameters()] == [n for n, _ in theirs.model.named_parameters()]
        assert ours.trained() == theirs.trained()
    for live in (theirs, ours):
        live.model.delete_adapter("default")
    assert ours.keys() == theirs.keys()


@pytest.mark.parametrize("case", CASES)
def test_a_full_state_dict_comes_back(case: str) -> None:
    """Into the same model with other numbers, strictly; and what is in no state dict stays."""
    live = Live(shim, case)
    for parameter in live.model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    file = io.BytesIO()
    torch.save(live.model.state_dict(), file)
    file.seek(0)
    before, twin = live.out(), live.twin()
    for parameter in twin.model.parameters():
        if parameter.requires_grad:
            parameter.data.zero_()
    twin.model.load_state_dict(torch.load(file))
    torch.testing.assert_close(twin.out(), before, rtol=0, atol=0)


HIDDEN = ["frod-plain", "frod-computed", "shira-plain", "fourierft-plain", "tinylora-plain", "waveft-plain",
          "unilora-plain", "osf-plain"]  # fmt: skip


@pytest.mark.parametrize("case", HIDDEN)
def test_hidden_leaves_move_and_are_copied(case: str) -> None:
    """With the model's dtype, and away from the original; the meta device would lose them."""
    live = Live(shim, case)
    expected = live.out()
    twin = live.twin()
    twin.model.double()
    twin.inputs = {k: v.double() if v.is_floating_point() else v for k, v in twin.inputs.items()}
    assert twin.out().dtype == torch.float64
    torch.testing.assert_close(twin.out(), expected, rtol=1e-4, atol=1e-4, check_dtype=False)
    torch.testing.assert_close(live.out(), expected, rtol=0, atol=0)
    (name, layer), *_ = [(n, m) for n, m in live.model.named_modules() if hasattr(m, "site")]
    other = twin.model.get_submodule(name)
    pointers = [{t.data_ptr() for t in each.tensors_of("default") if t.numel()} for each in (layer, other)]
    assert not pointers[0] & pointers[1]
    state = {key: value.clone() for key, value in live.model.state_dict().items()}
    buffers = {key: value.clone() for key, value in live.model.named_buffers()}
    live.model.to("meta")
    live.model.load_state_dict(state, assign=True)
    for key, value in buffers.items():  # as accelerate does for FSDP
        owner, _, short = key.rpartition(".")
        live.model.get_submodule(owner)._buffers[short] = value
    torch.testing.assert_close(live.out(), expected, rtol=0, atol=0)


def test_frods_basis_is_the_tuners_alone() -> None:
    """The layers refer to it: what is changed there changes for all, in copies too."""
    live = Live(shim, "frod-model")
    for model in (live.model, copy.deepcopy(live.model)):
        held = [m.frod_V for _, m in model.named_modules() if hasattr(m, "site")]
        assert len(held) > 1
        assert all(each is model.base_model.frod_V for each in held)
        assert not any("frod_V" in m._modules for _, m in model.named_modules() if hasattr(m, "site"))


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("case", [*HIDDEN, "supertuning-computed", "tinylora-drawn"])
def test_files_hold_what_state_dicts_lack(case: str, low: bool, tmp_path: Path) -> None:
    """PEFT's files read here give its outputs, and come out again as they were."""
    theirs = Live(peft, case)
    for parameter in theirs.model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    theirs.model.save_pretrained(str(tmp_path))
    base = layer_model(theirs.kind)[0].eval()
    torch.manual_seed(99)
    ours = shim.PeftModel.from_pretrained(base, str(tmp_path), low_cpu_mem_usage=low).eval()
    with torch.no_grad():
        torch.testing.assert_close(logits(ours(**theirs.inputs)), theirs.out(), rtol=1e-4, atol=1e-5)
    assert not any(b.is_meta for b in ours.buffers())
    written = peft.get_peft_model_state_dict(theirs.model)
    again = shim.get_peft_model_state_dict(ours)
    assert again.keys() == written.keys()
    for key, value in written.items():
        torch.testing.assert_close(again[key], value, rtol=0, atol=0)


def test_a_file_without_what_state_dicts_lack() -> None:
    """It is said to be missing, as a parameter would be."""
    live = Live(shim, "shira-plain")
    tensors = shim.get_peft_model_state_dict(live.model)
    result = shim.set_peft_model_state_dict(live.model, {k: v for k, v in tensors.items() if "indices" not in k})
    assert [key for key in result.missing_keys if "shira" in key] == [
        "base_model.model.inner.layer.shira_indices.default"
    ]
    result = shim.set_peft_model_state_dict(live.model, tensors)
    assert not [key for key in result.missing_keys + result.unexpected_keys if "shira" in key]


# -- modules in full, and rows ----------------------------------------------------------------------------


def _ln(library: Any) -> Any:
    torch.manual_seed(3)
    config = library.LNTuningConfig(target_modules=["input_layernorm", "norm"])
    model = library.get_peft_model(tiny("llama").eval(), config)
    model.add_adapter("two", library.LNTuningConfig(target_modules=["input_layernorm", "norm"]))
    _number(model)
    return model.eval()


def _rows(library: Any) -> Any:
    torch.manual_seed(3)
    model = library.get_peft_model(tiny("llama").eval(), library.TrainableTokensConfig(token_indices=ROWS[:1]))
    model.add_adapter("two", library.TrainableTokensConfig(token_indices=ROWS[1:]))
    _number(model)
    return model.eval()


def _number(model: nn.Module) -> None:
    for i, (name, parameter) in enumerate(model.named_parameters()):
        if "default" in name or "two" in name:
            parameter.data += 0.2 * (i % 5 + 1) * torch.linspace(-1, 1, parameter.numel()).view_as(parameter)


def _call(model: Any) -> None:
    model(**tokens("llama"))


STEPS: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda model: None,
    "second": lambda model: model.set_adapter("two"),
    "both": lambda model: model.base_model.set_adapter(["default", "two"]),
    "merge": lambda model: model.merge_adapter(),
    "merge second": lambda model: model.merge_adapter(["two"]),
    "merge both": lambda model: model.merge_adapter(["default", "two"]),
    "unmerge": lambda model: model.unmerge_adapter(),
    "disable": lambda model: model.base_model.disable_adapter_layers(),
    "enable": lambda model: model.base_model.enable_adapter_layers(),
    "call": _call,
    "delete": lambda model: model.delete_adapter("default"),
    "delete second": lambda model: model.delete_adapter("two"),
    "unload": lambda model: model.unload(),
    "merge and unload": lambda model: model.merge_and_unload(),
    "merge second and unload": lambda model: model.merge_and_unload(adapter_names=["two"]),
}
LIVES = [
    ["nothing"], ["second"], ["both"], ["second", "both", "second"], ["merge"], ["merge", "unmerge"],
    ["merge second"], ["merge second", "unmerge"], ["merge both"], ["merge", "second"], ["merge", "disable", "call"],
    ["disable"], ["disable", "enable"], ["both", "disable", "enable"], ["delete"], ["delete second"],
    ["both", "delete"], ["second", "delete"], ["second", "delete second"], ["unload"], ["merge and unload"],
    ["merge second and unload"], ["second", "merge and unload"], ["both", "merge and unload"],
]  # fmt: skip


def _seen(make: Callable[[Any], Any], library: Any, steps: list[str]) -> list[Any]:
    model = make(library)
    found: list[Any] = []
    for step in steps:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                made = STEPS[step](model)
        except ValueError:
            found.append((step, "refused"))
            break
        model = made if isinstance(made, nn.Module) else model
        try:
            with torch.no_grad():
                out: Any = logits(model(**tokens("llama")))
        except ValueError:
            out = "refused"
        found.append((step, {k: v.clone() for k, v in model.state_dict().items()}, out))
        if isinstance(made, nn.Module):
            continue
        found.append([(n, p.requires_grad) for n, p in model.named_parameters() if "default" in n or "two" in n])
    return found


@pytest.mark.parametrize("steps", LIVES, ids=",".join)
@pytest.mark.parametrize("make", [_ln, _rows])
def test_methods_without_layers_live_like_pefts(make: Callable[[Any], Any], steps: list[str]) -> None:
    theirs, ours = (_seen(make, library, steps) for library in LIBRARIES)
    assert len(ours) == len(theirs)
    for one, other in zip(theirs, ours, strict=True):
        if isinstance(one, list) or one[1] == "refused":
            assert other == one
            continue
        assert list(other[1]) == list(one[1])
        for key, value in one[1].items():
            torch.testing.assert_close(other[1][key], value, rtol=0, atol=0, msg=lambda m, key=key: f"{key}: {m}")
        if isinstance(one[2], str):
            assert other[2] == one[2]
        else:
            torch.testing.assert_close(other[2], one[2], rtol=1e-5, atol=1e-5)


def test_classes_are_pefts() -> None:
    """Code asks for them: isinstance, names, and what they print."""
    layer = next(m for n, m in _ln(shim).named_modules() if n.endswith("layers.0.input_layernorm"))
    rows = next(m for n, m in _rows(shim).named_modules() if n.endswith("embed_tokens"))
    assert isinstance(layer, shim.tuners.ln_tuning.LNTuningLayer)
    assert isinstance(rows, shim.tuners.trainable_tokens.TrainableTokensLayer)
    assert isinstance(rows, shim.tuners.tuners_utils.BaseTunerLayer)
    assert isinstance(layer, shim.tuners.tuners_utils.BaseTunerLayer)
    theirs = [next(m for n, m in make(peft).named_modules() if n.endswith(name))
              for make, name in ((_ln, "layers.0.input_layernorm"), (_rows, "embed_tokens"))]  # fmt: skip
    assert [repr(layer), repr(rows)] == [repr(module) for module in theirs]


@pytest.mark.parametrize("make", [_ln, _rows])
def test_values_are_what_was_trained_also_while_merged(make: Callable[[Any], Any]) -> None:
    """As values, as files, and copied."""
    model = make(shim)
    expected = {k: v.clone() for k, v in shim.get_peft_model_state_dict(model).items()}
    value = fa.view.adapter_of(model.base_model.model, "default").map(torch.clone)
    model.merge_adapter()
    twin = copy.deepcopy(model)
    for each in (model, twin):
        found = shim.get_peft_model_state_dict(each)
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, rtol=0, atol=0)
        now = fa.view.adapter_of(each.base_model.model, "default")
        for path, leaves in value.params.items():
            for leaf, tensor in leaves.items():
                torch.testing.assert_close(now.params[path][leaf], tensor, rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(logits(twin(**tokens("llama"))), logits(model(**tokens("llama"))))
    fa.dematerialize(model.base_model.model)
    fresh = tiny("llama").eval()
    with torch.no_grad():
        got = logits(model.base_model.model(**tokens("llama")))
        torch.testing.assert_close(got, logits(fresh(**tokens("llama"))), rtol=0, atol=0)
