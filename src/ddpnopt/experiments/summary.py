# SPDX-License-Identifier: MIT
"""Statistics over seeds: mean, spread, worst seed, share of failures, range of good rates."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pandas as pd

KEYS = ["dataset", "architecture", "label", "lr"]


def by_rate(runs: pd.DataFrame) -> pd.DataFrame:
    """Summarise the seeds of every data set, architecture, optimizer and rate.

    Args:
        runs: A table of `ddpnopt.experiments.sweep.frame`.

    Returns:
        One row per cell in the order of first appearance, rates ascending, with the columns
        mean, sd (n - 1; 0 for one seed), worst and best of the test accuracy (%), loss (mean
        training loss; infinite where a seed's loss is not finite), diverged and failed (shares),
        seeds, seconds (mean).
    """
    ranks = {label: rank for rank, label in enumerate(dict.fromkeys(runs["label"]))}
    groups = runs.groupby(KEYS, sort=False)
    table = groups.agg(
        mean=("test_accuracy", "mean"),
        sd=("test_accuracy", "std"),
        worst=("test_accuracy", "min"),
        best=("test_accuracy", "max"),
        loss=("train_loss", lambda x: x.mean(skipna=False)),
        diverged=("diverged", "mean"),
        failed=("failed", "mean"),
        seeds=("seed", "count"),
        seconds=("seconds", "mean"),
    ).reset_index()
    table["sd"] = table["sd"].fillna(0.0)
    table["loss"] = table["loss"].fillna(math.inf)
    order = table.assign(rank=table["label"].map(ranks))
    return order.sort_values(["dataset", "architecture", "rank", "lr"]).drop(columns="rank")


@dataclass(frozen=True)
class RateRange:
    """Learning rates at which an optimizer is near a reference accuracy.

    Attributes:
        low: Lowest such rate tried.
        high: Highest rate of the unbroken stretch of such rates around the optimizer's best.
        factor: high / low.
    """

    low: float
    high: float

    @property
    def factor(self) -> float:
        """Width of the range as a ratio."""
        return self.high / self.low


def stretch(good: Sequence[bool], peak: int) -> tuple[int, int] | None:
    """Find the unbroken stretch of good places around a peak.

    Args:
        good: Whether each place is good, in order.
        peak: The best place.

    Returns:
        The first and the last place of the stretch; None where the peak itself is not good.
    """
    if not good[peak]:
        return None
    low = high = peak
    while low > 0 and good[low - 1]:
        low -= 1
    while high + 1 < len(good) and good[high + 1]:
        high += 1
    return low, high


def rate_range(rates: pd.DataFrame, reference: float, points: float = 2.0) -> RateRange | None:
    """Find the rates within `points` of `reference` around the best one.

    Args:
        rates: Rows of `by_rate` for one optimizer on one problem.
        reference: Accuracy to compare with, in %.
        points: Allowed loss of accuracy, in points.

    Returns:
        The unbroken stretch of tried rates around the best one; None where even the best rate
        falls short.
    """
    ordered = rates.sort_values("lr").reset_index(drop=True)
    good = (ordered["mean"] >= reference - points).tolist()
    found = stretch(good, int(ordered["mean"].idxmax()))
    return found and RateRange(*(float(ordered["lr"][place]) for place in found))


def by_optimizer(runs: pd.DataFrame) -> pd.DataFrame:
    """Summarise every optimizer on every problem.

    Args:
        runs: A table of `ddpnopt.experiments.sweep.frame`.

    Returns:
        One row per problem and optimizer: lr (the best rate by mean accuracy), mean, sd, worst at
        that rate, low, high, factor (rates within 2 points of the best mean of all optimizers on
        that problem; NaN where none is), failed (share over all rates).
    """
    rates = by_rate(runs)
    rows: list[dict[str, object]] = []
    for (dataset, architecture), problem in rates.groupby(["dataset", "architecture"], sort=False):
        reference = float(problem["mean"].max())
        for label, own in problem.groupby("label", sort=False):
            best = own.loc[own["mean"].idxmax()]
            span = rate_range(own, reference)
            rows.append(
                {
                    "dataset": dataset,
                    "architecture": architecture,
                    "label": label,
                    "lr": best["lr"],
                    "mean": best["mean"],
                    "sd": best["sd"],
                    "worst": best["worst"],
                    "low": span.low if span else math.nan,
                    "high": span.high if span else math.nan,
                    "factor": span.factor if span else math.nan,
                    "failed": own["failed"].mean(),
                }
            )
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class Target:
    """What DDPNOpt is to reach on a network at a rate; only what is set is asked.

    Attributes:
        architecture: Network name.
        lr: Learning rate.
        below_sgd: Points by which the mean may fall short of plain SGD's.
        mean: Least mean accuracy, in %.
        worst: Least accuracy of the worst seed, in %.
    """

    architecture: str
    lr: float
    below_sgd: float | None = None
    mean: float | None = None
    worst: float | None = None


@dataclass(frozen=True)
class Verdict:
    """A target and what was measured.

    Attributes:
        target: The target.
        wanted: The target in words.
        mean: Mean accuracy, in %; NaN without runs.
        worst: Accuracy of the worst seed, in %.
        seeds: Number of seeds.
        met: All that the target asks holds.
    """

    target: Target
    wanted: str
    mean: float
    worst: float
    seeds: int
    met: bool


def judge(runs: pd.DataFrame, targets: Iterable[Target], label: str = "DDPNOpt") -> list[Verdict]:
    """Compare an optimizer's runs with targets.

    Args:
        runs: A table of `ddpnopt.experiments.sweep.frame`.
        targets: What is asked.
        label: The optimizer's label.

    Returns:
        One verdict per target; a target without runs is not met.
    """
    return [_judge(runs, target, label) for target in targets]


def _judge(runs: pd.DataFrame, target: Target, label: str) -> Verdict:
    cell = runs[(runs["architecture"] == target.architecture) & (runs["lr"] == target.lr)]
    accuracy = cell[cell["label"] == label]["test_accuracy"]
    sgd = float(cell[cell["label"] == "SGD"]["test_accuracy"].mean())
    mean, worst = float(accuracy.mean()), float(accuracy.min())
    wanted: list[str] = []
    met = len(accuracy) > 0
    if target.below_sgd is not None:
        wanted.append(f">= SGD - {target.below_sgd:g} = {sgd - target.below_sgd:.1f}")
        met = met and mean >= sgd - target.below_sgd
    if target.mean is not None:
        wanted.append(f">= {target.mean:g}")
        met = met and mean >= target.mean
    if target.worst is not None:
        wanted.append(f"worst seed >= {target.worst:g}")
        met = met and worst >= target.worst
    return Verdict(target, ", ".join(wanted), mean, worst, len(accuracy), met)
