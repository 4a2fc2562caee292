# SPDX-License-Identifier: MIT
"""An outcome as a section of the page: its tables, picture and state, ready to print."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import matplotlib
import pandas as pd
from markdown_it import MarkdownIt
from markupsafe import Markup
from matplotlib.figure import Figure

from ddpnopt.experiments.reproduce.outcome import Outcome, ordered, show_number
from ddpnopt.experiments.reproduce.statistics import (
    BOTH_LOST,
    LOST,
    NEITHER,
    NOT_RUN,
    OPPOSITE,
    REFERENCE_LOST,
    SAME,
    SIGNIFICANT,
    Count,
    count,
)

State = Literal["complete", "incomplete", "not run", "failed"]
#: A vector figure above this size, in bytes, is drawn as pixels instead.
_VECTOR_LIMIT = 150_000
#: Rows of all cells that a page holds; the CSV file has every one.
_ROWS = 400


@dataclass(frozen=True)
class Cell:
    """A table's cell: its text and CSS class."""

    text: str
    kind: str = ""


@dataclass(frozen=True)
class Table:
    """A table ready to print.

    Attributes:
        caption: One line; may be empty.
        header: Names of the columns, of the kind of their cells.
        rows: Cells, as many as there are columns.
    """

    caption: str
    header: tuple[Cell, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True)
class Section:
    """A result as the page shows it.

    Attributes:
        name: "table6", ...; also the anchor.
        title: One line.
        state: Whether all, some or none of its cells have been measured, or it can't be shown.
        quick: Made with `--quick`.
        command: How to make it again.
        settings: HTML.
        notes: HTML.
        tables: Tables for readers.
        cells: All cells.
        picture: Figure as a data URI; empty: none.
        minutes: Time in trainings and measurements, in words.
        measured: Cells with a number.
        total: Cells.
        judged: Cells with a verdict, or 0.
        same: Those with the published sign.
        significant: Those of them that are significant.
        against: Cells with the opposite sign, significantly, or whose runs all diverged.
        message: Why it can't be shown.
    """

    name: str
    title: str
    state: State
    command: str
    quick: bool = False
    settings: Markup = field(default_factory=Markup)
    notes: Markup = field(default_factory=Markup)
    tables: tuple[Table, ...] = ()
    cells: Table | None = None
    picture: str = ""
    minutes: str = ""
    measured: int = 0
    total: int = 0
    judged: int = 0
    same: int = 0
    significant: int = 0
    against: int = 0
    message: str = ""


def _parser() -> MarkdownIt:
    # No HTML and no images: a page from a stranger's store must not load or run anything.
    parser = MarkdownIt("commonmark", {"html": False}).enable("table").disable("image")
    opening = '<div class="scroll" role="region" aria-label="table" tabindex="0"><table>'
    parser.add_render_rule("table_open", lambda *_: opening)
    parser.add_render_rule("table_close", lambda *_: "</table></div>")
    parser.add_render_rule("th_open", lambda *_: '<th scope="col">')
    return parser


def markdown_html(text: str) -> Markup:
    """Render Markdown; HTML in it is shown as text.

    Args:
        text: Markdown.
    """
    return Markup(_parser().render(text))


def _cell(value: object) -> Cell:
    text = show_number(value)
    plain = text.strip()
    if plain == LOST or (plain.startswith(OPPOSITE) and plain.endswith(f", {SIGNIFICANT}")):
        return Cell(text, "against")
    if plain.startswith(SAME):
        return Cell(text, "same" if plain.endswith(f", {SIGNIFICANT}") else "")
    if plain in ("", "–", NOT_RUN):
        return Cell(plain or "–", "empty")
    return Cell(text, "number" if plain.lstrip("+-−±").lstrip()[:1].isdigit() else "")


def _table(caption: str, frame: pd.DataFrame, limit: int | None = None) -> Table:
    shown = frame.head(limit) if limit is not None else frame
    rows = tuple(tuple(map(_cell, row)) for row in shown.itertuples(index=False, name=None))
    header = [
        Cell(str(name), "number" if any(row[i].kind == "number" for row in rows) else "")
        for i, name in enumerate(frame.columns)
    ]
    return Table(caption, tuple(header), rows)


def data_uri(figure: Figure) -> str:
    """Draw a figure into a data URI: SVG, or PNG where that would be large.

    Args:
        figure: The figure; it is cleared.
    """
    buffer = io.BytesIO()
    # Without a salt and a date, the same figure gives the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "ddpnopt"}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    kind = "svg+xml"
    if buffer.tell() > _VECTOR_LIMIT:
        buffer, kind = io.BytesIO(), "png"
        figure.savefig(
            buffer, format="png", dpi=120, bbox_inches="tight", metadata={"Software": None}
        )
    figure.clear()
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def duration(seconds: float) -> str:
    """Write a duration for readers: seconds, minutes or hours."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def measured_cells(rows: pd.DataFrame) -> int:
    """Cells that have been measured."""
    return int(rows["measured"].notna().sum()) if "measured" in rows else 0


def _judged(rows: pd.DataFrame) -> Count:
    """Count the verdicts of the cells that are printed; other columns have their own counts."""
    if not {"published", "verdict"} <= set(rows):
        return count([])
    printed = rows.loc[rows["published"].notna(), "verdict"].dropna().astype(str)
    lost = (LOST, BOTH_LOST, REFERENCE_LOST)
    judged = [v for v in printed if v.startswith((SAME, OPPOSITE, NEITHER)) or v in lost]
    return count([*judged, *(v for v in printed if v == NOT_RUN)] if judged else [])


def section(outcome: Outcome) -> Section:
    """Turn an outcome into a section.

    Args:
        outcome: Made from what the store holds.

    Returns:
        The section; without measured cells its figure is not drawn.
    """
    total, measured = len(outcome.rows), measured_cells(outcome.rows)
    state: State = "complete" if 0 < measured == total else "incomplete"
    if not measured:
        state = "not run"
    counted = _judged(outcome.rows)
    views: Sequence[tuple[str, pd.DataFrame]] = [(v.caption, v.frame) for v in outcome.views]
    everything = ordered(outcome.rows, outcome.quick)
    picture = data_uri(outcome.figure()) if outcome.figure is not None and measured else ""
    return Section(
        name=outcome.name,
        title=outcome.title,
        state=state,
        command=outcome.command or f"ddpnopt reproduce {outcome.name}",
        quick=outcome.quick,
        settings=markdown_html(outcome.settings),
        notes=markdown_html("\n\n".join(outcome.notes)),
        tables=tuple(_table(caption, frame) for caption, frame in views),
        cells=_table(f"The first {_ROWS} cells" if total > _ROWS else "", everything, _ROWS),
        picture=picture,
        minutes=duration(outcome.seconds) if outcome.seconds else "",
        measured=measured,
        total=total,
        judged=counted.cells,
        same=counted.same,
        significant=counted.same_significant,
        against=counted.against,
    )


def failed_section(name: str, error: Exception) -> Section:
    """A section that says why a result can't be shown.

    Args:
        name: "table6", ...
        error: What making it from the store raised.
    """
    command = f"ddpnopt reproduce {name}"
    return Section(name, name, "failed", command, message=f"{type(error).__name__}: {error}")
