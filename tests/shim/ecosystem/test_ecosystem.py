"""transformers, trl, diffusers and accelerate on the shim: every observation is the one that they give on PEFT.

The checks run in two processes, one with the real PEFT and one after `funcadapt.peft.as_peft()`; see `driving`. One
test for all of them, as importing these libraries takes longer than the checks.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("trl")

import driving
import peft
import tiny
import torch
from both import equal

import funcadapt.peft as shim
from funcadapt.recipes import pretrained

# the first one forks, which has to be before anything starts threads
MODULES = ["on_trainer", "on_trl", "on_transformers", "on_snippets", "on_code", "on_more", "on_diffusers"]
TOLERANCE = 2e-5
ROUGH = {
    "real_model.check_smollm2": 1e-3,
    "trainer.check_parts": 2e-4,  # norms of gradients
    "trainer.check_gradient_checkpointing": 2e-4,
    "trl.check_sft_of_a_peft_model": 5e-3,  # it computes in bfloat16
}


def prepare(folder: Path) -> None:
    """A saved base model, and adapters of it that each package has written."""
    tiny.llama().save_pretrained(folder / "base")
    fields = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj"]}
    for name, package in {"peft": peft, "shim": shim}.items():
        configs: dict[str, Any] = {
            "lora": package.LoraConfig(**fields, r=3, lora_alpha=7 if name == "peft" else 5),
            "dora": package.LoraConfig(**fields, r=3, use_dora=True),
            "head": package.LoraConfig(**fields, r=2, modules_to_save=["lm_head"]),
            "tokens": package.LoraConfig(**fields, r=2, trainable_token_indices=[3, 4]),
        }
        for kind, config in configs.items():
            model = package.get_peft_model(type(tiny.llama()).from_pretrained(folder / "base"), config)
            tiny.noise(model).save_pretrained(folder / "adapters" / f"{name}-{kind}")


def numbers(value: Any) -> Any:
    """Floats as tensors, so that rounding is forgiven."""
    if isinstance(value, dict):
        return {key: numbers(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [numbers(one) for one in value]
    return torch.tensor(value) if isinstance(value, float) else value


def compare(modules: Sequence[str], folder: Path, subtests: Any) -> None:
    """Runs the checks of modules on both packages, and compares what they observe."""
    found = driving.run(modules, folder)
    assert list(found["peft"]) == list(found["shim"]) == list(driving.checks(modules))
    for name, theirs in found["peft"].items():
        with subtests.test(name):
            ours = found["shim"][name]
            assert not theirs["error"], f"on PEFT: {theirs['error']}"
            assert not ours["error"], f"on the shim: {ours['error']}"
            if ".defect_" in name:
                equal(theirs["value"]["truth"], ours["value"]["truth"], TOLERANCE, name)
                equal(ours["value"]["truth"], ours["value"]["got"], TOLERANCE, name)
                with pytest.raises(AssertionError):  # else it is no defect anymore
                    equal(theirs["value"]["truth"], theirs["value"]["got"], TOLERANCE, name)
            else:
                equal(numbers(theirs["value"]), numbers(ours["value"]), ROUGH.get(name, TOLERANCE), name)
            for kind in ("warnings", "logs"):
                new = [line for line in ours[kind] if line not in theirs[kind]]
                assert not new, f"{kind} that PEFT has not: {new}, PEFT's: {theirs[kind]}"


@pytest.mark.filterwarnings("ignore")  # what the packages say while they write is not the subject
def test_ecosystem(tmp_path: Path, subtests: Any) -> None:
    prepare(tmp_path)
    compare(MODULES, tmp_path, subtests)


@pytest.mark.heavy
def test_real_model(tmp_path: Path, subtests: Any) -> None:
    try:
        pretrained.smollm2()
    except pretrained.FetchError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))
    compare(["on_real_model"], tmp_path, subtests)
