"""`fa.AdapterBank` with SmolLM2-135M, all-linear LoRA r=8 (210 layers, 420 tensors, 10 MB a file), float32.

    python -m benchmarks.bank [load] [resident] [--loads N] [--capacity N] [--files N]

`load`: checkpoints into slots, by name, from files that are in the page cache: N loads that cycle through some distinct
files, each into a slot that was written before; against PEFT's `load_adapter` (and `delete_adapter`, not timed), and
against reading the bytes. The default takes 3.5 GB of memory. `--capacity 1000` is the full size: 10 GB and more.
`resident`: a forward pass of 16 rows x 1 token, each row with its own adapter, from banks of 1 to 1,000 slots. Only 16
slots are written, so that memory stays small.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch

import funcadapt as fa
from benchmarks.common import paired, report, smollm2, summary
from funcadapt.bank import AdapterBank

CONFIG = fa.LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)


def rss() -> float:
    """Memory that is really there, in GB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e9


def write_files(model: Any, folder: Path, count: int) -> list[Path]:
    """Distinct checkpoints."""
    first = fa.init(model, CONFIG)
    for i in range(count):
        params = {p: {k: t.roll(i, 0) for k, t in leaves.items()} for p, leaves in first.params.items()}
        fa.save(first.replace(params=params), folder / str(i))
    return [folder / str(i) for i in range(count)]


def timed(times: list[float], work: Callable[[], Any]) -> None:
    """Append milliseconds."""
    start = time.perf_counter()
    work()
    times.append((time.perf_counter() - start) * 1e3)


def load(model: Any, arguments: argparse.Namespace) -> None:
    """Loads into a bank, in turn with PEFT's and with reading the bytes."""
    with tempfile.TemporaryDirectory() as temporary:
        files = write_files(model, Path(temporary), arguments.files)
        size = (files[0] / "adapter_model.safetensors").stat().st_size
        wrapped: Any = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=8, target_modules="all-linear"))
        bank = AdapterBank(model, CONFIG, arguments.capacity)
        ours: dict[str, list[float]] = {"first of its layout": [], "slot never written": [], "slot written before": []}
        theirs: list[float] = []
        read: list[float] = []
        every = max(arguments.loads // 8, 1)
        for i in range(arguments.loads):
            folder = files[i % len(files)]
            if len(bank) == bank.capacity:  # half are replaced, half make room
                if i % 2:
                    bank.remove(bank.names[0])
                    name = f"adapter {i}"
                else:
                    name = bank.names[0]
            else:
                name = f"adapter {i}"
            kind = "first of its layout" if i == 0 else "slot written before"
            if 0 < i < bank.capacity:
                kind = "slot never written"
            timed(ours[kind], lambda f=folder, n=name: bank.load(n, f, overwrite=True))
            if i % 10 == 0:
                timed(read, (folder / "adapter_model.safetensors").read_bytes)
            if i % every == 0:
                timed(theirs, lambda f=folder: wrapped.load_adapter(str(f), adapter_name="loaded"))
                wrapped.delete_adapter("loaded")
        got, plain = bank.get(name), fa.load(folder)
        assert all(torch.equal(got.leaves(p)[k], t) for p in plain.params for k, t in plain.leaves(p).items())
    reference = statistics.median(theirs)
    rows = []
    for what, times in {**ours, "reading the bytes": read, "peft load_adapter": theirs}.items():
        if times:
            row = {"what": what, "median_ms": round(statistics.median(times), 2), "min_ms": round(min(times), 2)}
            over = round(reference / statistics.median(times), 1)
            rows.append({**row, "peft over it": over, "times": len(times), "bytes": size})
    rows[0]["rss_gb"] = round(rss(), 2)
    report("bank_load", rows, ["what", "median_ms", "min_ms", "peft over it", "times", "bytes"])


def resident(model: Any, arguments: argparse.Namespace) -> None:
    """One pass over 16 rows from banks of growing capacity."""
    ids = torch.randint(0, 49_000, (16, 1))
    first = fa.init(model, CONFIG)
    rows: list[dict[str, Any]] = []
    candidates: dict[str, Callable[[], Any]] = {"base": lambda: model(ids, use_cache=False)}
    before = rss()
    memory = {"base": 0.0}
    for capacity in (1, 10, 100, 1000):
        bank = AdapterBank(model, CONFIG, capacity)
        count = min(capacity, 16)
        for i in range(count):
            bank.add(str(i), first)
        names = [str(i % count) for i in range(16)]

        def work(bank: AdapterBank = bank, names: list[str] = names) -> None:
            with bank.use(names) as index:
                fa.functional_call(model, fa.routed(bank.stack, index), (ids,), {"use_cache": False})

        candidates[f"{capacity} slots"] = work
        memory[f"{capacity} slots"] = rss() - before
    with torch.no_grad():
        times = paired(candidates, repeats=arguments.rounds)
    for what, row in summary(times, "base").items():
        rows.append({"what": what, **row, "rss_gb_after_it": round(memory[what], 2)})
    rows[0]["rss_gb_at_the_end"] = round(rss() - before, 2)
    report("bank_resident", rows, ["what", "median_ms", "ratio", "ratio_q1", "ratio_q3", "rounds", "rss_gb_after_it"])


def main() -> None:
    """Run the parts named on the command line, or both."""
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", default=["load", "resident"])
    parser.add_argument("--loads", type=int, default=1000)
    parser.add_argument("--capacity", type=int, default=256)
    parser.add_argument("--files", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=40)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    model = smollm2()
    for part in arguments.parts:
        {"load": load, "resident": resident}[part](model, arguments)


if __name__ == "__main__":
    main()
