# SPDX-License-Identifier: MIT
"""The study `when_it_helps` as a section of the page."""

from __future__ import annotations

import base64
from pathlib import Path
from tempfile import TemporaryDirectory

from ddpnopt.experiments.page.sections import Section, State, markdown_html
from ddpnopt.experiments.selection import store_file
from ddpnopt.experiments.store import SqliteStore
from ddpnopt.experiments.when_it_helps import times
from ddpnopt.experiments.when_it_helps.figure import draw
from ddpnopt.experiments.when_it_helps.problems import PROBLEMS
from ddpnopt.experiments.when_it_helps.tables import render, verdicts

NAME = "when-it-helps"
#: Fresh seeds are numbered from here.
FRESH = 100


def study_section(store: Path) -> Section:
    """Figure and tables of every network and borrowed optimizer that is complete.

    Args:
        store: The study's store, or its folder; runs of all versions of the code are shown.

    Raises:
        ValueError: There is no store.
    """
    if not store.exists():
        raise ValueError(
            f"--study {store}: no such file; "
            "`python -m ddpnopt.experiments.when_it_helps --out DIR` makes one in DIR"
        )
    results = SqliteStore(store_file(store)).results(all_versions=True)
    numbers = {r.config.seed for r in results}
    seeds = range(max((n for n in numbers if n < FRESH), default=-1) + 1)
    fresh = range(FRESH, max((n for n in numbers if n >= FRESH), default=FRESH - 1) + 1)
    complete = bool(seeds) and bool(fresh)
    stored = {r.config.key: r for r in results}
    found = verdicts(PROBLEMS, seeds, fresh, stored) if complete else []
    total = sum(len(p.families) for p in PROBLEMS.values())
    state: State = "complete" if len(found) == total else "incomplete" if found else "not run"
    picture = ""
    if found:
        with TemporaryDirectory() as folder:
            drawn = draw(found, Path(folder) / "study.png").read_bytes()
        picture = f"data:image/png;base64,{base64.b64encode(drawn).decode()}"
    notes = f"{render(found, seeds, fresh)}\n{times.render(found)}" if found else ""
    return Section(
        NAME,
        "When feedback helps, and when it does not",
        state,
        "python -m ddpnopt.experiments.when_it_helps",
        notes=markdown_html(notes),
        picture=picture,
        measured=len(found),
        total=total,
    )
