# SPDX-License-Identifier: Apache-2.0
"""What a run looks like: live bars on a terminal, a line a stage elsewhere. All but the results goes to stderr."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from transforms import progress

#: What the steps call their work, and what a reader of the screen is told.
_NAMES = {
    "slices": "read slices",
    "read": "vectors passed on",
    "read again": "read all slices again",
    "load sample": "load sample",
    "k-means": "k-means iterations",
    "sub-quantizers": "sub-quantizers",
    "evaluate": "evaluation steps",
}


class _Lines:
    """One line when a stage ends."""

    def __init__(self, console: Console, totals: dict[str, int]):
        self._console = console
        self._totals = totals
        self._done: dict[str, int] = {}
        self._started: dict[str, float] = {}
        self._lock = threading.Lock()

    def advance(self, stage: str, amount: int) -> None:
        with self._lock:
            self._started.setdefault(stage, time.monotonic())
            done = self._done[stage] = self._done.get(stage, 0) + amount
        if stage != "read" and done == self._totals.get(stage):  # how many are read is an estimate until all are
            self._ended(stage, done)

    def report(self, stage: str, done: int, total: int) -> None:
        with self._lock:
            before, self._done[stage] = self._done.get(stage), done
            if before is None or done < before:  # a second model's
                self._started[stage] = time.monotonic()
        if done == total and before != total:
            self._ended(stage, done)

    def _ended(self, stage: str, done: int) -> None:
        seconds = time.monotonic() - min(self._started.get(s, time.monotonic()) for s in self._started_with(stage))
        passed_on = f", {self._done['read']:,} vectors passed on" if stage == "slices" and "read" in self._done else ""
        self._console.print(f"{_NAMES.get(stage, stage)}: {done:,}{passed_on} in {seconds:.1f} s", highlight=False)

    def _started_with(self, stage: str) -> Sequence[str]:
        return ("slices", "read") if stage == "slices" else (stage,)


class _Bars:
    """Live bars, each appearing when its stage begins."""

    def __init__(self, bars: Progress, totals: dict[str, int]):
        self._bars = bars
        self._totals = totals
        self._tasks: dict[str, TaskID] = {}
        self._lock = threading.Lock()

    def _task(self, stage: str, total: int | None) -> TaskID:
        with self._lock:
            if stage not in self._tasks:
                self._tasks[stage] = self._bars.add_task(_NAMES.get(stage, stage), total=total)
            return self._tasks[stage]

    def advance(self, stage: str, amount: int) -> None:
        task = self._task(stage, self._totals.get(stage))
        self._bars.advance(task, amount)
        if stage == "slices" and "read" in self._tasks and self._bars.tasks[task].finished:
            vectors = self._tasks["read"]  # how many there would be was an estimate
            self._bars.update(vectors, total=self._bars.tasks[vectors].completed)

    def report(self, stage: str, done: int, total: int) -> None:
        self._bars.update(self._task(stage, total), completed=done, total=total)


@contextmanager
def live(totals: dict[str, int]) -> Iterator[None]:
    """Shows the progress of the steps that run in this process.

    Args:
      totals: how much there is of the stages that are only ever advanced.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        progress.listen(_Lines(console, totals))
        try:
            yield
        finally:
            progress.listen(None)
        return
    bars = Progress(
        TextColumn("{task.description:20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )
    with bars:
        progress.listen(_Bars(bars, totals))
        try:
            yield
        finally:
            progress.listen(None)


def table(rows: Sequence[tuple[str, str]]) -> None:
    """Prints (name, value) rows to stdout, aligned."""
    width = max(len(name) for name, _ in rows) + 2
    for name, value in rows:
        print(f"{name:<{width}}{value}")


def columns(names: Sequence[str], rows: Iterable[Sequence[str]], stderr: bool = False) -> None:
    """Prints a table, for a terminal."""
    grid = Table(*names, box=None, pad_edge=False)
    for row in rows:
        grid.add_row(*row)
    Console(stderr=stderr).print(grid)


def say(text: str) -> None:
    """A line for people."""
    Console(stderr=True, highlight=False).print(text, markup=False, soft_wrap=True)
