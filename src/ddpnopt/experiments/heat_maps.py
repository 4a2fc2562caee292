# SPDX-License-Identifier: MIT
"""Heat maps of stored runs over learning rate and one of the optimizer's options (as Fig. 4)."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colors
from matplotlib.figure import Figure

from ddpnopt.experiments.optimizers import Options, label_of
from ddpnopt.experiments.records import RunConfig, RunResult
from ddpnopt.experiments.selection import field
from ddpnopt.experiments.stored_plots import AXIS, COLUMN, Metric
from ddpnopt.experiments.sweep import frame

#: Characters of a line beside the colour bar.
_LABEL = 70


@dataclass(frozen=True)
class HeatMap:
    """Means over seeds on a grid of learning rate and option.

    Attributes:
        values: Rates (rows, ascending) by values of the option (columns, ascending); NaN where
            nothing is stored, infinite where a seed's loss is.
        option: The option's name.
        title: Problem and optimizer.
        label: What the colour means, with the direction of a difference.
        is_difference: The values are differences of two optimizers.
    """

    values: pd.DataFrame
    option: str
    title: str
    label: str
    is_difference: bool


def heat_map(
    results: Sequence[RunResult],
    option: str,
    metric: Metric = "loss",
    baseline: Sequence[RunResult] | None = None,
) -> HeatMap:
    """Average runs of one optimizer on a grid of learning rate and option.

    Args:
        results: Runs; those that set `option` must be of one optimizer on one data set and
            network, and differ in `option`, the rate and the seed alone.
        option: The option along the horizontal axis.
        metric: What is averaged over seeds.
        baseline: Runs of another optimizer at the same rates: cells are the baseline's mean minus
            the optimizer's, over the seeds that both have, as in Fig. 4 of the paper.

    Returns:
        The grid.

    Raises:
        ValueError: The runs differ in more, or none sets `option`.
    """
    results = with_option(results, option)
    first = _one_group(results, option)
    means = _cells(results, lambda r: field(r.config, option), metric, baseline)
    name = label_of(first.optimizer, _others(first.options, option))
    title = f"{first.dataset.upper()}, {first.architecture}"
    if baseline is None:
        return HeatMap(means, option, f"{title}: {name}", f"{AXIS[metric]}, mean", False)
    other = _one_group(baseline, None).label
    better = "positive" if metric == "loss" else "negative"
    label = f"{AXIS[metric]}\n{other} minus {name}\n({better}: {name} is better)"
    return HeatMap(means, option, title, label, True)


def _others(options: Options, option: str | None) -> Options:
    return {k: v for k, v in options.items() if k != option}


def with_option(results: Sequence[RunResult], option: str) -> list[RunResult]:
    """Keep the runs that set an option.

    Raises:
        ValueError: None does; the message lists the options that are set.
    """
    found = [r for r in results if field(r.config, option) is not None]
    if not found:
        known = sorted({key for r in results for key in r.config.options})
        raise ValueError(
            f"none of these runs sets {option!r}; options that are set: "
            f"{', '.join(known) or 'none'} (--by OPTION)"
        )
    return found


def _one_group(results: Sequence[RunResult], option: str | None) -> RunConfig:
    """The configuration of runs that differ in the rate, the seed and `option` alone."""
    groups: dict[str, RunConfig] = {}
    for config in (r.config for r in results):
        name = label_of(config.optimizer, _others(config.options, option))
        groups.setdefault(f"{config.dataset}, {config.architecture}, {name}", config)
    if len(groups) > 1:
        raise ValueError(
            "a heat map needs one optimizer on one problem, there are: "
            + "; ".join(sorted(groups))
            + ". Choose with --dataset, --arch, --optimizer, --where KEY=VALUE"
        )
    return next(iter(groups.values()))


def _cells(
    results: Sequence[RunResult],
    column: Callable[[RunResult], Any],
    metric: Metric,
    baseline: Sequence[RunResult] | None,
) -> pd.DataFrame:
    own = frame(results).assign(column=[column(r) for r in results])
    own["value"] = own[COLUMN[metric]].fillna(math.inf)
    if baseline is not None:
        other = frame(baseline)
        other["other"] = other[COLUMN[metric]].fillna(math.inf)
        own = own.merge(other[["lr", "seed", "other"]], on=["lr", "seed"])
        if own.empty:
            raise ValueError("the two optimizers have no learning rate and seed in common")
        own["value"] = own["other"] - own["value"]
    grouped = own.groupby(["lr", "column"])["value"]
    return grouped.agg(lambda x: x.mean(skipna=False)).unstack("column").sort_index()


def draw_heat_map(grid: HeatMap) -> Figure:
    """Draw a grid: a colour and a number per cell, missing cells visibly empty.

    Args:
        grid: From `heat_map`.

    Returns:
        The figure.
    """
    values = grid.values.to_numpy(dtype=np.float64)
    rows, columns = values.shape
    figure = Figure(
        figsize=(max(6.0, 1.15 * columns + 3.4), max(4.0, 0.62 * rows + 2.0)),
        layout="constrained",
    )
    axis = figure.subplots()
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    if grid.is_difference:
        reach = max(abs(low), abs(high)) or 1.0
        low, high = -reach, reach
    scale = colors.Normalize(low, high if high > low else low + 1.0)
    axis.set_facecolor("#DDDDDD")
    image = axis.imshow(
        np.ma.masked_invalid(values),
        cmap="RdBu" if grid.is_difference else "viridis",
        norm=scale,
        aspect="auto",
        origin="lower",
    )
    for (row, column), value in np.ndenumerate(values):
        text = "–" if np.isnan(value) else f"{value:.3g}"
        red, green, blue, _ = image.to_rgba(value) if np.isfinite(value) else (0.87,) * 4
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        axis.text(column, row, text, ha="center", va="center", color="white" if dark else "black")
    axis.set_xticks(range(columns), [_number(v) for v in grid.values.columns])
    axis.set_yticks(range(rows), [_number(v) for v in grid.values.index])
    axis.set(xlabel=grid.option, ylabel="learning rate", title=grid.title)
    # Names with many options are longer than the figure is high.
    lines = [textwrap.fill(line, _LABEL) for line in grid.label.splitlines()]
    figure.colorbar(image).set_label("\n".join(lines), fontsize=9 if len(grid.label) < 200 else 7)
    return figure


def _number(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
