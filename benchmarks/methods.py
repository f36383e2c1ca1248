"""Every method against PEFT's same method.

    python -m benchmarks.methods [speed] [quality] [lines] [table]

`speed`: a forward pass and a training step (forward and backward) on SmolLM2-135M in float32, adapters at q_proj and
v_proj, paired with PEFT's same method and with the bare model in one process. `saved` is what autograd keeps for the
backward pass beyond what the bare model keeps, in MB.
`quality`: the loss on held-out text after the same 200 steps of AdamW on the same text, from the same seed, on the
first four layers of SmolLM2 (all thirty would take hours on two cores): adapters repair what cutting the model broke.
Of two learning rates the one with the lower training loss after the first 50 steps goes on.
`lines`: lines of code, without docstrings and comments, of a method's file and the parts that no other method uses, and
of PEFT's package for it.
`table`: all of it in one table, here and in the README, and `results/methods.png`, quality against parameters.
"""

from __future__ import annotations

import ast
import copy
import gc
import io
import json
import re
import sys
import tokenize
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

import funcadapt as fa
from benchmarks.common import RESULTS, paired, report, smollm2, summary
from funcadapt.method import methods as registered

TARGETS = ["q_proj", "v_proj"]
SHAPE, ROUNDS = (1, 64), 5
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
}
# What methods need of every call, for one row: the task; how many of the last tokens the adapter acts on.
INPUTS = {"poly": {"task_ids": torch.tensor([1])}, "alora": {"alora_offsets": torch.tensor([32])}}


def fields_of(name: str) -> dict[str, Any]:
    """The fields of a method's config, targets included."""
    return {"target_modules": TARGETS, **CONFIGS[name][1]}


def ours(name: str, model: nn.Module) -> tuple[fa.Adapter, dict[str, torch.Tensor]]:
    """A new adapter, and the base weights that its init changes."""
    return fa.init_with_base(model, getattr(fa, CONFIGS[name][0])(**fields_of(name)))


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


def trained(adapter: fa.Adapter) -> fa.Adapter:
    """The adapter with gradients."""
    params = {p: {k: t.detach().clone().requires_grad_() for k, t in ls.items()} for p, ls in adapter.params.items()}
    return adapter.replace(params=params)


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
    for name in names:
        start, base = ours(name, model)
        adapter = trained(start)
        wrapped = theirs(name, model).train()

        given = INPUTS.get(name, {})

        def call(adapter: fa.Adapter = adapter, base: Any = base, given: Any = given) -> torch.Tensor:
            return fa.functional_call(model, adapter, (ids,), {"labels": ids}, parameters=base, inputs=given).loss

        def peft_call(wrapped: Any = wrapped, given: Any = given) -> torch.Tensor:
            return wrapped(
                ids, labels=ids, **{k: v.tolist() if k == "alora_offsets" else v for k, v in given.items()}
            ).loss

        def step(loss: Callable[[], torch.Tensor], leaves: list[torch.Tensor]) -> None:
            for leaf in leaves:
                leaf.grad = None
            loss().backward()

        mine = [t for leaves in adapter.params.values() for t in leaves.values()]
        their = [p for p in wrapped.parameters() if p.requires_grad]
        row: dict[str, Any] = {
            "method": name,
            "parameters": adapter.num_parameters(),
            "peft parameters": sum(p.numel() for p in their),
        }
        with torch.no_grad():
            runs = {"base": lambda: model(ids, labels=ids), "ours": call, "peft": peft_call}
            forward = summary(paired(runs, repeats=ROUNDS, warmup=1), "peft")
        steps = {
            "base": lambda: floor().backward(),
            "ours": lambda mine=mine, call=call: step(call, mine),
            "peft": lambda peft_call=peft_call, their=their: step(peft_call, their),
        }
        train = summary(paired(steps, repeats=ROUNDS, warmup=1), "peft")
        for what, found in (("forward", forward), ("train", train)):
            row |= {f"{what} ms": found["ours"]["median_ms"], f"{what} peft ms": found["peft"]["median_ms"]}
            row |= {f"{what} base ms": found["base"]["median_ms"], f"{what} / peft": found["ours"]["ratio"]}
            row[f"{what} quartiles"] = [found["ours"]["ratio_q1"], found["ours"]["ratio_q3"]]
        own = weights | {t.untyped_storage().data_ptr() for t in adapter.tensors()}
        theirs_own = {t.untyped_storage().data_ptr() for t in (*wrapped.parameters(), *wrapped.buffers())}
        row["saved MB"] = round((saved_bytes(call, own) - bare) / 2**20, 2)
        row["peft saved MB"] = round((saved_bytes(peft_call, theirs_own) - bare) / 2**20, 2)
        rows.append(row)
        del wrapped, adapter, their, mine, steps, runs, call, peft_call
        gc.collect()
        columns = ["method", "parameters", "forward / peft", "train / peft", "saved MB", "peft saved MB"]
        report("methods_speed", rows, columns)  # after each: a run that is cut off has what it has


def text(tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids to train on and to test on, from Python's own documentation."""
    from pydoc_data.topics import topics

    ids = torch.tensor(tokenizer("\n\n".join(topics[key] for key in sorted(topics)))["input_ids"])
    cut = len(ids) * 9 // 10
    return ids[:cut], ids[cut:]


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
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(len(train) - LENGTH, (STEPS, BATCH), generator=generator)
    batches = [torch.stack([train[s : s + LENGTH] for s in row.tolist()]) for row in starts]
    held = test[: 8 * 128].reshape(8, 128)
    rows = others("quality", names)
    with torch.no_grad():
        before = model(held, labels=held).loss.item()
    for name in names:
        runs = {rate: Run(name, model, rate) for rate in (1e-3, 1e-2)}
        losses = {rate: run.train(batches[:PROBE]) for rate, run in runs.items()}
        rate = min(losses, key=lambda rate: losses[rate])
        runs[rate].train(batches[PROBE:])
        model.eval()
        with torch.no_grad():
            loss = runs[rate].loss(held).item()
        model.train()
        row = {"method": name, "parameters": runs[rate].adapter.num_parameters(), "loss": round(loss, 4), "rate": rate}
        rows.append({**row, "before": round(before, 4)})
        report("methods_quality", rows, ["method", "parameters", "loss", "before", "rate"])


class Run:
    """An adapter in training, from seed 0."""

    def __init__(self, name: str, model: nn.Module, rate: float) -> None:
        torch.manual_seed(0)
        start, self.base = ours(name, model)
        self.name, self.model, self.adapter = name, model, trained(start)
        leaves = [t for group in self.adapter.params.values() for t in group.values()]
        self.optimiser = torch.optim.AdamW(leaves, lr=rate, weight_decay=0.0)

    def loss(self, ids: torch.Tensor) -> torch.Tensor:
        """The loss on some rows."""
        given = every(self.name, len(ids))
        out = fa.functional_call(self.model, self.adapter, (ids,), {"labels": ids}, parameters=self.base, inputs=given)
        return out.loss

    def train(self, batches: list[torch.Tensor]) -> float:
        """A step on each batch; the mean of the last 20 losses."""
        losses: list[float] = []
        for ids in batches:
            self.optimiser.zero_grad()
            loss = self.loss(ids)
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
    root, package = Path(peft.__file__).parent / "tuners", Path(fa.methods.__file__).parent
    variants = {"dora": "dora.py", "velora": "velora.py", "monteclora": "monteclora.py"}
    rows: list[dict[str, Any]] = []
    for name in names:
        alone = [package.parent / "parts" / f"{part}.py" for part in every[name] if users[part] == 1]
        own = sum(code_lines(file.read_text()) for file in (package / f"{name}.py", *alone))
        if CONFIGS[name][0] == "LoraConfig" and name != "lora":
            file = root / "lora" / variants.get(name, "")
            whole = code_lines(file.read_text()) if file.is_file() else None
        else:
            folder = root / {"ln_tuning": "ln_tuning", "trainable_tokens": "trainable_tokens"}.get(name, name)
            whole = sum(code_lines(f.read_text()) for f in folder.glob("*.py"))
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
    """Run the parts named on the command line, or all of them; a method's name restricts them."""
    torch.set_num_threads(2)
    parts = [a for a in sys.argv[1:] if a not in CONFIGS] or ["speed", "quality", "lines", "table"]
    known = {method.name for method in registered()}
    names = [a for a in sys.argv[1:] if a in CONFIGS] or [name for name in CONFIGS if name in known]
    for part in parts:
        {"speed": speed, "quality": quality, "lines": lines, "table": table}[part](names)


if __name__ == "__main__":
    main()
