"""Every method against PEFT's: outputs, gradients, merged weights, files and the in-place view, from `tests/specs`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import specs
import torch
from peft_tools import config_file, layer_model, logits, peft_load, peft_save, raw, same_tensors, tiny, tokens, wrap
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import funcadapt as fa
import funcadapt.peft as shim
from funcadapt.keys import encode
from funcadapt.method import method_named

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning", "ignore::FutureWarning")

CASES = {
    f"{method}-{name}-{kind}": (method, parity, kind)
    for method, spec in specs.load().items()
    for name, parity in spec.parity.items()
    for kind in parity.kinds
}
_LAYERS = ("linear", "linear_no_bias", "hf_conv1d", "embedding", "conv1d", "conv2d", "conv2d_1x1", "conv2d_grouped",
           "conv3d", "mha")  # fmt: skip

# buffers of PEFT's that follow from the shapes alone: BOFT's permutation as a matrix, the places of OFT's numbers
_COMPUTED = (".boft_P", ".rows", ".cols")


class Pair:
    """One adapter, in PEFT and here, in float64."""

    def __init__(self, case: str, folder: Path, *, train: bool = False) -> None:
        method, self.parity, self.kind = CASES[case]
        self.method = method_named(method)
        self.fields: dict[str, Any] = dict(self.parity.config)
        if train:
            self.fields |= dict(self.parity.training or {})
        self.inputs: dict[str, Any]
        if self.kind in _LAYERS:
            _, x, target = layer_model(self.kind)
            self.fields = {**target, **self.fields}
            self.inputs = {"x": x.double() if x.is_floating_point() else x}
        else:
            self.inputs = tokens(self.kind)
        self.wrapped: Any = wrap(self.make(), self.theirs_config()).double()
        self.folder = peft_save(self.wrapped, folder / "theirs")
        self.model = self.make()
        self.adapter = fa.load(self.folder, model=self.model)

    def make(self) -> nn.Module:
        return (layer_model(self.kind)[0] if self.kind in _LAYERS else tiny(self.kind)).double().eval()

    def theirs_config(self) -> Any:
        return getattr(peft, self.parity.peft or self.method.config.__name__)(**self.fields)

    def ours_config(self) -> Any:
        return getattr(shim, self.parity.peft or self.method.config.__name__)(**self.fields)

    def theirs(self) -> Tensor:
        return logits(self.wrapped(**self.inputs))

    def ours(self, adapter: fa.Adapter | None = None) -> Tensor:
        return logits(fa.functional_call(self.model, adapter or self.adapter, (), self.inputs))

    def close(self, a: Tensor, b: Tensor, what: str = "", scale: float = 0.0) -> None:
        atol = self.parity.tolerance * max(1.0, scale, b.abs().max().item() if b.numel() else 0.0)
        torch.testing.assert_close(a, b, rtol=0, atol=atol, check_dtype=False, msg=lambda m: f"{what}: {m}")


@pytest.mark.parametrize("case", CASES)
def test_outputs(case: str, tmp_path: Path) -> None:
    pair = Pair(case, tmp_path)
    with torch.no_grad():
        theirs = pair.theirs()
        assert (theirs - logits(pair.make()(**pair.inputs))).abs().max() > 1e-3  # else there is nothing to compare
        pair.close(pair.ours(), theirs)


@pytest.mark.parametrize("case", [case for case, (_, parity, _) in CASES.items() if parity.gradients])
def test_gradients(case: str, tmp_path: Path) -> None:
    """Of every leaf, under the keys of a checkpoint: PEFT's own code names them, once they stand for the weights."""
    pair = Pair(case, tmp_path)
    theirs = pair.theirs()
    probe = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    pair.wrapped.zero_grad()
    (theirs * probe).sum().backward()
    trained = [p for p in pair.wrapped.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = {key: value.clone() for key, value in peft.get_peft_model_state_dict(pair.wrapped).items()}

    params = pytree.tree_map(lambda t: t.clone().requires_grad_(), pair.adapter.params)
    leaves, spec = pytree.tree_flatten(params)
    out = pair.ours(pair.adapter.replace(params=params))
    got = torch.autograd.grad((out * probe).sum(), leaves, allow_unused=True)
    filled = [torch.zeros_like(p) if g is None else g for p, g in zip(leaves, got, strict=True)]
    ours = encode(pair.adapter.replace(params=pytree.tree_unflatten(filled, spec), buffers={}), pair.method)[0]
    assert ours
    largest = max(found[key].abs().max().item() for key in ours)
    assert largest > 1e-3
    for key, gradient in ours.items():
        pair.close(gradient, found[key], key, largest)


@pytest.mark.parametrize("case", [case for case, (_, parity, _) in CASES.items() if parity.merged])
def test_merged_weights(case: str, tmp_path: Path) -> None:
    pair = Pair(case, tmp_path)
    merged = fa.merge(pair.model, pair.adapter)
    theirs = dict(pair.wrapped.merge_and_unload().named_parameters(remove_duplicate=False))
    base = dict(pair.make().named_parameters(remove_duplicate=False))
    changed = {name for name in base if not torch.equal(theirs[name], base[name])}
    assert changed
    assert changed <= set(merged)
    for name, weight in merged.items():
        pair.close(weight, theirs[name], name)


@pytest.mark.parametrize("case", CASES)
def test_files_in_both_directions(case: str, tmp_path: Path) -> None:
    """What PEFT wrote is read and written again bit for bit, config and all, and PEFT reads what we wrote."""
    pair = Pair(case, tmp_path)
    fa.save(pair.adapter, tmp_path / "ours")
    same_tensors(raw(tmp_path / "ours"), raw(pair.folder))
    assert config_file(tmp_path / "ours") == config_file(pair.folder)
    again: Any = peft_load(pair.make(), tmp_path / "ours").double()
    with torch.no_grad():
        pair.close(logits(again(**pair.inputs)), pair.theirs())


@pytest.mark.parametrize("case", CASES)
def test_the_view(case: str, tmp_path: Path) -> None:
    """From one seed, the shim's model has PEFT's names and numbers; with PEFT's weights it gives PEFT's outputs."""
    pair = Pair(case, tmp_path)
    states: list[dict[str, Tensor]] = []
    models: list[Any] = []
    for package, config in ((peft, pair.theirs_config()), (shim, pair.ours_config())):
        base = pair.make()
        torch.manual_seed(11)
        models.append(package.get_peft_model(base, config).eval())
        states.append(package.get_peft_model_state_dict(models[-1]))
    assert sorted(states[1]) == sorted(states[0])
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-5, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")
    theirs, ours = models
    assert list(ours.state_dict()) == list(theirs.state_dict())
    flags = [[(name, p.requires_grad) for name, p in model.named_parameters()] for model in models]
    assert flags[1] == flags[0]
    buffers = [{name for name, _ in model.named_buffers()} for model in models]
    assert buffers[1] == {name for name in buffers[0] if not name.endswith(_COMPUTED)}
    if pair.method.name != "kasa":  # PEFT's takes something out of the base weight, for good
        ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        pair.close(logits(ours(**pair.inputs)), logits(theirs(**pair.inputs)))
        shim.set_peft_model_state_dict(ours, raw(pair.folder))
        pair.close(logits(ours.double()(**pair.inputs)), pair.theirs())


@pytest.mark.parametrize("case", [case for case, (_, parity, _) in CASES.items() if parity.training is not None])
def test_training(case: str, tmp_path: Path) -> None:
    """Equal seeds give equal random numbers, drawn in the order of the forward pass."""
    pair = Pair(case, tmp_path, train=True)
    pair.wrapped.train()
    pair.model.train()
    outs: list[Tensor] = []
    for run in (pair.theirs, pair.ours):
        torch.manual_seed(3)
        outs.append(run().detach())
    pair.close(outs[1], outs[0])
    torch.manual_seed(4)
    assert not torch.allclose(pair.ours().detach(), outs[1])
