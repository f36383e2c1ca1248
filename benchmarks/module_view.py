"""The in-place module view against PEFT: injecting, forward passes, training steps.

    python -m benchmarks.module_view [inject] [forward] [train] [overhead]

`inject`: all-linear LoRA r=16 into a 7B-shaped Llama on the meta device, where only Python is left to see.
`forward`, `train`: all-linear LoRA r=8 on SmolLM2-135M in float32, the same shapes as in `single_adapter`; the floor is
the bare base model, for training with gradients to its input embeddings. Both contenders hold the same values.
`overhead`: microseconds a site over the bare layers, in a chain of 200 small ones.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import nn

import funcadapt as fa
from benchmarks.common import paired, report, smollm2, summary
from benchmarks.single_adapter import RANK, SHAPES
from funcadapt.peft import LoraConfig
from funcadapt.peft.functional import inject_adapter_in_model


def seven_b() -> nn.Module:
    """A Llama with the shapes of the 7B model, on the meta device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        vocab_size=32000,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def inject() -> None:
    """Injection; every round gets a fresh model, made outside the clock."""
    fields: dict[str, Any] = {"r": 16, "target_modules": "all-linear"}
    contenders: dict[str, Callable[[nn.Module], Any]] = {
        "funcadapt": lambda m: inject_adapter_in_model(LoraConfig(**fields), m),
        "funcadapt low_cpu_mem_usage": lambda m: inject_adapter_in_model(
            LoraConfig(**fields), m, low_cpu_mem_usage=True
        ),
        "fa.materialize": lambda m: fa.materialize(m, fa.init(m, fa.LoraConfig(**fields))),
        "peft": lambda m: peft.inject_adapter_in_model(peft.LoraConfig(**fields), m),
        "peft low_cpu_mem_usage": lambda m: peft.inject_adapter_in_model(
            peft.LoraConfig(**fields), m, low_cpu_mem_usage=True
        ),
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(3):
        for name, run in contenders.items():
            model = seven_b()
            times[name] += paired({"x": lambda run=run, model=model: run(model)}, repeats=1, warmup=0)["x"]
    rows = [{"what": name, **row} for name, row in summary(times, "funcadapt").items()]
    report("view_inject", rows, ["what", "median_ms", "ratio", "ratio_q1", "ratio_q3", "rounds"])


def setting() -> dict[str, Any]:
    """The base model, and a copy of it in each view, with the same values."""
    torch.manual_seed(0)
    model = smollm2()
    config = fa.LoraConfig(r=RANK, target_modules="all-linear")
    adapter = fa.init(model, config)
    ours = fa.materialize(copy.deepcopy(model), adapter).train()
    theirs: Any = peft.inject_adapter_in_model(
        peft.LoraConfig(r=RANK, target_modules="all-linear"), copy.deepcopy(model)
    )
    theirs.load_state_dict(ours.state_dict())
    return {"model": model, "view": ours, "peft": theirs.train(), "adapter": adapter}


def forward(s: dict[str, Any]) -> None:
    """Forward passes without gradients."""
    rows = []
    for shape, rounds in SHAPES.items():
        ids = torch.randint(0, 49_000, shape)
        with torch.no_grad():
            runs = {"base": s["model"], "view": s["view"], "peft": s["peft"]}
            times = paired({k: lambda m=m, ids=ids: m(ids) for k, m in runs.items()}, repeats=rounds)
        rows += [{"shape": f"{shape[0]}x{shape[1]}", "what": k, **v} for k, v in summary(times, "base").items()]
    report("view_forward", rows, ["shape", "what", "median_ms", "ratio", "ratio_q1", "ratio_q3", "rounds"])


def train(s: dict[str, Any]) -> None:
    """Training steps: forward and backward."""
    embed = s["model"].get_input_embeddings()
    leaves = {k: [p for p in s[k].parameters() if p.requires_grad] for k in ("view", "peft")}
    rows = []
    for shape, rounds in SHAPES.items():
        ids = torch.randint(0, 49_000, shape)

        def floor(ids: torch.Tensor = ids) -> None:
            x = embed(ids).detach().requires_grad_()
            s["model"](inputs_embeds=x, labels=ids).loss.backward()

        def step(name: str, ids: torch.Tensor = ids) -> None:
            for leaf in leaves[name]:
                leaf.grad = None
            s[name](ids, labels=ids).loss.backward()

        times = paired(
            {"floor": floor, "view": lambda: step("view"), "peft": lambda: step("peft")}, repeats=rounds // 2
        )
        rows += [{"shape": f"{shape[0]}x{shape[1]}", "what": k, **v} for k, v in summary(times, "floor").items()]
    report("view_train", rows, ["shape", "what", "median_ms", "ratio", "ratio_q1", "ratio_q3", "rounds"])


def overhead() -> None:
    """A chain of small layers, where Python is all there is to see."""
    sites, width = 200, 16
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(sites))).requires_grad_(False)
    names = [str(i) for i in range(sites)]
    ours = fa.materialize(copy.deepcopy(model), fa.init(model, fa.LoraConfig(r=RANK, target_modules=names)))
    theirs: Any = peft.inject_adapter_in_model(peft.LoraConfig(r=RANK, target_modules=names), copy.deepcopy(model))
    x = torch.randn(1, width)
    with torch.no_grad():
        runs = {"base": model, "view": ours, "peft": theirs}
        times = paired({k: lambda m=m: m(x) for k, m in runs.items()}, repeats=200, warmup=20)
    rows = [{"what": k, **v} for k, v in summary(times, "base").items()]
    for row in rows:
        row["us_a_site"] = round((row["median_ms"] - rows[0]["median_ms"]) * 1e3 / sites, 2)
    report("view_overhead", rows, ["what", "median_ms", "us_a_site"])


def main() -> None:
    """Run the parts named on the command line, or all of them."""
    torch.set_num_threads(2)
    parts = sys.argv[1:] or ["inject", "overhead", "forward", "train"]
    s = setting() if {"forward", "train"} & set(parts) else {}
    for name in parts:
        {"inject": inject, "overhead": overhead}[name]() if name in ("inject", "overhead") else globals()[name](s)


if __name__ == "__main__":
    main()
