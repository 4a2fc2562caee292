# SPDX-License-Identifier: MIT
"""A comparison in two phases: some seeds choose each optimizer's rate, fresh ones judge it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pandas as pd

from ddpnopt.experiments.data import load
from ddpnopt.experiments.markdown import table
from ddpnopt.experiments.sweep import Contender, frame, grid
from ddpnopt.experiments.training import RunConfig, RunResult
from ddpnopt.experiments.twins import Problem

#: The rate is chosen on so many seeds, from the first on.
CHOOSING = 2
#: The seeds of the table lie so far behind the first.
FRESH = 100

HEADER = (
    "optimizer",
    "best rate",
    "test accuracy, %",
    "sd",
    "worst seed",
    "training loss",
    "CPU ms per step",
    "failed runs",
)


@dataclass(frozen=True)
class Seeds:
    """Which seeds choose and which are shown.

    Attributes:
        first: The first of those that choose.
        shown: Number of seeds in the table.
    """

    first: int
    shown: int

    @property
    def choosing(self) -> range:
        """The seeds that choose the rate."""
        return range(self.first, self.first + CHOOSING)

    @property
    def fresh(self) -> range:
        """The seeds of the table; they chose nothing."""
        return range(self.first + FRESH, self.first + FRESH + self.shown)


@cache
def _training_samples(dataset: str, folder: Path | None) -> int:
    return len(load(dataset, seed=0, folder=folder).y_train)


def milliseconds(result: RunResult) -> float:
    """CPU time of a training step in ms, mean over the run's steps.

    Args:
        result: A run.

    Returns:
        Milliseconds; NaN where the run ended early, since its last epoch has fewer steps.
    """
    if result.diverged:
        return math.nan
    config = result.config
    samples = config.train_samples or _training_samples(config.dataset, config.data)
    steps = math.ceil(samples / config.batch) * len(result.epochs)
    return 1000.0 * sum(e.cpu_seconds for e in result.epochs) / steps


def _mean_loss(results: Sequence[RunResult]) -> float:
    loss = sum(r.train_loss for r in results) / len(results)
    return loss if math.isfinite(loss) else math.inf


def best_rate(results: Iterable[RunResult]) -> float:
    """Choose one optimizer's rate.

    Args:
        results: Its runs at all rates.

    Returns:
        The rate with the best mean test accuracy; among equals the one with the lower mean training
        loss, then the lower rate.
    """
    groups: dict[float, list[RunResult]] = {}
    for result in results:
        groups.setdefault(result.config.lr, []).append(result)

    def merit(lr: float) -> tuple[float, float, float]:
        own = groups[lr]
        # Rounded, so that the order of a sum does not decide between equals.
        accuracy = round(sum(r.test_accuracy for r in own) / len(own), 9)
        return accuracy, -_mean_loss(own), -lr

    return max(groups, key=merit)


def _found(
    configs: Iterable[RunConfig], results: Mapping[str, RunResult]
) -> list[RunResult] | None:
    """The results of all these, or None while one is missing."""
    own = [results.get(c.key) for c in configs]
    return None if None in own else [r for r in own if r is not None]


def choosing_configs(base: RunConfig, contender: Contender, seeds: Seeds) -> list[RunConfig]:
    """List the runs that choose a contender's rate."""
    return grid(base, [contender], seeds.choosing)


def fresh_configs(
    base: RunConfig, contender: Contender, seeds: Seeds, results: Mapping[str, RunResult]
) -> list[RunConfig]:
    """List the runs of the table, at the chosen rate.

    Args:
        base: The problem.
        contender: The optimizer and its rates.
        seeds: The seeds.
        results: Results by the keys of their configurations.

    Returns:
        One configuration per fresh seed; none while runs that choose the rate are missing.
    """
    chosen = _found(choosing_configs(base, contender, seeds), results)
    if not chosen:
        return []
    best = Contender(contender.optimizer, (best_rate(chosen),), contender.options)
    return grid(base, [best], seeds.fresh)


def row(results: Sequence[RunResult]) -> list[str]:
    """Render one optimizer's row of the table.

    Args:
        results: Its runs at the chosen rate, on fresh seeds.

    Returns:
        Cells, see `HEADER`.
    """
    accuracy = [100.0 * r.test_accuracy for r in results]
    spread = f"{statistics.stdev(accuracy):.1f}" if len(accuracy) > 1 else "-"
    times = [t for t in map(milliseconds, results) if math.isfinite(t)]
    return [
        results[0].config.label,
        f"{results[0].config.lr:g}",
        f"{statistics.fmean(accuracy):.1f}",
        spread,
        f"{min(accuracy):.1f}",
        f"{statistics.fmean(r.train_loss for r in results):.4f}",
        f"{statistics.median(times):.2f}" if times else "-",
        f"{sum(r.failed for r in results)} of {len(results)}",
    ]


def render(
    problems: Iterable[Problem],
    contenders: Sequence[Contender],
    seeds: Seeds,
    results: Mapping[str, RunResult],
) -> str:
    """Render a table for each problem; optimizers with missing runs are left out.

    Args:
        problems: Networks.
        contenders: Optimizers and their rates.
        seeds: The seeds.
        results: Results by the keys of their configurations.

    Returns:
        Markdown.
    """
    listed = [", ".join(str(seed) for seed in group) for group in (seeds.choosing, seeds.fresh)]
    parts = [f"Rates chosen on seeds {listed[0]}; the tables are of seeds {listed[1]}."]
    for problem in problems:
        rows: list[list[str]] = []
        edges: list[str] = []
        for contender in contenders:
            own = _found(fresh_configs(problem.base, contender, seeds, results), results)
            if own:
                rows.append(row(own))
                if own[0].config.lr in (min(contender.lrs), max(contender.lrs)):
                    edges.append(rows[-1][0])
        if not rows:
            continue
        parts += [f"### {problem.heading}", table(HEADER, rows)]
        if edges:
            parts.append(f"Best rate at an edge of the range: {', '.join(edges)}.")
    return "\n\n".join(parts) + "\n"


def rows_of(
    problems: Iterable[Problem],
    contenders: Sequence[Contender],
    seeds: Seeds,
    results: Mapping[str, RunResult],
) -> pd.DataFrame:
    """Make the table of all runs that the study's tables rest on; as `render` takes them."""
    used: list[RunResult] = []
    for problem in problems:
        for contender in contenders:
            fresh = _found(fresh_configs(problem.base, contender, seeds, results), results)
            if fresh:
                chosen = choosing_configs(problem.base, contender, seeds)
                used += [*(results[c.key] for c in chosen), *fresh]
    runs = frame(used)
    if used:
        runs["ms_per_step"] = [milliseconds(r) for r in used]
        runs["phase"] = ["table" if r.config.seed in seeds.fresh else "choice" for r in used]
        runs = runs.drop(columns=["curve", "seconds"])
    return runs
