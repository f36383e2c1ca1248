"""EVA on two gloo ranks with data of their own: what one process gets that sees all of it, and what PEFT gets."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft.tuners.lora.eva import get_eva_state_dict
from peft_tools import tiny
from torch import Tensor, nn

import funcadapt as fa
import funcadapt.peft as shim
from funcadapt.recipes.inits import eva
from funcadapt.recipes.inits.variance import components

RANKS = 2
FIELDS: dict[str, Any] = {
    "r": 2, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"], "init_lora_weights": "eva"
}  # fmt: skip
CONFIG = fa.LoraConfig(**FIELDS, eva_config={"rho": 2.0})


def _tokens(rank: int) -> list[dict[str, Tensor]]:
    """Batches of one rank, in which the other one has more tokens that count."""
    generator = torch.Generator().manual_seed(7 + rank)
    found: list[dict[str, Tensor]] = []
    for _ in range(4):
        ids = torch.randint(2, 32, (4, 12), generator=generator)
        mask = torch.ones_like(ids)
        mask[:, 8 + 4 * rank :] = 0
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


def _rows(rank: int) -> list[Tensor]:
    """Batches of which none is large enough alone; the second rank has an empty one."""
    generator = torch.Generator().manual_seed(rank)
    scales = torch.tensor([3.0, 9.0, 1.0, 0.1, 5.0, 0.2], dtype=torch.float64)
    sizes = (2, 3) if rank == 0 else (1, 0)
    return [torch.randn(n, 6, generator=generator, dtype=torch.float64) * scales for n in sizes]


def _small() -> tuple[nn.Sequential, fa.LoraConfig]:
    torch.manual_seed(3)
    config = fa.LoraConfig(r=3, target_modules=["0", "1"], eva_config={"rho": 1.0, "tau": 0.0})
    return nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4)).double(), config


def _shim(data: Any, *, gather: bool) -> dict[str, Tensor]:
    config = shim.LoraConfig(**FIELDS, eva_config=shim.EvaConfig(rho=2.0))
    model = shim.get_peft_model(tiny("llama"), config)
    shim.initialize_lora_eva_weights(model, data, gather_distributed_inputs=gather)
    return shim.get_peft_model_state_dict(model)


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    try:
        data, (small, config) = _tokens(rank), _small()
        found: dict[str, Any] = {
            "all": components(tiny("llama"), CONFIG, data),
            "own": components(tiny("llama"), CONFIG, data, gather=False),
            "small": eva(small, config, _rows(rank)).params,
            "shim": _shim(data, gather=True),
            "shim own": _shim(data, gather=False),
            "peft": get_eva_state_dict(
                tiny("llama"),
                data,
                peft.LoraConfig(**FIELDS, eva_config=peft.EvaConfig(rho=2.0)),
                show_progress_bar=False,
            ),
        }
        torch.save(found, Path(folder, f"{rank}.pt"))
    finally:
        dist.destroy_process_group()


def _close(got: Any, want: Any, atol: float) -> None:
    assert got.keys() == want.keys()
    for key, value in want.items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(got[key], value, rtol=0, atol=atol, msg=lambda m, key=key: f"{key}: {m}")
        else:
            _close(got[key], value, atol)


def test_all_ranks_count(tmp_path: Path) -> None:
    mp.spawn(_worker, (str(tmp_path),), nprocs=RANKS)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS))
    for name in ("all", "small", "shim"):
        _close(first[name], second[name], 0.0)
    _close(first["all"], first["peft"], 1e-4)

    both = [{k: torch.cat([a[k], b[k]]) for k in a} for a, b in zip(_tokens(0), _tokens(1), strict=True)]
    alone = components(tiny("llama"), CONFIG, both)
    _close(first["all"], alone, 1e-5)
    _close(first["shim"], _shim(both, gather=True), 1e-5)
    model, config = _small()
    rows = [torch.cat([a, b]) for a, b in zip(_rows(0), _rows(1), strict=True)]
    _close(first["small"], eva(model, config, rows).params, 1e-6)

    for rank, found in enumerate((first, second)):
        _close(found["own"], components(tiny("llama"), CONFIG, _tokens(rank)), 0.0)
        _close(found["shim own"], _shim(_tokens(rank), gather=True), 0.0)
    differences = [(a - alone[path]).abs().max() for path, a in first["own"].items() if a.shape == alone[path].shape]
    assert max(differences) > 1e-2
