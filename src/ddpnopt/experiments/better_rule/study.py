# SPDX-License-Identifier: MIT
"""The variants, and the problems of `when_it_helps` that they are tried on."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ddpnopt.experiments.markdown import table
from ddpnopt.experiments.records import RunConfig, RunResult
from ddpnopt.experiments.sweep import Contender, grid
from ddpnopt.experiments.when_it_helps.problems import (
    FAMILIES,
    PROBLEMS,
    RATIOS,
    STEPS,
    Problem,
    label,
)
from ddpnopt.experiments.when_it_helps.tables import score

#: In the order in which they run: those where the default rule is behind come first.
CHOSEN = (
    "text",
    "language",
    "regression",
    "cnn",
    "residual",
    "tanh",
    "deep",
    "noise",
    "deep-norm",
    "cnn-cycle",
    "dense-bn",
    "encoder",
)
#: Rates of a bounded step, which no rate can make too long.
ANY = (0.1, 0.3, 1.0, 3.0, 10.0, 1000.0)
LOWER = (0.01, 0.03, *ANY)


def variants(name: str) -> list[Contender]:
    """What is tried on a problem."""
    rates = LOWER[:-2] if name == "deep-norm" else ANY
    found = [
        Contender("ddpnopt-trust", rates),
        Contender("ddpnopt-trust", rates, (("feedback", False),)),
        Contender("ddpnopt-clipped", rates[:-1]),
        Contender("feedback-sgd-schedule-free", STEPS[2:] if name != "deep-norm" else STEPS[:5]),
        Contender("prodigy", (1.0,)),
    ]
    if importlib.util.find_spec("dadaptation"):
        found += [Contender("dadapt-sgd", (1.0,)), Contender("dadapt-adam", (1.0,))]
    if "adamw" in PROBLEMS[name].families:
        found += [
            Contender("ddpnopt-trust", (*RATIOS[2:], 1.0), (("curvature.inner", "adamw"),)),
            Contender("feedback-adamw-schedule-free", RATIOS[2:]),
        ]
    if name in ("cnn", "cnn-cycle", "residual"):
        found.append(Contender("feedback-adamw", RATIOS[2:], (("value.own_layer", False),)))
    if name in ("text", "language", "deep", "residual"):
        found.append(Contender("ddpnopt", STEPS[2:], (("unit_clip", 0.02),)))
    if name in ("cnn", "tanh", "text"):
        found.append(Contender("ddpnopt-trust-open-loop", ANY[1:]))
    if name == "regression":
        found.append(Contender("ddpnopt-quadratic-flow", STEPS[2:]))
    return found


@dataclass(frozen=True)
class Entry:
    """One optimizer on one problem, as far as it has run.

    Attributes:
        name: Label.
        means: Mean score by rate, over the seeds that choose.
        fresh: Scores at the best rate on fresh seeds.
        seconds: CPU seconds of a run, median.
    """

    name: str
    means: dict[float, float]
    fresh: list[float]
    seconds: float

    @property
    def best(self) -> float:
        """The rate with the best mean; among equals the lowest."""
        return max(sorted(self.means), key=lambda lr: round(self.means[lr], 6))


def entry(
    base: RunConfig,
    contender: Contender,
    seeds: Sequence[int],
    fresh: Sequence[int],
    results: Mapping[str, RunResult],
) -> Entry | None:
    """What is stored of it; None while a rate is missing."""
    runs = [results.get(c.key) for c in grid(base, [contender], seeds)]
    found = [r for r in runs if r is not None]
    if not found or len(found) < len(runs):
        return None
    by_rate: dict[float, list[float]] = {}
    for r in found:
        by_rate.setdefault(r.config.lr, []).append(score(r))
    means = {lr: float(np.mean(own)) for lr, own in by_rate.items()}
    seconds = [sum(e.cpu_seconds for e in r.epochs) for r in found if not r.diverged]
    middle = float(np.median(seconds)) if seconds else math.nan
    one = Entry(label(contender), means, [], middle)
    shown = [results.get(c.key) for c in confirming(base, contender, one.best, fresh)]
    return Entry(one.name, means, [score(r) for r in shown if r is not None], middle)


def confirming(
    base: RunConfig, contender: Contender, best: float, fresh: Sequence[int]
) -> list[RunConfig]:
    """The runs at the chosen rate."""
    return grid(base, [Contender(contender.optimizer, (best,), contender.options)], fresh)


def rivals(name: str) -> list[Contender]:
    """What the study has of the same problem: SGD's and AdamW's families."""
    names = [f for f in ("sgd", "momentum", "adamw") if f in PROBLEMS[name].families]
    return [c for f in names for c in FAMILIES[f].contenders()]


def render(problem: Problem, entries: Sequence[Entry]) -> str:
    """A problem's table, the best on the choosing seeds first."""
    rows = []
    for one in sorted(entries, key=lambda e: -e.means[e.best]):
        spread = f" ± {np.std(one.fresh, ddof=1):.1f}" if len(one.fresh) > 1 else ""
        shown = f"{np.mean(one.fresh):.1f}{spread} ({min(one.fresh):.1f})" if one.fresh else "-"
        rates = " ".join(f"{lr:g}:{mean:.0f}" for lr, mean in sorted(one.means.items()))
        cells = [one.name, f"{one.best:g}", f"{one.means[one.best]:.1f}", shown, rates]
        rows.append([*cells, f"{one.seconds:.1f}"])
    header = ["optimizer", "best rate", "choosing", "fresh: mean ± sd (worst)", "by rate", "s"]
    return f"### {problem.heading}\n\n{table(header, rows)}\n"
