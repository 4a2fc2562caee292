# SPDX-License-Identifier: MIT
"""A borrowed optimizer, the same with clipping, and DDPNOpt around it: runs, ranges, tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from ddpnopt.experiments.markdown import table
from ddpnopt.experiments.optimizers import OptionValue, label_of
from ddpnopt.experiments.summary import RateRange, by_rate, rate_range
from ddpnopt.experiments.sweep import Contender
from ddpnopt.experiments.training import RunConfig

#: Points below the borrowed optimizer's best mean accuracy that still count as good.
GOOD = 2.0
#: Points that the twin may lose at a rate of the borrowed optimizer's good range.
LOSS = 0.5


@dataclass(frozen=True)
class Problem:
    """A network and its data.

    Attributes:
        base: Everything but optimizer, rate and seed.
        heading: Title of its section.
    """

    base: RunConfig
    heading: str


@dataclass(frozen=True)
class Pair:
    """A borrowed optimizer and its twin.

    Attributes:
        borrowed: Registry name.
        twin: Registry name of DDPNOpt around it; its open loop is the name with "-open-loop".
        lrs: Rates of all of them.
        clips: Thresholds of `clip_grad_norm_` that the borrowed optimizer is tried with, too.
    """

    borrowed: str
    twin: str
    lrs: tuple[float, ...]
    clips: tuple[float, ...] = (0.5, 1.0, 2.0)

    @property
    def clipped(self) -> list[Contender]:
        """The borrowed optimizer with each threshold."""
        options: list[tuple[tuple[str, OptionValue], ...]] = [
            (("grad_clip", clip),) for clip in self.clips
        ]
        return [Contender(self.borrowed, self.lrs, option) for option in options]

    def contenders(self) -> list[Contender]:
        """The borrowed optimizer, clipped ones, the twin and its open loop."""
        names = (self.twin, f"{self.twin}-open-loop")
        own = [Contender(name, self.lrs) for name in names]
        return [Contender(self.borrowed, self.lrs), *self.clipped, *own]


@dataclass(frozen=True)
class Outcome:
    """What a pair's runs on one problem show.

    Attributes:
        borrowed: The borrowed optimizer's good rates, around its best.
        twin: The twin's rates within the same two points of the borrowed optimizer's best.
        clipped: The same of the threshold whose range reaches highest; None: none has such rates.
        worst_lr: The rate inside `borrowed` at which the twin loses most.
        difference: Twin - borrowed there, paired by seed, in points.
        error: Its standard error; NaN for one seed.
    """

    borrowed: RateRange
    twin: RateRange | None
    clipped: RateRange | None
    worst_lr: float
    difference: float
    error: float

    @property
    def no_loss(self) -> bool:
        """The twin loses no more than half a point anywhere in the borrowed good range."""
        return self.difference >= -LOSS

    @property
    def widening(self) -> float:
        """Upper edge of the twin's good rates over the borrowed optimizer's; NaN without any."""
        return math.nan if self.twin is None else self.twin.high / self.borrowed.high


def paired(runs: pd.DataFrame, label: str, other: str, lr: float) -> tuple[float, float, int]:
    """Mean difference of test accuracy between two optimizers on the same seeds.

    Args:
        runs: One problem's runs.
        label: The one.
        other: The other, subtracted.
        lr: The rate of both.

    Returns:
        Mean in points, its standard error (NaN for one seed), number of seeds.
    """
    own = runs[runs["lr"] == lr].pivot_table(
        index="seed", columns="label", values="test_accuracy", aggfunc="first"
    )
    if label not in own or other not in own:
        return math.nan, math.nan, 0
    difference = (own[label] - own[other]).dropna()
    return float(difference.mean()), float(difference.sem()), len(difference)


def judge_pair(runs: pd.DataFrame, pair: Pair) -> Outcome:
    """Compare a twin with what it borrows from.

    Args:
        runs: One problem's runs (columns of `ddpnopt.experiments.sweep.frame`).
        pair: Borrowed optimizer and twin.

    Returns:
        Ranges of good rates, and the largest loss inside the borrowed optimizer's.
    """
    rates = by_rate(runs)

    def of(label: str) -> pd.DataFrame:
        return rates[rates["label"] == label]

    borrowed, twin = label_of(pair.borrowed), label_of(pair.twin)
    best = float(of(borrowed)["mean"].max())
    own = rate_range(of(borrowed), best, GOOD)
    if own is None:
        raise ValueError(f"{borrowed} has no finite accuracy at any rate")
    clip_labels = [label_of(c.optimizer, dict(c.options)) for c in pair.clipped]
    spans = [rate_range(of(name), best, GOOD) for name in clip_labels if len(of(name))]
    reached = [span for span in spans if span is not None]
    inside = [lr for lr in pair.lrs if own.low <= lr <= own.high]
    losses = [(*paired(runs, twin, borrowed, lr), lr) for lr in inside]
    difference, error, _, lr = min(losses, key=lambda loss: loss[0])
    return Outcome(
        borrowed=own,
        twin=rate_range(of(twin), best, GOOD) if len(of(twin)) else None,
        clipped=max(reached, key=lambda span: span.high) if reached else None,
        worst_lr=lr,
        difference=difference,
        error=error,
    )


def _with_error(difference: float, error: float) -> str:
    # One seed has no standard error.
    return f"{difference:+.1f}" + (f" ± {error:.1f}" if math.isfinite(error) else "")


def _range(span: RateRange | None) -> str:
    return "-" if span is None else f"{span.low:g} to {span.high:g}"


def verdicts(runs: pd.DataFrame, problems: Sequence[Problem], pairs: Sequence[Pair]) -> str:
    """Render one row per problem and pair: ranges, widening, loss inside the good range.

    Args:
        runs: Runs of all problems.
        problems: The networks.
        pairs: Borrowed optimizers and twins.

    Returns:
        A Markdown table; pairs without runs of both sides are left out.
    """
    rows: list[list[str]] = []
    for problem in problems:
        own = select(runs, problem)
        for pair in pairs:
            if not {label_of(pair.borrowed), label_of(pair.twin)} <= set(own["label"]):
                continue
            outcome = judge_pair(own, pair)
            top = outcome.twin is not None and outcome.twin.high == max(pair.lrs)
            sign = ">= " if top else ""
            rows.append(
                [
                    problem.heading,
                    label_of(pair.borrowed),
                    _range(outcome.borrowed),
                    _range(outcome.clipped),
                    _range(outcome.twin),
                    "-" if outcome.twin is None else f"{sign}{outcome.widening:.3g}",
                    f"{_with_error(outcome.difference, outcome.error)} at {outcome.worst_lr:g}",
                    "yes" if outcome.no_loss else "**no**",
                    str(own.loc[own["label"] == label_of(pair.twin), "seed"].nunique()),
                ]
            )
    header = ("network", "borrowed", "good rates", "with its widest clip", "twin")
    return table(
        [*header, "upper edge x", "largest loss inside", f"loss <= {LOSS:g}", "seeds"],
        rows,
    )


def select(runs: pd.DataFrame, problem: Problem) -> pd.DataFrame:
    """Rows of `runs` on a problem's data and network."""
    base = problem.base
    return runs[
        (runs["dataset"] == base.dataset)
        & (runs["architecture"] == base.architecture)
        & (runs["batch"] == base.batch)
    ]


def finished(
    runs: pd.DataFrame, problems: Sequence[Problem], pairs: Sequence[Pair]
) -> pd.DataFrame:
    """Leave out what an interrupted study has begun: means over unequal seeds would mislead.

    Args:
        runs: The study's runs.
        problems: The networks.
        pairs: Borrowed optimizers and twins.

    Returns:
        The runs of every problem, pair and seed with all contenders at all rates.
    """
    parts = [runs[:0]]
    for problem in problems:
        own = select(runs, problem)
        for pair in pairs:
            names = {label_of(c.optimizer, dict(c.options)) for c in pair.contenders()}
            mine = own[own["label"].isin(names) & own["lr"].isin(pair.lrs)]
            mine = mine.drop_duplicates(["label", "lr", "seed"])
            sizes = mine.groupby("seed")["lr"].transform("size")
            parts.append(mine[sizes == len(names) * len(pair.lrs)])
    return pd.concat(parts)


def _cell(row: pd.Series) -> str:
    failed = f", {100 * row['failed']:.0f} % failed" if row["failed"] else ""
    return f"{row['mean']:.1f} ({row['worst']:.1f}{failed})"


def pair_table(runs: pd.DataFrame, pair: Pair) -> str:
    """Render one problem's accuracies of a pair at every rate.

    Args:
        runs: The problem's runs.
        pair: Borrowed optimizer and twin.

    Returns:
        A Markdown table: mean, worst seed and share of failed runs; then the twin's paired
        difference from the borrowed optimizer.
    """
    rates = by_rate(runs)
    rows: list[list[str]] = []
    for contender in pair.contenders():
        label = label_of(contender.optimizer, dict(contender.options))
        cells = {float(r["lr"]): r for _, r in rates[rates["label"] == label].iterrows()}
        if cells:
            rows.append([label, *[_cell(cells[lr]) if lr in cells else "" for lr in pair.lrs]])
    twin, borrowed = label_of(pair.twin), label_of(pair.borrowed)
    differences = [paired(runs, twin, borrowed, lr) for lr in pair.lrs]
    shown = [f"{_with_error(d, e)} (n = {n})" if n else "" for d, e, n in differences]
    return table(
        ["lr", *[f"{lr:g}" for lr in pair.lrs]], [*rows, ["twin - borrowed, paired", *shown]]
    )


def render(runs: pd.DataFrame, problems: Sequence[Problem], pairs: Sequence[Pair]) -> str:
    """Render a study: its verdicts, then every problem's tables.

    Args:
        runs: The study's runs.
        problems: The networks.
        pairs: Borrowed optimizers and twins.

    Returns:
        Markdown.
    """
    seeds = ", ".join(str(seed) for seed in sorted(runs["seed"].unique()))
    parts = [f"Seeds {seeds}.", verdicts(runs, problems, pairs)]
    for problem in problems:
        own = select(runs, problem)
        tables = [pair_table(own, p) for p in pairs if label_of(p.borrowed) in set(own["label"])]
        if tables:
            note = "Test accuracy in %: mean (worst seed, share of failed runs)."
            parts += [f"### {problem.heading}", note, *tables]
    return "\n\n".join(parts) + "\n"
