"""The same code run on PEFT and on the shim, and what it observes compared."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from peft_tools import raw
from torch import nn

import funcadapt.peft as shim

PACKAGES: dict[str, Any] = {"peft": peft, "shim": shim}


class Observed:
    """What a run gave: its result or exception type, and the warnings."""

    def __init__(self, run: Callable[[], Any]) -> None:
        self.error: BaseException | None = None
        self.value: Any = None
        with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(io.StringIO()) as out:
            warnings.simplefilter("always")
            try:
                self.value = run()
            except Exception as error:
                self.error = error
        self.printed = out.getvalue()
        # transformers' advice about names that PEFT still uses
        self.warnings = [(type_of(w), str(w.message)) for w in caught if w.category is not FutureWarning]


def type_of(warning: Any) -> str:
    return warning.category.__name__


def on_both(scenario: Callable[[Any], Any]) -> tuple[Observed, Observed]:
    """A scenario, which takes the package, on PEFT and on the shim, from the same seed."""
    found = []
    for package in PACKAGES.values():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            found.append(Observed(lambda package=package: scenario(package)))
    return found[0], found[1]


def same(scenario: Callable[[Any], Any], tolerance: float = 1e-5, warn: bool = True) -> Any:
    """The scenario observes the same on both: values, printed text, types and beginnings of warnings."""
    theirs, ours = on_both(scenario)
    if theirs.error is not None:
        raise theirs.error
    if ours.error is not None:
        raise ours.error
    equal(theirs.value, ours.value, tolerance)
    assert theirs.printed == ours.printed
    if warn:
        assert sorted({(t, m[:40]) for t, m in theirs.warnings}) == sorted({(t, m[:40]) for t, m in ours.warnings})
    return ours.value


def same_error(scenario: Callable[[Any], Any], text: str = "") -> None:
    """The scenario raises on both: ours is of PEFT's type, and both messages contain a text."""
    theirs, ours = on_both(scenario)
    assert theirs.error is not None, "PEFT does not raise"
    assert ours.error is not None, f"the shim does not raise, PEFT: {theirs.error!r}"
    kind = type(theirs.error)
    kind = getattr(shim.utils, kind.__name__) if kind.__module__.startswith("peft.") else kind
    assert isinstance(ours.error, kind), (theirs.error, ours.error)
    assert text in str(theirs.error), theirs.error
    assert text in str(ours.error), ours.error


def equal(a: Any, b: Any, tolerance: float = 1e-5, where: str = "") -> None:
    """Nested values are equal, tensors to a tolerance."""
    if isinstance(a, torch.Tensor):
        assert a.shape == b.shape, (where, a.shape, b.shape)
        assert a.dtype == b.dtype, (where, a.dtype, b.dtype)
        torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance, msg=lambda m: f"{where}: {m}")
    elif isinstance(a, dict):
        assert sorted(map(str, a)) == sorted(map(str, b)), (where, sorted(a), sorted(b))
        for key in a:
            equal(a[key], b[key], tolerance, f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), (where, a, b)
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            equal(x, y, tolerance, f"{where}[{i}]")
    else:
        assert a == b, (where, a, b)


def fill(model: nn.Module, seed: int = 5) -> nn.Module:
    """Random numbers in every adapter and every trained parameter, by name, so that both packages get the same."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or any(part in name for part in ("lora_", "ia3_")):
                key = sum(ord(c) * (i + 1) for i, c in enumerate(name)) + seed
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(key))
                parameter.add_(0.3 * noise.to(parameter.dtype))
    return model


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def files(folder: Path) -> dict[str, Any]:
    """Every file below a folder: the tensors of checkpoints, configs as JSON (lists that are sets sorted), text."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors":
            found[name] = raw(path.parent)
        elif path.suffix == ".json":
            values = json.loads(path.read_text())
            for key in ("target_modules", "exclude_modules", "feedforward_modules"):
                if isinstance(values.get(key), list):
                    values[key] = sorted(values[key])
            found[name] = values
        elif path.is_file():
            found[name] = path.read_text()
    return found


def status(value: Any) -> Any:
    """A status, or a list of them, as dicts."""
    return [dataclasses.asdict(v) for v in value] if isinstance(value, list) else dataclasses.asdict(value)
