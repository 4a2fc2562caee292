# SPDX-License-Identifier: MIT
"""Table 5: the learning rates that the paper searched, beside the rates that do well here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Self

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from pydantic import Field, model_validator

from ddpnopt.experiments.optimizers import OPTIMIZERS
from ddpnopt.experiments.plots import COLOURS
from ddpnopt.experiments.records import RunConfig
from ddpnopt.experiments.reproduce.ablation import configure
from ddpnopt.experiments.reproduce.ablation_settings import Network
from ddpnopt.experiments.reproduce.describe import span
from ddpnopt.experiments.reproduce.outcome import EMPTY, Outcome, Request, View, rerun
from ddpnopt.experiments.reproduce.published import search_range
from ddpnopt.experiments.reproduce.runs import obtain, spent
from ddpnopt.experiments.reproduce.schema import (
    Count,
    OptimizerName,
    Options,
    Positive,
    Seed,
    Several,
    Strict,
    load,
    takes,
)
from ddpnopt.experiments.summary import by_rate, rate_range
from ddpnopt.experiments.sweep import frame


class Seeds(Strict):
    """How often each rate is tried."""

    seeds: Count = 4
    first_seed: Seed = 0


class QuickSearch(Strict):
    """Sizes with `--quick`."""

    seeds: Count = 1
    epochs: Count = 1


class Search(Strict):
    """An optimizer and the rates that it is tried at."""

    optimizer: OptimizerName
    lr: Several[Positive]
    options: Options = {}

    @model_validator(mode="after")
    def _options_exist(self) -> Self:
        takes(self.optimizer, self.lr[0], self.options, "options")
        return self

    @property
    def label(self) -> str:
        """The optimizer's name for readers."""
        return OPTIMIZERS[self.optimizer].label


class Table5Settings(Strict):
    """The settings file of Table 5.

    Attributes:
        points: A rate is good within so many points of the optimizer's own best mean accuracy.
        runs: Seeds.
        quick: Sizes with `--quick`.
        problem: Networks and data.
        search: Optimizers and rates.
    """

    points: Annotated[float, Field(gt=0.0, le=100.0)] = 2.0
    runs: Seeds = Seeds()
    quick: QuickSearch = QuickSearch()
    problem: Annotated[tuple[Network, ...], Field(strict=False, min_length=1)]
    search: Annotated[tuple[Search, ...], Field(strict=False, min_length=1)]


def table5(request: Request) -> Outcome:
    """Search rates for every baseline, and say whether the best lies in the published range.

    Args:
        request: What the user asked for.

    Returns:
        One row per problem and optimizer.
    """
    settings = load(Table5Settings, "table5", request.settings)
    quick = settings.quick if request.quick else None
    seeds = request.seeds or (quick.seeds if quick else settings.runs.seeds)
    first = settings.runs.first_seed
    cells = [
        (problem, search, _configs(request, problem, search, range(first, first + seeds), quick))
        for problem in settings.problem
        for search in settings.search
    ]
    results = obtain(request, [c for _, _, configs in cells for c in configs], "table5")
    rows, rates = [], []
    for problem, search, configs in cells:
        runs = [results[c.key] for c in configs if c.key in results]
        own = by_rate(frame(runs)) if runs else pd.DataFrame()
        rows.append(_row(problem, search, own, settings.points))
        rates.append((problem, search, own))
    found = pd.DataFrame(rows)
    inside = int((found["verdict"] == INSIDE).sum())
    return Outcome(
        name="table5",
        title="Table 5: learning rates searched by the paper, and rates that do well here",
        settings=_setting(settings, first, seeds, request),
        rows=found,
        notes=(
            "**Measured** is the rate with the best mean test accuracy on the seeds named below; "
            "**good rates** is the unbroken stretch of tried rates around it whose mean accuracy "
            f"is within {settings.points:g} points of that best. `sd`, `seeds` and `worst` are of "
            "the accuracy (%) at the best rate. The verdict says whether the best rate lies in the "
            "range that the paper searched.",
        ),
        figure=lambda: draw(rates, seeds),
        quick=request.quick,
        command=rerun(request, "table5"),
        seconds=spent(results.values()),
        views=(View("", _view(found)),),
        summary=f"best rate inside the published range: {inside} of {len(found)}",
    )


INSIDE, BELOW, ABOVE = "inside the published range", "below it", "above it"


def _configs(
    request: Request, problem: Network, search: Search, seeds: range, quick: QuickSearch | None
) -> list[RunConfig]:
    base = problem.config(request, request.epochs or (quick.epochs if quick else problem.epochs))
    contender = search.optimizer, dict(search.options)
    return [configure(base, contender, lr, seed) for seed in seeds for lr in search.lr]


def _row(problem: Network, search: Search, rates: pd.DataFrame, points: float) -> dict[str, object]:
    printed = search_range(search.optimizer)
    row: dict[str, object] = {
        "dataset": problem.dataset,
        "optimizer": search.optimizer,
        "published": "" if printed is None else f"{printed[0]:g} to {printed[1]:g}",
    }
    if rates.empty or rates["mean"].isna().all():
        said = "not run" if rates.empty else "not measured: every run crashed"
        return {**row, "measured": math.nan, "seeds": 0, "verdict": said}
    best = rates.loc[rates["mean"].idxmax()]
    lr = float(best["lr"])
    span = rate_range(rates, float(best["mean"]), points)
    said = "none published"
    if printed is not None:
        said = INSIDE if printed[0] <= lr <= printed[1] else BELOW if lr < printed[0] else ABOVE
    return {
        **row,
        "measured": lr,
        "sd": float(best["sd"]) if best["seeds"] > 1 else math.nan,
        "seeds": int(best["seeds"]),
        "worst": float(best["worst"]),
        "verdict": said,
        "accuracy": float(best["mean"]),
        "good_low": span.low if span else math.nan,
        "good_high": span.high if span else math.nan,
        "at_edge": lr in (min(search.lr), max(search.lr)),
    }


def _view(found: pd.DataFrame) -> pd.DataFrame:
    lines = []
    for row in found.to_dict("records"):
        ran = not math.isnan(row["measured"])
        spread = f" ± {row['sd']:.1f}" if ran and not math.isnan(row["sd"]) else ""
        lines.append(
            {
                "data": str(row["dataset"]).upper(),
                "optimizer": OPTIMIZERS[row["optimizer"]].label,
                "published range": row["published"] or EMPTY,
                "best rate": f"{row['measured']:g}" if ran else EMPTY,
                "good rates": f"{row['good_low']:g} to {row['good_high']:g}" if ran else EMPTY,
                "accuracy there (%)": f"{row['accuracy']:.1f}{spread}" if ran else EMPTY,
                "worst seed": f"{row['worst']:.1f}" if ran else EMPTY,
                "verdict": row["verdict"],
            }
        )
    return pd.DataFrame(lines)


def _setting(settings: Table5Settings, first: int, seeds: int, request: Request) -> str:
    lines = [f"- seeds {span(range(first, first + seeds))}"]
    for problem in settings.problem:
        epochs = request.epochs or (settings.quick.epochs if request.quick else problem.epochs)
        lines.append(
            f"- {problem.dataset}: `{problem.architecture}`, batch {problem.batch}, epochs: "
            f'{epochs}, inputs scaled "{problem.scale}", initialisation "{problem.initialisation}"'
        )
    for search in settings.search:
        options = ", ".join(f"{k} = {v}" for k, v in search.options.items())
        tried = ", ".join(f"{lr:g}" for lr in search.lr)
        lines.append(f"- {search.label}{f' ({options})' if options else ''}: rates {tried}")
    return "\n".join(lines)


def draw(rates: Sequence[tuple[Network, Search, pd.DataFrame]], seeds: int) -> Figure:
    """Draw accuracy over the rate, the published range shaded, one panel per optimizer.

    Args:
        rates: A problem, an optimizer and its rows of `by_rate`.
        seeds: Number of seeds, for the heading.

    Returns:
        The figure.
    """
    problems = list(dict.fromkeys(problem.dataset for problem, _, _ in rates))
    searches = list({search.optimizer: search for _, search, _ in rates}.values())
    figure = Figure(figsize=(4.3 * len(searches), 4.4), layout="constrained")
    axes = figure.subplots(1, len(searches), squeeze=False, sharey=True)[0]
    for axis, search in zip(axes, searches, strict=True):
        printed = search_range(search.optimizer)
        if printed is not None:
            axis.axvspan(*printed, color="#999999", alpha=0.25, linewidth=0, label="paper's range")
        for problem, own_search, own in rates:
            if own_search.optimizer != search.optimizer or own.empty or own["mean"].isna().all():
                continue
            colour = COLOURS[problems.index(problem.dataset)]
            name = problem.dataset.upper()
            axis.plot(own["lr"], own["mean"], "o-", color=colour, markersize=4.5, label=name)
            axis.fill_between(
                own["lr"], own["worst"], own["best"], color=colour, alpha=0.12, linewidth=0
            )
        # Set by hand: where nothing was measured there is nothing to take them from.
        ends = [*search.lr, *(printed or ())]
        axis.set_xlim(0.7 * min(ends), 1.4 * max(ends))
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1.0,), numticks=12))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set(xlabel="learning rate", title=search.label, ylim=(0, 102))
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("test accuracy (%)")
    axes[0].legend(frameon=False, loc="lower center", fontsize=9)
    figure.suptitle(f"Accuracy over the learning rate (mean and range; seeds: {seeds})")
    return figure
