# SPDX-License-Identifier: MIT
"""Tables of the study: best accuracy on fresh seeds, good rates, equal time, for every network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ddpnopt.experiments.markdown import table
from ddpnopt.experiments.records import RunConfig, RunResult
from ddpnopt.experiments.summary import stretch
from ddpnopt.experiments.sweep import Contender, grid
from ddpnopt.experiments.when_it_helps.problems import FAMILIES, Family, Problem, label

#: Accuracies count as good so many points below the family's best.
POINTS = 2.0
Results = Mapping[str, RunResult]


def score(result: RunResult) -> float:
    """Accuracy in %, or the share of the variance that is explained; at worst 0."""
    found = 100.0 * result.test_accuracy
    return max(found, 0.0) if math.isfinite(found) else 0.0


def epoch_seconds(results: Sequence[RunResult]) -> float:
    """CPU seconds of an epoch: the median over all whole epochs."""
    whole = [e.cpu_seconds for r in results for e in r.epochs if not r.diverged]
    return float(np.median(whole)) if whole else math.nan


def at_epoch(result: RunResult, epoch: float) -> float:
    """The score when so many epochs are over, linear between them; chance before the first."""
    scores = [100.0 * result.chance, *(100.0 * e.test_accuracy for e in result.epochs)]
    scores = [max(s, 0.0) if math.isfinite(s) else 0.0 for s in scores]
    return float(np.interp(epoch, np.arange(len(scores)), scores))


@dataclass(frozen=True)
class Measured:
    """One optimizer on one problem.

    Attributes:
        contender: It.
        means: Mean score at each rate, over the seeds that choose.
        best: The rate with the best mean.
        chosen: The runs that chose, by rate.
        fresh: Its runs at the best rate with fresh seeds, by seed.
    """

    contender: Contender
    means: dict[float, float]
    best: float
    chosen: dict[float, list[RunResult]]
    fresh: dict[int, RunResult]

    @property
    def label(self) -> str:
        """Its name."""
        return label(self.contender)

    @property
    def scores(self) -> list[float]:
        """Scores of the fresh seeds."""
        return [score(r) for r in self.fresh.values()]

    @property
    def mean(self) -> float:
        """Mean of the fresh seeds."""
        return float(np.mean(self.scores))

    @property
    def cost(self) -> float:
        """CPU seconds of an epoch."""
        return epoch_seconds([r for runs in self.chosen.values() for r in runs])

    def failed(self, lrs: Sequence[float]) -> float:
        """Share of the runs at these rates that diverged or ended near chance."""
        runs = [r.failed for lr in lrs for r in self.chosen[lr]]
        return float(np.mean(runs))

    def good(self, reference: float) -> tuple[float, float] | None:
        """The unbroken stretch of good rates around the best one, if that is good."""
        lrs = sorted(self.means)
        near = [self.means[lr] >= reference - POINTS for lr in lrs]
        found = stretch(near, lrs.index(self.best))
        return found and (lrs[found[0]], lrs[found[1]])

    def in_time(self, epochs: float) -> float:
        """The best mean over the rates when a part of the epochs is over."""
        return max(
            float(np.mean([at_epoch(r, epochs) for r in runs])) for runs in self.chosen.values()
        )


def choosing(base: RunConfig, contender: Contender, seeds: range) -> list[RunConfig]:
    """The runs that choose a contender's rate."""
    return grid(base, [contender], seeds)


def best_rate(base: RunConfig, contender: Contender, seeds: range, results: Results) -> float:
    """The rate with the best mean score; among equals the lowest."""
    found: dict[float, list[float]] = {}
    for config in choosing(base, contender, seeds):
        found.setdefault(config.lr, []).append(score(results[config.key]))
    return max(sorted(found), key=lambda lr: round(float(np.mean(found[lr])), 6))


def confirming(
    base: RunConfig, contender: Contender, seeds: range, fresh: range, results: Results
) -> list[RunConfig]:
    """The runs of the table, at the chosen rate with fresh seeds."""
    best = best_rate(base, contender, seeds, results)
    return grid(base, [Contender(contender.optimizer, (best,), contender.options)], fresh)


def measure(
    problem: Problem, family: Family, seeds: range, fresh: range, results: Results
) -> list[Measured] | None:
    """A family's optimizers on a problem, the three depths first; None while runs are missing."""
    found = []
    for contender in family.contenders():
        configs = choosing(problem.base, contender, seeds)
        if any(c.key not in results for c in configs):
            return None
        chosen: dict[float, list[RunResult]] = {}
        for config in configs:
            chosen.setdefault(config.lr, []).append(results[config.key])
        means = {lr: float(np.mean([score(r) for r in runs])) for lr, runs in chosen.items()}
        shown = confirming(problem.base, contender, seeds, fresh, results)
        if any(c.key not in results for c in shown):
            return None
        fresh_runs = {c.seed: results[c.key] for c in shown}
        found.append(Measured(contender, means, shown[0].lr, chosen, fresh_runs))
    return found


def difference(one: Measured, other: Measured) -> tuple[float, float]:
    """Mean of the paired differences on the fresh seeds, and its standard error."""
    pairs = [score(one.fresh[s]) - score(other.fresh[s]) for s in one.fresh]
    error = float(np.std(pairs, ddof=1) / math.sqrt(len(pairs))) if len(pairs) > 1 else math.nan
    return float(np.mean(pairs)), error


@dataclass(frozen=True)
class Verdict:
    """A family on a problem.

    Attributes:
        problem: It.
        family: It.
        depths: Off, open loop, closed loop.
        rivals: The others; maybe none.
        reference: The best mean of all, on the seeds that choose.
    """

    problem: Problem
    family: Family
    depths: list[Measured]
    rivals: list[Measured]
    reference: float

    @classmethod
    def of(cls, problem: Problem, family: Family, found: list[Measured]) -> Verdict:
        """From `measure`."""
        reference = max(max(m.means.values()) for m in found)
        return cls(problem, family, found[:3], found[3:], reference)

    @property
    def best_rival(self) -> Measured:
        """The borrowed optimizer or one of its rivals: the best mean on the seeds that choose."""
        return max([self.depths[0], *self.rivals], key=lambda m: max(m.means.values()))

    @property
    def widest_rival(self) -> Measured:
        """Of the same, the one with the widest stretch of good rates."""
        return max([self.depths[0], *self.rivals], key=self.factor)

    def in_time_of_off(self, one: Measured) -> tuple[float, float]:
        """An epoch's time over off's, and the best score in the time that off took for all."""
        ratio = one.cost / self.depths[0].cost
        if not math.isfinite(ratio):
            return ratio, math.nan
        # The denominator's own noise must not give the borrowed optimizer more time than it took.
        return ratio, one.in_time(self.problem.base.epochs / max(ratio, 1.0))

    def factor(self, one: Measured) -> float:
        """Highest over lowest good rate; 0 where none is good."""
        good = one.good(self.reference)
        return good[1] / good[0] if good else 0.0


def verdicts(
    problems: Mapping[str, Problem], seeds: range, fresh: range, results: Results
) -> list[Verdict]:
    """All that is complete."""
    found = []
    for problem in problems.values():
        for name in problem.families:
            family = FAMILIES[name]
            measured = measure(problem, family, seeds, fresh, results)
            if measured is not None:
                found.append(Verdict.of(problem, family, measured))
    return found


def _signed(pair: tuple[float, float]) -> str:
    mean, error = pair
    text = f"{mean:+.1f} ± {error:.1f}"
    return f"**{text}**" if abs(mean) > 2 * error and abs(mean) >= 0.1 else text


def _factor(verdict: Verdict, one: Measured) -> str:
    good = one.good(verdict.reference)
    return "-" if good is None else f"{good[1] / good[0]:.3g}"


def summary(found: Sequence[Verdict]) -> str:
    """One row for each network and borrowed optimizer: does it help, and which depth?"""
    rows = []
    for v in found:
        off, opened, closed = v.depths
        rows.append(
            [
                v.problem.heading,
                v.family.title,
                f"{off.mean:.1f}",
                _signed(difference(opened, off)),
                _signed(difference(closed, off)),
                f"{_signed(difference(closed, v.best_rival))} ({v.best_rival.label})",
                " / ".join(_factor(v, m) for m in v.depths),
                f"{_factor(v, v.widest_rival)} ({v.widest_rival.label})",
            ]
        )
    header = ["network", "around", "off", "open - off", "closed - off", "closed - best rival"]
    return table([*header, "good rates: off / open / closed", "widest rival"], rows)


def details(v: Verdict) -> str:
    """All optimizers of a family on a problem."""
    rows = []
    for m in (*v.depths, *v.rivals):
        good = m.good(v.reference)
        ratio, timed = v.in_time_of_off(m)
        lrs = sorted(m.means)
        spread = float(np.std(m.scores, ddof=1)) if len(m.scores) > 1 else 0.0
        rows.append(
            [
                m.label,
                f"{m.best:g}",
                f"{m.mean:.1f} ± {spread:.1f} ({min(m.scores):.1f})",
                "-" if good is None else f"{good[0]:g} to {good[1]:g}",
                " ".join(f"{m.means[lr]:.0f}" for lr in lrs),
                f"{100 * m.failed(lrs):.0f} %",
                f"{ratio:.1f}",
                f"{timed:.1f}",
            ]
        )
    header = ["optimizer", "best rate", "fresh seeds: mean ± sd (worst)", "good rates"]
    listed = ", ".join(f"{lr:g}" for lr in v.family.lrs)
    return table([*header, f"mean at {listed}", "failed", "time x", "in its time"], rows)


def _against(pairs: Sequence[tuple[float, float]]) -> str:
    """How many differences are significant, in both directions."""
    better = sum(mean > 2 * error and mean >= 0.1 for mean, error in pairs)
    worse = sum(-mean > 2 * error and mean <= -0.1 for mean, error in pairs)
    average = float(np.mean([mean for mean, _ in pairs]))
    return f"{better} better, {worse} worse, {average:+.1f}"


def _failed(found: Sequence[Verdict], depth: int) -> str:
    return f"{100 * np.mean([v.depths[depth].failed(v.family.lrs) for v in found]):.0f} %"


def counts(found: Sequence[Verdict]) -> str:
    """All networks and borrowed optimizers in figures, those that mix samples apart."""
    groups = {
        "samples kept apart": [v for v in found if not v.problem.mixes],
        "behind BatchNorm": [v for v in found if v.problem.mixes],
    }
    rows = []
    for name, some in groups.items():
        if not some:
            continue
        for depth, title in ((1, "open loop"), (2, "closed loop")):
            own = [(v, v.depths[depth]) for v in some]
            wider = sum(v.factor(m) >= 3 * v.factor(v.depths[0]) > 0 for v, m in own)
            only = sum(v.factor(m) > 0 == v.factor(v.depths[0]) for v, m in own)
            rival = sum(v.factor(m) > v.factor(v.widest_rival) for v, m in own)
            rows.append(
                [
                    f"{name}, {title}",
                    str(len(some)),
                    _against([difference(m, v.depths[0]) for v, m in own]),
                    _against([difference(m, v.best_rival) for v, m in own]),
                    f"{wider} + {only}",
                    str(rival),
                    f"{_failed(some, depth)} (off: {_failed(some, 0)})",
                ]
            )
    header = ["", "cases", "against off", "against the best rival"]
    header += ["range >= 3x off's + off has none", "wider than every rival's", "failed runs"]
    return table(header, rows)


def _preface(seeds: range, fresh: range) -> str:
    return (
        f"Rates chosen on seeds {seeds[0]} to {seeds[-1]}, on which the good rates and the share "
        "of failed runs were measured, too; means and differences are of the fresh seeds "
        f"{fresh[0]} to {fresh[-1]} at the chosen rates, paired, with their standard error, in "
        "points; bold: more than two standard errors from 0. Good rates: the unbroken stretch "
        f"around the best one within {POINTS:g} points of the family's best mean, highest over "
        "lowest (-: no rate is good); rates are half a decade apart. Best rival: the borrowed "
        "optimizer or one of its rivals, by the mean on the choosing seeds."
    )


def render(found: Sequence[Verdict], seeds: range, fresh: range) -> str:
    """The study as Markdown: in figures, and a row for each network and borrowed optimizer."""
    parts = [counts(found), _preface(seeds, fresh), summary(found)] if found else []
    return "\n\n".join(parts) + "\n"


def render_details(found: Sequence[Verdict]) -> str:
    """All optimizers of all families on all networks."""
    text = []
    for v in found:
        text += [f"### {v.problem.heading}: {v.family.title}", details(v)]
    return "\n\n".join(text) + "\n"
