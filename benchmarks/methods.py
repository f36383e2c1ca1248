"""Every method against PEFT's same method.

    python -m benchmarks.methods [speed] [quality] [lines] [table] [METHOD ...]

`speed`: a forward pass and a training step (forward and backward) on SmolLM2-135M in float32, adapters at q_proj and
v_proj, paired with PEFT's same method and with the bare model in one process: medians of ROUNDS rounds, an environment
variable, 5 if it is not set. `saved` is what autograd keeps for the backward pass beyond what the bare model keeps, in
MB.
`quality`: the loss on held-out text after the same 200 steps of AdamW on the same text, from the same seed, on the
first four layers of SmolLM2 (all thirty would take hours on two cores): adapters repair what cutting the model broke.
Of two learning rates the one with the lower training loss after the first 50 steps goes on. X-LoRA's 200 steps are
those of its classifier; its experts are four LoRAs that have trained before, 50 steps each on a quarter of the text.
`lines`: lines of code, without docstrings and comments, of a method's file and the parts that no other method uses, and
of PEFT's package for it (Shadow's without diffusion models, which are not here). `funcadapt.peft` is not counted.
`table`: all of it in one table, here and in the README, and `results/methods.png`, quality against parameters.
Names of methods restrict `speed` and `quality` to these; the other rows stay. How Arrow, QA-LoRA, X-LoRA and Shadow are
made, and why Arrow has a forward pass only, says `benchmarks.composed`.
"""

from __future__ import annotations

import ast
import copy
import gc
import io
import json
import os
import re
import sys
import tokenize
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

import funcadapt as fa
from benchmarks import composed
from benchmarks.common import RESULTS, paired, report, smollm2, summary
from benchmarks.composed import TARGETS, Ours, trained

SHAPE, ROUNDS = (1, 64), int(os.environ.get("ROUNDS", "5"))
STEPS, PROBE, BATCH, LENGTH, LAYERS = 200, 50, 1, 32, 4

# What to set beside the targets: sizes that divide SmolLM2's 576 and 192 features, and ranks of a size.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {"r": 8}),
    "dora": ("LoraConfig", {"r": 8, "use_dora": True}),
    "ia3": ("IA3Config", {"feedforward_modules": []}),
    "adalora": ("AdaLoraConfig", {"init_r": 8, "target_r": 4, "total_step": 1000}),
    "loha": ("LoHaConfig", {"r": 8}),
    "lokr": ("LoKrConfig", {"r": 8}),
    "oft": ("OFTConfig", {"oft_block_size": 32, "r": 0}),
    "boft": ("BOFTConfig", {"boft_block_size": 8}),
    "hra": ("HRAConfig", {"r": 8}),
    "road": ("RoadConfig", {"group_size": 64}),
    "psoft": ("PsoftConfig", {"r": 32}),
    "deft": ("DeftConfig", {"r": 8}),
    "miss": ("MissConfig", {"r": 16}),
    "shira": ("ShiraConfig", {"r": 8}),
    "c3a": ("C3AConfig", {"block_size": 64}),
    "fourierft": ("FourierFTConfig", {"n_frequency": 1000}),
    "waveft": ("WaveFTConfig", {"n_frequency": 1000}),
    "supertuning": ("SupertuningConfig", {}),
    "delora": ("DeloraConfig", {"r": 8}),
    "beft": ("BeftConfig", {}),
    "peanut": ("PeanutConfig", {"r": 8}),
    "ln_tuning": ("LNTuningConfig", {"target_modules": ["input_layernorm", "post_attention_layernorm"]}),
    "osf": ("OSFConfig", {"effective_rank": 16}),
    "trainable_tokens": ("TrainableTokensConfig", {"target_modules": ["embed_tokens"], "token_indices": [*range(64)]}),
    "adamss": ("AdamssConfig", {"r": 64}),
    "hira": ("HiraConfig", {"r": 8}),
    "gralora": ("GraloraConfig", {"r": 8, "alpha": 16}),
    "glora": ("GloraConfig", {"r": 8}),
    "vera": ("VeraConfig", {"r": 256}),
    "pvera": ("PveraConfig", {"r": 128}),
    "vblora": ("VBLoRAConfig", {"r": 4, "num_vectors": 90, "vector_length": 64}),
    "randlora": ("RandLoraConfig", {"r": 32}),
    "unilora": ("UniLoraConfig", {"r": 8, "theta_d_length": 4096}),
    "tinylora": ("TinyLoraConfig", {}),
    "lily": ("LilyConfig", {"r": 8}),
    "frod": ("FrodConfig", {}),
    "bdlora": (
        "LoraConfig",
        {"r": 8, "use_bdlora": {"target_modules_bd_a": ["q_proj"], "target_modules_bd_b": ["v_proj"], "nblocks": 2}},
    ),
    "kasa": ("LoraConfig", {"r": 8, "kasa_config": {}}),
    "mica": ("LoraConfig", {"r": 8, "init_lora_weights": "mica"}),
    "velora": ("LoraConfig", {"r": 8, "velora_config": {}}),
    "monteclora": ("LoraConfig", {"r": 8, "monteclora_config": {}}),
    "poly": ("PolyConfig", {"r": 8, "n_tasks": 4, "task_type": "CAUSAL_LM"}),
    "alora": ("LoraConfig", {"r": 8, "alora_invocation_tokens": [7], "task_type": "CAUSAL_LM"}),
    **composed.CONFIGS,
}
# What methods need of every call, for one row: the task; how many of the last tokens the adapter acts on.
INPUTS = {"poly": {"task_ids": torch.tensor([1])}, "alora": {"alora_offsets": torch.tensor([32])}}


def fields_of(name: str) -> dict[str, Any]:
    """The fields of a method's config, targets included."""
    return {"target_modules": TARGETS, **CONFIGS[name][1]}


def ours(name: str, model: nn.Module, experts: Mapping[str, fa.Adapter]) -> Ours:
    """A new adapter; the LoRAs are for X-LoRA."""
    if name in composed.CONFIGS:
        return composed.ours(name, model, experts)
    start, base = fa.init_with_base(model, getattr(fa, CONFIGS[name][0])(**fields_of(name)))
    adapter = start.replace(params=trained(start.params))

    def call(ids: torch.Tensor, inputs: Any = None, **kwargs: Any) -> Any:
        return fa.functional_call(model, adapter, (ids,), kwargs, parameters=base, inputs=inputs)

    return Ours(adapter, pytree.tree_leaves(adapter.params), call)


def theirs(name: str, model: nn.Module) -> Any:
    """PEFT's model with a new adapter, on a copy of the model."""
    fields = fields_of(name)
    nested = {"use_bdlora": "BdLoraConfig", "kasa_config": "KasaConfig", "velora_config": "VeloraConfig"}
    nested["monteclora_config"] = "MontecloraConfig"
    for field in nested.keys() & fields.keys():
        fields[field] = getattr(peft.tuners.lora.config, nested[field])(**fields[field])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(copy.deepcopy(model), getattr(peft, CONFIGS[name][0])(**fields))


def saved_bytes(run: Callable[[], torch.Tensor], ignore: set[int]) -> int:
    """What autograd keeps for the backward pass, each storage once, the given ones left out."""
    seen: dict[int, int] = {}

    def pack(t: torch.Tensor) -> None:  # nothing runs backward: an output that is kept by its own node would stay
        for part in (t.coalesce().indices(), t.coalesce().values()) if t.is_sparse else (t,):
            storage = part.untyped_storage()
            if storage.data_ptr() not in ignore:
                seen[storage.data_ptr()] = storage.nbytes()
        kept.append(t)  # so that no address is used twice

    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    kept.clear()  # graph -> hook -> list -> graph
    return sum(seen.values())


def others(part: str, names: list[str]) -> list[dict[str, Any]]:
    """The results of an earlier run for the methods that this one leaves out."""
    path = RESULTS / f"methods_{part}.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    return [row for row in rows if row["method"] in CONFIGS and row["method"] not in names]


def speed(names: list[str]) -> None:
    """Forward passes and training steps."""
    torch.manual_seed(0)
    model = smollm2()
    embed, ids = model.get_input_embeddings(), torch.randint(0, 49_000, SHAPE)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def floor() -> torch.Tensor:
        x = embed(ids).detach().requires_grad_()
        return model(inputs_embeds=x, labels=ids).loss

    bare = saved_bytes(floor, weights)
    rows = others("speed", names)
    columns = ["method", "parameters", "forward / peft", "train / peft", "saved MB", "peft saved MB"]
    for name in names:
        rows.append({"method": name, **timings(name, model, ids, floor, weights, bare)})
        gc.collect()
        report("methods_speed", rows, columns)  # after each: a run that is cut off has what it has


def timings(
    name: str, model: Any, ids: torch.Tensor, floor: Callable[[], torch.Tensor], weights: set[int], bare: int
) -> dict[str, Any]:
    """The row of a method; without a training step if nothing is trained."""
    if name in composed.CONFIGS:
        mine, wrapped = composed.both(name, model, ids)
    else:
        mine, wrapped = ours(name, model, {}), theirs(name, model)
    wrapped.train()
    given = INPUTS.get(name, {})
    peft_given = {k: v.tolist() if k == "alora_offsets" else v for k, v in given.items()}

    def call() -> torch.Tensor:
        return mine.call(ids, given, labels=ids).loss

    def peft_call() -> torch.Tensor:
        return wrapped(input_ids=ids, labels=ids, **peft_given).loss

    def step(loss: Callable[[], torch.Tensor], leaves: list[torch.Tensor]) -> None:
        for leaf in leaves:
            leaf.grad = None
        loss().backward()

    row: dict[str, Any] = {"rounds": ROUNDS}
    with torch.no_grad():
        runs = {"base": lambda: model(ids, labels=ids), "ours": call, "peft": peft_call}
        times = {"forward": paired(runs, repeats=ROUNDS, warmup=1)}
    if mine.leaves:
        their = [p for p in wrapped.parameters() if p.requires_grad]
        row |= {"parameters": sum(t.numel() for t in mine.leaves), "peft parameters": sum(p.numel() for p in their)}
        steps = {
            "base": lambda: floor().backward(),
            "ours": lambda: step(call, mine.leaves),
            "peft": lambda: step(peft_call, their),
        }
        times["train"] = paired(steps, repeats=ROUNDS, warmup=1)
    for what, series in times.items():
        found = summary(series, "peft")
        row |= {f"{what} ms": found["ours"]["median_ms"], f"{what} peft ms": found["peft"]["median_ms"]}
        row |= {f"{what} base ms": found["base"]["median_ms"], f"{what} / peft": found["ours"]["ratio"]}
        row[f"{what} quartiles"] = [found["ours"]["ratio_q1"], found["ours"]["ratio_q3"]]
    if mine.leaves:
        own = weights | {t.untyped_storage().data_ptr() for t in pytree.tree_leaves(mine.value)}
        theirs_own = {t.untyped_storage().data_ptr() for t in (*wrapped.parameters(), *wrapped.buffers())}
        row["saved MB"] = round((saved_bytes(call, own) - bare) / 2**20, 2)
        row["peft saved MB"] = round((saved_bytes(peft_call, theirs_own) - bare) / 2**20, 2)
    return row


def text(tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids to train on and to test on, from Python's own documentation."""
    from pydoc_data.topics import topics

    ids = torch.tensor(tokenizer("\n\n".join(topics[key] for key in sorted(topics)))["input_ids"])
    cut = len(ids) * 9 // 10
    return ids[:cut], ids[cut:]


def windows(ids: torch.Tensor, steps: int) -> list[torch.Tensor]:
    """Token ids for some steps, from random places of a text."""
    starts = torch.randint(len(ids) - LENGTH, (steps, BATCH), generator=torch.Generator().manual_seed(0))
    return [torch.stack([ids[s : s + LENGTH] for s in row.tolist()]) for row in starts]


def every(name: str, rows: int) -> dict[str, torch.Tensor]:
    """A method's inputs for rows that are all of one task, on all of whose tokens the adapter acts."""
    return {
        key: t.expand(rows) if key == "task_ids" else torch.full((rows,), 10**6)
        for key, t in INPUTS.get(name, {}).items()
    }


def quality(names: list[str]) -> None:
    """The same steps on the same text for each method."""
    from funcadapt.recipes.pretrained import load_pretrained

    model, tokenizer = load_pretrained()
    model.model.layers = model.model.layers[:LAYERS]
    model.config.num_hidden_layers = LAYERS
    model.requires_grad_(False).train()
    train, test = text(tokenizer)
    batches = windows(train, STEPS)
    held = test[: 8 * 128].reshape(8, 128)
    rows = others("quality", names)
    with torch.no_grad():
        before = model(held, labels=held).loss.item()
    for name in (name for name in names if name not in composed.UNTRAINED):
        experts = learnt(model, train) if name == "xlora" else {}
        runs = {rate: Run(name, model, rate, experts) for rate in (1e-3, 1e-2)}
        losses = {rate: run.train(batches[:PROBE]) for rate, run in runs.items()}
        rate = min(losses, key=lambda rate: losses[rate])
        runs[rate].train(batches[PROBE:])
        model.eval()
        with torch.no_grad():
            logits = runs[rate].call(held).logits  # Shadow's own loss has more in it
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), held[:, 1:].flatten()).item()
        model.train()
        parameters = sum(t.numel() for t in runs[rate].ours.leaves)
        row = {"method": name, "parameters": parameters, "loss": round(loss, 4), "rate": rate}
        rows.append({**row, "before": round(before, 4)})
        report("methods_quality", rows, ["method", "parameters", "loss", "before", "rate"])


def learnt(model: nn.Module, train: torch.Tensor) -> dict[str, fa.Adapter]:
    """The LoRAs among which X-LoRA chooses, each of a part of the text."""
    found: dict[str, fa.Adapter] = {}
    for i, part in enumerate(train.chunk(composed.EXPERTS)):
        run = Run("lora", model, 1e-2, {})
        run.train(windows(part, PROBE))
        found[str(i)] = run.ours.value
    return found


class Run:
    """An adapter in training, from seed 0."""

    def __init__(self, name: str, model: nn.Module, rate: float, experts: Mapping[str, fa.Adapter]) -> None:
        torch.manual_seed(0)
        self.name, self.ours = name, ours(name, model, experts)
        self.optimiser = torch.optim.AdamW(self.ours.leaves, lr=rate, weight_decay=0.0)

    def call(self, ids: torch.Tensor, **kwargs: Any) -> Any:
        """What the model returns for some rows."""
        return self.ours.call(ids, every(self.name, len(ids)), **kwargs)

    def train(self, batches: list[torch.Tensor]) -> float:
        """A step on each batch; the mean of the last 20 losses."""
        losses: list[float] = []
        for ids in batches:
            self.optimiser.zero_grad()
            loss = self.call(ids, labels=ids).loss
            loss.backward()
            self.optimiser.step()
            losses.append(loss.item())
        return sum(losses[-20:]) / len(losses[-20:])


def code_lines(source: str) -> int:
    """Lines with code on them: no docstrings, comments, blank lines."""
    strings = {
        line
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    skip = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    found = {line for t in tokens if t.type not in skip for line in range(t.start[0], t.end[0] + 1)}
    return len(found - strings)


def parts_of(file: Path, found: frozenset[str] = frozenset()) -> frozenset[str]:
    """The modules of `funcadapt.parts` that a file is made of, also by way of others."""
    source = file.read_text()
    names = set(re.findall(r"from funcadapt\.parts\.(\w+) import", source))
    for group in re.findall(r"from funcadapt\.parts import ([\w, ]+)", source):
        names |= set(group.split(", "))
    for name in names - found:
        found = parts_of(Path(fa.__file__).parent / "parts" / f"{name}.py", found | {name})
    return found


def lines(names: list[str]) -> None:
    """Lines of code of each method."""
    every = {file.stem: parts_of(file) for file in Path(fa.methods.__file__).parent.glob("[a-z]*.py")}
    users = Counter(part for found in every.values() for part in found)
    root, package = Path(peft.__file__).parent / "tuners", Path(fa.__file__).parent
    variants = {name: f"{name}.py" for name in ("dora", "velora", "monteclora", "arrow")}
    rows: list[dict[str, Any]] = []
    for name in names:
        files = [package / "parts" / f"{part}.py" for part in every.get(name, ()) if users[part] == 1]
        files += [*package.glob(f"methods/{name}.py"), *package.glob(f"{name}.py"), *package.glob(f"{name}/*.py")]
        own = sum(code_lines(file.read_text()) for file in files)
        if CONFIGS[name][0] == "LoraConfig" and name != "lora":
            file = root / "lora" / variants.get(name, "")
            whole = code_lines(file.read_text()) if file.is_file() else None
        else:
            counted = [f for f in (root / name).glob("*.py") if f.name != "diffusion_models.py"]
            whole = sum(code_lines(f.read_text()) for f in counted)
        rows.append({"method": name, "lines": own, "peft lines": whole})
    report("methods_lines", rows, ["method", "lines", "peft lines"])


def table(names: list[str]) -> None:
    """All results side by side, and a picture of quality against parameters."""
    found: dict[str, dict[str, Any]] = {name: {"method": name} for name in names}
    for part in ("speed", "quality", "lines"):
        path = RESULTS / f"methods_{part}.json"
        for row in json.loads(path.read_text())["rows"] if path.exists() else ():
            if row["method"] in found:
                skip = {"parameters"} if part == "quality" else set()
                found[row["method"]] |= {k: v for k, v in row.items() if k not in skip}
    columns = ["method", "parameters", "forward / peft", "train ms", "train / peft", "saved MB", "peft saved MB",
               "loss", "lines", "peft lines"]  # fmt: skip
    report("methods_table", list(found.values()), columns)
    write_table(list(found.values()))
    path = RESULTS / "methods_quality.json"
    if not path.exists():
        return
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = json.loads(path.read_text())["rows"]
    figure, axes = plt.subplots(figsize=(9, 6))
    for row in rows:
        axes.scatter(row["parameters"], row["loss"], s=18)
        axes.annotate(
            row["method"], (row["parameters"], row["loss"]), fontsize=7, xytext=(3, 3), textcoords="offset points"
        )
    axes.set(xscale="log", xlabel="trained parameters", ylabel="loss on held-out text after 200 steps")
    axes.axhline(rows[0]["before"], linewidth=0.8, linestyle=":", color="grey")
    figure.tight_layout()
    figure.savefig(RESULTS / "methods.png", dpi=130)


def write_table(rows: list[dict[str, Any]]) -> None:
    """The table of the README."""
    head = ["method", "parameters", "forward / PEFT", "step, ms", "step / PEFT", "saved MB, ours / PEFT's", "loss"]
    text = [f"| {' | '.join(head)} | lines, ours / PEFT's |", "|" + " --- |" * 8]
    for row in rows:

        def cell(key: str, form: str = "", row: dict[str, Any] = row) -> str:
            return format(row[key], form) if row.get(key) is not None else "-"

        cells = [row["method"], cell("parameters", ","), cell("forward / peft", ".2f"), cell("train ms", ".0f")]
        cells += [cell("train / peft", ".2f"), f"{cell('saved MB', '.1f')} / {cell('peft saved MB', '.1f')}"]
        cells += [cell("loss", ".3f"), f"{cell('lines')} / {cell('peft lines')}"]
        text.append(f"| {' | '.join(cells)} |")
    path = Path(__file__).parents[1] / "README.md"
    start, end = "<!-- methods -->\n", "<!-- end of methods -->\n"
    before, rest = path.read_text().split(start)
    path.write_text(before + start + "\n".join(text) + "\n" + end + rest.split(end)[1])


def main() -> None:
    """Run the parts named on the command line, or all of them; names of methods restrict `speed` and `quality`."""
    torch.set_num_threads(2)
    parts = [a for a in sys.argv[1:] if a not in CONFIGS] or ["speed", "quality", "lines", "table"]
    names = [a for a in sys.argv[1:] if a in CONFIGS] or [*CONFIGS]
    for part in parts:
        {"speed": speed, "quality": quality, "lines": lines, "table": table}[part](
            names if part in ("speed", "quality") else [*CONFIGS]
        )


if __name__ == "__main__":
    main()
