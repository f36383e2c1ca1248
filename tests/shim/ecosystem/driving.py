"""Functions run in two processes, on the real PEFT and on the shim as `peft`, and what they observe compared."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import logging
import os
import re
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
LOGGERS = ("accelerate", "diffusers", "peft", "transformers", "trl")


def run(modules: Sequence[str], folder: Path) -> dict[str, dict[str, Any]]:
    """Every check of some modules on both packages, each package in a process of its own, both at once.

    A check is a function `check_...(folder)` that returns nested values, or `defect_...(folder)`, which returns what
    the package gives, "got", and what is true, "truth", where PEFT is known to be wrong.

    Returns:
        for "peft" and "shim", what every check gave: {"value", "error", "warnings", "logs"}.
    """
    paths = [str(HERE), str(HERE.parent), str(HERE.parents[1])]
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    same = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **quiet, **same, "PYTHONPATH": os.pathsep.join(paths)}
    processes = {}
    for package in ("peft", "shim"):
        (folder / package).mkdir(parents=True)
        command = [sys.executable, str(HERE / "driving.py"), package, str(folder / package), *modules]
        with (folder / f"{package}.txt").open("w") as text:
            at = folder / package  # PEFT writes below the working directory when it offloads
            processes[package] = subprocess.Popen(command, env=environment, stdout=text, stderr=text, cwd=at)
    found = {}
    try:
        for package, process in processes.items():
            if process.wait(timeout=900) != 0:
                raise RuntimeError(f"{modules} on {package}:\n{(folder / f'{package}.txt').read_text()[-4000:]}")
            found[package] = torch.load(folder / package / "found.pt", weights_only=False)
    finally:
        for process in processes.values():
            process.kill()
    return found


def checks(modules: Sequence[str]) -> dict[str, Callable[[Path], Any]]:
    """The checks of some modules, in the order of their sources, by "module.name"."""
    found: dict[str, Callable[[Path], Any]] = {}
    for module in modules:
        functions = inspect.getmembers(importlib.import_module(module), inspect.isfunction)
        own = [f for name, f in functions if name.startswith(("check_", "defect_")) and f.__module__ == module]
        own.sort(key=lambda f: f.__code__.co_firstlineno)
        found |= {f"{module.removeprefix('on_')}.{f.__name__}": f for f in own}
    return found


class _Records(logging.Handler):
    """Keeps what is logged as a warning or worse."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append("\n".join(sorted(record.getMessage().split("\n"))))  # transformers' tables have no order


@contextlib.contextmanager
def _logged() -> Iterator[list[str]]:
    records = _Records()
    for name in LOGGERS:
        logging.getLogger(name).addHandler(records)
    try:
        yield records.lines
    finally:
        for name in LOGGERS:
            logging.getLogger(name).removeHandler(records)


def _observe(check: Callable[[Path], Any], folder: Path) -> dict[str, Any]:
    """One check, from the seed 0, in a folder of its own."""
    folder.mkdir()
    torch.manual_seed(0)
    value, error = None, ""
    with warnings.catch_warnings(record=True) as caught, _logged() as logs:
        warnings.simplefilter("always")
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                value = check(folder)
            except Exception:
                error = traceback.format_exc()
    here = re.escape(str(folder.parent))
    said = [f"{w.category.__name__}: {str(w.message)[:80]}" for w in caught if w.category is not DeprecationWarning]
    return {
        "value": value,
        "error": error,
        "warnings": sorted({re.sub(here, "HERE", line) for line in said}),
        "logs": [re.sub(here, "HERE", line) for line in logs],
    }


def main(package: str, folder: str, *modules: str) -> None:
    """What the processes do."""
    torch.set_num_threads(1)
    if package == "shim":
        importlib.import_module("funcadapt.peft").as_peft()
    found = {name: _observe(check, Path(folder) / name) for name, check in checks(modules).items()}
    real = "site-packages/peft/" in str(importlib.import_module("peft").__file__)
    if real != (package == "peft"):
        raise RuntimeError(f"Wanted {package}, and `import peft` gave {sys.modules['peft'].__file__}.")
    torch.save(found, Path(folder) / "found.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
