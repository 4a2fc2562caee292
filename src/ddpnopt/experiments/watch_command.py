# SPDX-License-Identifier: MIT
"""`ddpnopt watch`: a training run's loss, coefficients and feedback by layer, while it runs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, TextIO

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text
from torch.optim.optimizer import register_optimizer_step_post_hook

from ddpnopt.logs import FILE, HEADER, StepLog

EPILOG = "Example: [bold]ddpnopt watch runs/first[/], with StepLog('runs/first') in the program"
#: Values of the loss that the sparkline shows.
WIDTH = 60
BARS = "▁▂▃▄▅▆▇█"
#: Columns of the table by scalar: title, and how a number is written.
COLUMNS = {
    "coefficient": ("coefficient", "{:.3f}"),
    "coefficient_min": ("least", "{:.3f}"),
    "bounded": ("cut below 1/2", "{:.0%}"),
    "S": ("S", "{:.3g}"),
    "k": ("|k|", "{:.3g}"),
    "Kdx": ("|K dx|", "{:.3g}"),
}
#: Scalars of the whole step in the heading, in this order.
HEADING = ("loss", "accuracy", "lr", "samples", "rescale", "skipped")


LogOption = Annotated[
    Path | None,
    typer.Option("--log", metavar="DIR", help="Write what each step did; see ddpnopt watch DIR."),
]


@contextmanager
def logged(folder: Path | None) -> Iterator[StepLog | None]:
    """Within the block every optimizer step is logged, where a folder is given."""
    if folder is None:
        yield None
        return
    with StepLog(folder) as log:
        handle = register_optimizer_step_post_hook(lambda optimizer, args, kwargs: log(optimizer))
        try:
            yield log
        finally:
            handle.remove()


@dataclass
class Log:
    """What has been read of a log so far; each look reads on where the last one ended.

    Attributes:
        step: The newest step.
        values: Newest value by name.
        losses: All losses.
    """

    path: Path
    step: int = 0
    values: dict[str, float] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    place: int = 0

    def look(self) -> None:
        """Read what has been written since."""
        if not self.path.exists():
            return
        if self.path.stat().st_size < self.place:  # a new log in its place
            self.step, self.values, self.losses, self.place = 0, {}, [], 0
        with self.path.open(newline="", encoding="utf-8") as file:
            self._read(file)

    def _read(self, file: TextIO) -> None:
        file.seek(self.place)
        while (line := file.readline()).endswith("\n"):
            self.place = file.tell()
            cells = line.strip().split(",")
            if tuple(cells) == HEADER:
                continue
            try:
                step, name, value = int(cells[0]), ",".join(cells[1:-1]).strip('"'), cells[-1]
                number = float(value)
            except (ValueError, IndexError) as error:
                raise typer.BadParameter(
                    f"{self.path}: '{line.strip()[:60]}' is no step, name and number; is it a log "
                    "of ddpnopt.StepLog?"
                ) from error
            if step != self.step:
                self.step, self.values = step, {}
            self.values[name] = number
            if name == "loss":
                self.losses.append(number)


def sparkline(values: list[float]) -> str:
    """A curve in one line, the newest values to the right; what is not finite is a cross."""
    shown = values[-WIDTH:]
    finite = [v for v in shown if abs(v) < float("inf")]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((v - low) * scale)] if abs(v) < float("inf") else "x" for v in shown)


def display(log: Log) -> Group:
    """The newest step as a heading, a curve of the loss, and a table by layer."""
    if not log.step and not log.values:
        return Group(Text(f"{log.path}: no step yet", style="yellow"))
    known = [f"{name} {log.values[name]:.6g}" for name in HEADING if name in log.values]
    parts: list[Text | Table] = [Text(" · ".join([f"step {log.step}", *known]), style="bold")]
    if log.losses:
        parts.append(Text(f"loss {sparkline(log.losses)}", no_wrap=True))
    layers: dict[str, dict[str, float]] = {}
    for name, value in log.values.items():
        kind, _, layer = name.partition("/")
        if kind in COLUMNS and layer:
            layers.setdefault(layer, {})[kind] = value
    if not layers:
        parts.append(Text("no layer in feedback in this step", style="yellow"))
        return Group(*parts)
    table = Table("layer")
    kinds = [kind for kind in COLUMNS if any(kind in found for found in layers.values())]
    for kind in kinds:
        table.add_column(COLUMNS[kind][0], justify="right")
    for layer, found in layers.items():
        cells = [COLUMNS[kind][1].format(found[kind]) if kind in found else "" for kind in kinds]
        table.add_row(layer, *cells)
    parts.append(table)
    return Group(*parts)


def watch_command(
    folder: Annotated[Path, typer.Argument(help="Folder that a StepLog writes to.")],
    every: Annotated[
        float, typer.Option("--every", min=0.05, help="Seconds between two looks.")
    ] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Show the newest step and end.")] = False,
) -> None:
    """Show loss, coefficients and feedback by layer while a training run goes on."""
    console = Console()
    if not folder.is_dir():
        raise typer.BadParameter(
            f"{folder}: no such folder; name the one given to ddpnopt.StepLog, or to train --log"
        )
    log = Log(folder / FILE)
    log.look()
    if once:
        if not log.step and not log.values:
            raise typer.BadParameter(f"{folder}: no {FILE} with steps in it")
        console.print(display(log))
        return
    try:
        with Live(display(log), console=console, auto_refresh=False) as live:
            while True:
                time.sleep(every)
                log.look()
                live.update(display(log), refresh=True)
    except KeyboardInterrupt:
        return
