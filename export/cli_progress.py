"""How far a long run is, and how long it will still take: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from export.cli_common import err
from sparse_attention.calibration_collect import Progress as Told

LINE_EVERY = 30.0
"""Seconds between two lines where standard error is no terminal."""


@contextmanager
def bar() -> Iterator[Told]:
    """Gives what a run tells its progress to: what it does, how much of it is done, and how much there is."""
    if not err.is_terminal:
        yield _Lines()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("left"), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=err, transient=True) as shown:
        task = shown.add_task("starting", total=None)

        def told(what: str, done: int, total: int) -> None:
            shown.update(task, description=what, completed=done, total=total)

        yield told


class _Lines:
    """One line every `LINE_EVERY` seconds; the estimate starts anew with everything else that is done."""

    def __init__(self) -> None:
        self.total, self.started, self.first, self.last = -1, 0.0, 0, 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if total != self.total or done < self.first:
            self.total, self.started, self.first = total, now, done
        if now - self.last < LINE_EVERY:
            return
        self.last = now
        left = ""
        if done > self.first:
            left = f", about {(now - self.started) / (done - self.first) * (total - done) / 60:.0f} min left"
        err.print(f"{what}: {done} of {total}{left}", highlight=False)
