"""FSDP2: `fully_shard`ed models, two gloo ranks on this machine. FSDP's own hooks gather and free the weights."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

import funcadapt as fa

RANKS = 2


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.Linear(8, 4)).requires_grad_(False)


def _run(model: nn.Module, adapter: fa.Adapter, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
    params = {p: {k: t.clone().requires_grad_() for k, t in v.items()} for p, v in adapter.params.items()}
    y = fa.functional_call(model, adapter.replace(params=params), (x,))
    y.pow(2).sum().backward()
    return y.detach(), {p: {k: t.grad for k, t in v.items()} for p, v in params.items()}


def _worker(rank: int, folder: str, use_dora: bool) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    try:
        plain, sharded = _model(), _model()
        config = fa.LoraConfig(r=2, target_modules=["0", "2", "3"], init_lora_weights=False, use_dora=use_dora)
        adapter = fa.init(plain, config)
        mesh = init_device_mesh("cpu", (RANKS,))
        for layer in sharded:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        torch.manual_seed(rank + 1)
        x = torch.randn(5, 8)  # each rank has rows of its own
        expected, expected_grads = _run(plain, adapter, x)
        for _ in range(2):  # twice: the first call must have left the sharded model as it was
            got, grads = _run(sharded, adapter, x)
            torch.testing.assert_close(got, expected)
            torch.testing.assert_close(grads, expected_grads)
        assert not any("forward" in m.__dict__ for m in sharded.modules())
        Path(folder, f"done{rank}").touch()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_a_sharded_model_gives_the_same_outputs_and_gradients(use_dora: bool):
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_worker, (folder, use_dora), nprocs=RANKS)
        assert all(Path(folder, f"done{rank}").exists() for rank in range(RANKS))
