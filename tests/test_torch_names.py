"""Every private name of torch that funcadapt leans on still means what funcadapt takes it to mean."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import funcadapt
from funcadapt import _torch


def test_in_functorch() -> None:
    seen: list[bool] = []

    def f(x: Tensor) -> Tensor:
        seen.append(_torch.in_functorch())
        return x.sum()

    f(torch.ones(2))
    torch.func.grad(f)(torch.ones(2))
    torch.func.vmap(f)(torch.ones(2, 2))
    f(torch.ones(2))
    assert seen == [False, True, True, False]


def test_outside_functorch() -> None:
    def f(x: Tensor) -> Tensor:
        with _torch.outside_functorch():
            assert not _torch.in_functorch()
            constant = _Opaque.apply(torch.ones(2))
        assert _torch.in_functorch()
        return (x * constant).sum()

    assert torch.equal(torch.func.vmap(torch.func.grad(f))(torch.ones(3, 2)), torch.full((3, 2), 2.0))


class _Opaque(torch.autograd.Function):
    """Without `setup_context` and rules: no transform goes through it."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_in_reentrant_checkpoint(use_reentrant: bool) -> None:
    seen: list[bool] = []

    def f(x: Tensor) -> Tensor:
        seen.append(_torch.in_reentrant_checkpoint())
        return x * 2

    checkpoint(f, torch.ones(2, requires_grad=True), use_reentrant=use_reentrant)
    f(torch.ones(2))
    assert seen == [use_reentrant, False]


def test_is_compiling() -> None:
    seen: list[bool] = []

    def f(x: Tensor) -> Tensor:
        return x + 1 if _torch.is_compiling() else x

    assert torch.equal(torch.compile(f, backend="eager", fullgraph=True)(torch.zeros(2)), torch.ones(2))
    assert not _torch.is_compiling()
    assert not seen


def test_the_grouped_product_is_dispatched_under_its_private_name() -> None:
    asked = []

    class Spy:
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            asked.append(func)
            return torch.zeros(1)

    F.grouped_mm(torch.ones(2, 4), Spy(), offs=torch.tensor([1, 2]))  # pyright: ignore
    assert asked == [_torch.grouped_mm]


def test_a_module_reads_its_tensors_and_forward_from_its_dicts() -> None:
    """What the engine swaps is what a call of the module uses."""
    layer = nn.Linear(2, 2)
    layer.__dict__["forward"] = lambda x: x + 1
    assert torch.equal(layer(torch.zeros(2)), torch.ones(2))
    del layer.__dict__["forward"]
    stand_in = torch.zeros(2, 2)
    layer._parameters["weight"] = stand_in  # pyright: ignore
    assert layer.weight is stand_in
    assert torch.equal(layer(torch.ones(2)), layer.bias)


def test_private_names_are_used_in_one_file_only() -> None:
    """`torch._x` and imports from private torch modules belong into `_torch.py`."""
    folder, found = Path(funcadapt.__file__).parent, []
    for file in folder.rglob("*.py"):
        if file.name == "_torch.py":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            dotted = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            if isinstance(node, ast.ImportFrom):
                dotted = f"{node.module}.{','.join(alias.name for alias in node.names)}"
            elif isinstance(node, ast.Import):
                dotted = ",".join(alias.name for alias in node.names)
            if dotted.startswith("torch.") and any(
                p.startswith("_") and not p.startswith("__") for p in dotted.split(".")
            ):
                found.append(f"{file.name}: {dotted}")
    assert not found
