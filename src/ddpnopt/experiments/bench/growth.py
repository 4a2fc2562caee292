# SPDX-License-Identifier: MIT
"""How the cost of a step grows with batch, width and depth: Table 4's measurement, made anew."""

from __future__ import annotations

import math
import tempfile
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from ddpnopt.experiments.bench.document import Exponent
from ddpnopt.experiments.reproduce.costs import table4
from ddpnopt.experiments.reproduce.outcome import Request, write
from ddpnopt.experiments.store import SqliteStore


def measure_growth(
    out: Path, quick: bool, console: Console, settings: Path | None = None
) -> tuple[list[Exponent], Path]:
    """Measure and fit; write growth.csv, growth.md and the log-log figure growth.png.

    Always on the CPU with one thread: CPU time there is what an idle machine would need.

    Args:
        out: Folder of the files.
        quick: The two smallest sizes only, one round.
        console: Where progress is shown.
        settings: Sizes and methods, as Table 4's settings file has them; None: the packaged one.

    Returns:
        The exponents, and the figure's file.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = SqliteStore(Path(folder) / "store.sqlite")
        request = Request(out, store, quick=quick, console=console, settings=settings)
        outcome = table4(request)
    named = replace(
        outcome,
        name="growth",
        title="How time and memory of a training step grow",
        command="ddpnopt bench --part growth" + (" --quick" if quick else ""),
    )
    written = write(named, out)
    rows = [
        Exponent(
            method=row["method"],
            cost=row["cost"],
            size=row["in"],
            measured=_number(row["measured"]),
            last_two=_number(row["last_two"]),
            sizes=row["sizes"],
            costs=row["costs"],
            unit=row["unit"],
        )
        for row in outcome.rows.to_dict("records")
    ]
    return rows, next(path for path in written if path.suffix == ".png")


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
