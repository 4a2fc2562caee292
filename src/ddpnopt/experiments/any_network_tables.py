# SPDX-License-Identifier: MIT
"""Tables of the study of `any_network`: scores over the rate, at equal steps and at equal time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ddpnopt.experiments.any_network_costs import Cost
from ddpnopt.experiments.any_network_problems import Family, Problem
from ddpnopt.experiments.markdown import table
from ddpnopt.experiments.optimizers import label_of
from ddpnopt.experiments.records import RunResult
from ddpnopt.experiments.summary import stretch
from ddpnopt.experiments.sweep import Contender

#: A score where there is none: below all others, and finite, so that means stay comparable.
WORST = -1e9


@dataclass(frozen=True)
class Measured:
    """A problem with its runs and costs.

    Attributes:
        problem: The network.
        runs: A table of `frame_of`.
        costs: One for each of the problem's contenders.
    """

    problem: Problem
    runs: pd.DataFrame
    costs: Sequence[Cost]


def _epoch_seconds(result: RunResult) -> float:
    # An epoch that ended in divergence is a part of one.
    whole = result.epochs[:-1] if result.diverged else result.epochs
    return float(np.median([e.cpu_seconds for e in whole])) if whole else math.nan


def frame_of(results: Sequence[RunResult], problem: Problem) -> pd.DataFrame:
    """Make a table of a problem's runs.

    Args:
        results: Its results.
        problem: Says what the score is.

    Returns:
        Columns label, lr, seed, score (accuracy on the test part in %, or minus the training
        loss: larger is better), failed, cpu (CPU seconds of an epoch) and curve (score after
        every epoch).
    """

    def score(loss: float, accuracy: float) -> float:
        found = -loss if problem.by_loss else 100.0 * accuracy
        return found if math.isfinite(found) else WORST

    rows = [
        {
            "label": r.config.label,
            "lr": r.config.lr,
            "seed": r.config.seed,
            "score": score(r.train_loss, r.test_accuracy),
            "loss": r.train_loss,
            "failed": r.failed,
            "cpu": _epoch_seconds(r),
            "curve": [score(e.train_loss, e.test_accuracy) for e in r.epochs],
        }
        for r in results
    ]
    return pd.DataFrame(rows)


def at_time(curve: Sequence[float], epochs: float) -> float:
    """Score when a part of the epochs is over: linear between them, the first one's before it.

    Args:
        curve: Scores after the epochs 1, 2, ...; a run that diverged has fewer.
        epochs: Where to look.
    """
    if not curve:
        return WORST
    return float(np.interp(epochs, np.arange(1, len(curve) + 1), curve))


def _label(contender: Contender) -> str:
    return label_of(contender.optimizer, dict(contender.options))


def _show(score: float, by_loss: bool) -> str:
    if score <= WORST / 1e3:
        return "NaN"
    return f"{-score:.2f}" if by_loss else f"{score:.1f}"


@dataclass(frozen=True)
class Row:
    """An optimizer on a problem.

    Attributes:
        label: Its name.
        rates: Rows lr, mean, worst, failed (a share) and seeds, rates ascending.
        best: The rate with the best mean.
        scores: The seeds' scores at that rate, by seed.
        timed_lr: The rate with the best mean when SGD's time is over.
        timed: That mean.
        good: Lowest and highest rate of the unbroken stretch within the tolerance of the
            family's best mean around this optimizer's best; None where even that falls short.
        time: CPU seconds of a step over SGD's.
    """

    label: str
    rates: pd.DataFrame
    best: float
    scores: pd.Series
    timed_lr: float
    timed: float
    good: tuple[float, float] | None
    time: float


def _rates(own: pd.DataFrame, column: str = "score") -> pd.DataFrame:
    groups = own.groupby("lr")
    return groups.agg(
        mean=(column, "mean"),
        worst=(column, "min"),
        failed=("failed", "mean"),
        seeds=("seed", "count"),
    ).reset_index()


def _good(rates: pd.DataFrame, reference: float, tolerance: float) -> tuple[float, float] | None:
    near = (rates["mean"] >= reference - tolerance).tolist()
    found = stretch(near, int(rates["mean"].idxmax()))
    return found and (float(rates["lr"][found[0]]), float(rates["lr"][found[1]]))


def rows_of(measured: Measured, family: Family, lrs: tuple[float, ...]) -> list[Row]:
    """Summarise a family's optimizers on a problem.

    Args:
        measured: The problem's runs.
        family: The optimizers.
        lrs: Their rates.

    Returns:
        One row for each optimizer with runs.
    """
    runs, problem = measured.runs, measured.problem
    sgd = runs.loc[runs["label"] == "SGD", "cpu"].median()
    found: list[tuple[str, pd.DataFrame]] = []
    for contender in family.contenders(lrs):
        own = runs[runs["label"] == _label(contender)]
        if len(own):
            found.append((_label(contender), own))
    reference = max((float(_rates(own)["mean"].max()) for _, own in found), default=math.nan)
    rows: list[Row] = []
    for label, own in found:
        time = float(own["cpu"].median() / sgd)
        epochs = problem.base.epochs / time if math.isfinite(time) else problem.base.epochs
        timed = _rates(own.assign(timed=[at_time(c, epochs) for c in own["curve"]]), "timed")
        rates = _rates(own)
        best, first = float(rates["lr"][rates["mean"].idxmax()]), int(timed["mean"].idxmax())
        rows.append(
            Row(
                label=label,
                rates=rates,
                best=best,
                scores=own[own["lr"] == best].set_index("seed")["score"],
                timed_lr=float(timed["lr"][first]),
                timed=float(timed["mean"][first]),
                good=_good(rates, reference, problem.tolerance),
                time=time,
            )
        )
    return rows


def _ratio(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "-"


def summary_table(measured: Measured) -> str:
    """Render one row for each optimizer: best rate, worst seed, equal time, range, costs.

    Args:
        measured: The problem's runs and costs.

    Returns:
        A Markdown table.
    """
    problem = measured.problem
    costs = dict(zip(map(_label, problem.contenders()), measured.costs, strict=True))
    base = costs["SGD"]
    lines: list[list[str]] = []
    for row in (r for family, lrs in problem.families() for r in rows_of(measured, family, lrs)):
        cost = costs[row.label]
        at_best = row.rates[row.rates["lr"] == row.best].iloc[0]
        lines.append(
            [
                row.label,
                f"{_show(at_best['mean'], problem.by_loss)} at {row.best:g}",
                _show(at_best["worst"], problem.by_loss),
                f"{_show(row.timed, problem.by_loss)} at {row.timed_lr:g}",
                "-" if row.good is None else f"{row.good[0]:g} to {row.good[1]:g}",
                "-" if row.good is None else f"{row.good[1] / row.good[0]:.3g}",
                _ratio(row.time),
                _ratio(cost.mib / base.mib),
                _ratio(cost.gflop / base.gflop),
            ]
        )
    header = ["optimizer", "best", "worst seed there", "best in SGD's time", "good rates"]
    return table([*header, "factor", "time x", "memory x", "operations x"], lines)


def rates_table(measured: Measured, family: Family, lrs: tuple[float, ...]) -> str:
    """Render a family's scores at every rate: mean (worst seed, share of failed runs).

    Args:
        measured: The problem's runs.
        family: The optimizers.
        lrs: Their rates.

    Returns:
        A Markdown table; empty without runs.
    """
    by_loss, lines = measured.problem.by_loss, []
    for row in rows_of(measured, family, lrs):
        cells = {float(r["lr"]): r for _, r in row.rates.iterrows()}
        line = [row.label]
        for lr in lrs:
            if lr not in cells:
                line.append("")
                continue
            cell = cells[lr]
            failed = f", {100 * cell['failed']:.0f} % failed" if cell["failed"] else ""
            worst = _show(cell["worst"], by_loss)
            line.append(f"{_show(cell['mean'], by_loss)} ({worst}{failed})")
        lines.append(line)
    return table(["lr", *[f"{lr:g}" for lr in lrs]], lines) if lines else ""


def _difference(own: Row, other: Row, by_loss: bool) -> str:
    """Mean difference at the best rates of both, paired by seed, with its standard error."""
    paired = (own.scores - other.scores).dropna()
    text = f"{paired.mean():+.2f}" if by_loss else f"{paired.mean():+.1f}"
    if len(paired) < 2:
        return text
    return f"{text} ± {paired.sem():.2f}" if by_loss else f"{text} ± {paired.sem():.1f}"


def verdicts(measured: Sequence[Measured]) -> str:
    """Render one row per problem and family: does the library help, and does feedback?

    Args:
        measured: The problems.

    Returns:
        A Markdown table: closed loop minus the best rival, closed minus open loop (each at its
        best rate, positive is better), and the upper edges of the good rates.
    """
    lines: list[list[str]] = []
    for one in measured:
        for family, lrs in one.problem.families():
            rows = rows_of(one, family, lrs)
            if len(rows) < len(family.contenders(lrs)):
                continue
            *rivals, closed, opened = rows
            best = max(rivals, key=lambda r: float(r.rates["mean"].max()))
            edges = [f"{r.good[1]:g}" if r.good else "-" for r in rows]
            by_loss = one.problem.by_loss
            lines.append(
                [
                    one.problem.heading.split(",")[0],
                    family.name,
                    f"{_difference(closed, best, by_loss)} ({best.label})",
                    _difference(closed, opened, by_loss),
                    " / ".join(edges[: len(rivals)]),
                    " / ".join(edges[len(rivals) :]),
                ]
            )
    header = ["network", "around", "closed loop - best rival", "closed - open loop"]
    return table([*header, "upper edge of rivals", "of closed / open loop"], lines)


def render(measured: Sequence[Measured]) -> str:
    """Render the study.

    Args:
        measured: Its problems.

    Returns:
        Markdown: verdicts, then for every problem the summary and the scores over the rate.
    """
    seeds = sorted({int(s) for one in measured for s in one.runs["seed"]})
    parts = [f"Seeds {', '.join(map(str, seeds))}.", verdicts(measured)]
    for one in measured:
        problem = one.problem
        score = "Training loss" if problem.by_loss else "Test accuracy in %"
        unit = "" if problem.by_loss else " points"
        parts += [
            f"### {problem.heading}",
            f"{score} after {problem.steps} steps of {problem.base.batch} samples; good rates: "
            f"within {problem.tolerance:g}{unit} of the family's best mean.",
            summary_table(one),
            "Mean over the seeds (worst seed, share of runs that diverged or ended near chance):",
            *[text for f, lrs in problem.families() if (text := rates_table(one, f, lrs))],
        ]
        parts += [
            f"Cost not measured: {_label(c)}: {cost.error}"
            for c, cost in zip(problem.contenders(), one.costs, strict=True)
            if cost.error
        ]
    return "\n\n".join(parts) + "\n"
