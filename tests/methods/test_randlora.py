"""RandLoRA: its files, and what autograd keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils import get_peft_model_state_dict
from peft_tools import randomise, raw, tiny, tokens
from safetensors.torch import save_file
from torch import Tensor, nn

import funcadapt as fa
import funcadapt.peft as shim
from funcadapt.checkpoint import CONFIG, WEIGHTS

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

FIELDS: dict[str, Any] = {"r": 3, "randlora_alpha": 2, "target_modules": ["q_proj", "down_proj"]}


def test_bases_that_a_file_has_for_layers_only(tmp_path: Path) -> None:
    """As PEFT gives them for a model into which it injected the adapter; otherwise it adds one for all (its B19)."""
    theirs: Any = peft.inject_adapter_in_model(peft.RandLoraConfig(**FIELDS), tiny("llama"))
    randomise(theirs)
    state = {k: v.clone() for k, v in get_peft_model_state_dict(theirs).items()}
    assert not any(k.startswith(("randlora_", "base_model.randlora_")) for k in state)
    adapter = fa.init(tiny("llama"), fa.RandLoraConfig(**FIELDS))
    fa.save(adapter, tmp_path)
    keys = raw(tmp_path).keys()
    assert sum(k.endswith("randlora_B") for k in keys) == 5  # four layers, and all
    save_file(state, tmp_path / WEIGHTS)
    with torch.no_grad():
        expected = theirs(**tokens("llama")).logits
        for given in (None, tiny("llama")):
            again = fa.load(tmp_path, model=given)
            out = fa.functional_call(tiny("llama"), again, (), tokens("llama")).logits
            torch.testing.assert_close(out, expected)
        view: Any = shim.inject_adapter_in_model(shim.RandLoraConfig(**FIELDS), tiny("llama"))
        shim.set_peft_model_state_dict(view, state)
        torch.testing.assert_close(view(**tokens("llama")).logits, expected)
    one = next(k for k in state if k.endswith("randlora_A"))
    save_file({**state, one: state[one][..., :-1].contiguous()}, tmp_path / WEIGHTS)
    with pytest.raises(fa.AdapterFileError, match="share 'randlora_A', but it has several shapes"):
        fa.load(tmp_path)
    assert (tmp_path / CONFIG).exists()


def test_autograd_keeps_nothing_of_the_size_of_the_update() -> None:
    """But what the products need; PEFT has a backward of its own for that."""
    model = nn.Sequential(nn.Linear(40, 64))
    adapter = fa.init(model, fa.RandLoraConfig(r=4, target_modules=["0"], init_weights=False))
    for leaf in adapter.params["0"].values():
        leaf.requires_grad_()
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // 4
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        fa.functional_call(model, adapter, torch.randn(2, 40, requires_grad=True))
    large = [size for size in kept.values() if size >= 40 * 40]
    # the base weight, V once, and the frozen B
    assert sorted(large) == [40 * 40, 40 * 64, 64 * 40]


def test_bases_without_a_spread_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(fa.SiteError, match="projection_prng_key"):
        fa.init(model, fa.RandLoraConfig(r=1, very_sparse=True, projection_prng_key=2, target_modules=["0"]))
