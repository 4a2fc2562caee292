# SPDX-License-Identifier: MIT
"""Training loss and update norm over epochs, mean and band over seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from ddpnopt.experiments.plots import COLOURS, MARKERS
from ddpnopt.experiments.records import Epoch, RunResult


@dataclass(frozen=True)
class Curves:
    """A method's runs.

    Attributes:
        name: Its name.
        ours: Drawn solid; baselines are dashed.
        results: The runs.
    """

    name: str
    ours: bool
    results: tuple[RunResult, ...]


def stacked(results: Sequence[RunResult], value: Callable[[Epoch], float]) -> NDArray[np.float64]:
    """Stack curves as (runs, epochs): what is not finite, or comes after a divergence, is NaN.

    Args:
        results: The runs, one at least.
        value: Number of an epoch.

    Returns:
        The curves.
    """
    longest = max(len(r.epochs) for r in results)
    table = np.full((len(results), longest), np.nan)
    for row, result in enumerate(results):
        values = np.array([value(epoch) for epoch in result.epochs])
        table[row, : len(values)] = np.where(np.isfinite(values), values, np.nan)
    return table


def _band(axis: Axes, table: NDArray[np.float64], style: dict[str, Any]) -> None:
    seen = ~np.isnan(table).all(axis=0)
    if not seen.any():
        return
    epochs, kept = np.arange(1, table.shape[1] + 1)[seen], table[:, seen]
    axis.fill_between(
        epochs,
        np.nanmin(kept, axis=0),
        np.nanmax(kept, axis=0),
        color=style["color"],
        alpha=0.12,
        linewidth=0,
    )
    axis.plot(epochs, np.nanmean(kept, axis=0), **style)


def draw(curves: Sequence[Curves], loss: str, plateau: float) -> Figure:
    """Draw both panels.

    Args:
        curves: The methods.
        loss: Name of the loss, for the axis.
        plateau: Loss of the best constant output.

    Returns:
        Training loss on the left, update norm (logarithmic) on the right.
    """
    figure = Figure(figsize=(12, 5.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.axhline(plateau, color="0.4", linestyle=":", label="best constant output")
    for number, one in enumerate(curves):
        if not one.results:
            continue
        style = {
            "color": COLOURS[number % len(COLOURS)],
            "marker": MARKERS[number % len(MARKERS)],
            "markersize": 4,
            "linestyle": "-" if one.ours else "--",
            "label": one.name,
        }
        _band(left, stacked(one.results, lambda e: e.train_loss), style)
        _band(right, stacked(one.results, lambda e: e.update_norm), style)
    right.set_yscale("log")
    right.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=20))
    right.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    right.yaxis.set_minor_formatter(NullFormatter())
    last = max((len(r.epochs) for one in curves for r in one.results), default=1)
    left.set_ylim(0, 1.6 * plateau)
    left.set_ylabel(f"training loss: {loss}")
    right.set_ylabel("update norm |u_new - u_old|")
    for axis in (left, right):
        axis.set_xlabel("epoch")
        axis.set_xlim(0.5, last + 0.5)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.grid(alpha=0.25)
    if not any(one.results for one in curves):
        right.text(0.5, 0.5, "not run", transform=right.transAxes, ha="center", color="0.4")
    # To the right: the left corner is kept for the mark of quick runs.
    figure.suptitle("Deep sigmoid network: mean and range over seeds", x=0.995, ha="right")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure
