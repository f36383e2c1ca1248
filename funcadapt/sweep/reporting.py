"""What a sweep tells while it runs: events for the caller, a progress bar for whoever watches."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from funcadapt.recipes.pretrained import optional


@dataclasses.dataclass(frozen=True)
class Event:
    """What `report` is told.

    Attributes:
        kind: "step" (the training loss), "evaluation" (the held-out loss) or "stop" (trials that ended early).
        step: how many updates there were before.
        names: the trials that it is about.
        losses: a loss for each of them.
    """

    kind: str
    step: int
    names: tuple[str, ...]
    losses: tuple[float, ...]


Listener = Callable[[Event], None]


@contextmanager
def reporting(report: Listener | None, progress: Any, total: int) -> Generator[Listener, None, None]:
    """What to call with events: the caller's function, a progress bar, both or neither."""
    if not progress:
        yield report or (lambda event: None)
        return
    rich: Any = optional("rich.progress")
    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.TextColumn("{task.fields[training]} training, {task.fields[best]}"),
        rich.TimeElapsedColumn(),
    )
    best = math.inf
    with rich.Progress(*columns, console=None if progress is True else progress) as bars:
        bar = bars.add_task("sweep", total=total, training=0, best="no loss yet")

        def tell(event: Event) -> None:
            nonlocal best
            if report is not None:
                report(event)
            if event.kind == "step":
                bars.update(bar, advance=len(event.names), training=len(event.names))
            elif event.kind == "evaluation":
                best = min([best, *(loss for loss in event.losses if math.isfinite(loss))])
                bars.update(bar, best=f"best held-out loss {best:.4f}")

        yield tell
        bars.update(bar, completed=total, training=0)
