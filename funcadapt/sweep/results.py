"""What came out of a sweep: ranked, printed, drawn and saved."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from pathlib import Path
from typing import Any

from funcadapt.adapter import Adapter
from funcadapt.checkpoint import save, write_all
from funcadapt.errors import did_you_mean
from funcadapt.recipes.pretrained import optional
from funcadapt.sweep.trials import Trial, shown, value, varied


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """What became of one trial.

    Attributes:
        trial: the trial.
        name: its name.
        adapter: the adapter with the best held-out loss, or the last one if nothing was held out. It acts on the base
            model as it is, also after PiSSA and OLoRA. None if the trial diverged before there was any.
        losses: the training loss at every step.
        held_out: (step, loss) of every evaluation.
        stopped: why it ended before its time: "patience" or "diverged"; None if it did not.
    """

    trial: Trial
    name: str
    adapter: Adapter | None
    losses: tuple[float, ...]
    held_out: tuple[tuple[int, float], ...]
    stopped: str | None

    @property
    def loss(self) -> float:
        """The best held-out loss, or the last training loss if nothing was held out; infinite if not finite."""
        if self.adapter is None:
            return math.inf
        found = [loss for _, loss in self.held_out if math.isfinite(loss)] or list(self.losses[-1:])
        return min(found) if found and math.isfinite(min(found)) else math.inf

    @property
    def best_step(self) -> int:
        """After how many steps the loss was as good as `loss` says."""
        return next((step for step, loss in self.held_out if loss == self.loss), len(self.losses))


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """What came out of a sweep.

    Attributes:
        runs: one for each trial, in their order.
        seconds: the wall time.
    """

    runs: tuple[Run, ...]
    seconds: float

    @property
    def best(self) -> Run:
        """The run with the smallest loss."""
        return min(self.runs, key=lambda run: run.loss)

    def __getitem__(self, name: str) -> Run:
        """The run of a name."""
        for run in self.runs:
            if run.name == name:
                return run
        raise KeyError(f"There is no trial {name!r}.{did_you_mean(name, (run.name for run in self.runs))}")

    def records(self) -> list[dict[str, Any]]:
        """Everything but the adapters, in JSON types; losses that are not finite are None.

        Returns:
            One dict for each run, in the order of the trials.
        """
        return [
            {
                "name": run.name,
                **run.trial.to_dict(),
                "loss": _finite(run.loss),
                "best_step": run.best_step,
                "steps": len(run.losses),
                "stopped": run.stopped,
                "losses": [_finite(loss) for loss in run.losses],
                "held_out": [[step, _finite(loss)] for step, loss in run.held_out],
            }
            for run in self.runs
        ]

    def save(self, directory: str | os.PathLike[str]) -> list[Path | None]:
        """Write each adapter as a PEFT checkpoint in a folder of its own, and `results.json` when all are there.

        Args:
            directory: the folder, made if need be.

        Returns:
            The folder of each run's checkpoint; None for one without an adapter.
        """
        root = Path(directory)
        root.mkdir(parents=True, exist_ok=True)
        folders: list[Path | None] = []
        records = self.records()
        for i, (run, record) in enumerate(zip(self.runs, records, strict=True)):
            folder = None
            if run.adapter is not None:
                folder = root / f"{i:03d}-{re.sub(r'[^A-Za-z0-9._=+-]+', '_', run.name)[:80]}"
                save(run.adapter, folder)
            folders.append(folder)
            record["checkpoint"] = folder and folder.name
        text = json.dumps({"seconds": self.seconds, "best": self.best.name, "runs": records}, indent=1)
        write_all(root, {"results.json": text.encode()})
        return folders

    def table(self) -> Any:
        """The runs as a `rich.table.Table`, the best first: what differs between them, and what came out.

        Returns:
            The table.

        Raises:
            MissingExtraError: if rich is not installed.
        """
        table = optional("rich.table").Table()
        columns = varied([run.trial for run in self.runs])
        for column in ("trial", *columns, "loss", "at step", "steps", ""):
            table.add_column(column, justify="left" if column in ("trial", "") else "right")
        ranked = sorted(self.runs, key=lambda run: run.loss)
        for run in ranked:
            values = [shown(value(run.trial, name)) for name in columns]
            loss = f"{run.loss:.4f}" if math.isfinite(run.loss) else "-"
            style = "bold green" if run is ranked[0] and math.isfinite(run.loss) else ""
            steps = (str(run.best_step), str(len(run.losses)))
            table.add_row(optional("rich.text").Text(run.name), *values, loss, *steps, run.stopped or "", style=style)
        return table

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the curves of all runs: training loss on the left, held-out loss on the right.

        Args:
            path: the picture, e.g. "sweep.png".

        Raises:
            MissingExtraError: if matplotlib is not installed.
        """
        figure = optional("matplotlib.figure").Figure(figsize=(11, 4.5), layout="constrained")
        left, right = figure.subplots(1, 2)
        colours = optional("matplotlib").colormaps["viridis"]
        ranked = sorted(self.runs, key=lambda run: run.loss)
        for i, run in enumerate(ranked):
            look = {"color": colours(i / max(1, len(ranked) - 1)), "label": run.name, "linewidth": 2 if i == 0 else 1}
            left.plot(range(len(run.losses)), run.losses, **look)
            right.plot(*(zip(*run.held_out, strict=True) if run.held_out else ((), ())), marker=".", **look)
        for axes, title in ((left, "training loss"), (right, "held-out loss")):
            axes.set_xlabel("step")
            axes.set_title(title)
        sound = [run for run in self.runs if run.stopped != "diverged"]
        curves = [[loss for run in sound for loss in run.losses], [loss for run in sound for _, loss in run.held_out]]
        for axes, values in zip((left, right), curves, strict=True):
            if values:  # a run that diverged must not squeeze the others into a line
                margin = 0.05 * (max(values) - min(values)) or 0.05
                axes.set_ylim(min(values) - margin, max(values) + margin)
        if len(ranked) <= 24:
            left.legend(fontsize="x-small", title="best first", title_fontsize="x-small")
        figure.savefig(path, dpi=150)  # a Figure without pyplot draws with Agg, and needs no display


def _finite(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None
