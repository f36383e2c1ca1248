"""What every benchmark shares: paired timing, the model, the machine line, results as JSON and as a table."""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """The line that every result carries: without it a time means nothing."""
    cpu = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine())
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load_before": round(os.getloadavg()[0], 2),
        "commit": commit.stdout.strip(),
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def paired(candidates: Mapping[str, Callable[[], Any]], *, repeats: int, warmup: int = 3) -> dict[str, list[float]]:
    """Time candidates in turn, so that whatever slows the machine down slows all of them down.

    The order is reversed every other round, so that none always runs behind the same neighbour.

    Args:
        candidates: name -> what to run.
        repeats: how many rounds.
        warmup: how many rounds before that are not counted.

    Returns:
        Name -> seconds of each round.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    for _ in range(warmup):
        for name in names:
            candidates[name]()
    gc.collect()
    gc.disable()
    try:
        for turn in range(repeats):
            for name in names if turn % 2 == 0 else reversed(names):
                start = time.perf_counter()
                candidates[name]()
                _synchronize()
                times[name].append(time.perf_counter() - start)
    finally:
        gc.enable()
    return times


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def summary(times: Mapping[str, list[float]], floor: str) -> dict[str, dict[str, float]]:
    """Median milliseconds, and the median and quartiles of the ratio to the floor, round by round."""
    out: dict[str, dict[str, float]] = {}
    for name, series in times.items():
        ratios = [a / b for a, b in zip(series, times[floor], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (ratios[0],) * 3
        out[name] = {
            "median_ms": round(statistics.median(series) * 1e3, 3),
            "ratio": round(statistics.median(ratios), 4),
            "ratio_q1": round(low, 4),
            "ratio_q3": round(high, 4),
            "rounds": len(series),
        }
    return out


def report(name: str, rows: list[dict[str, Any]], columns: list[str]) -> None:
    """Print a table, and write the rows with the machine line to `benchmarks/results/NAME.json`."""
    table = Table(title=name)
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(str(row.get(column, "")) for column in columns))
    Console(width=140).print(table)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


def smollm2() -> Any:
    """SmolLM2-135M in float32, frozen, in training mode (it has no dropout)."""
    from funcadapt.recipes.pretrained import load_pretrained

    model, _ = load_pretrained()
    return model.requires_grad_(False).train()
