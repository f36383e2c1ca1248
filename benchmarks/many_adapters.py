"""Many adapters on SmolLM2-135M, all-linear LoRA r=8, float32: against the best that PEFT offers for the same job.

    python -m benchmarks.many_adapters [train] [mixed] [ensemble] [per_sample]

`train`: one step (forward and backward) of N adapters, each on its own rows. The floor is the bare base model on the
    same N B rows with gradients to its input embeddings. PEFT trains one adapter at a time: N steps, without the cost
    of switching.
`mixed`: 16 rows, 16 adapters, each row its own, in random order. PEFT's `adapter_names`. Every execution by name, too.
`ensemble`: 16 adapters on one shared input: one pass, a loop of calls, PEFT's `adapter_names`, PEFT's loop.
`per_sample`: each row's gradient of 32 rows, against one ordinary training step on the same rows.
    Peak memory is what the process needed beyond the start of the step.

The process runs itself again with glibc told to keep freed memory and to use huge pages, for all contenders.
The cost of a call over the number of resident adapters, and filling a bank, are in `benchmarks.bank`.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor

import funcadapt as fa
from benchmarks.common import paired, report, smollm2, summary
from benchmarks.single_adapter import RANK, trainable

COLUMNS = ["shape", "what", "median_ms", "ratio", "ratio_q1", "ratio_q3", "rounds"]
TRAIN = [(8, 16, 6), (32, 4, 4), (8, 64, 4)]  # adapters, tokens each, rounds
MIXED = [(1, 24), (16, 6), (64, 3)]  # tokens a row, rounds
CONFIG = {"r": RANK, "target_modules": "all-linear", "init_lora_weights": False}


def stacked(model: Any, n: int) -> tuple[fa.Adapter, list[Tensor]]:
    """A trainable stack of n adapters, and its params."""
    return trainable(fa.stack(fa.init(model, fa.LoraConfig(**CONFIG), seed=i) for i in range(n)))


def wrapped(model: Any, names: list[str]) -> Any:
    """PEFT's model around a copy of the base, with named adapters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**CONFIG), adapter_name=names[0])
        for name in names[1:]:
            out.add_adapter(name, peft.LoraConfig(**CONFIG))
    return out


def floor_step(model: Any, ids: Tensor) -> None:
    """A training step that no adapter can beat: gradients to the input embeddings alone."""
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=embeddings, labels=ids, use_cache=False).loss.backward()


def train(model: Any) -> None:
    """Training N adapters in one step."""
    rows: list[dict[str, Any]] = []
    one = wrapped(model, ["default"]).train()
    one_leaves = [p for p in one.parameters() if p.requires_grad]
    for n, tokens, rounds in TRAIN:
        stack, leaves = stacked(model, n)
        ids = torch.randint(0, 49_000, (n, tokens))

        def many(stack: fa.Adapter = stack, leaves: list[Tensor] = leaves, ids: Tensor = ids) -> None:
            inputs = {"labels": ids, "use_cache": False}
            fa.functional_call(model, fa.grouped(stack), (ids,), inputs).loss.backward()
            for leaf in leaves:
                leaf.grad = None

        def theirs(ids: Tensor = ids) -> None:
            for row in ids.split(1):
                one(row, labels=row, use_cache=False).loss.backward()
                for leaf in one_leaves:
                    leaf.grad = None

        steps = {"base": lambda ids=ids: floor_step(model, ids), "funcadapt": many, "peft, one by one": theirs}
        times = paired(steps, repeats=rounds, warmup=1)
        rows += [{"shape": f"{n} x 1x{tokens}", "what": k, **v} for k, v in summary(times, "base").items()]
        del stack, leaves
        gc.collect()
    report("many_train", rows, COLUMNS)


@torch.no_grad()
def mixed(model: Any) -> None:
    """A batch of 16 rows, each with another adapter."""
    n, rows = 16, []
    names = [f"a{i}" for i in range(n)]
    stack = stacked(model, n)[0].map(Tensor.detach)
    theirs = wrapped(model, names).eval()
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    picked = [names[i] for i in order]
    model.eval()
    for tokens, rounds in MIXED:
        ids = torch.randint(0, 49_000, (n, tokens))

        def ours(how: str | None, ids: Tensor = ids) -> Callable[[], Any]:
            entry = fa.routed(stack, order, how=how)
            return lambda: fa.functional_call(model, entry, (ids,), {"use_cache": False})

        calls: dict[str, Callable[[], Any]] = {
            "base": lambda ids=ids: model(ids, use_cache=False),
            "funcadapt": ours(None),
            **{f"funcadapt, {how}": ours(how) for how in ("gather", "sort", "masked")},
            "peft adapter_names": lambda ids=ids: theirs(ids, adapter_names=picked, use_cache=False),
        }
        times = paired(calls, repeats=rounds, warmup=2)
        rows += [{"shape": f"16x{tokens}", "what": k, **v} for k, v in summary(times, "base").items()]
    report("many_mixed", rows, COLUMNS)
    model.train()


@torch.no_grad()
def ensemble(model: Any) -> None:
    """16 adapters on one shared input."""
    n, rows = 16, []
    names = [f"a{i}" for i in range(n)]
    stack = stacked(model, n)[0].map(Tensor.detach)
    members = fa.unstack(stack)
    theirs = wrapped(model, names).eval()
    model.eval()
    for tokens, rounds in ((1, 15), (16, 4)):
        ids = torch.randint(0, 49_000, (1, tokens))
        many = fa.grouped(stack, expand=True)

        def loop(ids: Tensor = ids) -> None:
            for adapter in members:
                fa.functional_call(model, adapter, (ids,), {"use_cache": False})

        def peft_loop(ids: Tensor = ids) -> None:
            for name in names:
                theirs.set_adapter(name, inference_mode=True)
                theirs(ids, use_cache=False)

        calls: dict[str, Callable[[], Any]] = {
            "base": lambda ids=ids: model(ids.expand(n, -1), use_cache=False),
            "funcadapt": lambda ids=ids, many=many: fa.functional_call(model, many, (ids,), {"use_cache": False}),
            "funcadapt, loop": loop,
            "peft adapter_names": lambda ids=ids: theirs(ids.expand(n, -1), adapter_names=names, use_cache=False),
            "peft, loop": peft_loop,
        }
        times = paired(calls, repeats=rounds, warmup=1)
        rows += [{"shape": f"16 on 1x{tokens}", "what": k, **v} for k, v in summary(times, "base").items()]
    report("many_ensemble", rows, COLUMNS)
    model.train()


def row_losses(output: Any, ids: Tensor) -> Tensor:
    """The mean negative log-likelihood of each row's tokens."""
    nll = torch.nn.functional.cross_entropy(output.logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    return nll.mean(1)


def peak(step: Callable[[], Any]) -> float:
    """Mebibytes that the process needed beyond what it held before."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what glibc keeps would hide the peak
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _status("VmRSS")
    step()
    return round((_status("VmHWM") - before) / 1024)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def per_sample(model: Any) -> None:
    """The gradient of each of 32 rows."""
    rows: list[dict[str, Any]] = []
    adapter, leaves = trainable(fa.init(model, fa.LoraConfig(**CONFIG)))
    plain = {"use_cache": False}
    for tokens, rounds in ((16, 3),):
        ids = torch.randint(0, 49_000, (32, tokens))

        def ordinary(ids: Tensor = ids) -> None:
            row_losses(fa.functional_call(model, adapter, (ids,), plain), ids).mean().backward()
            for leaf in leaves:
                leaf.grad = None

        def direct(ids: Tensor = ids) -> Any:
            return fa.per_sample.grads(model, adapter, (ids,), plain, loss=lambda out: row_losses(out, ids))

        def norms(ids: Tensor = ids) -> Any:
            return fa.per_sample.norms(model, adapter, (ids,), plain, loss=lambda out: row_losses(out, ids))

        steps = {"one step": ordinary, "grads": direct, "norms": norms}
        times = paired(steps, repeats=rounds, warmup=1)
        peaks = {name: peak(step) for name, step in steps.items()}
        rows += [
            {"shape": f"32x{tokens}", "what": k, **v, "peak_MiB": peaks[k]}
            for k, v in summary(times, "one step").items()
        ]
    report("many_per_sample", rows, [*COLUMNS, "peak_MiB"])


def main() -> None:
    """Run the benchmarks named on the command line, or all."""
    if "GLIBC_TUNABLES" not in os.environ:
        # Page faults of fresh memory are a large and erratic part of every step here: all contenders keep theirs.
        keep = "glibc.malloc.hugetlb=1:glibc.malloc.trim_threshold=17179869184:glibc.malloc.mmap_threshold=2147483648"
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, "GLIBC_TUNABLES": keep})
    torch.manual_seed(0)
    jobs = {"train": train, "mixed": mixed, "ensemble": ensemble, "per_sample": per_sample}
    model = smollm2()
    for name in sys.argv[1:] or jobs:
        jobs[name](model)


if __name__ == "__main__":
    main()
