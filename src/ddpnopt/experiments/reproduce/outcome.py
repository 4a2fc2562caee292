# SPDX-License-Identifier: MIT
"""What a reproduction is asked for, what it gives, and the files that it is written to."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from rich.console import Console

from ddpnopt.experiments.markdown import table
from ddpnopt.experiments.store import SqliteStore

#: Said in every output of a run with `--quick`.
QUICK = "QUICK RUN: fewer seeds and epochs than the documented setting; not a result."

#: What stands in a table where nothing was measured or published.
EMPTY = "–"

#: Columns that every CSV begins with; what a result has no use for stays empty.
COLUMNS = (
    "published",
    "measured",
    "sd",
    "seeds",
    "worst",
    "difference",
    "low",
    "high",
    "verdict",
)


@dataclass(frozen=True)
class Request:
    """What the user asked for.

    Attributes:
        out: Folder of the written files.
        store: Where trainings are kept.
        seeds: Number of seeds instead of the settings file's; None: the file's.
        epochs: Number of epochs instead of the file's; None: the file's.
        jobs: Processes, one torch thread each.
        quick: Use the file's `[quick]` sizes.
        data: Folder of the data sets' files; None: only what scikit-learn carries.
        dask: Address of a Dask scheduler that runs the trainings; None: this machine.
        run: False: nothing is trained, cells without stored runs stay empty.
        console: Where progress is shown; None: the standard error stream.
        settings: The user's own copy of a settings file; None: the packaged one.
        download: Data sets that are not in `data` may be fetched.
    """

    out: Path
    store: SqliteStore
    seeds: int | None = None
    epochs: int | None = None
    jobs: int = 1
    quick: bool = False
    data: Path | None = None
    dask: str | None = None
    run: bool = True
    console: Console | None = None
    settings: Path | None = None
    download: bool = False


@dataclass(frozen=True)
class View:
    """A table for readers, its cells ready to print.

    Attributes:
        caption: What it shows, one line.
        frame: Strings only; the index is not shown.
    """

    caption: str
    frame: pd.DataFrame


@dataclass(frozen=True)
class Outcome:
    """A reproduced table or figure.

    Attributes:
        name: "table6", "fig4", ...
        title: One line.
        settings: The documented setting, as Markdown.
        rows: A row a cell; the columns `COLUMNS` first (added empty where they lack), then others.
        notes: Markdown paragraphs: what to see, conventions of signs and axes, what is missing.
        figure: Draws the figure; None: there is nothing to look at. Called when it is needed.
        quick: Made with `--quick`.
        command: How to make it again.
        seconds: Time in the trainings and measurements it rests on, summed over processes.
        views: Tables for readers; none: `rows` is shown as it is.
        summary: One line for the terminal, such as the count of verdicts.
    """

    name: str
    title: str
    settings: str
    rows: pd.DataFrame
    notes: tuple[str, ...] = ()
    figure: Callable[[], Figure] | None = None
    quick: bool = False
    command: str = ""
    seconds: float = 0.0
    views: tuple[View, ...] = field(default=())
    summary: str = ""


def rerun(request: Request, name: str) -> str:
    """Return the command that makes a result again, with the options that change its numbers.

    Args:
        request: What the user asked for.
        name: "table6", ...
    """
    parts = [f"ddpnopt reproduce {name}"]
    for option, value in (
        ("--seeds", request.seeds),
        ("--epochs", request.epochs),
        ("--settings", request.settings),
        ("--data", request.data),
    ):
        if value is not None:
            parts.append(f"{option} {shlex.quote(str(value))}")
    parts += ["--download"] if request.download else []
    parts += ["--quick"] if request.quick else []
    parts.append(f"--out {shlex.quote(str(request.out))}")
    return " ".join(parts)


def show_number(value: object, digits: int = 4) -> str:
    """Write a number for readers; NaN and None as `EMPTY`.

    Args:
        value: A number, text (kept as it is) or None.
        digits: Significant digits.

    Returns:
        The text.
    """
    if value is None or (isinstance(value, float) and value != value):
        return EMPTY
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def ordered(rows: pd.DataFrame, quick: bool) -> pd.DataFrame:
    """Return `rows` with every column of `COLUMNS` (empty where new) and a column `quick`.

    What names a cell (all columns that come before `published`) stays in front.

    Args:
        rows: A row a cell.
        quick: Made with `--quick`.

    Returns:
        A copy.
    """
    names = list(rows.columns)
    at = names.index("published") if "published" in names else len(names)
    front = [n for n in names[:at] if n not in COLUMNS]
    rest = [n for n in names[at:] if n not in COLUMNS]
    complete = rows.reindex(columns=[*front, *COLUMNS, *rest])
    complete["quick"] = quick
    return complete


def markdown(outcome: Outcome, picture: str | None = None) -> str:
    """Render an outcome as a Markdown page.

    Args:
        outcome: What to show.
        picture: File name of its figure; None: there is none.

    Returns:
        The page.
    """
    views: Sequence[View] = outcome.views or (View("", outcome.rows),)
    parts = [f"# {outcome.title}"]
    if outcome.quick:
        parts.append(f"**{QUICK}**")
    if picture is not None:
        parts.append(f"![{outcome.title}]({picture})")
    for view in views:
        lines = [[show_number(cell) for cell in row] for row in view.frame.itertuples(index=False)]
        if view.caption:
            parts.append(f"**{view.caption}**")
        parts.append(table([str(name) for name in view.frame.columns], lines))
    parts += outcome.notes
    parts += ["## Setting", outcome.settings]
    time = f"Trainings and measurements: {outcome.seconds / 60:.1f} minutes, summed over processes."
    parts += ["## How to make it again", f"```console\n{outcome.command}\n```", time]
    return "\n\n".join(parts) + "\n"


def write(outcome: Outcome, out: Path) -> list[Path]:
    """Write an outcome: NAME.csv, NAME.md and, where there is something to look at, NAME.png.

    Args:
        outcome: What to write.
        out: Folder; made where it does not exist.

    Returns:
        The files.
    """
    out.mkdir(parents=True, exist_ok=True)
    csv, page, png = (out / f"{outcome.name}.{suffix}" for suffix in ("csv", "md", "png"))
    ordered(outcome.rows, outcome.quick).to_csv(csv, index=False, float_format="%.6g")
    page.write_text(markdown(outcome, png.name if outcome.figure else None))
    if outcome.figure is None:
        return [csv, page]
    figure = outcome.figure()
    if outcome.quick:
        # In the picture itself: it will be copied without its page.
        figure.text(0.005, 1.005, QUICK, color="#B00020", va="bottom", fontsize=9, weight="bold")
    # No date or version in the file: the same figure gives the same bytes.
    figure.savefig(png, dpi=130, bbox_inches="tight", metadata={"Software": None})
    figure.clear()
    return [csv, page, png]
