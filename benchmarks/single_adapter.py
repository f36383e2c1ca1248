"""One adapter on SmolLM2-135M, all-linear LoRA r=8, float32: against PEFT and against the bare base model.

    python -m benchmarks.single_adapter [forward] [train] [overhead] [load] [frames] [saved]

`forward`, `train`: 1x16, 1x128 and 4x128 tokens. The floor is the bare base model; for training, the base with
gradients to its input embeddings, which no adapter can beat.
`overhead`: microseconds a site over the same matmuls written by hand around the same modules.
`load`: reading a checkpoint, against PEFT's `load_adapter` of the same file.
`frames`: frames that torch.compile compiles over ten adapters of different alpha.
`saved`: bytes held for the backward pass, parameters and adapter leaves not counted.
"""

from __future__ import annotations

import contextlib
import copy
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import peft.functional
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor, nn

import funcadapt as fa
from benchmarks.common import paired, report, smollm2, summary

SHAPES = {(1, 16): 60, (1, 128): 24, (4, 128): 10}  # (rows, tokens) -> rounds
RANK = 8


def trainable(adapter: fa.Adapter) -> tuple[fa.Adapter, list[Tensor]]:
    """The adapter with params that require gradients, and those params."""
    leaves = {p: {k: t.detach().clone().requires_grad_() for k, t in v.items()} for p, v in adapter.params.items()}
    return adapter.replace(params=leaves), [t for v in leaves.values() for t in v.values()]


def setting() -> dict[str, Any]:
    """The base model, an adapter, and PEFT's model around a copy of the base."""
    torch.manual_seed(0)
    model = smollm2()
    config = fa.LoraConfig(r=RANK, target_modules="all-linear")
    adapter, leaves = trainable(fa.init(model, config))
    wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=RANK, target_modules="all-linear")).train()
    return {"model": model, "adapter": adapter, "leaves": leaves, "peft": wrapped}


@contextlib.contextmanager
def by_hand(s: dict[str, Any]) -> Iterator[None]:
    """The same matmuls written by hand around the same modules, no engine: what separate eager ops can reach."""
    modules = dict(s["model"].named_modules())
    for path, p in s["adapter"].params.items():
        a, b, scaling = p["lora_A"], p["lora_B"], s["adapter"].buffers[path]["scaling"]

        def run(
            x: Tensor, module: Any = modules[path], a: Tensor = a, b: Tensor = b, scaling: Tensor = scaling
        ) -> Tensor:
            y = F.linear(x, module.weight)
            h = torch.mm(x.reshape(-1, x.shape[-1]), a.t()) * scaling
            return torch.addmm(y.reshape(-1, y.shape[-1]), h, b.t()).view(y.shape)

        modules[path].__dict__["forward"] = run
    try:
        yield
    finally:
        for path in s["adapter"].params:
            del modules[path].__dict__["forward"]


def _forwards(s: dict[str, Any], ids: Tensor) -> dict[str, Callable[[], Any]]:
    def hand() -> None:
        with by_hand(s):
            s["model"](ids)

    return {
        "base": lambda: s["model"](ids),
        "by hand": hand,
        "funcadapt": lambda: fa.functional_call(s["model"], s["adapter"], (ids,)),
        "peft": lambda: s["peft"](ids),
    }


def forward(s: dict[str, Any]) -> None:
    """Forward passes without gradients."""
    rows = []
    for shape, rounds in SHAPES.items():
        with torch.no_grad():
            times = paired(_forwards(s, torch.randint(0, 49_000, shape)), repeats=2 * rounds)
        rows += [{"shape": f"{shape[0]}x{shape[1]}", "what": k, **v} for k, v in summary(times, "base").items()]
    report("forward", rows, ["shape", "what", "median_ms", "ratio", "ratio_q1", "ratio_q3", "rounds"])


def training_steps(s: dict[str, Any], ids: Tensor) -> dict[str, Callable[[], None]]:
    """One forward and backward pass of each contender, gradients cleared first."""
    peft_leaves = [p for p in s["peft"].parameters() if p.requires_grad]
    embed = s["model"].get_input_embeddings()

    def floor() -> None:
        x = embed(ids).detach().requires_grad_()
        s["model"](inputs_embeds=x, labels=ids).loss.backward()

    def ours() -> None:
        for leaf in s["leaves"]:
            leaf.grad = None
        fa.functional_call(s["model"], s["adapter"], (ids,), {"labels": ids}).loss.backward()

    def hand() -> None:
        for leaf in s["leaves"]:
            leaf.grad = None
        with by_hand(s):
            s["model"](ids, labels=ids).loss.backward()

    def theirs() -> None:
        for leaf in peft_leaves:
            leaf.grad = None
        s["peft"](ids, labels=ids).loss.backward()

    return {"floor": floor, "by hand": hand, "funcadapt": ours, "peft": theirs}


def train(s: dict[str, Any]) -> None:
    """Training steps: forward and backward."""
    rows = []
    for shape, rounds in SHAPES.items():
        times = paired(training_steps(s, torch.randint(0, 49_000, shape)), repeats=rounds)
        rows += [{"shape": f"{shape[0]}x{shape[1]}", "what": k, **v} for k, v in summary(times, "floor").items()]
    report("train", rows, ["shape", "what", "median_ms", "ratio", "ratio_q1", "ratio_q3", "rounds"])


def overhead(_: dict[str, Any]) -> None:
    """A chain of small layers, where Python is all there is to see."""
    sites, width = 200, 16
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(sites))).requires_grad_(False)
    adapter = fa.init(model, fa.LoraConfig(r=RANK, target_modules="all-linear"))
    leaves = [(*p.values(), adapter.buffers[path]["scaling"]) for path, p in adapter.params.items()]
    layers = list(model)
    x = torch.randn(1, width)

    def raw() -> Tensor:
        y = x
        for layer, (a, b, scaling) in zip(layers, leaves, strict=True):
            y = torch.addmm(layer(y), torch.mm(y, a.t()) * scaling, b.t())
        return y

    wrapped: Any = peft.inject_adapter_in_model(
        peft.LoraConfig(r=RANK, target_modules=[str(i) for i in range(sites)]), copy.deepcopy(model)
    )
    with torch.no_grad():
        times = paired(
            {
                "base": lambda: model(x),
                "raw matmuls": raw,
                "funcadapt": lambda: fa.functional_call(model, adapter, (x,)),
                "peft": lambda: wrapped(x),
            },
            repeats=200,
            warmup=20,
        )
    rows = [{"what": k, **v} for k, v in summary(times, "raw matmuls").items()]
    floor = next(row["median_ms"] for row in rows if row["what"] == "raw matmuls")
    for row in rows:
        row["us_a_site_over_raw"] = round((row["median_ms"] - floor) * 1e3 / sites, 2)
    report("overhead", rows, ["what", "median_ms", "us_a_site_over_raw"])


def load(s: dict[str, Any]) -> None:
    """Reading an adapter of all 210 linear layers."""
    with tempfile.TemporaryDirectory() as folder:
        fa.save(s["adapter"], folder)
        size = (Path(folder) / "adapter_model.safetensors").stat().st_size

        def theirs_load() -> None:
            s["peft"].load_adapter(folder, adapter_name="loaded")

        times = paired({"funcadapt": lambda: fa.load(folder)}, repeats=20)
        reference = {"peft load_adapter": []}
        for _ in range(7):
            reference["peft load_adapter"] += paired({"x": theirs_load}, repeats=1, warmup=0)["x"]
            s["peft"].delete_adapter("loaded")
        read = paired({"read": lambda: (Path(folder) / "adapter_model.safetensors").read_bytes()}, repeats=20)
    rows = []
    for name, series in {**times, **reference, "reading the bytes": read["read"]}.items():
        series = sorted(series)
        rows.append({"what": name, "median_ms": round(series[len(series) // 2] * 1e3, 3), "bytes": size})
    for row in rows:
        row["peft over it"] = round(rows[1]["median_ms"] / row["median_ms"], 1)
    report("load", rows, ["what", "median_ms", "peft over it", "bytes"])


def frames(s: dict[str, Any]) -> None:
    """Ten adapters of different alpha through one compiled function. A count, not a time."""
    model = copy.deepcopy(s["model"])
    model.model.layers = model.model.layers[:2]  # the count does not depend on the depth
    adapters = [
        fa.init(model, fa.LoraConfig(r=RANK, lora_alpha=alpha, target_modules="all-linear"), seed=alpha)
        for alpha in range(1, 11)
    ]
    ids = torch.randint(0, 49_000, (1, 16))

    def loss(params: Any, adapter: fa.Adapter) -> Tensor:
        return (
            fa.functional_call(model, adapter.replace(params=params), (ids,), {"use_cache": False})
            .logits.square()
            .mean()
        )

    stacked = [torch.utils._pytree.tree_map(lambda *t: torch.stack(t), a, a) for a in adapters]
    programs: dict[str, tuple[Callable[[Any], Any], list[Any]]] = {
        "forward": (lambda a: loss(a.params, a), adapters),
        "grad": (lambda a: torch.func.grad(loss)(a.params, a), adapters),
        "vmap": (lambda a: torch.func.vmap(lambda one: loss(one.params, one))(a), stacked),
    }
    rows = []
    for name, (program, inputs) in programs.items():
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounter()
        compiled = torch.compile(program, fullgraph=True, backend=counter)
        for one in inputs:
            compiled(one)
        rows.append({"what": name, "adapters": len(inputs), "frames": counter.frame_count})
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    layer: Any = nn.Sequential(nn.Linear(8, 8))
    for alpha in range(1, 6):  # more would hit dynamo's limit of recompilations
        config = peft.LoraConfig(r=2, lora_alpha=alpha, target_modules=["0"])
        layer = peft.inject_adapter_in_model(config, layer, f"a{alpha}")
    compiled = torch.compile(lambda x: layer(x), fullgraph=True, backend=counter)
    for alpha in range(1, 6):
        peft.functional.set_adapter(layer, f"a{alpha}")
        compiled(torch.randn(2, 8))
    rows.append({"what": "peft forward", "adapters": 5, "frames": counter.frame_count})
    report("frames", rows, ["what", "adapters", "frames"])


def saved(s: dict[str, Any]) -> None:
    """Bytes that a step at 1x128 tokens holds for its backward pass. A count, not a time."""
    steps = training_steps(s, torch.randint(0, 49_000, (1, 128)))
    lasting = [*s["model"].parameters(), *s["peft"].parameters(), *s["adapter"].tensors()]
    rows = []
    for name, step in steps.items():
        known = {t.untyped_storage().data_ptr() for t in lasting}
        held: dict[int, int] = {}

        def pack(t: Tensor, known: set[int] = known, held: dict[int, int] = held) -> Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in known:
                held[storage.data_ptr()] = storage.nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            step()
        rows.append({"what": name, "bytes": sum(held.values())})
    for row in rows:
        row["over the floor"] = row["bytes"] - rows[0]["bytes"]
    report("saved", rows, ["what", "bytes", "over the floor"])


PARTS = {"forward": forward, "train": train, "overhead": overhead, "load": load, "frames": frames, "saved": saved}


def main() -> None:
    """Run the parts named on the command line, or all of them."""
    warnings.filterwarnings("ignore", message="There is a performance drop")  # SDPA under vmap, said in the README
    torch.set_num_threads(2)
    s = setting()
    for name in sys.argv[1:] or PARTS:
        PARTS[name](s)


if __name__ == "__main__":
    main()
