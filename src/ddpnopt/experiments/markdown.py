# SPDX-License-Identifier: MIT
"""Markdown tables of a study, and putting them into a page."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from ddpnopt.experiments.summary import Verdict, by_optimizer, by_rate

BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Render a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def targets_table(verdicts: Sequence[Verdict]) -> str:
    """Render targets and what was measured.

    Args:
        verdicts: See `ddpnopt.experiments.summary.judge`.

    Returns:
        A Markdown table.
    """
    rows = [
        [
            v.target.architecture,
            f"{v.target.lr:g}",
            v.wanted,
            f"{v.mean:.1f}",
            f"{v.worst:.1f}",
            str(v.seeds),
            "yes" if v.met else "**no**",
        ]
        for v in verdicts
    ]
    return table(["network", "lr", "wanted", "mean", "worst seed", "seeds", "met"], rows)


def _cell(row: pd.Series) -> str:
    failed = f", {100 * row['failed']:.0f} % failed" if row["failed"] else ""
    return f"{row['mean']:.1f} ± {row['sd']:.1f} ({row['worst']:.1f}{failed})"


def _rates(rates: pd.DataFrame, lrs: Sequence[float], loss: bool) -> str:
    rows: list[list[str]] = []
    for label, own in rates.groupby("label", sort=False):
        cells = {float(row["lr"]): row for _, row in own.iterrows()}
        if not set(cells) <= set(lrs):
            continue
        shown = [
            "" if lr not in cells else f"{cells[lr]['loss']:.3f}" if loss else _cell(cells[lr])
            for lr in lrs
        ]
        rows.append([str(label), *shown])
    return table(["lr", *[f"{lr:g}" for lr in lrs]], rows)


def problem_section(heading: str, runs: pd.DataFrame) -> str:
    """Render one network's results.

    Optimizers are grouped by the rates that they were tried at, one table each.

    Args:
        heading: Title of the section.
        runs: The network's runs.

    Returns:
        Markdown: accuracy, training loss, and the best rate and range of good rates.
    """
    rates = by_rate(runs)
    most, fewest = int(rates["seeds"].max()), int(rates["seeds"].min())
    seeds = f"{most} seeds"
    if fewest < most:
        fewer = rates.loc[rates["seeds"] < most, "label"].unique()
        seeds += f", the first {fewest} of them for {', '.join(fewer)}"
    spans = {label: tuple(own["lr"]) for label, own in rates.groupby("label", sort=False)}
    parts = [
        f"### {heading}",
        f"Test accuracy in %, mean ± standard deviation over {seeds} "
        "(worst seed, share of runs that diverged or ended near chance):",
    ]
    distinct = list(dict.fromkeys(spans.values()))
    for lrs in distinct:
        own = rates[rates["label"].map(spans) == lrs]
        parts.append(_rates(own, lrs, loss=False))
    parts.append("Mean training loss:")
    for lrs in distinct:
        own = rates[rates["label"].map(spans) == lrs]
        parts.append(_rates(own, lrs, loss=True))
    parts.append("Best rate, and rates within 2 points of the best mean of all:")
    parts.append(_summary(by_optimizer(runs)))
    return "\n\n".join(parts)


def _summary(totals: pd.DataFrame) -> str:
    rows = [
        [
            str(row["label"]),
            f"{row['lr']:g}",
            f"{row['mean']:.1f} ± {row['sd']:.1f}",
            f"{row['worst']:.1f}",
            "-" if pd.isna(row["low"]) else f"{row['low']:g} to {row['high']:g}",
            "-" if pd.isna(row["factor"]) else f"{row['factor']:.3g}",
            f"{100 * row['failed']:.0f} %",
        ]
        for _, row in totals.iterrows()
    ]
    header = ["optimizer", "best lr", "mean", "worst seed", "good rates", "factor", "failed"]
    return table(header, rows)


def update_page(page: str, tables: str, mark: str = "tables") -> str:
    """Replace what stands between a page's two marks.

    Args:
        page: The page.
        tables: Markdown to put there.
        mark: Name of the marks, `<!-- NAME: begin -->` and `<!-- NAME: end -->`.

    Returns:
        The new page.

    Raises:
        ValueError: A mark is missing.
    """
    first, last = BEGIN.replace("tables", mark), END.replace("tables", mark)
    before, begin, rest = page.partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end:
        raise ValueError(f"the page lacks the marks {first} and {last}")
    return f"{before}{first}\n\n{tables}\n{last}{after}"
