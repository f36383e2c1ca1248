"""Which method adapts which kind of layer, here and in PEFT: found by trying.

python tests/support.py        writes the table into the README
"""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import bitsandbytes
import peft
import torch
from cases import ALL, VARIANTS, Case
from specs import Variant
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import funcadapt as fa
from funcadapt.config import thaw

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- support -->\n", "<!-- end of support -->"

# column -> the kinds of `cases.KINDS` in it, and PEFT's chance: a layer that every method's sizes divide, and an input
COLUMNS: dict[str, tuple[tuple[str, ...], Any, Any]] = {
    "Linear": (("linear", "linear_no_bias"), lambda: nn.Linear(8, 8), lambda: torch.randn(2, 3, 8)),
    "Conv1D (transformers)": (("hf_conv1d",), lambda: Conv1D(8, 8), lambda: torch.randn(2, 3, 8)),
    "Embedding": (("embedding",), lambda: nn.Embedding(16, 8), lambda: torch.randint(16, (2, 3))),
    "Conv1d": (("conv1d",), lambda: nn.Conv1d(8, 8, 3), lambda: torch.randn(2, 8, 9)),
    "Conv2d": (("conv2d",), lambda: nn.Conv2d(8, 8, 3), lambda: torch.randn(2, 8, 5, 5)),
    "grouped": (("conv2d_grouped",), lambda: nn.Conv2d(8, 8, 3, groups=2), lambda: torch.randn(2, 8, 5, 5)),
    "Conv3d": (("conv3d",), lambda: nn.Conv3d(8, 8, 3), lambda: torch.randn(2, 8, 4, 4, 4)),
    "attention": (("mha",), lambda: nn.MultiheadAttention(8, 2, batch_first=True), lambda: torch.randn(2, 3, 8)),
    "4 bits": (("linear",), lambda: bitsandbytes.nn.Linear4bit(8, 8).to("cpu"), lambda: torch.randn(2, 3, 8)),
    "parameter": (("parameter",), None, None),
    "experts": (("experts_linear", "experts_bmm"), None, None),
}


# What trying with the configs of the laws cannot show: they name layers by pattern, need token ids, or need adapters
# that are there already; and QA-LoRA acts at GPTQ's own layers only, elsewhere PEFT takes its field for nothing.
BY_HAND = {
    "alora": ("Linear", "Conv1D (transformers)", "4 bits"),
    "arrow": ("Linear", "4 bits"),
    "bdlora": ("Linear",),
    "qalora": (),
}


# On layers of bitsandbytes PEFT takes these configs for plain LoRA, without a word.
PLAIN_IN_4_BITS = ("kasa", "monteclora")


class _Net(nn.Module):
    """One layer, and something around it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"layer": layer})
        self.is_loaded_in_4bit = isinstance(layer, bitsandbytes.nn.Linear4bit)

    def forward(self, x: Tensor) -> Tensor:
        layer = self.inner["layer"]
        return layer(x, x, x)[0] if "MultiheadAttention" in type(layer).__name__ else layer(x)


def in_peft(name: str, variant: Variant, column: str) -> bool:
    """Whether PEFT injects such a config, and the result runs and depends on what is trained."""
    _, layer, inputs = COLUMNS[column]
    if layer is None:  # only plain LoRA knows parameters
        return name == "lora"
    if name in BY_HAND:
        return column in BY_HAND[name]
    if column == "4 bits" and name in PLAIN_IN_4_BITS:
        return False
    config = variant.config(target_modules=["layer"])
    defaults = type(config)(**{f.name: getattr(config, f.name) for f in dataclasses.fields(config) if _required(f)})
    changed = {
        f.name: thaw(getattr(config, f.name))
        for f in dataclasses.fields(config)
        if getattr(config, f.name) != getattr(defaults, f.name) or _required(f)
    }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model: Any = peft.get_peft_model(_Net(layer()), getattr(peft, type(config).__name__)(**changed))
            own = [p for p in model.parameters() if p.requires_grad]
            x = inputs()
            model.base_model(x, **{k: v.expand(len(x)) for k, v in variant.inputs.items()}).sum().backward()
    except Exception:
        return False
    return bool(own)


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.name == "total_step"


def matrix() -> list[tuple[str, list[tuple[bool, bool]]]]:
    """Method -> for each column, whether it is adapted here, and in PEFT."""
    found: list[tuple[str, list[tuple[bool, bool]]]] = []
    for name, variants in VARIANTS.items():
        if not variants:  # it is for modules and rows as they are, and for no kind of layer
            continue
        first = variants[0]
        cells: list[tuple[bool, bool]] = []
        for column, (kinds, *_) in COLUMNS.items():
            cases = [case for case in ALL if case.method.name == name and case.variant is first]
            here = any(case.kind.name in kinds and _works(case) for case in cases)
            if column == "4 bits":
                here = here and _works_in_4_bits(cases)
            cells.append((here, in_peft(name, first, column)))
        found.append((name, cells))
    return found


def _works(case: Case) -> bool:
    return case.kind.name not in case.variant.refused | case.variant.unusable


def _works_in_4_bits(cases: list[Case]) -> bool:
    """Whether an adapter for the layer of 4 bits runs, and what is trained has gradients."""
    case = next(case for case in cases if case.kind.name == "linear")
    _, layer, inputs = COLUMNS["4 bits"]
    model = nn.Sequential(layer())
    adapter = case.given(fa.init(model, case.variant.config(target_modules=["0"])))
    params = {p: {n: t.detach().requires_grad_() for n, t in ls.items()} for p, ls in adapter.params.items()}
    fa.functional_call(model, adapter.replace(params=params), (inputs(),)).sum().backward()
    return any(t.grad is not None for leaves in params.values() for t in leaves.values())


def markdown() -> str:
    """The table as the README has it."""
    words = {(True, True): "both", (True, False): "here", (False, True): "PEFT", (False, False): "-"}
    head = ["method", *COLUMNS]
    rows = [[name, *(words[cell] for cell in cells)] for name, cells in matrix()]
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    text = README.read_text()
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    README.write_text(text[:start] + markdown() + text[end:])
