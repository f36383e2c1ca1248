"""BOFT: what the laws cannot say."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from peft.tuners.boft import layer as theirs
from peft_tools import config_file, peft_save, raw, wrap
from specs.boft import permutation, rotation
from torch import nn

import funcadapt as fa
from funcadapt.parts.orthogonal import butterfly

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of the CUDA extension


def linear(size: int = 16) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(size, 5)).double(), torch.randn(3, size, dtype=torch.float64)


@pytest.mark.parametrize(("size", "side", "factors"), [(16, 2, 4), (16, 4, 3), (24, 4, 2), (24, 2, 3), (8, 8, 1)])
def test_butterfly_factors(size: int, side: int, factors: int) -> None:
    """The rotation by transpositions is the one by PEFT's permutation matrices, and it is orthogonal."""
    model, x = linear(size)
    config = fa.BOFTConfig(boft_block_size=side, boft_n_butterfly_factor=factors, init_weights=False,
                           target_modules=["0"])  # fmt: skip
    adapter = fa.init(model, config)
    p = adapter.params["0"]
    r = rotation(p["boft_R"])
    torch.testing.assert_close(r.T @ r, torch.eye(size, dtype=r.dtype))
    base: Any = model[0]
    torch.testing.assert_close(fa.functional_call(model, adapter, x), x @ r @ base.weight.T * p["boft_s"].T + base.bias)
    # the effective block: what one input reaches
    assert (r.abs() > 1e-12).sum(1).unique().tolist() == [side * 2 ** (factors - 1)]
    for i in range(factors):
        order = theirs.BOFTLayer.block_butterfly_perm(None, size, size // side // 2**i, side // 2, factors - 1)  # pyright: ignore
        matrix = theirs.BOFTLayer.perm2mat(None, order)  # pyright: ignore
        assert torch.equal(matrix, permutation(size, side * 2**i, side // 2).float() if factors > 1 else matrix)


def test_pefts_extension_would_compute_this(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """PEFT's own code with several factors, its CUDA kernel replaced by what it computes."""

    class Kernel:
        @staticmethod
        def apply(blocks: torch.Tensor) -> torch.Tensor:
            return torch.stack([torch.block_diag(*factor) for factor in blocks])

    monkeypatch.setattr(theirs, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(theirs, "FastBlockDiag", Kernel)
    model, x = linear()
    fields: dict[str, Any] = {"boft_block_size": 4, "boft_n_butterfly_factor": 3, "target_modules": ["0"]}
    wrapped = wrap(linear()[0], peft.BOFTConfig(**fields)).double()
    adapter = fa.load(peft_save(wrapped, tmp_path), model=model)
    assert adapter.params["0"]["boft_R"].shape[0] == 3
    torch.testing.assert_close(fa.functional_call(model, adapter, x), wrapped(x))
    torch.testing.assert_close(
        torch.func.functional_call(model, fa.merge(model, adapter), (x,)), wrapped.merge_and_unload()(x)
    )


def test_a_file_of_peft_without_its_extension(tmp_path: Any) -> None:
    """It has one factor, whatever its config says (B20)."""
    model, x = linear()
    fields: dict[str, Any] = {"boft_block_size": 4, "boft_n_butterfly_factor": 2, "target_modules": ["0"]}
    wrapped = wrap(linear()[0], peft.BOFTConfig(**fields)).double()
    folder = peft_save(wrapped, tmp_path / "theirs")
    assert raw(folder)["base_model.model.0.boft_R"].shape[0] == 1
    assert config_file(folder)["boft_n_butterfly_factor"] == 2
    adapter = fa.load(folder, model=model)
    assert adapter.params["0"]["boft_R"].shape == (2, 4, 4, 4)
    torch.testing.assert_close(fa.functional_call(model, adapter, x), wrapped(x))
    fa.save(adapter, tmp_path / "ours")
    again = fa.load(tmp_path / "ours", model=model)
    assert torch.equal(again.params["0"]["boft_R"], adapter.params["0"]["boft_R"])


def test_dropout_replaces_blocks_of_one_factor() -> None:
    model, x = linear()
    config = fa.BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=2, boft_dropout=0.5, init_weights=False,
                           target_modules=["0"])  # fmt: skip
    adapter = fa.init(model, config)
    blocks = adapter.params["0"]["boft_R"]
    outs = [fa.functional_call(model.train(), adapter, x) for _ in range(20)]
    assert len({round(float(out.sum()), 9) for out in outs}) > 10
    with torch.no_grad():  # all of them: each call drops one of the two factors
        all_of = adapter.replace(config=fa.BOFTConfig(**{**config.to_dict(), "boft_dropout": 1.0}))
        expected = [
            fa.functional_call(model.eval(), adapter.replace(params={"0": {**adapter.params["0"], "boft_R": r}}), x)
            for r in (blocks * torch.tensor([0.0, 1.0])[:, None, None, None],
                      blocks * torch.tensor([1.0, 0.0])[:, None, None, None])
        ]  # fmt: skip
        outs = [fa.functional_call(model.train(), all_of, x) for _ in range(20)]
    found = {next(i for i, e in enumerate(expected) if torch.allclose(out, e)) for out in outs}
    assert found == {0, 1}


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_dropout_under_vmap(randomness: str) -> None:
    model, x = linear()
    config = fa.BOFTConfig(boft_block_size=2, boft_dropout=0.5, init_weights=False, target_modules=["0"])
    stack = fa.stack([fa.init(model, config)] * 8)
    outs = torch.func.vmap(lambda a: fa.functional_call(model.train(), a, x), randomness=randomness)(stack)
    assert (len({round(float(out.sum()), 9) for out in outs}) == 1) == (randomness == "same")
    fa.functional_call(model, fa.grouped(stack, expand=True), (x,))


def test_rotations_are_undone_by_their_transposes() -> None:
    q = torch.linalg.qr(torch.randn(3, 4, 4, 4, dtype=torch.float64))[0]
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    torch.testing.assert_close(butterfly(butterfly(x, q), q, transposed=True), x)


def test_errors() -> None:
    with pytest.raises(ValueError, match="must be non-zero"):
        fa.BOFTConfig(boft_block_size=0)
    with pytest.raises(ValueError, match="but not both"):
        fa.BOFTConfig(boft_block_num=2)
    with pytest.raises(ValueError, match="positive integer"):
        fa.BOFTConfig(boft_n_butterfly_factor=0)
    with pytest.raises(ValueError, match="must be in"):
        fa.BOFTConfig(boft_dropout=2.0)
    with pytest.raises(ValueError, match="must also be specified"):
        fa.BOFTConfig(layers_pattern="h")
    for fields, words in (
        ({"boft_block_size": 3}, r"in_features \(16\) of '0' must be divisible by boft_block_size \(3\)"),
        ({"boft_block_size": 0, "boft_block_num": 3}, r"divisible by boft_block_num \(3\)"),
        ({"boft_n_butterfly_factor": 4}, r"4 blocks of size 4: boft_n_butterfly_factor=4 needs"),
        ({"boft_block_size": 1, "boft_n_butterfly_factor": 2}, r"needs an even size"),
    ):
        with pytest.raises(fa.SiteError, match=words):
            fa.init(linear()[0], fa.BOFTConfig(**fields, target_modules=["0"]))  # pyright: ignore
