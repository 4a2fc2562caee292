# SPDX-License-Identifier: MIT
"""The progress display of a sweep: done of total, rate, time that remains, failures."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

#: Seconds between two lines where the display is no terminal, such as a log file.
LINE_EVERY = 30.0


class SweepProgress:
    """Shows how far a sweep is; a context manager.

    Args:
        title: What is running.
        total: Number of runs, those that were there already included.
        done: Number of those.
        console: Where to show it; None: the standard error stream.

    Attributes:
        crashed: Number of runs that an exception ended.
    """

    def __init__(self, title: str, total: int, done: int, console: Console | None) -> None:
        self._console = console or Console(stderr=True)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[failures]}"),
            console=self._console,
            # Over the whole sweep: one training may take longer than the usual half minute.
            speed_estimate_period=float("inf"),
        )
        self._task = self._progress.add_task(
            title, total=total, completed=done, rate="", failures=""
        )
        self._here = self._failed = self.crashed = 0
        self._begin = self._line = time.monotonic()

    def __enter__(self) -> SweepProgress:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def advance(self, *, failed: bool = False, crashed: bool = False, here: bool = True) -> None:
        """Count one more run.

        Args:
            failed: It did not train.
            crashed: An exception ended it.
            here: This process ran it, so it counts for the rate.
        """
        self._here += here
        self._failed += failed and not crashed
        self.crashed += crashed
        self._progress.update(self._task, advance=1, rate=self._rate(), failures=self._failures())
        self._print_line()

    def _rate(self) -> str:
        seconds = time.monotonic() - self._begin
        rate = self._here / seconds if seconds > 0 else 0.0
        return f"{rate:.1f} runs/s" if rate >= 1 else f"{60 * rate:.1f} runs/min"

    def _failures(self) -> str:
        parts = [f"{self._failed} failed to train"] if self._failed else []
        parts += [f"{self.crashed} crashed"] if self.crashed else []
        return ", ".join(parts) or "0 failures"

    def _print_line(self) -> None:
        if self._console.is_terminal or time.monotonic() - self._line < LINE_EVERY:
            return
        self._line = time.monotonic()
        task = self._progress.tasks[0]
        left = "?" if task.time_remaining is None else f"{task.time_remaining / 60:.0f} min"
        self._console.print(
            f"{task.description}: {task.completed:.0f}/{task.total:.0f}, {self._rate()}, "
            f"{left} left, {self._failures()}",
            highlight=False,
        )
