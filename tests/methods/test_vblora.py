"""VB-LoRA: its checkpoints of top-k weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_tools import config_file, peft_load, peft_save, raw, tiny, tokens, wrap
from torch import nn

import funcadapt as fa
import funcadapt.peft as shim

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

FIELDS: dict[str, Any] = {
    "r": 3, "vector_length": 2, "topk": 3, "target_modules": ["c_attn", "c_proj"], "save_only_topk_weights": True,
}  # fmt: skip


@pytest.mark.parametrize(("size", "dtype"), [(200, torch.uint8), (300, torch.int16), (40000, torch.int32)])
def test_files_of_chosen_weights(size: int, dtype: torch.dtype, tmp_path: Path) -> None:
    fields = {**FIELDS, "num_vectors": size, **({"target_modules": ["h.0.attn.c_proj"]} if size > 1000 else {})}
    theirs: Any = wrap(tiny("gpt2"), peft.VBLoRAConfig(**fields))
    folder = peft_save(theirs, tmp_path / "theirs")
    model, x = tiny("gpt2"), tokens("gpt2")
    adapter = fa.load(folder)
    fa.save(adapter, tmp_path / "ours")
    a, b = raw(tmp_path / "ours"), raw(folder)
    assert {t.dtype for k, t in a.items() if k.endswith("_topk_indices")} == {dtype}
    assert {k: (t.dtype, t.shape) for k, t in a.items()} == {k: (t.dtype, t.shape) for k, t in b.items()}
    torch.testing.assert_close(a, b)
    assert config_file(tmp_path / "ours") == config_file(folder)
    with torch.no_grad():
        expected = theirs(**x).logits
        torch.testing.assert_close(fa.functional_call(model, adapter, (), x).logits, expected)
        torch.testing.assert_close(peft_load(tiny("gpt2"), tmp_path / "ours")(**x).logits, expected)
        view: Any = shim.PeftModel.from_pretrained(tiny("gpt2"), str(folder)).eval()
        torch.testing.assert_close(view(**x).logits, expected)
    view.save_pretrained(tmp_path / "view")
    torch.testing.assert_close(raw(tmp_path / "view"), b)
    assert view.get_nb_savable_parameters() == theirs.get_nb_savable_parameters()
    saved = sum(t.numel() * t.element_size() for t in b.values()) // 4
    assert view.get_nb_savable_parameters()[0] == pytest.approx(saved, abs=1)


def test_what_was_chosen_can_be_trained(tmp_path: Path) -> None:
    """PEFT raises, as the logits that it makes up are infinite."""
    model, x = nn.Sequential(nn.Linear(4, 6)), torch.randn(3, 4)
    config = fa.VBLoRAConfig(**{**FIELDS, "num_vectors": 9, "target_modules": ["0"]})
    fa.save(fa.init(model, config), tmp_path)
    adapter = fa.load(tmp_path)
    params = {
        path: {n: t.clone().requires_grad_() for n, t in leaves.items()} for path, leaves in adapter.params.items()
    }
    chosen = {n: t.topk(3).indices.sort().values for n, t in adapter.params["0"].items()}
    leaves = [t for each in params.values() for t in each.values()]
    optimizer = torch.optim.AdamW(leaves, 0.05)
    losses = []
    for _ in range(20):
        loss = (fa.functional_call(model, adapter.replace(params=params), x) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(t.isfinite().all() for t in leaves)
    for name, index in chosen.items():
        assert torch.equal(params["0"][name].topk(3).indices.sort().values, index)
    wrapped: Any = peft_load(nn.Sequential(nn.Linear(4, 6)), tmp_path).train()
    with pytest.raises(RuntimeError, match="infinity"):
        wrapped(x)


def test_a_bank_takes_them(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(4, 6)).requires_grad_(False), torch.randn(3, 4)
    config = fa.VBLoRAConfig(**{**FIELDS, "num_vectors": 9, "target_modules": ["0"], "init_vector_bank_bound": 1.0})
    bank = fa.AdapterBank(model, config, capacity=2)
    fa.save(fa.init(model, config), tmp_path)
    bank.add("a", fa.load(tmp_path))
    with bank.use(["a", "a", None]) as index:
        out = fa.functional_call(model, fa.routed(bank.stack, index), x)
    torch.testing.assert_close(out[:2], fa.functional_call(model, fa.load(tmp_path), x[:2]))
    torch.testing.assert_close(out[2], model(x)[2])


def test_printing(capsys: pytest.CaptureFixture[str]) -> None:
    fields = {**FIELDS, "num_vectors": 20}
    for package in (peft, shim):
        package.get_peft_model(tiny("gpt2"), package.VBLoRAConfig(**fields)).print_savable_parameters()
    first, second = capsys.readouterr().out.splitlines()
    assert first == second


def test_errors() -> None:
    with pytest.raises(ValueError, match="`topk` 0 should be a positive"):
        fa.VBLoRAConfig(topk=0)
    with pytest.raises(ValueError, match="at most num_vectors"):
        fa.VBLoRAConfig(topk=9, num_vectors=8)
    with pytest.raises(ValueError, match="`vector_length`"):
        fa.VBLoRAConfig(vector_length=0)
    for sizes, name in (((6, 8), "in_features` 6"), ((8, 6), "out_features` 6")):
        with pytest.raises(fa.SiteError, match=f"`{name} of '0' must be divisible by `vector_length` 4"):
            fa.init(nn.Sequential(nn.Linear(*sizes)), fa.VBLoRAConfig(vector_length=4, target_modules=["0"]))
